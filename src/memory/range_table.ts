/**
 * Lookups in mapped guest memory for the data path: built in a Worker from the plain ranges that the main thread gives it.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { bufferAt } from "../ffi/mod.ts";
import type { MappedRange } from "./region.ts";

/**
 * Translates guest addresses (GPA or IOVA) to addresses of this process. It owns nothing: the giver of the ranges keeps them
 * mapped for as long as this table is used. Lookups allocate nothing and remember the range they hit last.
 */
export class RangeTable {
  readonly #starts: Float64Array;
  readonly #ends: Float64Array;
  readonly #addresses: Float64Array;
  #last = 0;

  /**
   * Sorts and copies the ranges.
   *
   * @param ranges in any order; they must not overlap
   */
  constructor(ranges: readonly MappedRange[]) {
    const sorted = [...ranges].sort((a, b) => a.gpa - b.gpa);
    this.#starts = Float64Array.from(sorted, (range) => range.gpa);
    this.#ends = Float64Array.from(sorted, (range) => range.gpa + range.size);
    this.#addresses = Float64Array.from(sorted, (range) => range.address);
  }

  /** How many ranges it holds. */
  get count(): number {
    return this.#starts.length;
  }

  #indexOf(gpa: number): number {
    const last = this.#last;
    if (gpa >= this.#starts[last]! && gpa < this.#ends[last]!) return last;
    let low = 0;
    let high = this.#starts.length - 1;
    while (low <= high) {
      const middle = (low + high) >>> 1;
      if (gpa < this.#starts[middle]!) high = middle - 1;
      else if (gpa >= this.#ends[middle]!) low = middle + 1;
      else return this.#last = middle;
    }
    return -1;
  }

  /** Bytes from `gpa` to the end of the one mapping it lies in; 0 outside of memory. */
  runLength(gpa: number): number {
    const index = this.#indexOf(gpa);
    return index < 0 ? 0 : this.#ends[index]! - gpa;
  }

  /** The address of `[gpa, gpa + length)` in this process, or -1 where it does not lie in one mapping. */
  find(gpa: number, length: number): number {
    const index = this.#indexOf(gpa);
    if (index < 0 || !(gpa + length <= this.#ends[index]!)) return -1;
    return this.#addresses[index]! + (gpa - this.#starts[index]!);
  }

  /** Like {@linkcode find}. @throws SvqError OUTSIDE_MEMORY instead of -1 */
  addressOf(gpa: number, length: number): number {
    const address = this.find(gpa, length);
    if (address < 0) {
      throw new SvqError("OUTSIDE_MEMORY", `Guest memory 0x${gpa.toString(16)}+0x${length.toString(16)} does not lie in one memory region`);
    }
    return address;
  }

  /** Is all of `[gpa, gpa + length)` guest memory? It may span adjacent ranges. */
  contains(gpa: number, length: number): boolean {
    let index = this.#indexOf(gpa);
    if (index < 0 || !(length >= 0)) return false;
    const end = gpa + length;
    while (end > this.#ends[index]!) {
      if (index + 1 === this.#starts.length || this.#starts[index + 1] !== this.#ends[index]) return false;
      index++;
    }
    return true;
  }

  /** A buffer over `[gpa, gpa + length)`. @throws SvqError OUTSIDE_MEMORY */
  buffer(gpa: number, length: number): ArrayBuffer {
    return bufferAt(this.addressOf(gpa, length), length);
  }
}
