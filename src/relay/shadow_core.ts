/**
 * Mode `shadow`: the guest's chains are offered to the device in a ring of the relay's own. The readable reference of the
 * relay cores.
 *
 * @module
 */
import { LOG_PAGE_BYTES } from "../dirty/bitmap.ts";
import { SvqError } from "../errors.ts";
import { NO_ROOM, type Translation } from "../iova/translation.ts";
import type { InflightLog } from "../vring/inflight.ts";
import { PackedDriver } from "../vring/packed.ts";
import { Chain, type DeviceQueue, type DriverQueue } from "../vring/queue.ts";
import { COUNTER } from "./counters.ts";
import type { QueueProgress, RingPlace } from "./messages.ts";
import type { QueueCapture } from "./capture.ts";
import type { IommuChains } from "./iommu_chains.ts";
import { loggedRanges } from "./logged_ring.ts";
import type { DataPath } from "./core.ts";

/** Private copies of the segments of chains at the device: linked lists in three arrays, one list per chain. */
class SegmentPool {
  addresses = new Float64Array(0);
  lengths = new Uint32Array(0);
  writable = new Uint8Array(0);
  /** With an IOMMU: the same segments as the guest's driver names them. */
  iovas = new Float64Array(0);
  next = new Int32Array(0);
  #free = -1;

  constructor(capacity: number) {
    this.#grow(capacity);
  }

  #grow(capacity: number): void {
    const old = this.next.length;
    const copy = <T extends Float64Array | Uint32Array | Uint8Array | Int32Array>(fresh: T, from: T): T => {
      fresh.set(from as never);
      return fresh;
    };
    this.addresses = copy(new Float64Array(capacity), this.addresses);
    this.lengths = copy(new Uint32Array(capacity), this.lengths);
    this.writable = copy(new Uint8Array(capacity), this.writable);
    this.iovas = copy(new Float64Array(capacity), this.iovas);
    this.next = copy(new Int32Array(capacity), this.next);
    for (let i = capacity - 1; i >= old; i--) {
      this.next[i] = this.#free;
      this.#free = i;
    }
  }

  /** Copies a chain's segments; the first one's index. */
  put(chain: Chain, iovas: Float64Array): number {
    let first = -1;
    // From the last to the first, so that each new one becomes the head of the list.
    for (let i = chain.count - 1; i >= 0; i--) {
      if (this.#free < 0) this.#grow(this.next.length * 2);
      const slot = this.#free;
      this.#free = this.next[slot]!;
      this.addresses[slot] = chain.addresses[i]!;
      this.lengths[slot] = chain.lengths[i]!;
      this.writable[slot] = i < chain.readableCount ? 0 : 1;
      this.iovas[slot] = iovas[i]!;
      this.next[slot] = first;
      first = slot;
    }
    return first;
  }

  release(first: number): void {
    for (let slot = first; slot >= 0;) {
      const next = this.next[slot]!;
      this.next[slot] = this.#free;
      this.#free = slot;
      slot = next;
    }
  }
}

/** The relay of one queue between two rings of any format, by translation of every chain. */
export class ShadowCore {
  /** After {@linkcode returnUsed}: the guest wants a call. */
  callWanted = false;
  /** After {@linkcode forward}: the device wants a kick. */
  kickWanted = false;
  /** The device's ring has no room for the guest's next chain. */
  full = false;

  readonly #guest: DeviceQueue;
  #device: DriverQueue;
  readonly #path: DataPath;
  readonly #counters: Float64Array;
  readonly #chain: Chain;
  readonly #moved: Chain;
  readonly #segments: SegmentPool;
  /** By id in the device's ring: the guest's id, and the first segment. -1: not at the device. */
  #guestId: Int32Array;
  #first: Int32Array;
  #bytes: Float64Array;
  /** By the same id: when it was taken from the guest. */
  #order: Float64Array;
  #taken = 0;
  /** Chains that came back; the device's ring started at 0. */
  #returned = 0;
  /** Address and length of what is logged when the guest's ring is written. */
  #logged: readonly number[] = [];
  readonly #inflight: InflightLog | undefined;
  readonly #iommu: IommuChains | undefined;
  readonly #capture: QueueCapture | undefined;

  /**
   * @param guest the guest's ring
   * @param device the shadow ring, fresh
   * @param path guest memory and dirty log; may change
   * @param maxChain longest chain, in segments
   * @param counters the queue's slots
   * @param inflight record of what is in flight, outside this process
   * @param iommu where the guest's chains name IOVAs
   * @param capture copies what comes back
   */
  constructor(
    guest: DeviceQueue,
    device: DriverQueue,
    path: DataPath,
    maxChain: number,
    counters: Float64Array,
    inflight: InflightLog | undefined,
    iommu?: IommuChains,
    capture?: QueueCapture,
  ) {
    this.#capture = capture;
    this.#inflight = inflight;
    this.#iommu = iommu;
    this.#guest = guest;
    this.#device = device;
    this.#path = path;
    this.#counters = counters;
    this.#chain = new Chain(maxChain);
    this.#moved = new Chain(maxChain);
    this.#segments = new SegmentPool(device.num * 2);
    this.#guestId = new Int32Array(device.num).fill(-1);
    this.#first = new Int32Array(device.num).fill(-1);
    this.#bytes = new Float64Array(device.num);
    this.#order = new Float64Array(device.num);
  }

  /** Where writes to the guest's used ring are logged; -1: nowhere. A packed ring is logged by its own addresses. */
  setLogUsed(gpa: number, ring: RingPlace): void {
    this.#logged = loggedRanges(gpa, ring);
  }

  /** Offers what the guest has made available to the device. @returns chains moved */
  forward(): number {
    const guest = this.#guest;
    const device = this.#device;
    const chain = this.#chain;
    let moved = 0;
    this.kickWanted = false;
    this.full = false;
    const inflight = this.#inflight;
    for (;;) {
      const physical = this.#next(chain);
      if (physical === undefined) break;
      if (!this.#offer(physical, this.#iommu?.iovas)) {
        guest.unpop();
        this.full = true;
        this.#counters[COUNTER.full]!++;
        break;
      }
      if (inflight !== undefined) inflight.take(chain);
      moved++;
    }
    if (moved > 0) this.kickWanted = device.publish();
    return moved;
  }

  // The guest's next chain in guest memory; undefined: none, or an address that the IOMMU's table lacks (`miss` is set).
  #next(chain: Chain): Chain | undefined {
    const guest = this.#guest;
    const iommu = this.#iommu;
    if (iommu === undefined) return guest.pop(chain) ? chain : undefined;
    iommu.miss = undefined;
    if (!iommu.try(() => guest.pop(chain))) return undefined;
    if (iommu.try(() => (iommu.translate(chain), true))) return iommu.chain;
    guest.unpop();
    return undefined;
  }

  // The device sees it at the next publish.
  #offer(chain: Chain, iovas: Float64Array = chain.addresses): boolean {
    const id = this.#device.addChain(this.#path.translation === undefined ? chain : this.#translate(chain, this.#path.translation));
    if (id < 0) return false;
    this.#guestId[id] = chain.id;
    this.#first[id] = this.#segments.put(chain, iovas);
    this.#bytes[id] = chain.readableBytes + chain.writableBytes;
    this.#order[id] = this.#taken++;
    return true;
  }

  /**
   * Offers what a relay before this one had taken, in its order. The guest's ring counts it as taken already, and so does the
   * record outside. The device may have written part of it: it is marked dirty first.
   *
   * @param taken a ring that holds these chains, and nothing else
   * @returns per chain, how many descriptors it takes in the guest's ring
   */
  resume(taken: DeviceQueue): number[] {
    const slots: number[] = [];
    while (taken.pop(this.#chain)) {
      if (!this.#offer(this.#chain)) throw new SvqError("INFLIGHT_INVALID", "The device's ring has no room for what was in flight");
      slots.push(this.#chain.slots);
    }
    for (let id = 0; id < this.#first.length; id++) if (this.#first[id]! >= 0) this.#markWritable(id);
    this.logRing();
    return slots;
  }

  /** Makes what {@linkcode resume} has added available to the device. */
  publishResumed(): void {
    this.#device.publish();
  }

  // A segment that spans two regions may become several.
  #translate(chain: Chain, translation: Translation): Chain {
    const out = this.#moved;
    out.clear();
    out.id = chain.id;
    for (let i = 0; i < chain.count; i++) {
      const count = translation.splitToIova(chain.addresses[i]!, chain.lengths[i]!, out, out.count);
      if (count === NO_ROOM) {
        throw new SvqError("CHAIN_TOO_LONG", `Chain ${chain.id} has more than ${out.capacity} segments for the device`);
      }
      if (count < 0) throw new SvqError("OUTSIDE_MEMORY", `A segment of chain ${chain.id} has no place in the device's address space`);
      out.count += count;
      if (i < chain.readableCount) out.readableCount = out.count;
    }
    out.readableBytes = chain.readableBytes;
    out.writableBytes = chain.writableBytes;
    return out;
  }

  /** Gives back to the guest what the device has used: what it could have written is marked dirty first. @returns chains moved */
  returnUsed(): number {
    const guest = this.#guest;
    const device = this.#device;
    let moved = 0;
    this.callWanted = false;
    for (let id = device.take(); id >= 0; id = device.take()) {
      const guestId = this.#guestId[id]!;
      if (guestId < 0) throw new SvqError("INTERNAL", `Shadow chain ${id} has no guest chain`);
      this.#markWritable(id);
      if (this.#capture !== undefined) this.#show(id, device.usedLength, this.#capture);
      this.#segments.release(this.#first[id]!);
      this.#guestId[id] = -1;
      this.#first[id] = -1;
      guest.push(guestId, device.usedLength);
      this.#counters[COUNTER.bytes]! += this.#bytes[id]!;
      moved++;
    }
    if (moved > 0) {
      this.#returned += moved;
      this.#counters[COUNTER.chains]! += moved;
      this.callWanted = guest.flush();
      if (this.#inflight !== undefined) this.#inflight.flushed();
      // The used ring's own pages are marked after it was written: the reader clears a bit first and copies then.
      this.logRing();
    }
    return moved;
  }

  // What was sent, or what the device says that it has written. The guest gets it back only after this.
  #show(id: number, written: number, capture: QueueCapture): void {
    const { addresses, lengths, writable, next } = this.#segments;
    const { receives } = capture;
    capture.begin(receives ? written : this.#bytes[id]!);
    for (let slot = this.#first[id]!; slot >= 0; slot = next[slot]!) {
      if ((writable[slot] === 1) === receives) capture.segment(addresses[slot]!, lengths[slot]!);
    }
    capture.end();
  }

  // The whole writable part, from the private copy: the device may have written more than it says, and the ring may
  // have changed since.
  #markWritable(id: number): void {
    const dirty = this.#path.dirty;
    if (dirty === undefined) return;
    const { addresses, lengths, writable, next } = this.#segments;
    let pages = 0;
    for (let slot = this.#first[id]!; slot >= 0; slot = next[slot]!) {
      if (writable[slot] === 0) continue;
      const gpa = addresses[slot]!;
      const length = lengths[slot]!;
      if (!dirty.markRange(gpa, length)) {
        throw new SvqError("LOG_TOO_SMALL", `Guest memory 0x${gpa.toString(16)}+${length} was written and lies outside the dirty log`);
      }
      pages += Math.ceil((gpa % LOG_PAGE_BYTES + length) / LOG_PAGE_BYTES);
    }
    this.#counters[COUNTER.dirtyPages]! += pages;
  }

  /** Marks the guest's used ring dirty, where the VMM asked for it: after it was written. */
  logRing(): void {
    const dirty = this.#path.dirty;
    if (dirty === undefined) return;
    for (let i = 0; i < this.#logged.length; i += 2) dirty.markRange(this.#logged[i]!, this.#logged[i + 1]!);
  }

  /** How many chains at the device touch `[gpa, gpa + size)`. */
  uses(gpa: number, size: number): number {
    return this.#touching(this.#segments.addresses, gpa, size);
  }

  /** The same by the addresses that the guest's driver uses, where it has an IOMMU. */
  usesIova(iova: number, size: number): number {
    return this.#touching(this.#segments.iovas, iova, size);
  }

  #touching(addresses: Float64Array, start: number, size: number): number {
    const { lengths, next } = this.#segments;
    let count = 0;
    for (let id = 0; id < this.#first.length; id++) {
      for (let slot = this.#first[id]!; slot >= 0; slot = next[slot]!) {
        if (addresses[slot]! < start + size && addresses[slot]! + lengths[slot]! > start) {
          count++;
          break;
        }
      }
    }
    return count;
  }

  /** Used position of the guest's ring. */
  get guestUsed(): number {
    return this.#guest.layout === "split" ? (this.#guest.base - this.#guest.inflight) & 0xffff : this.#guest.base >>> 16;
  }

  /** Where both rings stand. */
  progress(): QueueProgress {
    return { deviceBase: this.#deviceBase(), inflight: this.#device.inflight, guestBase: this.#guest.base };
  }

  #deviceBase(): number {
    if (!(this.#device instanceof PackedDriver)) return this.#returned & 0xffff;
    const used = this.#device.usedPosition;
    return (used | used << 16) >>> 0;
  }

  /**
   * Ends the mode. The device must have left its ring, holding nothing that it took.
   *
   * @throws SvqError RING_GAP when chains are missing in the middle: then it did hold something
   */
  finish(): QueueProgress {
    const inflight = this.#device.inflight;
    for (let id = 0; id < this.#first.length; id++) if (this.#first[id]! >= 0) this.#markWritable(id);
    if (inflight > 0 && !this.#guest.rewind()) {
      throw new SvqError("RING_GAP", `The device gave its ring back with ${inflight} chains missing out of order`);
    }
    // A driver whose kicks were suppressed must not stay silent towards whoever comes next.
    this.#guest.enableKicks();
    this.logRing();
    this.#inflight?.end();
    return { deviceBase: this.#deviceBase(), inflight, guestBase: this.#guest.base };
  }

  /**
   * The device is gone and can write nothing any more. What it held is offered to its successor in `device`, a fresh ring,
   * in the order in which it was taken; it may have been written in part, so it is marked dirty.
   */
  renew(device: DriverQueue): void {
    const [guestId, first, order] = [this.#guestId, this.#first, this.#order];
    const held = Array.from(first.keys()).filter((id) => first[id]! >= 0).sort((a, b) => order[a]! - order[b]!);
    for (const id of held) this.#markWritable(id);
    this.#device = device;
    this.#returned = 0;
    this.#guestId = new Int32Array(device.num).fill(-1);
    this.#first = new Int32Array(device.num).fill(-1);
    this.#bytes = new Float64Array(device.num);
    this.#order = new Float64Array(device.num);
    for (const old of held) {
      const chain = this.#load(first[old]!);
      // In mode `used` a chain is known by its head.
      chain.id = guestId[old]!;
      const id = device.addChain(this.#path.translation === undefined ? chain : this.#translate(chain, this.#path.translation));
      if (id < 0) throw new SvqError("INTERNAL", `A fresh ring has no room for what the one before it held`);
      this.#guestId[id] = guestId[old]!;
      this.#first[id] = first[old]!;
      this.#bytes[id] = chain.readableBytes + chain.writableBytes;
      this.#order[id] = this.#taken++;
    }
    device.publish();
  }

  #load(first: number): Chain {
    const { addresses, lengths, writable, next } = this.#segments;
    const chain = this.#chain;
    chain.clear();
    for (let slot = first; slot >= 0; slot = next[slot]!) {
      if (writable[slot] === 0) chain.addReadable(addresses[slot]!, lengths[slot]!);
      else chain.addWritable(addresses[slot]!, lengths[slot]!);
    }
    return chain;
  }

  /** Ends the mode after a broken rule: nothing is rewound. @param keep the record outside stays as it is */
  abandon(keep: boolean): QueueProgress {
    for (let id = 0; id < this.#first.length; id++) if (this.#first[id]! >= 0) this.#markWritable(id);
    if (!keep) this.#inflight?.end();
    return this.progress();
  }
}
