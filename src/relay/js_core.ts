/**
 * The relay core in JavaScript: rings of src/vring on both sides, joined by {@linkcode ShadowCore}. It runs everywhere, and is
 * the readable reference of the other one.
 *
 * @module
 */
import { bufferAt } from "../ffi/mod.ts";
import type { IotlbMiss } from "../iova/iotlb.ts";
import { HeadDriver } from "../vring/heads.ts";
import type { InflightChains, InflightLog } from "../vring/inflight.ts";
import { DESC_BYTES, packedLayout, splitLayout } from "../vring/layout.ts";
import { PackedDevice, PackedDriver } from "../vring/packed.ts";
import type { DeviceQueue, DriverQueue, RingMemory } from "../vring/queue.ts";
import { SplitDevice, SplitDriver } from "../vring/split.ts";
import { QueueCapture } from "./capture.ts";
import { COUNTER } from "./counters.ts";
import { type DataPath, maxChainOf, type RelayCore } from "./core.ts";
import { availRingOf, openInflight, packedRingOf } from "./inflight_start.ts";
import { IommuChains, iommuMemory } from "./iommu_chains.ts";
import type { QueueProgress, QueueStart } from "./messages.ts";
import { ShadowCore } from "./shadow_core.ts";

/** The guest's ring of `start`, as its device. @throws VringError, SvqError OUTSIDE_MEMORY */
export function guestQueue(start: QueueStart, path: DataPath, maxChain: number, inflight: InflightLog | undefined): DeviceQueue {
  const { num, packed, eventIdx, indirect, inOrder, desc, avail, used, local } = start.guest;
  const layout = packed ? packedLayout(num) : splitLayout(num);
  const part = (gpa: number, size: number) => ({ buffer: path.memory.buffer(gpa, size) });
  // Looked up through the path at each use: memory may be plugged while the queue runs.
  const memory: RingMemory = start.iommu === true ? iommuMemory(path, path.iotlb!) : {
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
    ...(inflight === undefined ? {} : { onUsed: (id: number) => inflight.give(id) }),
  };
  return packed ? new PackedDevice(options) : new SplitDevice(options);
}

/** The device's ring of `start`, as its driver. */
export function shadowQueue(start: QueueStart): DriverQueue {
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

// A ring in private memory that holds what was in flight: so it is checked by the same rules as what a guest offers.
function takenQueue(start: QueueStart, resume: InflightChains, path: DataPath, maxChain: number): DeviceQueue {
  const { num, indirect, desc } = start.guest;
  const { memory } = path;
  const options = { num, eventIdx: false, indirect, memory, maxChain };
  if (!start.guest.packed) {
    const table = { buffer: memory.buffer(desc, num * DESC_BYTES) };
    return new SplitDevice({
      ...options,
      desc: table,
      avail: { buffer: availRingOf(resume, num).buffer },
      used: { buffer: new ArrayBuffer(4 + 8 * num) },
    });
  }
  const ring = packedRingOf(resume, num);
  const event = () => ({ buffer: new ArrayBuffer(4) });
  return new PackedDevice({ ...options, desc: { buffer: ring.buffer }, avail: event(), used: event() });
}

/** Implements {@linkcode RelayCore} with typed arrays. */
export class JsCore implements RelayCore {
  /** Which implementation. */
  readonly kind = "js";
  readonly #guest: DeviceQueue;
  readonly #core: ShadowCore;
  readonly #start: QueueStart;
  readonly #iommu: IommuChains | undefined;
  #device: DriverQueue;

  /** @throws VringError, SvqError OUTSIDE_MEMORY when the guest's ring cannot be used */
  constructor(start: QueueStart, path: DataPath, counters: Float64Array) {
    const maxChain = maxChainOf(start);
    this.#start = start;
    const inflight = openInflight(start, path);
    this.#guest = guestQueue(start, path, maxChain, inflight);
    this.#device = shadowQueue(start);
    this.#iommu = start.iommu === true ? new IommuChains(path, path.iotlb!, maxChain) : undefined;
    const capture = start.capture === undefined
      ? undefined
      : new QueueCapture(start.index, start.capture, () => path.memory, () => counters[COUNTER.uncaptured]!++);
    this.#core = new ShadowCore(this.#guest, this.#device, path, maxChain, counters, inflight, this.#iommu, capture);
    this.#core.setLogUsed(start.logUsedGpa, start.guest);
    if (start.resume !== undefined) this.#resume(start.resume, start, path, maxChain);
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

  /** See {@linkcode RelayCore.miss}. */
  get miss(): IotlbMiss | undefined {
    return this.#iommu?.miss;
  }

  /** See {@linkcode RelayCore.usesIova}. */
  usesIova(iova: number, size: number): number {
    return this.#iommu === undefined ? 0 : this.#core.usesIova(iova, size);
  }

  /** See {@linkcode RelayCore.callWanted}. */
  get callWanted(): boolean {
    return this.#core.callWanted;
  }

  /** See {@linkcode RelayCore.kickWanted}. */
  get kickWanted(): boolean {
    return this.#core.kickWanted;
  }

  /** See {@linkcode RelayCore.full}. */
  get full(): boolean {
    return this.#core.full;
  }

  /** See {@linkcode RelayCore.inflight}. */
  get inflight(): number {
    return this.#device.inflight;
  }

  /** See {@linkcode RelayCore.guestBase}. */
  get guestBase(): number {
    return this.#guest.base;
  }

  /** See {@linkcode RelayCore.guestUsed}. */
  get guestUsed(): number {
    return this.#core.guestUsed;
  }

  /** See {@linkcode RelayCore.forward}. */
  forward(): number {
    return this.#core.forward();
  }

  /** See {@linkcode RelayCore.returnUsed}. */
  returnUsed(): number {
    return this.#core.returnUsed();
  }

  /** See {@linkcode RelayCore.disableCalls}. */
  disableCalls(): void {
    this.#device.disableCalls();
  }

  /** See {@linkcode RelayCore.enableCalls}. */
  enableCalls(): boolean {
    return this.#device.enableCalls();
  }

  /** See {@linkcode RelayCore.disableKicks}. */
  disableKicks(): void {
    this.#guest.disableKicks();
  }

  /** See {@linkcode RelayCore.enableKicks}. */
  enableKicks(): boolean {
    return this.#guest.enableKicks();
  }

  /** See {@linkcode RelayCore.setLogUsed}. */
  setLogUsed(gpa: number): void {
    this.#core.setLogUsed(gpa, this.#start.guest);
  }

  /** See {@linkcode RelayCore.logRing}. */
  logRing(): void {
    this.#core.logRing();
  }

  /** See {@linkcode RelayCore.uses}. */
  uses(gpa: number, size: number): number {
    return this.#core.uses(gpa, size);
  }

  /** See {@linkcode RelayCore.progress}. */
  progress(): QueueProgress {
    return this.#core.progress();
  }

  /** See {@linkcode RelayCore.finish}. */
  finish(): QueueProgress {
    return this.#core.finish();
  }

  /** See {@linkcode RelayCore.renew}. */
  renew(start: QueueStart): void {
    this.#device = shadowQueue(start);
    this.#core.renew(this.#device);
  }

  /** See {@linkcode RelayCore.abandon}. */
  abandon(keep: boolean): QueueProgress {
    return this.#core.abandon(keep);
  }

  /** Nothing is held. */
  close(): void {}
}
