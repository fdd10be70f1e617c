/**
 * Ranges of the 64-bit I/O virtual address space, as VHOST_VDPA_GET_IOVA_RANGE gives them: first and last byte, both
 * inclusive, so that the whole space 0..2^64-1 can be said. bigint here, at the edge; the allocator counts in pages.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";

/** A range of addresses, both ends inclusive, bytes. */
export interface IovaRange {
  /** Lowest address. */
  readonly first: bigint;
  /** Highest address. */
  readonly last: bigint;
}

/** A hole in which nothing may be placed, with a name for messages (e.g. `msi`). */
export interface ReservedRange extends IovaRange {
  /** Who claims it. */
  readonly tag?: string | undefined;
}

/** Highest 64-bit address. */
export const IOVA_MAX: bigint = 2n ** 64n - 1n;

/** An address as svq prints it: `0x…`. */
export function formatAddress(address: bigint | number): string {
  return `0x${address.toString(16)}`;
}

/** A range as svq prints it: `0x0-0xffff`. */
export function formatRange(range: IovaRange): string {
  return `${formatAddress(range.first)}-${formatAddress(range.last)}`;
}

/** Bytes in a range: at least 1, at most 2^64. */
export function rangeSize(range: IovaRange): bigint {
  return range.last - range.first + 1n;
}

/** Checks a range from outside. @throws {SvqError} IOVA_INVALID when the ends are swapped or outside 64 bits */
export function checkRange(range: IovaRange): void {
  if (range.first >= 0n && range.first <= range.last && range.last <= IOVA_MAX) return;
  throw new SvqError(
    "IOVA_INVALID",
    `Range ${formatAddress(range.first)}..${formatAddress(range.last)} is not a range of 64-bit addresses`,
    {
      exitCode: EXIT.usage,
      hint: "Give the first and the last address, both inclusive, the lower one first.",
    },
  );
}

/** Whether two ranges share an address. */
export function rangesOverlap(a: IovaRange, b: IovaRange): boolean {
  return a.first <= b.last && b.first <= a.last;
}

/** Whether `inner` lies in `outer` entirely. */
export function rangeContains(outer: IovaRange, inner: IovaRange): boolean {
  return outer.first <= inner.first && inner.last <= outer.last;
}

/** The common part of two ranges. */
export function intersectRanges(a: IovaRange, b: IovaRange): IovaRange | undefined {
  if (!rangesOverlap(a, b)) return undefined;
  return { first: a.first > b.first ? a.first : b.first, last: a.last < b.last ? a.last : b.last };
}

/** The same addresses in order, overlapping and adjacent ranges merged. */
export function mergeRanges(ranges: readonly IovaRange[]): IovaRange[] {
  const sorted = ranges.toSorted((a, b) => a.first < b.first ? -1 : a.first > b.first ? 1 : 0);
  const merged: { first: bigint; last: bigint }[] = [];
  for (const { first, last } of sorted) {
    const previous = merged.at(-1);
    if (previous === undefined || first > previous.last + 1n) merged.push({ first, last });
    else if (last > previous.last) previous.last = last;
  }
  return merged;
}

/** The addresses of `ranges` that are in none of `holes`, in order and merged. */
export function subtractRanges(ranges: readonly IovaRange[], holes: readonly IovaRange[]): IovaRange[] {
  const result: IovaRange[] = [];
  const cuts = mergeRanges(holes);
  for (const range of mergeRanges(ranges)) {
    let first = range.first;
    for (const hole of cuts) {
      if (hole.last < first) continue;
      if (hole.first > range.last) break;
      if (hole.first > first) result.push({ first, last: hole.first - 1n });
      first = hole.last + 1n;
    }
    if (first <= range.last) result.push({ first, last: range.last });
  }
  return result;
}

/** A range shrunk to whole pages; undefined when it holds none. @param pageSize power of two, bytes */
export function shrinkToPages(range: IovaRange, pageSize: bigint): IovaRange | undefined {
  const first = (range.first + pageSize - 1n) / pageSize * pageSize;
  const end = (range.last + 1n) / pageSize * pageSize;
  return first < end ? { first, last: end - 1n } : undefined;
}

/** A range grown to whole pages. @param pageSize power of two, bytes */
export function growToPages(range: IovaRange, pageSize: bigint): IovaRange {
  return { first: range.first / pageSize * pageSize, last: (range.last / pageSize + 1n) * pageSize - 1n };
}
