/**
 * A memory table as both ends of vhost-user need it: guest addresses on one side, the front-end's addresses on the other.
 *
 * @module
 */
import { SvqError } from "../errors.ts";

/** The part of a region that translation needs. */
export interface TableRegion {
  /** Guest address (or IOVA), bytes. */
  gpa: number;
  /** Bytes. */
  size: number;
  /** Address in the front-end, bytes. */
  uaddr: number;
}

const hex = (address: number): string => `0x${address.toString(16)}`;

/** Regions that do not overlap in guest addresses. In the front-end's they may: one memory can show at two guest addresses. */
export class RegionTable<Region extends TableRegion> {
  readonly #regions: Region[] = [];

  /** The regions, in the order in which they came. */
  get regions(): readonly Region[] {
    return this.#regions;
  }

  /** Puts `region` in. @throws SvqError REGION_OVERLAP */
  add(region: Region): void {
    this.check(region);
    this.#regions.push(region);
  }

  /** Would {@linkcode add} take it? @throws SvqError REGION_OVERLAP if not */
  check(region: TableRegion): void {
    for (const other of this.#regions) {
      if (region.gpa < other.gpa + other.size && other.gpa < region.gpa + region.size) {
        throw new SvqError(
          "REGION_OVERLAP",
          `Memory region ${hex(region.gpa)}+${hex(region.size)} overlaps ${hex(other.gpa)}+${hex(other.size)}`,
        );
      }
    }
  }

  /** The region with exactly this address, size and front-end address. */
  find(wanted: TableRegion): Region | undefined {
    return this.#regions.find((region) => region.gpa === wanted.gpa && region.size === wanted.size && region.uaddr === wanted.uaddr);
  }

  /** Takes `region` out; harmless where it is not in the table. */
  delete(region: Region): void {
    const at = this.#regions.indexOf(region);
    if (at >= 0) this.#regions.splice(at, 1);
  }

  /** Empties the table and returns what was in it. */
  clear(): Region[] {
    return this.#regions.splice(0);
  }

  /**
   * The guest address of `length` bytes at the front-end's address `uaddr`.
   *
   * @param what for the message: `descriptor table of ring 0`
   * @throws SvqError RING_OUTSIDE_MEMORY unless all of them lie in one region
   */
  toGpa(uaddr: number, length: number, what: string): number {
    for (const region of this.#regions) {
      if (uaddr >= region.uaddr && uaddr + length <= region.uaddr + region.size) return region.gpa + (uaddr - region.uaddr);
    }
    throw new SvqError("RING_OUTSIDE_MEMORY", `${what}: ${length} bytes at front-end address ${hex(uaddr)} lie in no memory region`);
  }

  /** The inverse of {@linkcode toGpa}. @throws SvqError RING_OUTSIDE_MEMORY */
  toUaddr(gpa: number, length: number, what: string): number {
    for (const region of this.#regions) {
      if (gpa >= region.gpa && gpa + length <= region.gpa + region.size) return region.uaddr + (gpa - region.gpa);
    }
    throw new SvqError("RING_OUTSIDE_MEMORY", `${what}: ${length} bytes at guest address ${hex(gpa)} lie in no memory region`);
  }
}

/** Bytes of the three parts of a ring. */
export interface RingSizes {
  /** Descriptor table or ring. */
  desc: number;
  /** Avail ring; packed: driver event area. */
  avail: number;
  /** Used ring; packed: device event area. */
  used: number;
}

/** The sizes of a ring of `num` descriptors with the event words (virtio 1.3, 2.7 and 2.8). */
export function ringSizes(num: number, packed: boolean): RingSizes {
  return packed ? { desc: 16 * num, avail: 4, used: 4 } : { desc: 16 * num, avail: 6 + 2 * num, used: 6 + 8 * num };
}
