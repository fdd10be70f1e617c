import assert from "node:assert/strict";
import { Random } from "../../src/drivers/random.ts";
import type { MigrationReport } from "../../src/migration/handshake.ts";
import { svqCommand } from "../support/cli.ts";
import { HostProcess, Namespaces, namespacesMissing } from "../support/namespaces.ts";
import { TempDir } from "../support/temp.ts";
import { waitUntil } from "../support/wait.ts";

const SOAK = Deno.env.get("SVQ_SOAK") === "1";
const MOVES = SOAK ? 100 : 4;
const CANCELS = SOAK ? 50 : 4;
const RAM = SOAK ? 1 << 30 : 64 << 20;

interface Outcome {
  outcome: string;
  phase: string;
  memoryIdentical: boolean | null;
  downtimeUs: number | null;
  error: { code: string; message: string } | null;
}

/** Two namespaces, a process and a device in each, one disk. */
class TwoHosts implements AsyncDisposable {
  readonly #stack = new AsyncDisposableStack();
  readonly dir = new TempDir();
  readonly hosts: HostProcess[] = [];
  readonly devices: string[] = [];
  addresses!: readonly [string, string];
  /** Where the guest is. */
  here = 0;

  static async create(kind: "sim" | "vhost-user"): Promise<TwoHosts> {
    const two = new TwoHosts();
    try {
      const stack = two.#stack;
      stack.use(two.dir);
      const namespaces = stack.use(await Namespaces.create());
      two.addresses = namespaces.addresses;
      const disk = two.dir.join("disk");
      for (const index of [0, 1] as const) {
        two.devices.push(kind === "sim" ? `sim:blk,file=${disk},size=16MiB,latency=100us` : await two.#daemon(disk, index));
        two.hosts.push(stack.use(new HostProcess(namespaces, index)));
      }
      return two;
    } catch (error) {
      await two[Symbol.asyncDispose]();
      throw error;
    }
  }

  async #daemon(disk: string, index: number): Promise<string> {
    const socket = this.dir.join(`device${index}`);
    const args = ["device", "run", "blk", "--file", disk, "--size", "16MiB", "--latency", "100us", "--socket-path", socket, "-q"];
    const child = svqCommand(args, { SVQ_RUNTIME_DIR: this.dir.path }).spawn();
    this.#stack.defer(async () => {
      child.kill("SIGTERM");
      await child.output();
    });
    await waitUntil("the device", () => [...Deno.readDirSync(this.dir.path)].some(({ name }) => name === `device${index}`), 30_000);
    return `unix:${socket}`;
  }

  get there(): number {
    return 1 - this.here;
  }

  /** Has the other host wait. */
  async listen(): Promise<string> {
    const { there } = this;
    const uri = `tcp:${this.addresses[there as 0 | 1]}:0`;
    return (await this.hosts[there]!.tell<{ uri: string }>({ do: "listen", device: this.devices[there]!, uri, maxMemory: 2 * RAM })).uri;
  }

  async progress(count = 50): Promise<void> {
    const report = () => this.hosts[this.here]!.tell<MigrationReport>({ do: "report" });
    const { completed } = await report();
    await waitUntil("requests", async () => (await report()).completed >= completed + count, 60_000);
  }

  async finish(): Promise<void> {
    const { lost, duplicated, corrupted, outOfOrder, missedCalls, faults } = await this.hosts[this.here]!.tell<MigrationReport>({
      do: "stop",
    });
    assert.deepEqual(
      { lost, duplicated, corrupted, outOfOrder, missedCalls, faults },
      { lost: 0, duplicated: 0, corrupted: 0, outOfOrder: 0, missedCalls: 0, faults: [] },
    );
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack.disposeAsync();
  }
}

const missing = await namespacesMissing();

function hostsTest(name: string, fn: () => Promise<void>): void {
  Deno.test({ name: missing === undefined ? name : `${name} (left out, needs ${missing})`, ignore: missing !== undefined, fn });
}

for (const kind of ["sim", "vhost-user"] as const) {
  hostsTest(`between two network namespaces a guest with ${RAM >> 20} MiB on ${kind} moves ${MOVES} times, and loses nothing`, async () => {
    await using two = await TwoHosts.create(kind);
    await two.hosts[0]!.tell({ do: "start", device: two.devices[0]!, ramSize: RAM });
    const gaps: number[] = [];
    for (let move = 0; move < MOVES; move++) {
      await two.progress();
      const to = await two.listen();
      const result = await two.hosts[two.here]!.tell<Outcome>({ do: "migrate", to });
      assert.deepEqual([result.outcome, result.memoryIdentical], ["completed", true], `move ${move}: ${result.error?.message}`);
      gaps.push(result.downtimeUs!);
      await two.hosts[two.there]!.tell({ do: "arrived" });
      two.here = two.there;
    }
    await two.progress();
    await two.finish();
    gaps.sort((a, b) => a - b);
    console.log(
      `  ${kind}: ${MOVES} moves, gap ${gaps[MOVES >> 1]! / 1000} ms in the middle, ${
        gaps.at(-1)! / 1000
      } ms at most, memory compared in it`,
    );
  });
}

hostsTest(`cancelled at ${CANCELS} random moments the guest goes on where it is, or has gone: never both, never none`, async () => {
  await using two = await TwoHosts.create("sim");
  await two.hosts[0]!.tell({ do: "start", device: two.devices[0]!, ramSize: 64 << 20 });
  const random = new Random(6);
  let to = await two.listen();
  const outcomes = { completed: 0, cancelled: 0 };
  while (outcomes.completed + outcomes.cancelled < CANCELS) {
    await two.progress(10);
    const result = await two.hosts[two.here]!.tell<Outcome>({ do: "migrate", to, cancelAfterMs: random.below(800) });
    assert.ok(result.outcome === "completed" || result.outcome === "cancelled", `${result.outcome}: ${result.error?.message}`);
    outcomes[result.outcome]++;
    if (result.outcome === "cancelled") continue;
    await two.hosts[two.there]!.tell({ do: "arrived" });
    two.here = two.there;
    to = await two.listen();
  }
  await two.progress();
  await two.finish();
  console.log(`  ${outcomes.cancelled} cancelled, ${outcomes.completed} were faster`);
});
