import assert from "node:assert/strict";
import fc from "fast-check";
import { DirtyBitmap, logBytes } from "../../src/dirty/bitmap.ts";
import { SvqError } from "../../src/errors.ts";
import { createMemfd, mapAnonymous, mapFd, type Mapping } from "../../src/ffi/mod.ts";
import { Translation } from "../../src/iova/translation.ts";
import { RangeTable } from "../../src/memory/range_table.ts";
import type { MappedRange } from "../../src/memory/region.ts";
import { Arena, slotSize } from "../../src/relay/arena.ts";
import type { CoreChoice, DataPath, RelayCore } from "../../src/relay/core.ts";
import { CoreMaker } from "../../src/relay/core_maker.ts";
import { COUNTER, Counters } from "../../src/relay/counters.ts";
import { FastCore, isFast } from "../../src/relay/fast_core.ts";
import { JsCore } from "../../src/relay/js_core.ts";
import type { QueueStart } from "../../src/relay/messages.ts";
import { packedLayout, splitLayout } from "../../src/vring/layout.ts";
import { PACKED_BASE_START, PackedDevice, PackedDriver } from "../../src/vring/packed.ts";
import { Chain, type DeviceQueue, type DriverQueue, type RingMemory } from "../../src/vring/queue.ts";
import { VringError, type VringRule } from "../../src/vring/rules.ts";
import { SplitDevice, SplitDriver } from "../../src/vring/split.ts";

// The conformance suite of the relay cores. The same schedule runs on each of them, over memory of its own: what the device
// sees, what the guest gets back, guest memory, dirty log, counters and errors must be the same. The JavaScript core's general
// path is the reference; what it does is held against the model of src/vring elsewhere.

interface Shape {
  mode: "used" | "shadow";
  guestPacked: boolean;
  devicePacked: boolean;
  num: number;
  deviceNum: number;
  eventIdx: boolean;
  guestIndirect: boolean;
  deviceIndirect: boolean;
  /** The guest's own tables go to the device. */
  pass: boolean;
  guestInOrder: boolean;
  deviceInOrder: boolean;
  moved: boolean;
  log: boolean;
  base: number;
}

type Step =
  | { op: "offer"; readable: number; writable: number; at: number; length: number }
  | { op: "publish" }
  | { op: "forward" }
  | { op: "serve"; pick: number; written: number }
  | { op: "flush" }
  | { op: "return" }
  | { op: "collect" }
  | { op: "suppress"; who: "guest" | "device" | "core"; on: boolean }
  | { op: "log"; on: boolean }
  | { op: "renew" }
  | { op: "break"; word: number; value: number };

const REGION = 2 ** 18;
/** Two regions that touch, and one apart, above 4 GiB: buffers may cross the seam. */
const GPAS = [0, REGION, 2 ** 33];
const IOVAS = [2 ** 30, 2 ** 31, 2 ** 34];
const RINGS_AT = 0;
const DATA_AT = REGION / 2;
const TABLES_AT = REGION / 4;
const LOG_END = 2 ** 33 + REGION;

const RULES_BROKEN = "broken";

/** One core with memory, guest and device of its own. */
class World implements Disposable {
  readonly #stack = new DisposableStack();
  readonly memory: Mapping[] = [];
  readonly log: Mapping;
  readonly counters = new Counters(1).of(0);
  readonly core: RelayCore;
  readonly driver: DriverQueue;
  device: DeviceQueue;
  readonly #path: DataPath;
  readonly #maker: CoreMaker;
  readonly #arena: Arena;
  readonly #start: QueueStart;
  readonly #chain = new Chain(600);
  readonly #held: number[] = [];
  readonly seen: string[] = [];
  failed = false;

  constructor(choice: CoreChoice | "general", readonly shape: Shape) {
    const { num, deviceNum, mode, guestPacked, devicePacked, eventIdx } = shape;
    const make = (name: string, size: number) => {
      using fd = createMemfd(name, size);
      return this.#stack.use(mapFd(fd.fd, { length: size }));
    };
    for (const gpa of GPAS) this.memory.push(make(`region-${gpa}`, REGION));
    this.log = make("log", logBytes(LOG_END));
    const ranges: MappedRange[] = GPAS.map((gpa, i) => ({ gpa, size: REGION, uaddr: gpa, address: this.memory[i]!.address }));
    const moved = shape.moved ? GPAS.map((gpa, i) => ({ gpa, iova: IOVAS[i]!, size: REGION })) : undefined;
    this.#path = {
      memory: new RangeTable(ranges),
      translation: moved === undefined ? undefined : new Translation(moved),
      dirty: undefined,
    };
    this.#maker = new CoreMaker(choice === "general" ? "js" : choice, this.#path);
    this.#maker.setMemory(ranges, moved);
    this.#arena = this.#stack.use(new Arena(1, 2 ** 45, slotSize(deviceNum)));
    this.#arena.place(0, deviceNum);
    const layout = guestPacked ? packedLayout(num) : splitLayout(num);
    const at = (offset: number) => RINGS_AT + offset;
    this.#start = {
      ...{ index: 0, mode, kickFd: -1, callFd: -1, deviceKickFd: -1, deviceCallFd: -1, paused: false },
      guest: {
        ...{ num, packed: guestPacked, eventIdx, indirect: shape.guestIndirect, inOrder: shape.guestInOrder },
        ...{ desc: at(layout.desc.offset), avail: at(layout.avail.offset), used: at(layout.used.offset) },
      },
      device: {
        num: deviceNum,
        packed: devicePacked,
        eventIdx,
        indirect: shape.deviceIndirect,
        passTables: shape.pass,
        inOrder: shape.deviceInOrder,
        ...this.#arena.local(0, deviceNum),
      },
      guestBase: guestPacked ? PACKED_BASE_START : shape.base,
      logUsedGpa: shape.log ? at(layout.used.offset) : -1,
    };
    const buffer = this.memory[0]!.buffer();
    const part = (offset: number) => ({ buffer, byteOffset: offset });
    const places = { desc: part(layout.desc.offset), avail: part(layout.avail.offset), used: part(layout.used.offset) };
    const parts = { num, ...places, eventIdx, inOrder: shape.guestInOrder };
    const indirect = shape.guestIndirect
      ? { indirect: { buffer, byteOffset: TABLES_AT, address: TABLES_AT, entries: Math.min(12, Math.floor(REGION / 4 / num / 16)) } }
      : {};
    if (!guestPacked) {
      for (const offset of [layout.avail.offset, layout.used.offset]) new Uint16Array(buffer, offset)[1] = shape.base;
    }
    this.driver = guestPacked ? new PackedDriver({ ...parts, ...indirect }) : new SplitDriver({ ...parts, ...indirect, base: shape.base });
    this.core = choice === "general" ? new JsCore(this.#start, this.#path, this.counters) : this.#maker.make(this.#start, this.counters);
    this.setLog(shape.log);
    assert.equal(this.core.kind, choice === "general" ? "js" : choice, this.#maker.reason);
    if (choice === "js") assert.equal(this.core instanceof FastCore, isFast(this.#start));
    this.device = this.#newDevice();
  }

  #newDevice(): DeviceQueue {
    const { deviceNum, devicePacked, mode, eventIdx } = this.shape;
    const local = this.#arena.local(0, deviceNum);
    const slot = this.#arena.slot(0);
    const part = (address: number) => ({ buffer: slot, byteOffset: address - local.desc });
    const desc = mode === "used" ? { buffer: this.memory[0]!.buffer() } : part(local.desc);
    // The device finds tables of the relay's in the arena, those of the guest (mode used) in guest memory.
    const memory: RingMemory = {
      contains: () => true,
      buffer: (address, length) =>
        mode === "used"
          ? new Uint8Array(this.memory[0]!.buffer(address, length)).slice().buffer
          : address < this.#arena.iova
          ? new Uint8Array(this.memory[0]!.buffer(address, length)).slice().buffer
          : slot.slice(address - this.#arena.iova, address - this.#arena.iova + length),
    };
    const indirect = mode === "used" ? this.shape.guestIndirect : this.shape.deviceIndirect;
    const inOrder = this.shape.deviceInOrder;
    const options = { num: deviceNum, desc, avail: part(local.avail), used: part(local.used), eventIdx, indirect, inOrder, memory };
    return devicePacked ? new PackedDevice(options) : new SplitDevice(options);
  }

  setLog(on: boolean): void {
    this.#path.dirty = on ? new DirtyBitmap(this.log.buffer()) : undefined;
    this.#maker.setLog(on ? this.log.address : 0, on ? this.log.length : 0);
  }

  /** Runs a step. @returns what is to be compared */
  run(step: Step): unknown {
    if (this.failed) return undefined;
    try {
      return this.#run(step);
    } catch (error) {
      if (!(error instanceof SvqError) || error.code === "INTERNAL") throw error;
      this.failed = true;
      return [RULES_BROKEN, error.code, error instanceof VringError ? error.index : 0];
    }
  }

  #run(step: Step): unknown {
    const { core, driver } = this;
    switch (step.op) {
      case "offer": {
        const chain = this.#chain;
        chain.clear();
        for (let i = 0; i < step.readable + step.writable; i++) {
          const slot = step.at + i * 37;
          const address = slot % 3 === 2 ? GPAS[2]! + DATA_AT + slot % 500 : DATA_AT + slot * 997 % (REGION + DATA_AT - 10000);
          if (i < step.readable) chain.addReadable(address, step.length);
          else chain.addWritable(address, step.length);
        }
        if (chain.count > this.shape.num) return "too long";
        return driver.addChain(chain);
      }
      case "publish":
        return driver.publish();
      case "forward": {
        const moved = core.forward();
        return [moved, core.kickWanted, core.full, core.inflight, core.progress()];
      }
      case "serve": {
        const chain = this.#chain;
        while (this.device.pop(chain)) {
          const segments = Array.from({ length: chain.count }, (_, i) => `${chain.addresses[i]}+${chain.lengths[i]}`);
          this.seen.push(`${chain.readableCount}:${segments.join(" ")}`);
          this.#held.push(chain.id);
        }
        if (this.#held.length === 0) return this.seen.length;
        const [id] = this.#held.splice(step.pick % this.#held.length, 1);
        this.device.push(id!, step.written);
        return this.seen.at(-1);
      }
      case "flush":
        return this.#flush();
      case "return": {
        const moved = core.returnUsed();
        return [moved, core.callWanted, core.progress(), core.guestUsed];
      }
      case "collect": {
        const back: number[] = [];
        for (let id = driver.take(); id >= 0; id = driver.take()) back.push(id, driver.usedLength);
        return back;
      }
      case "suppress":
        return this.#suppress(step.who, step.on);
      case "log":
        return this.setLog(step.on);
      case "renew":
        return this.#renew();
      case "break":
        // Anything in the rings' first words, from outside: as a hostile guest would.
        new Uint16Array(this.memory[0]!.buffer())[step.word % (this.shape.num * 13)] = step.value;
        return undefined;
    }
  }

  // With IN_ORDER a device may write one used element for all: that of the last chain, at the place of the first.
  #flush(): boolean {
    const { deviceNum, deviceInOrder, devicePacked } = this.shape;
    const local = this.#arena.local(0, deviceNum);
    const used = new Uint16Array(this.#arena.slot(0), local.used - local.desc, 2 + 4 * deviceNum);
    const from = used[1]!;
    const wanted = this.device.flush();
    if (!deviceInOrder || devicePacked || used[1] === from) return wanted;
    const place = (index: number) => 2 + 4 * (index & (deviceNum - 1));
    used.copyWithin(place(from), place(used[1]! - 1), place(used[1]! - 1) + 4);
    for (let index = from + 1 & 0xffff; index !== used[1]; index = index + 1 & 0xffff) used.fill(0xdead, place(index), place(index) + 4);
    return wanted;
  }

  #suppress(who: "guest" | "device" | "core", on: boolean): unknown {
    if (who === "guest") return on ? this.driver.disableCalls() : this.driver.enableCalls();
    if (who === "device") return on ? this.device.disableKicks() : this.device.enableKicks();
    if (!on) return [this.core.enableCalls(), this.core.enableKicks()];
    this.core.disableCalls();
    this.core.disableKicks();
    return undefined;
  }

  #renew(): unknown {
    const { deviceNum } = this.shape;
    // What the lost device had done in secret is done again.
    this.core.returnUsed();
    this.#arena.place(0, deviceNum);
    this.#held.length = 0;
    this.core.renew({ ...this.#start, device: { ...this.#start.device, ...this.#arena.local(0, deviceNum) } });
    this.device = this.#newDevice();
    return this.core.progress();
  }

  /** Everything that the guest and its VMM can see. */
  state(): unknown {
    const bytes = this.memory.map((mapping) => new Uint8Array(mapping.buffer()));
    const dirty = new DirtyBitmap(this.log.buffer());
    const counters = [COUNTER.chains, COUNTER.bytes, COUNTER.dirtyPages, COUNTER.full].map((slot) => this.counters[slot]);
    return { rings: bytes[0]!.slice(0, TABLES_AT), dirty: [...dirty.runs()], counters, seen: this.seen };
  }

  uses(): number[] {
    return [0, DATA_AT, REGION, GPAS[2]!].map((gpa) => this.core.uses(gpa, 4096));
  }

  finish(): unknown {
    try {
      return this.failed ? this.core.abandon(false).inflight : this.core.finish();
    } catch (error) {
      return (error as SvqError).code;
    }
  }

  [Symbol.dispose](): void {
    this.core.close();
    this.#stack.dispose();
  }
}

const size = fc.constantFrom(2, 4, 16, 64);
const shapes: fc.Arbitrary<Shape> = fc.record({
  mode: fc.constantFrom("used" as const, "shadow" as const, "shadow" as const),
  guestPacked: fc.boolean(),
  devicePacked: fc.boolean(),
  num: size,
  deviceNum: size,
  eventIdx: fc.boolean(),
  guestIndirect: fc.boolean(),
  deviceIndirect: fc.boolean(),
  pass: fc.boolean(),
  guestInOrder: fc.nat(3).map((n) => n === 0),
  deviceInOrder: fc.nat(3).map((n) => n === 0),
  moved: fc.boolean(),
  log: fc.boolean(),
  base: fc.constantFrom(0, 0x7fff, 0xfff0),
}).map((shape) =>
  shape.mode === "used" ? { ...shape, guestPacked: false, devicePacked: false, moved: false, deviceNum: shape.num } : shape
);

const honest: fc.Arbitrary<Step>[] = [
  fc.record({
    op: fc.constant("offer" as const),
    readable: fc.integer({ min: 0, max: 5 }),
    writable: fc.integer({ min: 0, max: 5 }),
    at: fc.nat({ max: 400 }),
    length: fc.constantFrom(1, 16, 512, 1536, 9000),
  }).map((step) => step.readable + step.writable === 0 ? { ...step, writable: 1 } : step),
  fc.constant({ op: "publish" as const }),
  fc.constant({ op: "forward" as const }),
  fc.record({ op: fc.constant("serve" as const), pick: fc.nat({ max: 63 }), written: fc.nat({ max: 20000 }) }),
  fc.constant({ op: "flush" as const }),
  fc.constant({ op: "return" as const }),
  fc.constant({ op: "collect" as const }),
];
const rare: fc.Arbitrary<Step>[] = [
  fc.record({
    op: fc.constant("suppress" as const),
    who: fc.constantFrom("guest" as const, "device" as const, "core" as const),
    on: fc.boolean(),
  }),
  fc.record({ op: fc.constant("log" as const), on: fc.boolean() }),
  fc.constant({ op: "renew" as const }),
];
// Anything, or what could be flags of a descriptor.
const hostile = fc.oneof(
  fc.record({ op: fc.constant("break" as const), word: fc.nat({ max: 2000 }), value: fc.nat({ max: 0xffff }) }),
  fc.record({ op: fc.constant("break" as const), word: fc.nat({ max: 60 }).map((n) => n * 8 + 6), value: fc.nat({ max: 7 }) }),
);

function schedule(...extra: { weight: number; arbitrary: fc.Arbitrary<Step> }[]): fc.Arbitrary<Step[]> {
  const steps = [...honest.map((arbitrary) => ({ weight: 4, arbitrary })), ...rare.map((arbitrary) => ({ weight: 1, arbitrary }))];
  return fc.array(fc.oneof(...steps, ...extra), { minLength: 30, maxLength: 200, size: "max" });
}

function compare(shape: Shape, steps: readonly Step[], other: "wasm" | "js"): void {
  using js = new World(other === "js" ? "general" : "js", shape);
  using one = new World(other, shape);
  for (const [index, step] of steps.entries()) assert.deepEqual(one.run(step), js.run(step), `step ${index}: ${JSON.stringify(step)}`);
  assert.deepEqual(one.uses(), js.uses());
  assert.deepEqual(one.finish(), js.finish());
  assert.deepEqual(one.state(), js.state());
}

const RUNS = Deno.env.get("SVQ_SOAK") === "1" ? 5000 : 100;

Deno.test("both cores do the same with every ring format and mode, whatever guest and device do in which order", () => {
  fc.assert(fc.property(shapes, schedule(), (shape, steps) => compare(shape, steps, "wasm")), { numRuns: RUNS, seed: 7 });
});

// Few of the shapes above go through the loops that most queues of real guests go through.
const plain = shapes.map((shape): Shape => ({
  ...shape,
  ...{ guestPacked: false, devicePacked: false, guestInOrder: false, deviceInOrder: false, moved: false, deviceIndirect: false },
}));

Deno.test("both cores do the same in the loops for split rings, whose sizes may differ", () => {
  fc.assert(fc.property(plain, schedule(), (shape, steps) => compare(shape, steps, "wasm")), { numRuns: RUNS / 2, seed: 7 });
});

Deno.test("both cores stop at the same broken rule, and mark the same pages, when a guest writes anything into its rings", () => {
  fc.assert(fc.property(shapes, schedule({ weight: 3, arbitrary: hostile }), (shape, steps) => compare(shape, steps, "wasm")), {
    numRuns: RUNS,
    seed: 7,
  });
});

// What the JavaScript core's fast path runs.
const splitShapes = shapes.map((shape) => ({
  ...shape,
  guestPacked: false,
  devicePacked: false,
  guestInOrder: false,
  deviceInOrder: false,
}));

Deno.test("the JavaScript core's fast path does the same as its general one, whatever guest and device do in which order", () => {
  fc.assert(fc.property(splitShapes, schedule(), (shape, steps) => compare(shape, steps, "js")), { numRuns: RUNS, seed: 11 });
});

Deno.test("the JavaScript core's fast path stops at the same broken rule, and marks the same pages, as its general one", () => {
  const broken = schedule({ weight: 3, arbitrary: hostile });
  fc.assert(fc.property(splitShapes, broken, (shape, steps) => compare(shape, steps, "js")), { numRuns: RUNS, seed: 11 });
});

// Two chains of three descriptors, the first one readable, behind each other in the table: [word, value] of 16 bits.
const BROKEN: [VringRule, ...[number, number][]][] = [
  ["READABLE_AFTER_WRITABLE", [2 * 8 + 6, 0]],
  ["DESCRIPTOR_EMPTY", [8 + 4, 0], [8 + 5, 0]],
  ["HEAD_IN_FLIGHT", [16 * 8 + 3, 0]],
  ["HEAD_OUT_OF_RANGE", [16 * 8 + 3, 16]],
  ["NEXT_OUT_OF_RANGE", [8 + 7, 16]],
  ["CHAIN_LOOP", [2 * 8 + 6, 3], [2 * 8 + 7, 1]],
  ["INDIRECT_NOT_NEGOTIATED", [6, 4]],
  ["OUTSIDE_MEMORY", [2, 5]],
  ["OUTSIDE_MEMORY", [3, 7]],
  ["OUTSIDE_MEMORY", [3, 8]],
  ["OUTSIDE_MEMORY", [5, 0x7fff]],
  ["OUTSIDE_MEMORY", [5, 0x8000]],
  ["ADDRESS_LIMIT", [3, 16]],
  ["AVAIL_INDEX_JUMP", [16 * 8 + 1, 100]],
];

Deno.test("each rule that a guest's chain breaks is named by both paths of the JavaScript core, and by the WebAssembly core", () => {
  const plain = { guestPacked: false, devicePacked: false, num: 16, deviceNum: 16, eventIdx: false, guestIndirect: false, moved: false };
  const rest = { deviceIndirect: false, pass: false, guestInOrder: false, deviceInOrder: false, log: true, base: 0 };
  const offer: Step = { op: "offer", readable: 1, writable: 2, at: 1, length: 512 };
  for (const mode of ["shadow", "used"] as const) {
    for (const [rule, ...words] of BROKEN) {
      const steps: Step[] = [offer, offer, { op: "publish" }, ...words.map(([word, value]): Step => ({ op: "break", word, value }))];
      for (const core of ["general", "js", "wasm"] as const) {
        using world = new World(core, { mode, ...plain, ...rest });
        for (const step of steps) world.run(step);
        assert.equal((world.run({ op: "forward" }) as unknown[])[1], rule, `${core}, ${mode}`);
      }
    }
  }
});

// Both rings wrap many times, each at places of its own: what was offered at the wrong ring's place is not found by the device.
for (const [num, deviceNum] of [[16, 4], [4, 16], [64, 2], [2, 64]] as const) {
  Deno.test(`between rings of ${num} and ${deviceNum} the device sees each chain once, in its order, however often they wrap`, () => {
    const formats = [[false, false], [true, true], [false, true], [true, false]] as const;
    const rest = { eventIdx: false, guestIndirect: false, deviceIndirect: false, pass: false, moved: false };
    const orders = { guestInOrder: false, deviceInOrder: false, log: false, base: 0 };
    for (const [guestPacked, devicePacked] of formats) {
      for (const core of ["general", "js", "wasm"] as const) {
        using world = new World(core, { mode: "shadow", guestPacked, devicePacked, num, deviceNum, ...rest, ...orders });
        const expected: string[] = [];
        let back = 0;
        while (expected.length < 5 * Math.max(num, deviceNum)) {
          const batch = 1 + expected.length % Math.min(num, deviceNum, 3);
          for (let i = 0; i < batch; i++) {
            const at = 3 * (expected.length % 40);
            world.run({ op: "offer", readable: 1, writable: 0, at, length: 16 });
            expected.push(`1:${DATA_AT + at * 997 % (REGION + DATA_AT - 10000)}+16`);
          }
          world.run({ op: "publish" });
          assert.equal((world.run({ op: "forward" }) as unknown[])[0], batch, core);
          for (let i = 0; i < batch; i++) world.run({ op: "serve", pick: 0, written: 0 });
          world.run({ op: "flush" });
          world.run({ op: "return" });
          assert.equal(world.failed, false, `${core}: stopped after ${expected.length} chains, seen: ${world.seen.at(-1)}`);
          back += (world.run({ op: "collect" }) as number[]).length / 2;
        }
        assert.deepEqual(world.seen, expected, core);
        assert.equal(back, expected.length, core);
      }
    }
  });
}

// In every pair of formats: three buffers towards a device's ring of two, without tables.
Deno.test("a chain that is too long for the device's ring is refused by name between all formats, and takes nothing with it", () => {
  const rest = { eventIdx: false, guestIndirect: false, deviceIndirect: false, pass: false, log: false, base: 0, mode: "shadow" as const };
  const orders = { guestInOrder: false, deviceInOrder: false, num: 8, deviceNum: 2 };
  for (const [guestPacked, devicePacked] of [[false, false], [true, true], [false, true], [true, false]] as const) {
    for (const moved of [false, true]) {
      for (const core of ["general", "js", "wasm"] as const) {
        const name = `${core}, ${guestPacked ? "packed" : "split"} to ${devicePacked ? "packed" : "split"}${moved ? ", moved" : ""}`;
        const three = { readable: 2, writable: 1, at: 0, length: 16 };
        // Two buffers, the first across a seam behind which guest memory lies elsewhere for the device.
        const seam = { readable: 2, writable: 0, at: 130, length: 9000 };
        for (const [long, before] of [0, 1, 2].flatMap((n) => (moved ? [three, seam] : [three]).map((long) => [long, n] as const))) {
          using world = new World(core, { ...rest, ...orders, guestPacked, devicePacked, moved });
          const short: Step = { op: "offer", readable: 1, writable: 0, at: 0, length: 16 };
          // Behind chains that fill the ring or part of it: that the ring is full is no reason to wait for a chain that never fits.
          for (let i = 0; i < before; i++) world.run(short);
          world.run({ op: "offer", ...long });
          world.run({ op: "publish" });
          assert.deepEqual(
            (world.run({ op: "forward" }) as unknown[]).slice(0, 2),
            [RULES_BROKEN, "CHAIN_TOO_LONG"],
            `${name}, ${before} before`,
          );
          assert.equal(world.core.inflight, before, `${name}, ${before} before`);
        }
      }
    }
  }
});

Deno.test("memory that no window can show leaves its queue to the JavaScript core, and says why", () => {
  using ram = mapAnonymous(REGION);
  const ranges = [{ gpa: 0, size: REGION, uaddr: 0, address: ram.address }];
  const path: DataPath = { memory: new RangeTable(ranges), translation: undefined, dirty: undefined };
  const maker = new CoreMaker("auto", path);
  maker.setMemory(ranges);
  using arena = new Arena(1, 2 ** 40, slotSize(undefined));
  arena.place(0, 16);
  const start: QueueStart = {
    ...{
      index: 0,
      mode: "shadow",
      kickFd: -1,
      callFd: -1,
      deviceKickFd: -1,
      deviceCallFd: -1,
      paused: false,
      logUsedGpa: -1,
      guestBase: 0,
    },
    guest: { num: 16, packed: false, eventIdx: false, indirect: false, inOrder: false, desc: 0, avail: 4096, used: 8192 },
    device: { num: 16, packed: false, eventIdx: false, indirect: false, inOrder: false, ...arena.local(0, 16) },
  };
  const core = maker.make(start, new Counters(1).of(0));
  assert.equal(core.kind, "js");
  assert.match(maker.reason!, /window/);
  assert.equal(core.forward(), 0);
});
