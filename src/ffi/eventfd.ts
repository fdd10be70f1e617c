/**
 * eventfd(2): kicks, calls and wake-ups.
 *
 * @module
 */
import { OwnedFd } from "./fd.ts";
import { libc, retrying, retryingUnlessAgain } from "./libc.ts";

const EFD_CLOEXEC = 0x80000;
const EFD_NONBLOCK = 0x800;

const value = new BigUint64Array(1);

/** A nonblocking eventfd with counter 0. */
export function createEventfd(): OwnedFd {
  return new OwnedFd(retrying(() => libc().eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd"));
}

/** Adds 1 to the counter and wakes its readers. A full counter (2^64 - 2) is as good as signalled. */
export function signalEventfd(fd: number): void {
  // The data path comes here. What a closure takes along is allocated where its function begins: it has one of its own.
  if (libc().eventfd_write(fd, 1n) < 0) signalAgain(fd);
}

function signalAgain(fd: number): void {
  retryingUnlessAgain(() => libc().eventfd_write(fd, 1n), "eventfd_write");
}

/** Reads and clears the counter. Zero where a nonblocking eventfd was not signalled. */
export function drainEventfd(fd: number): number {
  return retryingUnlessAgain(() => libc().eventfd_read(fd, value), "eventfd_read") === undefined ? 0 : Number(value[0]);
}
