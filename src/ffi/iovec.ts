/**
 * Scatter-gather I/O between files and addresses of this process.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { libc, retrying, retryingUnlessAgain } from "./libc.ts";

const IOV_MAX = 1024;
const FALLOC_FL_KEEP_SIZE = 1;
const FALLOC_FL_PUNCH_HOLE = 2;
const FALLOC_FL_ZERO_RANGE = 0x10;

/** A reusable array of (address, length) pairs: struct iovec[], at most 1024. */
export class IoVector {
  readonly #bytes: Uint8Array<ArrayBuffer>;
  readonly #words: BigUint64Array;
  #count = 0;
  #length = 0;

  /** An empty list. @param capacity most segments that one call takes */
  constructor(readonly capacity = IOV_MAX) {
    this.#bytes = new Uint8Array(capacity * 16);
    this.#words = new BigUint64Array(this.#bytes.buffer);
  }

  /** Segments in the list. */
  get count(): number {
    return this.#count;
  }

  /** Sum of the lengths, in bytes. */
  get length(): number {
    return this.#length;
  }

  /** Empties the list. */
  clear(): void {
    this.#count = 0;
    this.#length = 0;
  }

  /** @throws SvqError when it is full: ask `count` first */
  /** Appends a segment: `length` bytes at `address` of this process. */
  push(address: number, length: number): void {
    if (this.#count === this.capacity) throw new SvqError("TOO_MANY_SEGMENTS", `More than ${this.capacity} segments in one transfer`);
    this.#words[this.#count * 2] = BigInt(address);
    this.#words[this.#count * 2 + 1] = BigInt(length);
    this.#count++;
    this.#length += length;
  }

  /** Drops the first `bytes` bytes, after a partial transfer. */
  advance(bytes: number): void {
    let first = 0;
    this.#length -= bytes;
    while (first < this.#count && bytes >= Number(this.#words[first * 2 + 1])) bytes -= Number(this.#words[first++ * 2 + 1]);
    if (first > 0) this.#words.copyWithin(0, first * 2, this.#count * 2);
    this.#count -= first;
    if (bytes > 0) {
      this.#words[0] = this.#words[0]! + BigInt(bytes);
      this.#words[1] = this.#words[1]! - BigInt(bytes);
    }
  }

  /** preadv(2) until all is read or the file ends; the bytes read. */
  readAllAt(fd: number, offset: number): number {
    return this.#all((done) => libc().preadv(fd, this.#bytes, this.#count, BigInt(offset + done)), "preadv");
  }

  /** pwritev(2) until all is written; the bytes written. */
  writeAllAt(fd: number, offset: number): number {
    return this.#all((done) => libc().pwritev(fd, this.#bytes, this.#count, BigInt(offset + done)), "pwritev");
  }

  #all(transfer: (done: number) => number, name: string): number {
    let done = 0;
    while (this.#count > 0) {
      const bytes = retrying(() => transfer(done), name);
      if (bytes === 0) break;
      done += bytes;
      this.advance(bytes);
    }
    return done;
  }

  /** writev(2), once; -errno on failure. */
  write(fd: number): number {
    return retrying(() => libc().writev(fd, this.#bytes, this.#count), "writev");
  }

  /** readv(2), once. */
  read(fd: number): number {
    return retrying(() => libc().readv(fd, this.#bytes, this.#count), "readv");
  }

  /** writev(2) on a nonblocking fd, once; `undefined` when nothing fits now. @throws SysError EPIPE when nobody reads */
  tryWrite(fd: number): number | undefined {
    return retryingUnlessAgain(() => libc().writev(fd, this.#bytes, this.#count), "writev");
  }

  /** readv(2) on a nonblocking fd, once; `undefined` when nothing is there, 0 at the end. */
  tryRead(fd: number): number | undefined {
    return retryingUnlessAgain(() => libc().readv(fd, this.#bytes, this.#count), "readv");
  }
}

/** fdatasync(2): what was written is on the medium. */
export function syncFd(fd: number): void {
  retrying(() => libc().fdatasync(fd), "fdatasync");
}

/** Frees a range of a file; it reads as zeros afterwards. */
export function punchHole(fd: number, offset: number, length: number): void {
  retrying(() => libc().fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, BigInt(offset), BigInt(length)), "fallocate");
}

/** Zeroes a range of a file and keeps it allocated. @throws SysError EOPNOTSUPP on tmpfs: write zeros instead */
export function zeroRange(fd: number, offset: number, length: number): void {
  retrying(() => libc().fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, BigInt(offset), BigInt(length)), "fallocate");
}
