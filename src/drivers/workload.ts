/**
 * What a driver's worker needs of a workload: it makes requests in slots and judges their answers.
 *
 * @module
 */
import type { DirtyBitmap } from "../dirty/bitmap.ts";
import type { Chain } from "../vring/queue.ts";
import type { RamLayout } from "./layout.ts";
import type { DriverCounters, NetReport } from "./report.ts";

/** The guest's RAM as the driver's worker sees it. */
export interface GuestRam {
  /** Where things lie. */
  layout: RamLayout;
  /** All of it, in bytes and words of the same memory. */
  bytes: Uint8Array;
  /** The same in 32-bit words. */
  words: Int32Array;
  /** Where the driver's own writes are recorded, by GPA, while somebody asks for it. */
  log: DirtyBitmap | undefined;
}

/** What a workload reports into. */
export interface Tally {
  /** Counts. */
  counters: DriverCounters;
  /** Records a fault in words. */
  fault: (text: string) => void;
}

/** A checked workload. */
export interface Workload {
  /**
   * Makes a request in `slot` and describes it in `chain`.
   *
   * @returns false when none can be made now
   */
  prepare(slot: number, chain: Chain): boolean;
  /** Takes back a request that did not fit into the ring. */
  cancel(slot: number): void;
  /**
   * Judges an answer.
   *
   * @param written bytes that the device says it wrote
   * @returns whether it was right; undefined where it does not count as a request's answer
   */
  finish(slot: number, written: number): boolean | undefined;
  /** Are the chains of a queue no requests (receive buffers): always offered, and never waited for? */
  background?(queue: number): boolean;
  /** When the next request is due, milliseconds of performance.now(); without it, or 0: at once. */
  readonly nextDue?: number;
  /** Is nothing awaited besides the answers to requests? */
  readonly settled?: boolean;
  /** Requests that were answered, and whose effect did not come. */
  readonly lost?: number;
  /** Network workloads: how it went. */
  report?(): NetReport;
  /** In words, for messages about a request. */
  describe(slot: number): string;
  /** Its state as plain data. */
  save(): WorkloadState;
  /** Takes over a saved state. @throws SvqError STATE_INVALID */
  restore(state: WorkloadState): void;
}

/** A workload's state: JSON besides the table. */
export interface WorkloadState {
  /** Which workload it is of. */
  kind: "blk" | "loopback" | "net";
  /** State of the random numbers. */
  random: number;
  /** Sequence number of the next request. */
  sequence: number;
  /** Per slot: numbers that describe the request that is out there; null for none. */
  slots: (number[] | null)[];
  /** Expected contents: per sector the sequence number of the write, 0 unknown, 2^32 - 1 zeros. net: what came of each stream. */
  table: Uint32Array<ArrayBuffer>;
}

/** Records that the driver wrote `[offset, offset + length)` of its RAM. */
export function logWrite(ram: GuestRam, offset: number, length: number): void {
  ram.log?.markRange(ram.layout.gpa(offset), length);
}

/**
 * How `total` units of data lie in a block: in `pieces` segments, the first of them behind all others, so that no two can be
 * merged. Calls `visit` with each piece's first unit, its units and its first unit in the block.
 */
export function visitPieces(total: number, pieces: number, visit: (first: number, units: number, place: number) => void): void {
  const each = Math.ceil(total / pieces);
  for (let first = 0; first < total; first += each) {
    const units = Math.min(each, total - first);
    visit(first, units, total - first - units);
  }
}

/** Free data blocks, in an order that spreads requests over all of them. */
export class BlockPool {
  readonly #free: Int32Array;
  #first = 0;
  #count: number;

  /** Blocks 0 to `blocks` - 1 without those in `taken`. */
  constructor(blocks: number, taken: ReadonlySet<number>) {
    const free = Array.from({ length: blocks }, (_, i) => i).filter((block) => !taken.has(block));
    this.#free = new Int32Array(blocks);
    this.#free.set(free);
    this.#count = free.length;
  }

  /** Blocks that are free. */
  get free(): number {
    return this.#count;
  }

  /** The block that has been free for longest. There is always one: there are at least as many blocks as slots. */
  take(): number {
    const block = this.#free[this.#first]!;
    this.#first = (this.#first + 1) % this.#free.length;
    this.#count--;
    return block;
  }

  /** Gives a block back. */
  put(block: number): void {
    this.#free[(this.#first + this.#count) % this.#free.length] = block;
    this.#count++;
  }
}
