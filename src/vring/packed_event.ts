/**
 * Positions in a packed ring and its event suppression structures (virtio 1.3, 2.8.1 and 2.8.10).
 *
 * @module
 */
import { checkPackedNum, VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE } from "./layout.ts";
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
 * Checks a vring base for a packed ring, and completes one of a peer that sends only the avail half (DPDK sends 0 in the upper
 * half): nothing is in flight then, and the used position is the avail position.
 *
 * A half base cannot always be told from a whole one; where the peer is known to drain before it answers, give `half`.
 *
 * @param base 32 bits
 * @param num queue size
 * @param half take the lower half for both whatever the upper half holds
 * @throws VringError BASE_INVALID
 */
export function completePackedBase(base: number, num: number, half = false): number {
  checkPackedNum(num);
  const avail = base & 0xffff;
  const used = base >>> 16;
  if ((avail & 0x7fff) < num) {
    if (half) return packedBase(avail, avail);
    if ((used & 0x7fff) < num && packedDistance(used, avail, num) >= 0) return base >>> 0;
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
