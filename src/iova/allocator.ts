/**
 * The IOVA allocator: one {@linkcode IovaSpace} per address space (ASID) of a device. It hands out ranges of whole pages
 * inside the device's usable range and outside reserved holes, never two that overlap: the kernel would only answer EFAULT.
 *
 * Addresses are bigint at this edge. Inside everything is counted in pages of at least 4096 bytes: 2^64 bytes are at most
 * 2^52 pages, which numbers hold exactly. Every operation is O(log n) in the number of allocations, except that a search
 * with an alignment above the page size also passes the free ranges that are long enough but hold no aligned place.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { type AllocOptions, IOTLB_PERM, type IovaAllocation, type IovaSpaceOptions, type IovaSpaceRecord } from "./allocation.ts";
import { formatSizeExact } from "../units.ts";
import { type Extent, ExtentTree, type FitEnd } from "./extent_tree.ts";
import {
  checkRange,
  formatAddress,
  formatRange,
  growToPages,
  IOVA_MAX,
  type IovaRange,
  mergeRanges,
  rangeContains,
  rangesOverlap,
  type ReservedRange,
  shrinkToPages,
  subtractRanges,
} from "./range.ts";

const MIN_PAGE_SIZE = 4096n;

/** The allocations of one address space; see the module text. */
export class IovaSpace {
  /** Address space identifier. */
  readonly asid: number;
  /** Granularity, bytes. */
  readonly pageSize: bigint;
  /** Usable ranges, as given. */
  readonly ranges: readonly IovaRange[];
  /** Reserved holes, as given. */
  readonly reserved: readonly ReservedRange[];
  /** Whole pages of `ranges`, merged. */
  readonly #pageRanges: readonly IovaRange[];
  readonly #free = new ExtentTree<undefined>();
  readonly #used = new ExtentTree<IovaAllocation>();

  /** An empty space. @throws {SvqError} IOVA_INVALID for a malformed range, page size or ASID; IOVA_EXHAUSTED when no page is usable at all */
  constructor({ asid = 0, ranges, reserved = [], pageSize = MIN_PAGE_SIZE }: IovaSpaceOptions) {
    if (!isPowerOfTwo(pageSize) || pageSize < MIN_PAGE_SIZE) {
      throw invalid(
        `Page size ${pageSize} is not a power of two of at least ${MIN_PAGE_SIZE} bytes`,
        "Use the page size of the IOMMU: 4KiB, 16KiB, 64KiB, 2MiB.",
      );
    }
    if (!Number.isInteger(asid) || asid < 0 || asid > 0xffffffff) {
      throw invalid(`Address space ${asid} is not a 32-bit number`, "Number address spaces from 0.");
    }
    [...ranges, ...reserved].forEach(checkRange);
    this.asid = asid;
    this.pageSize = pageSize;
    this.ranges = ranges.map(({ first, last }) => ({ first, last }));
    this.reserved = reserved.map(({ first, last, tag }) => ({ first, last, tag }));
    this.#pageRanges = mergeRanges(this.ranges).map((range) => shrinkToPages(range, pageSize)).filter((range) => range !== undefined);
    for (const { first, last } of subtractRanges(this.#pageRanges, this.reserved.map((hole) => growToPages(hole, pageSize)))) {
      this.#free.insert(Number(first / pageSize), Number(last / pageSize) + 1, undefined);
    }
    if (this.#free.size === 0) {
      throw new SvqError("IOVA_EXHAUSTED", `No page of ${this.#usable()} is usable in address space ${asid}`, {
        hint: "The device's range is empty, or reserved ranges cover it: check the range and the holes.",
      });
    }
  }

  /** Number of allocations. */
  get count(): number {
    return this.#used.size;
  }

  /** Free bytes. */
  get freeBytes(): bigint {
    return BigInt(this.#free.units) * this.pageSize;
  }

  /** Bytes in the largest free range: the largest allocation (without further alignment) that would succeed. */
  get largestFree(): bigint {
    return BigInt(this.#free.longest) * this.pageSize;
  }

  /** Allocated bytes. */
  get allocatedBytes(): bigint {
    return BigInt(this.#used.units) * this.pageSize;
  }

  /** Tree nodes looked at so far, a measure of work that does not depend on the machine. */
  get visits(): number {
    return this.#free.visits + this.#used.visits;
  }

  /** 1 − largest free range / all free bytes: 0 when the free space is one range (or none is left), towards 1 when shattered. */
  fragmentation(): number {
    return this.#free.units === 0 ? 0 : 1 - this.#free.longest / this.#free.units;
  }

  /**
   * Allocates at the highest address where `size` bytes fit.
   *
   * @param size bytes, a multiple of the page size
   * @throws {SvqError} IOVA_EXHAUSTED, IOVA_UNALIGNED, IOVA_INVALID
   */
  allocTopDown(size: bigint, options: AllocOptions): IovaAllocation {
    return this.#allocFit(size, options, "highest");
  }

  /** The same at the lowest address. @throws {SvqError} as {@linkcode IovaSpace.allocTopDown} */
  allocBottomUp(size: bigint, options: AllocOptions): IovaAllocation {
    return this.#allocFit(size, options, "lowest");
  }

  /**
   * Allocates exactly [iova, iova + size).
   *
   * @throws {SvqError} IOVA_OVERLAP (names the owner), IOVA_RESERVED, IOVA_OUTSIDE_RANGE, IOVA_UNALIGNED, IOVA_INVALID
   */
  allocAt(iova: bigint, size: bigint, options: AllocOptions): IovaAllocation {
    const pages = this.#pages(size);
    const start = this.#page(iova, "Address");
    const align = options.align ?? this.pageSize;
    const { units, phase } = this.#alignment(align, options.congruentTo);
    if ((start - phase) % units !== 0) {
      throw new SvqError("IOVA_UNALIGNED", `Address ${formatAddress(iova)} is not aligned to ${formatSizeExact(Number(align))}`, {
        hint: `Use a multiple of ${formatAddress(align)}${phase === 0 ? "" : ` plus ${formatAddress(BigInt(phase) * this.pageSize)}`}.`,
      });
    }
    const refusal = this.#conflict(start, pages);
    if (refusal !== undefined) throw refusal;
    return this.#take(start, pages, options);
  }

  /** Why {@linkcode IovaSpace.allocAt} would refuse, or undefined when it would not. @throws {SvqError} IOVA_UNALIGNED, IOVA_INVALID */
  conflict(iova: bigint, size: bigint): SvqError | undefined {
    return this.#conflict(this.#page(iova, "Address"), this.#pages(size));
  }

  /**
   * Frees one allocation, named exactly by address and size.
   *
   * @throws {SvqError} IOVA_NOT_ALLOCATED, IOVA_PARTIAL_FREE (part of an allocation, or more than one), IOVA_UNALIGNED
   */
  free(iova: bigint, size: bigint): IovaAllocation {
    const pages = this.#pages(size);
    const start = this.#page(iova, "Address");
    const found = this.#used.at(start) ?? this.#used.firstOverlap(start, start + pages);
    if (found === undefined) {
      throw new SvqError("IOVA_NOT_ALLOCATED", `Nothing is allocated in ${formatSpan(iova, size)} of address space ${this.asid}`, {
        hint: "It was freed before, or belongs to another address space; list the allocations to see.",
      });
    }
    if (found.start !== start || found.end !== start + pages) {
      throw new SvqError("IOVA_PARTIAL_FREE", `${formatSpan(iova, size)} is not one allocation: it meets ${describe(found.value)}`, {
        hint: "Free an allocation with the address and the size it was made with; parts cannot be freed.",
      });
    }
    this.#release(found);
    return found.value;
  }

  /**
   * Frees every allocation inside a range, in one step: nothing happens when one of them reaches out of it.
   *
   * @returns what was freed, in order of address
   * @throws {SvqError} IOVA_PARTIAL_FREE
   */
  release(range: IovaRange): IovaAllocation[] {
    checkRange(range);
    const start = Number(range.first / this.pageSize);
    const end = Number(range.last / this.pageSize) + 1;
    const inside: Extent<IovaAllocation>[] = [];
    for (let at = start, next; (next = this.#used.firstOverlap(at, end)) !== undefined; at = next.end) {
      const { iova, size } = next.value;
      if (iova < range.first || iova + size - 1n > range.last) {
        throw new SvqError("IOVA_PARTIAL_FREE", `${describe(next.value)} reaches out of ${formatRange(range)}`, {
          hint: "Release a range that holds whole allocations.",
        });
      }
      inside.push({ start: next.start, end: next.end, value: next.value });
    }
    inside.forEach((extent) => this.#release(extent));
    return inside.map(({ value }) => value);
  }

  /** The allocation that holds an address. */
  find(iova: bigint): IovaAllocation | undefined {
    if (iova < 0n || iova > IOVA_MAX) return undefined;
    return this.#used.at(Number(iova / this.pageSize))?.value;
  }

  /** All allocations, in order of address. */
  entries(): IovaAllocation[] {
    return Array.from(this.#used, ({ value }) => value);
  }

  /** All free ranges, in order; no two are adjacent. */
  freeRanges(): IovaRange[] {
    return Array.from(this.#free, ({ start, end }) => this.#range(start, end - start));
  }

  /** A copy that shares nothing with this one. */
  clone(): IovaSpace {
    const copy = new IovaSpace(this);
    for (const entry of this.#used) copy.#take(entry.start, entry.end - entry.start, entry.value);
    return copy;
  }

  /** The space as plain data, for JSON, a Worker or a migration stream. */
  serialise(): IovaSpaceRecord {
    const hex = ({ first, last }: IovaRange) => ({ first: formatAddress(first), last: formatAddress(last) });
    return {
      asid: this.asid,
      page_size: Number(this.pageSize),
      ranges: this.ranges.map(hex),
      reserved: this.reserved.map((hole) => hole.tag === undefined ? hex(hole) : { ...hex(hole), tag: hole.tag }),
      allocations: this.entries().map(({ iova, size, perm, tag }) => ({ iova: formatAddress(iova), size: formatAddress(size), perm, tag })),
    };
  }

  /** The inverse of {@linkcode IovaSpace.serialise}; the record is not trusted. @throws {SvqError} as the constructor and `allocAt` */
  static deserialise(record: IovaSpaceRecord): IovaSpace {
    const space = new IovaSpace({
      asid: record.asid,
      pageSize: toBigInt(record.page_size),
      ranges: record.ranges.map(({ first, last }) => ({ first: toBigInt(first), last: toBigInt(last) })),
      reserved: record.reserved.map(({ first, last, tag }) => ({ first: toBigInt(first), last: toBigInt(last), tag })),
    });
    for (const { iova, size, perm, tag } of record.allocations) space.allocAt(toBigInt(iova), toBigInt(size), { perm, tag });
    return space;
  }

  #allocFit(size: bigint, options: AllocOptions, end: FitEnd): IovaAllocation {
    const pages = this.#pages(size);
    const align = options.align ?? this.pageSize;
    const { units, phase } = this.#alignment(align, options.congruentTo);
    const start = this.#free.fit(pages, { end, align: units, phase });
    if (start < 0) throw this.#exhausted(size, align);
    return this.#take(start, pages, options);
  }

  /** Moves pages from free to used; they are known to be free. */
  #take(start: number, pages: number, { tag, perm = "rw" }: AllocOptions): IovaAllocation {
    if (!Object.hasOwn(IOTLB_PERM, perm)) {
      throw invalid(`Permission ${JSON.stringify(perm)} is none of ro, wo, rw`, "ro: the device reads; wo: it writes; rw: both.");
    }
    const end = start + pages;
    const gap = this.#free.at(start)!;
    const { start: gapStart, end: gapEnd } = gap;
    if (gapStart < start) {
      this.#free.resize(gapStart, gapStart, start);
      if (end < gapEnd) this.#free.insert(end, gapEnd, undefined);
    } else if (end < gapEnd) {
      this.#free.resize(gapStart, end, gapEnd);
    } else {
      this.#free.remove(gapStart);
    }
    const { first } = this.#range(start, pages);
    const allocation: IovaAllocation = { iova: first, size: BigInt(pages) * this.pageSize, asid: this.asid, perm, tag };
    this.#used.insert(start, end, allocation);
    return allocation;
  }

  #release({ start, end }: Extent<IovaAllocation>): void {
    this.#used.remove(start);
    const before = start === 0 ? undefined : this.#free.at(start - 1);
    const after = this.#free.at(end);
    const newEnd = after === undefined ? end : after.end;
    if (after !== undefined) this.#free.remove(after.start);
    if (before === undefined) this.#free.insert(start, newEnd, undefined);
    else this.#free.resize(before.start, before.start, newEnd);
  }

  #conflict(start: number, pages: number): SvqError | undefined {
    const gap = this.#free.at(start);
    if (gap !== undefined && gap.end >= start + pages) return undefined;
    const wanted = this.#range(start, pages);
    // What can never be had comes before what another owner has now.
    if (!this.#pageRanges.some((range) => rangeContains(range, wanted))) {
      return new SvqError("IOVA_OUTSIDE_RANGE", `${formatRange(wanted)} is outside the usable range ${this.#usable()}`, {
        hint: "The device cannot address it: choose an address inside, or let the allocator choose.",
      });
    }
    const hole = this.reserved.find((range) => rangesOverlap(growToPages(range, this.pageSize), wanted));
    if (hole !== undefined) {
      const name = hole.tag === undefined ? "" : ` (${hole.tag})`;
      return new SvqError("IOVA_RESERVED", `${formatRange(wanted)} meets the reserved range ${formatRange(hole)}${name}`, {
        hint: "Choose an address outside it, or let the allocator choose.",
      });
    }
    const other = this.#used.firstOverlap(start, start + pages)!.value;
    return new SvqError("IOVA_OVERLAP", `${formatRange(wanted)} overlaps ${describe(other)} in address space ${this.asid}`, {
      hint: `Choose another address, or free ${other.tag} first.`,
    });
  }

  #exhausted(size: bigint, align: bigint): SvqError {
    const aligned = align === this.pageSize ? "" : ` aligned to ${formatSizeExact(Number(align))}`;
    const message =
      `No ${formatSizeExact(Number(size))}${aligned} free in address space ${this.asid}: ${
        formatSizeExact(Number(this.freeBytes))
      } free in ` +
      `${this.#free.size} ranges, the largest ${formatSizeExact(Number(this.largestFree))}, of ${this.#usable()}`;
    let hint = "The device's range is too small for this: free something, use fewer or smaller regions, or a device with a wider range.";
    if (this.largestFree >= size) hint = `The alignment of ${formatSizeExact(Number(align))} cannot be met: ask for a smaller one.`;
    else if (this.freeBytes >= size) hint = "The free space is fragmented: allocate large ranges first, or split the request.";
    return new SvqError("IOVA_EXHAUSTED", message, { hint });
  }

  #usable(): string {
    return this.ranges.map(formatRange).join(", ") || "no range";
  }

  #range(start: number, pages: number): IovaRange {
    const first = BigInt(start) * this.pageSize;
    return { first, last: first + BigInt(pages) * this.pageSize - 1n };
  }

  /** A size in pages. */
  #pages(size: bigint): number {
    if (size <= 0n) throw invalid(`Size ${size} is not positive`, "Ask for at least one page.");
    return this.#page(size, "Size");
  }

  #page(value: bigint, what: "Address" | "Size"): number {
    if (value < 0n || value > IOVA_MAX + (what === "Size" ? 1n : 0n)) {
      throw invalid(`${what} ${value} does not fit 64 bits`, "Addresses go from 0 to 0xffffffffffffffff.");
    }
    if (value % this.pageSize !== 0n) {
      throw new SvqError(
        "IOVA_UNALIGNED",
        `${what} ${formatAddress(value)} is not a multiple of the page size ${formatSizeExact(Number(this.pageSize))}`,
        {
          hint: "The device maps whole pages: round the address down and the size up.",
        },
      );
    }
    return Number(value / this.pageSize);
  }

  #alignment(align: bigint, congruentTo = 0n): { units: number; phase: number } {
    if (!isPowerOfTwo(align) || align < this.pageSize || align > IOVA_MAX) {
      throw invalid(
        `Alignment ${align} is not a power of two of at least the page size ${this.pageSize}`,
        "Use a power of two, or leave it out.",
      );
    }
    return { units: Number(align / this.pageSize), phase: this.#page(congruentTo % align, "Address") };
  }
}

function isPowerOfTwo(value: bigint): boolean {
  return value > 0n && (value & (value - 1n)) === 0n;
}

function formatSpan(iova: bigint, size: bigint): string {
  return formatRange({ first: iova, last: iova + size - 1n });
}

function describe({ tag, iova, size }: IovaAllocation): string {
  return `${tag} at ${formatSpan(iova, size)}`;
}

function toBigInt(value: string | number): bigint {
  try {
    return BigInt(value);
  } catch (cause) {
    throw new SvqError("IOVA_INVALID", `${JSON.stringify(value)} is not a number`, {
      cause,
      hint: "The record is damaged, or was written by something else.",
    });
  }
}

function invalid(message: string, hint: string): SvqError {
  return new SvqError("IOVA_INVALID", message, { exitCode: EXIT.usage, hint });
}
