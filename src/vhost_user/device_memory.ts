/**
 * The memory table as the front-end gives it to a device: region by region where the device has slots, else always whole.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { dupFd, type OwnedFd } from "../ffi/fd.ts";
import type { MemoryRegion } from "../memory/region.ts";
import { REQUEST } from "../uapi/vhost_user.ts";
import { encodeMemTable, encodeRegion, type WireRegion } from "./message.ts";
import { RegionTable } from "./region_table.ts";

/** Sends one memory message and resolves when the device has acted on it. */
export type SendMemoryMessage = (request: number, payload: Uint8Array<ArrayBuffer>, fds: readonly number[], what: string) => Promise<void>;

interface StoredRegion extends MemoryRegion {
  /** Which file: two descriptors of one file have the same. `undefined`: unknown, equal to none. */
  file: string | undefined;
  /** Where whole tables are sent, the descriptor must outlive the call. */
  owned: OwnedFd | undefined;
}

function fileOf(fd: number): string | undefined {
  try {
    const { dev, ino } = Deno.statSync(`/proc/self/fd/${fd}`);
    return ino === null ? undefined : `${dev}:${ino}`;
  } catch {
    return undefined;
  }
}

function toWire(region: MemoryRegion): WireRegion {
  return { gpa: region.gpa, size: region.size, uaddr: region.uaddr, mmapOffset: region.fdOffset };
}

function isSame(a: StoredRegion, b: StoredRegion): boolean {
  return a.gpa === b.gpa && a.size === b.size && a.uaddr === b.uaddr && a.fdOffset === b.fdOffset && a.file !== undefined &&
    a.file === b.file;
}

function continues(previous: StoredRegion, next: StoredRegion): boolean {
  return previous.file !== undefined && previous.file === next.file && previous.gpa + previous.size === next.gpa &&
    previous.uaddr + previous.size === next.uaddr && previous.fdOffset + previous.size === next.fdOffset;
}

// Joins neighbours that lie side by side in the same file, too.
function merge(regions: readonly StoredRegion[]): StoredRegion[] {
  const merged: StoredRegion[] = [];
  for (const region of regions.toSorted((a, b) => a.gpa - b.gpa)) {
    const last = merged.at(-1);
    if (last !== undefined && continues(last, region)) merged[merged.length - 1] = { ...last, size: last.size + region.size };
    else merged.push(region);
  }
  return merged;
}

/** A region that the device has, as plain data. */
export interface KnownRegion {
  /** As the device was told, bytes. */
  gpa: number;
  /** Bytes. */
  size: number;
  /** As the device was told, bytes. */
  uaddr: number;
  /** Bytes. */
  fdOffset: number;
  /** Which file. */
  file: string | null;
}

/** What the device has been told about memory. */
export class DeviceMemory implements Disposable {
  /** How many messages have changed it. */
  changes = 0;
  readonly #send: SendMemoryMessage;
  readonly #slots: boolean;
  readonly #limit: number;
  #table = new RegionTable<StoredRegion>();

  /**
   * An empty table.
   *
   * @param send sends a message to the device
   * @param slots has CONFIGURE_MEM_SLOTS been negotiated?
   * @param limit regions that the device takes
   */
  constructor(send: SendMemoryMessage, slots: boolean, limit: number) {
    this.#send = (...message) => {
      this.changes++;
      return send(...message);
    };
    this.#slots = slots;
    this.#limit = limit;
  }

  /** What the device has, where it was told region by region: for a process that goes on with the connection. */
  get known(): KnownRegion[] {
    if (!this.#slots) return [];
    return this.#table.regions.map(({ gpa, size, uaddr, fdOffset, file }) => ({ gpa, size, uaddr, fdOffset, file: file ?? null }));
  }

  /** The device has this already. */
  adopt(known: readonly KnownRegion[]): void {
    for (const { file, ...region } of known) this.#table.add({ ...region, fd: -1, file: file ?? undefined, owned: undefined });
  }

  /** The address on the wire of `length` bytes at `gpa`. @throws SvqError RING_OUTSIDE_MEMORY */
  toUaddr(gpa: number, length: number, what: string): number {
    return this.#table.toUaddr(gpa, length, what);
  }

  /**
   * Replaces the table. With slots, regions that stay as they are cost no message.
   *
   * @throws SvqError TOO_MANY_REGIONS, REGION_OVERLAP, DEVICE_REFUSED, or of the connection. With slots, what the device
   * had accepted until then stays.
   */
  async set(regions: readonly MemoryRegion[]): Promise<void> {
    const wanted = this.#tableOf(regions);
    if (!this.#slots) return await this.#replace(wanted);
    const kept = new Set<StoredRegion>();
    const fresh = wanted.regions.filter((region) => {
      const there = this.#table.regions.find((other) => isSame(other, region));
      if (there !== undefined) kept.add(there);
      return there === undefined;
    });
    if (kept.size + fresh.length > this.#limit) throw this.#tooMany(kept.size + fresh.length);
    for (const region of [...this.#table.regions]) if (!kept.has(region)) await this.#removeSlot(region);
    for (const region of fresh) await this.#addSlot(region);
  }

  /** Adds one region. @throws SvqError as {@linkcode set} does; the table is then as before */
  async add(region: MemoryRegion): Promise<void> {
    this.#table.check(region);
    if (this.#slots) {
      if (this.#table.regions.length >= this.#limit) throw this.#tooMany(this.#table.regions.length + 1);
      return await this.#addSlot(this.#store(region, region.fd));
    }
    await this.#replace(this.#tableOf([...this.#table.regions, region]));
  }

  /** Takes one region out. @throws SvqError NO_SUCH_REGION, DEVICE_REFUSED, or of the connection */
  async remove(region: Omit<MemoryRegion, "fd" | "fdOffset">): Promise<void> {
    const found = this.#table.find(region);
    if (found === undefined) throw new SvqError("NO_SUCH_REGION", `There is no memory region at 0x${region.gpa.toString(16)} like that`);
    if (this.#slots) return await this.#removeSlot(found);
    await this.#replace(this.#tableOf(this.#table.regions.filter((other) => other !== found)));
  }

  #store(region: MemoryRegion, fd: number): StoredRegion {
    return { ...toRegion(region), fd, file: fileOf(fd), owned: undefined };
  }

  #tableOf(regions: readonly MemoryRegion[]): RegionTable<StoredRegion> {
    const table = new RegionTable<StoredRegion>();
    for (const region of regions) table.add(this.#store(region, region.fd));
    return table;
  }

  async #addSlot(region: StoredRegion): Promise<void> {
    await this.#send(REQUEST.ADD_MEM_REG, encodeRegion(toWire(region)), [region.fd], `0x${region.gpa.toString(16)}`);
    this.#table.add(region);
  }

  async #removeSlot(region: StoredRegion): Promise<void> {
    await this.#send(REQUEST.REM_MEM_REG, encodeRegion(toWire(region)), [], `0x${region.gpa.toString(16)}`);
    this.#table.delete(region);
  }

  async #replace(wanted: RegionTable<StoredRegion>): Promise<void> {
    const all = wanted.regions;
    // By address: rust-vmm's back-ends refuse a table that is not sorted.
    const wire = all.length <= this.#limit ? all.toSorted((a, b) => a.gpa - b.gpa) : merge(all);
    if (wire.length > this.#limit) throw this.#tooMany(wire.length);
    for (const region of all) {
      region.owned = dupFd(region.fd);
    }
    try {
      await this.#send(REQUEST.SET_MEM_TABLE, encodeMemTable(wire.map(toWire)), wire.map((region) => region.fd), `${wire.length} regions`);
    } catch (error) {
      for (const region of all) region.owned?.close();
      throw error;
    }
    for (const region of all) region.fd = region.owned!.fd;
    this[Symbol.dispose]();
    this.#table = wanted;
  }

  #tooMany(count: number): SvqError {
    return new SvqError("TOO_MANY_REGIONS", `${count} memory regions for a device that takes ${this.#limit}`, {
      hint: "Give the guest fewer memory devices, or a device with more memory slots",
    });
  }

  /** Closes the descriptors that were kept and forgets the table. */
  [Symbol.dispose](): void {
    for (const region of this.#table.clear()) region.owned?.close();
  }
}

function toRegion({ gpa, size, uaddr, fd, fdOffset }: MemoryRegion): MemoryRegion {
  return { gpa, size, uaddr, fd, fdOffset };
}
