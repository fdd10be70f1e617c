/**
 * Positions in a packed ring and its event suppression structures (virtio 1.3, 2.8.1 and 2.8.10).
 *
 * @module
 */
import {
  checkPackedNum,
  VRING_DESC_F_NEXT,
  VRING_PACKED_DESC_F_AVAIL,
  VRING_PACKED_DESC_F_USED,
  VRING_PACKED_EVENT_FLAG_DESC,
  VRING_PACKED_EVENT_FLAG_DISABLE,
} from "./layout.ts";
import { VringError } from "./rules.ts";

/** Both positions of a packed ring at its beginning: slot 0, both wrap counters 1. */
export const PACKED_BASE_START = 0x8000_8000;

/** A packed position as the protocols carry it: `slot | wrap << 15`. */
export function packedPosition(slot: number, wrap: number): number {
  return slot | wrap << 15;
}

/** The vring base of a packed ring, 32 bits, of two positions (`slot | wrap << 15`): avail low, used high. */
export function packedBase(avail: number, used: number): number {
  return (avail | used << 16) >>> 0;
}

/** A packed position as a count of slots modulo twice the queue size. */
export function packedLinear(position: number, num: number): number {
  return (position & 0x7fff) + ((position & 0x8000) !== 0 ? 0 : num);
}

/** Slots from `from` to `to`, both `slot | wrap << 15`; -1 when they are further apart than the queue is long. */
export function packedDistance(from: number, to: number, num: number): number {
  const distance = (packedLinear(to, num) - packedLinear(from, num) + 2 * num) % (2 * num);
  return distance > num ? -1 : distance;
}

/**
 * Can the used position of a packed ring be slot 0 with wrap counter 0, and the first `slots` slots be in flight? Then all of them look
 * offered in that lap, and no chain goes on from the end of the ring into slot 0.
 *
 * @param ring its descriptors, eight half words each
 */
function inFlightFromStart(ring: Uint16Array, num: number, slots: number): boolean {
  const flagsOf = (slot: number) => Atomics.load(ring, (slot << 3) + 7);
  for (let slot = 0; slot < slots; slot++) {
    if ((flagsOf(slot) & (VRING_PACKED_DESC_F_AVAIL | VRING_PACKED_DESC_F_USED)) !== VRING_PACKED_DESC_F_USED) return false;
  }
  // Used descriptors of the lap before keep nothing of their chain.
  const last = flagsOf(num - 1);
  const offeredBefore = (last & (VRING_PACKED_DESC_F_AVAIL | VRING_PACKED_DESC_F_USED)) === VRING_PACKED_DESC_F_AVAIL;
  return slots === num || slots === 0 || !(offeredBefore && (last & VRING_DESC_F_NEXT) !== 0);
}

/**
 * Checks a vring base for a packed ring, and completes one of a peer that sends only the avail half (DPDK, on either side, has 0
 * in the upper half): nothing is in flight then, and the used position is the avail position.
 *
 * An upper half of 0 may also mean what it says: the used position is slot 0 with wrap counter 0, and everything from there to the
 * avail position is in flight. Then all of it must look in flight in the ring, which is the way to tell.
 *
 * @param base 32 bits
 * @param num queue size
 * @param ring the ring's descriptors, eight half words each; without it a base that can be a whole one is taken for one
 * @throws VringError BASE_INVALID
 */
export function completePackedBase(base: number, num: number, ring?: Uint16Array): number {
  checkPackedNum(num);
  const avail = base & 0xffff;
  const used = base >>> 16;
  if ((avail & 0x7fff) < num) {
    const open = (used & 0x7fff) < num ? packedDistance(used, avail, num) : -1;
    const whole = open >= 0 && (used !== 0 || ring === undefined || inFlightFromStart(ring, num, open));
    if (whole) return base >>> 0;
    if (used === 0) return packedBase(avail, avail);
  }
  throw new VringError("BASE_INVALID", -1, `0x${(base >>> 0).toString(16)} is no position in a packed ring of ${num}`);
}

/**
 * Does the other side want to be notified?
 *
 * @param word its event structure: offset and wrap in the lower half, flags in the upper one
 * @param eventIdx EVENT_IDX was negotiated
 * @param num queue size
 * @param slot the next slot after what was published
 * @param wrap the wrap counter there
 * @param passed slots published since the last decision
 */
export function packedEventWanted(word: number, eventIdx: boolean, num: number, slot: number, wrap: number, passed: number): boolean {
  const flags = (word >>> 16) & 3;
  if (flags === VRING_PACKED_EVENT_FLAG_DISABLE) return false;
  // The reserved value, and a request by descriptor that was not negotiated, are answered with a notification: it does no harm.
  if (flags !== VRING_PACKED_EVENT_FLAG_DESC || !eventIdx) return true;
  let event = word & 0x7fff;
  if (((word >>> 15) & 1) !== wrap) event -= num;
  return ((slot - event - 1) & 0xffff) < passed;
}
