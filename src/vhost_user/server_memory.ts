/**
 * The memory table that a front-end has given to the back-end server: the regions with their descriptors, which stay open
 * as long as the region exists.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { dupFd, fileSize, getSeals, type OwnedFd } from "../ffi/fd.ts";
import { SEAL } from "../ffi/mapping.ts";
import type { MemoryRegion } from "../memory/region.ts";
import type { VhostBackend, VringAddresses } from "../vhost/backend.ts";
import { protocolError, type WireRegion } from "./message.ts";
import { RegionTable, ringSizes } from "./region_table.ts";
import type { VringAddrRecord } from "../uapi/vhost.ts";

interface OwnedRegion extends MemoryRegion {
  owned: OwnedFd;
}

/**
 * Refuses a file that ends before the range that a peer says is in it: touching the rest would kill this process (SIGBUS).
 *
 * @param sealed refuse a file, too, that could become shorter later: one without F_SEAL_SHRINK
 * @throws SvqError FILE_TOO_SHORT, FILE_UNSEALED, NOT_MEMORY where it is nothing that can be mapped
 */
export function requireFileRange(fd: number, offset: number, size: number, what: string, sealed: boolean): void {
  const info = Deno.statSync(`/proc/self/fd/${fd}`);
  // A character device (devdax) does not tell its size; mapping it checks that.
  if (info.isCharDevice === true) return;
  if (!info.isFile && info.isBlockDevice !== true) throw new SvqError("NOT_MEMORY", `${what}: its file descriptor is no file`);
  const length = info.isFile ? info.size : fileSize(fd);
  if (offset + size > length) {
    throw new SvqError("FILE_TOO_SHORT", `${what}: ${offset}+${size} lies outside its file of ${length} bytes`);
  }
  if (sealed && (getSeals(fd) & SEAL.SHRINK) === 0) {
    throw new SvqError("FILE_UNSEALED", `${what}: its owner could shorten the file (F_SEAL_SHRINK is missing)`, {
      hint: "QEMU: memory-backend-memfd,share=on,seal=on; or run the relay without --require-sealed",
    });
  }
}

/** Refuses a file that has become shorter since it was accepted. @throws SvqError FILE_SHRUNK */
export function requireStillThere(fd: number, offset: number, size: number, what: string): void {
  const info = Deno.statSync(`/proc/self/fd/${fd}`);
  if (!info.isFile || offset + size <= info.size) return;
  throw new SvqError("FILE_SHRUNK", `${what}: its file was cut off at ${info.size} bytes while it was in use`, {
    hint: "QEMU: memory-backend-memfd,share=on,seal=on cannot be cut off",
  });
}

function own(wire: WireRegion, owned: OwnedFd, sealed: boolean): OwnedRegion {
  requireFileRange(owned.fd, wire.mmapOffset, wire.size, `Memory region 0x${wire.gpa.toString(16)}`, sealed);
  return { gpa: wire.gpa, size: wire.size, uaddr: wire.uaddr, fd: owned.fd, fdOffset: wire.mmapOffset, owned };
}

/** Passes memory messages on to a backend, and translates ring addresses with what the front-end has said. */
export class ServerMemory implements Disposable {
  readonly #backend: VhostBackend;
  #table = new RegionTable<OwnedRegion>();

  readonly #sealed: boolean;

  /** An empty table. @param backend whose memory table follows the front-end's; `sealed`: see {@linkcode requireFileRange} */
  constructor(backend: VhostBackend, sealed: boolean) {
    this.#backend = backend;
    this.#sealed = sealed;
  }

  /** The regions, with descriptors that live as long as they are in the table. */
  get regions(): readonly MemoryRegion[] {
    return this.#table.regions;
  }

  /** Takes over the table of a server in another process, which the backend has been given already. Duplicates the descriptors. */
  adopt(regions: readonly MemoryRegion[]): void {
    for (const region of regions) {
      const owned = dupFd(region.fd);
      this.#table.add({ ...region, fd: owned.fd, owned });
    }
  }

  /** Replaces the table. Takes descriptors out of `fds` when the backend has accepted it. @throws SvqError, of the backend too */
  async set(wire: readonly WireRegion[], fds: OwnedFd[]): Promise<void> {
    if (wire.length !== fds.length) throw protocolError(`Memory table of ${wire.length} regions with ${fds.length} file descriptors`);
    const table = new RegionTable<OwnedRegion>();
    wire.forEach((region, i) => table.add(own(region, fds[i]!, this.#sealed)));
    await this.#backend.setMemTable(table.regions);
    fds.splice(0);
    this[Symbol.dispose]();
    this.#table = table;
  }

  /** Adds a region. Takes the descriptor out of `fds` when the backend has accepted it. @throws SvqError, of the backend too */
  async add(wire: WireRegion, fds: OwnedFd[]): Promise<void> {
    const limit = this.#backend.info.maxMemSlots;
    if (this.#table.regions.length >= limit) {
      throw new SvqError("TOO_MANY_REGIONS", `The front-end adds a memory region beyond the ${limit} that it was offered`);
    }
    this.#table.check(wire);
    const region = own(wire, fds[0]!, this.#sealed);
    await this.#backend.addMemRegion(region);
    fds.shift();
    this.#table.add(region);
  }

  /** Takes a region out: address, size and front-end address must match. @throws SvqError NO_SUCH_REGION, and of the backend */
  async remove(wire: WireRegion): Promise<void> {
    const region = this.#table.find(wire);
    if (region === undefined) {
      throw new SvqError("NO_SUCH_REGION", `The front-end removes a memory region at 0x${wire.gpa.toString(16)} that it has not added`);
    }
    await this.#backend.removeMemRegion({ gpa: region.gpa, size: region.size, uaddr: region.uaddr });
    this.#table.delete(region);
    region.owned.close();
  }

  /** Refuses a table one of whose files has become too short since. @throws SvqError FILE_SHRUNK */
  requireWhole(): void {
    for (const { fd, fdOffset, size, gpa } of this.#table.regions) {
      requireStillThere(fd, fdOffset, size, `Memory region 0x${gpa.toString(16)}`);
    }
  }

  /** The addresses of a ring as a backend wants them. @throws SvqError RING_OUTSIDE_MEMORY */
  ringAddresses(record: VringAddrRecord, num: number, packed: boolean): VringAddresses {
    const sizes = ringSizes(num, packed);
    const of = (part: string): string => `${part} of ring ${record.index}`;
    return {
      desc: this.#table.toGpa(record.desc, sizes.desc, of("Descriptors")),
      avail: this.#table.toGpa(record.avail, sizes.avail, of("Avail ring")),
      used: this.#table.toGpa(record.used, sizes.used, of("Used ring")),
      logGpa: record.flags === 0 ? undefined : record.logGuestAddr,
    };
  }

  /** Guest memory behind an address of the front-end. @throws SvqError RING_OUTSIDE_MEMORY */
  toGpa(uaddr: number, size: number, what: string): number {
    return this.#table.toGpa(uaddr, size, what);
  }

  /** Closes all descriptors and forgets the table. */
  [Symbol.dispose](): void {
    for (const region of this.#table.clear()) region.owned.close();
  }
}
