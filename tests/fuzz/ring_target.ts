/**
 * Rings whose contents change at any moment while a relay works on them: a thread writes into the guest's ring, tables and
 * buffers, and into the shadow ring as a hostile device would. The relay must stop that queue at most, with a broken rule by
 * name; another queue must go on; and the queue must work when it is set up anew.
 *
 * @module
 */
import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { createEventfd, createMemfd, mapFd, signalEventfd } from "../../src/ffi/mod.ts";
import { bufferAddress } from "../../src/ffi/mapping.ts";
import { DEFAULT_RELAY_CONFIG, Relay } from "../../src/relay/relay.ts";
import { PACKED_BASE_START, PackedDriver } from "../../src/vring/packed.ts";
import { packedLayout, splitLayout } from "../../src/vring/layout.ts";
import { SplitDriver } from "../../src/vring/split.ts";
import type { Random } from "./random.ts";
import type { Attack } from "./ring_mutator.ts";
import { type FuzzSession, type FuzzTarget, type Outcome, refuseFaults, signOf } from "./target.ts";

const SIZE = 1 << 20;
const GPA = 0x10_0000;
const TABLES = 0x4_0000;
const DATA = 0x8_0000;
const ECHO = 0xe_0000;
const RING = 0x1_0000;
const DRAIN_MS = 1500;

interface Shape {
  core: "wasm" | "js";
  mode: "shadow" | "used";
  packed: boolean;
  deviceRing: "auto" | "split" | "packed";
  indirect: "copy" | "pass" | "flatten";
  eventIdx: boolean;
  log: boolean;
  num: number;
  hostileDevice: boolean;
}

interface Input {
  shape: Shape;
  seed: number;
  lives: { count: number; honest: number; pace: number }[];
}

function generate(random: Random): Input {
  const packed = random.once(2);
  const mode = random.once(3) ? "used" : "shadow";
  const shape: Shape = {
    core: random.once(2) ? "wasm" : "js",
    mode,
    packed,
    deviceRing: mode === "used" ? "auto" : random.pick(["auto", "split", "packed"]),
    indirect: random.pick(["copy", "pass", "flatten"]),
    eventIdx: random.once(2),
    log: random.once(2),
    num: random.pick([1, 2, 4, 16, 64, 256]),
    hostileDevice: random.once(4),
  };
  const lives = Array.from({ length: 20 }, () => ({
    count: random.pick([200, 2000, 20_000]),
    honest: random.pick([0, 0.5, 0.9, 0.99, 0.999]),
    pace: random.pick([1, 8, 64]),
  }));
  return { shape, seed: random.word(), lives };
}

/** A guest by hand, with a queue for the mutator and one that works. */
class World implements AsyncDisposable {
  readonly ram = createMemfd("hostile-rings", SIZE);
  readonly log = createMemfd("hostile-log", 4096);
  readonly mapping = mapFd(this.ram.fd, { length: SIZE });
  readonly bytes = new Uint8Array(this.mapping.buffer());
  readonly fds = [0, 1].map(() => ({ kick: createEventfd(), call: createEventfd() }));
  readonly signs = new Set<string>();
  readonly stop = new Int32Array(new SharedArrayBuffer(4));
  readonly relay: Relay;
  #echoes = 0;
  #driver: SplitDriver | PackedDriver | undefined;

  constructor(readonly device: SimDevice, readonly shape: Shape) {
    const { mode, core, deviceRing, indirect } = shape;
    this.relay = new Relay(device, { ...DEFAULT_RELAY_CONFIG, mode, core, deviceRing, indirect }, {
      log: () => {},
      error: (error) => {
        this.signs.add(signOf({ name: "queue", ...error }));
        Atomics.store(this.stop, 0, 1);
      },
    });
  }

  async start(): Promise<void> {
    const { relay, shape } = this;
    const bits = [32, 28, ...(shape.packed ? [34] : []), ...(shape.eventIdx ? [29] : [])];
    const features = bits.reduce((sum, bit) => sum | 1n << BigInt(bit), 0n);
    await relay.setMemTable([{ gpa: GPA, size: SIZE, uaddr: 0x7000_0000, fd: this.ram.fd, fdOffset: 0 }]);
    if (shape.log) await relay.setLogBase({ fd: this.log.fd, offset: 0, size: 4096 });
    await relay.setFeatures(features | (shape.log ? 1n << 26n : 0n));
    await this.startRing(1);
  }

  // Where chains are rebuilt `used` becomes `shadow`.
  requireRunning(index: number): void {
    const { state } = this.relay.queues[index]!;
    if (state !== "shadow" && state !== this.shape.mode) throw new Error(`Queue ${index} is in ${state}: ${[...this.signs].join("; ")}`);
  }

  get #layout() {
    return (this.shape.packed ? packedLayout : splitLayout)(this.shape.num);
  }

  async startRing(index: number): Promise<void> {
    const { relay, shape } = this;
    const at = index * RING;
    const layout = this.#layout;
    this.bytes.fill(0, at, at + layout.total);
    await relay.setVringNum(index, shape.num);
    await relay.setVringBase(index, shape.packed ? PACKED_BASE_START : 0);
    await relay.setVringAddresses(index, {
      desc: GPA + at,
      avail: GPA + at + layout.avail.offset,
      used: GPA + at + layout.used.offset,
      logGpa: shape.log ? GPA + at + layout.used.offset : undefined,
    });
    const { kick, call } = this.fds[index]!;
    await relay.setVringCall(index, call.fd);
    await relay.setVringKick(index, kick.fd);
    await relay.setVringEnable(index, true);
    if (index === 1) this.#driver = this.#newDriver(at);
  }

  #newDriver(at: number): SplitDriver | PackedDriver {
    const { num, packed, eventIdx } = this.shape;
    const layout = this.#layout;
    const part = (offset: number) => ({ buffer: this.bytes.buffer, byteOffset: at + offset });
    const parts = { num, desc: part(layout.desc.offset), avail: part(layout.avail.offset), used: part(layout.used.offset), eventIdx };
    return packed ? new PackedDriver(parts) : new SplitDriver(parts);
  }

  /** A chain through the other queue. */
  async echo(): Promise<void> {
    const driver = this.#driver!;
    const word = ++this.#echoes;
    new DataView(this.bytes.buffer).setUint32(ECHO, word);
    const one = this.shape.num === 1;
    // One descriptor holds nothing to answer into.
    driver.add([{ address: GPA + ECHO, length: 4 }], one ? [] : [{ address: GPA + ECHO + 4096, length: 4 }]);
    driver.publish();
    signalEventfd(this.fds[1]!.kick.fd);
    for (let id = driver.take(), looks = 0; id < 0; id = driver.take(), looks++) {
      if (looks > 1000) throw new Error(`The other queue does not answer: ${[...this.signs].join("; ")}; ${this.device.errors.join("; ")}`);
      await new Promise((resolve) => setTimeout(resolve, looks < 20 ? 0 : 2));
    }
    if (!one) assert.equal(new DataView(this.bytes.buffer).getUint32(ECHO + 4096), word, "the other queue's answer");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.relay.close();
    await this.device.reset();
    await this.device.setMemTable([]);
    for (const { kick, call } of this.fds) for (const fd of [kick, call]) fd.close();
    this.mapping.close();
    this.ram.close();
    this.log.close();
  }
}

class Session implements FuzzSession<Input> {
  readonly #device: SimDevice;
  readonly #mutator = new Worker(new URL("./ring_mutator.ts", import.meta.url).href, { type: "module", name: "hostile" });
  generate = generate;

  constructor(device: SimDevice) {
    this.#device = device;
  }

  #attack(attack: Attack): Promise<number> {
    const { promise, resolve, reject } = Promise.withResolvers<number>();
    this.#mutator.onmessage = ({ data }) => resolve(data);
    this.#mutator.onerror = (event) => reject(new Error(event.message));
    this.#mutator.postMessage(attack);
    return promise;
  }

  async run({ shape, seed, lives }: Input, step: () => void): Promise<Outcome> {
    const world = new World(this.#device, shape);
    let count = 0;
    try {
      await world.start();
      await world.echo();
      for (const [life, { count: most, honest, pace }] of lives.entries()) {
        step();
        await world.startRing(0);
        world.requireRunning(0);
        Atomics.store(world.stop, 0, 0);
        const slot = world.relay.arena!.slot(0);
        const shadow = { address: bufferAddress(slot), size: shape.hostileDevice ? 16 * shape.num + 16384 : 0 };
        count += await this.#attack({
          ...{ seed: seed + life, count: most, honest, pace, ring: 0, num: shape.num, packed: shape.packed },
          ...{ tables: TABLES, data: DATA, kickFd: world.fds[0]!.kick.fd, shadow, stop: world.stop.buffer as SharedArrayBuffer },
          ram: { address: world.mapping.address, size: SIZE, gpa: GPA },
        });
        await world.echo();
        world.requireRunning(1);
        step();
        if (!await this.#settle(world)) break;
      }
    } finally {
      await world[Symbol.asyncDispose]();
    }
    refuseFaults(world.signs);
    if (world.relay.deviceError !== undefined) throw world.relay.deviceError;
    const kind = `${shape.core} ${shape.mode} ${shape.packed}`;
    return { count, signs: [...world.signs].map((sign) => `${kind} ${sign}`) };
  }

  // The queue is taken from the guest. A device that keeps what it has (its ring was spoilt, or in mode `used` the guest's) is
  // waited for: then everything is made anew.
  async #settle(world: World): Promise<boolean> {
    const stopped = world.relay.getVringBase(0).then(() => true, (error) => {
      world.signs.add(signOf(error));
      return false;
    });
    let timer: ReturnType<typeof setTimeout> | undefined;
    const late = new Promise<false>((resolve) => timer = setTimeout(() => resolve(false), DRAIN_MS));
    const done = await Promise.race([stopped, late]);
    clearTimeout(timer);
    if (done) return true;
    const mayKeep = world.shape.hostileDevice || this.#device.errors.length > 0;
    if (!mayKeep) throw new Error(`The device keeps nothing, and the queue's base does not come: ${world.relay.queues[0]!.state}`);
    world.signs.add("the device keeps chains");
    return false;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#mutator.terminate();
    await this.#device.close();
  }
}

/** A relay of an embedded device. */
export const RINGS: FuzzTarget = {
  unit: "mutations",
  full: 10_000_000,
  quick: 40_000,
  open: async () => new Session(await SimDevice.open({ kind: "loopback", queues: 2, packed: true })),
};
