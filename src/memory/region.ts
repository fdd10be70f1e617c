/**
 * Records that describe guest memory. Plain data: no maps, no I/O.
 *
 * Addresses are JavaScript numbers and stay below 2^52: checked where they enter (a message, a ring, the command line).
 *
 * @module
 */

/** Highest address (exclusive) that svq handles: integers below it are exact, sums of two of them too. */
export const ADDRESS_LIMIT = 2 ** 52;

/** One region of guest memory, backed by a shared file. */
export interface MemoryRegion {
  /** Address by which descriptors name it, bytes: the guest-physical address, or the IOVA in a table given to a device. */
  gpa: number;
  /** Bytes. */
  size: number;
  /** Address in the front-end's process as vhost-user carries it, bytes. It names; it is never dereferenced here. */
  uaddr: number;
  /** The file, borrowed for the call that carries this record. */
  fd: number;
  /** Where the region starts in the file, bytes. */
  fdOffset: number;
}

/** A region that this process has mapped: where its first byte lies. Plain data, so that Workers can be given it. */
export interface MappedRange {
  /** Address by which descriptors name it, bytes. */
  gpa: number;
  /** Bytes. */
  size: number;
  /** Address in the front-end's process, bytes. */
  uaddr: number;
  /** Address in this process, bytes. */
  address: number;
}
