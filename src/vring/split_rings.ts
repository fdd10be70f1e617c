/**
 * The avail ring and the used ring as a driver has them (virtio 1.3, 2.7.6 to 2.7.8): heads go out through one and come
 * back through the other. What a head means, and whether the device holds it, is its owner's business.
 *
 * @module
 */
import { eventPassed, type RingPart, VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY, words16, words32 } from "./layout.ts";
import { VringError } from "./rules.ts";

/** Where the two rings lie, for {@linkcode SplitRings}. */
export interface SplitRingsOptions {
  /** Queue size, a power of two. */
  num: number;
  /** Avail ring, 4 + 2 * num bytes (6 + 2 * num with EVENT_IDX), aligned to 2. */
  avail: RingPart;
  /** Used ring, 4 + 8 * num bytes (6 + 8 * num with EVENT_IDX), aligned to 4. */
  used: RingPart;
  /** EVENT_IDX was negotiated. */
  eventIdx: boolean;
  /** Avail and used index to start at. */
  base: number;
}

/** Both rings, and how far each has come. */
export class SplitRings {
  /** Next avail index to write. */
  availNext: number;
  /** The avail index that the device sees. */
  availPublished: number;
  /** Next used index to take. */
  lastUsed: number;
  /** The used index last read from the ring. */
  usedSeen: number;
  /** Of the used element that {@linkcode SplitRings.readUsed} has read: the device's length. */
  length = 0;
  readonly #num: number;
  readonly #mask: number;
  readonly #eventIdx: boolean;
  readonly #avail: Uint16Array;
  readonly #usedIdx: Uint16Array;
  readonly #usedRing: Uint32Array;

  /** Takes up the rings at `base`, without reading or writing them. @throws VringError RING_ALIGNMENT */
  constructor(options: SplitRingsOptions) {
    const { num, eventIdx } = options;
    const event = eventIdx ? 2 : 0;
    this.#num = num;
    this.#mask = num - 1;
    this.#eventIdx = eventIdx;
    this.#avail = words16("avail ring", options.avail, 4 + 2 * num + event, 2);
    this.#usedIdx = words16("used ring", options.used, 4 + 8 * num + event, 4);
    this.#usedRing = words32("used ring", options.used, 4 + 8 * num, 4);
    this.availNext =
      this.availPublished =
      this.lastUsed =
      this.usedSeen =
        options.base & 0xffff;
  }

  /** Heads that were put in and not taken back. */
  get inflight(): number {
    return (this.availNext - this.lastUsed) & 0xffff;
  }

  /** Puts a head into the avail ring; the device sees it at the next `publish`. */
  offer(head: number): void {
    this.#avail[2 + (this.availNext & this.#mask)] = head;
    this.availNext = (this.availNext + 1) & 0xffff;
  }

  /** Makes the heads that were put in available. @returns whether the device wants a kick */
  publish(): boolean {
    const old = this.availPublished;
    const now = this.availNext;
    if (now === old) return false;
    Atomics.store(this.#avail, 1, now);
    this.availPublished = now;
    return this.#eventIdx
      ? eventPassed(Atomics.load(this.#usedIdx, 2 + 4 * this.#num), now, old)
      : (Atomics.load(this.#usedIdx, 0) & VRING_USED_F_NO_NOTIFY) === 0;
  }

  /** Reads the used index. @returns whether there is something to take. @throws VringError USED_INDEX_JUMP */
  look(): boolean {
    const idx = Atomics.load(this.#usedIdx, 1);
    const ahead = (idx - this.lastUsed) & 0xffff;
    if (ahead > ((this.availPublished - this.lastUsed) & 0xffff)) {
      throw new VringError(
        "USED_INDEX_JUMP",
        idx,
        `The used index is ${idx} where ${this.lastUsed} was reached and the avail index is ${this.availPublished}`,
      );
    }
    this.usedSeen = idx;
    return ahead !== 0;
  }

  /** Reads the used element at `lastUsed`, once, and leaves its length in `length`. @returns its id. @throws VringError USED_ID_OUT_OF_RANGE */
  readUsed(): number {
    const word = 1 + ((this.lastUsed & this.#mask) << 1);
    const id = this.#usedRing[word]!;
    this.length = this.#usedRing[word + 1]!;
    if (id >= this.#num) {
      throw new VringError("USED_ID_OUT_OF_RANGE", this.lastUsed, `Used entry ${this.lastUsed} holds ${id} in a queue of ${this.#num}`);
    }
    return id;
  }

  /** Tells the device that calls are not needed (a hint). */
  disableCalls(): void {
    if (this.#eventIdx) Atomics.store(this.#avail, 2 + this.#num, (this.lastUsed - 1) & 0xffff);
    else Atomics.store(this.#avail, 0, VRING_AVAIL_F_NO_INTERRUPT);
  }

  /** Asks for calls again. @returns whether used heads arrived meanwhile. @throws VringError USED_INDEX_JUMP */
  enableCalls(): boolean {
    // Sequentially consistent store, then load: a device that uses a chain after this load sees the request.
    if (this.#eventIdx) Atomics.store(this.#avail, 2 + this.#num, this.lastUsed);
    else Atomics.store(this.#avail, 0, 0);
    return this.look();
  }
}
