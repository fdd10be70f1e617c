/**
 * The driver's side of a packed virtqueue (virtio 1.3, 2.8). Lengths, ids and positions of what is outstanding are kept in
 * private memory: what the device writes into the ring cannot mislead it.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import {
  checkPackedNum,
  DESC_BYTES,
  type RingPart,
  VRING_DESC_F_INDIRECT,
  VRING_DESC_F_NEXT,
  VRING_DESC_F_WRITE,
  VRING_PACKED_DESC_F_AVAIL,
  VRING_PACKED_DESC_F_USED,
  VRING_PACKED_EVENT_FLAG_DESC,
  VRING_PACKED_EVENT_FLAG_DISABLE,
  words16,
  words32,
} from "./layout.ts";
import { completePackedBase, PACKED_BASE_START, packedEventWanted, packedPosition } from "./packed_event.ts";
import { Chain, type DriverQueue, type DriverQueueState, type OutstandingRecord, type Segment } from "./queue.ts";
import { VringError } from "./rules.ts";
import type { IndirectArea } from "./split_driver.ts";
import { readDriverState } from "./state.ts";

/** Where a packed ring lies and what was negotiated, for {@linkcode PackedDriver}. */
export interface PackedDriverOptions {
  /** Queue size, any number up to 32768. */
  num: number;
  /** Descriptor ring, 16 * num bytes. */
  desc: RingPart;
  /** Driver event structure, 4 bytes, aligned to 4. */
  avail: RingPart;
  /** Device event structure, 4 bytes, aligned to 4. */
  used: RingPart;
  /** EVENT_IDX was negotiated. */
  eventIdx: boolean;
  /** INDIRECT_DESC was negotiated, and here tables can be put: chains of several segments that fit use one. */
  indirect?: IndirectArea;
  /** A chain that is nothing but one indirect table of another ring's is offered as that table; default false. */
  passTables?: boolean;
  /** IN_ORDER was negotiated. */
  inOrder?: boolean;
  /** Both positions, 32 bits, with nothing in flight between them; default the beginning. */
  base?: number;
}

const STATE_MASK = VRING_PACKED_DESC_F_AVAIL | VRING_PACKED_DESC_F_USED;
/** An id's number of slots while it is not outstanding. */
const IDLE = 0;

/** Implements {@linkcode DriverQueue} for packed rings. */
export class PackedDriver implements DriverQueue {
  /** Always `packed`. */
  readonly layout: "packed" = "packed";
  /** Queue size in descriptors. */
  readonly num: number;
  /** See {@linkcode DriverQueue.usedLength}. */
  usedLength: number = 0;
  readonly #words: Uint32Array;
  readonly #halves: Uint16Array;
  readonly #driverEvent: Uint32Array;
  readonly #deviceEvent: Uint32Array;
  readonly #eventIdx: boolean;
  readonly #inOrder: boolean;
  readonly #passTables: boolean;
  readonly #area: IndirectArea | undefined;
  readonly #tables: Uint32Array;
  readonly #scratch: Chain;
  #numFree: number;
  /** Next slot to fill, and its wrap counter. */
  #slot: number;
  #wrap: number;
  /** Next slot in which a used descriptor is expected, and its wrap counter. */
  #usedSlot: number;
  #usedWrap: number;
  /** The first descriptor of the batch gets its flags when it is published: -1 when there is none. */
  #batchSlot = -1;
  #batchFlags = 0;
  #batchSlots = 0;
  /** IN_ORDER: the id that ends the batch being worked off; -1 for none. */
  #usedBatchId = -1;
  #usedBatchLength = 0;
  #mustKick = false;
  /** Chains added, published and taken back since the beginning; per id the number when it was added. */
  #added = 0;
  #published = 0;
  #taken = 0;
  readonly #addedAt: Float64Array;
  /** Per id: next free one, slots, first slot, writable bytes. Per place in the order of adding: the id. */
  #freeId = 0;
  readonly #nextId: Uint16Array;
  readonly #slots: Uint16Array;
  readonly #first: Uint16Array;
  readonly #writable: Float64Array;
  readonly #order: Uint16Array;

  /**
   * Takes up the ring at `base`, without reading or writing it.
   *
   * @throws VringError RING_SIZE, RING_ALIGNMENT or BASE_INVALID
   */
  constructor(options: PackedDriverOptions) {
    const { num, indirect } = options;
    checkPackedNum(num);
    this.num = num;
    this.#eventIdx = options.eventIdx;
    this.#inOrder = options.inOrder ?? false;
    this.#passTables = options.passTables ?? false;
    this.#words = words32("descriptor ring", options.desc, DESC_BYTES * num, 4);
    this.#halves = words16("descriptor ring", options.desc, DESC_BYTES * num, 4);
    this.#driverEvent = words32("driver event structure", options.avail, 4, 4);
    this.#deviceEvent = words32("device event structure", options.used, 4, 4);
    this.#area = indirect;
    this.#tables = indirect === undefined ? new Uint32Array(0) : words32("indirect area", indirect, num * indirect.entries * DESC_BYTES, 4);
    this.#scratch = new Chain(Math.max(num, indirect?.entries ?? 0));
    this.#numFree = num;
    this.#addedAt = new Float64Array(num);
    this.#nextId = Uint16Array.from({ length: num }, (_, id) => id + 1);
    this.#slots = new Uint16Array(num);
    this.#first = new Uint16Array(num);
    this.#writable = new Float64Array(num);
    this.#order = new Uint16Array(num);
    const base = completePackedBase(options.base ?? PACKED_BASE_START, num);
    this.#slot = base & 0x7fff;
    this.#wrap = (base >>> 15) & 1;
    this.#usedSlot = (base >>> 16) & 0x7fff;
    this.#usedWrap = base >>> 31;
    if (base >>> 16 !== (base & 0xffff)) {
      throw new VringError(
        "BASE_INVALID",
        -1,
        `A driver cannot start at 0x${base.toString(16)}, with chains in flight that it does not know`,
      );
    }
  }

  /** Free descriptors. */
  get numFree(): number {
    return this.#numFree;
  }

  /** Chains that the device holds, or that wait for `publish`. */
  get inflight(): number {
    return this.#added - this.#taken;
  }

  /** Where the next used descriptor is expected: `slot | wrap << 15`. */
  get usedPosition(): number {
    return packedPosition(this.#usedSlot, this.#usedWrap);
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

  /** Adds a chain; see {@linkcode DriverQueue.addChain}. @returns its id, or -1 when there is no room */
  addChain(chain: Chain): number {
    const count = chain.count;
    if (count === 0) throw new SvqError("VRING_MISUSE", "A chain without segments is added");
    const area = this.#area;
    const passed = this.#passTables && chain.indirectAddress >= 0 && chain.slots === 1;
    const indirect = !passed && area !== undefined && count > 1 && count <= area.entries;
    const slots = passed || indirect ? 1 : count;
    if (slots > this.num) this.#tooLong(count);
    if (slots > this.#numFree) return -1;
    const id = this.#freeId;
    this.#freeId = this.#nextId[id]!;
    this.#first[id] = this.#slot;
    if (passed) {
      this.#put(id, chain.indirectAddress, chain.indirectLength, VRING_DESC_F_INDIRECT);
    } else if (indirect) {
      const start = id * area.entries;
      for (let i = 0; i < count; i++) {
        const flags = i < chain.readableCount ? 0 : VRING_DESC_F_WRITE;
        this.#fill(this.#tables, (start + i) << 2, chain.addresses[i]!, chain.lengths[i]!);
        this.#tables[((start + i) << 2) + 3] = id | flags << 16;
      }
      this.#put(id, area.address + start * DESC_BYTES, count * DESC_BYTES, VRING_DESC_F_INDIRECT);
    } else {
      for (let i = 0; i < count; i++) {
        const flags = (i < chain.readableCount ? 0 : VRING_DESC_F_WRITE) | (i + 1 < count ? VRING_DESC_F_NEXT : 0);
        this.#put(id, chain.addresses[i]!, chain.lengths[i]!, flags);
      }
    }
    this.#numFree -= slots;
    this.#batchSlots += slots;
    this.#slots[id] = slots;
    this.#writable[id] = chain.writableBytes;
    this.#order[this.#added % this.num] = id;
    this.#addedAt[id] = this.#added++;
    return id;
  }

  #fill(words: Uint32Array, word: number, address: number, length: number): void {
    const high = Math.floor(address / 0x1_0000_0000);
    words[word] = address - high * 0x1_0000_0000;
    words[word + 1] = high;
    words[word + 2] = length;
  }

  #put(id: number, address: number, length: number, flags: number): void {
    const slot = this.#slot;
    const all = flags | (this.#wrap === 1 ? VRING_PACKED_DESC_F_AVAIL : VRING_PACKED_DESC_F_USED);
    this.#fill(this.#words, slot << 2, address, length);
    this.#halves[(slot << 3) + 6] = id;
    if (this.#batchSlot < 0) {
      this.#batchSlot = slot;
      this.#batchFlags = all;
    } else {
      // The device looks at this slot only after it has seen the first one of the batch.
      this.#halves[(slot << 3) + 7] = all;
    }
    if (slot + 1 === this.num) {
      this.#slot = 0;
      this.#wrap ^= 1;
    } else {
      this.#slot = slot + 1;
    }
  }

  /** Makes added chains available; see {@linkcode DriverQueue.publish}. @returns whether the device wants a kick */
  publish(): boolean {
    if (this.#batchSlot < 0) return false;
    Atomics.store(this.#halves, (this.#batchSlot << 3) + 7, this.#batchFlags);
    const passed = this.#batchSlots;
    this.#batchSlot = -1;
    this.#batchSlots = 0;
    this.#published = this.#added;
    const wanted = packedEventWanted(Atomics.load(this.#deviceEvent, 0), this.#eventIdx, this.num, this.#slot, this.#wrap, passed);
    if (!this.#mustKick) return wanted;
    this.#mustKick = false;
    return true;
  }

  /** Takes the next used chain; see {@linkcode DriverQueue.take}. @throws VringError */
  take(): number {
    if (this.#usedBatchId >= 0) return this.#takeOfBatch();
    const slot = this.#usedSlot;
    if (!this.#look()) return -1;
    const id = this.#halves[(slot << 3) + 6]!;
    const length = this.#words[(slot << 2) + 2]!;
    if (id >= this.num) {
      throw new VringError("USED_ID_OUT_OF_RANGE", slot, `The used descriptor in slot ${slot} has id ${id} in a queue of ${this.num}`);
    }
    if (this.#slots[id] === IDLE || this.#addedAt[id]! >= this.#published) {
      throw new VringError("USED_NOT_IN_FLIGHT", id, `The used descriptor in slot ${slot} has id ${id}, which the device does not have`);
    }
    if (!this.#inOrder) return this.#finish(id, length);
    this.#usedBatchId = id;
    this.#usedBatchLength = length;
    return this.#takeOfBatch();
  }

  #takeOfBatch(): number {
    const oldest = this.#order[this.#taken % this.num]!;
    if (oldest !== this.#usedBatchId) return this.#finish(oldest, this.#writable[oldest]!);
    this.#usedBatchId = -1;
    return this.#finish(oldest, this.#usedBatchLength);
  }

  #finish(id: number, length: number): number {
    const writable = this.#writable[id]!;
    this.usedLength = length < writable ? length : writable;
    const slots = this.#slots[id]!;
    this.#usedSlot += slots;
    if (this.#usedSlot >= this.num) {
      this.#usedSlot -= this.num;
      this.#usedWrap ^= 1;
    }
    this.#numFree += slots;
    this.#slots[id] = IDLE;
    this.#nextId[id] = this.#freeId;
    this.#freeId = id;
    this.#taken++;
    return id;
  }

  /** Is there a used descriptor in the next slot? */
  #look(): boolean {
    // Without anything published the slot holds an old descriptor.
    if (this.#taken === this.#published) return false;
    const flags = Atomics.load(this.#halves, (this.#usedSlot << 3) + 7);
    return (flags & STATE_MASK) === (this.#usedWrap === 1 ? STATE_MASK : 0);
  }

  /** Tells the device that calls are not needed (a hint). */
  disableCalls(): void {
    Atomics.store(this.#driverEvent, 0, VRING_PACKED_EVENT_FLAG_DISABLE << 16);
  }

  /** Asks for calls again. @returns whether used chains arrived meanwhile */
  enableCalls(): boolean {
    // Sequentially consistent store, then load: a device that uses a chain after this load sees the request.
    const event = this.#eventIdx ? packedPosition(this.#usedSlot, this.#usedWrap) | VRING_PACKED_EVENT_FLAG_DESC << 16 : 0;
    Atomics.store(this.#driverEvent, 0, event);
    return this.#usedBatchId >= 0 || this.#look();
  }

  /** The state as plain data; see {@linkcode DriverQueue.save}. */
  save(): DriverQueueState {
    if (this.#batchSlot >= 0) throw new SvqError("VRING_MISUSE", "A ring is saved before its publish");
    if (this.#usedBatchId >= 0) throw new SvqError("VRING_MISUSE", "A ring is saved in the middle of a batch of used chains");
    const ids: number[] = [];
    for (let id = 0; id < this.num; id++) if (this.#slots[id] !== IDLE) ids.push(id);
    ids.sort((a, b) => this.#addedAt[a]! - this.#addedAt[b]!);
    const inflight = ids.map((id): OutstandingRecord => ({
      id,
      descriptors: Array.from({ length: this.#slots[id]! }, (_, i) => (this.#first[id]! + i) % this.num),
      writable_bytes: this.#writable[id]!,
    }));
    const avail = packedPosition(this.#slot, this.#wrap);
    const used = packedPosition(this.#usedSlot, this.#usedWrap);
    return { layout: "packed", side: "driver", num: this.num, avail, used, inflight };
  }

  /** Takes over a saved state; see {@linkcode DriverQueue.restore}. @throws VringError STATE_INVALID */
  restore(state: unknown): void {
    const saved = readDriverState(state, "packed", this.num, this.#inOrder);
    this.#slot = saved.avail & 0x7fff;
    this.#wrap = saved.avail >>> 15;
    this.#usedSlot = saved.used & 0x7fff;
    this.#usedWrap = saved.used >>> 15;
    this.#slots.fill(IDLE);
    this.#added = this.#taken = 0;
    this.#numFree = this.num;
    for (const { id, descriptors, writable_bytes } of saved.inflight) {
      this.#slots[id] = descriptors.length;
      this.#first[id] = descriptors[0]!;
      this.#writable[id] = writable_bytes;
      this.#order[this.#added % this.num] = id;
      this.#addedAt[id] = this.#added++;
      this.#numFree -= descriptors.length;
    }
    this.#published = this.#added;
    this.#batchSlot = this.#usedBatchId = -1;
    this.#batchSlots = 0;
    this.#mustKick = true;
    let free = 0;
    for (let id = this.num - 1; id >= 0; id--) {
      if (this.#slots[id] !== IDLE) continue;
      this.#nextId[id] = free;
      free = id;
    }
    this.#freeId = free;
  }
}
