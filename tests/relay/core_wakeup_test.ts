import assert from "node:assert/strict";
import { buildRelayCore } from "../../scripts/build_wasm.ts";
import { createMemfd, mapFd, type Mapping } from "../../src/ffi/mod.ts";
import { RangeTable } from "../../src/memory/range_table.ts";
import type { DataPath, RelayCore } from "../../src/relay/core.ts";
import { Counters } from "../../src/relay/counters.ts";
import type { QueueStart } from "../../src/relay/messages.ts";
import { QueueRunner } from "../../src/relay/queue_runner.ts";
import { WasmCore } from "../../src/relay/wasm_core.ts";
import { WasmHost } from "../../src/relay/wasm_host.ts";
import { packedLayout, splitLayout } from "../../src/vring/layout.ts";
import { PACKED_BASE_START, PackedDevice, PackedDriver } from "../../src/vring/packed.ts";
import { Chain, type DeviceQueue, type DriverQueue } from "../../src/vring/queue.ts";
import { SplitDevice, SplitDriver } from "../../src/vring/split.ts";
import { explore, type Outcome, type Steps } from "../vring/interleavings.ts";

// The handshake before a side goes to sleep, with the WebAssembly core's own atomic steps: in every interleaving with a guest's
// on the one ring, and with a device's on the other. litmus_test.ts has the same steps on two real processors.

const FOLDER = "src/wasm/assembly";
const source = async (name: string) => await Deno.readTextFile(new URL(`../../${FOLDER}/${name}`, import.meta.url));

// Atomic accesses of 16 and 32 bits go through this test.
const STEPPED = `
@external("test", "load16") declare function hostLoad16(at: u32): u32;
@external("test", "load32") declare function hostLoad32(at: u32): u32;
@external("test", "store16") declare function hostStore16(at: u32, value: u32): void;
@external("test", "store32") declare function hostStore32(at: u32, value: u32): void;
export function load16(at: u32, offset: u32 = 0): u32 { return hostLoad16(at + offset); }
export function load32(at: u32, offset: u32 = 0): u32 { return hostLoad32(at + offset); }
export function store8(at: u32, value: u32): void { atomic.store<u8>(at, <u8>value); }
export function store16(at: u32, value: u32): void { hostStore16(at, value & 0xffff); }
export function store32(at: u32, value: u32): void { hostStore32(at, value); }
`;

/** What is broken on purpose: the event is read, or the ring looked at, before the store that the other side goes by. */
const BROKEN: [string, string][] = [
  ["  store16(q.guestUsed + 2, now);", "  const early = load16(q.guestAvail + 4 + (q.guestNum << 1));\n    store16(q.guestUsed + 2, now);"],
  ["eventPassed(load16(q.guestAvail + 4 + (q.guestNum << 1)), now, old)", "eventPassed(early, now, old)"],
];

async function build(edits: readonly [string, string][] = []): Promise<WebAssembly.Module> {
  const replaced: Record<string, string> = { [`${FOLDER}/ordered.ts`]: STEPPED };
  for (const name of ["notify.ts", "forward.ts"]) {
    const own = await source(name);
    let text = own.replaceAll("atomic.load<u16>(", "load16(").replaceAll("atomic.load<u32>(", "load32(");
    assert.notEqual(text, own);
    text += `\nimport { load16${text.includes("load32(") ? ", load32" : ""} } from "./ordered";\n`;
    for (const [from, to] of name === "notify.ts" ? edits : []) {
      assert.ok(text.includes(from), from);
      text = text.replace(from, to);
    }
    replaced[`${FOLDER}/${name}`] = text;
  }
  return new WebAssembly.Module(await buildRelayCore(replaced));
}

const sound = await build();

interface Scenario {
  /** Both rings. */
  format: "split" | "packed";
  eventIdx: boolean;
  /** The other side of the ring that is looked at: the guest, which kicks, or the device, which calls. */
  other: "guest" | "device";
  num: number;
  chains: number;
  /** Sleep without asking for notifications. */
  careless?: boolean;
  module?: WebAssembly.Module;
}

const real = { load: Atomics.load, store: Atomics.store };

/** Runs what no other thread can see: its atomic accesses are no steps. */
function alone<T>(work: () => T): T {
  const stepped = { load: Atomics.load, store: Atomics.store };
  Object.assign(Atomics, real);
  try {
    return work();
  } finally {
    Object.assign(Atomics, stepped);
  }
}

// No window opens on private memory.
function page(): Mapping {
  using fd = createMemfd("svq-test-ring", 4096);
  return mapFd(fd.fd, { length: 4096 });
}

/** One relay core between two rings, one of which is shared with the other program. */
class Rings implements Disposable {
  readonly #stack = new DisposableStack();
  readonly shared = this.#stack.use(page());
  readonly #own = this.#stack.use(page());
  /** What both programs see. */
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly #host: WasmHost;
  readonly #path: DataPath;
  readonly #layout;
  readonly #windows = new Map<number, number>();
  #core: WasmCore | undefined;

  constructor(readonly scenario: Scenario) {
    const { format, num, other } = scenario;
    this.#layout = (format === "split" ? splitLayout : packedLayout)(num);
    this.bytes = new Uint8Array(this.shared.buffer(0, Math.ceil(this.#layout.total / 8) * 8));
    const guest = other === "guest" ? this.shared : this.#own;
    const ranges = [{ gpa: 0, size: 4096, uaddr: 0, address: guest.address }];
    this.#path = { memory: new RangeTable(ranges), translation: undefined, dirty: undefined };
    const view = (at: number) => {
      const from = this.#windows.get(this.shared.address) ?? Infinity;
      return at >= from && at < from + 4096 ? at - from : -1;
    };
    const [halves, words] = [new Uint16Array(this.shared.buffer()), new Uint32Array(this.shared.buffer())];
    const all = () => this.#host.windows.memory.buffer;
    const test = {
      load16: (at: number) => view(at) < 0 ? real.load(new Uint16Array(all(), at, 1), 0) : Atomics.load(halves, view(at) / 2),
      load32: (at: number) => view(at) < 0 ? real.load(new Uint32Array(all(), at, 1), 0) : Atomics.load(words, view(at) / 4),
      store16: (at: number, value: number) =>
        void (view(at) < 0 ? real.store(new Uint16Array(all(), at, 1), 0, value) : Atomics.store(halves, view(at) / 2, value)),
      store32: (at: number, value: number) =>
        void (view(at) < 0 ? real.store(new Uint32Array(all(), at, 1), 0, value) : Atomics.store(words, view(at) / 4, value)),
    };
    this.#host = new WasmHost(this.#path, { module: scenario.module ?? sound, imports: { test } });
    const { windows } = this.#host;
    // A core is made thousands of times: windows stay, and memory is used again.
    const map = windows.map.bind(windows);
    windows.map = (address, size) => {
      const offset = this.#windows.get(address) ?? map(address, size);
      if (offset !== undefined) this.#windows.set(address, offset);
      return offset;
    };
    const alloc = windows.alloc.bind(windows);
    const spare = new Map<number, number[]>();
    windows.alloc = (size) => {
      const at = spare.get(size)?.pop();
      if (at === undefined) return alloc(size);
      new Uint8Array(windows.memory.buffer, at, size).fill(0);
      return at;
    };
    windows.release = (at, size) => {
      if ([...this.#windows.values()].includes(at)) return;
      spare.set(size, [...spare.get(size) ?? [], at]);
    };
    this.#host.setMemory(ranges);
  }

  #parts(mapping: { buffer(): ArrayBuffer }) {
    const { desc, avail, used } = this.#layout;
    const part = ({ offset }: { offset: number }) => ({ buffer: mapping.buffer(), byteOffset: offset });
    const { num, eventIdx } = this.scenario;
    return { num, eventIdx, desc: part(desc), avail: part(avail), used: part(used) };
  }

  driver(mapping = this.shared): DriverQueue {
    return this.scenario.format === "split" ? new SplitDriver(this.#parts(mapping)) : new PackedDriver(this.#parts(mapping));
  }

  device(mapping = this.shared): DeviceQueue {
    const parts = { ...this.#parts(mapping), indirect: false };
    return this.scenario.format === "split" ? new SplitDevice(parts) : new PackedDevice(parts);
  }

  /** The relay from its beginning, and whoever is on its other ring. */
  relay(): { core: RelayCore; ownDriver: DriverQueue; ownDevice: DeviceQueue } {
    return alone(() => {
      new Uint8Array(this.#own.buffer()).fill(0);
      const { format, num, eventIdx, other } = this.scenario;
      const packed = format === "packed";
      const { desc, avail, used } = this.#layout;
      const place = (from: number) => ({ desc: from + desc.offset, avail: from + avail.offset, used: from + used.offset });
      const common = { num, packed, eventIdx, indirect: false, inOrder: false };
      const start: QueueStart = {
        ...{ index: 0, mode: "shadow", kickFd: -1, callFd: -1, deviceKickFd: -1, deviceCallFd: -1, paused: false, logUsedGpa: -1 },
        guestBase: packed ? PACKED_BASE_START : 0,
        guest: { ...common, ...place(0) },
        device: { ...common, ...place((other === "guest" ? this.#own : this.shared).address) },
      };
      this.#core?.close();
      this.#core = new WasmCore(start, this.#host, this.#path, new Counters(1).of(0));
      return { core: this.#core, ownDriver: this.driver(this.#own), ownDevice: this.device(this.#own) };
    });
  }

  [Symbol.dispose](): void {
    this.#core?.close();
    this.#stack.dispose();
  }
}

/** The core with its notifications to the other program, and with what happens on the ring that nobody else sees. */
function watched(
  core: RelayCore,
  steps: Steps,
  other: "guest" | "device",
  own: { before(): void; after(): void; state(): string },
): RelayCore {
  // What was moved in each call says where the Worker's part is.
  let calls = "";
  return new Proxy(core, {
    get(target, name) {
      if (name === "forward" || name === "returnUsed") {
        return () => {
          if (name === "forward") alone(own.before);
          const moved = target[name]();
          if (other === "guest" ? target.callWanted && name === "returnUsed" : target.kickWanted && name === "forward") steps.notify();
          if (name === "forward" && other === "guest" || name === "returnUsed" && other === "device") alone(own.after);
          calls += `${moved} `;
          steps.mark(`${own.state()}: ${calls}${target.full}`);
          return moved;
        };
      }
      if (name === "callWanted" || name === "kickWanted") return false;
      // The first of the calls that arm.
      if (name === "enableCalls") calls = "";
      const value = Reflect.get(target, name, target);
      return typeof value === "function" ? value.bind(target) : value;
    },
  });
}

function check(scenario: Scenario): Outcome {
  using rings = new Rings(scenario);
  const { num, chains, other, careless = false } = scenario;
  const start = { index: 0, mode: "shadow", callFd: -1, deviceKickFd: -1, paused: false } as unknown as QueueStart;
  // A Worker's part, with the real steps of a queue.
  const work = (core: RelayCore, steps: Steps, state: () => string | undefined) => {
    const runner = new QueueRunner(start, core, new Float64Array(16));
    for (;;) {
      while (runner.work() !== 0);
      const text = state();
      if (text === undefined) return;
      steps.mark(text);
      if (!careless && runner.arm()) continue;
      steps.sleep();
    }
  };
  const chain = new Chain(num);
  if (other === "guest") {
    return explore(rings.bytes, [
      () => (steps) => {
        const driver = rings.driver();
        for (let sent = 0, back = 0;;) {
          driver.disableCalls();
          // Each chain comes back with a length of its own: an element that is not there yet is found out.
          while (driver.take() >= 0) assert.equal(driver.usedLength, ++back, "a used element was not there yet");
          steps.mark(`${sent} sent, ${back} back`);
          if (back === chains) return;
          if (sent < chains && driver.add([], [{ address: 2048, length: 16 }]) >= 0) {
            sent++;
            if (driver.publish()) steps.notify();
            if (sent < chains && driver.numFree > 0) continue;
          }
          if (!driver.enableCalls()) steps.sleep();
        }
      },
      () => (steps) => {
        const { core, ownDevice } = rings.relay();
        let served = 0;
        const serve = () => {
          while (ownDevice.pop(chain)) ownDevice.push(chain.id, ++served);
          ownDevice.flush();
        };
        const state = () => `${core.guestBase} ${core.guestUsed} ${core.inflight}`;
        work(watched(core, steps, other, { before: () => {}, after: serve, state }), steps, state);
      },
    ], 0);
  }
  return explore(rings.bytes, [
    () => (steps) => {
      const { core, ownDriver } = rings.relay();
      let [sent, back] = [0, 0];
      const offer = () => {
        if (sent < chains && ownDriver.add([{ address: 2048, length: sent + 1 }], []) >= 0) sent++;
        ownDriver.publish();
      };
      const collect = () => {
        while (ownDriver.take() >= 0) back++;
      };
      const state = () => `${sent} sent, ${back} back`;
      work(watched(core, steps, other, { before: offer, after: collect, state }), steps, () => back === chains ? undefined : state());
    },
    () => (steps) => {
      const device = rings.device();
      for (let seen = 0;;) {
        device.disableKicks();
        for (; device.pop(chain); device.push(chain.id, 0)) assert.equal(chain.lengths[0], ++seen, "a descriptor was not there yet");
        if (device.flush()) steps.notify();
        steps.mark(`${device.base}`);
        if (!device.enableKicks()) steps.sleep();
      }
    },
  ], 0);
}

const SOAK = Deno.env.get("SVQ_SOAK") === "1";
const scenarios: Scenario[] = [];
for (const format of ["split", "packed"] as const) {
  for (const eventIdx of [true, false]) {
    for (const other of ["guest", "device"] as const) {
      scenarios.push({ format, eventIdx, other, num: 1, chains: 2 });
      if (SOAK) scenarios.push({ format, eventIdx, other, num: 2, chains: 3 });
    }
  }
}

Deno.test("In every interleaving of the WebAssembly core's atomic steps with a guest's and with a device's, nobody sleeps through work", () => {
  let states = 0;
  // Those with flags take as long again.
  for (const scenario of SOAK ? scenarios : scenarios.filter(({ eventIdx }) => eventIdx)) {
    const outcome = check(scenario);
    assert.deepEqual(outcome.stuck, [], `a wake-up was lost: ${JSON.stringify(scenario)}`);
    states += outcome.states;
  }
  assert.ok(states > 1000, `only ${states} states were reached`);
});

Deno.test("The check finds a core that does not arm its queue, and one that reads the event before it publishes", async () => {
  for (const scenario of scenarios.filter(({ num, eventIdx, other }) => num === 1 && (SOAK || eventIdx && other === "device"))) {
    assert.notDeepEqual(check({ ...scenario, careless: true }).stuck, [], `not found: ${JSON.stringify(scenario)}`);
  }
  const module = await build(BROKEN);
  assert.notDeepEqual(check({ format: "split", eventIdx: true, other: "guest", num: 1, chains: 2, module }).stuck, []);
});
