/** From the device's ring back to the guest's. */
import * as S from "./state";
import { Env, fail, Queue } from "./state";
import { givePacked, giveSplit } from "./inflight";
import { mark, setPage, setSome } from "./memory";
import { lookUsed } from "./notify";

const WRITE: u64 = <u64>S.LINK_WRITE << 32;
const MORE: u64 = <u64>S.LINK_MORE << 32;

// @ts-ignore: decorator
@inline
function least(a: u32, b: u32): u32 {
  return a < b ? a : b;
}

/*
 * Split rings on both sides, in runs that end where one of them wraps. A chain's segments become free where they are: only the last
 * one's link changes.
 */
// @ts-ignore: decorator
@inline
function take(q: Queue, e: Env, heads: bool, logging: bool): i32 {
  const num = q.deviceNum;
  const guestNum = q.guestNum;
  const slots = q.slots;
  const taken = q.taken;
  const recorded = q.inflightAt != 0;
  const log = logging ? e.log : 0;
  const logPages = logging ? e.logPages : 0;
  let freeHead = heads ? q.poolHead : q.freeHead;
  let freed: u32 = 0;
  let bytes: u64 = 0;
  let pages: u32 = 0;
  let moved: u32 = 0;
  let error: i32 = 0;
  // A chain whose pages are marked outside of the loop: then it is met again.
  let slow: u32 = 0;
  let marked: u32 = 0;
  for (;;) {
    const ahead = lookUsed(q);
    if (ahead < 0) error = ahead;
    if (ahead <= 0) break;
    const place = q.deviceUsedNext & (num - 1);
    const outPlace = q.guestUsedNext & (guestNum - 1);
    const run = least(ahead, least(num - place, guestNum - outPlace));
    const start = q.deviceUsed + 4 + (place << 3);
    const end = start + (run << 3);
    const distance = q.guestUsed + 4 + (outPlace << 3) - start;
    let at = start;
    do {
      const element = load<u64>(at);
      const id = <u32>element;
      if (id >= num) {
        q.errorValue = id;
        error = fail(q, S.USED_ID_OUT_OF_RANGE, (q.deviceUsedNext + ((at - start) >> 3)) & 0xffff);
        break;
      }
      const record = slots + (id << S.SLOT_SHIFT);
      const ids = load<u64>(record, S.GUEST_ID);
      if (<i32>ids < 0) {
        error = fail(q, S.USED_NOT_IN_FLIGHT, id);
        break;
      }
      const first = <u32>(ids >> 32);
      let segment = slots + (first << S.SLOT_SHIFT);
      let writable: u64 = 0;
      let chainBytes: u64 = 0;
      let chainPages: u32 = 0;
      let count: u32 = 0;
      for (;;) {
        const word = load<u64>(segment, 8);
        const length = word & 0xffffffff;
        chainBytes += length;
        count++;
        if ((word & WRITE) != 0) {
          writable += length;
          if (logging) {
            const address = load<u64>(segment);
            const page = address >> 12;
            const last = (address + length - 1) >> 12;
            chainPages += <u32>(last - page) + 1;
            if (page == last && page < logPages) {
              // A byte: it needs no check of its alignment.
              if (((<u32>atomic.load<u8>(log + <u32>(page >> 3)) >> (<u32>page & 7)) & 1) == 0) setPage(log, page);
            } else if (last < logPages && page >> 5 == last >> 5) {
              setSome(log, page, last);
            } else if (record != marked) {
              slow = record;
              break;
            }
          }
        }
        if ((word & MORE) == 0) break;
        segment = slots + (<u32>(word >> 34) << S.SLOT_SHIFT);
      }
      if (logging) if (slow != 0) break;
      if (heads) {
        store<u32>(segment, freeHead << S.LINK_SHIFT, 12);
        freeHead = first;
      } else if (first < num) {
        store<u32>(segment, freeHead << S.LINK_SHIFT, 12);
        freeHead = id;
      } else {
        // A table: its segments are the pool's.
        store<u32>(segment, q.poolHead << S.LINK_SHIFT, 12);
        q.poolHead = first;
        q.poolFree += count;
        count = 1;
        store<u32>(record, freeHead << S.LINK_SHIFT, 12);
        freeHead = id;
      }
      freed += count;
      bytes += chainBytes;
      if (logging) pages += chainPages;
      store<i32>(record, -1, S.GUEST_ID);
      const guestId = <u32>ids;
      if (recorded) giveSplit(q, guestId);
      store<u16>(taken + (guestId << 1), 0);
      const length = element >> 32;
      store<u64>(at + distance, <u64>guestId | (length < writable ? length : writable) << 32);
      at += 8;
    } while (at != end);
    const done = (at - start) >> 3;
    q.deviceUsedNext = (q.deviceUsedNext + done) & 0xffff;
    q.guestUsedNext = (q.guestUsedNext + done) & 0xffff;
    moved += done;
    if (logging) {
      if (slow != 0) {
        error = markChain(q, e, load<u32>(slow, S.FIRST));
        marked = slow;
        slow = 0;
      }
    }
    if (error < 0) break;
  }
  if (heads) {
    q.poolHead = freeHead;
    q.poolFree += freed;
  } else {
    q.freeHead = freeHead;
    q.numFree += freed;
  }
  q.bytes += <f64>bytes;
  q.dirtyPages += pages;
  q.inflight -= moved;
  return error < 0 ? error : <i32>moved;
}

/** Marks what the device may have written of a chain. @returns 0 or an error */
function markChain(q: Queue, e: Env, first: u32): i32 {
  let index = first;
  let error: i32 = 0;
  for (;;) {
    const segment = q.slots + (index << S.SLOT_SHIFT);
    const link = load<u32>(segment, 12);
    if ((link & S.LINK_WRITE) != 0 && !mark(e, load<u64>(segment), load<u32>(segment, 8))) error = fail(q, S.LOG_TOO_SMALL, index);
    if ((link & S.LINK_MORE) == 0) break;
    index = link >> S.LINK_SHIFT;
  }
  return error;
}

function takeShadow(q: Queue, e: Env): i32 {
  return take(q, e, false, false);
}

function takeShadowLogged(q: Queue, e: Env): i32 {
  return take(q, e, false, true);
}

function takeHeads(q: Queue, e: Env): i32 {
  return take(q, e, true, false);
}

function takeHeadsLogged(q: Queue, e: Env): i32 {
  return take(q, e, true, true);
}

/** Split rings on both sides without IN_ORDER, and a log with a window or none. @returns chains, or an error */
export function returnSplit(q: Queue, e: Env): i32 {
  if (q.deviceKind == S.KIND_HEADS) return e.logMode != 0 ? takeHeadsLogged(q, e) : takeHeads(q, e);
  return e.logMode != 0 ? takeShadowLogged(q, e) : takeShadow(q, e);
}

/** What the device could write of the chain last settled, and all its bytes. */
let writableBytes: u64 = 0;
let allBytes: u64 = 0;

/** Marks what the device may have written of a chain, and gives its segments back. */
function settle(q: Queue, e: Env, first: u32): i32 {
  const logging = e.logMode != 0;
  let index = first;
  let segment = q.slots + (index << S.SLOT_SHIFT);
  let count: u32 = 1;
  writableBytes = 0;
  allBytes = 0;
  for (;;) {
    const rest = load<u64>(segment, 8);
    const link = <u32>(rest >> 32);
    const length = <u32>rest;
    allBytes += length;
    if ((link & S.LINK_WRITE) != 0) {
      writableBytes += length;
      if (logging) {
        const address = load<u64>(segment);
        if (!mark(e, address, length)) return fail(q, S.LOG_TOO_SMALL, index);
        q.dirtyPages += <u32>(((address + length - 1) >> 12) - (address >> 12)) + 1;
      }
    }
    if ((link & S.LINK_MORE) == 0) break;
    index = link >> S.LINK_SHIFT;
    segment = q.slots + (index << S.SLOT_SHIFT);
    count++;
  }
  if (first >= q.poolBase) {
    store<u32>(segment, q.poolHead << S.LINK_SHIFT, 12);
    q.poolHead = first;
    q.poolFree += count;
  } else if (!q.deviceInOrder) {
    store<u32>(segment, q.freeHead << S.LINK_SHIFT, 12);
  }
  return 0;
}

/** A chain is done. With IN_ORDER the guest gets it when its turn comes. */
function giveBack(q: Queue, guestId: u32, length: u32): void {
  if (!q.guestInOrder) {
    writeUsed(q, guestId, length);
    return;
  }
  store<u8>(q.doneIds + guestId, 1);
  store<u32>(q.doneLengths + (guestId << 2), length);
  while (q.usedChains < q.open) {
    // Used and taken chains lie at the same positions.
    const place = q.guestPacked ? q.guestUsedNext : q.guestUsedNext & (q.guestNum - 1);
    const oldest = <u32>load<u16>(q.guestOrder + (place << 1));
    if (load<u8>(q.doneIds + oldest) == 0) break;
    store<u8>(q.doneIds + oldest, 0);
    writeUsed(q, oldest, load<u32>(q.doneLengths + (oldest << 2)));
  }
}

/** Writes one used element or descriptor for the guest. */
function writeUsed(q: Queue, guestId: u32, length: u32): void {
  const taken = q.taken + (guestId << 1);
  const slots = <u32>load<u16>(taken);
  store<u16>(taken, 0);
  q.usedChains++;
  if (!q.guestPacked) {
    if (q.inflightAt != 0) giveSplit(q, guestId);
    store<u64>(q.guestUsed + 4 + ((q.guestUsedNext & (q.guestNum - 1)) << 3), <u64>guestId | <u64>length << 32);
    q.guestUsedNext = (q.guestUsedNext + 1) & 0xffff;
    return;
  }
  if (q.inflightAt != 0) givePacked(q, guestId);
  const slot = q.guestUsedNext;
  const flags = (q.guestUsedSeen == 1 ? S.PACKED_STATE : 0) | (length > 0 ? S.F_WRITE : 0);
  const to = q.guestDesc + (slot << 4);
  store<u32>(to, length, 8);
  store<u16>(to, <u16>guestId, 12);
  if (q.usedSlot < 0) {
    q.usedSlot = <i32>slot;
    q.usedFlags = flags;
  } else {
    // The driver looks at this slot only after it has seen the first one of the batch.
    store<u16>(to, <u16>flags, 14);
  }
  q.usedSlots += slots;
  q.guestUsedNext = slot + slots;
  if (q.guestUsedNext >= q.guestNum) {
    q.guestUsedNext -= q.guestNum;
    q.guestUsedSeen ^= 1;
  }
}

/** IN_ORDER: is `id` among the `limit` oldest chains at the device? */
function isDue(q: Queue, id: u32, limit: u32): bool {
  let place = q.deviceOrderOldest;
  for (let i: u32 = 0; i < limit; i++) {
    if (load<u16>(q.deviceOrder + (place << 1)) == id) return true;
    place = place + 1 == q.deviceNum ? 0 : place + 1;
  }
  return false;
}

/** Any rings. @returns chains, or an error */
export function returnAny(q: Queue, e: Env): i32 {
  const packed = q.deviceKind == S.KIND_PACKED;
  const inOrder = q.deviceInOrder != 0;
  let moved: u32 = 0;
  // IN_ORDER: one used element stands for all chains up to this one, which is the only one that has a length.
  let batchEnd: i32 = -1;
  let id: u32 = 0;
  let length: u32 = 0;
  for (;;) {
    const position = q.deviceUsedNext;
    if (batchEnd < 0) {
      if (packed || position == q.deviceUsedSeen) {
        const ahead = lookUsed(q);
        if (ahead < 0) return ahead;
        if (ahead == 0) break;
      }
      if (packed) {
        const rest = load<u64>(q.deviceDesc + (position << 4), 8);
        id = <u32>(rest >> 32) & 0xffff;
        length = <u32>rest;
      } else {
        const element = load<u64>(q.deviceUsed + 4 + ((position & (q.deviceNum - 1)) << 3));
        id = <u32>element;
        length = <u32>(element >> 32);
      }
      if (id >= q.deviceNum) {
        q.errorValue = id;
        return fail(q, S.USED_ID_OUT_OF_RANGE, position);
      }
      if (load<i32>(q.slots + (id << S.SLOT_SHIFT), S.GUEST_ID) < 0) return fail(q, S.USED_NOT_IN_FLIGHT, id);
      if (inOrder) {
        if (!packed && !isDue(q, id, (q.deviceUsedSeen - position) & 0xffff)) {
          q.errorValue = q.deviceUsedSeen;
          return fail(q, S.IN_ORDER, id);
        }
        batchEnd = <i32>id;
      }
    }
    let given = length;
    if (inOrder) {
      id = load<u16>(q.deviceOrder + (q.deviceOrderOldest << 1));
      q.deviceOrderOldest = q.deviceOrderOldest + 1 == q.deviceNum ? 0 : q.deviceOrderOldest + 1;
      if (<i32>id == batchEnd) batchEnd = -1;
      else given = <u32>-1;
    }
    const at = q.slots + (id << S.SLOT_SHIFT);
    const guestId = load<i32>(at, S.GUEST_ID);
    const first = load<u32>(at, S.FIRST);
    const error = settle(q, e, first);
    if (error < 0) return error;
    const slots = load<u32>(at, S.SLOTS);
    if (packed) {
      store<u32>(at, q.freeHead, S.SLOTS);
      q.freeHead = id;
      q.numFree += slots;
      q.deviceUsedNext = position + slots;
      if (q.deviceUsedNext >= q.deviceNum) {
        q.deviceUsedNext -= q.deviceNum;
        q.deviceUsedSeen ^= 1;
      }
    } else {
      if (q.deviceKind == S.KIND_SPLIT) {
        q.numFree += slots;
        // With IN_ORDER the free descriptors lie behind one another in table order already.
        if (!inOrder) {
          if (first >= q.poolBase) store<u32>(at, q.freeHead << S.LINK_SHIFT, 12);
          q.freeHead = id;
        }
      }
      q.deviceUsedNext = (position + 1) & 0xffff;
    }
    store<i32>(at, -1, S.GUEST_ID);
    q.inflight--;
    q.bytes += <f64>allBytes;
    giveBack(q, <u32>guestId, <u64>given < writableBytes ? given : <u32>writableBytes);
    moved++;
  }
  return <i32>moved;
}

/** Marks what the device may write of every chain that it holds. @returns 0 or an error */
export function markHeld(q: Queue): i32 {
  const e = q.env;
  if (e.logMode == 0) return 0;
  let result: i32 = 0;
  for (let id: u32 = 0; id < q.deviceNum; id++) {
    const at = q.slots + (id << S.SLOT_SHIFT);
    if (load<i32>(at, S.GUEST_ID) < 0) continue;
    let index = load<u32>(at, S.FIRST);
    for (;;) {
      const segment = q.slots + (index << S.SLOT_SHIFT);
      const link = load<u32>(segment, 12);
      if ((link & S.LINK_WRITE) != 0) {
        const address = load<u64>(segment);
        const length = load<u32>(segment, 8);
        if (!mark(e, address, length)) result = fail(q, S.LOG_TOO_SMALL, index);
        q.dirtyPages += <u32>(((address + length - 1) >> 12) - (address >> 12)) + 1;
      }
      if ((link & S.LINK_MORE) == 0) break;
      index = link >> S.LINK_SHIFT;
    }
  }
  return result;
}
