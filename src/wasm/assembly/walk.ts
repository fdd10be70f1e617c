/** Reading the guest's chains into private memory, checked. */
import * as S from "./state";
import { Env, fail, Queue } from "./state";
import { contains, copyTable } from "./memory";

/** The chain last walked: segments, those at the front that are readable, bytes, ring descriptors. */
export let count: u32 = 0;
export let readable: u32 = 0;
export let readableBytes: u64 = 0;
export let writableBytes: u64 = 0;
export let slots: u32 = 0;
/** The indirect table that it lay in; no bytes: none. */
export let tableAddress: u64 = 0;
export let tableLength: u32 = 0;

/** Begins an empty chain. */
export function begin(): void {
  count = 0;
  readable = 0;
  readableBytes = 0;
  writableBytes = 0;
  slots = 0;
  tableLength = 0;
}

/** Appends a segment to the scratch chain without checks. */
export function put(e: Env, address: u64, length: u32, writable: bool): void {
  const at = e.scratch + count * 24;
  store<u64>(at, address);
  store<u64>(at, address, 8);
  store<u32>(at, length, 16);
  count++;
  if (writable) {
    writableBytes += length;
  } else {
    readableBytes += length;
    readable = count;
  }
}

// @ts-ignore: decorator
@inline
function append(q: Queue, e: Env, head: u32, index: u32, address: u64, length: u32, flags: u32): i32 {
  if (length == 0) return fail(q, S.DESCRIPTOR_EMPTY, index);
  if (count >= q.maxChain) return fail(q, S.CHAIN_TOO_LONG, head);
  if (!contains(e, address, length)) return fail(q, S.OUTSIDE_MEMORY, index);
  const writable = (flags & S.F_WRITE) != 0;
  if (!writable && writableBytes != 0) return fail(q, S.READABLE_AFTER_WRITABLE, index);
  put(e, address, length, writable);
  return 0;
}

/** Copies and checks an indirect table's place. @returns its descriptors, or an error */
function table(q: Queue, e: Env, head: u32, address: u64, length: u32): i32 {
  if (length == 0 || (length & 15) != 0) return fail(q, S.INDIRECT_SIZE, head);
  const entries = length >> 4;
  if (entries > q.maxChain) {
    q.errorValue = entries;
    return fail(q, S.INDIRECT_TOO_LONG, head);
  }
  if (!contains(e, address, length) || !copyTable(e, address, length)) return fail(q, S.OUTSIDE_MEMORY, head);
  tableAddress = address;
  tableLength = length;
  return <i32>entries;
}

/** Walks the chain at `head` of a split ring. @returns 0 or an error */
export function walkSplit(q: Queue, e: Env, head: u32): i32 {
  let base = q.guestDesc;
  let size = q.guestNum;
  let index = head;
  let steps: u32 = 0;
  let indirect = false;
  begin();
  for (;;) {
    const at = base + (index << 4);
    const address = load<u64>(at);
    const rest = load<u64>(at, 8);
    const length = <u32>rest;
    const flags = <u32>(rest >> 32) & 0xffff;
    if (++steps > size) return fail(q, S.CHAIN_LOOP, head);
    if (address > S.LIMIT - length) return fail(q, S.ADDRESS_LIMIT, index);
    if ((flags & S.F_INDIRECT) != 0) {
      if (!q.guestIndirect) return fail(q, S.INDIRECT_NOT_NEGOTIATED, index);
      if (indirect) return fail(q, S.INDIRECT_NESTED, index);
      if ((flags & S.F_NEXT) != 0) return fail(q, S.INDIRECT_WITH_NEXT, index);
      const entries = table(q, e, head, address, length);
      if (entries < 0) return entries;
      size = <u32>entries;
      base = e.table;
      indirect = true;
      slots = steps;
      steps = 0;
      index = 0;
      continue;
    }
    const error = append(q, e, head, index, address, length, flags);
    if (error < 0) return error;
    if ((flags & S.F_NEXT) == 0) break;
    index = <u32>(rest >> 48);
    if (index >= size) return fail(q, S.NEXT_OUT_OF_RANGE, index);
  }
  if (!indirect) slots = steps;
  if (readableBytes + writableBytes > S.CHAIN_LIMIT) return fail(q, S.CHAIN_BYTES, head);
  return 0;
}

/** Are a packed descriptor's flags those of an available one in a lap? */
// @ts-ignore: decorator
@inline
export function available(flags: u32, wrap: u32): bool {
  return (flags & S.PACKED_STATE) == (wrap == 1 ? S.PACKED_AVAIL : S.PACKED_USED);
}

/** Walks the chain in slot `head` of a packed ring. @returns its id, unchecked, or an error */
export function walkPacked(q: Queue, e: Env, head: u32, headFlags: u32): i32 {
  const room = q.guestNum - q.openSlots;
  let slot = head;
  let wrap = q.guestSeen;
  let flags = headFlags;
  begin();
  let taken: u32 = 1;
  let id: u32 = 0;
  for (;;) {
    const at = q.guestDesc + (slot << 4);
    const address = load<u64>(at);
    const rest = load<u64>(at, 8);
    const length = <u32>rest;
    if (taken > 1) {
      flags = <u32>(rest >> 48);
      if (!available(flags, wrap)) return fail(q, S.PACKED_LIST_BROKEN, slot);
    }
    if (address > S.LIMIT - length) return fail(q, S.ADDRESS_LIMIT, slot);
    const more = (flags & S.F_NEXT) != 0;
    if ((flags & S.F_INDIRECT) != 0) {
      if (!q.guestIndirect) return fail(q, S.INDIRECT_NOT_NEGOTIATED, slot);
      if (more) return fail(q, S.INDIRECT_WITH_NEXT, slot);
      if (taken > 1) return fail(q, S.PACKED_INDIRECT_MIXED, slot);
      const error = walkTable(q, e, head, address, length);
      if (error < 0) return error;
    } else {
      const error = append(q, e, head, slot, address, length, flags);
      if (error < 0) return error;
    }
    id = <u32>(rest >> 32) & 0xffff;
    if (!more) break;
    if (taken == room) return fail(q, S.CHAIN_LOOP, head);
    taken++;
    if (++slot == q.guestNum) {
      slot = 0;
      wrap ^= 1;
    }
  }
  slots = taken;
  if (readableBytes + writableBytes > S.CHAIN_LIMIT) return fail(q, S.CHAIN_BYTES, head);
  return <i32>id;
}

function walkTable(q: Queue, e: Env, head: u32, place: u64, bytes: u32): i32 {
  const entries = table(q, e, head, place, bytes);
  for (let index: u32 = 0; <i32>index < entries; index++) {
    const at = e.table + (index << 4);
    const address = load<u64>(at);
    const rest = load<u64>(at, 8);
    const length = <u32>rest;
    const flags = <u32>(rest >> 48);
    if ((flags & S.F_INDIRECT) != 0) return fail(q, S.INDIRECT_NESTED, index);
    if (address > S.LIMIT - length) return fail(q, S.ADDRESS_LIMIT, index);
    const error = append(q, e, head, index, address, length, flags);
    if (error < 0) return error;
  }
  return entries < 0 ? entries : 0;
}
