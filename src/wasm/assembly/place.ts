/** Writing chains into the device's ring, and the record of what it holds. */
import * as S from "./state";
import { Env, fail, Queue } from "./state";
import { spanOf } from "./memory";
import * as walk from "./walk";

/** Notes a chain at the device. */
function record(q: Queue, id: u32, guestId: u32, first: u32, slots: u32): void {
  const at = q.slots + (id << S.SLOT_SHIFT);
  store<u32>(at, guestId, S.GUEST_ID);
  store<u32>(at, first, S.FIRST);
  store<u32>(at, q.order, S.ORDER);
  store<u32>(at, slots, S.SLOTS);
  q.order++;
  q.inflight++;
  if (!q.deviceInOrder) return;
  store<u16>(q.deviceOrder + (q.deviceOrderNext << 1), <u16>id);
  q.deviceOrderNext = q.deviceOrderNext + 1 == q.deviceNum ? 0 : q.deviceOrderNext + 1;
}

/** Translates the scratch chain. @returns 0 or an error */
function translate(q: Queue, e: Env): i32 {
  let pieces: u32 = 0;
  let readablePieces: u32 = 0;
  for (let i: u32 = 0; i < walk.count; i++) {
    const from = e.scratch + i * 24;
    let address = load<u64>(from);
    let left = load<u32>(from, 16);
    while (left > 0) {
      const span = spanOf(e, address);
      if (span == 0) return fail(q, S.NO_PLACE, i);
      if (pieces >= q.maxChain) return fail(q, S.TOO_MANY_PIECES, q.maxChain);
      const room = load<u64>(span, 8) - address;
      const part = <u64>left < room ? left : <u32>room;
      const to = e.moved + pieces * 24;
      store<u64>(to, address + load<u64>(span, 16));
      store<u64>(to, address, 8);
      store<u32>(to, part, 16);
      pieces++;
      address += part;
      left -= part;
    }
    if (i < walk.readable) readablePieces = pieces;
  }
  movedCount = pieces;
  movedReadable = readablePieces;
  return 0;
}

let movedCount: u32 = 0;
let movedReadable: u32 = 0;

/** Copies the segments of a chain into the pool, which has room. @returns the first one's index */
function pool(q: Queue, from: u32, count: u32, readable: u32): u32 {
  const first = q.poolHead;
  let index = first;
  for (let i: u32 = 0; i < count; i++) {
    const segment = q.slots + (index << S.SLOT_SHIFT);
    const next = load<u32>(segment, 12) >> S.LINK_SHIFT;
    store<u64>(segment, load<u64>(from + i * 24, 8));
    store<u32>(segment, load<u32>(from + i * 24, 16), 8);
    store<u32>(segment, next << S.LINK_SHIFT | (i >= readable ? S.LINK_WRITE : 0) | (i + 1 < count ? S.LINK_MORE : 0), 12);
    index = next;
  }
  q.poolHead = index;
  q.poolFree -= count;
  return first;
}

/** Adds the scratch chain to the device's ring. @returns its id there, FULL, GROW, or an error */
export function place(q: Queue, e: Env, guestId: u32): i32 {
  let from = e.scratch;
  let count = walk.count;
  let readable = walk.readable;
  // In mode used the device reads the guest's own descriptors: nothing is translated.
  if (!e.identity && q.deviceKind != S.KIND_HEADS) {
    const error = translate(q, e);
    if (error < 0) return error;
    from = e.moved;
    count = movedCount;
    readable = movedReadable;
  }
  if (q.deviceKind == S.KIND_SPLIT) return placeSplit(q, guestId, from, count, readable);
  if (q.deviceKind == S.KIND_PACKED) return placePacked(q, guestId, from, count, readable);
  if (q.inflight == q.deviceNum) return S.FULL;
  if (q.poolFree < count) return S.GROW;
  return placeHead(q, guestId, pool(q, from, count, readable));
}

/** Offers a guest's head by its own number (mode used). */
function placeHead(q: Queue, head: u32, first: u32): i32 {
  record(q, head, head, first, 1);
  store<u16>(q.deviceAvail + 4 + ((q.deviceNext & (q.deviceNum - 1)) << 1), <u16>head);
  q.deviceNext = (q.deviceNext + 1) & 0xffff;
  return <i32>head;
}

// A table of the guest's that goes to the device as it is. Its segments are checked and kept all the same: they are what is marked.
// @ts-ignore: decorator
@inline
function passed(q: Queue): bool {
  return q.passTables && q.env.identity && walk.tableLength != 0 && walk.slots == 1;
}

function placeSplit(q: Queue, guestId: u32, from: u32, count: u32, readable: u32): i32 {
  const pass = passed(q);
  const indirect = pass || (q.tables != 0 && count > 1 && count <= q.tableEntries);
  const slots: u32 = indirect ? 1 : count;
  if (slots > q.deviceNum) return fail(q, S.CHAIN_TOO_LONG, count);
  if (slots > q.numFree) return S.FULL;
  if (indirect && q.poolFree < count) return S.GROW;
  const head = q.freeHead;
  let first = head;
  let next: u32 = 0;
  if (indirect) {
    next = load<u32>(q.slots + (head << S.SLOT_SHIFT), 12) >> S.LINK_SHIFT;
    const to = q.deviceDesc + (head << 4);
    if (pass) {
      store<u64>(to, walk.tableAddress);
    } else {
      const offset = head * q.tableEntries << 4;
      fillTable(q, q.tables + offset, from, count, readable, false, 0);
      store<u64>(to, (<u64>q.tablesIovaHigh << 32 | q.tablesIovaLow) + offset);
    }
    store<u64>(to, <u64>(pass ? walk.tableLength : count << 4) | <u64>S.F_INDIRECT << 32, 8);
    first = pool(q, from, count, readable);
  } else {
    let index = head;
    for (let i: u32 = 0; i < count; i++) {
      const segment = q.slots + (index << S.SLOT_SHIFT);
      next = load<u32>(segment, 12) >> S.LINK_SHIFT;
      const more = i + 1 < count;
      const write = i >= readable;
      const length = load<u32>(from + i * 24, 16);
      const to = q.deviceDesc + (index << 4);
      store<u64>(to, load<u64>(from + i * 24));
      store<u64>(to, length | <u64>((write ? S.F_WRITE : 0) | (more ? S.F_NEXT | next << 16 : 0)) << 32, 8);
      store<u64>(segment, load<u64>(from + i * 24, 8));
      store<u32>(segment, length, 8);
      store<u32>(segment, next << S.LINK_SHIFT | (write ? S.LINK_WRITE : 0) | (more ? S.LINK_MORE : 0), 12);
      index = next;
    }
  }
  q.freeHead = next;
  q.numFree -= slots;
  record(q, head, guestId, first, slots);
  store<u16>(q.deviceAvail + 4 + ((q.deviceNext & (q.deviceNum - 1)) << 1), <u16>head);
  q.deviceNext = (q.deviceNext + 1) & 0xffff;
  return <i32>head;
}

function fillTable(q: Queue, table: u32, from: u32, count: u32, readable: u32, packed: bool, id: u32): void {
  for (let i: u32 = 0; i < count; i++) {
    const write = i >= readable ? S.F_WRITE : 0;
    const more = i + 1 < count ? S.F_NEXT | (i + 1) << 16 : 0;
    const word: u32 = packed ? id | write << 16 : write | more;
    const to = table + (i << 4);
    store<u64>(to, load<u64>(from + i * 24));
    store<u64>(to, load<u32>(from + i * 24, 16) | <u64>word << 32, 8);
  }
}

// @ts-ignore: decorator
@inline
function putPacked(q: Queue, id: u32, address: u64, length: u32, flags: u32): void {
  const slot = q.deviceNext;
  const all = flags | (q.devicePublished == 1 ? S.PACKED_AVAIL : S.PACKED_USED);
  const to = q.deviceDesc + (slot << 4);
  store<u64>(to, address);
  store<u32>(to, length, 8);
  store<u16>(to, <u16>id, 12);
  if (q.batchSlot < 0) {
    q.batchSlot = <i32>slot;
    q.batchFlags = all;
  } else {
    // The device looks at this slot only after it has seen the first one of the batch.
    store<u16>(to, <u16>all, 14);
  }
  if (slot + 1 == q.deviceNum) {
    q.deviceNext = 0;
    q.devicePublished ^= 1;
  } else {
    q.deviceNext = slot + 1;
  }
}

function placePacked(q: Queue, guestId: u32, from: u32, count: u32, readable: u32): i32 {
  const pass = passed(q);
  const indirect = pass || (q.tables != 0 && count > 1 && count <= q.tableEntries);
  const slots: u32 = indirect ? 1 : count;
  if (slots > q.deviceNum) return fail(q, S.CHAIN_TOO_LONG, count);
  if (slots > q.numFree) return S.FULL;
  if (q.poolFree < count) return S.GROW;
  const id = q.freeHead;
  q.freeHead = load<u32>(q.slots + (id << S.SLOT_SHIFT), S.SLOTS);
  if (pass) {
    putPacked(q, id, walk.tableAddress, walk.tableLength, S.F_INDIRECT);
  } else if (indirect) {
    const offset = id * q.tableEntries << 4;
    fillTable(q, q.tables + offset, from, count, readable, true, id);
    putPacked(q, id, (<u64>q.tablesIovaHigh << 32 | q.tablesIovaLow) + offset, count << 4, S.F_INDIRECT);
  } else {
    for (let i: u32 = 0; i < count; i++) {
      const flags = (i >= readable ? S.F_WRITE : 0) | (i + 1 < count ? S.F_NEXT : 0);
      putPacked(q, id, load<u64>(from + i * 24), load<u32>(from + i * 24, 16), flags);
    }
  }
  q.numFree -= slots;
  q.batchSlots += slots;
  record(q, id, guestId, pool(q, from, count, readable), slots);
  return <i32>id;
}
