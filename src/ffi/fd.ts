/**
 * File descriptors with an owner.
 *
 * @module
 */
import { SysError } from "./errno.ts";
import { cString, errno, libc, retrying, retryingUnlessAgain } from "./libc.ts";

const F_DUPFD_CLOEXEC = 1030;
const F_GETFL = 3;
const F_SETFL = 4;
const F_ADD_SEALS = 1033;
const F_GET_SEALS = 1034;
const O_NONBLOCK = 0x800;
const SEEK_END = 2;

/** Flags of open(2) on x86-64 and arm64 Linux. */
export const O = {
  RDONLY: 0,
  WRONLY: 1,
  RDWR: 2,
  CREAT: 0o100,
  EXCL: 0o200,
  TRUNC: 0o1000,
  NONBLOCK: O_NONBLOCK,
  CLOEXEC: 0o2000000,
} as const;

// A net for leaks, not a mechanism: an fd that nobody closed is closed when its owner is collected.
const leaks = new FinalizationRegistry<number>((fd) => libc().close(fd));

/**
 * A file descriptor that closes when it is disposed. Closing twice is harmless; using it after that throws. Whoever
 * receives one in a parameter named `owned…` or documented "takes ownership" closes it; every other callee borrows.
 */
export class OwnedFd implements Disposable {
  #fd: number;

  /** Takes ownership of `fd`. */
  constructor(fd: number) {
    this.#fd = fd;
    leaks.register(this, fd, this);
  }

  /** The number. @throws SvqError EBADF after close */
  get fd(): number {
    if (this.#fd < 0) throw new SysError("fd", 9, "file descriptor used after close");
    return this.#fd;
  }

  /** Closed, or given away. */
  get closed(): boolean {
    return this.#fd < 0;
  }

  /** Gives the number away: the caller closes it from now on. */
  release(): number {
    const fd = this.fd;
    leaks.unregister(this);
    this.#fd = -1;
    return fd;
  }

  /** A second descriptor of the same open file. */
  dup(): OwnedFd {
    return dupFd(this.fd);
  }

  /** Closes the descriptor; harmless when repeated. */
  close(): void {
    if (this.#fd < 0) return;
    leaks.unregister(this);
    const fd = this.#fd;
    this.#fd = -1;
    // close(2) must not be repeated after EINTR on Linux: the descriptor is gone either way.
    libc().close(fd);
  }

  /** Same as `close`. */
  [Symbol.dispose](): void {
    this.close();
  }
}

/** A new descriptor (close-on-exec) of the file that `fd` refers to. */
export function dupFd(fd: number): OwnedFd {
  return new OwnedFd(retrying(() => libc().fcntl(fd, F_DUPFD_CLOEXEC, 0n), "fcntl", `fd ${fd}`));
}

/** Opens `path`. @throws SysError with the path in the message */
export function openFd(path: string, flags: number, mode = 0o600): OwnedFd {
  const bytes = cString(path);
  return new OwnedFd(retrying(() => libc().open(bytes, flags | O.CLOEXEC, mode), "open", path));
}

/** Is `fd` an open descriptor of this process? */
export function isOpenFd(fd: number): boolean {
  return libc().fcntl(fd, 1, /* F_GETFD */ 0n) >= 0;
}

/** Sets or clears O_NONBLOCK of the open file behind `fd`. */
export function setNonblocking(fd: number, on: boolean): void {
  const flags = retrying(() => libc().fcntl(fd, F_GETFL, 0n), "fcntl", `fd ${fd}`);
  const wanted = on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK;
  if (wanted !== flags) retrying(() => libc().fcntl(fd, F_SETFL, BigInt(wanted)), "fcntl", `fd ${fd}`);
}

/** Reads into `bytes`; `undefined` when a nonblocking fd has nothing, 0 at the end. */
export function readFd(fd: number, bytes: Uint8Array<ArrayBuffer>): number | undefined {
  return retryingUnlessAgain(() => libc().read(fd, bytes, BigInt(bytes.length)), "read");
}

/** Writes `bytes`; `undefined` when a nonblocking fd has no room. May write less than asked. */
export function writeFd(fd: number, bytes: Uint8Array<ArrayBuffer>): number | undefined {
  return retryingUnlessAgain(() => libc().write(fd, bytes, BigInt(bytes.length)), "write");
}

/** Size in bytes of the file behind `fd` (block devices too). @throws SysError where it cannot seek */
export function fileSize(fd: number): number {
  const size = libc().lseek(fd, 0n, SEEK_END);
  if (size < 0n) throw new SysError("lseek", errno(), `fd ${fd}`);
  return Number(size);
}

/** Are both descriptors of one file? False where that cannot be told. */
export function isSameFile(a: number, b: number): boolean {
  try {
    const [first, second] = [a, b].map((fd) => Deno.statSync(`/proc/self/fd/${fd}`));
    return first!.ino !== null && first!.ino === second!.ino && first!.dev === second!.dev;
  } catch {
    return false;
  }
}

/** Adds seals to a memfd. */
export function addSeals(fd: number, seals: number): void {
  retrying(() => libc().fcntl(fd, F_ADD_SEALS, BigInt(seals)), "fcntl", "F_ADD_SEALS");
}

/** The seals of a memfd; 0 for files that cannot be sealed. */
export function getSeals(fd: number): number {
  return Math.max(0, libc().fcntl(fd, F_GET_SEALS, 0n));
}
