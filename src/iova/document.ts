/**
 * The JSON document `svq.iova/1`: what `svq iova plan -j` prints, and what a relay reports of its live allocations.
 *
 * @module
 */
import type { IovaAllocation, IovaPermission } from "./allocation.ts";
import type { IovaPlan, TranslatedReason } from "./plan.ts";
import { formatAddress, type IovaRange } from "./range.ts";

/** A range in JSON, both ends inclusive, `0x…`. */
export interface RangeDocument {
  /** Lowest address. */
  first: string;
  /** Highest address. */
  last: string;
}

/** One allocation in JSON. */
export interface AllocationDocument {
  /** First address, `0x…`. */
  iova: string;
  /** Bytes. */
  size_bytes: number;
  /** Address space. */
  asid: number;
  /** What the device may do there. */
  perm: IovaPermission;
  /** Owner. */
  tag: string;
}

/** An allocation as {@linkcode IovaDocument} has it. */
export function allocationDocument({ iova, size, asid, perm, tag }: IovaAllocation): AllocationDocument {
  return { iova: formatAddress(iova), size_bytes: Number(size), asid, perm, tag };
}

/** See the module text. Addresses are `0x…` strings; within version 1 keys are only added. */
export interface IovaDocument {
  /** Name and version of this shape. */
  schema: "svq.iova/1";
  /** The device's usable range; with several, from the first to the last of them. */
  range: RangeDocument;
  /** Every usable range. */
  ranges: RangeDocument[];
  /** Holes in them. */
  reserved: (RangeDocument & { tag?: string })[];
  /** Page size of the mapping. */
  align_bytes: number;
  /** Guest memory, by address space and GPA. `reason` and `detail` say why `identity` is false. */
  regions: {
    gpa: string;
    iova: string;
    size_bytes: number;
    identity: boolean;
    asid: number;
    name: string;
    reason?: TranslatedReason;
    detail?: string;
  }[];
  /** Everything allocated: guest memory and arenas, by address space and IOVA. */
  allocations: AllocationDocument[];
  /** Free ranges, by address space and address. */
  free: (RangeDocument & { asid: number })[];
  /** 1 − largest free range / all free bytes, of the address space where it is worst. */
  fragmentation: number;
  /** The same per address space. */
  spaces: { asid: number; free_bytes: number; largest_free_bytes: number; allocated_bytes: number; fragmentation: number }[];
}

/** The document of a layout as it is now. */
export function iovaDocument(plan: IovaPlan): IovaDocument {
  const ranges = plan.ranges.toSorted((a, b) => a.first < b.first ? -1 : 1);
  const lasts = ranges.map(({ last }) => last);
  const spaces = plan.spaces.map((space) => ({
    asid: space.asid,
    free_bytes: Number(space.freeBytes),
    largest_free_bytes: Number(space.largestFree),
    allocated_bytes: Number(space.allocatedBytes),
    fragmentation: round(space.fragmentation()),
  }));
  return {
    schema: "svq.iova/1",
    range: hex({ first: ranges[0]!.first, last: lasts.reduce((a, b) => a > b ? a : b) }),
    ranges: ranges.map(hex),
    reserved: plan.reserved.map((hole) => hole.tag === undefined ? hex(hole) : { ...hex(hole), tag: hole.tag }),
    align_bytes: plan.align,
    regions: plan.regions.map(({ gpa, iova, size, identity, asid, name, reason, detail }) => ({
      gpa: formatAddress(gpa),
      iova: formatAddress(iova),
      size_bytes: size,
      identity,
      asid,
      name,
      ...(reason === undefined ? {} : { reason }),
      ...(detail === undefined ? {} : { detail }),
    })),
    allocations: plan.spaces.flatMap((space) => space.entries().map(allocationDocument)),
    free: plan.spaces.flatMap((space) => space.freeRanges().map((range) => ({ ...hex(range), asid: space.asid }))),
    fragmentation: Math.max(...spaces.map(({ fragmentation }) => fragmentation)),
    spaces,
  };
}

function hex({ first, last }: IovaRange): RangeDocument {
  return { first: formatAddress(first), last: formatAddress(last) };
}

/** Six digits: a figure to read and compare. */
function round(value: number): number {
  return Math.round(value * 1e6) / 1e6;
}
