/**
 * The embedded guest's RAM: where rings, request slots and data blocks lie.
 *
 * RAM is one file. Its lower half is at 1 MiB, its upper half at 4 GiB, so that a memory table has two regions and a hole,
 * like a PC's. Offsets count bytes in the file.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import type { MemoryRegion } from "../memory/region.ts";
import { packedLayout, type RingLayout, splitLayout } from "../vring/layout.ts";
import type { VringAddresses } from "../vhost/backend.ts";

const LOW_GPA = 0x10_0000;
const HIGH_GPA = 0x1_0000_0000;
// Where this guest's RAM would be in a VMM: a name for vhost-user, never an address of this process.
const UADDR_BASE = 0x7e00_0000_0000;
const PAGE = 4096;

/** Bytes of one data block: the longest request. */
export const BLOCK_BYTES = 65536;
/** Bytes of one request slot: header at 0, range or id at 16, status at 63. */
export const SLOT_BYTES = 64;
/** Chains of up to this many segments use an indirect table, longer ones do not: both kinds occur. */
export const INDIRECT_ENTRIES = 5;

/** What decides a layout. */
export interface RamOptions {
  /** Bytes, a multiple of 8192. */
  ramSize: number;
  /** Queues. */
  queues: number;
  /** Ring size in descriptors. */
  num: number;
  /** Requests in flight in each queue. */
  depth: number;
  /** Packed rings. */
  packed: boolean;
}

function alignUp(value: number, align: number): number {
  return Math.ceil(value / align) * align;
}

/** Where everything lies in an embedded guest's RAM. */
export class RamLayout {
  readonly #ring: RingLayout;
  readonly #ringStride: number;
  readonly #indirectOffset: number;
  /** Where the slots start. */
  readonly slotsOffset: number;
  /** Slots: queues times depth. */
  readonly slots: number;
  /** Where the data blocks start. */
  readonly blocksOffset: number;
  /** Data blocks. */
  readonly blocks: number;

  /** Lays everything out. @throws SvqError RAM_TOO_SMALL (exit code 2) when there are fewer blocks than slots */
  constructor(readonly options: RamOptions) {
    const { ramSize, queues, num, depth, packed } = options;
    this.#ring = packed ? packedLayout(num) : splitLayout(num);
    this.#indirectOffset = alignUp(this.#ring.used.offset + this.#ring.used.size, PAGE);
    this.#ringStride = alignUp(this.#indirectOffset + num * INDIRECT_ENTRIES * 16, PAGE);
    this.slots = queues * depth;
    this.slotsOffset = queues * this.#ringStride;
    this.blocksOffset = alignUp(this.slotsOffset + this.slots * SLOT_BYTES, BLOCK_BYTES);
    // A block never lies across the hole: the half is a multiple of the block size.
    this.blocks = Math.floor((ramSize - this.blocksOffset) / BLOCK_BYTES);
    if (ramSize % (2 * BLOCK_BYTES) !== 0 || this.slotsOffset + this.slots * SLOT_BYTES > ramSize / 2 || this.blocks < this.slots) {
      throw new SvqError("RAM_TOO_SMALL", `${ramSize} bytes of guest RAM do not do for ${queues} queues with ${depth} requests in flight`, {
        exitCode: EXIT.usage,
        hint: `Give more RAM (a multiple of ${2 * BLOCK_BYTES} bytes), fewer queues or a smaller depth`,
      });
    }
  }

  /** GPA of a file offset. */
  gpa(offset: number): number {
    const half = this.options.ramSize / 2;
    return offset < half ? LOW_GPA + offset : HIGH_GPA + offset - half;
  }

  /** The memory table for a device. @param fd the RAM's file */
  regions(fd: number): MemoryRegion[] {
    const size = this.options.ramSize / 2;
    return [
      { gpa: LOW_GPA, size, uaddr: UADDR_BASE, fd, fdOffset: 0 },
      { gpa: HIGH_GPA, size, uaddr: UADDR_BASE + size, fd, fdOffset: size },
    ];
  }

  /** The parts of a queue's ring. */
  get ring(): RingLayout {
    return this.#ring;
  }

  /** Where a queue's ring starts. */
  ringOffset(queue: number): number {
    return queue * this.#ringStride;
  }

  /** Bytes of a queue's ring with its indirect tables. */
  get ringBytes(): number {
    return this.#ringStride;
  }

  /** Where a queue's indirect tables start. */
  indirectOffset(queue: number): number {
    return this.ringOffset(queue) + this.#indirectOffset;
  }

  /** Ring addresses for the device. */
  addresses(queue: number): VringAddresses {
    const start = this.ringOffset(queue);
    const { desc, avail, used } = this.#ring;
    return { desc: this.gpa(start + desc.offset), avail: this.gpa(start + avail.offset), used: this.gpa(start + used.offset) };
  }

  /** Where a slot starts. */
  slotOffset(slot: number): number {
    return this.slotsOffset + slot * SLOT_BYTES;
  }

  /** Where a block starts. */
  blockOffset(block: number): number {
    return this.blocksOffset + block * BLOCK_BYTES;
  }
}
