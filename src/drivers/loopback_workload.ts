/**
 * The checked loopback workload: stamped data goes out in several segments and must come back in others.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import type { Chain } from "../vring/queue.ts";
import { BLOCK_BYTES } from "./layout.ts";
import { Random } from "./random.ts";
import { describeFound, hasStamp, writeStamp } from "./stamp.ts";
import { BlockPool, type GuestRam, logWrite, type Tally, visitPieces, type Workload, type WorkloadState } from "./workload.ts";

// Data goes out in the first half of a block and comes back in the second.
const HALF_WORDS = BLOCK_BYTES / 8;
const MAX_PIECES = 8;

/** What shapes a loopback workload. Plain data. */
export interface LoopbackWorkloadOptions {
  /** Random numbers and stamps follow from it. */
  seed: number;
}

interface Request {
  count: number;
  outPieces: number;
  inPieces: number;
  sequence: number;
  block: number;
}

/** Drives a loopback device. */
export class LoopbackWorkload implements Workload {
  readonly #ram: GuestRam;
  readonly #seed: number;
  readonly #tally: Tally;
  readonly #random: Random;
  readonly #requests: Request[];
  readonly #out: boolean[];
  #blocks: BlockPool;
  #sequence = 1;
  readonly #stamp = new Int32Array(HALF_WORDS);
  // Sequence number of the request that the stamp is of; 0 for none.
  #stamped = 0;

  /** A workload at its beginning. */
  constructor(ram: GuestRam, options: LoopbackWorkloadOptions, tally: Tally) {
    this.#ram = ram;
    this.#seed = options.seed;
    this.#tally = tally;
    this.#random = new Random(options.seed);
    const { slots, blocks } = ram.layout;
    this.#requests = Array.from({ length: slots }, () => ({ count: 0, outPieces: 0, inPieces: 0, sequence: 0, block: 0 }));
    this.#out = Array.from({ length: slots }, () => false);
    this.#blocks = new BlockPool(blocks, new Set());
  }

  #offsetOut(request: Request): number {
    return this.#ram.layout.blockOffset(request.block);
  }

  #offsetIn(request: Request): number {
    return this.#offsetOut(request) + BLOCK_BYTES / 2;
  }

  /** Makes an echo request; see {@linkcode Workload.prepare}. */
  prepare(slot: number, chain: Chain): boolean {
    const { layout, words } = this.#ram;
    const request = this.#requests[slot]!;
    request.count = this.#random.below(10) === 0 ? 1 + this.#random.below(HALF_WORDS) : 1 + this.#random.below(512);
    request.outPieces = 1 + this.#random.below(Math.min(MAX_PIECES, request.count));
    request.inPieces = 1 + this.#random.below(Math.min(MAX_PIECES, request.count));
    request.sequence = this.#sequence++ >>> 0;
    request.block = this.#blocks.take();
    this.#out[slot] = true;
    chain.clear();
    // Stamped in the order of the stream: each piece is a stamp of its own, so that a swapped piece shows.
    visitPieces(request.count, request.outPieces, (first, units, place) => {
      const at = this.#offsetOut(request) + place * 4;
      for (let i = 0; i < units; i++) words[(at >> 2) + i] = this.#word(request, first + i);
      chain.addReadable(layout.gpa(at), units * 4);
    });
    visitPieces(request.count, request.inPieces, (_first, units, place) => {
      chain.addWritable(layout.gpa(this.#offsetIn(request) + place * 4), units * 4);
    });
    words.fill(0x55aa55aa, this.#offsetIn(request) >> 2, (this.#offsetIn(request) >> 2) + request.count);
    logWrite(this.#ram, this.#offsetOut(request), request.count * 4);
    logWrite(this.#ram, this.#offsetIn(request), request.count * 4);
    return true;
  }

  // The stream of one request is one long stamp, made once and read word by word.
  #word(request: Request, index: number): number {
    if (this.#stamped !== request.sequence) {
      writeStamp(this.#stamp, 0, HALF_WORDS, request.count, request.sequence, this.#seed);
      this.#stamped = request.sequence;
    }
    return this.#stamp[index]!;
  }

  /** Takes a request back that never went out. */
  cancel(slot: number): void {
    this.#sequence = this.#requests[slot]!.sequence;
    // The number will be used again, for another request.
    this.#stamped = 0;
    this.#release(slot);
  }

  #release(slot: number): void {
    this.#blocks.put(this.#requests[slot]!.block);
    this.#out[slot] = false;
  }

  /** Judges an echo; see {@linkcode Workload.finish}. */
  finish(slot: number, written: number): boolean {
    const request = this.#requests[slot]!;
    const { words } = this.#ram;
    this.#tally.counters.bytes += request.count * 4;
    const echo = new Int32Array(request.count);
    visitPieces(request.count, request.inPieces, (first, units, place) => {
      const at = (this.#offsetIn(request) >> 2) + place;
      echo.set(words.subarray(at, at + units), first);
    });
    this.#release(slot);
    if (written !== request.count * 4) {
      this.#tally.fault(`${this.describe(slot)}: the device says that it wrote ${written} bytes`);
      return false;
    }
    this.#tally.counters.verified += request.count;
    if (request.count < 3 || hasStamp(echo, 0, request.count, request.count, request.sequence, this.#seed)) {
      const right = echo.every((word, i) => i >= 3 || word === this.#word(request, i));
      if (right) return true;
    }
    const found = request.count < 3 ? "something else" : describeFound(echo, 0, request.count, this.#seed);
    this.#tally.fault(`${this.describe(slot)}: ${found} came back`);
    return false;
  }

  /** In words. */
  describe(slot: number): string {
    const { sequence, count } = this.#requests[slot]!;
    return `request ${sequence} (echo of ${count * 4} bytes)`;
  }

  /** The state. */
  save(): WorkloadState {
    const slots = this.#requests.map(({ count, outPieces, inPieces, sequence, block }, slot) =>
      this.#out[slot] ? [count, outPieces, inPieces, sequence, block] : null
    );
    return { kind: "loopback", random: this.#random.state, sequence: this.#sequence, slots, table: new Uint32Array(0) };
  }

  /** Takes over a state. @throws SvqError STATE_INVALID */
  restore(state: WorkloadState): void {
    const { slots, blocks } = this.#ram.layout;
    const taken = new Set<number>();
    const invalid = (reason: string) => new SvqError("STATE_INVALID", `The workload's state cannot be used: ${reason}`);
    if (state.kind !== "loopback" || state.slots.length !== slots) throw invalid("it is of another workload");
    state.slots.forEach((values, slot) => {
      this.#out[slot] = values !== null;
      if (values === null) return;
      const [count = 0, outPieces = 0, inPieces = 0, sequence = -1, block = -1] = values;
      const whole = values.length === 5 && values.every((value) => Number.isInteger(value) && value >= 0);
      if (!whole || count < 1 || count > HALF_WORDS || outPieces < 1 || inPieces < 1 || block >= blocks || taken.has(block)) {
        throw invalid(`slot ${slot} is damaged`);
      }
      taken.add(block);
      this.#requests[slot] = { count, outPieces, inPieces, sequence, block };
    });
    this.#blocks = new BlockPool(blocks, taken);
    this.#random.state = state.random | 0;
    this.#sequence = state.sequence;
  }
}
