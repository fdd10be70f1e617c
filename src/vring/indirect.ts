/**
 * Indirect tables, copied out of guest memory before anything in them is looked at.
 *
 * @module
 */
import { DESC_BYTES } from "./layout.ts";
import type { RingMemory } from "./queue.ts";
import { VringError } from "./rules.ts";

/** Reads one indirect table at a time into private memory. */
export class IndirectReader {
  /** The table last read: four words per descriptor. Valid until the next `read`. */
  words: Uint32Array = new Uint32Array(0);
  readonly #memory: RingMemory | undefined;
  readonly #max: number;

  /**
   * Allocates nothing until the first table is read.
   *
   * @param memory where tables lie; without it every table is outside memory
   * @param max longest table, in descriptors
   */
  constructor(memory: RingMemory | undefined, max: number) {
    this.#memory = memory;
    this.#max = max;
  }

  /**
   * Copies the table at `address` into {@linkcode words}.
   *
   * @param head for messages: the chain that it belongs to
   * @param address of the table, below 2^52
   * @param length of the table, bytes
   * @param limit longest table accepted, in descriptors
   * @returns its descriptors
   * @throws VringError INDIRECT_SIZE, INDIRECT_TOO_LONG, OUTSIDE_MEMORY
   */
  read(head: number, address: number, length: number, limit: number): number {
    if (length === 0 || length % DESC_BYTES !== 0) {
      throw new VringError("INDIRECT_SIZE", head, `The indirect table of chain ${head} has ${length} bytes`);
    }
    const count = length / DESC_BYTES;
    if (count > limit) {
      throw new VringError(
        "INDIRECT_TOO_LONG",
        head,
        `The indirect table of chain ${head} has ${count} descriptors, the limit is ${limit}`,
      );
    }
    if (this.words.length === 0) this.words = new Uint32Array(this.#max * 4);
    if (!this.#copy(address, length)) {
      const where = `0x${address.toString(16)}+${length}`;
      throw new VringError("OUTSIDE_MEMORY", head, `The indirect table of chain ${head}, ${where}, is not in memory`);
    }
    return count;
  }

  #copy(address: number, length: number): boolean {
    const memory = this.#memory;
    if (memory === undefined || !memory.contains(address, length)) return false;
    if (memory.readWords !== undefined) return memory.readWords(address, this.words, length >> 2);
    // A table that spans two regions is not one buffer: put together from pages, which no region divides.
    for (let done = 0; done < length;) {
      const start = address + done;
      const part = Math.min(length - done, 4096 - (start % 4096));
      const source = new Uint8Array(memory.buffer(start, part), 0, part);
      new Uint8Array(this.words.buffer, done, part).set(source);
      done += part;
    }
    return true;
  }
}
