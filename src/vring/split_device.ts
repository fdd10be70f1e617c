/**
 * The device's side of a split virtqueue (virtio 1.3, 2.7). Every value is read once from shared memory into private memory
 * and checked there; what the driver changes afterwards has no effect.
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
import type { Chain, DeviceQueue, DeviceQueueState, RingMemory } from "./queue.ts";
import { VringError } from "./rules.ts";
import { availIndexJump, headInFlight, headOutOfRange, SplitWalker } from "./split_walk.ts";
import { readDeviceState } from "./state.ts";

/** Where a split ring lies and what was negotiated, for {@linkcode SplitDevice}. */
export interface SplitDeviceOptions {
  /** Queue size, a power of two. */
  num: number;
  /** Descriptor table, 16 * num bytes, aligned to 4 at least in its buffer. */
  desc: RingPart;
  /** Avail ring, 4 + 2 * num bytes (6 + 2 * num with EVENT_IDX), aligned to 2. */
  avail: RingPart;
  /** Used ring, 4 + 8 * num bytes (6 + 8 * num with EVENT_IDX), aligned to 4. */
  used: RingPart;
  /** EVENT_IDX was negotiated. */
  eventIdx: boolean;
  /** INDIRECT_DESC was negotiated. */
  indirect: boolean;
  /** IN_ORDER was negotiated. */
  inOrder?: boolean;
  /** Guest memory: bounds of every buffer, and indirect tables. Without it no bounds are checked and no tables are read. */
  memory?: RingMemory;
  /** Longest chain taken, in segments; default the larger of num and 1024. A `Chain` of less capacity lowers it. */
  maxChain?: number;
  /**
   * Next avail index (SET_VRING_BASE); default 0. The used index is read from the ring. Chains between the two were taken by
   * someone else: they are in flight here only after `restore`.
   */
  base?: number;
  /** Told of each chain when its used element is written, before a flush lets the driver see it. */
  onUsed?: (id: number) => void;
}

/** Life of a head: not ours, taken, or done but held back until its turn (IN_ORDER). */
const FREE = 0, TAKEN = 1, HELD = 2;

/** Implements {@linkcode DeviceQueue} for split rings. */
export class SplitDevice implements DeviceQueue {
  /** Always `split`. */
  readonly layout: "split" = "split";
  /** Queue size in descriptors. */
  readonly num: number;
  readonly #mask: number;
  readonly #avail: Uint16Array;
  readonly #usedIdx: Uint16Array;
  readonly #usedRing: Uint32Array;
  readonly #eventIdx: boolean;
  readonly #inOrder: boolean;
  readonly #walker: SplitWalker;
  readonly #onUsed: ((id: number) => void) | undefined;
  /** Next avail index to take. */
  #lastAvail: number;
  /** Avail index as last read from the ring. */
  #availSeen: number;
  /** Next used index to write, and the one that the driver sees. */
  #usedNext: number;
  #usedFlushed: number;
  #open = 0;
  #mustCall = false;
  readonly #state: Uint8Array;
  /** Chains taken since the beginning, and per head that number when it was taken. */
  #total = 0;
  readonly #takenAt: Float64Array;
  /** Per avail slot: the head that was taken there. */
  readonly #headAt: Uint16Array;
  /** What `unpop` puts back; -1 for nothing. */
  #lastHead = -1;
  readonly #slotsOf: Uint16Array;
  readonly #written: Uint32Array;

  /**
   * Takes up the ring at `base` and at the used index that it holds; writes nothing.
   *
   * @throws VringError RING_SIZE, RING_ALIGNMENT, or BASE_INVALID when base and used index are further apart than the queue
   * is long
   */
  constructor(options: SplitDeviceOptions) {
    const { num, eventIdx } = options;
    checkSplitNum(num);
    this.num = num;
    this.#mask = num - 1;
    this.#eventIdx = eventIdx;
    this.#inOrder = options.inOrder ?? false;
    this.#onUsed = options.onUsed;
    const event = eventIdx ? 2 : 0;
    this.#walker = new SplitWalker(options);
    this.#avail = words16("avail ring", options.avail, 4 + 2 * num + event, 2);
    this.#usedIdx = words16("used ring", options.used, 4 + 8 * num + event, 4);
    this.#usedRing = words32("used ring", options.used, 4 + 8 * num, 4);
    this.#state = new Uint8Array(num);
    this.#takenAt = new Float64Array(num);
    this.#headAt = new Uint16Array(num);
    this.#slotsOf = new Uint16Array(num);
    this.#written = new Uint32Array(num);
    this.#lastAvail = this.#availSeen = (options.base ?? 0) & 0xffff;
    this.#usedNext = this.#usedFlushed = Atomics.load(this.#usedIdx, 1);
    const ahead = (this.#lastAvail - this.#usedNext) & 0xffff;
    if (ahead > num) {
      throw new VringError(
        "BASE_INVALID",
        -1,
        `The ring base is ${this.#lastAvail} and the used index ${this.#usedNext}, with a queue of ${num}`,
      );
    }
  }

  /** Takes the next available chain; see {@linkcode DeviceQueue.pop}. @throws VringError */
  pop(chain: Chain): boolean {
    const position = this.#lastAvail;
    if (position === this.#availSeen && !this.#look()) return false;
    const head = this.#avail[2 + (position & this.#mask)]!;
    if (head >= this.num) headOutOfRange(position, head, this.num);
    if (this.#state[head] !== FREE) headInFlight(position, head);
    this.#walker.walk(head, chain);
    chain.id = head;
    this.#state[head] = TAKEN;
    this.#takenAt[head] = this.#total++;
    this.#headAt[position & this.#mask] = head;
    this.#slotsOf[head] = chain.slots;
    this.#lastHead = head;
    this.#lastAvail = (position + 1) & 0xffff;
    this.#open++;
    return true;
  }

  #look(): boolean {
    const idx = Atomics.load(this.#avail, 1);
    const ahead = (idx - this.#lastAvail) & 0xffff;
    if (ahead > this.num) availIndexJump(idx, this.#lastAvail, this.num);
    this.#availSeen = idx;
    return ahead !== 0;
  }

  /** Puts the last popped chain back; see {@linkcode DeviceQueue.unpop}. */
  unpop(): void {
    const head = this.#lastHead;
    if (head < 0 || this.#state[head] !== TAKEN) throw new SvqError("VRING_MISUSE", "unpop does not follow a pop");
    this.#lastHead = -1;
    this.#state[head] = FREE;
    this.#lastAvail = (this.#lastAvail - 1) & 0xffff;
    this.#total--;
    this.#open--;
  }

  /** Records a chain as used; see {@linkcode DeviceQueue.push}. */
  push(id: number, written: number): void {
    if (this.#state[id] !== TAKEN) throw new SvqError("VRING_MISUSE", `Chain ${id} is pushed without being in flight`);
    if (!this.#inOrder) {
      this.#state[id] = FREE;
      this.#writeUsed(id, written);
      return;
    }
    this.#state[id] = HELD;
    this.#written[id] = written;
    // With IN_ORDER the used index and the avail index of a chain are the same number.
    while (this.#usedNext !== this.#lastAvail) {
      const head = this.#headAt[this.#usedNext & this.#mask]!;
      if (this.#state[head] !== HELD) break;
      this.#state[head] = FREE;
      this.#writeUsed(head, this.#written[head]!);
    }
  }

  #writeUsed(id: number, written: number): void {
    if (this.#onUsed !== undefined) this.#onUsed(id);
    const word = 1 + ((this.#usedNext & this.#mask) << 1);
    this.#usedRing[word] = id;
    this.#usedRing[word + 1] = written;
    this.#usedNext = (this.#usedNext + 1) & 0xffff;
  }

  /** Publishes what was pushed; see {@linkcode DeviceQueue.flush}. @returns whether the driver wants a call */
  flush(): boolean {
    const old = this.#usedFlushed;
    const now = this.#usedNext;
    if (now === old) return false;
    Atomics.store(this.#usedIdx, 1, now);
    this.#usedFlushed = now;
    this.#open -= (now - old) & 0xffff;
    const wanted = this.#eventIdx
      ? eventPassed(Atomics.load(this.#avail, 2 + this.num), now, old)
      : (Atomics.load(this.#avail, 0) & VRING_AVAIL_F_NO_INTERRUPT) === 0;
    if (!this.#mustCall) return wanted;
    this.#mustCall = false;
    return true;
  }

  /** Tells the driver that kicks are not needed (a hint). */
  disableKicks(): void {
    if (this.#eventIdx) Atomics.store(this.#usedIdx, 2 + 4 * this.num, (this.#lastAvail - 1) & 0xffff);
    else Atomics.store(this.#usedIdx, 0, VRING_USED_F_NO_NOTIFY);
  }

  /** Asks for kicks again. @returns whether chains arrived meanwhile. @throws VringError AVAIL_INDEX_JUMP */
  enableKicks(): boolean {
    // Sequentially consistent store, then load: a driver that adds a chain after this load sees the request.
    if (this.#eventIdx) Atomics.store(this.#usedIdx, 2 + 4 * this.num, this.#lastAvail);
    else Atomics.store(this.#usedIdx, 0, 0);
    return this.#look();
  }

  /** The next avail index, 16 bits: what GET_VRING_BASE answers. */
  get base(): number {
    return this.#lastAvail;
  }

  /** The used index that the driver sees, 16 bits. */
  get usedIdx(): number {
    return this.#usedFlushed;
  }

  /** Chains taken and not yet flushed back. */
  get inflight(): number {
    return this.#open;
  }

  /** Makes all chains in flight available again; see {@linkcode DeviceQueue.rewind}. */
  rewind(): boolean {
    const open = this.#open;
    if (((this.#lastAvail - open) & 0xffff) !== this.#usedFlushed || this.#usedNext !== this.#usedFlushed) return false;
    for (let head = 0; head < this.num; head++) {
      if (this.#state[head] === HELD) return false;
      if (this.#state[head] === TAKEN && this.#takenAt[head]! < this.#total - open) return false;
    }
    this.#lastHead = -1;
    this.#total -= open;
    this.#state.fill(FREE);
    this.#open = 0;
    this.#lastAvail = this.#availSeen = this.#usedFlushed;
    return true;
  }

  /** The state as plain data; see {@linkcode DeviceQueue.save}. */
  save(): DeviceQueueState {
    if (this.#usedNext !== this.#usedFlushed) throw new SvqError("VRING_MISUSE", "A ring is saved before its flush");
    const heads: number[] = [];
    for (let head = 0; head < this.num; head++) if (this.#state[head] !== FREE) heads.push(head);
    heads.sort((a, b) => this.#takenAt[a]! - this.#takenAt[b]!);
    const inflight = heads.map((id) => ({
      id,
      age: this.#total - this.#takenAt[id]!,
      slots: this.#slotsOf[id]!,
      ...(this.#state[id] === HELD ? { written: this.#written[id]! } : {}),
    }));
    return { layout: "split", side: "device", num: this.num, base: this.#lastAvail, used: this.#usedFlushed, inflight };
  }

  /** Takes over a saved state; see {@linkcode DeviceQueue.restore}. @throws VringError STATE_INVALID */
  restore(state: unknown): void {
    const saved = readDeviceState(state, "split", this.num, this.#inOrder);
    this.#state.fill(FREE);
    this.#lastHead = -1;
    this.#total = saved.inflight[0]?.age ?? 0;
    for (const record of saved.inflight) {
      this.#state[record.id] = record.written === undefined ? TAKEN : HELD;
      this.#takenAt[record.id] = this.#total - record.age;
      this.#headAt[(saved.base - record.age) & this.#mask] = record.id;
      this.#slotsOf[record.id] = record.slots;
      this.#written[record.id] = record.written ?? 0;
    }
    this.#open = saved.inflight.length;
    this.#lastAvail = this.#availSeen = saved.base;
    this.#usedNext = this.#usedFlushed = saved.used;
    this.#mustCall = true;
  }
}
