/**
 * Sizes, offsets and bit values of both ring formats (virtio 1.3, 2.7 and 2.8), and checked views over their parts.
 *
 * @module
 */
import { VringError } from "./rules.ts";

/** Highest queue size of either format. */
export const VRING_NUM_MAX = 32768;
/** Bytes of one descriptor, split or packed, in a ring or in an indirect table. */
export const DESC_BYTES = 16;

/** Descriptor flag: the chain goes on. */
export const VRING_DESC_F_NEXT = 1;
/** Descriptor flag: the device writes this buffer (otherwise it reads it). */
export const VRING_DESC_F_WRITE = 2;
/** Descriptor flag: the buffer is a table of descriptors. */
export const VRING_DESC_F_INDIRECT = 4;
/** Packed descriptor flag, compared with the wrap counter (bit 7). */
export const VRING_PACKED_DESC_F_AVAIL = 1 << 7;
/** Packed descriptor flag, compared with the wrap counter (bit 15). */
export const VRING_PACKED_DESC_F_USED = 1 << 15;
/** Flag of a split avail ring: the driver does not need calls. */
export const VRING_AVAIL_F_NO_INTERRUPT = 1;
/** Flag of a split used ring: the device does not need kicks. */
export const VRING_USED_F_NO_NOTIFY = 1;
/** Packed event flags: notify always. */
export const VRING_PACKED_EVENT_FLAG_ENABLE = 0;
/** Packed event flags: notify never. */
export const VRING_PACKED_EVENT_FLAG_DISABLE = 1;
/** Packed event flags: notify when the descriptor at the event offset is passed. */
export const VRING_PACKED_EVENT_FLAG_DESC = 2;

/** Where a part of a ring lies: `byteOffset` is aligned as the part wants. */
export interface RingPart {
  /** Memory that holds the part. */
  readonly buffer: ArrayBuffer | SharedArrayBuffer;
  /** Where the part starts in `buffer`, bytes; default 0. */
  readonly byteOffset?: number;
}

/** Bytes, alignment and offset of one part, when the parts are laid out one after the other. */
export interface PartLayout {
  /** Bytes from the start of the ring. */
  readonly offset: number;
  /** Bytes. */
  readonly size: number;
  /** Bytes, a power of two. */
  readonly align: number;
}

/** The three parts of a ring, in the order in which vhost calls them. */
export interface RingLayout {
  /** Descriptor table or ring. */
  readonly desc: PartLayout;
  /** Avail ring; packed: driver event structure. */
  readonly avail: PartLayout;
  /** Used ring; packed: device event structure. */
  readonly used: PartLayout;
  /** Bytes of all parts with the padding between them. */
  readonly total: number;
}

/** Rounds `value` up to a multiple of `align`, a power of two. */
export function alignUp(value: number, align: number): number {
  return Math.ceil(value / align) * align;
}

/** Checks a queue size. @throws VringError RING_SIZE unless `num` is a legal size of a split ring: a power of two up to 32768 */
export function checkSplitNum(num: number): void {
  if (!(Number.isInteger(num) && num >= 1 && num <= VRING_NUM_MAX && (num & (num - 1)) === 0)) {
    throw new VringError("RING_SIZE", -1, `A split ring cannot have ${num} descriptors`);
  }
}

/** Checks a queue size. @throws VringError RING_SIZE unless `num` is a legal size of a packed ring: 1 to 32768 */
export function checkPackedNum(num: number): void {
  if (!(Number.isInteger(num) && num >= 1 && num <= VRING_NUM_MAX)) {
    throw new VringError("RING_SIZE", -1, `A packed ring cannot have ${num} descriptors`);
  }
}

function layout(desc: number, avail: [number, number], used: [number, number]): RingLayout {
  const availOffset = alignUp(desc, avail[1]);
  const usedOffset = alignUp(availOffset + avail[0], used[1]);
  return {
    desc: { offset: 0, size: desc, align: DESC_BYTES },
    avail: { offset: availOffset, size: avail[0], align: avail[1] },
    used: { offset: usedOffset, size: used[0], align: used[1] },
    total: usedOffset + used[0],
  };
}

/** Layout of a split ring of `num` descriptors, event words included. @throws VringError RING_SIZE */
export function splitLayout(num: number): RingLayout {
  checkSplitNum(num);
  return layout(DESC_BYTES * num, [6 + 2 * num, 2], [6 + 8 * num, 4]);
}

/** Layout of a packed ring of `num` descriptors. @throws VringError RING_SIZE */
export function packedLayout(num: number): RingLayout {
  checkPackedNum(num);
  return layout(DESC_BYTES * num, [4, 4], [4, 4]);
}

/** Checks that a part is aligned and long enough; returns its byte offset. @throws VringError RING_ALIGNMENT */
export function checkPart(name: string, part: RingPart, size: number, align: number): number {
  const offset = part.byteOffset ?? 0;
  if (!(Number.isInteger(offset) && offset >= 0 && offset % align === 0)) {
    throw new VringError("RING_ALIGNMENT", -1, `The ${name} starts at byte ${offset}, which is no multiple of ${align}`);
  }
  if (offset + size > part.buffer.byteLength) {
    const have = Math.max(0, part.buffer.byteLength - offset);
    throw new VringError("RING_ALIGNMENT", -1, `The ${name} needs ${size} bytes and has ${have}`);
  }
  return offset;
}

/** A view of 16-bit words over a part. @throws VringError RING_ALIGNMENT */
export function words16(name: string, part: RingPart, size: number, align: number): Uint16Array {
  return new Uint16Array(part.buffer, checkPart(name, part, size, align), size >> 1);
}

/** A view of 32-bit words over a part. @throws VringError RING_ALIGNMENT */
export function words32(name: string, part: RingPart, size: number, align: number): Uint32Array {
  return new Uint32Array(part.buffer, checkPart(name, part, size, align), size >> 2);
}

/**
 * The event index test of both formats, all modulo 2^16: was the event passed on the way from `old` (the index at the last
 * decision) to `now`? Source: virtio 1.3, 2.7.7 and 2.7.10.
 */
export function eventPassed(event: number, now: number, old: number): boolean {
  return ((now - event - 1) & 0xffff) < ((now - old) & 0xffff);
}
