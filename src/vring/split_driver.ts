/**
 * The driver's side of a split virtqueue (virtio 1.3, 2.7). The links between descriptors, the lengths and what is
 * outstanding are kept in private memory: what the device writes into the ring cannot mislead it.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import {
  checkSplitNum,
  DESC_BYTES,
  type RingPart,
  VRING_DESC_F_INDIRECT,
  VRING_DESC_F_NEXT,
  VRING_DESC_F_WRITE,
  words32,
} from "./layout.ts";
import { Chain, type DriverQueue, type DriverQueueState, type OutstandingRecord, type Segment } from "./queue.ts";
import { VringError } from "./rules.ts";
import { SplitRings } from "./split_rings.ts";
import { readDriverState } from "./state.ts";

/** Memory for indirect tables: one table per descriptor of the ring, one after the other. */
export interface IndirectArea extends RingPart {
  /** Address of the area as the device sees it, bytes, a multiple of 16. */
  readonly address: number;
  /** Descriptors in each table; the area has `num * entries * 16` bytes. */
  readonly entries: number;
}

/** Where a split ring lies and what was negotiated, for {@linkcode SplitDriver}. */
export interface SplitDriverOptions {
  /** Queue size, a power of two. */
  num: number;
  /** Descriptor table, 16 * num bytes. */
  desc: RingPart;
  /** Avail ring, 4 + 2 * num bytes (6 + 2 * num with EVENT_IDX), aligned to 2. */
  avail: RingPart;
  /** Used ring, 4 + 8 * num bytes (6 + 8 * num with EVENT_IDX), aligned to 4. */
  used: RingPart;
  /** EVENT_IDX was negotiated. */
  eventIdx: boolean;
  /** INDIRECT_DESC was negotiated, and here tables can be put: chains of several segments that fit use one. */
  indirect?: IndirectArea;
  /** A chain that is nothing but one indirect table of another ring's is offered as that table; default false. */
  passTables?: boolean;
  /** IN_ORDER was negotiated: descriptors are taken in table order. */
  inOrder?: boolean;
  /** Avail and used index to start at, for a ring whose device was given this base; default 0. The ring must hold it too. */
  base?: number;
}

/** A head's number of descriptors while it is not outstanding. */
const IDLE = 0;

/** Implements {@linkcode DriverQueue} for split rings. */
export class SplitDriver implements DriverQueue {
  /** Always `split`. */
  readonly layout: "split" = "split";
  /** Queue size in descriptors. */
  readonly num: number;
  /** See {@linkcode DriverQueue.usedLength}. */
  usedLength: number = 0;
  readonly #mask: number;
  readonly #desc: Uint32Array;
  readonly #rings: SplitRings;
  readonly #inOrder: boolean;
  readonly #passTables: boolean;
  readonly #area: IndirectArea | undefined;
  readonly #tables: Uint32Array;
  readonly #scratch: Chain;
  #numFree: number;
  #freeHead = 0;
  /** IN_ORDER: the used element that the device wrote for a batch; -1 when none is being worked off. */
  #batchId = -1;
  #batchLength = 0;
  #mustKick = false;
  /** Private copy of the links; per head: descriptors, last one, writable bytes. Per avail slot: the head. */
  readonly #next: Uint16Array;
  readonly #slots: Uint16Array;
  readonly #tail: Uint16Array;
  readonly #writable: Float64Array;
  readonly #headAt: Uint16Array;
  /** Chains added and published since the beginning, and per head the number when it was added. */
  #total = 0;
  #published = 0;
  readonly #addedAt: Float64Array;

  /**
   * Takes up the ring at `base`, without reading or writing it.
   *
   * @throws VringError RING_SIZE or RING_ALIGNMENT
   */
  constructor(options: SplitDriverOptions) {
    const { num, indirect } = options;
    checkSplitNum(num);
    this.num = num;
    this.#mask = num - 1;
    this.#inOrder = options.inOrder ?? false;
    this.#passTables = options.passTables ?? false;
    this.#desc = words32("descriptor table", options.desc, DESC_BYTES * num, 4);
    this.#rings = new SplitRings({ ...options, base: options.base ?? 0 });
    this.#area = indirect;
    this.#tables = indirect === undefined ? new Uint32Array(0) : words32("indirect area", indirect, num * indirect.entries * DESC_BYTES, 4);
    this.#scratch = new Chain(Math.max(num, indirect?.entries ?? 0));
    this.#numFree = num;
    this.#next = Uint16Array.from({ length: num }, (_, index) => (index + 1) % num);
    this.#slots = new Uint16Array(num);
    this.#tail = new Uint16Array(num);
    this.#writable = new Float64Array(num);
    this.#headAt = new Uint16Array(num);
    this.#addedAt = new Float64Array(num);
  }

  /** Free descriptors. */
  get numFree(): number {
    return this.#numFree;
  }

  /** Chains that the device holds, or that wait for `publish`. */
  get inflight(): number {
    return this.#rings.inflight;
  }

  /** The avail index that the device sees, 16 bits. */
  get availIdx(): number {
    return this.#rings.availPublished;
  }

  /** Adds a chain of segments; see {@linkcode DriverQueue.add}. */
  add(readable: readonly Segment[], writable: readonly Segment[]): number {
    const chain = this.#scratch;
    if (readable.length + writable.length > chain.capacity) this.#tooLong(readable.length + writable.length);
    chain.clear();
    for (const { address, length } of readable) chain.addReadable(address, length);
    for (const { address, length } of writable) chain.addWritable(address, length);
    return this.addChain(chain);
  }

  #tooLong(count: number): never {
    const most = this.#scratch.capacity;
    throw new VringError("CHAIN_TOO_LONG", -1, `A chain of ${count} segments does not fit a ring that takes ${most}`);
  }

  /** Adds a chain; see {@linkcode DriverQueue.addChain}. @returns its head, or -1 when there is no room */
  addChain(chain: Chain): number {
    const count = chain.count;
    if (count === 0) throw new SvqError("VRING_MISUSE", "A chain without segments is added");
    const area = this.#area;
    const passed = this.#passTables && chain.indirectAddress >= 0 && chain.slots === 1;
    const indirect = !passed && area !== undefined && count > 1 && count <= area.entries;
    const slots = passed || indirect ? 1 : count;
    if (slots > this.num) this.#tooLong(count);
    if (slots > this.#numFree) return -1;
    const head = this.#freeHead;
    let last = head;
    if (passed) {
      putDescriptor(this.#desc, head << 2, chain.indirectAddress, chain.indirectLength, VRING_DESC_F_INDIRECT);
    } else if (indirect) {
      this.#fillTable(chain, head, area);
    } else {
      const desc = this.#desc;
      const readableCount = chain.readableCount;
      let index = head;
      for (let i = 0; i < count; i++) {
        const next = this.#next[index]!;
        const flags = (i < readableCount ? 0 : VRING_DESC_F_WRITE) | (i + 1 < count ? VRING_DESC_F_NEXT : 0);
        putDescriptor(desc, index << 2, chain.addresses[i]!, chain.lengths[i]!, flags | (i + 1 < count ? next << 16 : 0));
        last = index;
        index = next;
      }
    }
    this.#freeHead = this.#next[last]!;
    this.#numFree -= slots;
    this.#slots[head] = slots;
    this.#tail[head] = last;
    this.#writable[head] = chain.writableBytes;
    this.#headAt[this.#rings.availNext & this.#mask] = head;
    this.#addedAt[head] = this.#total++;
    this.#rings.offer(head);
    return head;
  }

  #fillTable(chain: Chain, head: number, area: IndirectArea): void {
    const start = head * area.entries;
    const count = chain.count;
    for (let i = 0; i < count; i++) {
      const flags = (i < chain.readableCount ? 0 : VRING_DESC_F_WRITE) | (i + 1 < count ? VRING_DESC_F_NEXT | (i + 1) << 16 : 0);
      putDescriptor(this.#tables, (start + i) << 2, chain.addresses[i]!, chain.lengths[i]!, flags);
    }
    putDescriptor(this.#desc, head << 2, area.address + start * DESC_BYTES, count * DESC_BYTES, VRING_DESC_F_INDIRECT);
  }

  /** Makes added chains available; see {@linkcode DriverQueue.publish}. @returns whether the device wants a kick */
  publish(): boolean {
    if (this.#published === this.#total) return false;
    const wanted = this.#rings.publish();
    this.#published = this.#total;
    if (!this.#mustKick) return wanted;
    this.#mustKick = false;
    return true;
  }

  /** Takes the next used chain; see {@linkcode DriverQueue.take}. @throws VringError */
  take(): number {
    const rings = this.#rings;
    if (rings.lastUsed === rings.usedSeen && !rings.look()) return -1;
    if (this.#inOrder) return this.#takeInOrder(rings.lastUsed);
    const id = rings.readUsed();
    this.#checkId(id, rings.lastUsed);
    return this.#finish(id, rings.length);
  }

  #checkId(id: number, position: number): void {
    if (this.#slots[id] === IDLE || this.#addedAt[id]! >= this.#published) {
      throw new VringError("USED_NOT_IN_FLIGHT", id, `Used entry ${position} holds ${id}, which the device does not have`);
    }
  }

  #takeInOrder(position: number): number {
    const oldest = this.#headAt[position & this.#mask]!;
    if (this.#batchId < 0) {
      const id = this.#rings.readUsed();
      this.#checkId(id, position);
      // The batch ends with this chain; it must be all published as used.
      const rank = this.#addedAt[id]! - (this.#total - this.inflight);
      if (rank >= ((this.#rings.usedSeen - position) & 0xffff)) {
        throw new VringError(
          "IN_ORDER",
          id,
          `Used entry ${position} ends a batch at chain ${id}, beyond used index ${this.#rings.usedSeen}`,
        );
      }
      this.#batchId = id;
      this.#batchLength = this.#rings.length;
    }
    if (oldest !== this.#batchId) return this.#finish(oldest, this.#writable[oldest]!);
    this.#batchId = -1;
    return this.#finish(oldest, this.#batchLength);
  }

  #finish(id: number, length: number): number {
    const writable = this.#writable[id]!;
    this.usedLength = length < writable ? length : writable;
    const slots = this.#slots[id]!;
    // With IN_ORDER the free descriptors already lie behind one another in table order.
    if (!this.#inOrder) {
      if (this.#numFree > 0) this.#next[this.#tail[id]!] = this.#freeHead;
      this.#freeHead = id;
    }
    this.#numFree += slots;
    this.#slots[id] = IDLE;
    this.#rings.lastUsed = (this.#rings.lastUsed + 1) & 0xffff;
    return id;
  }

  /** Tells the device that calls are not needed (a hint). */
  disableCalls(): void {
    this.#rings.disableCalls();
  }

  /** Asks for calls again. @returns whether used chains arrived meanwhile. @throws VringError USED_INDEX_JUMP */
  enableCalls(): boolean {
    return this.#rings.enableCalls();
  }

  /** The state as plain data; see {@linkcode DriverQueue.save}. */
  save(): DriverQueueState {
    const { availNext, availPublished, lastUsed } = this.#rings;
    if (availNext !== availPublished) throw new SvqError("VRING_MISUSE", "A ring is saved before its publish");
    if (this.#batchId >= 0) throw new SvqError("VRING_MISUSE", "A ring is saved in the middle of a batch of used chains");
    const ids: number[] = [];
    for (let id = 0; id < this.num; id++) if (this.#slots[id] !== IDLE) ids.push(id);
    ids.sort((a, b) => this.#addedAt[a]! - this.#addedAt[b]!);
    const inflight = ids.map((id): OutstandingRecord => {
      const descriptors = [id];
      for (let index = id; descriptors.length < this.#slots[id]!; descriptors.push(index)) index = this.#next[index]!;
      return { id, descriptors, writable_bytes: this.#writable[id]! };
    });
    return { layout: "split", side: "driver", num: this.num, avail: availPublished, used: lastUsed, inflight };
  }

  /** Takes over a saved state; see {@linkcode DriverQueue.restore}. @throws VringError STATE_INVALID */
  restore(state: unknown): void {
    const saved = readDriverState(state, "split", this.num, this.#inOrder);
    this.#slots.fill(IDLE);
    const taken = new Uint8Array(this.num);
    for (const [rank, { id, descriptors, writable_bytes }] of saved.inflight.entries()) {
      // Only IN_ORDER looks a position up, and then it is this one.
      const position = (saved.avail - saved.inflight.length + rank) & 0xffff;
      this.#slots[id] = descriptors.length;
      this.#tail[id] = descriptors.at(-1)!;
      this.#writable[id] = writable_bytes;
      this.#headAt[position & this.#mask] = id;
      this.#addedAt[id] = this.#total++;
      for (const [at, index] of descriptors.entries()) {
        taken[index] = 1;
        this.#next[index] = descriptors[at + 1] ?? (index + 1) % this.num;
      }
    }
    this.#linkFree(taken, saved.inflight.at(-1)?.descriptors.at(-1));
    this.#published = this.#total;
    const rings = this.#rings;
    rings.availNext = rings.availPublished = saved.avail;
    rings.lastUsed = rings.usedSeen = saved.used;
    this.#batchId = -1;
    this.#mustKick = true;
  }

  #linkFree(taken: Uint8Array, newest: number | undefined): void {
    const num = this.num;
    this.#numFree = 0;
    let previous = -1;
    // With IN_ORDER the next descriptor is the one behind the newest chain.
    const start = newest === undefined ? 0 : (newest + 1) % num;
    for (let step = 0; step < num; step++) {
      const index = (start + step) % num;
      if (taken[index] === 1) continue;
      if (previous < 0) this.#freeHead = index;
      else this.#next[previous] = index;
      previous = index;
      this.#numFree++;
    }
    if (this.#numFree === 0) this.#freeHead = start;
  }
}

function putDescriptor(words: Uint32Array, word: number, address: number, length: number, flagsAndNext: number): void {
  const high = Math.floor(address / 0x1_0000_0000);
  words[word] = address - high * 0x1_0000_0000;
  words[word + 1] = high;
  words[word + 2] = length;
  words[word + 3] = flagsAndNext;
}
