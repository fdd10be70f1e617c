/** The loops of split rings where nothing is translated: mode shadow, and mode used, where the device reads the guest's descriptors. */
import * as S from "./state";
import { Env, Queue } from "./state";
import { takeSplit } from "./inflight";

const LENGTH: u64 = 0xffffffff;
const LENGTH_AND_FLAGS: u64 = 0x3ffffffff;

// @ts-ignore: decorator
@inline
function least(a: u32, b: u32): u32 {
  return a < b ? a : b;
}

/*
 * What is touched often is in locals, and there are few of them: what does not fit into registers costs as much as memory. So the rings are
 * walked in runs that end where one of them wraps, by an address and a distance, and there is no call and no loop inside. It stops in front of a chain that it does not take
 * (indirect, no room, or a broken rule): that goes the long way.
 */
// @ts-ignore: decorator
@inline
function offer(q: Queue, e: Env, heads: bool, recorded: bool): u32 {
  const num = q.guestNum;
  const deviceNum = heads ? num : q.deviceNum;
  const desc = q.guestDesc;
  const out = heads ? 0 : q.deviceDesc;
  const slots = q.slots;
  const taken = q.taken;
  const single = heads ? false : q.tables != 0;
  let left = (q.guestSeen - q.guestNext) & 0xffff;
  if (heads) left = least(left, q.deviceNum - q.inflight);
  let to = heads ? q.poolHead : q.freeHead;
  let room = <i32>(heads ? q.poolFree : q.numFree);
  let order = q.order;
  let first = e.lastFirst;
  let size = e.lastEnd - first;
  let moved: u32 = 0;
  for (;;) {
    const place = (q.guestNext + moved) & (num - 1);
    const outPlace = (q.deviceNext + moved) & (deviceNum - 1);
    const run = least(left - moved, least(num - place, deviceNum - outPlace));
    if (run == 0) break;
    const start = q.guestAvail + 4 + (place << 1);
    const end = start + (run << 1);
    const distance = q.deviceAvail + 4 + (outPlace << 1) - start;
    let at = start;
    do {
      const head = <u32>load<u16>(at);
      if (head >= num) break;
      const mine = taken + (head << 1);
      if (load<u16>(mine) != 0) break;
      const before = room;
      const begin = to;
      // A chain of as many descriptors as the ring has may be a loop.
      let steps = <i32>num;
      let from = desc + (head << 4);
      let writing: u32 = 0;
      let bytes: u64 = 0;
      for (;;) {
        const address = load<u64>(from);
        const rest = load<u64>(from, 8);
        const length = rest & LENGTH;
        const offset = address - first;
        const spare = size - length;
        // Negative where it begins before the region, ends behind it, or is empty.
        if (<i64>(offset | spare | (spare - offset) | (length - 1)) < 0) {
          const other = e.otherFirst;
          const otherSize = e.otherEnd - other;
          const into = address - other;
          // In neither of the two that were met last, or in several.
          if (length == 0 || into >= otherSize || length > otherSize - into) {
            room = -1;
            break;
          }
          e.otherFirst = first;
          e.otherEnd = first + size;
          first = other;
          size = otherSize;
        }
        const flags = <u32>(rest >> 32);
        // No tables, and nothing readable behind something writable.
        if (((flags & S.F_INDIRECT) | (writing & ~flags)) != 0) {
          room = -1;
          break;
        }
        room--;
        if (heads) if (--steps < 0) room = -1;
        if (room < 0) break;
        writing = flags & S.F_WRITE;
        bytes += length;
        const slot = slots + (to << S.SLOT_SHIFT);
        const following = load<u32>(slot, 12) >> S.LINK_SHIFT;
        const word = rest & LENGTH_AND_FLAGS;
        store<u64>(slot, address);
        store<u64>(slot, word | <u64>following << 34, 8);
        if (!heads) {
          const copy = out + (to << 4);
          store<u64>(copy, address);
          // Where no other descriptor follows, nobody looks at the link.
          store<u64>(copy, word | <u64>following << 48, 8);
        }
        to = following;
        if ((flags & S.F_NEXT) == 0) break;
        const index = <u32>(rest >> 48);
        if (index >= num || single) {
          room = -1;
          break;
        }
        from = desc + (index << 4);
      }
      if (room < 0 || bytes >> 32 != 0) {
        room = before;
        to = begin;
        break;
      }
      const record = slots + ((heads ? head : begin) << S.SLOT_SHIFT);
      store<u64>(record, <u64>head | <u64>begin << 32, S.GUEST_ID);
      store<u32>(record, order, S.ORDER);
      order++;
      if (recorded) takeSplit(q, head);
      store<u16>(mine, 1);
      store<u16>(at + distance, <u16>(heads ? head : begin));
      at += 2;
    } while (at != end);
    moved += (at - start) >> 1;
    if (at != end) break;
  }
  q.guestNext = (q.guestNext + moved) & 0xffff;
  q.deviceNext = (q.deviceNext + moved) & 0xffff;
  q.order = order;
  e.lastFirst = first;
  e.lastEnd = first + size;
  if (heads) {
    q.poolHead = to;
    q.poolFree = room;
  } else {
    q.freeHead = to;
    q.numFree = room;
  }
  q.inflight += moved;
  q.open += moved;
  return moved;
}

function shadow(q: Queue, e: Env): u32 {
  return offer(q, e, false, false);
}

function shadowRecorded(q: Queue, e: Env): u32 {
  return offer(q, e, false, true);
}

function heads(q: Queue, e: Env): u32 {
  return offer(q, e, true, false);
}

function headsRecorded(q: Queue, e: Env): u32 {
  return offer(q, e, true, true);
}

/** Offers what lies between `guestNext` and `guestSeen`, up to a chain that has to go the long way. */
export function shadowLoop(q: Queue, e: Env): u32 {
  return q.inflightAt != 0 ? shadowRecorded(q, e) : shadow(q, e);
}

/** The same in mode used: private copies go into the pool. */
export function headsLoop(q: Queue, e: Env): u32 {
  return q.inflightAt != 0 ? headsRecorded(q, e) : heads(q, e);
}
