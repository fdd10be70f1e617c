/**
 * Is a record of what is in flight one of the ring that a driver has now? A VMM may reset its device while nobody relays it, and give
 * the same region to the next relay: what the record says was in flight is then nobody's any more, and doing it again would answer
 * requests that were not made.
 *
 * A new life begins with a zeroed ring, and while nobody relays it nothing in it is used.
 *
 * @module
 */
import { type InflightChains, inflightPartSize } from "./inflight.ts";
import { type RingPart, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, words16 } from "./layout.ts";

const LAST_BATCH = 6;
const USED_IDX = 7;
const AVAIL = 1 << 7;
const USED = 1 << 15;
const START = 1 << 15;
const KEPT = VRING_DESC_F_NEXT | VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT;

/** A split ring in memory, as 16-bit and 32-bit words from the first byte of each part. */
export interface SplitRingWords {
  /** Avail ring: flags, idx, entries. */
  avail: Uint16Array;
  /** Used ring: word 0 is flags and idx, then id and length of each entry. */
  used: Uint32Array;
}

/**
 * Is what the record names in flight in this ring?
 *
 * @param chains what `recoverSplit` would make of the record
 */
export function isOfSplitRing(part: RingPart, num: number, chains: InflightChains, { avail, used }: SplitRingWords): boolean {
  if (chains.ids.length === 0) return true;
  const halves = words16("in-flight region", part, inflightPartSize(num, false), 4);
  const returned = chains.used;
  const recorded = halves[USED_IDX]!;
  const batch = (returned - recorded) & 0xffff;
  if (batch > num) return false;
  // A ring that begins anew near the record's index: what was given back last is on record as a list, and nothing of it is in the ring.
  if (returned === 0 && batch > 0 && used.subarray(1, 1 + 2 * num).every((word) => word === 0)) {
    for (let back = 0, head = halves[LAST_BATCH]!; back < batch; back++) {
      if (head !== 0) return false;
      head = halves[(16 + 16 * head + 6) >> 1]!;
    }
  }
  // What is in flight was offered.
  const offered = Atomics.load(avail, 1);
  if (((offered - chains.base) & 0xffff) > num) return false;
  if (returned !== 0) return true;
  // Nothing has ever come back: what is in flight are the first entries, in order.
  return !isFirst(part, num, chains.ids) || chains.ids.every((id, at) => avail[2 + at] === id);
}

// Were these the first chains that were ever recorded?
function isFirst(part: RingPart, num: number, ids: readonly number[]): boolean {
  const words = new Uint32Array(part.buffer, part.byteOffset ?? 0, inflightPartSize(num, false) / 4);
  return ids.every((id, at) => words[(16 + 16 * id + 8) >> 2] === at && words[(16 + 16 * id + 12) >> 2] === 0);
}

/**
 * Is a packed ring one in which nothing was ever used? Descriptors of the first lap in front, and zeroes behind them.
 *
 * @param desc the descriptor ring, 16-bit words
 */
export function isUnusedPackedRing(desc: Uint16Array, num: number): boolean {
  let slot = 0;
  while (slot < num && (desc[8 * slot + 7]! & (AVAIL | USED)) === AVAIL) slot++;
  // Full of such descriptors is any lap, now and then.
  return slot < num && desc.subarray(8 * slot, 8 * num).every((word) => word === 0);
}

/**
 * Is what the record names in flight in this ring?
 *
 * @param chains what `recoverPacked` would make of the record
 * @param desc the descriptor ring, 16-bit words
 */
export function isOfPackedRing(num: number, chains: InflightChains, desc: Uint16Array): boolean {
  if (chains.ids.length === 0 && chains.used === START) return true;
  if (!isUnusedPackedRing(desc, num)) return true;
  if (chains.used !== START) return false;
  // Not the lengths: a relay that was killed may have written some of used elements that it never made visible.
  return chains.descriptors.every(([address, , flags], slot) => {
    const at = 8 * slot;
    const low = desc[at]! + desc[at + 1]! * 0x1_0000;
    const high = desc[at + 2]! + desc[at + 3]! * 0x1_0000;
    return low + high * 0x1_0000_0000 === address &&
      sameKind(desc[at + 7]!, flags);
  });
}

function sameKind(a: number, b: number): boolean {
  const kept = (a & VRING_DESC_F_INDIRECT) !== 0 ? VRING_DESC_F_INDIRECT : KEPT;
  return (a & kept) === (b & kept);
}
