/** The relay core: what the host calls. Results: chains moved, with flags; negative: an error, FULL or GROW. */
import * as S from "./state";
import { Env, fail, Queue } from "./state";
import { contains, mark } from "./memory";
import { place } from "./place";
import * as walk from "./walk";

/** Flags of a result: a notification is wanted; the device's ring is full; the pool must grow. */
const NOTIFY: i32 = 1 << 30;
const IS_FULL: i32 = 1 << 29;
const MUST_GROW: i32 = 1 << 28;

// @ts-ignore: decorator
@inline
function eventPassed(event: u32, now: u32, old: u32): bool {
  return ((now - event - 1) & 0xffff) < ((now - old) & 0xffff);
}

function packedEventWanted(word: u32, eventIdx: u32, num: u32, slot: u32, wrap: u32, passed: u32): bool {
  const flags = (word >>> 16) & 3;
  if (flags == 1) return false;
  // The reserved value, and a request that was not negotiated, are answered with a notification: it does no harm.
  if (flags != 2 || !eventIdx) return true;
  let event = word & 0x7fff;
  if (((word >>> 15) & 1) != wrap) event -= num;
  return ((slot - event - 1) & 0xffff) < passed;
}

/** Makes added chains visible. @returns NOTIFY when the device wants a kick */
function publish(q: Queue): i32 {
  if (q.deviceKind == 1) {
    if (q.batchSlot < 0) return 0;
    atomic.store<u16>(q.deviceDesc + (<u32>q.batchSlot << 4), <u16>q.batchFlags, 14);
    const passed = q.batchSlots;
    q.batchSlot = -1;
    q.batchSlots = 0;
    const event = atomic.load<u32>(q.deviceUsed);
    return packedEventWanted(event, q.deviceEventIdx, q.deviceNum, q.deviceNext, q.devicePublished, passed) ? NOTIFY : 0;
  }
  const old = q.devicePublished;
  const now = q.deviceNext;
  if (now == old) return 0;
  atomic.store<u16>(q.deviceAvail, <u16>now, 2);
  q.devicePublished = now;
  const wanted = q.deviceEventIdx
    ? eventPassed(atomic.load<u16>(q.deviceUsed + 4 + (q.deviceNum << 3)), now, old)
    : (atomic.load<u16>(q.deviceUsed) & 1) == 0;
  return wanted ? NOTIFY : 0;
}

function lookSplit(q: Queue): i32 {
  const idx = <u32>atomic.load<u16>(q.guestAvail, 2);
  const ahead = (idx - q.guestNext) & 0xffff;
  if (ahead > q.guestNum) {
    q.errorValue = q.guestNext;
    return fail(q, S.AVAIL_INDEX_JUMP, idx);
  }
  q.guestSeen = idx;
  return <i32>ahead;
}

// The loop of mode shadow between split rings where nothing is translated: everything that it touches often is in locals. It stops
// in front of a chain that it does not take (indirect, no room, or a broken rule): that goes the long way.
function shortcuts(q: Queue, e: Env): i32 {
  const num = q.guestNum;
  const mask = num - 1;
  const deviceMask = q.deviceNum - 1;
  const desc = q.guestDesc;
  const ring = q.guestAvail + 4;
  const out = q.deviceDesc;
  const outRing = q.deviceAvail + 4;
  const segments = q.segments;
  const records = q.records;
  const taken = q.taken;
  const single = q.tables != 0;
  const start = q.guestNext;
  const seen = q.guestSeen;
  let position = start;
  let next = q.deviceNext;
  let freeHead = q.freeHead;
  let left = q.numFree;
  let order = q.order;
  let first = e.lastFirst;
  let end = e.lastEnd;
  while (position != seen) {
    const head = <u32>load<u16>(ring + ((position & mask) << 1));
    if (head >= num || load<u16>(taken + (head << 1)) != 0) break;
    let index = head;
    let to = freeHead;
    let room = left;
    let writable: u64 = 0;
    let bytes: u64 = 0;
    let whole = false;
    for (;;) {
      if (room == 0) break;
      const at = desc + (index << 4);
      const address = load<u64>(at);
      const rest = load<u64>(at, 8);
      const length = rest & 0xffffffff;
      const flags = <u32>(rest >> 32) & 7;
      // Above 2^52 nothing lies in memory; a sum that wraps is below its address.
      if (address < first || address + length > end || address > S.LIMIT) {
        if (address > S.LIMIT - length || !contains(e, address, <u32>length)) break;
        first = e.lastFirst;
        end = e.lastEnd;
      }
      if (length == 0 || flags >= S.F_INDIRECT) break;
      if ((flags & S.F_WRITE) != 0) writable += length;
      else if (writable != 0) break;
      bytes += length;
      room--;
      const segment = segments + (to << 4);
      const following = load<u32>(segment, 12) & S.LINK_INDEX;
      const place = out + (to << 4);
      store<u64>(place, address);
      store<u64>(segment, address);
      store<u64>(segment, length | <u64>(following | flags << 30) << 32, 8);
      to = following;
      if ((flags & S.F_NEXT) == 0) {
        store<u64>(place, length | <u64>flags << 32, 8);
        whole = true;
        break;
      }
      if (single) break;
      store<u64>(place, length | <u64>(flags | following << 16) << 32, 8);
      index = <u32>(rest >> 48);
      if (index >= num) break;
    }
    if (!whole || bytes > 0x100000000) break;
    const at = records + (freeHead << 5);
    store<f64>(at, order);
    store<f64>(at, <f64>bytes, 8);
    store<u64>(at, <u64>head | <u64>freeHead << 32, 16);
    store<u64>(at, (writable > 0xffffffff ? 0xffffffff : writable) | <u64>(left - room) << 32, 24);
    order += 1;
    store<u16>(taken + (head << 1), 1);
    store<u16>(outRing + ((next & deviceMask) << 1), <u16>freeHead);
    next++;
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
  q.inflight += moved;
  q.open += moved;
  return <i32>moved;
}

// The same in mode used: the device reads the guest's descriptors, and the private copies go into the pool.
function headShortcuts(q: Queue, e: Env): i32 {
  const num = q.guestNum;
  const mask = num - 1;
  const desc = q.guestDesc;
  const ring = q.guestAvail + 4;
  const outRing = q.deviceAvail + 4;
  const segments = q.segments;
  const records = q.records;
  const taken = q.taken;
  const start = q.guestNext;
  const seen = q.guestSeen;
  let position = start;
  let next = q.deviceNext;
  let poolHead = q.poolHead;
  let left = q.poolFree;
  let order = q.order;
  let first = e.lastFirst;
  let end = e.lastEnd;
  let heads = q.deviceNum - q.inflight;
  while (position != seen && heads > 0) {
    const head = <u32>load<u16>(ring + ((position & mask) << 1));
    if (head >= num || load<u16>(taken + (head << 1)) != 0) break;
    let index = head;
    let to = poolHead;
    let room = left;
    let steps = num;
    let writable: u64 = 0;
    let bytes: u64 = 0;
    let whole = false;
    for (;;) {
      if (room == 0 || steps == 0) break;
      const at = desc + (index << 4);
      const address = load<u64>(at);
      const rest = load<u64>(at, 8);
      const length = rest & 0xffffffff;
      const flags = <u32>(rest >> 32) & 7;
      if (address < first || address + length > end || address > S.LIMIT) {
        if (address > S.LIMIT - length || !contains(e, address, <u32>length)) break;
        first = e.lastFirst;
        end = e.lastEnd;
      }
      if (length == 0 || flags >= S.F_INDIRECT) break;
      if ((flags & S.F_WRITE) != 0) writable += length;
      else if (writable != 0) break;
      bytes += length;
      room--;
      steps--;
      const segment = segments + (to << 4);
      const following = load<u32>(segment, 12) & S.LINK_INDEX;
      store<u64>(segment, address);
      store<u64>(segment, length | <u64>(following | flags << 30) << 32, 8);
      to = following;
      if ((flags & S.F_NEXT) == 0) {
        whole = true;
        break;
      }
      index = <u32>(rest >> 48);
      if (index >= num) break;
    }
    if (!whole || bytes > 0x100000000) break;
    const at = records + (head << 5);
    store<f64>(at, order);
    store<f64>(at, <f64>bytes, 8);
    store<u64>(at, <u64>head | <u64>poolHead << 32, 16);
    store<u64>(at, (writable > 0xffffffff ? 0xffffffff : writable) | <u64>1 << 32, 24);
    order += 1;
    store<u16>(taken + (head << 1), 1);
    store<u16>(outRing + ((next & mask) << 1), <u16>head);
    next++;
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
  q.inflight += moved;
  q.open += moved;
  return <i32>moved;
}

function forwardSplit(q: Queue): i32 {
  const e = q.env;
  const num = q.guestNum;
  const mask = num - 1;
  const quick = q.deviceKind == 2 ? 2 : q.deviceKind == 0 && e.identity ? 1 : 0;
  let moved: i32 = 0;
  let flags: i32 = 0;
  for (;;) {
    if (q.guestNext == q.guestSeen) {
      const ahead = lookSplit(q);
      if (ahead < 0) return ahead;
      if (ahead == 0) break;
    }
    if (quick != 0) {
      moved += quick == 1 ? shortcuts(q, e) : headShortcuts(q, e);
      if (q.guestNext == q.guestSeen) continue;
    }
    const position = q.guestNext;
    const head = <u32>load<u16>(q.guestAvail + 4 + ((position & mask) << 1));
    if (head >= num) {
      q.errorValue = head;
      return fail(q, S.HEAD_OUT_OF_RANGE, position);
    }
    const taken = q.taken + (head << 1);
    if (load<u16>(taken) != 0) return fail(q, S.HEAD_IN_FLIGHT, head);
    const error = walk.walkSplit(q, e, head);
    if (error < 0) return error;
    const id = place(q, e, head);
    if (id < 0) {
      if (id == S.FULL) flags = IS_FULL;
      else if (id == S.GROW) flags = MUST_GROW;
      else return id;
      break;
    }
    store<u16>(taken, 1);
    q.guestNext = (position + 1) & 0xffff;
    q.open++;
    moved++;
  }
  return moved | flags;
}

function forwardPacked(q: Queue): i32 {
  const e = q.env;
  const num = q.guestNum;
  let moved: i32 = 0;
  let flags: i32 = 0;
  for (;;) {
    const head = q.guestNext;
    const headFlags = <u32>atomic.load<u16>(q.guestDesc + (head << 4), 14);
    if (q.openSlots == num || !walk.available(headFlags, q.guestSeen)) break;
    const guestId = walk.walkPacked(q, e, head, headFlags);
    if (guestId < 0) return guestId;
    if (<u32>guestId >= num) {
      q.errorValue = <u32>guestId;
      return fail(q, S.PACKED_ID_OUT_OF_RANGE, head);
    }
    const taken = q.taken + (<u32>guestId << 1);
    if (load<u16>(taken) != 0) return fail(q, S.PACKED_ID_IN_FLIGHT, <u32>guestId);
    const slots = walk.slots;
    const id = place(q, e, <u32>guestId);
    if (id < 0) {
      if (id == S.FULL) flags = IS_FULL;
      else if (id == S.GROW) flags = MUST_GROW;
      else return id;
      break;
    }
    store<u16>(taken, <u16>slots);
    q.open++;
    q.openSlots += slots;
    q.guestNext = head + slots;
    if (q.guestNext >= num) {
      q.guestNext -= num;
      q.guestSeen ^= 1;
    }
    moved++;
  }
  return moved | flags;
}

/** Offers what the guest has made available to the device. */
export function forward(q: Queue): i32 {
  const moved = q.guestPacked ? forwardPacked(q) : forwardSplit(q);
  if (moved < 0) return moved;
  return moved | publish(q);
}

/** Puts a segment of a chain that `add` adds; `begin` comes first. */
export function segment(q: Queue, address: f64, length: u32, writable: u32): void {
  walk.put(q.env, <u64>address, length, writable != 0);
}

/** Begins a chain for `add`. */
export function begin(): void {
  walk.begin();
}

/** Adds the chain of `segment`s, which the guest knows by `guestId`. @returns its id, FULL, GROW or an error */
export function add(q: Queue, guestId: u32): i32 {
  return place(q, q.env, guestId);
}

/** Makes what was added visible to the device. @returns not 0 when it wants a kick */
export function publishAdded(q: Queue): i32 {
  return publish(q);
}

/** Is there something used in the device's ring? */
function lookUsed(q: Queue): i32 {
  if (q.deviceKind == 1) {
    if (q.inflight == 0) return 0;
    const flags = <u32>atomic.load<u16>(q.deviceDesc + (q.deviceUsedNext << 4), 14);
    return (flags & S.PACKED_STATE) == (q.deviceUsedSeen == 1 ? S.PACKED_STATE : 0) ? 1 : 0;
  }
  const idx = <u32>atomic.load<u16>(q.deviceUsed, 2);
  const ahead = (idx - q.deviceUsedNext) & 0xffff;
  if (ahead > ((q.devicePublished - q.deviceUsedNext) & 0xffff)) {
    q.errorValue = q.deviceUsedNext;
    return fail(q, S.USED_INDEX_JUMP, idx);
  }
  q.deviceUsedSeen = idx;
  return <i32>ahead;
}

// Marks what the device may have written of a chain, and gives its segments back.
// @ts-ignore: decorator
@inline
function settle(q: Queue, e: Env, at: u32, logging: bool): i32 {
  const first = load<u32>(at, 20);
  let index = first;
  let segment = q.segments + (index << 4);
  let count: u32 = 1;
  for (;;) {
    const rest = load<u64>(segment, 8);
    const link = <u32>(rest >> 32);
    if (logging && (link & S.LINK_WRITE) != 0) {
      const address = load<u64>(segment);
      const length = <u32>rest;
      if (!mark(e, address, length)) return fail(q, S.LOG_TOO_SMALL, index);
      q.dirtyPages += <u32>(((address + length - 1) >> 12) - (address >> 12)) + 1;
    }
    if ((link & S.LINK_MORE) == 0) break;
    index = link & S.LINK_INDEX;
    segment = q.segments + (index << 4);
    count++;
  }
  if (first >= q.poolBase) {
    store<u32>(segment, q.poolHead, 12);
    q.poolHead = first;
    q.poolFree += count;
  } else {
    store<u32>(segment, q.freeHead, 12);
  }
  return 0;
}

/** Writes one used element or descriptor for the guest. */
// @ts-ignore: decorator
@inline
function giveBack(q: Queue, guestId: u32, length: u32): void {
  const taken = q.taken + (guestId << 1);
  if (!q.guestPacked) {
    store<u64>(q.guestUsed + 4 + ((q.guestUsedNext & (q.guestNum - 1)) << 3), <u64>guestId | <u64>length << 32);
    q.guestUsedNext = (q.guestUsedNext + 1) & 0xffff;
    store<u16>(taken, 0);
    return;
  }
  const slots = <u32>load<u16>(taken);
  store<u16>(taken, 0);
  const slot = q.guestUsedNext;
  const flags = (q.guestUsedSeen == 1 ? S.PACKED_STATE : 0) | (length > 0 ? S.F_WRITE : 0);
  const to = q.guestDesc + (slot << 4);
  store<u32>(to, length, 8);
  store<u16>(to, <u16>guestId, 12);
  if (firstSlot < 0) {
    firstSlot = <i32>slot;
    firstFlags = flags;
  } else {
    // The driver looks at this slot only after it has seen the first one of the batch.
    store<u16>(to, <u16>flags, 14);
  }
  passedSlots += slots;
  q.guestUsedNext = slot + slots;
  if (q.guestUsedNext >= q.guestNum) {
    q.guestUsedNext -= q.guestNum;
    q.guestUsedSeen ^= 1;
  }
}

let firstSlot: i32 = -1;
let firstFlags: u32 = 0;
let passedSlots: u32 = 0;

/** Publishes what was given back. @returns whether the guest wants a call */
function flush(q: Queue, moved: u32): bool {
  q.open -= moved;
  if (!q.guestPacked) {
    const old = q.guestUsedSeen;
    const now = q.guestUsedNext;
    atomic.store<u16>(q.guestUsed, <u16>now, 2);
    q.guestUsedSeen = now;
    return q.guestEventIdx
      ? eventPassed(atomic.load<u16>(q.guestAvail + 4 + (q.guestNum << 1)), now, old)
      : (atomic.load<u16>(q.guestAvail) & 1) == 0;
  }
  atomic.store<u16>(q.guestDesc + (<u32>firstSlot << 4), <u16>firstFlags, 14);
  q.openSlots -= passedSlots;
  return packedEventWanted(atomic.load<u32>(q.guestAvail), q.guestEventIdx, q.guestNum, q.guestUsedNext, q.guestUsedSeen, passedSlots);
}

// Split rings on both sides: everything that is touched often is in locals.
function returnSplit(q: Queue, e: Env): i32 {
  const num = q.deviceNum;
  const mask = num - 1;
  const guestMask = q.guestNum - 1;
  const ring = q.deviceUsed + 4;
  const to = q.guestUsed + 4;
  const records = q.records;
  const segments = q.segments;
  const taken = q.taken;
  const poolBase = q.poolBase;
  const heads = q.deviceKind == 2;
  const logging = e.logMode == 1;
  const slow = e.logMode == 2;
  const log = e.log;
  const logPages = e.logPages;
  let position = q.deviceUsedNext;
  let out = q.guestUsedNext;
  let freeHead = q.freeHead;
  let poolHead = q.poolHead;
  let numFree = q.numFree;
  let poolFree = q.poolFree;
  let bytes = q.bytes;
  let pages: u32 = 0;
  let moved: u32 = 0;
  let error: i32 = 0;
  let seen = q.deviceUsedSeen;
  for (;;) {
    if (position == seen) {
      q.deviceUsedNext = position;
      const ahead = lookUsed(q);
      if (ahead < 0) error = ahead;
      if (ahead <= 0) break;
      seen = q.deviceUsedSeen;
    }
    const element = load<u64>(ring + ((position & mask) << 3));
    const id = <u32>element;
    if (id >= num) {
      q.errorValue = id;
      error = fail(q, S.USED_ID_OUT_OF_RANGE, position);
      break;
    }
    const at = records + (id << 5);
    const ids = load<u64>(at, 16);
    if (<i32>ids < 0) {
      error = fail(q, S.USED_NOT_IN_FLIGHT, id);
      break;
    }
    const first = <u32>(ids >> 32);
    let index = first;
    let count: u32 = 1;
    let segment = segments + (index << 4);
    for (;;) {
      const rest = load<u64>(segment, 8);
      const link = <u32>(rest >> 32);
      if ((link & S.LINK_WRITE) != 0) {
        const address = load<u64>(segment);
        const length = <u32>rest;
        if (logging) {
          const page = address >> 12;
          const last = (address + length - 1) >> 12;
          if (last >= logPages || page >> 5 != last >> 5) {
            if (!mark(e, address, length)) {
              error = fail(q, S.LOG_TOO_SMALL, index);
              break;
            }
          } else {
            const bits = (<u32>-1 << (<u32>page & 31)) & (<u32>-1 >> (31 - (<u32>last & 31)));
            const word = log + (<u32>(page >> 5) << 2);
            if ((atomic.load<u32>(word) & bits) != bits) atomic.or<u32>(word, bits);
          }
          pages += <u32>(last - page) + 1;
        } else if (slow) {
          if (!mark(e, address, length)) {
            error = fail(q, S.LOG_TOO_SMALL, index);
            break;
          }
          pages += <u32>(((address + length - 1) >> 12) - (address >> 12)) + 1;
        }
      }
      if ((link & S.LINK_MORE) == 0) break;
      index = link & S.LINK_INDEX;
      segment = segments + (index << 4);
      count++;
    }
    if (error < 0) break;
    const rest = load<u64>(at, 24);
    if (heads) {
      store<u32>(segment, poolHead, 12);
      poolHead = first;
      poolFree += count;
    } else {
      if (first >= poolBase) {
        store<u32>(segment, poolHead, 12);
        poolHead = first;
        poolFree += count;
        segment = segments + (id << 4);
      }
      store<u32>(segment, freeHead, 12);
      freeHead = id;
      numFree += <u32>(rest >> 32);
    }
    store<i32>(at, -1, 16);
    bytes += load<f64>(at, 8);
    const length = <u32>(element >> 32);
    const writable = <u32>rest;
    const guestId = <u32>ids;
    store<u16>(taken + (guestId << 1), 0);
    store<u64>(to + ((out & guestMask) << 3), <u64>guestId | <u64>(length < writable ? length : writable) << 32);
    out++;
    position = (position + 1) & 0xffff;
    moved++;
  }
  q.deviceUsedNext = position;
  q.guestUsedNext = out & 0xffff;
  q.freeHead = freeHead;
  q.poolHead = poolHead;
  q.numFree = numFree;
  q.poolFree = poolFree;
  q.bytes = bytes;
  q.dirtyPages += pages;
  q.inflight -= moved;
  if (error < 0) return error;
  return <i32>moved;
}

/** Gives back to the guest what the device has used. */
export function returnUsed(q: Queue): i32 {
  if (q.deviceKind != 1 && !q.guestPacked) {
    const moved = returnSplit(q, q.env);
    if (moved <= 0) return moved;
    q.returned += <u32>moved;
    return moved | (flush(q, <u32>moved) ? NOTIFY : 0);
  }
  return returnAny(q);
}

function returnAny(q: Queue): i32 {
  const e = q.env;
  const logging = e.logMode != 0;
  const packed = q.deviceKind == 1;
  let moved: u32 = 0;
  firstSlot = -1;
  passedSlots = 0;
  for (;;) {
    const position = q.deviceUsedNext;
    if (packed || position == q.deviceUsedSeen) {
      const ahead = lookUsed(q);
      if (ahead < 0) return ahead;
      if (ahead == 0) break;
    }
    let id: u32;
    let length: u32;
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
    const at = q.records + (id << 5);
    const guestId = load<i32>(at, 16);
    if (guestId < 0) return fail(q, S.USED_NOT_IN_FLIGHT, id);
    const error = settle(q, e, at, logging);
    if (error < 0) return error;
    const slots = load<u32>(at, 28);
    if (packed) {
      store<u32>(at, q.freeHead, 28);
      q.freeHead = id;
      q.numFree += slots;
      q.deviceUsedNext = position + slots;
      if (q.deviceUsedNext >= q.deviceNum) {
        q.deviceUsedNext -= q.deviceNum;
        q.deviceUsedSeen ^= 1;
      }
    } else {
      if (q.deviceKind == 0) {
        if (load<u32>(at, 20) >= q.poolBase) store<u32>(q.segments + (id << 4), q.freeHead, 12);
        q.freeHead = id;
        q.numFree += slots;
      }
      q.deviceUsedNext = (position + 1) & 0xffff;
    }
    store<i32>(at, -1, 16);
    q.inflight--;
    q.bytes += load<f64>(at, 8);
    const writable = load<u32>(at, 24);
    giveBack(q, <u32>guestId, length < writable ? length : writable);
    moved++;
  }
  if (moved == 0) return 0;
  q.returned += moved;
  return <i32>moved | (flush(q, moved) ? NOTIFY : 0);
}

/** Marks what the device may write of every chain that it holds. @returns 0 or an error */
export function markHeld(q: Queue): i32 {
  const e = q.env;
  let result: i32 = 0;
  for (let id: u32 = 0; id < q.deviceNum; id++) {
    const at = q.records + (id << 5);
    if (e.logMode == 0 || load<i32>(at, 16) < 0) continue;
    let index = load<u32>(at, 20);
    for (;;) {
      const segment = q.segments + (index << 4);
      const link = load<u32>(segment, 12);
      if ((link & S.LINK_WRITE) != 0) {
        const address = load<u64>(segment);
        const length = load<u32>(segment, 8);
        if (!mark(e, address, length)) result = fail(q, S.LOG_TOO_SMALL, index);
        q.dirtyPages += <u32>(((address + length - 1) >> 12) - (address >> 12)) + 1;
      }
      if ((link & S.LINK_MORE) == 0) break;
      index = link & S.LINK_INDEX;
    }
  }
  return result;
}

/** Tells the device that calls are not needed. */
export function disableCalls(q: Queue): void {
  if (q.deviceKind == 1) atomic.store<u32>(q.deviceAvail, 1 << 16);
  else if (q.deviceEventIdx) atomic.store<u16>(q.deviceAvail + 4 + (q.deviceNum << 1), <u16>(q.deviceUsedNext - 1));
  else atomic.store<u16>(q.deviceAvail, 1);
}

/** Asks for calls. @returns whether used chains arrived meanwhile, or an error */
export function enableCalls(q: Queue): i32 {
  // Sequentially consistent store, then load: a device that uses a chain after this load sees the request.
  if (q.deviceKind == 1) {
    atomic.store<u32>(q.deviceAvail, q.deviceEventIdx ? q.deviceUsedNext | q.deviceUsedSeen << 15 | 2 << 16 : 0);
  } else if (q.deviceEventIdx) {
    atomic.store<u16>(q.deviceAvail + 4 + (q.deviceNum << 1), <u16>q.deviceUsedNext);
  } else {
    atomic.store<u16>(q.deviceAvail, 0);
  }
  return lookUsed(q);
}

/** Tells the guest that kicks are not needed. */
export function disableKicks(q: Queue): void {
  if (q.guestPacked) atomic.store<u32>(q.guestUsed, 1 << 16);
  else if (q.guestEventIdx) atomic.store<u16>(q.guestUsed + 4 + (q.guestNum << 3), <u16>(q.guestNext - 1));
  else atomic.store<u16>(q.guestUsed, 1);
}

/** Asks for kicks. @returns whether chains arrived meanwhile, or an error */
export function enableKicks(q: Queue): i32 {
  if (q.guestPacked) {
    atomic.store<u32>(q.guestUsed, q.guestEventIdx ? q.guestNext | q.guestSeen << 15 | 2 << 16 : 0);
    if (q.openSlots == q.guestNum) return 0;
    return walk.available(<u32>atomic.load<u16>(q.guestDesc + (q.guestNext << 4), 14), q.guestSeen) ? 1 : 0;
  }
  if (q.guestEventIdx) atomic.store<u16>(q.guestUsed + 4 + (q.guestNum << 3), <u16>q.guestNext);
  else atomic.store<u16>(q.guestUsed, 0);
  return lookSplit(q);
}

/** For the self-test: writes through this module's memory. */
export function poke(address: u32, value: u32): void {
  atomic.store<u32>(address, value);
}

/** For the self-test: reads through this module's memory. */
export function peek(address: u32): u32 {
  return atomic.load<u32>(address);
}

/** For tests: marks a range. @returns 0 when it left the log */
export function markRange(e: Env, address: f64, length: u32): u32 {
  return mark(e, <u64>address, length) ? 1 : 0;
}
