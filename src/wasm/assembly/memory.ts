/** Guest memory: bounds, translation, indirect tables, the dirty log. */
import { Env } from "./state";

/** Copies an indirect table from where no window shows it. @returns 0 when it is not in memory */
@external("host", "readTable")
declare function readTable(address: f64, bytes: u32, target: u32): u32;

/** Marks a range in a log that has no window. @returns 0 when it leaves the log */
@external("host", "mark")
declare function hostMark(address: f64, bytes: u32): u32;

/** The region that holds `address`; 0 for none. */
function regionOf(e: Env, address: u64): u32 {
  let low: i32 = 0;
  let high: i32 = <i32>e.regionCount - 1;
  while (low <= high) {
    const middle = (low + high) >> 1;
    const region = e.regions + <u32>middle * 24;
    if (address < load<u64>(region)) high = middle - 1;
    else if (address >= load<u64>(region, 8)) low = middle + 1;
    else return region;
  }
  return 0;
}

function containsSlowly(e: Env, address: u64, end: u64): bool {
  let region = regionOf(e, address);
  if (region == 0) return false;
  e.otherFirst = e.lastFirst;
  e.otherEnd = e.lastEnd;
  e.lastFirst = load<u64>(region);
  e.lastEnd = load<u64>(region, 8);
  const past = e.regions + e.regionCount * 24;
  while (end > load<u64>(region, 8)) {
    if (region + 24 == past || load<u64>(region, 24) != load<u64>(region, 8)) return false;
    region += 24;
  }
  return true;
}

/** Is all of `[address, address + length)` guest memory? It ends at or below 2^52. */
// @ts-ignore: decorator
@inline
export function contains(e: Env, address: u64, length: u32): bool {
  const end = address + length;
  return (address >= e.lastFirst && end <= e.lastEnd) || containsSlowly(e, address, end);
}

/** Copies a table of `bytes` into `e.table`. @returns false when it is not in memory */
export function copyTable(e: Env, address: u64, bytes: u32): bool {
  const region = regionOf(e, address);
  if (region == 0) return false;
  const window = load<u32>(region, 16);
  if (window != 0 && address + bytes <= load<u64>(region, 8)) {
    memory.copy(e.table, window + <u32>(address - load<u64>(region)), bytes);
    return true;
  }
  return readTable(<f64>address, bytes, e.table) != 0;
}

/** The span of the translation that holds `address`; 0 for none. */
export function spanOf(e: Env, address: u64): u32 {
  let low: i32 = 0;
  let high: i32 = <i32>e.spanCount - 1;
  while (low <= high) {
    const middle = (low + high) >> 1;
    const span = e.spans + <u32>middle * 24;
    if (address < load<u64>(span)) high = middle - 1;
    else if (address >= load<u64>(span, 8)) low = middle + 1;
    else return span;
  }
  return 0;
}

// @ts-ignore: decorator
@inline
function setBits(word: u32, bits: u32): void {
  // Tested first: most pages are dirty already, and a test leaves the cache line shared.
  if ((atomic.load<u32>(word) & bits) != bits) atomic.or<u32>(word, bits);
}

/** Marks a page that the log has. */
// @ts-ignore: decorator
@inline
export function setPage(log: u32, page: u64): void {
  setBits(log + (<u32>(page >> 5) << 2), 1 << (<u32>page & 31));
}

/** Marks pages of one word of the log, which it has. */
// @ts-ignore: decorator
@inline
export function setSome(log: u32, first: u64, last: u64): void {
  setBits(log + (<u32>(first >> 5) << 2), (<u32>-1 << (<u32>first & 31)) & (<u32>-1 >> (31 - (<u32>last & 31))));
}

/** Marks the pages of a range of at least one byte. @returns false when it leaves the log; the pages inside are marked */
// @ts-ignore: decorator
@inline
export function mark(e: Env, address: u64, length: u32): bool {
  const first = address >> 12;
  const last = (address + length - 1) >> 12;
  if (e.logMode == 1 && last < e.logPages && first >> 5 == last >> 5) {
    setSome(e.log, first, last);
    return true;
  }
  return markSlowly(e, address, length, first, last);
}

function markSlowly(e: Env, address: u64, length: u32, first: u64, end: u64): bool {
  if (e.logMode == 2) return hostMark(<f64>address, length) != 0;
  let last = end;
  if (last >= e.logPages) {
    if (first >= e.logPages) return false;
    last = e.logPages - 1;
  }
  const head = e.log + (<u32>(first >> 5) << 2);
  const tail = e.log + (<u32>(last >> 5) << 2);
  const headBits = <u32>-1 << (<u32>first & 31);
  const tailBits = <u32>-1 >> (31 - (<u32>last & 31));
  if (head == tail) {
    setBits(head, headBits & tailBits);
  } else {
    setBits(head, headBits);
    for (let word = head + 4; word < tail; word += 4) setBits(word, <u32>-1);
    setBits(tail, tailBits);
  }
  return last == end;
}
