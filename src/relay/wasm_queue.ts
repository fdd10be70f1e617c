/**
 * The state of one queue in the WebAssembly core's memory, as src/wasm/assembly/state.ts lays it down: fields, records of chains
 * at the device, private copies of their segments.
 *
 * @module
 */
import type { WindowMemory } from "../ffi/mod.ts";
import { LINK, QUEUE, QUEUE_BYTES, QUEUE_FLOATS, type QueueField, SLOT, SLOT_BYTES } from "./wasm_layout.ts";

/** A chain at the device. */
export interface HeldChain {
  /** As the guest knows it. */
  guestId: number;
  /** When it was taken, and how many have been since. */
  order: number;
  /** 1 for the youngest. */
  age: number;
  /** Guest memory, bytes. */
  segments: { address: number; length: number; writable: boolean }[];
}

/** Arrays of a queue: bytes per descriptor of the guest's ring or the device's. */
const ARRAYS = [
  ...[["taken", "guest", 2], ["doneIds", "guest", 1], ["doneLengths", "guest", 4], ["guestOrder", "guest", 2]] as const,
  ...[["deviceOrder", "device", 2]] as const,
  ...[["inflightBatch", "guest", 2], ["entryOf", "guest", 2], ["entryNext", "guest", 2]] as const,
  ...[["entryCount", "guest", 2], ["entryFree", "guest", 2]] as const,
] as const;

/** State of one queue; for one thread. */
export class WasmQueue implements Disposable {
  /** Where it lies: what the module's functions are called with. */
  readonly at: number;
  readonly #windows: WindowMemory;
  readonly #bytes: number;
  readonly #words: Int32Array;
  readonly #floats: Float64Array;
  readonly #guestNum: number;
  readonly #deviceNum: number;
  #slots: { at: number; capacity: number; words: Int32Array; wide: BigUint64Array } | undefined;

  /** @throws SvqError WASM_MEMORY_FULL */
  constructor(windows: WindowMemory, env: number, guestNum: number, deviceNum: number) {
    this.#windows = windows;
    this.#guestNum = guestNum;
    this.#deviceNum = deviceNum;
    let size = QUEUE_BYTES;
    const places = ARRAYS.map(([field, side, bytes]) => {
      const place = size;
      size = Math.ceil((place + (side === "guest" ? guestNum : deviceNum) * bytes) / 8) * 8;
      return [field, place] as const;
    });
    this.#bytes = size;
    this.at = windows.alloc(size);
    this.#words = new Int32Array(windows.memory.buffer, this.at, QUEUE_BYTES / 4);
    this.#floats = new Float64Array(windows.memory.buffer, this.at, QUEUE_BYTES / 8);
    for (const [field, place] of places) this.set(field, this.at + place);
    this.set("env", env);
    this.set("usedSlot", -1);
  }

  /** Sets a field. */
  set(field: QueueField, value: number): void {
    this.#words[QUEUE[field]] = value;
  }

  /** A field, as an unsigned number. */
  get(field: QueueField): number {
    return this.#words[QUEUE[field]]! >>> 0;
  }

  /** Takes away the bytes of the chains that came back. */
  takeBytes(): number {
    const bytes = this.#floats[QUEUE_FLOATS.bytes]!;
    this.#floats[QUEUE_FLOATS.bytes] = 0;
    return bytes;
  }

  /** What the in-flight record counts its next chain by. */
  set inflightCounter(value: number) {
    this.#floats[QUEUE_FLOATS.inflightCounter] = value;
  }

  /** An array of 16-bit numbers, one per descriptor of the guest's ring. */
  halves(
    field: "taken" | "guestOrder" | "entryOf" | "entryNext" | "entryCount" | "entryFree",
  ): Uint16Array<SharedArrayBuffer | ArrayBuffer> {
    return new Uint16Array(this.#windows.memory.buffer, this.get(field), this.#guestNum);
  }

  /** By guest id: is it done, and waits for its turn? */
  get done(): Uint8Array<SharedArrayBuffer | ArrayBuffer> {
    return new Uint8Array(this.#windows.memory.buffer, this.get("doneIds"), this.#guestNum);
  }

  /** A fresh ring: nothing is at the device. */
  resetDevice(packed: boolean, heads: boolean): void {
    const num = this.#deviceNum;
    const start = packed ? 1 : 0;
    for (const field of ["deviceNext", "deviceUsedNext", "freeHead", "inflight", "returned", "batchSlots"] as const) this.set(field, 0);
    this.set("deviceOrderNext", 0);
    this.set("deviceOrderOldest", 0);
    this.set("devicePublished", start);
    this.set("deviceUsedSeen", start);
    this.set("batchSlot", -1);
    this.set("numFree", num);
    const own = packed || heads ? 0 : num;
    this.#releaseSlots();
    const { words, capacity } = this.#makeSlots(own === 0 ? num * 2 : num);
    for (let id = 0; id < num; id++) {
      words[id * SLOT.words + SLOT.guestId] = -1;
      if (packed) words[id * SLOT.words + SLOT.slots] = id + 1;
    }
    // Segments of the ring's own descriptors are linked in a circle, as its free list is.
    for (let i = 0; i < own; i++) words[i * SLOT.words + SLOT.link] = (i + 1) % num << LINK.shift;
    this.set("poolBase", own);
    this.set("poolHead", 0);
    this.set("poolFree", 0);
    this.#link(words, own, capacity);
  }

  #makeSlots(capacity: number) {
    const at = this.#windows.alloc(capacity * SLOT_BYTES);
    const { buffer } = this.#windows.memory;
    const words = new Int32Array(buffer, at, capacity * SLOT.words);
    this.set("slots", at);
    return this.#slots = { at, capacity, words, wide: new BigUint64Array(buffer, at, capacity * SLOT.words / 2) };
  }

  #releaseSlots(): void {
    if (this.#slots !== undefined) this.#windows.release(this.#slots.at, this.#slots.capacity * SLOT_BYTES);
    this.#slots = undefined;
  }

  // Puts segments `[from, to)` at the head of the pool.
  #link(words: Int32Array, from: number, to: number): void {
    for (let i = from; i < to; i++) words[i * SLOT.words + SLOT.link] = (i + 1 < to ? i + 1 : this.get("poolHead")) << LINK.shift;
    if (to > from) this.set("poolHead", from);
    this.set("poolFree", this.get("poolFree") + to - from);
  }

  /** Makes room for more segments. @throws SvqError WASM_MEMORY_FULL */
  grow(): void {
    const old = this.#slots!;
    const { words, capacity } = this.#makeSlots(Math.max(old.capacity * 2, old.capacity + this.get("maxChain")));
    words.set(old.words);
    this.#windows.release(old.at, old.capacity * SLOT_BYTES);
    this.#link(words, old.capacity, capacity);
  }

  /** What the device holds, in the order in which it was taken. */
  held(): HeldChain[] {
    const held: HeldChain[] = [];
    const { words, wide } = this.#slots!;
    for (let id = 0; id < this.#deviceNum; id++) {
      const record = id * SLOT.words;
      const guestId = words[record + SLOT.guestId]!;
      if (guestId < 0) continue;
      const segments: HeldChain["segments"] = [];
      for (let index = words[record + SLOT.first]!;;) {
        const at = index * SLOT.words;
        const link = words[at + SLOT.link]!;
        const address = Number(wide[(at + SLOT.address) / 2]!);
        segments.push({ address, length: words[at + SLOT.length]! >>> 0, writable: (link & LINK.write) !== 0 });
        if ((link & LINK.more) === 0) break;
        index = link >>> LINK.shift;
      }
      const order = words[record + SLOT.order]! >>> 0;
      held.push({ guestId, order, age: (this.get("order") - order) >>> 0, segments });
    }
    return held.sort((a, b) => b.age - a.age);
  }

  /** Says when chain `id` was taken. */
  setOrder(id: number, order: number): void {
    this.#slots!.words[id * SLOT.words + SLOT.order] = order;
  }

  /** Gives its memory back. */
  [Symbol.dispose](): void {
    this.#releaseSlots();
    this.#windows.release(this.at, this.#bytes);
  }
}
