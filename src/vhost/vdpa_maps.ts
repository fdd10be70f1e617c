/**
 * The memory that a vhost-vdpa device can reach: guest regions and shadow rings, mapped in this process and in the device's
 * IOTLB, with the IOVA allocator as the book of what is where. It refuses beforehand, with the reason, what the kernel would
 * only answer EFAULT to: ranges outside the device's, overlaps, memory that is not a shared file, the memlock limit.
 *
 * Each change is done as a whole or not at all.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { ERRNO, SysError } from "../ffi/errno.ts";
import { mapFd, type Mapping } from "../ffi/mapping.ts";
import { formatRange, type IovaRange, IovaSpace } from "../iova/mod.ts";
import type { MemoryRegion } from "../memory/region.ts";
import { formatSizeExact } from "../units.ts";
import type { MemlockStatus } from "./memlock.ts";
import type { VdpaNode } from "./vdpa_node.ts";

const PAGE = 4096;

/** One map of the device. */
export interface VdpaMap {
  /** First address that the device sees, bytes. */
  readonly iova: number;
  /** Bytes. */
  readonly size: number;
  /** Address space. */
  readonly asid: number;
}

/** How many IOTLB maps were made and dropped so far. */
export interface MapCounters {
  /** UPDATE messages. */
  mapped: number;
  /** INVALIDATE messages. */
  unmapped: number;
  /** Of `mapped`: those made again because a reset had dropped them. */
  remapped: number;
}

/** How the maps behave, as far as it is known. */
export interface MapPolicy {
  /** IOVA range of the device, both ends inclusive. */
  range: IovaRange;
  /** Address spaces. */
  addressSpaces: number;
  /** The kernel takes batches. */
  batch: boolean;
  /** ASIDs above 0 can be used. */
  asids: boolean;
  /** Whether the parent pins every page (true), uses virtual addresses (false), or nobody knows. */
  pins: boolean | undefined;
  /** Reads the memlock limit and what is pinned. */
  memlock: () => MemlockStatus;
}

interface Entry extends VdpaMap {
  readonly region: MemoryRegion;
  readonly mapping: Mapping;
  readonly dev: number;
  readonly ino: number;
}

function nameOf(region: { gpa: number; size: number }): string {
  return `Memory region 0x${region.gpa.toString(16)}+0x${region.size.toString(16)}`;
}

/** The maps of one device. */
export class VdpaMaps implements Disposable {
  #entries: Entry[] = [];
  #books: Map<number, IovaSpace>;
  // A reset has emptied the driver's tables.
  #stale = false;
  /** What was done so far. */
  readonly counters: MapCounters = { mapped: 0, unmapped: 0, remapped: 0 };

  /** Nothing is mapped yet. @param node borrowed; it has an owner */
  constructor(readonly node: VdpaNode, readonly policy: MapPolicy) {
    this.#books = new Map();
  }

  /** What is mapped, in order of address space and address. */
  get maps(): VdpaMap[] {
    const plain = this.#entries.map(({ iova, size, asid }) => ({ iova, size, asid }));
    return plain.sort((a, b) => a.asid - b.asid || a.iova - b.iova);
  }

  /** The book of an address space. */
  space(asid = 0): IovaSpace {
    return this.#books.get(asid) ?? new IovaSpace({ asid, ranges: [this.policy.range] });
  }

  /**
   * Makes `regions` all that is mapped in address space 0. What is there already, of the same file, is not touched.
   *
   * @throws SvqError IOVA_OUTSIDE_RANGE, IOVA_OVERLAP, IOVA_UNALIGNED, MEMORY_NOT_SHARED, REGION_TRUNCATED, MEMLOCK, IOTLB_REFUSED
   */
  replaceAll(regions: readonly MemoryRegion[]): void {
    const kept = new Set<Entry>();
    const added = regions.filter((region) => {
      const old = this.#entries.find((entry) => entry.asid === 0 && !kept.has(entry) && isSame(entry, region));
      if (old !== undefined) kept.add(old);
      return old === undefined;
    });
    this.#change(this.#entries.filter((entry) => entry.asid === 0 && !kept.has(entry)), added, 0);
  }

  /** Maps one more region. @throws as {@linkcode replaceAll}; BAD_ASID */
  add(region: MemoryRegion, asid = 0): void {
    if (asid > 0 && (!this.policy.asids || asid >= this.policy.addressSpaces)) {
      const has = this.policy.asids ? this.policy.addressSpaces : 1;
      throw new SvqError("BAD_ASID", `There is no address space ${asid}: the device has ${has}`);
    }
    this.#change([], [region], asid);
  }

  /** Unmaps a region, first for the device, then here. @throws SvqError NO_SUCH_REGION */
  remove(region: Pick<MemoryRegion, "gpa" | "size">, asid = 0): void {
    const found = this.#entries.find((entry) => entry.asid === asid && entry.iova === region.gpa && entry.size === region.size);
    if (found === undefined) throw new SvqError("NO_SUCH_REGION", `${nameOf(region)} is not mapped`);
    this.#change([found], [], asid);
  }

  /** Where `[iova, iova + length)` is in this process, for looking at rings; undefined where it is not in one map. */
  buffer(iova: number, length: number): ArrayBuffer | undefined {
    const entry = this.#entries.find((one) => one.asid === 0 && iova >= one.iova && iova + length <= one.iova + one.size);
    return entry?.mapping.buffer(iova - entry.iova, length);
  }

  #change(gone: readonly Entry[], regions: readonly MemoryRegion[], asid: number): void {
    const book = this.space(asid).clone();
    for (const { iova, size } of gone) book.free(BigInt(iova), BigInt(size));
    const opened: Entry[] = [];
    try {
      for (const region of regions) {
        book.allocAt(BigInt(region.gpa), BigInt(region.size), { tag: `region 0x${region.gpa.toString(16)}` });
        opened.push(open(region, asid));
      }
      this.#checkMemlock(gone, opened);
      if (opened.length + gone.length > 0) this.#apply(gone, opened, asid);
    } catch (error) {
      for (const entry of opened) entry.mapping.close();
      throw error;
    }
    this.#entries = [...this.#entries.filter((entry) => !gone.includes(entry)), ...opened];
    this.#books.set(asid, book);
    for (const entry of gone) entry.mapping.close();
  }

  // Unmaps, then maps; a refusal in the middle is undone.
  #apply(gone: readonly Entry[], added: readonly Entry[], asid: number): void {
    const done: Entry[] = [];
    this.#inBatch(asid, () => {
      for (const entry of gone) this.#unmap(entry);
      try {
        for (const entry of added) {
          this.#map(entry);
          done.push(entry);
        }
      } catch (error) {
        for (const entry of done) this.#unmap(entry);
        for (const entry of gone) this.#map(entry);
        throw error;
      }
    });
  }

  #inBatch(asid: number, work: () => void): void {
    if (!this.policy.batch) return work();
    this.node.beginBatch(asid);
    try {
      work();
    } finally {
      this.node.endBatch(asid);
    }
  }

  #map(entry: Entry): void {
    try {
      this.node.map({ iova: entry.iova, size: entry.size, address: entry.mapping.address }, entry.asid);
    } catch (error) {
      throw error instanceof SysError ? this.#refused(entry, error) : error;
    }
    this.counters.mapped++;
  }

  #unmap(entry: Entry): void {
    this.node.unmap(entry, entry.asid);
    this.counters.unmapped++;
  }

  #refused(entry: Entry, cause: SysError): SvqError {
    const details = { errno: cause.errno, syscall: cause.syscall, cause };
    const memlock = this.policy.memlock();
    if (cause.errno === ERRNO.EFAULT && this.policy.pins !== false && memlock.pinned + entry.size > memlock.limit) {
      return memlockError(entry.size, memlock, details);
    }
    const range = formatRange({ first: BigInt(entry.iova), last: BigInt(entry.iova + entry.size - 1) });
    return new SvqError("IOTLB_REFUSED", `${nameOf(entry.region)}: the kernel refused to map it at ${range}`, {
      ...details,
      hint: "The kernel does not say why. Its log (dmesg) may; the IOMMU may not reach the address, or memory may be short",
    });
  }

  #checkMemlock(gone: readonly Entry[], added: readonly Entry[]): void {
    if (this.policy.pins !== true || added.length === 0) return;
    const memlock = this.policy.memlock();
    const bytes = (entries: readonly Entry[]) => entries.reduce((sum, entry) => sum + entry.size, 0);
    const wanted = bytes(added);
    if (memlock.pinned - bytes(gone) + wanted > memlock.limit) throw memlockError(wanted, memlock);
  }

  /** The device was reset. @param persisted maps survive resets (IOTLB_PERSIST) */
  afterReset(persisted: boolean): void {
    this.#stale ||= !persisted && this.#entries.length > 0;
  }

  /** Maps everything again that a reset has dropped. @returns how many maps that took */
  restore(): number {
    if (!this.#stale) return 0;
    for (const asid of new Set(this.#entries.map((entry) => entry.asid))) {
      this.#inBatch(asid, () => {
        for (const entry of this.#entries) {
          if (entry.asid !== asid) continue;
          // The kernel's own table still has it, only the driver's is empty.
          this.#unmap(entry);
          this.#map(entry);
          this.counters.remapped++;
        }
      });
    }
    this.#stale = false;
    return this.#entries.length;
  }

  /** Unmaps everything here; the device must be closed or reset, or use it no more. */
  close(): void {
    for (const entry of this.#entries) entry.mapping.close();
    this.#entries = [];
    this.#books.clear();
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}

function memlockError(
  wanted: number,
  { pinned, limit }: MemlockStatus,
  details: { errno?: number; syscall?: string; cause?: unknown } = {},
): SvqError {
  const kib = Math.ceil((pinned + wanted) / 1024);
  return new SvqError(
    "MEMLOCK",
    `The device pins memory: ${formatSizeExact(wanted)} more on top of ${formatSizeExact(pinned)} exceed the limit of ${
      formatSizeExact(limit)
    } (RLIMIT_MEMLOCK)`,
    {
      ...details,
      hint: `Raise it to at least ${kib} KiB: ulimit -l unlimited, or LimitMEMLOCK=infinity in the systemd unit; root is not exempt`,
    },
  );
}

function isSame(entry: Entry, region: MemoryRegion): boolean {
  const { region: old } = entry;
  if (old.gpa !== region.gpa || old.size !== region.size || old.fdOffset !== region.fdOffset) return false;
  const info = Deno.statSync(`/proc/self/fd/${region.fd}`);
  return info.dev === entry.dev && (info.ino ?? 0) === entry.ino;
}

function open(region: MemoryRegion, asid: number): Entry {
  const hint = "Give the VM shared memory: -object memory-backend-memfd,id=m,size=…,share=on -machine memory-backend=m";
  const notShared = (why: string, cause?: unknown) =>
    new SvqError("MEMORY_NOT_SHARED", `${nameOf(region)}: ${why}; a vDPA device reaches shared file memory only`, { hint, cause });
  let info: Deno.FileInfo;
  try {
    info = Deno.statSync(`/proc/self/fd/${region.fd}`);
  } catch (cause) {
    throw notShared("it comes without a file", cause);
  }
  // The kernel passes over maps of anything else without a word.
  if (!info.isFile) throw notShared("what stands behind it is no regular file");
  if (info.size < region.fdOffset + region.size) {
    throw new SvqError("REGION_TRUNCATED", `${nameOf(region)}: its file has ${info.size} bytes and ends before its last one`);
  }
  if (region.fdOffset % PAGE !== 0) {
    throw new SvqError("IOVA_UNALIGNED", `${nameOf(region)}: its place in the file, ${region.fdOffset}, is not on a page`);
  }
  try {
    const mapping = mapFd(region.fd, { offset: region.fdOffset, length: region.size, what: nameOf(region) });
    return { iova: region.gpa, size: region.size, asid, region: { ...region }, mapping, dev: info.dev, ino: info.ino ?? 0 };
  } catch (cause) {
    if (cause instanceof SysError && (cause.errno === ERRNO.EACCES || cause.errno === ERRNO.EPERM)) {
      throw notShared("it cannot be mapped shared and writable", cause);
    }
    throw cause;
  }
}
