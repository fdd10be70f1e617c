/**
 * The dirty log: one bit per page of 4096 bytes, least significant bit first, in memory that several agents share. Source:
 * vhost-user protocol text ("Migration"); linux/vhost.h (VHOST_SET_LOG_BASE).
 *
 * Writers write the data, then set the bit; readers take the bits, then read the data. Both use sequentially consistent
 * atomics, so that no write is missed.
 *
 * @module
 */
import { SvqError } from "../errors.ts";

/** Bytes of a page of the log; fixed by the protocol. */
export const LOG_PAGE_BYTES = 4096;

/** Bytes of a log that covers guest addresses below `end`, rounded up to whole 32-bit words. */
export function logBytes(end: number): number {
  return Math.ceil(end / (LOG_PAGE_BYTES * 32)) * 4;
}

/** Consecutive dirty pages. */
export interface PageRun {
  /** Number of the first page. */
  page: number;
  /** Pages. */
  count: number;
}

/** A bitmap of dirty pages over shared or private memory. */
export class DirtyBitmap {
  /** Pages that the log covers. */
  readonly pages: number;
  readonly #words: Int32Array;
  #rejected = 0;

  /**
   * Lays the bitmap over memory, which keeps its contents.
   *
   * @param buffer the log
   * @param byteOffset where it starts, a multiple of 4
   * @param size bytes, rounded down to whole 32-bit words; default to the end of the buffer
   * @throws SvqError BAD_LOG when it is misaligned or does not fit
   */
  constructor(buffer: ArrayBuffer | SharedArrayBuffer, byteOffset: number = 0, size: number = buffer.byteLength - byteOffset) {
    if (!(Number.isInteger(byteOffset) && byteOffset >= 0 && byteOffset % 4 === 0)) {
      throw new SvqError("BAD_LOG", `A dirty log starts at byte ${byteOffset}, which is no multiple of 4`);
    }
    if (!(Number.isInteger(size) && size >= 0 && byteOffset + size <= buffer.byteLength)) {
      throw new SvqError("BAD_LOG", `A dirty log of ${size} bytes does not fit in ${buffer.byteLength - byteOffset}`);
    }
    this.#words = new Int32Array(buffer, byteOffset, Math.floor(size / 4));
    this.pages = this.#words.length * 32;
  }

  /** A private, empty bitmap that covers guest addresses below `end` (bytes). */
  static covering(end: number): DirtyBitmap {
    return new DirtyBitmap(new ArrayBuffer(logBytes(end)));
  }

  /** Ranges that lay outside the log, wholly or in part: a reason to distrust the migration. */
  get rejected(): number {
    return this.#rejected;
  }

  /**
   * Marks every page that `[gpa, gpa + length)` touches; allocates nothing. Of a range that leaves the log, the pages inside
   * are marked.
   *
   * @param gpa bytes, below 2^52
   * @param length bytes; 0 marks nothing
   * @returns false when a page lies outside the log (counted in {@linkcode rejected})
   */
  markRange(gpa: number, length: number): boolean {
    if (!(length > 0)) return true;
    const first = Math.floor(gpa / LOG_PAGE_BYTES);
    let last = Math.floor((gpa + length - 1) / LOG_PAGE_BYTES);
    let inside = true;
    if (!(gpa >= 0 && last < this.pages)) {
      this.#rejected++;
      if (!(gpa >= 0 && first < this.pages)) return false;
      inside = false;
      last = this.pages - 1;
    }
    const words = this.#words;
    // A page number below 2^40 does not fit a shift of 32 bits: divide.
    const firstWord = Math.floor(first / 32);
    const lastWord = Math.floor(last / 32);
    const head = -1 << (first & 31);
    const tail = -1 >>> (31 - (last & 31));
    if (firstWord === lastWord) {
      this.#set(firstWord, head & tail);
      return inside;
    }
    this.#set(firstWord, head);
    for (let word = firstWord + 1; word < lastWord; word++) {
      if (Atomics.load(words, word) !== -1) Atomics.store(words, word, -1);
    }
    this.#set(lastWord, tail);
    return inside;
  }

  /**
   * Marks the pages `first` to `last` by number, where both are below 2^31 and lie in one word of the log; does nothing
   * otherwise. It is what a data path calls for each buffer.
   *
   * The test is a plain load. What the device wrote is ordered before it, since the device's index was read by an atomic load
   * before; and a bit that is seen set has not been taken by the reader yet, so the reader copies the page after that. An atomic load
   * would be ordered no more against a reader that comes later, and is a call in V8.
   *
   * @returns false when nothing was marked: then it is for {@linkcode markRange}
   */
  markWithinWord(first: number, last: number): boolean {
    const word = first >>> 5;
    if (last >= this.pages || word !== last >>> 5) return false;
    const bits = (-1 << (first & 31)) & (-1 >>> (31 - (last & 31)));
    if ((this.#words[word]! & bits) !== bits) Atomics.or(this.#words, word, bits);
    return true;
  }

  /** Marks one page by number. @returns false when it lies outside the log */
  markPage(page: number): boolean {
    if (!(page >= 0 && page < this.pages)) {
      this.#rejected++;
      return false;
    }
    this.#set(Math.floor(page / 32), 1 << (page & 31));
    return true;
  }

  /** Marks every page of the log. */
  markAll(): void {
    for (let word = 0; word < this.#words.length; word++) Atomics.store(this.#words, word, -1);
  }

  #set(word: number, bits: number): void {
    // Tested first: most pages are dirty already, and a test leaves the cache line shared.
    if ((Atomics.load(this.#words, word) & bits) !== bits) Atomics.or(this.#words, word, bits);
  }

  /** Is the page marked? False outside the log. */
  has(page: number): boolean {
    return page >= 0 && page < this.pages && (Atomics.load(this.#words, Math.floor(page / 32)) & (1 << (page & 31))) !== 0;
  }

  /** Clears everything. */
  clear(): void {
    for (let word = 0; word < this.#words.length; word++) Atomics.store(this.#words, word, 0);
  }

  /** Dirty pages. */
  count(): number {
    let sum = 0;
    for (let word = 0; word < this.#words.length; word++) sum += bitCount(Atomics.load(this.#words, word));
    return sum;
  }

  /** Adds all marks to `target`. @returns false when some lay beyond its end (counted as rejected there) */
  orInto(target: DirtyBitmap): boolean {
    return this.#pour(target, false);
  }

  /**
   * Moves all marks into `target`: each word is swapped with 0 in one step, so a mark that a writer sets meanwhile lands here
   * or there and is never lost.
   *
   * @returns false when some lay beyond the end of `target` (counted as rejected there)
   */
  harvest(target: DirtyBitmap): boolean {
    return this.#pour(target, true);
  }

  #pour(target: DirtyBitmap, taking: boolean): boolean {
    const words = this.#words;
    const limit = target.#words.length;
    let inside = true;
    for (let word = 0; word < words.length; word++) {
      let bits = Atomics.load(words, word);
      if (bits === 0) continue;
      if (taking) bits = Atomics.exchange(words, word, 0);
      if (word < limit) {
        target.#set(word, bits);
      } else if (bits !== 0) {
        inside = false;
        target.#rejected++;
      }
    }
    return inside;
  }

  /** The first run of dirty pages at or after page `from`; undefined when there is none. Meant for a private bitmap. */
  nextRun(from: number): PageRun | undefined {
    const page = this.#find(from, 0);
    return page < this.pages ? { page, count: this.#find(page, -1) - page } : undefined;
  }

  /** All runs of dirty pages in order. Meant for a private bitmap. */
  *runs(): Generator<PageRun, void, undefined> {
    for (let run = this.nextRun(0); run !== undefined; run = this.nextRun(run.page + run.count)) yield run;
  }

  /** The first page at or after `from` that is set (`flip` 0) or clear (`flip` -1); the number of pages when there is none. */
  #find(from: number, flip: 0 | -1): number {
    const words = this.#words;
    let word = Math.floor(from / 32);
    if (word >= words.length) return this.pages;
    let bits = (Atomics.load(words, word) ^ flip) & (-1 << (from & 31));
    while (bits === 0) {
      if (++word === words.length) return this.pages;
      bits = Atomics.load(words, word) ^ flip;
    }
    return word * 32 + 31 - Math.clz32(bits & -bits);
  }
}

function bitCount(value: number): number {
  let bits = value - ((value >>> 1) & 0x5555_5555);
  bits = (bits & 0x3333_3333) + ((bits >>> 2) & 0x3333_3333);
  return Math.imul((bits + (bits >>> 4)) & 0x0f0f_0f0f, 0x0101_0101) >>> 24;
}
