/**
 * A guest with an IOMMU, on the data path of a Worker: chains name IOVAs, and go on as guest memory.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { type Iotlb, IotlbMiss } from "../iova/iotlb.ts";
import { ACCESS } from "../uapi/vhost.ts";
import { Chain, type RingMemory } from "../vring/queue.ts";
import type { DataPath } from "./core.ts";

/**
 * What a ring's addresses name. Buffers are not looked up here but when the chain is translated, since that is where it is
 * known how they are used; indirect tables are read through the IOMMU.
 */
export function iommuMemory(path: DataPath, iotlb: Iotlb): RingMemory {
  return {
    contains: () => true,
    buffer: (iova, length) => path.memory.buffer(iotlb.gpaOf(iova, ACCESS.RO), length),
    readWords: (iova, target, count) => {
      for (let done = 0; done < count;) {
        const at = iova + done * 4;
        const gpa = iotlb.gpaOf(at, ACCESS.RO);
        const words = Math.max(1, Math.floor(iotlb.run(at, (count - done) * 4, ACCESS.RO) / 4));
        if (!path.memory.readWords(gpa, target.subarray(done, done + words), words)) return false;
        done += words;
      }
      return true;
    },
  };
}

/** Translates the chains of one queue. */
export class IommuChains {
  /** The chain that was translated last, in guest memory. */
  readonly chain: Chain;
  /** The IOVA of each of its segments. */
  readonly iovas: Float64Array;
  /** What was not known when a translation ended early. */
  miss: IotlbMiss | undefined;
  readonly #path: DataPath;
  readonly #iotlb: Iotlb;

  /** @param capacity segments of a chain */
  constructor(path: DataPath, iotlb: Iotlb, capacity: number) {
    this.#path = path;
    this.#iotlb = iotlb;
    this.chain = new Chain(capacity);
    this.iovas = new Float64Array(capacity);
  }

  /** Runs `work`. @returns what it returns, or false, with {@linkcode IommuChains.miss} set, where an address is not known yet */
  try(work: () => boolean): boolean {
    try {
      return work();
    } catch (error) {
      if (!(error instanceof IotlbMiss)) throw error;
      this.miss = error;
      return false;
    }
  }

  /**
   * Translates into {@linkcode IommuChains.chain}. A segment that lies in several pieces of guest memory becomes several.
   *
   * @throws IotlbMiss, SvqError CHAIN_TOO_LONG, OUTSIDE_MEMORY
   */
  translate(chain: Chain): void {
    const out = this.chain;
    out.clear();
    out.id = chain.id;
    for (let i = 0; i < chain.count; i++) {
      this.#segment(chain.addresses[i]!, chain.lengths[i]!, i < chain.readableCount);
    }
  }

  #segment(start: number, length: number, readable: boolean): void {
    const iotlb = this.#iotlb;
    const out = this.chain;
    const perm = readable ? ACCESS.RO : ACCESS.WO;
    for (let done = 0; done < length;) {
      const iova = start + done;
      const gpa = iotlb.gpaOf(iova, perm);
      let part = iotlb.run(iova, length - done, perm);
      // Entries are pages, and buffers often more than one: those that lie behind one another stay one segment.
      while (done + part < length && iotlb.run(iova + part, 1, perm) === 1 && iotlb.gpaOf(iova + part, perm) === gpa + part) {
        part += iotlb.run(iova + part, length - done - part, perm);
      }
      if (!this.#path.memory.contains(gpa, part)) {
        throw new SvqError(
          "OUTSIDE_MEMORY",
          `IOVA 0x${iova.toString(16)}+${part} is mapped to 0x${gpa.toString(16)}, which is no guest memory`,
        );
      }
      if (out.count >= out.capacity) {
        throw new SvqError("CHAIN_TOO_LONG", `Chain ${out.id} has more than ${out.capacity} segments in guest memory`);
      }
      this.iovas[out.count] = iova;
      if (readable) out.addReadable(gpa, part);
      else out.addWritable(gpa, part);
      done += part;
    }
  }
}
