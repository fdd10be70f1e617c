import assert from "node:assert/strict";
import { buildRelayCore } from "../../scripts/build_wasm.ts";
import { createEventfd, createMemfd, mapFd, type Mapping } from "../../src/ffi/mod.ts";
import { RangeTable } from "../../src/memory/range_table.ts";
import { Counters } from "../../src/relay/counters.ts";
import type { QueueStart } from "../../src/relay/messages.ts";
import type { DataPath, RelayCore } from "../../src/relay/core.ts";
import { CoreMaker } from "../../src/relay/core_maker.ts";
import { QueueRunner } from "../../src/relay/queue_runner.ts";
import {
  INFLIGHT_STATE,
  type InflightChains,
  inflightPartSize,
  inflightState,
  recoverPacked,
  recoverSplit,
} from "../../src/vring/inflight.ts";
import { isOfPackedRing, isOfSplitRing } from "../../src/vring/inflight_life.ts";
import { packedLayout, splitLayout } from "../../src/vring/layout.ts";
import { PackedDevice, PackedDriver } from "../../src/vring/packed.ts";
import { Chain, type DeviceQueue, type DriverQueue } from "../../src/vring/queue.ts";
import { SplitDevice, SplitDriver } from "../../src/vring/split.ts";

/** Thrown at the ordered store at which the relay is killed: in front of it, or right behind it. */
class Killed extends Error {}

const realStore = Atomics.store;
let storesLeft = Infinity;

function atStore(): void {
  if (storesLeft-- === 0) throw new Killed();
}

/** Runs `work`; it is cut off at an ordered store, of which each counts twice. @returns false when it was */
function killedAfter(stores: number, work: () => void): boolean {
  storesLeft = stores;
  Atomics.store = ((array: never, index: number, value: never) => {
    atStore();
    const stored = realStore(array, index, value);
    atStore();
    return stored;
  }) as typeof Atomics.store;
  try {
    work();
    return true;
  } catch (error) {
    if (error instanceof Killed) return false;
    throw error;
  } finally {
    Atomics.store = realStore;
    storesLeft = Infinity;
  }
}

// The WebAssembly core with ordered stores that ask first.
const STOPPABLE = `
@external("test", "atStore") declare function atStore(): void;
export function store8(at: u32, value: u32): void { atStore(); atomic.store<u8>(at, <u8>value); atStore(); }
export function store16(at: u32, value: u32): void { atStore(); atomic.store<u16>(at, <u16>value); atStore(); }
export function store32(at: u32, value: u32): void { atStore(); atomic.store<u32>(at, value); atStore(); }
`;
const stoppable = {
  module: new WebAssembly.Module(await buildRelayCore({ "src/wasm/assembly/ordered.ts": STOPPABLE })),
  imports: { test: { atStore } },
};
const makers = (["js", "wasm"] as const).map((core) => {
  const path: DataPath = { memory: new RangeTable([]), translation: undefined, dirty: undefined };
  return { core, path, maker: new CoreMaker(core, path, stoppable) };
});

function sharedMemory(name: string, size: number): Mapping {
  using fd = createMemfd(`svq-test-${name}`, size);
  return mapFd(fd.fd, { length: size });
}

function randomOf(seed: number): (below: number) => number {
  let state = seed * 2654435761 >>> 0;
  return (below) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    state >>>= 0;
    return state % below;
  };
}

const SLOT_BYTES = 64;
const RINGS = 0x0;
const TABLES = 0x4000;
const DATA = 0x10000;
const SHADOW = 0x40000;
const MEMORY = 0x80000;

interface Case {
  num: number;
  packed: boolean;
  mode: "used" | "shadow";
  devicePacked: boolean;
  indirect: boolean;
  /** The guest has IN_ORDER, and the device has not. */
  inOrder?: boolean;
}

/** A guest's driver, a relay that is killed and restarted, and a device that answers out of order. */
class World {
  readonly #memory = sharedMemory("ram", MEMORY);
  readonly #region;
  readonly #kick = createEventfd();
  readonly #counters = new Counters(1);
  readonly #driver: DriverQueue;
  #runner: QueueRunner | undefined;
  #core: RelayCore | undefined;
  #device: DeviceQueue | undefined;
  /** What the device has in hand. */
  #held: { id: number; token: number; at: number }[] = [];
  readonly #slots: number[] = [];
  /** By the driver's id. */
  readonly #out = new Map<number, { slot: number; token: number }>();
  /** Tokens in the order in which the driver offered them. */
  readonly #offered: number[] = [];
  #token = 1;
  kills = 0;
  done = 0;
  resumed = 0;

  constructor(readonly shape: Case, readonly random: (below: number) => number, readonly kind: typeof makers[number]) {
    this.#region = sharedMemory("inflight", inflightPartSize(shape.num, shape.packed));
    const ranges = [{ gpa: 0, size: MEMORY, uaddr: 0, address: this.#memory.address }];
    kind.path.memory = new RangeTable(ranges);
    kind.maker.setMemory(ranges);
    this.#driver = this.#ring(RINGS, shape.packed, "driver") as DriverQueue;
    for (let slot = 0; slot < 2 * shape.num; slot++) this.#slots.push(slot);
  }

  #places(at: number, packed: boolean) {
    const layout = packed ? packedLayout(this.shape.num) : splitLayout(this.shape.num);
    const desc = at;
    const avail = at + 0x1000;
    return { desc, avail, used: at + 0x2000, layout };
  }

  #ring(at: number, packed: boolean, side: "driver" | "device"): DriverQueue | DeviceQueue {
    const { num, indirect } = this.shape;
    const { desc, avail, used, layout } = this.#places(at, packed);
    const part = (offset: number, size: number) => ({ buffer: this.#memory.buffer(offset, size) });
    const own = side === "device" && this.shape.mode === "used" ? RINGS : desc;
    const options = {
      num,
      desc: part(own, layout.desc.size),
      avail: part(avail, layout.avail.size),
      used: part(used, layout.used.size),
      eventIdx: true,
    };
    const inOrder = side === "driver" && this.shape.inOrder === true;
    if (side === "device") {
      const all = { ...options, indirect, memory: this.kind.path.memory };
      return packed ? new PackedDevice(all) : new SplitDevice(all);
    }
    const area = indirect ? { indirect: { ...part(TABLES, num * 4 * 16), address: TABLES, entries: 4 } } : {};
    return packed ? new PackedDriver({ ...options, ...area, inOrder }) : new SplitDriver({ ...options, ...area, inOrder });
  }

  offer(): void {
    const { num } = this.shape;
    for (let count = this.random(4); count > 0 && this.#slots.length > 0; count--) {
      const slot = this.#slots[0]!;
      const token = this.#token;
      const at = DATA + slot * SLOT_BYTES;
      const view = new DataView(this.#memory.buffer(at, SLOT_BYTES));
      view.setUint32(0, token, true);
      view.setUint32(32, 0, true);
      const extra = this.random(2) === 0 || num < 4 ? [] : [{ address: at + 16, length: 4 }];
      const id = this.#driver.add([{ address: at, length: 4 }, ...extra], [{ address: at + 32, length: 4 }]);
      if (id < 0) break;
      this.#slots.shift();
      this.#token++;
      this.#out.set(id, { slot, token });
      this.#offered.push(token);
    }
    this.#driver.publish();
  }

  collect(): void {
    for (let id = this.#driver.take(); id >= 0; id = this.#driver.take()) {
      const { slot, token } = this.#out.get(id)!;
      this.#out.delete(id);
      const answer = new DataView(this.#memory.buffer(DATA + slot * SLOT_BYTES + 32, 4)).getUint32(0, true);
      assert.equal(answer, token, "an answer that no device gave");
      this.#slots.push(slot);
      this.done++;
    }
    this.#driver.enableCalls();
  }

  /** The device takes and answers some, in any order. */
  work(all = false): void {
    const device = this.#device;
    if (device === undefined) return;
    const chain = new Chain(64);
    while ((all || this.random(4) > 0) && device.pop(chain)) {
      const token = new DataView(this.#memory.buffer(chain.addresses[0]!, 4)).getUint32(0, true);
      this.#held.push({ id: chain.id, token, at: chain.addresses[chain.count - 1]! });
    }
    while (this.#held.length > 0 && (all || this.random(3) > 0)) {
      const [{ id, token, at }] = this.#held.splice(this.random(this.#held.length), 1) as [{ id: number; token: number; at: number }];
      new DataView(this.#memory.buffer(at, 4)).setUint32(0, token, true);
      device.push(id, 4);
    }
    device.flush();
    device.enableKicks();
  }

  /** One turn of the relay, which may be killed in it; where there is none, another one takes over. */
  relay(kill: boolean): void {
    const stores = kill ? this.random(120) : Infinity;
    const alive = killedAfter(stores, () => {
      this.#runner ??= this.#start();
      this.#runner.service();
    });
    if (alive) return;
    this.#checkRecorded();
    this.kills++;
    this.#runner = undefined;
    this.#core?.close();
    this.#core = undefined;
    this.#device = undefined;
    this.#held = [];
  }

  // What the device can see of a dead relay's ring, and has not answered, is on record.
  #checkRecorded(): void {
    const device = this.#device;
    if (device === undefined) return;
    const chain = new Chain(64);
    const seen = this.#held.map(({ token }) => token);
    while (device.pop(chain)) seen.push(new DataView(this.#memory.buffer(chain.addresses[0]!, 4)).getUint32(0, true));
    const recorded = new Set(this.#recover()?.ids.map((id) => this.#out.get(id)?.token));
    for (const token of seen) assert.ok(recorded.has(token), `the device has request ${token}, which is not on record`);
  }

  #recover(): InflightChains | undefined {
    const { num, packed } = this.shape;
    const part = { buffer: this.#region.buffer() };
    const state = inflightState(part, num);
    if (state === INFLIGHT_STATE.idle) return undefined;
    assert.equal(state, packed ? INFLIGHT_STATE.packed : INFLIGHT_STATE.split);
    const { desc, avail, used } = this.#places(RINGS, packed);
    const chains = packed
      ? recoverPacked(part, num, (slot) => new Uint16Array(this.#memory.buffer(desc + 16 * slot, 16))[7]!)
      : recoverSplit(part, num, new Uint16Array(this.#memory.buffer(used, 4))[1]!);
    const isOurs = packed
      ? isOfPackedRing(num, chains, new Uint16Array(this.#memory.buffer(desc, 16 * num)))
      : isOfSplitRing(part, num, chains, {
        avail: new Uint16Array(this.#memory.buffer(avail, 4 + 2 * num)),
        used: new Uint32Array(this.#memory.buffer(used, 4 + 8 * num)),
      });
    assert.ok(isOurs, "the record is of this ring");
    return chains;
  }

  #start(): QueueRunner {
    const { num, packed, mode, devicePacked, indirect } = this.shape;
    const resume = this.#recover();
    new Uint8Array(this.#memory.buffer(SHADOW, 0x4000)).fill(0);
    const place = (at: number, isPacked: boolean, offset: number) => {
      const { desc, avail, used } = this.#places(at, isPacked);
      return {
        num,
        packed: isPacked,
        eventIdx: true,
        indirect,
        inOrder: false,
        desc: desc + offset,
        avail: avail + offset,
        used: used + offset,
      };
    };
    const { address } = this.#memory;
    const start: QueueStart = {
      index: 0,
      mode,
      guest: { ...place(RINGS, packed, 0), inOrder: this.shape.inOrder === true },
      device: {
        ...place(SHADOW, devicePacked, address),
        tables: { address: address + SHADOW + 0x8000, iova: SHADOW + 0x8000, entries: 8 },
      },
      guestBase: resume?.base ?? (packed ? 0x8000_8000 : 0),
      kickFd: -1,
      callFd: -1,
      deviceKickFd: this.#kick.fd,
      deviceCallFd: -1,
      logUsedGpa: -1,
      paused: false,
      inflight: { address: this.#region.address, size: this.#region.length },
      ...(resume === undefined ? {} : { resume }),
    };
    const core = this.#core = this.kind.maker.make(start, this.#counters.of(0));
    assert.equal(core.kind, this.kind.core, this.kind.maker.reason);
    const runner = new QueueRunner(start, core, this.#counters.of(0));
    this.resumed += resume?.ids.length ?? 0;
    this.#device = this.#ring(SHADOW, devicePacked, "device") as DeviceQueue;
    if (resume !== undefined) this.#checkOrder(resume.ids);
    return runner;
  }

  // What a killed relay had taken is offered again in the order in which the driver had offered it.
  #checkOrder(ids: number[]): void {
    const tokens = ids.map((id) => this.#out.get(id)?.token ?? -1);
    assert.deepEqual(tokens, [...tokens].sort((a, b) => a - b));
  }

  finish(): void {
    this.relay(false);
    for (let round = 0; this.#out.size > 0; round++) {
      assert.ok(round < 1000, `${this.#out.size} requests never come back`);
      this.relay(false);
      this.work(true);
      this.relay(false);
      this.collect();
    }
    this.#runner?.finish();
    this.#core?.close();
    this.kind.maker.setMemory([]);
    assert.equal(inflightState({ buffer: this.#region.buffer() }, this.shape.num), INFLIGHT_STATE.idle);
    assert.equal(this.done, this.#offered.length);
    this.#memory.close();
    this.#region.close();
    this.#kick.close();
  }
}

const CASES: Case[] = [
  { num: 8, packed: false, mode: "used", devicePacked: false, indirect: false },
  { num: 8, packed: false, mode: "shadow", devicePacked: false, indirect: true },
  { num: 8, packed: true, mode: "shadow", devicePacked: true, indirect: false },
  { num: 5, packed: true, mode: "shadow", devicePacked: true, indirect: true },
  { num: 16, packed: true, mode: "shadow", devicePacked: false, indirect: false },
  { num: 8, packed: false, mode: "shadow", devicePacked: false, indirect: false, inOrder: true },
  { num: 8, packed: true, mode: "shadow", devicePacked: true, indirect: true, inOrder: true },
  { num: 2, packed: false, mode: "shadow", devicePacked: true, indirect: true },
];
const RUNS = Deno.env.get("SVQ_SOAK") === "1" ? 2000 : 15;

for (const [shape, kind] of CASES.flatMap((shape) => makers.map((kind) => [shape, kind] as const))) {
  const name =
    `${shape.packed ? "packed" : "split"}, ${shape.num} descriptors, device ${shape.devicePacked ? "packed" : "split"}, ${shape.mode}` +
    `${shape.inOrder ? ", in order" : ""}, ${kind.core}`;
  Deno.test(`a relay that is killed at any ordered store loses no request and answers none twice: ${name}`, () => {
    let [kills, resumed] = [0, 0];
    for (let seed = 1; seed <= RUNS; seed++) {
      const random = randomOf(seed);
      const world = new World(shape, random, kind);
      try {
        for (let step = 0; step < 150; step++) {
          world.offer();
          world.relay(random(3) === 0);
          world.work();
          world.relay(random(3) === 0);
          world.collect();
        }
        world.finish();
      } catch (error) {
        throw new Error(`seed ${seed}: ${error instanceof Error ? error.message : error}`, { cause: error });
      }
      kills += world.kills;
      resumed += world.resumed;
    }
    assert.ok(kills > RUNS * 10 && resumed > RUNS * 5, `${kills} kills, ${resumed} requests done again`);
  });
}
