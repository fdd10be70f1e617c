/**
 * Lookups in mapped guest memory for the data path: built in a Worker from the plain ranges that the main thread gives it.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { bufferAt } from "../ffi/mod.ts";
import type { MappedRange } from "./region.ts";

// Views for small reads and writes cover this much of a range each (typed arrays have a size limit).
const WINDOW = 2 ** 28;

interface Window {
  bytes: Uint8Array;
  words: Uint32Array;
}

/**
 * Translates guest addresses (GPA or IOVA) to addresses of this process. It owns nothing: the giver of the ranges keeps them
 * mapped for as long as this table is used. Lookups allocate nothing and remember the range they hit last.
 */
export class RangeTable {
  readonly #starts: Float64Array;
  readonly #ends: Float64Array;
  readonly #addresses: Float64Array;
  readonly #windows: (Window | undefined)[][];
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
    this.#windows = sorted.map(() => []);
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

  /** First address of the range that the last successful lookup hit, bytes: whoever looks up one address after the other can keep it. */
  get hitStart(): number {
    return this.#starts[this.#last]!;
  }

  /** The end of that range, bytes. */
  get hitEnd(): number {
    return this.#ends[this.#last]!;
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

  #window(index: number, offset: number): Window {
    const number = Math.floor(offset / WINDOW);
    const existing = this.#windows[index]![number];
    if (existing !== undefined) return existing;
    const start = number * WINDOW;
    const size = Math.min(WINDOW, this.#ends[index]! - this.#starts[index]! - start);
    const buffer = bufferAt(this.#addresses[index]! + start, size);
    // A region at an odd file offset lies at an odd address: bytes only.
    const words = this.#addresses[index]! % 4 === 0 ? size >> 2 : 0;
    const window = { bytes: new Uint8Array(buffer), words: new Uint32Array(words === 0 ? new ArrayBuffer(0) : buffer, 0, words) };
    this.#windows[index]![number] = window;
    return window;
  }

  /** The byte at `gpa`. @throws SvqError OUTSIDE_MEMORY */
  readByte(gpa: number): number {
    this.addressOf(gpa, 1);
    const offset = gpa - this.#starts[this.#last]!;
    return this.#window(this.#last, offset).bytes[offset % WINDOW]!;
  }

  /** Stores one byte at `gpa`. @throws SvqError OUTSIDE_MEMORY */
  writeByte(gpa: number, value: number): void {
    this.addressOf(gpa, 1);
    const offset = gpa - this.#starts[this.#last]!;
    this.#window(this.#last, offset).bytes[offset % WINDOW] = value;
  }

  /**
   * Copies `count` little-endian 32-bit words at `gpa` into `target` without allocating.
   *
   * @returns false when they are not all in memory; `target` is undefined then
   */
  readWords(gpa: number, target: Uint32Array, count: number): boolean {
    const index = this.#indexOf(gpa);
    if (index < 0) return false;
    const offset = gpa - this.#starts[index]!;
    const first = offset % WINDOW / 4;
    const { words } = this.#window(index, offset);
    if (Number.isInteger(first) && first + count <= words.length) {
      for (let i = 0; i < count; i++) target[i] = words[first + i]!;
      return true;
    }
    if (!this.contains(gpa, count * 4)) return false;
    for (let i = 0; i < count; i++) {
      let word = 0;
      for (let byte = 3; byte >= 0; byte--) word = word << 8 | this.readByte(gpa + i * 4 + byte);
      target[i] = word;
    }
    return true;
  }

  /**
   * Copies `length` bytes at `gpa` to `target[at]` and on, without allocating much.
   *
   * @returns false when they are not all in memory; `target` is undefined there then
   */
  readBytes(gpa: number, target: Uint8Array, at: number, length: number): boolean {
    if (!this.contains(gpa, length)) return false;
    for (let done = 0; done < length;) {
      const index = this.#indexOf(gpa + done);
      const offset = gpa + done - this.#starts[index]!;
      const { bytes } = this.#window(index, offset);
      const from = offset % WINDOW;
      const part = Math.min(length - done, bytes.length - from);
      target.set(bytes.subarray(from, from + part), at + done);
      done += part;
    }
    return true;
  }

  /** A buffer over `[gpa, gpa + length)`. @throws SvqError OUTSIDE_MEMORY */
  buffer(gpa: number, length: number): ArrayBuffer {
    return bufferAt(this.addressOf(gpa, length), length);
  }
}
