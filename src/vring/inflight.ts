/**
 * The record of chains that a back-end has taken and not yet given back, in memory that outlives it: the in-flight region of
 * vhost-user (GET_INFLIGHT_FD, SET_INFLIGHT_FD). One part per queue, one after the other.
 *
 * A chain is recorded before a device can see it, and struck out after the driver can see that it is used. Every step
 * leaves the region in a state from which {@linkcode recoverSplit} or {@linkcode recoverPacked} finds out exactly what
 * was in flight, wherever the writer was killed.
 *
 * Split queues: the layout of the vhost-user specification, version 1. Packed queues: its sizes and the fields of its
 * descriptor entries; the position of the used ring is one 32-bit word at offset 24, since the specification's separate fields
 * cannot be changed together, and the version number is another one, so that nobody else takes it for theirs.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { type RingPart, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, words16, words32 } from "./layout.ts";
import type { Chain } from "./queue.ts";

const PART_ALIGN = 64;
const SPLIT_HEADER = 16;
const SPLIT_ENTRY = 16;
const PACKED_HEADER = 32;
const PACKED_ENTRY = 32;

/** What the header says of a queue's record. */
export const INFLIGHT_STATE = {
  /** Nothing is in flight, or nobody has used the region yet: the front-end's base holds. */
  idle: 0,
  /** A split queue's chains are on record. */
  split: 1,
  /** A packed queue's chains are on record. */
  packed: 0x5156,
  /** A device works on the guest's own ring, and nobody records what it takes. */
  unrecorded: 0x5155,
} as const;

/** Word of the header that holds the version (low half) and the number of descriptors (high half). */
const STATE_WORD = 2;
const LAST_BATCH = 6;
const USED_IDX = 7;
/** Packed: used position that the driver has seen (low half), and the one after the batch under way (high half). */
const POSITION_WORD = 6;

const IDLE = 0, TAKEN = 1, GIVEN = 2;

/** Bytes of one queue's part. */
export function inflightPartSize(num: number, packed: boolean): number {
  const bytes = packed ? PACKED_HEADER + PACKED_ENTRY * num : SPLIT_HEADER + SPLIT_ENTRY * num;
  return Math.ceil(bytes / PART_ALIGN) * PART_ALIGN;
}

/** What a queue's part says: one of {@linkcode INFLIGHT_STATE}. @throws SvqError INFLIGHT_INVALID for another queue size or version */
export function inflightState(part: RingPart, num: number): number {
  const word = Atomics.load(words32("in-flight region", part, SPLIT_HEADER, 4), STATE_WORD);
  const state = word & 0xffff;
  if (state === INFLIGHT_STATE.idle) return state;
  if (word >>> 16 !== num) invalid(`it is of a queue of ${word >>> 16} descriptors, not ${num}`);
  if (state !== INFLIGHT_STATE.split && state !== INFLIGHT_STATE.packed && state !== INFLIGHT_STATE.unrecorded) {
    invalid(`its version is ${state}`);
  }
  return state;
}

/** Says that nothing is in flight, or that nobody records it. */
export function setInflightState(part: RingPart, num: number, state: "idle" | "unrecorded"): void {
  Atomics.store(words32("in-flight region", part, SPLIT_HEADER, 4), STATE_WORD, (INFLIGHT_STATE[state] | num << 16) >>> 0);
}

function invalid(what: string): never {
  throw new SvqError("INFLIGHT_INVALID", `The in-flight region cannot be used: ${what}`);
}

/** What was in flight when the writer of a region ended, as plain data. */
export interface InflightChains {
  /** Where the device's side goes on, as in GET_VRING_BASE. */
  base: number;
  /** Split: used index; packed: used slot | wrap<<15. */
  used: number;
  /** In the order in which they were taken: the head (split) or the buffer id (packed). */
  ids: number[];
  /** Packed: entries of the region that each of them occupies. Split: empty. */
  entries: number[][];
  /** Packed: per descriptor of all chains: address, length, flags without AVAIL and USED. Split: empty. */
  descriptors: [address: number, length: number, flags: number][];
}

interface Found {
  entry: number;
  counter: number;
}

function byCounter(found: Found[]): number[] {
  return found.sort((a, b) => a.counter - b.counter).map(({ entry }) => entry);
}

/**
 * Reads a split queue's record, once: what another process may write meanwhile has no effect on what was checked.
 *
 * @param ringUsed used index in the guest's ring
 * @throws SvqError INFLIGHT_INVALID
 */
export function recoverSplit(part: RingPart, num: number, ringUsed: number): InflightChains {
  const words = words32("in-flight region", part, inflightPartSize(num, false), 4).slice();
  const halves = new Uint16Array(words.buffer);
  const bytes = new Uint8Array(words.buffer);
  const inflight = (head: number) => SPLIT_HEADER + SPLIT_ENTRY * head;
  // A batch that the driver can see, and that was not struck out yet.
  const batch = (ringUsed - halves[USED_IDX]!) & 0xffff;
  for (let i = 0, head = halves[LAST_BATCH]!; i < batch && i < num; i++) {
    if (head >= num) invalid(`a batch of used chains names head ${head} in a queue of ${num}`);
    bytes[inflight(head)] = IDLE;
    head = halves[(inflight(head) + 6) >> 1]!;
  }
  const found: Found[] = [];
  for (let head = 0; head < num; head++) {
    if (bytes[inflight(head)] === IDLE) continue;
    const word = (inflight(head) + 8) >> 2;
    found.push({ entry: head, counter: words[word]! + words[word + 1]! * 0x1_0000_0000 });
  }
  const ids = byCounter(found);
  return { base: (ringUsed + ids.length) & 0xffff, used: ringUsed, ids, entries: [], descriptors: [] };
}

/**
 * Reads a packed queue's record, once.
 *
 * @param flagsAt reads the flags of a descriptor in the guest's ring
 * @throws SvqError INFLIGHT_INVALID
 */
export function recoverPacked(part: RingPart, num: number, flagsAt: (slot: number) => number): InflightChains {
  const words = words32("in-flight region", part, inflightPartSize(num, true), 4).slice();
  const halves = new Uint16Array(words.buffer);
  const bytes = new Uint8Array(words.buffer);
  const seen = words[POSITION_WORD]! & 0xffff;
  const next = words[POSITION_WORD]! >>> 16;
  if ((seen & 0x7fff) >= num || (next & 0x7fff) >= num) invalid("a position lies outside the ring");
  // The slot at the used position holds an available descriptor as long as the batch has not been published.
  const flags = flagsAt(seen & 0x7fff);
  const wrap = seen >>> 15;
  const published = seen === next || ((flags >>> 7) & 1) !== wrap || ((flags >>> 15) & 1) === wrap;
  const used = published ? next : seen;
  const found: Found[] = [];
  for (let entry = 0; entry < num; entry++) {
    const at = PACKED_HEADER + PACKED_ENTRY * entry;
    const state = bytes[at]!;
    if (state === IDLE || (state === GIVEN && published)) continue;
    found.push({ entry, counter: words[(at + 8) >> 2]! + words[(at + 12) >> 2]! * 0x1_0000_0000 });
  }
  const heads = byCounter(found);
  const [ids, entries, descriptors]: [number[], number[][], InflightChains["descriptors"]] = [[], [], []];
  const taken = new Set<number>();
  for (const head of heads) {
    const count = halves[(PACKED_HEADER + PACKED_ENTRY * head + 6) >> 1]!;
    const own: number[] = [];
    for (let entry = head; own.length < count;) {
      if (entry >= num || taken.has(entry)) invalid(`the chain at entry ${head} is broken`);
      taken.add(entry);
      own.push(entry);
      const at = PACKED_HEADER + PACKED_ENTRY * entry;
      const word = at >> 2;
      descriptors.push([words[word + 6]! + words[word + 7]! * 0x1_0000_0000, words[word + 5]!, halves[(at + 18) >> 1]!]);
      entry = halves[(at + 2) >> 1]!;
    }
    if (own.length === 0) invalid(`the chain at entry ${head} has no descriptors`);
    ids.push(halves[(PACKED_HEADER + PACKED_ENTRY * head + 16) >> 1]!);
    entries.push(own);
  }
  const avail = advance(used, taken.size, num);
  return { base: (avail | used << 16) >>> 0, used, ids, entries, descriptors };
}

function advance(position: number, slots: number, num: number): number {
  const slot = (position & 0x7fff) + slots;
  return slot >= num ? (slot - num) | ((position & 0x8000) ^ 0x8000) : slot | (position & 0x8000);
}

/** Where a writer of a record stands, for one that goes on with it by other means. */
export interface InflightStand {
  /** Number of the next chain. */
  counter: number;
  /** Split: used index; packed: used slot | wrap<<15. */
  used: number;
  /** Packed: free entries, the last of `freeCount` is taken next. By buffer id: first entry or -1. By entry: next one, entries. */
  entries?: { free: Uint16Array; freeCount: number; entryOf: Int32Array; nextOf: Uint16Array; countOf: Uint16Array };
}

/** Keeps the record of one queue, for whoever drives its device's side. */
export interface InflightLog {
  /** A chain was taken; the device must not have seen it yet. */
  take(chain: Chain): void;
  /** A chain is about to be written to the used ring; the driver must not see it before {@linkcode InflightLog.flushed}. */
  give(id: number): void;
  /** The driver can see what was given. */
  flushed(): void;
  /** Nothing is in flight any more: it came back, or is the driver's again. */
  end(): void;
  /** Where it stands, after a flush: whoever takes it from here leaves nothing to this one but `end`. */
  stand(): InflightStand;
}

/** {@linkcode InflightLog} of a split queue. */
export class SplitInflight implements InflightLog {
  readonly #num: number;
  readonly #words: Uint32Array;
  readonly #halves: Uint16Array;
  readonly #bytes: Uint8Array;
  readonly #batch: Uint16Array;
  #batchLength = 0;
  #lastHead = 0;
  #usedIdx: number;
  #counter = 0;

  /** Begins with what `chains` says is in flight. Killed in the middle of this, the region says the same as before. */
  constructor(part: RingPart, num: number, chains: Pick<InflightChains, "ids" | "used">) {
    const size = inflightPartSize(num, false);
    this.#num = num;
    this.#words = words32("in-flight region", part, size, 4);
    this.#halves = words16("in-flight region", part, size, 4);
    this.#bytes = new Uint8Array(part.buffer, part.byteOffset ?? 0, size);
    this.#batch = new Uint16Array(num);
    this.#usedIdx = chains.used;
    const kept = new Set(chains.ids);
    for (let head = 0; head < num; head++) if (!kept.has(head)) Atomics.store(this.#bytes, SPLIT_HEADER + SPLIT_ENTRY * head, IDLE);
    for (const head of chains.ids) {
      const word = (SPLIT_HEADER + SPLIT_ENTRY * head + 8) >> 2;
      this.#counter = Math.max(this.#counter, this.#words[word]! + this.#words[word + 1]! * 0x1_0000_0000 + 1);
    }
    // A counter that somebody else made too large would not grow any more.
    if (!Number.isSafeInteger(this.#counter + 2 ** 52)) this.#renumber(chains.ids);
    Atomics.store(this.#halves, USED_IDX, this.#usedIdx);
    Atomics.store(this.#words, STATE_WORD, (INFLIGHT_STATE.split | num << 16) >>> 0);
  }

  #renumber(heads: readonly number[]): void {
    this.#counter = 0;
    for (const head of heads) this.#count(head);
  }

  #count(head: number): void {
    const word = (SPLIT_HEADER + SPLIT_ENTRY * head + 8) >> 2;
    const counter = this.#counter++;
    this.#words[word] = counter;
    this.#words[word + 1] = counter / 0x1_0000_0000;
  }

  /** See {@linkcode InflightLog.take}. */
  take(chain: Chain): void {
    this.takeHead(chain.id);
  }

  /** The same, by the chain's head: the record of a split queue holds nothing else of it. */
  takeHead(head: number): void {
    this.#count(head);
    // Sequentially consistent: the counter is there before the flag, and the flag before the device's index.
    Atomics.store(this.#bytes, SPLIT_HEADER + SPLIT_ENTRY * head, TAKEN);
  }

  /** See {@linkcode InflightLog.give}. */
  give(head: number): void {
    Atomics.store(this.#halves, (SPLIT_HEADER + SPLIT_ENTRY * head + 6) >> 1, this.#lastHead);
    Atomics.store(this.#halves, LAST_BATCH, head);
    this.#lastHead = head;
    this.#batch[this.#batchLength++] = head;
  }

  /** See {@linkcode InflightLog.flushed}. */
  flushed(): void {
    for (let i = 0; i < this.#batchLength; i++) Atomics.store(this.#bytes, SPLIT_HEADER + SPLIT_ENTRY * this.#batch[i]!, IDLE);
    this.#usedIdx = (this.#usedIdx + this.#batchLength) & 0xffff;
    this.#batchLength = 0;
    Atomics.store(this.#halves, USED_IDX, this.#usedIdx);
  }

  /** See {@linkcode InflightLog.stand}. */
  stand(): InflightStand {
    return { counter: this.#counter, used: this.#usedIdx };
  }

  /** See {@linkcode InflightLog.end}. */
  end(): void {
    Atomics.store(this.#words, STATE_WORD, (INFLIGHT_STATE.idle | this.#num << 16) >>> 0);
  }
}

/** {@linkcode InflightLog} of a packed queue. */
export class PackedInflight implements InflightLog {
  readonly #num: number;
  readonly #words: Uint32Array;
  readonly #halves: Uint16Array;
  readonly #bytes: Uint8Array;
  /** Free entries, the last one is taken next. */
  readonly #free: Uint16Array;
  #freeCount = 0;
  /** By buffer id: the chain's first entry. */
  readonly #entryOf: Int32Array;
  /** By entry: the next one of its chain, and how many a chain has that begins there. Nothing is read back from the region. */
  readonly #nextOf: Uint16Array;
  readonly #countOf: Uint16Array;
  readonly #batch: Uint16Array;
  #batchLength = 0;
  #seen: number;
  #next: number;
  #counter = 0;

  /** Begins with what `chains` says is in flight. Killed in the middle of this, the region says the same as before. */
  constructor(part: RingPart, num: number, chains: Pick<InflightChains, "ids" | "used" | "entries">) {
    const size = inflightPartSize(num, true);
    this.#num = num;
    this.#words = words32("in-flight region", part, size, 4);
    this.#halves = words16("in-flight region", part, size, 4);
    this.#bytes = new Uint8Array(part.buffer, part.byteOffset ?? 0, size);
    this.#free = new Uint16Array(num);
    this.#entryOf = new Int32Array(num).fill(-1);
    this.#nextOf = new Uint16Array(num);
    this.#countOf = new Uint16Array(num);
    this.#batch = new Uint16Array(num);
    this.#seen = this.#next = chains.used;
    const heads = new Set<number>();
    const kept = new Set(chains.entries.flat());
    chains.ids.forEach((id, i) => {
      const head = chains.entries[i]![0]!;
      heads.add(head);
      this.#entryOf[id] = head;
      this.#countOf[head] = chains.entries[i]!.length;
      chains.entries[i]!.forEach((entry, at, all) => this.#nextOf[entry] = all[at + 1] ?? 0);
      const word = (PACKED_HEADER + PACKED_ENTRY * head + 8) >> 2;
      this.#counter = Math.max(this.#counter, this.#words[word]! + this.#words[word + 1]! * 0x1_0000_0000 + 1);
    });
    if (!Number.isSafeInteger(this.#counter + 2 ** 52)) {
      this.#counter = 0;
      for (const [head] of chains.entries) this.#count(head!);
    }
    for (let entry = num - 1; entry >= 0; entry--) if (!kept.has(entry)) this.#free[this.#freeCount++] = entry;
    // The chains before the position: what was given in a batch that nobody saw would count as gone with the new one.
    for (let entry = 0; entry < num; entry++) {
      Atomics.store(this.#bytes, PACKED_HEADER + PACKED_ENTRY * entry, heads.has(entry) ? TAKEN : IDLE);
    }
    this.#storePosition();
    Atomics.store(this.#words, STATE_WORD, (INFLIGHT_STATE.packed | num << 16) >>> 0);
  }

  #storePosition(): void {
    Atomics.store(this.#words, POSITION_WORD, (this.#seen | this.#next << 16) >>> 0);
  }

  #count(head: number): void {
    const word = (PACKED_HEADER + PACKED_ENTRY * head + 8) >> 2;
    const counter = this.#counter++;
    this.#words[word] = counter;
    this.#words[word + 1] = counter / 0x1_0000_0000;
  }

  #entry(): number {
    if (this.#freeCount === 0) throw new SvqError("INTERNAL", "The in-flight region is full");
    return this.#free[--this.#freeCount]!;
  }

  /** See {@linkcode InflightLog.take}. */
  take(chain: Chain): void {
    const indirect = chain.indirectAddress >= 0;
    const count = chain.slots;
    const head = this.#entry();
    for (let i = 0, entry = head; i < count; i++) {
      const at = PACKED_HEADER + PACKED_ENTRY * entry;
      const address = indirect ? chain.indirectAddress : chain.addresses[i]!;
      const high = Math.floor(address / 0x1_0000_0000);
      const next = i + 1 < count ? this.#entry() : 0;
      const flags = indirect
        ? VRING_DESC_F_INDIRECT
        : (i < chain.readableCount ? 0 : VRING_DESC_F_WRITE) | (i + 1 < count ? VRING_DESC_F_NEXT : 0);
      this.#halves[(at + 2) >> 1] = this.#nextOf[entry] = next;
      this.#halves[(at + 16) >> 1] = chain.id;
      this.#halves[(at + 18) >> 1] = flags;
      this.#words[(at + 20) >> 2] = indirect ? chain.indirectLength : chain.lengths[i]!;
      this.#words[(at + 24) >> 2] = address - high * 0x1_0000_0000;
      this.#words[(at + 28) >> 2] = high;
      if (i + 1 === count) this.#halves[(PACKED_HEADER + PACKED_ENTRY * head + 4) >> 1] = entry;
      entry = next;
    }
    this.#halves[(PACKED_HEADER + PACKED_ENTRY * head + 6) >> 1] = this.#countOf[head] = count;
    this.#count(head);
    this.#entryOf[chain.id] = head;
    Atomics.store(this.#bytes, PACKED_HEADER + PACKED_ENTRY * head, TAKEN);
  }

  /** See {@linkcode InflightLog.give}. */
  give(id: number): void {
    const head = this.#entryOf[id]!;
    this.#next = advance(this.#next, this.#countOf[head]!, this.#num);
    // The position first: a chain marked as given where both positions are the same counts as gone.
    this.#storePosition();
    Atomics.store(this.#bytes, PACKED_HEADER + PACKED_ENTRY * head, GIVEN);
    this.#batch[this.#batchLength++] = id;
  }

  /** See {@linkcode InflightLog.flushed}. */
  flushed(): void {
    this.#seen = this.#next;
    this.#storePosition();
    for (let i = 0; i < this.#batchLength; i++) {
      const id = this.#batch[i]!;
      const head = this.#entryOf[id]!;
      this.#entryOf[id] = -1;
      this.#release(head);
      Atomics.store(this.#bytes, PACKED_HEADER + PACKED_ENTRY * head, IDLE);
    }
    this.#batchLength = 0;
  }

  #release(head: number): void {
    const count = this.#countOf[head]!;
    for (let i = 0, entry = head; i < count; i++) {
      this.#free[this.#freeCount++] = entry;
      entry = this.#nextOf[entry]!;
    }
  }

  /** See {@linkcode InflightLog.stand}. */
  stand(): InflightStand {
    const entries = { free: this.#free, freeCount: this.#freeCount, entryOf: this.#entryOf, nextOf: this.#nextOf, countOf: this.#countOf };
    return { counter: this.#counter, used: this.#seen, entries };
  }

  /** See {@linkcode InflightLog.end}. */
  end(): void {
    Atomics.store(this.#words, STATE_WORD, (INFLIGHT_STATE.idle | this.#num << 16) >>> 0);
  }
}
