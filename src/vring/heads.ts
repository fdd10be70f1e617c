/**
 * The driver's side of a split ring whose descriptors are somebody else's: only the avail ring is written and only the
 * used ring read. It is what relay mode `used` offers a device: the guest's descriptor table, with an avail ring and a
 * used ring of the relay's own.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import {
  checkSplitNum,
  eventPassed,
  type RingPart,
  VRING_AVAIL_F_NO_INTERRUPT,
  VRING_USED_F_NO_NOTIFY,
  words16,
  words32,
} from "./layout.ts";
import type { Chain, DriverQueue, DriverQueueState } from "./queue.ts";
import { VringError } from "./rules.ts";

/** Where the two rings lie, for {@linkcode HeadDriver}. */
export interface HeadDriverOptions {
  /** Queue size, a power of two: the descriptor table's. */
  num: number;
  /** Avail ring, zeroed. */
  avail: RingPart;
  /** Used ring, zeroed. */
  used: RingPart;
  /** EVENT_IDX was negotiated. */
  eventIdx: boolean;
}

/**
 * Implements {@linkcode DriverQueue} over heads: `addChain` publishes the chain's own id, which is the head in the table that
 * the device reads. A chain's id is its id here.
 */
export class HeadDriver implements DriverQueue {
  /** Always `split`. */
  readonly layout = "split";
  /** Queue size in descriptors. */
  readonly num: number;
  /** See {@linkcode DriverQueue.usedLength}. */
  usedLength = 0;
  readonly #mask: number;
  readonly #eventIdx: boolean;
  readonly #avail: Uint16Array;
  readonly #usedIdx: Uint16Array;
  readonly #usedRing: Uint32Array;
  /** Writable bytes of heads at the device; -1 for the others. */
  readonly #writable: Float64Array;
  #availNext = 0;
  #availPublished = 0;
  #lastUsed = 0;
  #usedSeen = 0;

  /** @throws VringError RING_SIZE or RING_ALIGNMENT */
  constructor(options: HeadDriverOptions) {
    const { num, eventIdx } = options;
    checkSplitNum(num);
    this.num = num;
    this.#mask = num - 1;
    this.#eventIdx = eventIdx;
    const event = eventIdx ? 2 : 0;
    this.#avail = words16("avail ring", options.avail, 4 + 2 * num + event, 2);
    this.#usedIdx = words16("used ring", options.used, 4 + 8 * num + event, 4);
    this.#usedRing = words32("used ring", options.used, 4 + 8 * num, 4);
    this.#writable = new Float64Array(num).fill(-1);
  }

  /** Heads that can still be offered. */
  get numFree(): number {
    return this.num - this.inflight;
  }

  /** Heads at the device, or waiting for `publish`. */
  get inflight(): number {
    return (this.#availNext - this.#lastUsed) & 0xffff;
  }

  /** There are no descriptors of its own to put segments in. @throws SvqError UNSUPPORTED */
  add(): number {
    throw new SvqError("UNSUPPORTED", "Only chains that lie in the device's descriptor table can be offered");
  }

  /** Offers the chain by its head. @returns the head, or -1 when the ring is full */
  addChain(chain: Chain): number {
    const head = chain.id;
    if (this.inflight === this.num) return -1;
    if (this.#writable[head] !== -1) throw new VringError("HEAD_IN_FLIGHT", head, `Descriptor ${head} is in flight already`);
    this.#writable[head] = chain.writableBytes;
    this.#avail[2 + (this.#availNext & this.#mask)] = head;
    this.#availNext = (this.#availNext + 1) & 0xffff;
    return head;
  }

  /** Makes added heads available; see {@linkcode DriverQueue.publish}. @returns whether the device wants a kick */
  publish(): boolean {
    const old = this.#availPublished;
    const now = this.#availNext;
    if (now === old) return false;
    Atomics.store(this.#avail, 1, now);
    this.#availPublished = now;
    return this.#eventIdx
      ? eventPassed(Atomics.load(this.#usedIdx, 2 + 4 * this.num), now, old)
      : (Atomics.load(this.#usedIdx, 0) & VRING_USED_F_NO_NOTIFY) === 0;
  }

  /** Takes the next used head; see {@linkcode DriverQueue.take}. @throws VringError */
  take(): number {
    const position = this.#lastUsed;
    if (position === this.#usedSeen && !this.#look()) return -1;
    const word = 1 + ((position & this.#mask) << 1);
    const head = this.#usedRing[word]!;
    const length = this.#usedRing[word + 1]!;
    if (head >= this.num) {
      throw new VringError("USED_ID_OUT_OF_RANGE", position, `Used entry ${position} holds ${head} in a queue of ${this.num}`);
    }
    const writable = this.#writable[head]!;
    if (writable < 0) {
      throw new VringError("USED_NOT_IN_FLIGHT", head, `Used entry ${position} holds ${head}, which the device does not have`);
    }
    this.#writable[head] = -1;
    this.usedLength = length < writable ? length : writable;
    this.#lastUsed = (position + 1) & 0xffff;
    return head;
  }

  #look(): boolean {
    const idx = Atomics.load(this.#usedIdx, 1);
    const ahead = (idx - this.#lastUsed) & 0xffff;
    if (ahead > ((this.#availPublished - this.#lastUsed) & 0xffff)) {
      throw new VringError(
        "USED_INDEX_JUMP",
        idx,
        `The used index is ${idx} where ${this.#lastUsed} was reached and the avail index is ${this.#availPublished}`,
      );
    }
    this.#usedSeen = idx;
    return ahead !== 0;
  }

  /** Tells the device that calls are not needed (a hint). */
  disableCalls(): void {
    if (this.#eventIdx) Atomics.store(this.#avail, 2 + this.num, (this.#lastUsed - 1) & 0xffff);
    else Atomics.store(this.#avail, 0, VRING_AVAIL_F_NO_INTERRUPT);
  }

  /** Asks for calls again. @returns whether used heads arrived meanwhile. @throws VringError USED_INDEX_JUMP */
  enableCalls(): boolean {
    if (this.#eventIdx) Atomics.store(this.#avail, 2 + this.num, this.#lastUsed);
    else Atomics.store(this.#avail, 0, 0);
    return this.#look();
  }

  /** The state as plain data; a head's chain is known to the table's owner, here it is one descriptor. */
  save(): DriverQueueState {
    if (this.#availNext !== this.#availPublished) throw new SvqError("VRING_MISUSE", "A ring is saved before its publish");
    const inflight = [];
    for (let head = 0; head < this.num; head++) {
      if (this.#writable[head]! >= 0) inflight.push({ id: head, descriptors: [head], writable_bytes: this.#writable[head]! });
    }
    return { layout: "split", side: "driver", num: this.num, avail: this.#availPublished, used: this.#lastUsed, inflight };
  }

  /** A ring of heads always starts anew. @throws SvqError UNSUPPORTED */
  restore(): void {
    throw new SvqError("UNSUPPORTED", "A ring of heads is not restored: it starts anew over the guest's table");
  }
}
