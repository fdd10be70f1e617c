/**
 * The record of what is in flight, in memory that outlives this process: src/vring/inflight.ts says what is where, and begins
 * and ends it. Each store that the next relay goes by is ordered behind what it stands for.
 */
import { Queue } from "./state";
import * as S from "./state";
import { store16, store32, store8 } from "./ordered";
import * as walk from "./walk";

const SPLIT_HEADER: u32 = 16;
const PACKED_HEADER: u32 = 32;

/** A chain of a split ring was taken; the device must not see it yet. */
// @ts-ignore: decorator
@inline
export function takeSplit(q: Queue, head: u32): void {
  const at = q.inflightAt + SPLIT_HEADER + (head << 4);
  store<u64>(at, <u64>q.inflightCounter, 8);
  q.inflightCounter += 1;
  store8(at, S.INFLIGHT_TAKEN);
}

// @ts-ignore: decorator
@inline
function note(q: Queue, id: u32): void {
  store<u16>(q.inflightBatch + (q.inflightBatchLength << 1), <u16>id);
  q.inflightBatchLength++;
}

/** A chain is about to be written to the guest's used ring. */
// @ts-ignore: decorator
@inline
export function giveSplit(q: Queue, head: u32): void {
  store16(q.inflightAt + SPLIT_HEADER + (head << 4) + 6, q.inflightLast);
  store16(q.inflightAt + 12, head);
  q.inflightLast = head;
  note(q, head);
}

function flushedSplit(q: Queue): void {
  const count = q.inflightBatchLength;
  for (let i: u32 = 0; i < count; i++) {
    store8(q.inflightAt + SPLIT_HEADER + (<u32>load<u16>(q.inflightBatch + (i << 1)) << 4), S.INFLIGHT_IDLE);
  }
  q.inflightUsed = (q.inflightUsed + count) & 0xffff;
  q.inflightBatchLength = 0;
  store16(q.inflightAt + 14, q.inflightUsed);
}

// @ts-ignore: decorator
@inline
function freeEntry(q: Queue): u32 {
  q.entryFreeCount--;
  return load<u16>(q.entryFree + (q.entryFreeCount << 1));
}

/** The walked chain of a packed ring was taken as `id`. It occupies as many entries as descriptors, so there are enough. */
export function takePacked(q: Queue, e: S.Env, id: u32): void {
  const table = walk.tableLength != 0;
  const count = walk.slots;
  const head = freeEntry(q);
  const top = q.inflightAt + PACKED_HEADER;
  let entry = head;
  for (let i: u32 = 0; i < count; i++) {
    const at = top + (entry << 5);
    const from = e.scratch + i * 24;
    const more = i + 1 < count;
    const next = more ? freeEntry(q) : 0;
    const flags: u32 = table ? S.F_INDIRECT : (i < walk.readable ? 0 : S.F_WRITE) | (more ? S.F_NEXT : 0);
    store<u16>(q.entryNext + (entry << 1), <u16>next);
    store<u16>(at, <u16>next, 2);
    store<u16>(at, <u16>id, 16);
    store<u16>(at, <u16>flags, 18);
    store<u32>(at, table ? walk.tableLength : load<u32>(from, 16), 20);
    store<u64>(at, table ? walk.tableAddress : load<u64>(from, 8), 24);
    if (!more) store<u16>(top + (head << 5), <u16>entry, 4);
    entry = next;
  }
  store<u16>(q.entryCount + (head << 1), <u16>count);
  const at = top + (head << 5);
  store<u16>(at, <u16>count, 6);
  store<u64>(at, <u64>q.inflightCounter, 8);
  q.inflightCounter += 1;
  store<u16>(q.entryOf + (id << 1), <u16>head);
  store8(at, S.INFLIGHT_TAKEN);
}

function storePosition(q: Queue): void {
  store32(q.inflightAt + 24, q.inflightUsed | q.inflightNext << 16);
}

/** The same as giveSplit, for a packed ring. */
export function givePacked(q: Queue, id: u32): void {
  const head = <u32>load<u16>(q.entryOf + (id << 1));
  const wrap = q.inflightNext & 0x8000;
  const slot = (q.inflightNext & 0x7fff) + load<u16>(q.entryCount + (head << 1));
  q.inflightNext = slot >= q.guestNum ? (slot - q.guestNum) | (wrap ^ 0x8000) : slot | wrap;
  // The position first: a chain marked as given where both positions are the same counts as gone.
  storePosition(q);
  store8(q.inflightAt + PACKED_HEADER + (head << 5), S.INFLIGHT_GIVEN);
  note(q, id);
}

function flushedPacked(q: Queue): void {
  q.inflightUsed = q.inflightNext;
  storePosition(q);
  for (let i: u32 = 0; i < q.inflightBatchLength; i++) {
    const id = <u32>load<u16>(q.inflightBatch + (i << 1));
    const head = <u32>load<u16>(q.entryOf + (id << 1));
    let entry = head;
    for (let left = <u32>load<u16>(q.entryCount + (head << 1)); left > 0; left--) {
      store<u16>(q.entryFree + (q.entryFreeCount << 1), <u16>entry);
      q.entryFreeCount++;
      entry = load<u16>(q.entryNext + (entry << 1));
    }
    store8(q.inflightAt + PACKED_HEADER + (head << 5), S.INFLIGHT_IDLE);
  }
  q.inflightBatchLength = 0;
}

/** The guest can see what was given. */
export function flushed(q: Queue): void {
  if (q.guestPacked) flushedPacked(q);
  else flushedSplit(q);
}
