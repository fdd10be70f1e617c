/**
 * One queue on the data path of a Worker: the guest's ring on one side, the shadow ring on the other.
 *
 * @module
 */
import type { DirtyBitmap } from "../dirty/bitmap.ts";
import { bufferAt, signalEventfd } from "../ffi/mod.ts";
import type { Iotlb } from "../iova/iotlb.ts";
import type { Translation } from "../iova/translation.ts";
import type { RangeTable } from "../memory/range_table.ts";
import { DESC_BYTES, packedLayout, splitLayout } from "../vring/layout.ts";
import { PackedDevice, PackedDriver } from "../vring/packed.ts";
import { HeadDriver } from "../vring/heads.ts";
import type { DeviceQueue, DriverQueue, RingMemory } from "../vring/queue.ts";
import { SplitDevice, SplitDriver } from "../vring/split.ts";
import { COUNTER } from "./counters.ts";
import { IommuChains, iommuMemory } from "./iommu_chains.ts";
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
  /** What is known of the guest's IOMMU; the same object all the time. */
  readonly iotlb: Iotlb;
  /** An address that the guest's IOMMU maps, perhaps, is not known: the main thread asks. */
  miss(index: number, iova: number, perm: number): void;
}

/** Rounds of forwarding and returning before other queues get their turn. */
const ROUNDS = 8;

function guestQueue(start: QueueStart, path: DataPath, maxChain: number): DeviceQueue {
  const { num, packed, eventIdx, indirect, inOrder, desc, avail, used, local } = start.guest;
  const layout = packed ? packedLayout(num) : splitLayout(num);
  const part = (gpa: number, size: number) => ({ buffer: path.memory.buffer(gpa, size) });
  // Looked up through the path at each use: memory may be plugged while the queue runs.
  const memory: RingMemory = start.iommu ? iommuMemory(path, path.iotlb) : {
    contains: (gpa, length) => path.memory.contains(gpa, length),
    buffer: (gpa, length) => path.memory.buffer(gpa, length),
    readWords: (gpa, target, count) => path.memory.readWords(gpa, target, count),
  };
  const options = {
    num,
    desc: local === undefined ? part(desc, layout.desc.size) : { buffer: bufferAt(local.desc, layout.desc.size) },
    avail: local === undefined ? part(avail, layout.avail.size) : { buffer: bufferAt(local.avail, layout.avail.size) },
    used: local === undefined ? part(used, layout.used.size) : { buffer: bufferAt(local.used, layout.used.size) },
    eventIdx,
    indirect,
    inOrder,
    memory,
    maxChain,
    base: start.guestBase,
  };
  return packed ? new PackedDevice(options) : new SplitDevice(options);
}

function shadowQueue(start: QueueStart): DriverQueue {
  if (start.mode === "used") return headQueue(start);
  const { num, packed, eventIdx, indirect, inOrder, desc, avail, used, tables } = start.device;
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
    inOrder,
    // A table of one format cannot be read as one of the other.
    passTables: indirect && start.device.passTables === true && packed === start.guest.packed,
    ...(area === undefined ? {} : { indirect: area }),
  };
  return packed ? new PackedDriver(options) : new SplitDriver(options);
}

// Mode `used`: the device reads the guest's own descriptor table.
function headQueue(start: QueueStart): DriverQueue {
  const { num, eventIdx, inOrder, avail, used } = start.device;
  const layout = splitLayout(num);
  return new HeadDriver({
    num,
    avail: { buffer: bufferAt(avail, layout.avail.size) },
    used: { buffer: bufferAt(used, layout.used.size) },
    eventIdx,
    inOrder,
  });
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
  /** The same by IOVA, for a guest with an IOMMU. */
  usesIova(iova: number, size: number): number;
  /** The table of the guest's IOMMU has grown. @returns whether there is more to do now */
  known(): boolean;
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
  readonly #path: DataPath;
  readonly #iommu: IommuChains | undefined;
  /** The address that the main thread was told of and has not answered; -1: none. */
  #asked = -1;

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
    this.#path = path;
    this.#iommu = start.iommu ? new IommuChains(path, path.iotlb, maxChain) : undefined;
    this.#core = new ShadowCore(this.#guest, this.#device, path, maxChain, counters, this.#iommu);
    this.#core.setLogUsed(start.logUsedGpa, start.guest);
    this.#count();
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

  /** The same by IOVA, for a guest with an IOMMU. */
  usesIova(iova: number, size: number): number {
    return this.#failed || this.#iommu === undefined ? 0 : this.#core.usesIova(iova, size);
  }

  /** The table of the guest's IOMMU has grown. @returns whether there is more to do now */
  known(): boolean {
    const waited = this.#asked >= 0;
    this.#asked = -1;
    return waited;
  }

  #ask(): void {
    const miss = this.#iommu?.miss;
    if (miss === undefined || miss.iova === this.#asked) return;
    this.#asked = miss.iova;
    this.#path.miss(this.index, miss.iova, miss.perm);
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
    if (!this.#paused) this.#ask();
    // And while the guest's next chain waits for the guest's IOMMU, only that can help.
    if (!this.#paused && !core.full && this.#iommu?.miss === undefined) more = this.#guest.enableKicks() || more;
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

  /** The queue stops here, whatever is at the device. */
  abandon(): void {
    this.#finished ??= this.#core.abandon();
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
