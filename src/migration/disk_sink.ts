/**
 * The destination's disk, where blocks arrive: written through the device that the guest is going to have. See "Disks" in
 * protocol.ts.
 *
 * @module
 */
import { DiskAccess } from "../drivers/disk_access.ts";
import { VIRTIO_BLK_SECTOR_BYTES } from "../uapi/virtio_blk.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import type { Channel, FrameHead } from "./channel.ts";
import { addNumber, addRuns, type Digest, foldDigest, newDigest } from "./digest.ts";
import { BLOCK_SECTORS, CHUNK_BLOCKS } from "./disk_source.ts";
import { addPages } from "./pack_room.ts";
import {
  decodeRange,
  decodeRound,
  encodeRound,
  FRAME,
  MAX_ZERO_RANGES,
  PAGE_BYTES,
  type PageRange,
  readRuns,
  type RoundMark,
  RUN_HEADER_BYTES,
  violation,
} from "./protocol.ts";

/** Most sectors that a peer may ask for at a time. */
const MAX_READ_SECTORS = CHUNK_BLOCKS * BLOCK_SECTORS;

/** Receives rounds of blocks. */
export class DiskSink {
  readonly #channel: Channel;
  readonly #disk: DiskAccess;
  readonly #blocks: number;
  #checksum = newDigest();
  #pages = 0;
  #announced = 0;
  #round = 0;
  #frozen = false;

  private constructor(channel: Channel, disk: DiskAccess) {
    this.#channel = channel;
    this.#disk = disk;
    this.#blocks = Math.ceil(disk.capacity / BLOCK_SECTORS);
  }

  /** Has a device that nobody drives; {@linkcode close} resets it. @param timeoutMs longest time that it may take for a request */
  static async open(channel: Channel, backend: VhostBackend, timeoutMs: number): Promise<DiskSink> {
    return new DiskSink(channel, await DiskAccess.open(backend, timeoutMs));
  }

  /** Sectors of 512 bytes. */
  get capacity(): number {
    return this.#disk.capacity;
  }

  /** The last round has come: nothing may follow it. */
  get frozen(): boolean {
    return this.#frozen;
  }

  /** Step 4b: what the disk holds where the source asks. */
  async answer(head: FrameHead): Promise<void> {
    const payload = await this.#channel.readPayload(head, RUN_HEADER_BYTES);
    if (payload.length !== RUN_HEADER_BYTES) throw violation(`DISK_READ has ${payload.length} bytes`);
    const { page: sector, count } = decodeRange(new DataView(payload.buffer), 0);
    if (count > MAX_READ_SECTORS || sector + count > this.#disk.capacity) throw violation(`it asks for sectors ${sector}+${count}`);
    const buffer = await this.#disk.take();
    try {
      await this.#disk.read(sector, count, buffer);
      await this.#channel.send(FRAME.DISK_DATA, this.#disk.bytes(buffer, count * VIRTIO_BLK_SECTOR_BYTES));
    } finally {
      this.#disk.put(buffer);
    }
  }

  /** Receives the round that `begin` begins; it is on the medium when it is confirmed. @throws SvqError MIGRATION_PROTOCOL, DISK_IO */
  async receive(begin: RoundMark): Promise<void> {
    const channel = this.#channel;
    if (begin.round !== this.#round + 1 || this.#frozen) throw violation(`disk round ${begin.round} follows round ${this.#round}`);
    if (begin.pages > this.#blocks) throw violation(`disk round ${begin.round} has ${begin.pages} blocks, the disk ${this.#blocks}`);
    this.#round = begin.round;
    this.#frozen = begin.frozen;
    this.#checksum = newDigest();
    this.#pages = 0;
    this.#announced = begin.pages;
    for (;;) {
      const next = await channel.receiveHead([FRAME.BLOCKS, FRAME.ZERO_BLOCKS, FRAME.ROUND_END]);
      if (next.type === FRAME.ROUND_END) {
        const end = decodeRound(await channel.readPayload(next, 24));
        const mark = { round: this.#round, frozen: this.#frozen, disk: true, pages: this.#pages, checksum: foldDigest(this.#checksum) };
        if (JSON.stringify(end) !== JSON.stringify(mark)) {
          throw violation(`disk round ${mark.round} ends with ${end.pages} blocks, ${mark.pages} came, or their checksum is wrong`);
        }
        await this.#disk.settle();
        await channel.send(FRAME.ROUND_ACK, encodeRound(mark));
        return;
      }
      await (next.type === FRAME.BLOCKS ? this.#receiveBlocks(next) : this.#receiveZeros(next));
    }
  }

  #count({ page, count }: { page: number; count: number }): void {
    if (page + count > this.#blocks) throw violation(`blocks ${page}+${count} lie outside of the disk`);
    this.#pages += count;
    if (this.#pages > this.#announced) {
      throw violation(`disk round ${this.#round} has more blocks than the ${this.#announced} that it announced`);
    }
  }

  #sectors({ page, count }: { page: number; count: number }): [sector: number, count: number] {
    const sector = page * BLOCK_SECTORS;
    return [sector, Math.min(count * BLOCK_SECTORS, this.#disk.capacity - sector)];
  }

  async #receiveBlocks({ length, checksum }: FrameHead): Promise<void> {
    const runs = await readRuns(length, (bytes) => this.#channel.peekBytes(bytes));
    for (const range of runs) this.#count(range);
    const digest = newDigest();
    for (const { page, count } of runs) {
      for (let at = page; at < page + count; at += CHUNK_BLOCKS) {
        await this.#receivePart({ page: at, count: Math.min(CHUNK_BLOCKS, page + count - at) }, digest);
      }
    }
    addRuns(digest, runs);
    if (foldDigest(digest) !== checksum) throw violation(`the checksum of a frame with block ${runs[0]!.page} is wrong`);
    addNumber(this.#checksum, checksum);
  }

  // Written before the frame's checksum is known: what is on this disk counts only when the guest runs here.
  async #receivePart(range: PageRange, digest: Digest): Promise<void> {
    const bytes = range.count * PAGE_BYTES;
    const buffer = await this.#disk.take();
    try {
      await this.#channel.readInto(this.#disk.address(buffer), bytes);
      addPages(digest, this.#disk.address(buffer), bytes);
    } catch (error) {
      this.#disk.put(buffer);
      throw error;
    }
    this.#disk.writeBehind(...this.#sectors(range), buffer);
  }

  async #receiveZeros(head: FrameHead): Promise<void> {
    const payload = await this.#channel.readPayload(head, MAX_ZERO_RANGES * RUN_HEADER_BYTES);
    if (payload.length % RUN_HEADER_BYTES !== 0) throw violation(`a list of zero blocks has ${payload.length} bytes`);
    const view = new DataView(payload.buffer);
    for (let i = 0; i < payload.length; i += RUN_HEADER_BYTES) {
      const range = decodeRange(view, i);
      this.#count(range);
      await this.#disk.zeroBehind(...this.#sectors(range));
    }
    addNumber(this.#checksum, head.checksum);
  }

  /** Lets go of the device, which is reset. */
  close(): Promise<void> {
    return this.#disk.close();
  }
}
