/**
 * The JavaScript core's loop from the device's ring back to the guest's. Plain loads and stores do for the reasons of
 * fast_forward.ts: used elements are read behind an atomic load of the device's index, and written before an atomic store of the
 * guest's.
 *
 * @module
 */
import type { DirtyBitmap } from "../dirty/bitmap.ts";
import { SvqError } from "../errors.ts";
import { VringError } from "../vring/rules.ts";
import { COUNTER } from "./counters.ts";
import { type FastQueue, LINK_INDEX, LINK_MORE, RECORD_FIRST, RECORD_SLOTS } from "./fast_state.ts";

/** Gives back what the device has used; the guest does not see it before the flush. @returns chains. @throws VringError, SvqError LOG_TOO_SMALL */
export function returnLoop(q: FastQueue, dirty: DirtyBitmap | undefined, counters: Float64Array): number {
  const { records, segments, taken, deviceUsed: ring, guestUsed: out, inflight, poolBase, heads } = q;
  const num = q.deviceNum;
  const mask = num - 1;
  const guestMask = q.num - 1;
  let position = q.deviceUsedNext;
  let seen = q.deviceUsedSeen;
  let next = q.guestUsedNext;
  let moved = 0;
  let bytes = 0;
  let pages = 0;
  // What was done before a rule was broken counts.
  try {
    for (;;) {
      if (position === seen) {
        q.deviceUsedNext = position;
        if (!q.lookUsed()) break;
        seen = q.deviceUsedSeen;
      }
      const element = 1 + ((position & mask) << 1);
      const id = ring[element]!;
      const length = ring[element + 1]!;
      if (id < 0 || id >= num) usedIdOutOfRange(position, id, num);
      const record = id << 2;
      const head = records[record]!;
      if (head < 0) usedNotInFlight(position, id);
      const first = records[record + RECORD_FIRST]!;
      let index = first;
      let count = 1;
      // In 32 bits; below 0 for a chain of 2^31 bytes or more.
      let all = 0;
      let writable = 0;
      let large = 0;
      let at = index << 2;
      for (;;) {
        const link = segments[at + 3]!;
        const size = segments[at + 2]!;
        all = (all + size) | 0;
        large |= all | size;
        if (link < 0) {
          writable = (writable + size) | 0;
          if (dirty !== undefined) {
            // From the private copy, all of it: the device may have written more than it says, and the ring may have changed since.
            const low = segments[at]!;
            const high = segments[at + 1]!;
            const page = high << 20 | low >>> 12;
            const last = (page + (((low & 4095) + size - 1) >>> 12)) | 0;
            if (large >= 0 && high >>> 11 === 0 && dirty.markWithinWord(page, last)) pages += last - page + 1;
            else pages += markSegment(q, index, dirty);
          }
        }
        if ((link & LINK_MORE) === 0) break;
        index = link & LINK_INDEX;
        at = index << 2;
        count++;
      }
      bytes += all;
      let written = length >= 0 && length < writable ? length : writable;
      if (large < 0) {
        bytes += sizeOf(q, first, false) - all;
        written = Math.min(length >>> 0, sizeOf(q, first, true)) | 0;
      }
      // `index` and `at` are those of the last segment.
      if (first < poolBase) {
        segments[at + 3] = q.freeHead;
        q.freeHead = id;
        q.numFree += count;
      } else {
        segments[at + 3] = q.poolHead;
        q.poolHead = first;
        q.poolFree += count;
        if (!heads) freeDescriptors(q, id, records[record + RECORD_SLOTS]!);
      }
      records[record] = -1;
      position = (position + 1) & 0xffff;
      if (inflight !== undefined) inflight.give(head);
      taken[head] = 0;
      const to = 1 + ((next & guestMask) << 1);
      out[to] = head;
      out[to + 1] = written;
      next = (next + 1) & 0xffff;
      moved++;
    }
  } finally {
    q.deviceUsedNext = position;
    q.guestUsedNext = next;
    counters[COUNTER.bytes]! += bytes;
    counters[COUNTER.dirtyPages]! += pages;
  }
  return moved;
}

// Bytes of a chain, of all its segments or of the writable ones.
function sizeOf(q: FastQueue, first: number, writable: boolean): number {
  let sum = 0;
  for (let index = first;;) {
    const link = q.segments[(index << 2) + 3]!;
    if (!writable || link < 0) sum += q.lengthOf(index);
    if ((link & LINK_MORE) === 0) return sum;
    index = link & LINK_INDEX;
  }
}

/** Marks what the device may write of the chain whose first segment this is. @returns pages. @throws SvqError LOG_TOO_SMALL */
export function markChain(q: FastQueue, first: number, dirty: DirtyBitmap): number {
  let pages = 0;
  for (let index = first;;) {
    const link = q.segments[(index << 2) + 3]!;
    if (link < 0) pages += markSegment(q, index, dirty);
    if ((link & LINK_MORE) === 0) return pages;
    index = link & LINK_INDEX;
  }
}

function markSegment(q: FastQueue, index: number, dirty: DirtyBitmap): number {
  const gpa = q.addressOf(index);
  const length = q.lengthOf(index);
  if (!dirty.markRange(gpa, length)) {
    throw new SvqError("LOG_TOO_SMALL", `Guest memory 0x${gpa.toString(16)}+${length} was written and lies outside the dirty log`);
  }
  return Math.ceil((gpa % 4096 + length) / 4096);
}

// A chain whose segments are in the pool: its descriptors are linked by segments that hold nothing else.
function freeDescriptors(q: FastQueue, id: number, slots: number): void {
  const { segments } = q;
  let last = id;
  for (let i = 1; i < slots; i++) last = segments[(last << 2) + 3]! & LINK_INDEX;
  segments[(last << 2) + 3] = q.freeHead;
  q.freeHead = id;
  q.numFree += slots;
}

function usedIdOutOfRange(position: number, id: number, num: number): never {
  throw new VringError("USED_ID_OUT_OF_RANGE", position, `Used entry ${position} holds ${id >>> 0} in a queue of ${num}`);
}

function usedNotInFlight(position: number, id: number): never {
  throw new VringError("USED_NOT_IN_FLIGHT", id, `Used entry ${position} holds ${id}, which the device does not have`);
}
