/**
 * The block device: virtio 1.3, 5.2. Data moves between guest memory and the file by preadv and pwritev; a memory disk is
 * a memfd, so that both take the same way.
 *
 * @module
 */
import { ERRNO, IoVector, mapAnonymous, type Mapping, punchHole, syncFd, SysError, zeroRange } from "../ffi/mod.ts";
import type { RangeTable } from "../memory/range_table.ts";
import { hasBit } from "../uapi/bits.ts";
import {
  VIRTIO_BLK_FEATURE_BITS,
  VIRTIO_BLK_ID_BYTES,
  VIRTIO_BLK_RANGE_BYTES,
  VIRTIO_BLK_REQUEST_BYTES,
  VIRTIO_BLK_S,
  VIRTIO_BLK_SECTOR_BYTES,
  VIRTIO_BLK_T,
  VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
} from "../uapi/virtio_blk.ts";
import type { Chain } from "../vring/queue.ts";
import { type DeviceModel, malformed, pushGuest, readChain, visitParts, writeChain } from "./model.ts";
import { MAX_RANGE_SECTORS, MAX_RANGES } from "./options.ts";

const ZERO_CHUNK = 1 << 16;

/** What {@linkcode BlkModel} serves. Plain data: it travels to the worker. */
export interface BlkBacking {
  /** Open descriptor of the disk, borrowed for the life of the model. */
  fd: number;
  /** Sectors of 512 bytes. */
  capacity: number;
  /** The disk cannot be written. */
  readOnly: boolean;
  /** The disk is memory: there is nothing to sync. */
  volatile: boolean;
  /** Id string, at most 20 bytes. */
  id: string;
}

/** Serves block requests. */
export class BlkModel implements DeviceModel {
  readonly #backing: BlkBacking;
  readonly #vector = new IoVector();
  readonly #header = new Uint8Array(VIRTIO_BLK_REQUEST_BYTES);
  readonly #headerWords = new Uint32Array(this.#header.buffer);
  readonly #status = new Uint8Array(1);
  readonly #id = new Uint8Array(VIRTIO_BLK_ID_BYTES);
  #zeros: Mapping | undefined;
  #writeThrough = false;
  #discard = false;
  #writeZeroes = false;

  /** Serves `backing`, which the caller keeps open. */
  constructor(backing: BlkBacking) {
    this.#backing = backing;
    this.#id.set(new TextEncoder().encode(backing.id).subarray(0, VIRTIO_BLK_ID_BYTES));
  }

  /** Takes the negotiated features over: without FLUSH each write is synced at once (5.2.6.2). */
  configure(features: bigint): void {
    this.#writeThrough = !hasBit(features, VIRTIO_BLK_FEATURE_BITS.FLUSH);
    this.#discard = hasBit(features, VIRTIO_BLK_FEATURE_BITS.DISCARD);
    this.#writeZeroes = hasBit(features, VIRTIO_BLK_FEATURE_BITS.WRITE_ZEROES);
  }

  /** Serves one request; see {@linkcode DeviceModel.execute}. @throws SvqError MALFORMED_REQUEST without header or status */
  execute(chain: Chain, memory: RangeTable): number {
    if (chain.readableBytes < VIRTIO_BLK_REQUEST_BYTES) {
      throw malformed(`A block request has ${chain.readableBytes} bytes of header instead of 16`);
    }
    if (chain.writableBytes < 1) throw malformed("A block request has no room for its status");
    this.#readHeader(chain, memory);
    const type = this.#headerWords[0]!;
    const sector = this.#headerWords[2]! + this.#headerWords[3]! * 2 ** 32;
    const room = chain.writableBytes - 1;
    let written = 0;
    let status: number = VIRTIO_BLK_S.OK;
    try {
      switch (type) {
        case VIRTIO_BLK_T.IN:
          status = this.#transfer(chain, memory, sector, true, room);
          // After a failure nothing is known about the data: all of it counts as written.
          written = room;
          break;
        case VIRTIO_BLK_T.OUT:
          status = this.#transfer(chain, memory, sector, false, chain.readableBytes - VIRTIO_BLK_REQUEST_BYTES);
          break;
        case VIRTIO_BLK_T.FLUSH:
          this.#sync();
          break;
        case VIRTIO_BLK_T.GET_ID:
          written = writeChain(chain, memory, 0, this.#id.subarray(0, Math.min(room, VIRTIO_BLK_ID_BYTES)));
          break;
        case VIRTIO_BLK_T.DISCARD:
          status = this.#discard ? this.#ranges(chain, memory, true) : VIRTIO_BLK_S.UNSUPP;
          break;
        case VIRTIO_BLK_T.WRITE_ZEROES:
          status = this.#writeZeroes ? this.#ranges(chain, memory, false) : VIRTIO_BLK_S.UNSUPP;
          break;
        default:
          status = VIRTIO_BLK_S.UNSUPP;
      }
    } catch (error) {
      if (!(error instanceof SysError)) throw error;
      status = VIRTIO_BLK_S.IOERR;
    }
    this.#status[0] = status;
    writeChain(chain, memory, room, this.#status);
    // The status is the last byte of the chain: with a gap before it, only what lies in front is known to be written.
    return written === room ? room + 1 : written;
  }

  #readHeader(chain: Chain, memory: RangeTable): void {
    // Drivers put the header into a segment of its own: the usual case costs four loads.
    if (chain.lengths[0]! >= VIRTIO_BLK_REQUEST_BYTES && memory.readWords(chain.addresses[0]!, this.#headerWords, 4)) return;
    readChain(chain, memory, 0, this.#header);
  }

  #inside(sector: number, sectors: number): boolean {
    return sector + sectors <= this.#backing.capacity;
  }

  #transfer(chain: Chain, memory: RangeTable, sector: number, read: boolean, length: number): number {
    if (length % VIRTIO_BLK_SECTOR_BYTES !== 0 || !this.#inside(sector, length / VIRTIO_BLK_SECTOR_BYTES)) return VIRTIO_BLK_S.IOERR;
    if (!read && this.#backing.readOnly) return VIRTIO_BLK_S.IOERR;
    const vector = this.#vector;
    let position = sector * VIRTIO_BLK_SECTOR_BYTES;
    let complete = true;
    vector.clear();
    const move = () => {
      const wanted = vector.length;
      const moved = read ? vector.readAllAt(this.#backing.fd, position) : vector.writeAllAt(this.#backing.fd, position);
      position += wanted;
      complete &&= moved === wanted;
      vector.clear();
    };
    visitParts(chain, read, read ? 0 : VIRTIO_BLK_REQUEST_BYTES, length, (gpa, size) => {
      // One part of a chain is one piece, or a few where regions meet: 32 are enough room for each.
      if (vector.count > vector.capacity - 32) move();
      if (!pushGuest(vector, memory, gpa, size)) throw malformed("A buffer spans more than 32 memory regions");
    });
    move();
    if (!read && this.#writeThrough) this.#sync();
    return complete ? VIRTIO_BLK_S.OK : VIRTIO_BLK_S.IOERR;
  }

  #sync(): void {
    if (!this.#backing.volatile) syncFd(this.#backing.fd);
  }

  // Discard and write-zeroes (5.2.6.2): all ranges are checked before the first is touched.
  #ranges(chain: Chain, memory: RangeTable, discard: boolean): number {
    const bytes = new Uint8Array(chain.readableBytes - VIRTIO_BLK_REQUEST_BYTES);
    const count = bytes.length / VIRTIO_BLK_RANGE_BYTES;
    if (this.#backing.readOnly || !Number.isInteger(count) || count < 1 || count > MAX_RANGES) return VIRTIO_BLK_S.IOERR;
    readChain(chain, memory, VIRTIO_BLK_REQUEST_BYTES, bytes);
    const view = new DataView(bytes.buffer);
    const ranges: { offset: number; length: number; unmap: boolean }[] = [];
    for (let at = 0; at < bytes.length; at += VIRTIO_BLK_RANGE_BYTES) {
      const sector = view.getUint32(at, true) + view.getUint32(at + 4, true) * 2 ** 32;
      const sectors = view.getUint32(at + 8, true);
      const flags = view.getUint32(at + 12, true);
      if ((flags & ~VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) !== 0 || (discard && flags !== 0)) return VIRTIO_BLK_S.UNSUPP;
      if (sectors > MAX_RANGE_SECTORS || !this.#inside(sector, sectors)) return VIRTIO_BLK_S.IOERR;
      ranges.push({ offset: sector * VIRTIO_BLK_SECTOR_BYTES, length: sectors * VIRTIO_BLK_SECTOR_BYTES, unmap: flags !== 0 });
    }
    for (const { offset, length, unmap } of ranges) {
      if (length === 0) continue;
      if (discard) this.#tryPunch(offset, length);
      else if (!(unmap && this.#tryPunch(offset, length))) this.#zero(offset, length);
    }
    if (!discard && this.#writeThrough) this.#sync();
    return VIRTIO_BLK_S.OK;
  }

  // Discard is advice: a file system that cannot free space has obeyed as well as it can.
  #tryPunch(offset: number, length: number): boolean {
    try {
      punchHole(this.#backing.fd, offset, length);
      return true;
    } catch (error) {
      if (error instanceof SysError && error.errno === ERRNO.EOPNOTSUPP) return false;
      throw error;
    }
  }

  #zero(offset: number, length: number): void {
    try {
      zeroRange(this.#backing.fd, offset, length);
      return;
    } catch (error) {
      if (!(error instanceof SysError && error.errno === ERRNO.EOPNOTSUPP)) throw error;
    }
    this.#zeros ??= mapAnonymous(ZERO_CHUNK, "zeros");
    const zeros = this.#zeros.address;
    for (let done = 0; done < length;) {
      this.#vector.clear();
      while (done < length && this.#vector.count < this.#vector.capacity) {
        const part = Math.min(ZERO_CHUNK, length - done);
        this.#vector.push(zeros, part);
        done += part;
      }
      const size = this.#vector.length;
      this.#vector.writeAllAt(this.#backing.fd, offset + done - size);
    }
  }
}
