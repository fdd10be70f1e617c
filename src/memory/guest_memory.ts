/**
 * Guest memory as this process sees it: every region mapped once, by the main thread. Workers are given
 * {@linkcode GuestMemory.ranges} (plain data) and look addresses up in a RangeTable.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { dupFd, fileSize, mapFd, type Mapping, type OwnedFd } from "../ffi/mod.ts";
import { ADDRESS_LIMIT, type MappedRange, type MemoryRegion } from "./region.ts";

/** A region of {@linkcode GuestMemory}: what was asked for, and where it lies in this process. */
export interface MappedRegion extends MappedRange {
  /** Where the region starts in the file, bytes. */
  fdOffset: number;
  /** A descriptor of the file that {@linkcode GuestMemory} owns: valid until the region is removed. */
  fd: number;
}

interface Entry {
  region: MappedRegion;
  owned: OwnedFd;
  mapping: Mapping;
  dev: number;
  ino: number;
}

function hex(value: number): string {
  return `0x${value.toString(16)}`;
}

function nameOf(region: { gpa: number; size: number }): string {
  return `memory region ${hex(region.gpa)}+${hex(region.size)}`;
}

function isAddress(value: number): boolean {
  return Number.isInteger(value) && value >= 0 && value < ADDRESS_LIMIT;
}

function checkRegion(region: MemoryRegion): void {
  const { gpa, size, uaddr, fdOffset } = region;
  if (!(Number.isInteger(size) && size > 0)) throw new SvqError("BAD_REGION", `A memory region has a size of ${size} bytes`);
  for (const [name, value] of [["gpa", gpa], ["uaddr", uaddr], ["file offset", fdOffset]] as const) {
    if (!isAddress(value) || value + size > ADDRESS_LIMIT) {
      throw new SvqError("BAD_REGION", `${nameOf(region)}: its ${name} ${hex(value)} does not end below 2^52`);
    }
  }
}

/**
 * The memory of one guest (or one device's IOVA space): regions that do not overlap by gpa, mapped shared and writable,
 * each with a duplicate of its file's descriptor. Lookups are bounds checked.
 */
export class GuestMemory implements Disposable {
  #entries: Entry[] = [];

  /** The regions, sorted by gpa. */
  get regions(): readonly MappedRegion[] {
    return this.#entries.map((entry) => entry.region);
  }

  /** First address above all regions, bytes; 0 without regions. */
  get endGpa(): number {
    const last = this.#entries.at(-1);
    return last === undefined ? 0 : last.region.gpa + last.region.size;
  }

  /** The regions as plain data, sorted by gpa: for a Worker's RangeTable. */
  ranges(): MappedRange[] {
    return this.#entries.map(({ region: { gpa, size, uaddr, address } }) => ({ gpa, size, uaddr, address }));
  }

  /**
   * Maps one more region.
   *
   * @throws SvqError BAD_REGION (size 0, ends above 2^52), REGION_OVERLAPS, REGION_TRUNCATED (the file is too short)
   */
  add(region: MemoryRegion): MappedRegion {
    const entry = open(region);
    try {
      checkOverlap([...this.#entries, entry]);
    } catch (error) {
      close(entry);
      throw error;
    }
    this.#entries.push(entry);
    sort(this.#entries);
    return entry.region;
  }

  /** The region is at `uaddr` for the front-end from now on; its mapping stays. @throws SvqError NO_SUCH_REGION, BAD_REGION */
  readdress(region: Pick<MemoryRegion, "gpa" | "size" | "uaddr">, uaddr: number): void {
    const entry = this.#entries.find((entry) => samePlace(entry.region, region));
    if (entry === undefined) throw new SvqError("NO_SUCH_REGION", `${nameOf(region)} (uaddr ${hex(region.uaddr)}) is not in the table`);
    checkRegion({ ...entry.region, uaddr });
    entry.region = { ...entry.region, uaddr };
  }

  /** Unmaps the region with exactly this gpa, size and uaddr. @throws SvqError NO_SUCH_REGION */
  remove(region: Pick<MemoryRegion, "gpa" | "size" | "uaddr">): void {
    this.detach(region)[Symbol.dispose]();
  }

  /**
   * Like {@linkcode remove}, but the memory stays mapped until the result is disposed: when the Workers have let go of it.
   */
  detach(region: Pick<MemoryRegion, "gpa" | "size" | "uaddr">): Disposable {
    const index = this.#entries.findIndex((entry) => samePlace(entry.region, region));
    if (index < 0) throw new SvqError("NO_SUCH_REGION", `${nameOf(region)} (uaddr ${hex(region.uaddr)}) is not in the table`);
    return closer(this.#entries.splice(index, 1));
  }

  /**
   * Makes `regions` the whole table. A region that is there already, of the same file, keeps its mapping and its address.
   * On an error the old table stays as it was.
   */
  replaceAll(regions: readonly MemoryRegion[]): void {
    this.exchange(regions)[Symbol.dispose]();
  }

  /**
   * Like {@linkcode replaceAll}, but what is not in the new table stays mapped until the result is disposed: when the
   * Workers have let go of it.
   */
  exchange(regions: readonly MemoryRegion[]): Disposable {
    const next: Entry[] = [];
    const opened: Entry[] = [];
    try {
      for (const region of regions) {
        let entry = this.#entries.find((old) => !next.includes(old) && isSame(old, region));
        if (entry === undefined) {
          entry = open(region);
          opened.push(entry);
        }
        next.push(entry);
      }
      checkOverlap(next);
    } catch (error) {
      for (const entry of opened) close(entry);
      throw error;
    }
    const gone = this.#entries.filter((entry) => !next.includes(entry));
    this.#entries = next;
    sort(this.#entries);
    return closer(gone);
  }

  /** Unmaps everything. */
  clear(): void {
    const entries = this.#entries;
    this.#entries = [];
    for (const entry of entries) close(entry);
  }

  /** The gpa of an address in the front-end's process. @throws SvqError OUTSIDE_MEMORY */
  gpaOfUaddr(uaddr: number, length = 1): number {
    for (const { region } of this.#entries) {
      if (uaddr >= region.uaddr && uaddr + length <= region.uaddr + region.size) return uaddr - region.uaddr + region.gpa;
    }
    throw new SvqError("OUTSIDE_MEMORY", `Front-end address ${hex(uaddr)}+${hex(length)} lies in no memory region`);
  }

  #find(gpa: number, length: number): MappedRegion {
    if (length >= 0) {
      for (const { region } of this.#entries) {
        if (gpa >= region.gpa && gpa + length <= region.gpa + region.size) return region;
      }
    }
    throw new SvqError("OUTSIDE_MEMORY", `Guest memory ${hex(gpa)}+${hex(length)} does not lie in one memory region`);
  }

  /** Where `[gpa, gpa + length)`, which must lie in one region, is in this process. @throws SvqError OUTSIDE_MEMORY */
  addressOf(gpa: number, length: number): number {
    const region = this.#find(gpa, length);
    return region.address + (gpa - region.gpa);
  }

  /** Is all of `[gpa, gpa + length)` guest memory? It may span adjacent regions. */
  contains(gpa: number, length: number): boolean {
    if (!(length >= 0)) return false;
    let at = gpa;
    for (const { region } of this.#entries) {
      if (at < region.gpa) return false;
      if (at >= region.gpa + region.size) continue;
      at = region.gpa + region.size;
      if (gpa + length <= at) return true;
    }
    return false;
  }

  /** A buffer over `[gpa, gpa + length)`, for as long as the region is mapped. @throws SvqError OUTSIDE_MEMORY */
  buffer(gpa: number, length: number): ArrayBuffer {
    const region = this.#find(gpa, length);
    const entry = this.#entries.find((candidate) => candidate.region === region)!;
    return entry.mapping.buffer(gpa - region.gpa, length);
  }

  /** The same as {@linkcode clear}. */
  [Symbol.dispose](): void {
    this.clear();
  }
}

function samePlace(a: Pick<MemoryRegion, "gpa" | "size" | "uaddr">, b: Pick<MemoryRegion, "gpa" | "size" | "uaddr">): boolean {
  return a.gpa === b.gpa && a.size === b.size && a.uaddr === b.uaddr;
}

function identity(fd: number): Deno.FileInfo {
  return Deno.statSync(`/proc/self/fd/${fd}`);
}

function isSame(old: Entry, region: MemoryRegion): boolean {
  if (!samePlace(old.region, region) || old.region.fdOffset !== region.fdOffset) return false;
  const info = identity(region.fd);
  return info.dev === old.dev && info.ino === old.ino;
}

function open(region: MemoryRegion): Entry {
  checkRegion(region);
  const { gpa, size, uaddr, fdOffset } = region;
  const owned = dupFd(region.fd);
  try {
    const info = identity(owned.fd);
    // Touching a page behind the end of the file would kill the process with SIGBUS.
    if (info.isFile && fileSize(owned.fd) < fdOffset + size) {
      throw new SvqError(
        "REGION_TRUNCATED",
        `${nameOf(region)}: its file has ${info.size} bytes and ends before offset ${hex(fdOffset + size)}`,
      );
    }
    const mapping = mapFd(owned.fd, { offset: fdOffset, length: size, what: nameOf(region) });
    const mapped = { gpa, size, uaddr, fdOffset, fd: owned.fd, address: mapping.address };
    return { region: mapped, owned, mapping, dev: info.dev, ino: info.ino ?? 0 };
  } catch (error) {
    owned.close();
    throw error;
  }
}

function closer(entries: readonly Entry[]): Disposable {
  return {
    [Symbol.dispose]: () => {
      for (const entry of entries) close(entry);
    },
  };
}

function close(entry: Entry): void {
  entry.mapping.close();
  entry.owned.close();
}

function sort(entries: Entry[]): void {
  entries.sort((a, b) => a.region.gpa - b.region.gpa);
}

function checkOverlap(entries: readonly Entry[]): void {
  const sorted = [...entries];
  sort(sorted);
  for (let i = 1; i < sorted.length; i++) {
    const [low, high] = [sorted[i - 1]!.region, sorted[i]!.region];
    if (low.gpa + low.size > high.gpa) throw new SvqError("REGION_OVERLAPS", `${nameOf(high)} overlaps ${nameOf(low)}`);
  }
}
