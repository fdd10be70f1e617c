/**
 * Where dirty pages are recorded: in the VMM's log, or in a bitmap of our own until the VMM has brought one (after a reset
 * in mid-migration QEMU starts the rings before it sends the log).
 *
 * @module
 */
import { DirtyBitmap, LOG_PAGE_BYTES, logBytes } from "../dirty/bitmap.ts";
import { SvqError } from "../errors.ts";
import { createMemfd, dupFd, mapFd, type Mapping, type OwnedFd } from "../ffi/mod.ts";
import type { LogRegion } from "../vhost/backend.ts";

/** Bytes of a bitmap of our own, whole pages. */
function logSizeFor(endGpa: number): number {
  return Math.max(4096, Math.ceil(logBytes(endGpa) / 4096) * 4096);
}

/** What Workers are told: where the bitmap lies in this process. `size` 0: log nothing. */
export interface LogPlace {
  address: number;
  /** Bytes, a multiple of 4. */
  size: number;
}

/** The log that Workers write to, and the switch from one to the next. */
export class DirtyLogging implements Disposable {
  readonly #announce: (place: LogPlace) => Promise<void>;
  #own: Mapping | undefined;
  #vmm: Mapping | undefined;
  #vmmFile: OwnedFd | undefined;
  #vmmPlace: { offset: number; size: number } | undefined;
  #on = false;

  /** Logs nothing yet. @param announce tells every Worker the new place and resolves when all have left the old one */
  constructor(announce: (place: LogPlace) => Promise<void>) {
    this.#announce = announce;
  }

  /** Is a log of the VMM's there? */
  get hasVmmLog(): boolean {
    return this.#vmm !== undefined;
  }

  /** Are Workers told to log? */
  get on(): boolean {
    return this.#on;
  }

  /** The VMM's log, for a relay in another process; the descriptor is borrowed. */
  get vmmLog(): LogRegion | undefined {
    return this.#vmmFile === undefined ? undefined : { fd: this.#vmmFile.fd, ...this.#vmmPlace! };
  }

  get #current(): Mapping | undefined {
    return this.#vmm ?? this.#own;
  }

  /** Starts logging. @param endGpa end of guest memory, for a bitmap of our own where the VMM has sent no log yet */
  async start(endGpa: number): Promise<void> {
    this.#on = true;
    if (this.#vmm === undefined) this.#ensureOwn(endGpa);
    await this.#tell();
  }

  /** Stops logging. The VMM's log stays mapped: nothing revokes it. */
  async stop(): Promise<void> {
    this.#on = false;
    await this.#announce({ address: 0, size: 0 });
    this.#own?.close();
    this.#own = undefined;
  }

  /** Memory grew while no VMM log covers it: the bitmap of our own must. */
  async grow(endGpa: number): Promise<void> {
    if (!this.#on || this.#vmm !== undefined) return;
    if (this.#own !== undefined && this.#own.length >= logSizeFor(endGpa)) return;
    const old = this.#own;
    this.#own = undefined;
    this.#ensureOwn(endGpa);
    await this.#tell();
    if (old !== undefined) merge(old, this.#own!);
    old?.close();
  }

  #ensureOwn(endGpa: number): void {
    if (this.#own !== undefined) return;
    const size = logSizeFor(endGpa);
    using fd = createMemfd("svq-dirty", size);
    this.#own = mapFd(fd.fd, { length: size, what: "dirty bitmap" });
  }

  /**
   * Takes the VMM's log into use. When it resolves, every Worker has left the old one, and what a bitmap of our own had
   * recorded is in the new log.
   *
   * @throws SvqError LOG_TOO_SMALL, LOG_UNALIGNED; the old log stays in use then
   */
  async setVmmLog(log: LogRegion, endGpa: number): Promise<void> {
    const needed = Math.ceil(endGpa / LOG_PAGE_BYTES / 8);
    if (log.size < needed) {
      throw new SvqError(
        "LOG_TOO_SMALL",
        `A dirty log of ${log.size} bytes does not cover guest memory up to 0x${endGpa.toString(16)}: ${needed} bytes are needed`,
      );
    }
    if (log.offset % 4 !== 0) throw new SvqError("LOG_UNALIGNED", `A dirty log at file offset ${log.offset} is not aligned to 4 bytes`);
    const length = Math.floor(log.size / 4) * 4;
    const old = this.#vmm;
    this.#vmm = mapFd(log.fd, { offset: log.offset, length, what: "the VMM's dirty log" });
    this.#vmmFile?.close();
    this.#vmmFile = dupFd(log.fd);
    this.#vmmPlace = { offset: log.offset, size: log.size };
    await this.#tell();
    old?.close();
    if (this.#own !== undefined) {
      merge(this.#own, this.#vmm);
      this.#own.close();
      this.#own = undefined;
    }
  }

  async #tell(): Promise<void> {
    const place = this.#current;
    await this.#announce(this.#on && place !== undefined ? { address: place.address, size: place.length } : { address: 0, size: 0 });
  }

  /** Marks every page of the given ranges: used while a device still writes memory that nobody can follow. */
  markAll(ranges: readonly { gpa: number; size: number }[]): void {
    const place = this.#current;
    if (place === undefined) return;
    const bitmap = new DirtyBitmap(place.buffer());
    for (const { gpa, size } of ranges) bitmap.markRange(gpa, size);
  }

  /** Unmaps everything; Workers must have been stopped. */
  close(): void {
    this.#own?.close();
    this.#vmm?.close();
    this.#vmmFile?.close();
    this.#vmmFile = undefined;
    this.#own = undefined;
    this.#vmm = undefined;
    this.#on = false;
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}

function merge(from: Mapping, into: Mapping): void {
  new DirtyBitmap(from.buffer()).orInto(new DirtyBitmap(into.buffer()));
}
