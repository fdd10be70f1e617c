/**
 * What is known of a guest's IOMMU: which addresses of its devices (IOVA) are mapped to which guest memory (GPA), and how
 * they may be used. A cache: the VMM adds to it when asked, and takes back what the guest unmaps.
 *
 * @module
 */
/** A range of IOVA, and where it lies. Plain data. */
export interface IotlbEntry {
  /** Start, bytes. */
  iova: number;
  /** Bytes. */
  size: number;
  /** Guest memory behind it, bytes. */
  gpa: number;
  /** One of `ACCESS` of src/uapi/vhost.ts. */
  perm: number;
}

/** An address that is not known (yet), or not for this use: the VMM is to be asked. */
export class IotlbMiss extends Error {
  /** @param perm how it is to be used: one of `ACCESS` */
  constructor(readonly iova: number, readonly perm: number) {
    super(`IOVA 0x${iova.toString(16)} is not known`);
  }
}

/** A guest that maps more, scattered, is asked for again: this is a cache. */
const MAX_ENTRIES = 65536;

/** Sorted ranges that do not overlap. Lookups allocate nothing. */
export class Iotlb {
  readonly #starts: number[] = [];
  readonly #ends: number[] = [];
  readonly #gpas: number[] = [];
  readonly #perms: number[] = [];
  #last = 0;

  /** How many ranges it holds. */
  get count(): number {
    return this.#starts.length;
  }

  /** All of them, as plain data. */
  get entries(): IotlbEntry[] {
    return this.#starts.map((iova, i) => ({ iova, size: this.#ends[i]! - iova, gpa: this.#gpas[i]!, perm: this.#perms[i]! }));
  }

  /** The range that `iova` lies in. */
  entryAt(iova: number): IotlbEntry | undefined {
    const i = this.#indexOf(iova);
    if (i < 0) return undefined;
    return { iova: this.#starts[i]!, size: this.#ends[i]! - this.#starts[i]!, gpa: this.#gpas[i]!, perm: this.#perms[i]! };
  }

  // The first range that ends above `iova`.
  #lowerBound(iova: number): number {
    let low = 0;
    let high = this.#ends.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (this.#ends[middle]! <= iova) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  #indexOf(iova: number): number {
    const last = this.#last;
    if (last < this.#starts.length && iova >= this.#starts[last]! && iova < this.#ends[last]!) return last;
    const index = this.#lowerBound(iova);
    if (index === this.#starts.length || this.#starts[index]! > iova) return -1;
    return this.#last = index;
  }

  #splice(at: number, remove: number, entries: readonly IotlbEntry[]): void {
    this.#starts.splice(at, remove, ...entries.map(({ iova }) => iova));
    this.#ends.splice(at, remove, ...entries.map(({ iova, size }) => iova + size));
    this.#gpas.splice(at, remove, ...entries.map(({ gpa }) => gpa));
    this.#perms.splice(at, remove, ...entries.map(({ perm }) => perm));
  }

  /** Adds a range; what was known of it before is forgotten. */
  update(entry: IotlbEntry): void {
    if (entry.size <= 0) return;
    this.invalidate(entry.iova, entry.size);
    if (this.count >= MAX_ENTRIES) this.clear();
    this.#splice(this.#lowerBound(entry.iova), 0, [entry]);
  }

  /** Forgets `[iova, iova + size)`. */
  invalidate(iova: number, size: number): void {
    const end = iova + size;
    const first = this.#lowerBound(iova);
    let after = first;
    const kept: IotlbEntry[] = [];
    for (; after < this.#starts.length && this.#starts[after]! < end; after++) {
      const [start, stop, gpa, perm] = [this.#starts[after]!, this.#ends[after]!, this.#gpas[after]!, this.#perms[after]!];
      if (start < iova) kept.push({ iova: start, size: iova - start, gpa, perm });
      if (stop > end) kept.push({ iova: end, size: stop - end, gpa: gpa + end - start, perm });
    }
    if (after > first) this.#splice(first, after - first, kept);
  }

  /** Forgets everything. */
  clear(): void {
    this.#splice(0, this.count, []);
  }

  /** Bytes from `iova` on that are known for this use, at most `length`, in one piece of guest memory. 0: not known */
  run(iova: number, length: number, perm: number): number {
    const index = this.#indexOf(iova);
    if (index < 0 || (this.#perms[index]! & perm) !== perm) return 0;
    return Math.min(length, this.#ends[index]! - iova);
  }

  /** The GPA of `iova`, which {@linkcode Iotlb.run} has found. @throws IotlbMiss */
  gpaOf(iova: number, perm: number): number {
    const index = this.#indexOf(iova);
    if (index < 0 || (this.#perms[index]! & perm) !== perm) throw new IotlbMiss(iova, perm);
    return this.#gpas[index]! + (iova - this.#starts[index]!);
  }

  /**
   * Where `[iova, iova + length)` lies, when that is one piece of guest memory.
   *
   * @returns its GPA; -1 where it lies in several pieces
   * @throws IotlbMiss for the first address that is not known for this use
   */
  place(iova: number, length: number, perm: number): number {
    const gpa = this.gpaOf(iova, perm);
    let whole = true;
    for (let done = this.run(iova, length, perm); done < length;) {
      whole = this.gpaOf(iova + done, perm) === gpa + done && whole;
      done += this.run(iova + done, length - done, perm);
    }
    return whole ? gpa : -1;
  }
}
