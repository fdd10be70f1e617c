/**
 * The in-flight region of a relay's front-end: memory that the VMM keeps when the relay dies. A relay that takes over finds in
 * it which requests its predecessor had in hand.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { createMemfd, dupFd, getSeals, mapFd, type Mapping, type OwnedFd, SEAL } from "../ffi/mod.ts";
import type { InflightPlace } from "../vhost/backend.ts";
import { inflightPartSize } from "../vring/inflight.ts";

const NUM_MAX = 32768;
/** QEMU asks for its property queue-size (128) and lets the guest's driver make rings of up to this many descriptors. */
const NUM_USUAL = 1024;
/** Regions that are kept mapped because a queue that failed may still use them. */
const RETIRED_MAX = 16;

/** One queue's part, in this process. */
export interface InflightPart {
  /** Bytes of this process. */
  address: number;
  /** Bytes. */
  size: number;
  /** Memory of the part. */
  buffer: ArrayBuffer;
}

/** The region that the front-end has given, and those before it that may be in use still. */
export class InflightRegion implements Disposable {
  readonly #maxQueues: number;
  readonly #retired: Mapping[] = [];
  readonly #unread = new Set<number>();
  #mapping: Mapping | undefined;
  #place: Omit<InflightPlace, "fd"> | undefined;
  #file: OwnedFd | undefined;

  /** Without a region. @param maxQueues of the device */
  constructor(maxQueues: number) {
    this.#maxQueues = maxQueues;
  }

  /** Has the front-end given a region? */
  get given(): boolean {
    return this.#mapping !== undefined;
  }

  /** The region, for a relay in another process; the descriptor is borrowed. */
  get place(): InflightPlace | undefined {
    return this.#file === undefined ? undefined : { fd: this.#file.fd, ...this.#place! };
  }

  /**
   * Makes a region for `queues` queues of `num` descriptors: zeroed, sealed, large enough for both ring formats, and for rings
   * larger than `num` as drivers make them. The front-end keeps it, and gives it back with {@linkcode InflightRegion.set}.
   *
   * @throws SvqError INFLIGHT_INVALID
   */
  create(queues: number, num: number): { file: OwnedFd; place: InflightPlace } {
    this.#check(queues, num);
    const size = queues * inflightPartSize(Math.max(num, NUM_USUAL), true);
    const file = createMemfd("svq-inflight", size);
    return { file, place: { fd: file.fd, offset: 0, size, queues, num } };
  }

  #check(queues: number, num: number): void {
    if (!(queues >= 1 && queues <= this.#maxQueues && num >= 1 && num <= NUM_MAX)) {
      throw new SvqError("INFLIGHT_INVALID", `No in-flight region is made for ${queues} queues of ${num} descriptors`);
    }
  }

  /**
   * Takes a region into use: from now on, and for what it says of the time before.
   *
   * @param idle does no queue use the one before?
   * @throws SvqError INFLIGHT_INVALID, and of mapping it
   */
  set(place: InflightPlace, idle: boolean): void {
    this.#check(place.queues, place.num);
    if (place.offset % 4096 !== 0 || place.size < place.queues * inflightPartSize(place.num, false)) {
      throw new SvqError("INFLIGHT_INVALID", `An in-flight region of ${place.size} bytes at offset ${place.offset} cannot be used`);
    }
    if ((getSeals(place.fd) & SEAL.SHRINK) === 0) {
      throw new SvqError("INFLIGHT_INVALID", "An in-flight region that its owner could shorten (F_SEAL_SHRINK is missing) is not used");
    }
    if (!idle && this.#retired.length >= RETIRED_MAX) {
      throw new SvqError(
        "INFLIGHT_INVALID",
        "The front-end changes the in-flight region again and again under rings that have not stopped",
      );
    }
    const mapping = mapFd(place.fd, { offset: place.offset, length: place.size, what: "in-flight region" });
    if (this.#mapping !== undefined) this.#retired.push(this.#mapping);
    if (idle) this.#release();
    this.#mapping = mapping;
    this.#file?.close();
    this.#file = dupFd(place.fd);
    const { offset, size, queues, num } = place;
    this.#place = { offset, size, queues, num };
    this.#unread.clear();
    for (let index = 0; index < queues; index++) this.#unread.add(index);
  }

  /** The part of queue `index`, if the region has one for a ring of that size and format. */
  part(index: number, num: number, packed: boolean): InflightPart | undefined {
    if (this.#mapping === undefined || index >= this.#place!.queues) return undefined;
    // As far apart as the region is long: of whichever format and size its maker thought.
    const stride = Math.floor(this.#place!.size / this.#place!.queues / 64) * 64;
    const size = inflightPartSize(num, packed);
    if (size > stride) return undefined;
    return { address: this.#mapping.address + index * stride, size, buffer: this.#mapping.buffer(index * stride, size) };
  }

  /** True at the first call for a queue since the region was given: then its contents are those of the time before. */
  firstLook(index: number): boolean {
    return this.#unread.delete(index);
  }

  /** What was found was not made use of: the next call of {@linkcode InflightRegion.firstLook} is a first one again. */
  lookAgain(index: number): void {
    if (this.#mapping !== undefined) this.#unread.add(index);
  }

  #release(): void {
    for (const mapping of this.#retired.splice(0)) mapping.close();
  }

  /** Unmaps everything; Workers must have been stopped. */
  close(): void {
    this.#release();
    this.#mapping?.close();
    this.#file?.close();
    this.#mapping = this.#place = this.#file = undefined;
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}
