/**
 * The ring of a guest with an IOMMU: one range for its driver, and pieces here and there in guest memory. It is mapped once
 * more, in order, so that the data path finds it in one piece.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { type FilePiece, mapPieces, type Mapping } from "../ffi/mod.ts";
import type { Iotlb } from "../iova/iotlb.ts";
import type { GuestMemory } from "../memory/guest_memory.ts";
import { ACCESS } from "../uapi/vhost.ts";
import type { VringAddresses } from "../vhost/backend.ts";
import { packedLayout, splitLayout } from "../vring/layout.ts";

const PAGE = 4096;
/** Parts of a ring, in the order in which vhost calls them. */
export const PARTS = ["desc", "avail", "used"] as const;

/** One part, mapped. */
interface Part {
  mapping: Mapping;
  /** Where it begins in the mapping, bytes. */
  offset: number;
  size: number;
  /** Where its pieces lie in guest memory: address and length in turn, bytes. */
  pieces: number[];
}

function mapPart(iotlb: Iotlb, memory: GuestMemory, iova: number, size: number, perm: number): Part {
  const offset = iova % PAGE;
  const first = iova - offset;
  const end = Math.ceil((iova + size) / PAGE) * PAGE;
  const files: FilePiece[] = [];
  const pieces: number[] = [];
  for (let page = first; page < end; page += PAGE) {
    const gpa = iotlb.gpaOf(page, perm);
    const region = memory.regions.find((one) => gpa >= one.gpa && gpa + PAGE <= one.gpa + one.size);
    const fileOffset = region === undefined ? -1 : region.fdOffset + gpa - region.gpa;
    if (region === undefined || fileOffset % PAGE !== 0) {
      throw new SvqError(
        "RING_OUTSIDE_MEMORY",
        `A part of the ring, at IOVA 0x${page.toString(16)}, is mapped to 0x${gpa.toString(16)}, which is no whole page of guest memory`,
      );
    }
    files.push({ fd: region.fd, offset: fileOffset, length: PAGE });
    const start = Math.max(iova, page);
    pieces.push(gpa + start - page, Math.min(iova + size, page + PAGE) - start);
  }
  return { mapping: mapPieces(files, "guest ring"), offset, size, pieces };
}

/** A ring in one piece. */
export class RingWindow implements Disposable {
  readonly #parts: Record<(typeof PARTS)[number], Part>;

  private constructor(parts: Record<(typeof PARTS)[number], Part>) {
    this.#parts = parts;
  }

  /**
   * Maps the ring.
   *
   * @param at IOVAs
   * @throws IotlbMiss for the first page that is not known, SvqError RING_OUTSIDE_MEMORY, and what mmap says
   */
  static map(iotlb: Iotlb, memory: GuestMemory, at: VringAddresses, num: number, packed: boolean): RingWindow {
    const layout = packed ? packedLayout(num) : splitLayout(num);
    const done: Partial<Record<(typeof PARTS)[number], Part>> = {};
    try {
      for (const part of PARTS) {
        if (at[part] % layout[part].align !== 0) {
          throw new SvqError(
            "RING_UNALIGNED",
            `A part of the ring, at IOVA 0x${at[part].toString(16)}, is not aligned to ${layout[part].align} bytes`,
          );
        }
        const perm = part === "avail" || (part === "desc" && !packed) ? ACCESS.RO : ACCESS.RW;
        done[part] = mapPart(iotlb, memory, at[part], layout[part].size, perm);
      }
      return new RingWindow(done as Record<(typeof PARTS)[number], Part>);
    } catch (error) {
      for (const { mapping } of Object.values(done)) mapping.close();
      throw error;
    }
  }

  /** Where the parts are in this process, bytes. */
  get local(): { desc: number; avail: number; used: number } {
    const at = ({ mapping, offset }: Part) => mapping.address + offset;
    return { desc: at(this.#parts.desc), avail: at(this.#parts.avail), used: at(this.#parts.used) };
  }

  /** Where the first byte of each part lies in guest memory, bytes. */
  get gpas(): { desc: number; avail: number; used: number } {
    const { desc, avail, used } = this.#parts;
    return { desc: desc.pieces[0]!, avail: avail.pieces[0]!, used: used.pieces[0]! };
  }

  /** What the device's side writes, as address and length in turn: the used ring, and a packed ring's descriptors. */
  written(packed: boolean): number[] {
    return [...(packed ? this.#parts.desc.pieces : []), ...this.#parts.used.pieces];
  }

  /** A buffer over one part. */
  buffer(part: (typeof PARTS)[number]): ArrayBuffer {
    const { mapping, offset, size } = this.#parts[part];
    return mapping.buffer(offset, size);
  }

  /** Unmaps; whoever used it must have stopped. */
  close(): void {
    for (const part of PARTS) this.#parts[part].mapping.close();
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}
