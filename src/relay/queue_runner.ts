/**
 * One queue on the data path of a Worker: the guest's ring on one side, the shadow ring on the other.
 *
 * @module
 */
import type { DirtyBitmap } from "../dirty/bitmap.ts";
import { bufferAt, signalEventfd } from "../ffi/mod.ts";
import type { Translation } from "../iova/translation.ts";
import type { RangeTable } from "../memory/range_table.ts";
import { type InflightChains, type InflightLog, PackedInflight, SplitInflight } from "../vring/inflight.ts";
import { DESC_BYTES, packedLayout, splitLayout } from "../vring/layout.ts";
import { PackedDevice, PackedDriver } from "../vring/packed.ts";
import { HeadDriver } from "../vring/heads.ts";
import type { DeviceQueue, DriverQueue, RingMemory } from "../vring/queue.ts";
import { SplitDevice, SplitDriver } from "../vring/split.ts";
import { COUNTER } from "./counters.ts";
import type { QueueProgress, QueueStart } from "./messages.ts";
import { ShadowCore } from "./shadow_core.ts";

/** What all queues of a Worker share; replaced while they run. */
export interface DataPath {
  /** Guest memory. */
  memory: RangeTable;
  /** Where the device finds guest memory; undefined: everywhere IOVA = GPA. */
  translation: Translation | undefined;
  /** Where written pages are marked, if anywhere. */
  dirty: DirtyBitmap | undefined;
}

/** Rounds of forwarding and returning before other queues get their turn. */
const ROUNDS = 8;

function guestQueue(start: QueueStart, path: DataPath, maxChain: number): DeviceQueue {
  const { num, packed, eventIdx, indirect, desc, avail, used } = start.guest;
  const layout = packed ? packedLayout(num) : splitLayout(num);
  const part = (gpa: number, size: number) => ({ buffer: path.memory.buffer(gpa, size) });
  // Looked up through the path at each use: memory may be plugged while the queue runs.
  const memory: RingMemory = {
    contains: (gpa, length) => path.memory.contains(gpa, length),
    buffer: (gpa, length) => path.memory.buffer(gpa, length),
    readWords: (gpa, target, count) => path.memory.readWords(gpa, target, count),
  };
  const options = {
    num,
    desc: part(desc, layout.desc.size),
    avail: part(avail, layout.avail.size),
    used: part(used, layout.used.size),
    eventIdx,
    indirect,
    memory,
    maxChain,
    base: start.guestBase,
  };
  return packed ? new PackedDevice(options) : new SplitDevice(options);
}

function shadowQueue(start: QueueStart): DriverQueue {
  if (start.mode === "used") return headQueue(start);
  const { num, packed, eventIdx, indirect, desc, avail, used, tables } = start.device;
  const layout = packed ? packedLayout(num) : splitLayout(num);
  const part = (address: number, size: number) => ({ buffer: bufferAt(address, size) });
  const area = indirect && tables !== undefined && tables.entries > 1
    ? { ...part(tables.address, num * tables.entries * DESC_BYTES), address: tables.iova, entries: tables.entries }
    : undefined;
  const options = {
    num,
    desc: part(desc, layout.desc.size),
    avail: part(avail, layout.avail.size),
    used: part(used, layout.used.size),
    eventIdx,
    ...(area === undefined ? {} : { indirect: area }),
  };
  return packed ? new PackedDriver(options) : new SplitDriver(options);
}

// Mode `used`: the device reads the guest's own descriptor table.
function headQueue(start: QueueStart): DriverQueue {
  const { num, eventIdx, avail, used } = start.device;
  const layout = splitLayout(num);
  return new HeadDriver({
    num,
    avail: { buffer: bufferAt(avail, layout.avail.size) },
    used: { buffer: bufferAt(used, layout.used.size) },
    eventIdx,
  });
}

function inflightLog(start: QueueStart, guest: DeviceQueue): InflightLog | undefined {
  if (start.inflight === undefined) return undefined;
  const { num, packed } = start.guest;
  const part = { buffer: bufferAt(start.inflight.address, start.inflight.size) };
  const used = guest instanceof SplitDevice ? guest.usedIdx : guest.base >>> 16;
  const chains = start.resume ?? { ids: [], used, entries: [] };
  return packed ? new PackedInflight(part, num, chains) : new SplitInflight(part, num, chains);
}

// A ring in private memory that holds what was in flight: so it is checked by the same rules as what a guest offers.
function takenQueue(start: QueueStart, { ids, entries, descriptors }: InflightChains, path: DataPath, maxChain: number): DeviceQueue {
  const { num, indirect, desc } = start.guest;
  const { memory } = path;
  const options = { num, eventIdx: false, indirect, memory, maxChain };
  if (!start.guest.packed) {
    const table = { buffer: memory.buffer(desc, num * DESC_BYTES) };
    const avail = Uint16Array.from([0, ids.length, ...ids, ...new Uint16Array(num - ids.length)]);
    return new SplitDevice({ ...options, desc: table, avail: { buffer: avail.buffer }, used: { buffer: new ArrayBuffer(4 + 8 * num) } });
  }
  const ring = new DataView(new ArrayBuffer(num * DESC_BYTES));
  let slot = 0;
  entries.forEach((chain, i) =>
    chain.forEach(() => {
      const [address, length, flags] = descriptors[slot]!;
      const at = DESC_BYTES * slot++;
      ring.setBigUint64(at, BigInt(address), true);
      ring.setUint32(at + 8, length, true);
      ring.setUint16(at + 12, ids[i]!, true);
      ring.setUint16(at + 14, (flags & ~(1 << 7 | 1 << 15)) | 1 << 7, true);
    })
  );
  const event = () => ({ buffer: new ArrayBuffer(4) });
  return new PackedDevice({ ...options, desc: { buffer: ring.buffer }, avail: event(), used: event() });
}

/** What a Worker runs for a queue. */
export interface Runner {
  /** Index of the queue. */
  readonly index: number;
  /** What it was started with. */
  readonly start: QueueStart;
  /** The guest kicked. */
  kicked(): void;
  /** The device called. */
  called(): void;
  /** Does what there is to do. @returns whether there is more to do at once */
  service(): boolean;
  /** Takes chains from the guest, or stops doing so; what is at the device still comes back. */
  pause(paused: boolean): void;
  /** The guest's call eventfd, -1 for none. */
  setCall(fd: number): void;
  /** Where writes to the guest's used ring are logged, -1 for nowhere. */
  setLogUsed(gpa: number): void;
  /** How many chains at the device touch `[gpa, gpa + size)`. */
  uses(gpa: number, size: number): number;
  /** Where the queue stands. */
  progress(): QueueProgress;
  /** A rule was broken: the queue stops here. */
  fail(): void;
  /** The end of the mode. */
  finish(): QueueProgress;
}

/** A queue in mode `used` or `shadow`. */
export class QueueRunner implements Runner {
  /** Index of the queue. */
  readonly index: number;
  /** What it was started with. */
  start: QueueStart;
  readonly #core: ShadowCore;
  readonly #guest: DeviceQueue;
  #device: DriverQueue;
  readonly #counters: Float64Array;
  #callFd: number;
  #paused: boolean;
  #failed = false;
  #lost = false;
  #finished: QueueProgress | undefined;

  /** @throws VringError, SvqError OUTSIDE_MEMORY when the guest's ring cannot be used */
  constructor(start: QueueStart, path: DataPath, counters: Float64Array) {
    this.index = start.index;
    this.start = start;
    this.#counters = counters;
    this.#callFd = start.callFd;
    this.#paused = start.paused;
    const entries = start.device.indirect ? start.device.tables?.entries ?? 0 : 0;
    const maxChain = Math.max(start.device.num, entries);
    this.#guest = guestQueue(start, path, maxChain);
    this.#device = shadowQueue(start);
    const inflight = inflightLog(start, this.#guest);
    this.#core = new ShadowCore(this.#guest, this.#device, path, maxChain, counters, inflight);
    this.#core.setLogUsed(start.logUsedGpa, start.guest);
    if (start.resume !== undefined) this.#resume(start.resume, start, path, maxChain);
    this.#count();
  }

  // What was in flight becomes so again; the driver is told nothing of it but that a call is due.
  #resume(resume: InflightChains, start: QueueStart, path: DataPath, maxChain: number): void {
    const slots = this.#core.resume(takenQueue(start, resume, path, maxChain));
    const { num, packed } = start.guest;
    let age = packed ? slots.reduce((sum, count) => sum + count, 0) : slots.length;
    const inflight = resume.ids.map((id, i) => {
      const record = { id, age, slots: slots[i]! };
      age -= packed ? slots[i]! : 1;
      return record;
    });
    const { base, used } = resume;
    this.#guest.restore({ layout: packed ? "packed" : "split", side: "device", num, base, used, inflight });
    if (this.#guest instanceof PackedDevice) this.#guest.withdrawUsed();
    this.#core.publishResumed();
  }

  /** The guest kicked. */
  kicked(): void {
    this.#counters[COUNTER.kicks]!++;
  }

  /** The device called. */
  called(): void {
    this.#counters[COUNTER.deviceCalls]!++;
  }

  /** Takes chains from the guest, or stops doing so; what is at the device still comes back. */
  pause(paused: boolean): void {
    this.#paused = paused;
  }

  /** The guest's call eventfd, -1 for none. */
  setCall(fd: number): void {
    this.#callFd = fd;
  }

  /** Where writes to the guest's used ring are logged, -1 for nowhere. */
  setLogUsed(gpa: number): void {
    this.#core.setLogUsed(gpa, this.start.guest);
  }

  /** How many chains at the device touch `[gpa, gpa + size)`. */
  uses(gpa: number, size: number): number {
    return this.#failed ? 0 : this.#core.uses(gpa, size);
  }

  /**
   * Moves what there is, in both directions.
   *
   * @returns whether there is more to do at once
   * @throws VringError when either ring breaks a rule
   */
  service(): boolean {
    if (this.#failed || this.#lost) return false;
    const core = this.#core;
    this.#device.disableCalls();
    if (!this.#paused) this.#guest.disableKicks();
    for (let round = 0; round < ROUNDS; round++) {
      let moved = core.returnUsed();
      if (core.callWanted) this.#call();
      if (!this.#paused) {
        moved += core.forward();
        if (core.kickWanted) this.#kickDevice();
      }
      if (moved === 0) break;
    }
    this.#count();
    let more = this.#device.enableCalls();
    // While the device's ring is full only the device can help: its call is wanted, not a kick.
    if (!this.#paused && !core.full) more = this.#guest.enableKicks() || more;
    core.logRing();
    return more;
  }

  #call(): void {
    this.#counters[COUNTER.calls]!++;
    if (this.#callFd >= 0) signalEventfd(this.#callFd);
  }

  #kickDevice(): void {
    this.#counters[COUNTER.deviceKicks]!++;
    signalEventfd(this.start.deviceKickFd);
  }

  #count(): void {
    const counters = this.#counters;
    counters[COUNTER.inflight] = this.#device.inflight;
    counters[COUNTER.availIdx] = this.#guest.base & 0xffff;
    counters[COUNTER.usedIdx] = this.#core.guestUsed;
  }

  /** Where the queue stands. */
  progress(): QueueProgress {
    return this.#finished ?? this.#core.progress();
  }

  /** The device is gone: what it has returned goes to the guest, and its ring is not looked at any more. */
  lose(): void {
    this.#paused = true;
    this.service();
    this.#lost = true;
  }

  /** What a lost device held goes to its successor, in the fresh ring that `start` names. */
  renew(start: QueueStart): void {
    this.#lost = false;
    this.#device = shadowQueue(start);
    this.#core.renew(this.#device);
    this.#core.setLogUsed(start.logUsedGpa, start.guest);
    this.start = start;
    this.#callFd = start.callFd;
    this.#paused = start.paused;
    this.#count();
  }

  /** A rule was broken: the queue stops here. */
  fail(): void {
    this.#counters[COUNTER.errors]!++;
    this.abandon();
  }

  /** The queue stops here, whatever is at the device. @param keep what the in-flight region says stays as it is */
  abandon(keep = false): void {
    this.#finished ??= this.#core.abandon(keep);
    this.#failed = true;
  }

  /** The end of the mode: what the device never took is the guest's again, and the guest's suppression is undone. */
  finish(): QueueProgress {
    if (this.#finished !== undefined) return this.#finished;
    const progress = this.#core.finish();
    this.#count();
    this.#finished = progress;
    this.#failed = true;
    return progress;
  }
}
