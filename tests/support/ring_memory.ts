/**
 * Ring memory for tests: one flat buffer that stands for guest memory, with rings allocated in it.
 *
 * @module
 */
import type { RingMemory } from "../../src/vring/queue.ts";
import { alignUp, packedLayout, type RingLayout, splitLayout } from "../../src/vring/layout.ts";

/** Guest memory of `size` bytes from `base` on, all of it one buffer. */
export class FlatMemory implements RingMemory {
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly view: DataView<ArrayBuffer>;
  #next = 0;

  constructor(readonly size: number, readonly base = 0) {
    this.bytes = new Uint8Array(size);
    this.view = new DataView(this.bytes.buffer);
  }

  contains(address: number, length: number): boolean {
    return address >= this.base && address + length <= this.base + this.size;
  }

  buffer(address: number, length: number): ArrayBuffer {
    if (!this.contains(address, length)) throw new Error("outside");
    // A copy is enough: the rings only read through this.
    return this.bytes.buffer.slice(address - this.base, address - this.base + length);
  }

  /** Takes `size` bytes, aligned; returns their offset in `bytes` (add `base` for the address). */
  alloc(size: number, align = 16): number {
    const offset = alignUp(this.#next, align);
    this.#next = offset + size;
    if (this.#next > this.size) throw new Error("The test's memory is full");
    return offset;
  }

  /** Writes a split descriptor; `table` is an offset in `bytes`. */
  desc(table: number, index: number, address: number, length: number, flags: number, next = 0): void {
    const at = table + 16 * index;
    this.view.setBigUint64(at, BigInt(address), true);
    this.view.setUint32(at + 8, length, true);
    this.view.setUint16(at + 12, flags, true);
    this.view.setUint16(at + 14, next, true);
  }

  /** Writes a packed descriptor. */
  packedDesc(ring: number, slot: number, address: number, length: number, id: number, flags: number): void {
    const at = ring + 16 * slot;
    this.view.setBigUint64(at, BigInt(address), true);
    this.view.setUint32(at + 8, length, true);
    this.view.setUint16(at + 12, id, true);
    this.view.setUint16(at + 14, flags, true);
  }
}

/** Where the parts of a ring lie in a {@linkcode FlatMemory}, as ring parts and as offsets. */
export interface RingPlace {
  num: number;
  desc: { buffer: ArrayBuffer; byteOffset: number };
  avail: { buffer: ArrayBuffer; byteOffset: number };
  used: { buffer: ArrayBuffer; byteOffset: number };
}

function place(memory: FlatMemory, num: number, layout: RingLayout, skew: number): RingPlace {
  const buffer = memory.bytes.buffer;
  const part = (size: number, align: number, extra = 0) => ({ buffer, byteOffset: memory.alloc(size + extra, align) + extra });
  return {
    num,
    desc: part(layout.desc.size, 16),
    avail: part(layout.avail.size, Math.max(4, layout.avail.align), skew),
    used: part(layout.used.size, 4),
  };
}

/** Allocates a split ring; `skew` 2 puts the avail ring at an address that is aligned to 2 only. */
export function splitPlace(memory: FlatMemory, num: number, skew = 0): RingPlace {
  return place(memory, num, splitLayout(num), skew);
}

/** Allocates a packed ring. */
export function packedPlace(memory: FlatMemory, num: number): RingPlace {
  return place(memory, num, packedLayout(num), 0);
}
