/**
 * The JavaScript core's loops from the guest's ring to the device's.
 *
 * Why plain loads and stores do here. Between `guestNext` and `guestSeen` lies what the driver had written before it stored the
 * avail index that was read by an atomic load (`lookAvail`): that load is an acquire on every machine (a plain load on x86, where
 * loads stay in order; LDAR on arm64), and V8 moves no access of memory across it. A driver that writes there afterwards breaks the
 * rules, and gets what a race gives: every word is read once, checked in private variables, and stored from these. Descriptors
 * and avail entries go out by plain stores to places that the device does not look at before the index is published by an atomic
 * store (`publish`; XCHG on x86, STLR on arm64), which no earlier store passes.
 *
 * @module
 */
import { type FastQueue, LINK_FLAGS, LINK_INDEX } from "./fast_state.ts";

const NEXT = 1, WRITE = 2, INDIRECT = 4;

/**
 * Mode `shadow` without translation: takes chains up to `guestSeen`, and stops in front of one that is not simple (indirect or
 * for a table, no room, above 2^43, longer than 2^31, or against a rule): nothing of that one is taken, and it goes the long way.
 *
 * @param single chains of several descriptors are for a table of the device's
 * @returns chains moved
 */
export function shadowLoop(q: FastQueue, single: boolean): number {
  const { num, guestDesc: desc, guestAvail: avail, deviceDesc: out, deviceAvail: ring, segments, records, taken, inflight } = q;
  const mask = num - 1;
  const deviceMask = q.deviceNum - 1;
  const start = q.guestNext;
  const seen = q.guestSeen;
  let position = start;
  let next = q.deviceNext;
  let freeHead = q.freeHead;
  let left = q.numFree;
  let order = q.order;
  let firstPage = q.firstPage;
  let endPage = q.endPage;
  while (position !== seen) {
    const head = avail[2 + (position & mask)]!;
    if (head >= num || taken[head] !== 0) break;
    let index = head;
    let to = freeHead;
    let room = left;
    let writing = 0;
    let bytes = 0;
    let whole = false;
    while (room > 0) {
      const from = index << 2;
      const low = desc[from]!;
      const high = desc[from + 1]!;
      const length = desc[from + 2]!;
      const last = desc[from + 3]!;
      const flags = last & 7;
      // Nothing readable behind something writable, no tables, no empty descriptor.
      if (length <= 0 || flags >= INDIRECT || (flags & WRITE) < writing || high >>> 11 !== 0) break;
      bytes = (bytes + length) | 0;
      if (bytes < 0) break;
      const page = high << 20 | low >>> 12;
      if (page < firstPage || page + (((low & 4095) + length - 1) >>> 12) >= endPage) {
        if (!q.locate(low, high, length)) break;
        firstPage = q.firstPage;
        endPage = q.endPage;
      }
      writing = flags & WRITE;
      room--;
      const at = to << 2;
      const following = segments[at + 3]! & LINK_INDEX;
      segments[at] = low;
      segments[at + 1] = high;
      segments[at + 2] = length;
      segments[at + 3] = following | flags << LINK_FLAGS;
      out[at] = low;
      out[at + 1] = high;
      out[at + 2] = length;
      to = following;
      if ((flags & NEXT) === 0) {
        out[at + 3] = flags;
        whole = true;
        break;
      }
      if (single) break;
      out[at + 3] = flags | following << 16;
      index = last >>> 16;
      if (index >= num) break;
    }
    if (!whole) break;
    const record = freeHead << 2;
    records[record] = head;
    records[record + 1] = freeHead;
    records[record + 2] = order;
    order = (order + 1) | 0;
    ring[2 + (next & deviceMask)] = freeHead;
    next++;
    // Before the device can see the chain.
    if (inflight !== undefined) inflight.takeHead(head);
    taken[head] = 1;
    freeHead = to;
    left = room;
    position = (position + 1) & 0xffff;
  }
  const moved = (position - start) & 0xffff;
  q.guestNext = position;
  q.deviceNext = next & 0xffff;
  q.freeHead = freeHead;
  q.numFree = left;
  q.order = order;
  q.open += moved;
  return moved;
}

/** The same for mode `used`: the device reads the guest's descriptors, and the private copies go into the pool. */
export function headsLoop(q: FastQueue): number {
  const { num, guestDesc: desc, guestAvail: avail, deviceAvail: ring, segments, records, taken, inflight } = q;
  const mask = num - 1;
  const start = q.guestNext;
  const seen = q.guestSeen;
  let position = start;
  let next = q.deviceNext;
  let poolHead = q.poolHead;
  let left = q.poolFree;
  let order = q.order;
  let firstPage = q.firstPage;
  let endPage = q.endPage;
  let heads = num - q.inflightCount;
  while (position !== seen && heads > 0) {
    const head = avail[2 + (position & mask)]!;
    if (head >= num || taken[head] !== 0) break;
    let index = head;
    let to = poolHead;
    let room = left;
    let steps = num;
    let writing = 0;
    let bytes = 0;
    let whole = false;
    while (room > 0 && steps > 0) {
      const from = index << 2;
      const low = desc[from]!;
      const high = desc[from + 1]!;
      const length = desc[from + 2]!;
      const last = desc[from + 3]!;
      const flags = last & 7;
      if (length <= 0 || flags >= INDIRECT || (flags & WRITE) < writing || high >>> 11 !== 0) break;
      bytes = (bytes + length) | 0;
      if (bytes < 0) break;
      const page = high << 20 | low >>> 12;
      if (page < firstPage || page + (((low & 4095) + length - 1) >>> 12) >= endPage) {
        if (!q.locate(low, high, length)) break;
        firstPage = q.firstPage;
        endPage = q.endPage;
      }
      writing = flags & WRITE;
      room--;
      steps--;
      const at = to << 2;
      const following = segments[at + 3]! & LINK_INDEX;
      segments[at] = low;
      segments[at + 1] = high;
      segments[at + 2] = length;
      segments[at + 3] = following | flags << LINK_FLAGS;
      to = following;
      if ((flags & NEXT) === 0) {
        whole = true;
        break;
      }
      index = last >>> 16;
      if (index >= num) break;
    }
    if (!whole) break;
    const record = head << 2;
    records[record] = head;
    records[record + 1] = poolHead;
    records[record + 2] = order;
    order = (order + 1) | 0;
    ring[2 + (next & mask)] = head;
    next++;
    if (inflight !== undefined) inflight.takeHead(head);
    taken[head] = 1;
    poolHead = to;
    left = room;
    heads--;
    position = (position + 1) & 0xffff;
  }
  const moved = (position - start) & 0xffff;
  q.guestNext = position;
  q.deviceNext = next & 0xffff;
  q.poolHead = poolHead;
  q.poolFree = left;
  q.order = order;
  q.open += moved;
  return moved;
}
