/**
 * The memory that a VDUSE device may use, and the way to its driver's interrupt, in the device's worker: asked of the kernel range by range, each with the file that
 * it lies in, and mapped here.
 *
 * The kernel says when ranges go (UPDATE_IOTLB) and not when they come: bounce buffers appear with a driver's first
 * request. So whoever misses an address asks again.
 *
 * @module
 */
import { ERRNO, ioctl, MAP, mapFd, type Mapping, OwnedFd, PROT, SysError } from "../ffi/mod.ts";
import { RangeTable } from "../memory/range_table.ts";
import { ADDRESS_LIMIT } from "../memory/region.ts";
import { decodeIotlbEntry, newIotlbEntry, VDUSE, type VduseIotlbEntry } from "../uapi/vduse.ts";
import { ACCESS } from "../uapi/vhost.ts";

interface CachedRange {
  key: string;
  start: number;
  size: number;
  mapping: Mapping;
}

/** Maps what the IOTLB of a VDUSE device holds. */
export class VduseIotlb implements Disposable {
  readonly #fd: number;
  #ranges: CachedRange[] = [];
  #retired: Mapping[] = [];

  /** Nothing is asked yet. @param fd the open /dev/vduse/NAME, borrowed for the life of this object */
  constructor(fd: number) {
    this.#fd = fd;
  }

  /**
   * Asks the kernel for all ranges. Those that are the same as before keep their place in this process; those that are gone
   * stay mapped until {@linkcode release}.
   *
   * @throws SysError of mmap; ADDRESS_TOO_LARGE for a range above 2^52
   */
  read(): RangeTable {
    const known = new Map(this.#ranges.map((range) => [range.key, range]));
    const ranges: CachedRange[] = [];
    for (let next = 0; next < ADDRESS_LIMIT;) {
      const found = this.#lookUp(next);
      if (found === undefined) break;
      using file = found.file;
      const { entry } = found;
      const key = keyOf(entry, file);
      ranges.push(known.get(key) ?? { key, start: entry.start, size: entry.size, mapping: map(entry, file) });
      known.delete(key);
      next = entry.start + entry.size;
    }
    for (const { mapping } of known.values()) this.#retired.push(mapping);
    this.#ranges = ranges;
    return new RangeTable(ranges.map(({ start, size, mapping }) => ({ gpa: start, size, uaddr: start, address: mapping.address })));
  }

  #lookUp(start: number): { entry: VduseIotlbEntry; file: OwnedFd } | undefined {
    const bytes = newIotlbEntry(start);
    let fd: number;
    try {
      fd = ioctl(this.#fd, VDUSE.IOTLB_GET_FD, bytes, "VDUSE_IOTLB_GET_FD");
    } catch (error) {
      // No range from there on. EPERM: the kernel gave the device up.
      if (error instanceof SysError && [ERRNO.EINVAL, ERRNO.EPERM].some((number) => number === error.errno)) return undefined;
      throw error;
    }
    const file = new OwnedFd(fd);
    try {
      return { entry: decodeIotlbEntry(bytes), file };
    } catch (error) {
      file.close();
      throw error;
    }
  }

  /** Unmaps the ranges that are gone. Nothing may use a table any more but the one of the last {@linkcode read}. */
  release(): void {
    for (const mapping of this.#retired) mapping.close();
    this.#retired = [];
  }

  /** Forgets everything: nothing may use any table any more. */
  clear(): void {
    this.#retired.push(...this.#ranges.map(({ mapping }) => mapping));
    this.#ranges = [];
    this.release();
  }

  /** The same as {@linkcode clear}. */
  [Symbol.dispose](): void {
    this.clear();
  }
}

/**
 * Calls the driver of a queue. @param argument the queue's number, u32
 *
 * @returns false before DRIVER_OK: the kernel sets that when it has the answer to it, and interrupts nobody before
 * @throws SysError EPERM when the kernel gave the device up
 */
export function injectInterrupt(fd: number, argument: Uint8Array<ArrayBuffer>): boolean {
  try {
    ioctl(fd, VDUSE.VQ_INJECT_IRQ, argument, "VDUSE_VQ_INJECT_IRQ");
    return true;
  } catch (error) {
    if (error instanceof SysError && error.errno === ERRNO.EINVAL) return false;
    throw error;
  }
}

// Read-only memory is mapped privately and writable: a driver that gives it to the device to write into must not make a
// store of this process fault, and what is stored goes nowhere.
function map({ offset, size, start, perm }: VduseIotlbEntry, file: OwnedFd): Mapping {
  const flags = perm === ACCESS.RO ? MAP.PRIVATE | MAP.NORESERVE : MAP.SHARED;
  return mapFd(file.fd, { offset, length: size, prot: PROT.READ | PROT.WRITE, flags, what: `driver's memory at 0x${start.toString(16)}` });
}

function keyOf({ offset, start, size, perm }: VduseIotlbEntry, file: OwnedFd): string {
  let identity: string;
  try {
    const { dev, ino } = Deno.statSync(`/proc/self/fd/${file.fd}`);
    identity = `${dev}:${ino}`;
  } catch {
    // Unknown: never the same as another.
    identity = crypto.randomUUID();
  }
  return [identity, offset, start, size, perm].join(" ");
}
