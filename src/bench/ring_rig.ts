/**
 * What `svq bench ring` measures on: guest memory with a ring, a shadow ring, a dirty log, and models of guest and device that
 * check every chain on both ways. One relay core stands between them.
 *
 * @module
 */
import { DirtyBitmap, logBytes } from "../dirty/bitmap.ts";
import { SvqError } from "../errors.ts";
import { createMemfd, mapFd, type Mapping, Reference } from "../ffi/mod.ts";
import { RangeTable } from "../memory/range_table.ts";
import { Arena, slotSize } from "../relay/arena.ts";
import type { DataPath } from "../relay/core.ts";
import { Counters } from "../relay/counters.ts";
import { CoreMaker } from "../relay/core_maker.ts";
import type { QueueStart } from "../relay/messages.ts";
import { packedLayout, type RingLayout, type RingPart, splitLayout } from "../vring/layout.ts";
import { PACKED_BASE_START, PackedDevice, PackedDriver } from "../vring/packed.ts";
import { Chain, type DeviceQueue, type DriverQueue, type RingFormat } from "../vring/queue.ts";
import { SplitDevice, SplitDriver } from "../vring/split.ts";
import { Doorbells, WokenQueue } from "./ring_eventfds.ts";

/** What stands between the rings. */
export type Contender = "wasm" | "js" | "c" | "bound" | "syscalls";
/** A chain's shape: tx1, one buffer of 1500 B out; 2desc, 16 B out and 1536 B in; rx1, one buffer of 1536 B in. */
export type Workload = "tx1" | "2desc" | "rx1";

/** One arrangement of rings and core. */
export interface RingCase {
  /** Who relays. */
  core: Contender;
  /** Relay mode. */
  mode: "used" | "shadow";
  /** The guest's ring. */
  guestRing: RingFormat;
  /** The device's ring. */
  deviceRing: RingFormat;
  /** Descriptors of both rings. */
  num: number;
  /** Mark written pages in a dirty log. */
  log: boolean;
  /** With the eventfds and the waits of a relay that does not poll. */
  eventfds?: boolean;
  /** Shared library of the C reference, for `c` and `bound`. */
  reference?: string;
}

const RAM = 64 * 2 ** 20;
/** Buffers lie in slots of this size, one page each: the log gets new words to look at. */
const SLOT = 4096;
const PAYLOAD_AT = 2 ** 20;
const SHAPES: Readonly<Record<Workload, { readable: number; writable: number }>> = {
  tx1: { readable: 1500, writable: 0 },
  "2desc": { readable: 16, writable: 1536 },
  rx1: { readable: 0, writable: 1536 },
};

interface Mover {
  /** @returns how many, where it is known */
  forward(): number | undefined;
  returnUsed(): number | undefined;
  /** Before it is called, and not timed. */
  kick?(): void;
  call?(): void;
  [Symbol.dispose](): void;
}

/** Rings, models and a core; one thread. */
export class RingRig implements Disposable {
  readonly #stack = new DisposableStack();
  readonly #ram: Mapping;
  readonly #driver: DriverQueue;
  readonly #device: DeviceQueue;
  readonly #relay: Mover;
  readonly #offered = new Chain(4);
  readonly #taken: Chain;
  readonly #num: number;
  /** By the guest's id of a chain: which one it is. */
  readonly #sequenceOf: Float64Array;
  readonly #dirty: DirtyBitmap | undefined;
  /** Chains offered, seen by the device, and back. */
  #offeredCount = 0;
  #seen = 0;
  #back = 0;

  /** @throws SvqError when the core cannot run this case */
  constructor(ring: RingCase) {
    const { num, guestRing, deviceRing } = ring;
    this.#num = num;
    using cleanup = new DisposableStack();
    this.#ram = cleanup.use(shared("svq-bench-ram", RAM));
    const log = cleanup.use(shared("svq-bench-log", logBytes(RAM)));
    const arena = cleanup.use(new Arena(1, 2 ** 40, slotSize(undefined)));
    arena.place(0, num);
    const local = arena.local(0, num);
    const guestLayout = layoutOf(guestRing, num);
    const guest = { desc: guestLayout.desc.offset, avail: guestLayout.avail.offset, used: guestLayout.used.offset };
    const doorbells = ring.eventfds === true ? cleanup.use(new Doorbells()) : undefined;
    const start: QueueStart = {
      ...{ index: 0, mode: ring.mode, logUsedGpa: -1, paused: false },
      ...doorbells?.fds ?? { kickFd: -1, callFd: -1, deviceKickFd: -1, deviceCallFd: -1 },
      guest: { num, packed: guestRing === "packed", eventIdx: false, indirect: false, inOrder: false, ...guest },
      device: { num, packed: deviceRing === "packed", eventIdx: false, indirect: false, inOrder: false, ...local },
      guestBase: guestRing === "packed" ? PACKED_BASE_START : 0,
    };
    this.#dirty = ring.log && ring.core !== "bound" ? new DirtyBitmap(log.buffer()) : undefined;
    const { address } = this.#ram;
    if (ring.core === "c" || ring.core === "bound") {
      if (ring.reference === undefined) throw new SvqError("NO_REFERENCE", "No C reference was named");
      const rings = [address + guest.desc, address + guest.avail, address + guest.used, local.desc, local.avail, local.used];
      const bounds = [0, RAM, ring.log ? log.address : 0, ring.log ? log.length : 0];
      this.#relay = cleanup.use(new Reference(ring.reference, ring.core, [num, ...rings, ...bounds]));
    } else if (ring.core === "syscalls") {
      throw new SvqError("NO_CORE", "Bare system calls move no chains");
    } else {
      const ranges = [{ gpa: 0, size: RAM, uaddr: 0, address }];
      const path: DataPath = { memory: new RangeTable(ranges), translation: undefined, dirty: this.#dirty };
      const maker = new CoreMaker(ring.core, path);
      maker.setMemory(ranges);
      maker.setLog(ring.log ? log.address : 0, ring.log ? log.length : 0);
      const counters = new Counters(1).of(0);
      const core = maker.make(start, counters);
      if (core.kind !== ring.core) throw new SvqError("NO_CORE", `The ${ring.core} core does not run here: ${maker.reason}`);
      if (doorbells === undefined) {
        this.#relay = { forward: () => core.forward(), returnUsed: () => core.returnUsed(), [Symbol.dispose]: () => core.close() };
      } else {
        const queue = new WokenQueue(start, core, counters, doorbells);
        this.#relay = {
          ...{ forward: () => void queue.step(), returnUsed: () => void queue.step() },
          ...{ kick: () => queue.kick(), call: () => queue.call(), [Symbol.dispose]: () => queue[Symbol.dispose]() },
        };
      }
      cleanup.use(this.#relay);
    }
    const part = (offset: number, size: number): RingPart => ({ buffer: this.#ram.buffer(offset, size) });
    const guestParts = {
      desc: part(guest.desc, guestLayout.desc.size),
      avail: part(guest.avail, guestLayout.avail.size),
      used: part(guest.used, guestLayout.used.size),
    };
    const slot = arena.slot(0);
    const at = (place: number): RingPart => ({ buffer: slot, byteOffset: place - local.desc });
    const deviceParts = {
      desc: ring.mode === "used" ? guestParts.desc : at(local.desc),
      avail: at(local.avail),
      used: at(local.used),
    };
    const common = { num, eventIdx: false, indirect: false };
    this.#driver = guestRing === "packed"
      ? new PackedDriver({ num, eventIdx: false, ...guestParts })
      : new SplitDriver({ num, eventIdx: false, ...guestParts });
    this.#device = deviceRing === "packed"
      ? new PackedDevice({ ...common, ...deviceParts })
      : new SplitDevice({ ...common, ...deviceParts });
    this.#taken = new Chain(num);
    this.#sequenceOf = new Float64Array(num).fill(-1);
    this.#stack = cleanup.move();
  }

  /** Forwards and returns `batch` chains. @returns ms that the relay took, timers included. @throws SvqError BENCH_WRONG */
  round(workload: Workload, batch: number): number {
    const { readable, writable } = SHAPES[workload];
    this.#offer(readable, writable, batch);
    this.#relay.kick?.();
    const t0 = performance.now();
    const forwarded = this.#relay.forward();
    const t1 = performance.now();
    this.#serve(readable, writable, batch);
    this.#relay.call?.();
    const t2 = performance.now();
    const returned = this.#relay.returnUsed();
    const t3 = performance.now();
    if ((forwarded ?? batch) !== batch || (returned ?? batch) !== batch) {
      this.#wrong(`of ${batch} chains ${forwarded} were forwarded and ${returned} returned`);
    }
    this.#collect(writable, batch);
    return t1 - t0 + (t3 - t2);
  }

  #addressOf(sequence: number): number {
    return PAYLOAD_AT + sequence % ((RAM - PAYLOAD_AT) / SLOT) * SLOT;
  }

  #offer(readable: number, writable: number, batch: number): void {
    const chain = this.#offered;
    for (let i = 0; i < batch; i++) {
      const address = this.#addressOf(this.#offeredCount);
      chain.clear();
      if (readable > 0) chain.addReadable(address, readable);
      if (writable > 0) chain.addWritable(address + 2048, writable);
      const id = this.#driver.addChain(chain);
      if (id < 0) this.#wrong(`the guest's ring of ${this.#num} has no room for a batch of ${batch}`);
      this.#sequenceOf[id] = this.#offeredCount++;
    }
    this.#driver.publish();
  }

  // The device gets the chains in order, each with the guest's addresses and lengths.
  #serve(readable: number, writable: number, batch: number): void {
    const chain = this.#taken;
    for (let i = 0; i < batch; i++) {
      if (!this.#device.pop(chain)) this.#wrong(`the device sees ${i} of ${batch} chains`);
      const address = this.#addressOf(this.#seen++);
      let at = 0;
      if (readable > 0) {
        if (chain.addresses[at] !== address || chain.lengths[at] !== readable) this.#wrong(`chain ${this.#seen - 1} reads elsewhere`);
        at++;
      }
      if (chain.readableCount !== at) this.#wrong(`chain ${this.#seen - 1} has ${chain.readableCount} readable buffers`);
      if (writable > 0) {
        if (chain.addresses[at] !== address + 2048 || chain.lengths[at] !== writable) {
          this.#wrong(`chain ${this.#seen - 1} writes elsewhere`);
        }
        at++;
      }
      if (chain.count !== at) this.#wrong(`chain ${this.#seen - 1} has ${chain.count} buffers`);
      this.#device.push(chain.id, writable);
    }
    this.#device.flush();
  }

  #collect(writable: number, batch: number): void {
    for (let i = 0; i < batch; i++) {
      const id = this.#driver.take();
      if (id < 0) this.#wrong(`the guest gets ${i} of ${batch} chains back`);
      if (this.#sequenceOf[id] !== this.#back) this.#wrong(`chain ${this.#back} came back as ${this.#sequenceOf[id]}`);
      this.#sequenceOf[id] = -1;
      this.#back++;
      if (this.#driver.usedLength !== writable) this.#wrong(`chain ${this.#back - 1} came back with ${this.#driver.usedLength} bytes`);
    }
  }

  /** Empties the dirty log. */
  clearLog(): void {
    this.#dirty?.clear();
  }

  /** Did every written page of the last `count` chains get its bit? Always true for the bound, which has no log. */
  logged(workload: Workload, count: number): boolean {
    if (this.#dirty === undefined || SHAPES[workload].writable === 0) return true;
    for (let i = Math.max(0, this.#back - count); i < this.#back; i++) {
      if (!this.#dirty.has((this.#addressOf(i) + 2048) / 4096 >>> 0)) return false;
    }
    return true;
  }

  #wrong(what: string): never {
    throw new SvqError("BENCH_WRONG", `The relay did not do its work: ${what}`);
  }

  /** Unmaps everything. */
  [Symbol.dispose](): void {
    this.#stack.dispose();
  }
}

function layoutOf(format: RingFormat, num: number): RingLayout {
  return format === "packed" ? packedLayout(num) : splitLayout(num);
}

function shared(name: string, size: number): Mapping {
  using fd = createMemfd(name, size);
  return mapFd(fd.fd, { length: size, what: name });
}
