/**
 * Records of the allocator: an allocation, what it is asked for with, and a space as plain data.
 *
 * @module
 */
import type { IovaRange, ReservedRange } from "./range.ts";

/** What the device may do: read, write, or both (VHOST_ACCESS_RO, _WO, _RW). */
export type IovaPermission = "ro" | "wo" | "rw";

/** The `perm` field of struct vhost_iotlb_msg for each permission. */
export const IOTLB_PERM: { readonly [P in IovaPermission]: number } = { ro: 1, wo: 2, rw: 3 };

/** One allocated range. */
export interface IovaAllocation {
  /** First address. */
  readonly iova: bigint;
  /** Bytes, a multiple of the page size. */
  readonly size: bigint;
  /** Address space that it is in. */
  readonly asid: number;
  /** What the device may do there. */
  readonly perm: IovaPermission;
  /** Owner, for people: `guest 0x0`, `arena rings`. */
  readonly tag: string;
}

/** What an allocation is for. */
export interface AllocOptions {
  /** Owner, for people; named when somebody else collides with it. */
  tag: string;
  /** Default `rw`. */
  perm?: IovaPermission;
  /** The address is a multiple of this many bytes (power of two, at least the page size, which is the default). */
  align?: bigint;
  /** With `align`: the address is congruent to this one modulo `align` instead of 0. A multiple of the page size. */
  congruentTo?: bigint;
}

/** What an {@linkcode IovaSpace} is made from. */
export interface IovaSpaceOptions {
  /** Address space identifier (default 0). */
  asid?: number;
  /** Usable by the device. Parts of pages at the ends are not used. */
  ranges: readonly IovaRange[];
  /** Holes in them; pages that they touch are not used. */
  reserved?: readonly ReservedRange[];
  /** Bytes: power of two, at least 4096 (default 4096). */
  pageSize?: bigint;
}

/** An {@linkcode IovaSpace} as JSON-safe data; addresses and sizes are `0x…` strings. */
export interface IovaSpaceRecord {
  /** Address space identifier. */
  asid: number;
  /** Bytes. */
  page_size: number;
  /** Usable ranges. */
  ranges: { first: string; last: string }[];
  /** Reserved holes. */
  reserved: { first: string; last: string; tag?: string }[];
  /** Everything allocated, in order. */
  allocations: { iova: string; size: string; perm: IovaPermission; tag: string }[];
}
