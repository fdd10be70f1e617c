/**
 * What a receiver of numbered frames knows of each sender: what came, twice, late or not at all, and how long nothing came.
 *
 * @module
 */
import { SvqError } from "../errors.ts";

const WINDOW = 32768;
const WINDOW_WORDS = WINDOW / 32;
const STREAM_WORDS = WINDOW_WORDS + 10;
/** Senders that are told apart, at most. */
export const MAX_STREAMS = 64;

/** How a frame came. */
export type Arrival = "new" | "late" | "duplicate";

class Stream {
  readonly seen = new Uint32Array(WINDOW_WORDS);
  next = 0;
  distinct = 0;
  lastMs = 0;
  longestGapMs = 0;

  constructor(readonly id: number) {}

  arrive(sequence: number, nowMs: number): Arrival {
    if (sequence >= this.next) {
      // What lies between was not seen yet.
      const skipped = sequence - this.next;
      if (skipped >= WINDOW) this.seen.fill(0);
      else for (let i = this.next; i < sequence; i++) this.#mark(i, false);
      this.next = sequence + 1;
      this.#count(sequence, nowMs);
      return "new";
    }
    // So old that nobody remembers: it counts as a duplicate rather than as a gain.
    if (this.next - sequence > WINDOW || (this.seen[(sequence % WINDOW) >> 5]! >>> (sequence & 31) & 1) === 1) return "duplicate";
    this.#count(sequence, nowMs);
    return "late";
  }

  #count(sequence: number, nowMs: number): void {
    this.#mark(sequence, true);
    if (this.distinct++ > 0) this.longestGapMs = Math.max(this.longestGapMs, nowMs - this.lastMs);
    this.lastMs = nowMs;
  }

  #mark(sequence: number, seen: boolean): void {
    const word = (sequence % WINDOW) >> 5;
    const bit = 1 << (sequence & 31);
    this.seen[word] = seen ? this.seen[word]! | bit : this.seen[word]! & ~bit;
  }
}

/** All senders that were heard. */
export class NetStreams {
  readonly #streams = new Map<number, Stream>();

  /**
   * Notes a frame.
   *
   * @param nowMs of a clock that goes on over a migration
   * @returns how it came, or undefined when there are too many senders already
   */
  arrive(stream: number, sequence: number, nowMs: number): Arrival | undefined {
    let known = this.#streams.get(stream);
    if (known === undefined) {
      if (this.#streams.size === MAX_STREAMS) return undefined;
      this.#streams.set(stream, known = new Stream(stream));
    }
    return known.arrive(sequence, nowMs);
  }

  /** Frames that came, each once. */
  distinct(stream?: number): number {
    if (stream !== undefined) return this.#streams.get(stream)?.distinct ?? 0;
    return [...this.#streams.values()].reduce((sum, { distinct }) => sum + distinct, 0);
  }

  /** Frames that a later one overtook and that have not come. */
  get missing(): number {
    return [...this.#streams.values()].reduce((sum, { next, distinct }) => sum + next - distinct, 0);
  }

  /** Longest time between two frames of one sender, milliseconds. */
  get longestGapMs(): number {
    return [...this.#streams.values()].reduce((most, { longestGapMs }) => Math.max(most, longestGapMs), 0);
  }

  /** Everything, as words. */
  save(): Uint32Array<ArrayBuffer> {
    const table = new Uint32Array(this.#streams.size * STREAM_WORDS);
    [...this.#streams.values()].forEach((stream, i) => {
      const at = i * STREAM_WORDS;
      table[at] = stream.id;
      const numbers = new DataView(table.buffer, (at + 2) * 4, 32);
      numbers.setFloat64(0, stream.next, true);
      numbers.setFloat64(8, stream.distinct, true);
      numbers.setFloat64(16, stream.lastMs, true);
      numbers.setFloat64(24, stream.longestGapMs, true);
      table.set(stream.seen, at + 10);
    });
    return table;
  }

  /** Takes over what {@linkcode save} gave. @throws SvqError STATE_INVALID */
  restore(table: Uint32Array): void {
    if (table.length % STREAM_WORDS !== 0 || table.length / STREAM_WORDS > MAX_STREAMS) {
      throw new SvqError("STATE_INVALID", "The workload's state cannot be used: its streams are damaged");
    }
    this.#streams.clear();
    for (let at = 0; at < table.length; at += STREAM_WORDS) {
      const stream = new Stream(table[at]!);
      const numbers = new DataView(table.buffer, table.byteOffset + (at + 2) * 4, 32);
      stream.next = numbers.getFloat64(0, true);
      stream.distinct = numbers.getFloat64(8, true);
      stream.lastMs = numbers.getFloat64(16, true);
      stream.longestGapMs = numbers.getFloat64(24, true);
      if (!Number.isSafeInteger(stream.next) || !(stream.distinct <= stream.next)) {
        throw new SvqError("STATE_INVALID", `The workload's state cannot be used: stream ${stream.id} is damaged`);
      }
      stream.seen.set(table.subarray(at + 10, at + STREAM_WORDS));
      this.#streams.set(stream.id, stream);
    }
  }
}
