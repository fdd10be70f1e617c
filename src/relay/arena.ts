/**
 * The arena: one shared memory file that holds the shadow rings of all queues of a device, at addresses where no guest
 * memory will ever be.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { createMemfd, mapFd, type Mapping, type OwnedFd } from "../ffi/mod.ts";
import type { MemoryRegion } from "../memory/region.ts";
import type { IndirectTables, RingPlace } from "./messages.ts";

/** Largest ring that a slot may have to hold, descriptors. */
const NUM_MAX = 32768;

/** Addresses of the three parts of a ring, bytes. */
export type RingParts = Pick<RingPlace, "desc" | "avail" | "used">;

const MAX_TABLE_ENTRIES = 1024;
const PINNED_TABLE_ENTRIES = 16;
const AREA_ALIGN = 4096;

function alignUp(value: number): number {
  return Math.ceil(value / AREA_ALIGN) * AREA_ALIGN;
}

interface SlotLayout {
  desc: number;
  avail: number;
  used: number;
  /** Where indirect tables begin. */
  tables: number;
}

/** Where the parts of a shadow ring lie, relative to its slot; both formats fit (packed event areas are smaller). */
function slotLayout(num: number): SlotLayout {
  const avail = alignUp(num * 16);
  const used = alignUp(avail + 6 + 2 * num);
  return { desc: 0, avail, used, tables: alignUp(used + 6 + 8 * num) };
}

/**
 * Bytes reserved for one queue. A device that says how large its rings may be pins what it is given, so it gets little
 * more; for others the file is sparse and takes no memory that is not used.
 *
 * @param numMax largest ring of the device, where it is known
 */
export function slotSize(numMax: number | undefined): number {
  if (numMax === undefined) return 1 << 20;
  const num = Math.min(numMax, NUM_MAX);
  return slotLayout(num).tables + alignUp(num * 16 * PINNED_TABLE_ENTRIES);
}

/** Shadow rings in one memfd. */
export class Arena implements Disposable {
  readonly #fd: OwnedFd;
  readonly #mapping: Mapping;
  /** Bytes. */
  readonly size: number;

  /**
   * Makes and maps the file.
   *
   * @param queues how many slots
   * @param iova where the device finds the first byte
   * @param slotSize see {@linkcode slotSize}
   * @param handed the file of another process's arena, which the device has already; owned
   */
  constructor(readonly queues: number, readonly iova: number, readonly slotSize: number, handed?: OwnedFd) {
    this.size = queues * slotSize;
    this.#fd = handed ?? createMemfd("svq-shadow-rings", this.size);
    this.#mapping = mapFd(this.#fd.fd, { length: this.size, what: "shadow rings" });
  }

  /** The arena as a region of the device's memory table. @param uaddrOffset uaddr = iova + this */
  region(uaddrOffset: number): MemoryRegion {
    return { gpa: this.iova, size: this.size, uaddr: this.iova + uaddrOffset, fd: this.#fd.fd, fdOffset: 0 };
  }

  /** The file, borrowed: for a relay in another process. */
  get fd(): number {
    return this.#fd.fd;
  }

  /** The part of one queue, as a region. */
  regionOf(index: number, uaddrOffset: number): MemoryRegion {
    const at = index * this.slotSize;
    const gpa = this.iova + at;
    return { gpa, size: this.slotSize, uaddr: gpa + uaddrOffset, fd: this.#fd.fd, fdOffset: at };
  }

  #layout(index: number, num: number): { slot: number; layout: SlotLayout } {
    if (index >= this.queues) throw new SvqError("NO_SUCH_QUEUE", `Queue ${index}: the relay has shadow rings for ${this.queues} queues`);
    const layout = slotLayout(num);
    if (layout.tables > this.slotSize) throw new SvqError("RING_TOO_LARGE", `Queue ${index}: no shadow ring has ${num} descriptors`);
    return { slot: index * this.slotSize, layout };
  }

  /**
   * A zeroed ring of `num` descriptors for queue `index`: where the device finds it.
   *
   * @throws SvqError RING_TOO_LARGE, NO_SUCH_QUEUE
   */
  place(index: number, num: number): RingParts {
    const { slot, layout } = this.#layout(index, num);
    new Uint8Array(this.#mapping.buffer(slot, layout.tables)).fill(0);
    return this.peek(index, num);
  }

  /** Where the ring that {@linkcode place} made is in this process. */
  local(index: number, num: number): RingParts & { tables: IndirectTables } {
    const { slot, layout } = this.#layout(index, num);
    const { address } = this.#mapping;
    return {
      desc: address + slot + layout.desc,
      avail: address + slot + layout.avail,
      used: address + slot + layout.used,
      tables: { address: address + slot + layout.tables, iova: this.iova + slot + layout.tables, entries: this.#tableEntries(layout, num) },
    };
  }

  #tableEntries(layout: SlotLayout, num: number): number {
    return Math.min(MAX_TABLE_ENTRIES, Math.floor((this.slotSize - layout.tables) / (num * 16)));
  }

  /** Where the device finds the ring that {@linkcode place} made. */
  peek(index: number, num: number): RingParts {
    const { slot, layout } = this.#layout(index, num);
    return { desc: this.iova + slot + layout.desc, avail: this.iova + slot + layout.avail, used: this.iova + slot + layout.used };
  }

  /** A buffer over the used ring that {@linkcode place} made. */
  usedRing(index: number, num: number): ArrayBuffer {
    const { slot, layout } = this.#layout(index, num);
    return this.#mapping.buffer(slot + layout.used, 6 + 8 * num);
  }

  /** A buffer over a queue's whole slot, for dumps. */
  slot(index: number): ArrayBuffer {
    return this.#mapping.buffer(index * this.slotSize, this.slotSize);
  }

  /** Unmaps and closes; the device must have let go. */
  close(): void {
    this.#mapping.close();
    this.#fd.close();
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}
