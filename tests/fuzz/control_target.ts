/**
 * A hostile client of a relay's control socket: bytes that are almost JSON-RPC, to a relay service with an embedded device.
 *
 * @module
 */
import { SimDevice } from "../../src/devices/sim_device.ts";
import { connectUnix } from "../../src/ffi/mod.ts";
import { ControlClient } from "../../src/relay/control.ts";
import { DEFAULT_RELAY_CONFIG } from "../../src/relay/relay.ts";
import { controlPath } from "../../src/relay/runtime_dir.ts";
import { RelayService } from "../../src/relay/service.ts";
import { TempDir } from "../support/temp.ts";
import type { Random } from "./random.ts";
import { type FuzzSession, type FuzzTarget, type Outcome, refuseFaults, signOf, toBytes, toText } from "./target.ts";

const METHODS = ["status", "set", "vrings", "messages", "iova", "iova_alloc", "iova_free"];
const KEYS = [
  "mode",
  "queue",
  "force_shadow",
  "switch_timeout_ms",
  "after",
  "size",
  "iova",
  "asid",
  "perm",
  "tag",
  "map",
  "align",
  "bytes",
  "queues",
  "__proto__",
];
const WORDS = [
  "auto",
  "shadow",
  "used",
  "rw",
  "r",
  "0x1000",
  "0xffffffffffffffff",
  "4KiB",
  "-1",
  "",
  "constructor",
  "\u0000",
  "\ud800",
  "1e400",
];

function value(random: Random, depth = 0): unknown {
  switch (random.below(depth > 3 ? 6 : 8)) {
    case 0:
      return null;
    case 1:
      return random.once(2);
    case 2:
      return random.pick([0, -0, 1, -1, 1.5, 4096, 2 ** 31, 2 ** 32, 2 ** 53, 1e308, -1e308]);
    case 3:
      return Number(random.u64());
    case 4:
      return random.pick(WORDS);
    case 5:
      return `0x${random.u64().toString(16)}`;
    case 6:
      return Array.from({ length: random.below(5) }, () => value(random, depth + 1));
    default:
      return record(random, depth + 1);
  }
}

function record(random: Random, depth = 0): Record<string, unknown> {
  return Object.fromEntries(Array.from({ length: random.below(5) }, () => [random.pick(KEYS), value(random, depth)]));
}

const encoder = new TextEncoder();

function line(random: Random): string {
  const method = random.once(8) ? random.pick(["stop2", "toString", "__proto__", "hasOwnProperty", ""]) : random.pick(METHODS);
  let params: unknown = random.once(8) ? value(random) : record(random);
  if (method === "iova_alloc" && random.once(2)) params = { size: 4096 << random.below(6), ...record(random) };
  // Waiting is what it is for.
  if (method === "messages" && typeof params === "object") params = { ...params, wait_ms: random.pick([0, 1, -1, "x", null]) };
  const document: Record<string, unknown> = { jsonrpc: "2.0", id: random.once(4) ? value(random) : random.below(100), method, params };
  if (random.once(10)) delete document[random.pick(Object.keys(document))];
  let text = JSON.stringify(random.once(20) ? [document, value(random)] : document);
  if (random.once(30)) text = "[".repeat(1 + random.below(20_000)) + text;
  if (random.once(40)) text = `{"id":${"[".repeat(5000)}${"]".repeat(5000)},"method":"status"}`;
  const bytes = encoder.encode(text);
  return toText(random.once(5) ? random.mangle(bytes) : bytes);
}

function generate(random: Random, pool: readonly string[][]): string[] {
  if (pool.length > 0 && random.once(3)) {
    const lines = [...random.pick(pool)];
    const at = random.below(lines.length);
    lines[at] = random.once(2) ? line(random) : toText(random.mangle(toBytes(lines[at]!)));
    return lines;
  }
  return Array.from({ length: 1 + random.below(60) }, () => line(random));
}

class Session implements FuzzSession<string[]> {
  readonly #dir = new TempDir();
  readonly #service: RelayService;
  readonly #done: Promise<void>;
  readonly #before = Deno.env.get("SVQ_RUNTIME_DIR");
  generate = generate;

  private constructor() {
    Deno.env.set("SVQ_RUNTIME_DIR", this.#dir.join("run"));
    this.#service = new RelayService({
      name: "fuzz",
      front: { kind: "listen", path: this.#dir.join("front.sock") },
      device: "sim:loopback",
      openDevice: () => SimDevice.open({ kind: "loopback", queues: 2 }),
      config: { ...DEFAULT_RELAY_CONFIG },
      log: () => {},
    });
    this.#done = this.#service.start().then(() => void this.#service.run());
  }

  static async open(): Promise<Session> {
    const session = new Session();
    await session.#done;
    return session;
  }

  async run(lines: string[]): Promise<Outcome> {
    const signs = new Set<string>();
    using stream = connectUnix(controlPath("fuzz"));
    const answers = (async () => {
      const decoder = new TextDecoder();
      const bytes = new Uint8Array(65536);
      let text = "";
      try {
        for (;;) {
          const { bytes: count } = await stream.receive(bytes);
          if (count === 0) break;
          text += decoder.decode(bytes.subarray(0, count), { stream: true });
        }
      } catch {
        // It has hung up.
      }
      return text.split("\n").filter((answer) => answer !== "");
    })();
    try {
      for (const text of lines) await stream.send(new Uint8Array([...toBytes(text), 10]));
      stream.shutdownWriting();
    } catch {
      // The same.
    }
    for (const answer of await answers) {
      const { result, error } = JSON.parse(answer) as { result?: unknown; error?: { data?: Record<string, string> } };
      signs.add(error === undefined ? `result ${typeof result}` : signOf({ name: "control", ...error.data }));
    }
    refuseFaults(signs);
    // What was allocated goes back, so that the next round finds the same relay; and it answers.
    using client = ControlClient.connect("fuzz", controlPath("fuzz"));
    const { allocations } = await client.call("iova") as { allocations: { iova: string; tag: string | null; asid: number }[] };
    for (const { iova, asid } of allocations) {
      await client.call("iova_free", { iova: Number(iova), asid }).catch((error) => signs.add(`left: ${signOf(error)}`));
    }
    return { count: lines.length, signs: [...signs] };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#service.close();
    this.#dir[Symbol.dispose]();
    if (this.#before === undefined) Deno.env.delete("SVQ_RUNTIME_DIR");
    else Deno.env.set("SVQ_RUNTIME_DIR", this.#before);
  }
}

/** A whole relay service. */
export const CONTROL: FuzzTarget = {
  unit: "messages",
  full: 1_000_000,
  quick: 800,
  open: () => Session.open(),
};
