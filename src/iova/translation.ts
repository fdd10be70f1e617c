/**
 * GPA -> IOVA and back, for the relay's hot loop: numbers below 2^52, sorted typed arrays, binary search, and the region of
 * the last hit tried first. No allocation per call. A translation does not change; after a hotplug a new one is made.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { ADDRESS_LIMIT } from "../memory/region.ts";

/** One mapped region, bytes. */
export interface TranslatedRegion {
  /** Guest-physical address. */
  readonly gpa: number;
  /** Where the device finds it. */
  readonly iova: number;
  /** Bytes. */
  readonly size: number;
}

/** Answer of a translation: some byte is not mapped. */
export const UNMAPPED: number = -1;

/** Answer of a split: the segments do not fit into the output. */
export const NO_ROOM: number = -2;

/** Where a split writes its segments: {@linkcode Chain} of src/vring has this shape. */
export interface SegmentOutput {
  /** Translated addresses. */
  readonly addresses: Float64Array;
  /** Bytes of each. */
  readonly lengths: Uint32Array;
}

/** One direction: sorted by source address. */
class Direction {
  readonly #from: Float64Array;
  readonly #end: Float64Array;
  /** Target minus source address. */
  readonly #delta: Float64Array;
  #last = 0;

  constructor(spans: readonly { from: number; to: number; size: number }[], space: string) {
    const merged: { from: number; to: number; size: number }[] = [];
    for (const { from, to, size } of spans.toSorted((a, b) => a.from - b.from)) {
      const previous = merged.at(-1);
      if (previous !== undefined && from < previous.from + previous.size) {
        throw new SvqError("IOVA_OVERLAP", `Two regions hold the same ${space} 0x${from.toString(16)}`, {
          hint: "A translation needs one answer for every address: remove one of the regions.",
        });
      }
      if (previous !== undefined && from === previous.from + previous.size && to === previous.to + previous.size) previous.size += size;
      else merged.push({ from, to, size });
    }
    this.#from = Float64Array.from(merged, ({ from }) => from);
    this.#end = Float64Array.from(merged, ({ from, size }) => from + size);
    this.#delta = Float64Array.from(merged, ({ from, to }) => to - from);
  }

  get count(): number {
    return this.#from.length;
  }

  /** Index of the span that holds `address`, or -1. */
  #find(address: number): number {
    const from = this.#from, end = this.#end, last = this.#last;
    if (address >= from[last]! && address < end[last]!) return last;
    let low = 0, high = from.length - 1;
    while (low <= high) {
      const middle = (low + high) >>> 1;
      if (address < from[middle]!) high = middle - 1;
      else if (address >= end[middle]!) low = middle + 1;
      else return this.#last = middle;
    }
    return -1;
  }

  translate(address: number, length: number): number {
    const index = this.#find(address);
    // Negated, so that NaN and an end beyond the span are refused alike.
    if (index < 0 || !(address + length <= this.#end[index]!)) return UNMAPPED;
    return address + this.#delta[index]!;
  }

  split(address: number, length: number, out: SegmentOutput, at: number): number {
    const { addresses, lengths } = out;
    let count = 0;
    do {
      const index = this.#find(address);
      if (index < 0) return UNMAPPED;
      if (at + count >= addresses.length || at + count >= lengths.length) return NO_ROOM;
      const part = Math.min(length, this.#end[index]! - address);
      addresses[at + count] = address + this.#delta[index]!;
      lengths[at + count] = part;
      count++;
      address += part;
      length -= part;
    } while (length > 0);
    return count;
  }
}

/** See the module text. */
export class Translation {
  readonly #toIova: Direction;
  readonly #toGpa: Direction;

  /**
   * Sorts the regions and joins neighbours.
   *
   * @param regions in any order
   * @throws {SvqError} IOVA_OVERLAP for regions that share a GPA or an IOVA, IOVA_ADDRESS_LIMIT beyond 2^52, IOVA_INVALID
   */
  constructor(regions: readonly TranslatedRegion[]) {
    for (const { gpa, iova, size } of regions) {
      if (![gpa, iova, size].every(Number.isSafeInteger) || gpa < 0 || iova < 0 || size <= 0) {
        throw new SvqError("IOVA_INVALID", `Region gpa ${gpa}, iova ${iova}, size ${size} is not made of addresses and a size`, {
          hint: "Both addresses are whole numbers from 0, the size from 1, in bytes.",
        });
      }
      if (gpa + size > ADDRESS_LIMIT || iova + size > ADDRESS_LIMIT) {
        throw new SvqError("IOVA_ADDRESS_LIMIT", `Region at GPA 0x${gpa.toString(16)}, IOVA 0x${iova.toString(16)} ends above 2^52`, {
          hint: "svq handles addresses below 2^52 (4 PiB).",
        });
      }
    }
    this.#toIova = new Direction(regions.map(({ gpa, iova, size }) => ({ from: gpa, to: iova, size })), "GPA");
    this.#toGpa = new Direction(regions.map(({ gpa, iova, size }) => ({ from: iova, to: gpa, size })), "IOVA");
  }

  /** Spans after joining neighbours. */
  get count(): number {
    return this.#toIova.count;
  }

  /** The IOVA of [gpa, gpa + length), or {@linkcode UNMAPPED} when it is not mapped as one piece. */
  toIova(gpa: number, length: number): number {
    return this.#toIova.translate(gpa, length);
  }

  /** The GPA of [iova, iova + length), or {@linkcode UNMAPPED} when it is not mapped as one piece. */
  toGpa(iova: number, length: number): number {
    return this.#toGpa.translate(iova, length);
  }

  /**
   * Translates a segment that may cross regions, in as many pieces as that takes (one in the ordinary case).
   *
   * @param length bytes, below 2^32 as in a descriptor
   * @param at index in `out` of the first piece
   * @returns the number of pieces, {@linkcode UNMAPPED}, or {@linkcode NO_ROOM}; after a negative answer `out` is undefined from `at` on
   */
  splitToIova(gpa: number, length: number, out: SegmentOutput, at: number): number {
    return this.#toIova.split(gpa, length, out, at);
  }

  /** The other way round; see {@linkcode Translation.splitToIova}. */
  splitToGpa(iova: number, length: number, out: SegmentOutput, at: number): number {
    return this.#toGpa.split(iova, length, out, at);
  }
}
