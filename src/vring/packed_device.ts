/**
 * The device's side of a packed virtqueue (virtio 1.3, 2.8). Every value is read once from shared memory into private memory
 * and checked there.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { appendBuffer, beginChain, bufferAddress, endChain } from "./chain_builder.ts";
import { IndirectReader } from "./indirect.ts";
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
import { completePackedBase, PACKED_BASE_START, packedBase, packedEventWanted, packedPosition } from "./packed_event.ts";
import type { Chain, DeviceQueue, DeviceQueueState, RingMemory } from "./queue.ts";
import { VringError } from "./rules.ts";
import { readDeviceState } from "./state.ts";

/** Where a packed ring lies and what was negotiated, for {@linkcode PackedDevice}. */
export interface PackedDeviceOptions {
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
  /** INDIRECT_DESC was negotiated. */
  indirect: boolean;
  /** IN_ORDER was negotiated. */
  inOrder?: boolean;
  /** Guest memory: bounds of every buffer, and indirect tables. Without it no bounds are checked and no tables are read. */
  memory?: RingMemory;
  /** Longest chain taken, in segments; default the larger of num and 1024. A `Chain` of less capacity lowers it. */
  maxChain?: number;
  /**
   * Both positions, 32 bits (SET_VRING_BASE, completed by `completePackedBase`); default the beginning. Chains between the two
   * were taken by someone else: they are in flight here only after `restore`.
   */
  base?: number;
  /** Told of each chain when its used element is written, before a flush lets the driver see it. */
  onUsed?: (id: number) => void;
}

const STATE_MASK = VRING_PACKED_DESC_F_AVAIL | VRING_PACKED_DESC_F_USED;
/** Life of a buffer id: not ours, taken, or done but held back until its turn (IN_ORDER). */
const FREE = 0, TAKEN = 1, HELD = 2;

/** Implements {@linkcode DeviceQueue} for packed rings. */
export class PackedDevice implements DeviceQueue {
  /** Always `packed`. */
  readonly layout: "packed" = "packed";
  /** Queue size in descriptors. */
  readonly num: number;
  readonly #words: Uint32Array;
  readonly #halves: Uint16Array;
  readonly #driverEvent: Uint32Array;
  readonly #deviceEvent: Uint32Array;
  readonly #eventIdx: boolean;
  readonly #inOrder: boolean;
  readonly #indirect: boolean;
  readonly #memory: RingMemory | undefined;
  readonly #tables: IndirectReader;
  readonly #onUsed: ((id: number) => void) | undefined;
  readonly #maxChain: number;
  /** Next slot to take, and its wrap counter. */
  #slot: number;
  #wrap: number;
  /** Next slot to write a used descriptor to, and its wrap counter. */
  #usedSlot: number;
  #usedWrap: number;
  /** The first used descriptor of the batch gets its flags at the flush: -1 when there is none. */
  #batchSlot = -1;
  #batchFlags = 0;
  /** Slots and chains of the batch. */
  #batchSlots = 0;
  #batchChains = 0;
  #open = 0;
  #openSlots = 0;
  #mustCall = false;
  readonly #state: Uint8Array;
  readonly #slotsOf: Uint16Array;
  readonly #written: Uint32Array;
  /** Per slot at which a chain starts: its id. */
  readonly #idAt: Uint16Array;
  /** Slots taken since the beginning, and per id that number when it was taken. */
  #total = 0;
  readonly #takenAt: Float64Array;
  /** What `unpop` puts back; -1 for nothing. */
  #lastId = -1;

  /**
   * Takes up the ring at `base`; writes nothing.
   *
   * @throws VringError RING_SIZE, RING_ALIGNMENT or BASE_INVALID
   */
  constructor(options: PackedDeviceOptions) {
    const { num } = options;
    checkPackedNum(num);
    this.num = num;
    this.#eventIdx = options.eventIdx;
    this.#inOrder = options.inOrder ?? false;
    this.#indirect = options.indirect;
    this.#memory = options.memory;
    this.#onUsed = options.onUsed;
    this.#maxChain = options.maxChain ?? Math.max(num, 1024);
    this.#tables = new IndirectReader(options.memory, this.#maxChain);
    this.#words = words32("descriptor ring", options.desc, DESC_BYTES * num, 4);
    this.#halves = words16("descriptor ring", options.desc, DESC_BYTES * num, 4);
    this.#driverEvent = words32("driver event structure", options.avail, 4, 4);
    this.#deviceEvent = words32("device event structure", options.used, 4, 4);
    this.#state = new Uint8Array(num);
    this.#slotsOf = new Uint16Array(num);
    this.#written = new Uint32Array(num);
    this.#idAt = new Uint16Array(num);
    this.#takenAt = new Float64Array(num);
    const base = completePackedBase(options.base ?? PACKED_BASE_START, num, this.#halves);
    this.#slot = base & 0x7fff;
    this.#wrap = (base >>> 15) & 1;
    this.#usedSlot = (base >>> 16) & 0x7fff;
    this.#usedWrap = base >>> 31;
  }

  #available(flags: number, wrap: number): boolean {
    return (flags & STATE_MASK) === (wrap === 1 ? VRING_PACKED_DESC_F_AVAIL : VRING_PACKED_DESC_F_USED);
  }

  /** Takes the next available chain; see {@linkcode DeviceQueue.pop}. @throws VringError */
  pop(chain: Chain): boolean {
    const head = this.#slot;
    const flags = Atomics.load(this.#halves, (head << 3) + 7);
    if (this.#openSlots === this.num || !this.#available(flags, this.#wrap)) return false;
    const id = this.#walk(head, flags, chain);
    if (id >= this.num) {
      throw new VringError("PACKED_ID_OUT_OF_RANGE", head, `The chain in slot ${head} has id ${id} in a queue of ${this.num}`);
    }
    if (this.#state[id] !== FREE) {
      throw new VringError("PACKED_ID_IN_FLIGHT", id, `The chain in slot ${head} has id ${id}, which is in flight`);
    }
    chain.id = id;
    const slots = chain.slots;
    this.#state[id] = TAKEN;
    this.#slotsOf[id] = slots;
    this.#idAt[head] = id;
    this.#takenAt[id] = this.#total;
    this.#total += slots;
    this.#lastId = id;
    this.#open++;
    this.#openSlots += slots;
    this.#advance(slots);
    return true;
  }

  #advance(slots: number): void {
    this.#slot += slots;
    if (this.#slot >= this.num) {
      this.#slot -= this.num;
      this.#wrap ^= 1;
    }
  }

  /** Reads the chain that starts in slot `head`. @returns its buffer id, unchecked */
  #walk(head: number, headFlags: number, chain: Chain): number {
    const limit = Math.min(this.#maxChain, chain.capacity);
    const words = this.#words;
    const room = this.num - this.#openSlots;
    let slot = head;
    let wrap = this.#wrap;
    let flags = headFlags;
    beginChain(chain);
    for (let slots = 1;; slots++) {
      const word = slot << 2;
      const length = words[word + 2]!;
      const last = words[word + 3]!;
      if (slots > 1) {
        flags = last >>> 16;
        if (!this.#available(flags, wrap)) {
          throw new VringError("PACKED_LIST_BROKEN", slot, `The chain in slot ${head} goes on in slot ${slot}, which is not available`);
        }
      }
      const address = bufferAddress(head, slot, words[word]!, words[word + 1]!, length);
      const more = (flags & VRING_DESC_F_NEXT) !== 0;
      if ((flags & VRING_DESC_F_INDIRECT) !== 0) {
        if (!this.#indirect) throw new VringError("INDIRECT_NOT_NEGOTIATED", slot, `The descriptor in slot ${slot} is indirect`);
        if (more) throw new VringError("INDIRECT_WITH_NEXT", slot, `The indirect descriptor in slot ${slot} goes on`);
        if (slots > 1) {
          throw new VringError("PACKED_INDIRECT_MIXED", slot, `The chain in slot ${head} ends in an indirect table, in slot ${slot}`);
        }
        this.#walkTable(head, address, length, limit, chain);
      } else {
        appendBuffer(chain, this.#memory, limit, head, slot, address, length, flags);
      }
      if (!more) {
        endChain(chain, head);
        chain.slots = slots;
        return last & 0xffff;
      }
      if (slots === room) throw new VringError("CHAIN_LOOP", head, `The chain in slot ${head} is longer than the ring has room`);
      if (++slot === this.num) {
        slot = 0;
        wrap ^= 1;
      }
    }
  }

  #walkTable(head: number, address: number, length: number, limit: number, chain: Chain): void {
    const count = this.#tables.read(head, address, length, limit);
    const words = this.#tables.words;
    for (let index = 0; index < count; index++) {
      const word = index << 2;
      const bytes = words[word + 2]!;
      const flags = words[word + 3]! >>> 16;
      if ((flags & VRING_DESC_F_INDIRECT) !== 0) {
        throw new VringError("INDIRECT_NESTED", index, `Entry ${index} in the table of the chain in slot ${head} is indirect`);
      }
      // Other flags but WRITE are reserved here, and ignored as the specification asks (2.8.7).
      const at = bufferAddress(head, index, words[word]!, words[word + 1]!, bytes);
      appendBuffer(chain, this.#memory, limit, head, index, at, bytes, flags);
    }
    chain.indirectAddress = address;
    chain.indirectLength = length;
  }

  /** Puts the last popped chain back; see {@linkcode DeviceQueue.unpop}. */
  unpop(): void {
    const id = this.#lastId;
    if (id < 0 || this.#state[id] !== TAKEN) throw new SvqError("VRING_MISUSE", "unpop does not follow a pop");
    const slots = this.#slotsOf[id]!;
    this.#lastId = -1;
    this.#state[id] = FREE;
    this.#total -= slots;
    this.#open--;
    this.#openSlots -= slots;
    this.#slot -= slots;
    if (this.#slot < 0) {
      this.#slot += this.num;
      this.#wrap ^= 1;
    }
  }

  /** Records a chain as used; see {@linkcode DeviceQueue.push}. */
  push(id: number, written: number): void {
    if (this.#state[id] !== TAKEN) throw new SvqError("VRING_MISUSE", `Chain ${id} is pushed without being in flight`);
    if (!this.#inOrder) {
      this.#writeUsed(id, written);
      return;
    }
    this.#state[id] = HELD;
    this.#written[id] = written;
    // With IN_ORDER the next used slot is the first slot of the oldest chain.
    while (this.#batchChains < this.#open) {
      const oldest = this.#idAt[this.#usedSlot]!;
      if (this.#state[oldest] !== HELD) break;
      this.#writeUsed(oldest, this.#written[oldest]!);
    }
  }

  #writeUsed(id: number, written: number): void {
    if (this.#onUsed !== undefined) this.#onUsed(id);
    const slot = this.#usedSlot;
    const flags = (this.#usedWrap === 1 ? STATE_MASK : 0) | (written > 0 ? VRING_DESC_F_WRITE : 0);
    this.#words[(slot << 2) + 2] = written;
    this.#halves[(slot << 3) + 6] = id;
    if (this.#batchSlot < 0) {
      this.#batchSlot = slot;
      this.#batchFlags = flags;
    } else {
      // The driver looks at this slot only after it has seen the first one of the batch.
      this.#halves[(slot << 3) + 7] = flags;
    }
    const slots = this.#slotsOf[id]!;
    this.#state[id] = FREE;
    this.#batchSlots += slots;
    this.#batchChains++;
    this.#usedSlot = slot + slots;
    if (this.#usedSlot >= this.num) {
      this.#usedSlot -= this.num;
      this.#usedWrap ^= 1;
    }
  }

  /** Publishes what was pushed; see {@linkcode DeviceQueue.flush}. @returns whether the driver wants a call */
  flush(): boolean {
    if (this.#batchSlot < 0) return false;
    Atomics.store(this.#halves, (this.#batchSlot << 3) + 7, this.#batchFlags);
    const passed = this.#batchSlots;
    this.#open -= this.#batchChains;
    this.#openSlots -= passed;
    this.#batchSlot = -1;
    this.#batchSlots = this.#batchChains = 0;
    const event = Atomics.load(this.#driverEvent, 0);
    const wanted = packedEventWanted(event, this.#eventIdx, this.num, this.#usedSlot, this.#usedWrap, passed);
    if (!this.#mustCall) return wanted;
    this.#mustCall = false;
    return true;
  }

  /**
   * Makes the descriptors of all chains in flight look available again. Somebody who was killed before a flush may have left
   * used descriptors behind the place where the driver looks: the driver would take them for used as soon as it gets there.
   */
  withdrawUsed(): void {
    for (let i = 0, slot = this.#usedSlot, wrap = this.#usedWrap; i < this.#openSlots; i++) {
      const at = (slot << 3) + 7;
      const flags = Atomics.load(this.#halves, at);
      Atomics.store(this.#halves, at, (flags & ~STATE_MASK) | (wrap === 1 ? VRING_PACKED_DESC_F_AVAIL : VRING_PACKED_DESC_F_USED));
      if (++slot === this.num) {
        slot = 0;
        wrap ^= 1;
      }
    }
  }

  /** Tells the driver that kicks are not needed (a hint). */
  disableKicks(): void {
    Atomics.store(this.#deviceEvent, 0, VRING_PACKED_EVENT_FLAG_DISABLE << 16);
  }

  /** Asks for kicks again. @returns whether chains arrived meanwhile */
  enableKicks(): boolean {
    // Sequentially consistent store, then load: a driver that adds a chain after this load sees the request.
    const event = this.#eventIdx ? packedPosition(this.#slot, this.#wrap) | VRING_PACKED_EVENT_FLAG_DESC << 16 : 0;
    Atomics.store(this.#deviceEvent, 0, event);
    if (this.#openSlots === this.num) return false;
    return this.#available(Atomics.load(this.#halves, (this.#slot << 3) + 7), this.#wrap);
  }

  /** Both positions, 32 bits: what GET_VRING_BASE answers. */
  get base(): number {
    return packedBase(packedPosition(this.#slot, this.#wrap), packedPosition(this.#usedSlot, this.#usedWrap));
  }

  /** Chains taken and not yet flushed back. */
  get inflight(): number {
    return this.#open;
  }

  /** Makes all chains in flight available again; see {@linkcode DeviceQueue.rewind}. */
  rewind(): boolean {
    if (this.#batchSlot >= 0) return false;
    const slots = this.#openSlots;
    const distance = (this.#slot - this.#usedSlot + (this.#wrap === this.#usedWrap ? 0 : this.num)) % (2 * this.num);
    if (distance !== slots) return false;
    for (let id = 0; id < this.num; id++) {
      if (this.#state[id] === HELD) return false;
      if (this.#state[id] === TAKEN && this.#takenAt[id]! < this.#total - slots) return false;
    }
    this.#state.fill(FREE);
    this.#lastId = -1;
    this.#total -= slots;
    this.#open = this.#openSlots = 0;
    this.#slot = this.#usedSlot;
    this.#wrap = this.#usedWrap;
    return true;
  }

  /** The state as plain data; see {@linkcode DeviceQueue.save}. */
  save(): DeviceQueueState {
    if (this.#batchSlot >= 0) throw new SvqError("VRING_MISUSE", "A ring is saved before its flush");
    const ids: number[] = [];
    for (let id = 0; id < this.num; id++) if (this.#state[id] !== FREE) ids.push(id);
    ids.sort((a, b) => this.#takenAt[a]! - this.#takenAt[b]!);
    const inflight = ids.map((id) => ({
      id,
      age: this.#total - this.#takenAt[id]!,
      slots: this.#slotsOf[id]!,
      ...(this.#state[id] === HELD ? { written: this.#written[id]! } : {}),
    }));
    const used = packedPosition(this.#usedSlot, this.#usedWrap);
    return { layout: "packed", side: "device", num: this.num, base: this.base, used, inflight };
  }

  /** Takes over a saved state; see {@linkcode DeviceQueue.restore}. @throws VringError STATE_INVALID */
  restore(state: unknown): void {
    const saved = readDeviceState(state, "packed", this.num, this.#inOrder);
    this.#slot = saved.base & 0x7fff;
    this.#wrap = (saved.base >>> 15) & 1;
    this.#usedSlot = saved.used & 0x7fff;
    this.#usedWrap = saved.used >>> 15;
    this.#state.fill(FREE);
    this.#lastId = this.#batchSlot = -1;
    this.#batchSlots = this.#batchChains = this.#openSlots = 0;
    this.#open = saved.inflight.length;
    this.#total = saved.inflight[0]?.age ?? 0;
    for (const { id, age, slots, written } of saved.inflight) {
      this.#state[id] = written === undefined ? TAKEN : HELD;
      this.#slotsOf[id] = slots;
      this.#written[id] = written ?? 0;
      this.#takenAt[id] = this.#total - age;
      this.#idAt[(((this.#slot - age) % this.num) + this.num) % this.num] = id;
      this.#openSlots += slots;
    }
    this.#mustCall = true;
  }
}
