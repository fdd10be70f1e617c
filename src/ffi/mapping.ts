/**
 * Memory maps and the files made for them.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { guardMemory, unguardMemory } from "./bus_guard.ts";
import { SysError } from "./errno.ts";
import { addSeals, OwnedFd } from "./fd.ts";
import { addressOf, bufferAt, cString, errno, libc, pointer, retrying } from "./libc.ts";

/** Protection bits of mmap(2). */
export const PROT = { NONE: 0, READ: 1, WRITE: 2 } as const;
/** Flags of mmap(2). */
export const MAP = { SHARED: 1, PRIVATE: 2, FIXED: 0x10, ANONYMOUS: 0x20, NORESERVE: 0x4000 } as const;
/** Seals of memfd_create(2) files. */
export const SEAL = { SEAL: 1, SHRINK: 2, GROW: 4 } as const;

const MFD_CLOEXEC = 1;
const MFD_ALLOW_SEALING = 2;

/** Bytes of a page, as the dirty log counts them and as mmap(2) aligns on the supported machines. */
export const PAGE_SIZE = 4096;

/** What {@linkcode mapFd} is given besides the descriptor. */
export interface MapOptions {
  /** Offset in the file in bytes; need not be page aligned. */
  offset?: number;
  /** Bytes to map. */
  length: number;
  /** Bits of {@linkcode PROT}; default read and write. */
  prot?: number;
  /** Bits of {@linkcode MAP}; default MAP_SHARED. */
  flags?: number;
  /** For messages: what this memory is. */
  what?: string;
}

/** A range of this process's memory, unmapped when disposed. Buffers made from it must not be touched after that. */
export class Mapping implements Disposable {
  /** Address of the first byte asked for. */
  readonly address: number;
  /** Length in bytes as asked for. */
  readonly length: number;
  #base: number;
  #mapped: number;

  /** Takes ownership of a map. @param base page-aligned start of the map; `mapped` its bytes; `address` and `length` the part that was asked for */
  constructor(base: number, mapped: number, address: number, length: number) {
    this.#base = base;
    this.#mapped = mapped;
    this.address = address;
    this.length = length;
  }

  /** Unmapped already. */
  get closed(): boolean {
    return this.#mapped === 0;
  }

  /** An ArrayBuffer over `[offset, offset + length)`, bounds checked here and nowhere later. */
  buffer(offset = 0, length: number = this.length - offset): ArrayBuffer {
    if (this.closed) throw new SvqError("MAPPING_CLOSED", "Memory used after it was unmapped");
    if (!(offset >= 0 && length >= 0 && offset + length <= this.length)) {
      throw new SvqError("OUT_OF_RANGE", `Range ${offset}+${length} lies outside a mapping of ${this.length} bytes`);
    }
    return bufferAt(this.address + offset, length);
  }

  /** Unmaps; harmless when repeated. */
  close(): void {
    if (this.#mapped === 0) return;
    const length = this.#mapped;
    this.#mapped = 0;
    unguardMemory(this.#base);
    libc().munmap(pointer(this.#base), BigInt(length));
  }

  /** Same as `close`. */
  [Symbol.dispose](): void {
    this.close();
  }
}

/** Maps a part of a file. @throws SysError from mmap(2), with `what` in the message */
export function mapFd(fd: number, options: MapOptions): Mapping {
  const offset = options.offset ?? 0;
  const slack = offset % PAGE_SIZE;
  const mapped = options.length + slack;
  if (!(options.length > 0)) throw new SvqError("BAD_SIZE", `${options.what ?? "memory"}: cannot map ${options.length} bytes`);
  const result = libc().mmap(
    null,
    BigInt(mapped),
    options.prot ?? PROT.READ | PROT.WRITE,
    options.flags ?? MAP.SHARED,
    fd,
    BigInt(offset - slack),
  );
  const base = Deno.UnsafePointer.value(result);
  if (base === 0xffff_ffff_ffff_ffffn || base === 0n) throw new SysError("mmap", errno(), options.what);
  if (fd >= 0) guardMemory(Number(base), mapped);
  return new Mapping(Number(base), mapped, Number(base) + slack, options.length);
}

/** A piece of a file for {@linkcode mapPieces}: whole pages. */
export interface FilePiece {
  /** The file. */
  fd: number;
  /** Bytes. */
  offset: number;
  /** Bytes. */
  length: number;
}

/** Maps pieces of files one behind the other, shared, as if they were one. @throws SvqError BAD_SIZE, SysError from mmap(2) */
export function mapPieces(pieces: readonly FilePiece[], what: string): Mapping {
  for (const { offset, length } of pieces) {
    if (offset % PAGE_SIZE !== 0 || length % PAGE_SIZE !== 0 || length <= 0) {
      throw new SvqError("BAD_SIZE", `${what}: ${offset}+${length} are no whole pages`);
    }
  }
  const whole = mapAnonymous(pieces.reduce((sum, { length }) => sum + length, 0), what);
  let address = whole.address;
  for (const { fd, offset, length } of pieces) {
    // Over the reservation that was just made: nothing else can be there.
    const at = Deno.UnsafePointer.create(BigInt(address));
    const result = libc().mmap(at, BigInt(length), PROT.READ | PROT.WRITE, MAP.SHARED | MAP.FIXED, fd, BigInt(offset));
    if (Deno.UnsafePointer.value(result) !== BigInt(address)) {
      const error = new SysError("mmap", errno(), what);
      whole.close();
      throw error;
    }
    address += length;
  }
  guardMemory(whole.address, whole.length);
  return whole;
}

/** Where a buffer lies in this process, bytes. Only for buffers that never move nor shrink: a WebAssembly memory that does not grow. */
export function bufferAddress(buffer: ArrayBuffer): number {
  return addressOf(new Uint8Array(buffer));
}

/** Anonymous private memory, zeroed. */
export function mapAnonymous(length: number, what?: string): Mapping {
  return mapFd(-1, { length, flags: MAP.PRIVATE | MAP.ANONYMOUS | MAP.NORESERVE, ...(what === undefined ? {} : { what }) });
}

/**
 * A memfd of `size` bytes, sealed against shrinking: a peer that maps it cannot be killed by SIGBUS.
 *
 * @param name shown in /proc/PID/fd and maps
 * @param size bytes
 */
export function createMemfd(name: string, size: number): OwnedFd {
  const bytes = cString(name);
  const fd = new OwnedFd(retrying(() => libc().memfd_create(bytes, MFD_CLOEXEC | MFD_ALLOW_SEALING), "memfd_create", name));
  try {
    retrying(() => libc().ftruncate(fd.fd, BigInt(size)), "ftruncate", `${name}, ${size} bytes`);
    addSeals(fd.fd, SEAL.SHRINK);
  } catch (error) {
    fd.close();
    throw error;
  }
  return fd;
}

/** Sets the length of the file behind `fd`, in bytes. */
export function truncateFd(fd: number, size: number): void {
  retrying(() => libc().ftruncate(fd, BigInt(size)), "ftruncate");
}

/** Copies `length` bytes between two addresses of this process. The caller has checked both ranges. */
export function copyMemory(destination: number, source: number, length: number): void {
  libc().memcpy(pointer(destination), pointer(source), BigInt(length));
}

/** Are `length` bytes at two addresses of this process equal? The caller has checked both ranges. */
export function equalMemory(a: number, b: number, length: number): boolean {
  return libc().memcmp(pointer(a), pointer(b), BigInt(length)) === 0;
}
