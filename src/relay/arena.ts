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

/** Bytes reserved for one queue: the largest split ring (32768 descriptors) takes 832 KiB. The file is sparse. */
export const ARENA_SLOT_SIZE = 1 << 20;

/** Addresses of the three parts of a ring, bytes. */
export type RingParts = Pick<RingPlace, "desc" | "avail" | "used">;

const MAX_TABLE_ENTRIES = 1024;
const AREA_ALIGN = 4096;

function alignUp(value: number): number {
  return Math.ceil(value / AREA_ALIGN) * AREA_ALIGN;
}

/** Where the parts of a shadow ring lie, relative to its slot; both formats fit (packed event areas are smaller). */
function slotLayout(num: number): { desc: number; avail: number; used: number; end: number; tables: number; entries: number } {
  const avail = alignUp(num * 16);
  const used = alignUp(avail + 6 + 2 * num);
  const end = used + 6 + 8 * num;
  const tables = alignUp(end);
  const entries = Math.min(MAX_TABLE_ENTRIES, Math.max(0, Math.floor((ARENA_SLOT_SIZE - tables) / (num * 16))));
  return { desc: 0, avail, used, end, tables, entries };
}

/** Shadow rings in one memfd. */
export class Arena implements Disposable {
  readonly #fd: OwnedFd;
  readonly #mapping: Mapping;
  /** Bytes. */
  readonly size: number;

  /**
   * @param queues how many slots
   * @param iova where the device finds the first byte
   */
  constructor(readonly queues: number, readonly iova: number) {
    this.size = queues * ARENA_SLOT_SIZE;
    this.#fd = createMemfd("svq-shadow-rings", this.size);
    this.#mapping = mapFd(this.#fd.fd, { length: this.size, what: "shadow rings" });
  }

  /** The arena as a region of the device's memory table. @param uaddrOffset uaddr = iova + this */
  region(uaddrOffset: number): MemoryRegion {
    return { gpa: this.iova, size: this.size, uaddr: this.iova + uaddrOffset, fd: this.#fd.fd, fdOffset: 0 };
  }

  #layout(index: number, num: number): { slot: number; layout: ReturnType<typeof slotLayout> } {
    if (index >= this.queues) throw new SvqError("NO_SUCH_QUEUE", `Queue ${index}: the relay has shadow rings for ${this.queues} queues`);
    const layout = slotLayout(num);
    if (layout.end > ARENA_SLOT_SIZE) throw new SvqError("RING_TOO_LARGE", `Queue ${index}: no shadow ring has ${num} descriptors`);
    return { slot: index * ARENA_SLOT_SIZE, layout };
  }

  /**
   * A zeroed ring of `num` descriptors for queue `index`: where the device finds it.
   *
   * @throws SvqError RING_TOO_LARGE, NO_SUCH_QUEUE
   */
  place(index: number, num: number): RingParts {
    const { slot, layout } = this.#layout(index, num);
    new Uint8Array(this.#mapping.buffer(slot, layout.end)).fill(0);
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
      tables: { address: address + slot + layout.tables, iova: this.iova + slot + layout.tables, entries: layout.entries },
    };
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
    return this.#mapping.buffer(index * ARENA_SLOT_SIZE, ARENA_SLOT_SIZE);
  }

  /** Unmaps and closes; the device must have let go. */
  close(): void {
    this.#mapping.close();
    this.#fd.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
