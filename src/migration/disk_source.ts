/**
 * The source's disk, where it travels: its blocks are read through the guest's own rings while the guest works, and through a ring
 * of the source's own when it stands still. See "Disks" in protocol.ts.
 *
 * @module
 */
import { DirtyBitmap, logBytes } from "../dirty/bitmap.ts";
import { DiskAccess, readBlkConfig } from "../drivers/disk_access.ts";
import { BLOCK_BYTES } from "../drivers/layout.ts";
import type { DiskRequest } from "../drivers/messages.ts";
import { EXIT, SvqError } from "../errors.ts";
import { bufferAt } from "../ffi/mod.ts";
import { hasBit } from "../uapi/bits.ts";
import { VIRTIO_BLK_FEATURE_BITS, VIRTIO_BLK_SECTOR_BYTES, VIRTIO_BLK_T } from "../uapi/virtio_blk.ts";
import type { Channel } from "./channel.ts";
import type { PageSender, RoundResult } from "./page_sender.ts";
import { encodeRange, FRAME, PAGE_BYTES, type PageRange } from "./protocol.ts";
import type { SourceGuest } from "./source_guest.ts";

/** Sectors in a block. */
export const BLOCK_SECTORS: number = PAGE_BYTES / VIRTIO_BLK_SECTOR_BYTES;
/** Blocks in a buffer, and in a frame at most. */
export const CHUNK_BLOCKS: number = BLOCK_BYTES / PAGE_BYTES;

const BUFFERS = 16;
const HOLD_TRIES = 50;
const CLOSE_TRIES = 50;

interface Chunk {
  range: PageRange;
  buffer: number;
}

/** Blocks of the runs that a bitmap has, in chunks that fit into a buffer. */
function* chunksOf(dirty: DirtyBitmap): Generator<PageRange> {
  for (const { page, count } of dirty.runs()) {
    for (let at = page; at < page + count; at += CHUNK_BLOCKS) yield { page: at, count: Math.min(CHUNK_BLOCKS, page + count - at) };
  }
}

/** The disk of a guest that works. */
export class SourceDisk {
  /** Sectors of 512 bytes. */
  readonly capacity: number;
  /** Blocks of 4096 bytes; the last one may be shorter. */
  readonly blocks: number;
  readonly #guest: SourceGuest;
  readonly #timeoutMs: number;
  readonly #offsets: readonly number[];
  readonly #written: DirtyBitmap;
  readonly #bytes: Uint8Array;

  private constructor(guest: SourceGuest, timeoutMs: number, capacity: number, offsets: readonly number[], written: DirtyBitmap) {
    this.capacity = capacity;
    this.blocks = Math.ceil(capacity / BLOCK_SECTORS);
    this.#guest = guest;
    this.#timeoutMs = timeoutMs;
    this.#offsets = offsets;
    this.#written = written;
    const { driver } = guest;
    const ram = bufferAt(driver.address, driver.layout.options.ramSize);
    this.#bytes = new Uint8Array(ram);
  }

  /**
   * Makes ready, and begins to record what the guest's requests change.
   *
   * @param timeoutMs longest time that the device may take for a request
   * @throws SvqError NO_DISK, RAM_TOO_SMALL, DISK_BUSY
   */
  static async open(guest: SourceGuest, timeoutMs: number): Promise<SourceDisk> {
    const { capacity } = await readBlkConfig(guest.relay);
    const shared = new SharedArrayBuffer(logBytes(capacity * VIRTIO_BLK_SECTOR_BYTES));
    const offsets = await guest.driver.openDisk(BUFFERS, shared);
    return new SourceDisk(guest, timeoutMs, capacity, offsets, new DirtyBitmap(shared));
  }

  /** An empty bitmap of its blocks. */
  bitmap(): DirtyBitmap {
    return DirtyBitmap.covering(this.blocks * PAGE_BYTES);
  }

  /** Marks all of it. */
  markAll(bitmap: DirtyBitmap): void {
    bitmap.markRange(0, this.blocks * PAGE_BYTES);
  }

  /** Moves what has been written since the last time into `into`. @returns blocks in `into` */
  harvest(into: DirtyBitmap): number {
    this.#written.harvest(into);
    return into.count();
  }

  /**
   * Is the destination's disk the same one? Writes random bytes to sectors that nobody uses, asks what the destination reads there,
   * and writes back what was there.
   *
   * @throws SvqError DISK_UNKNOWN when the guest uses all sectors all the time, and of the link
   */
  async isShared(channel: Channel): Promise<boolean> {
    const { sector, count } = await this.#hold();
    const bytes = count * VIRTIO_BLK_SECTOR_BYTES;
    const at = this.#offsets[1]!;
    const move = async (type: number) => {
      await this.#patiently(this.#guest.driver.diskRequests([{ type, sector, count, buffer: 0 }]));
      if (type !== VIRTIO_BLK_T.OUT || !hasBit(this.#guest.driver.features, VIRTIO_BLK_FEATURE_BITS.FLUSH)) return;
      await this.#patiently(this.#guest.driver.diskRequests([{ type: VIRTIO_BLK_T.FLUSH, sector: 0, count: 0, buffer: 0 }]));
    };
    await move(VIRTIO_BLK_T.IN);
    const before = this.#bytes.slice(at, at + bytes);
    const mark = crypto.getRandomValues(new Uint8Array(bytes));
    this.#bytes.set(mark, at);
    try {
      await move(VIRTIO_BLK_T.OUT);
      const question = new Uint8Array(16);
      encodeRange(new DataView(question.buffer), 0, { page: sector, count });
      await channel.send(FRAME.DISK_READ, question);
      const there = await channel.receive(FRAME.DISK_DATA, bytes);
      return there.length === bytes && there.every((byte, i) => byte === mark[i]);
    } finally {
      this.#bytes.set(before, at);
      await move(VIRTIO_BLK_T.OUT);
    }
  }

  async #hold(): Promise<{ sector: number; count: number }> {
    for (let left = HOLD_TRIES; left > 0; left--) {
      const held = await this.#guest.driver.holdSectors();
      if (held !== undefined) return held;
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
    throw new SvqError("DISK_UNKNOWN", "Whether both sides have the same disk cannot be found out: the guest uses all of its sectors", {
      exitCode: EXIT.migrationAborted,
      hint: "say it: --copy-disk no when they share it; otherwise use a larger --region or a smaller --depth",
    });
  }

  async #patiently<T>(promise: Promise<T>): Promise<T> {
    let timer: ReturnType<typeof setTimeout> | undefined;
    const late = new Promise<never>((_resolve, reject) => {
      timer = setTimeout(() => reject(diskTimeout(this.#timeoutMs)), this.#timeoutMs);
    });
    promise.catch(() => {});
    return await Promise.race([promise, late]).finally(() => clearTimeout(timer));
  }

  #request({ range: { page, count }, buffer }: Chunk): DiskRequest {
    const sector = page * BLOCK_SECTORS;
    return { type: VIRTIO_BLK_T.IN, sector, count: Math.min(count * BLOCK_SECTORS, this.capacity - sector), buffer };
  }

  // Of the last block the sectors that the disk does not have are zeros.
  #pad({ range: { page, count }, buffer }: Chunk): void {
    const missing = (page + count) * BLOCK_SECTORS - this.capacity;
    if (missing <= 0) return;
    const end = this.#offsets[buffer + 1]! + count * PAGE_BYTES;
    this.#bytes.fill(0, end - missing * VIRTIO_BLK_SECTOR_BYTES, end);
  }

  async #put(chunk: Chunk, sender: PageSender, result: RoundResult): Promise<void> {
    this.#pad(chunk);
    const offset = this.#offsets[chunk.buffer + 1]!;
    await sender.put(chunk.range, { address: this.#guest.driver.address + offset }, result);
  }

  /** Sends a round of blocks while the guest works; resolves when the destination has them. @throws SvqError DISK_IO, DISK_TIMEOUT */
  async send(sender: PageSender, round: number, dirty: DirtyBitmap): Promise<RoundResult> {
    const result = await sender.begin({ round, frozen: false, disk: true, pages: dirty.count() });
    const half = Math.max(1, Math.floor((this.#offsets.length - 1) / 2));
    const chunks = chunksOf(dirty);
    let first = 0;
    // While one half of the buffers is read, what is in the other one is sent.
    const read = (): { batch: Chunk[]; done: Promise<void> } => {
      const batch: Chunk[] = [];
      for (let i = 0; i < half && first + i < this.#offsets.length - 1; i++) {
        const { value: range } = chunks.next();
        if (range === undefined) break;
        batch.push({ range, buffer: first + i });
      }
      first = first === 0 && this.#offsets.length - 1 > half ? half : 0;
      const done = batch.length === 0 ? Promise.resolve() : this.#guest.driver.diskRequests(batch.map((chunk) => this.#request(chunk)));
      done.catch(() => {});
      return { batch, done };
    };
    const alone = this.#offsets.length - 1 === half;
    for (let now = read(); now.batch.length > 0;) {
      await this.#patiently(now.done);
      const next = alone ? undefined : read();
      for (const chunk of now.batch) await this.#put(chunk, sender, result);
      await sender.flush(result);
      now = next ?? read();
    }
    await sender.end(result);
    await sender.confirm(result);
    return result;
  }

  /**
   * The last round, when the guest stands still and its rings have been taken from the device. Buffers in guest RAM are marked in
   * `memory` afterwards.
   */
  async sendLast(sender: PageSender, round: number, dirty: DirtyBitmap, memory: DirtyBitmap): Promise<RoundResult> {
    const { driver, relay } = this.#guest;
    await driver.markDiskWrites();
    this.harvest(dirty);
    const result = await sender.begin({ round, frozen: true, disk: true, pages: dirty.count() });
    if (dirty.count() > 0) {
      const room = {
        buffer: this.#bytes.buffer as ArrayBuffer,
        address: driver.address,
        offsets: this.#offsets,
        gpa: (offset: number) => driver.layout.gpa(offset),
      };
      const access = await DiskAccess.start(relay, room, { features: driver.features, timeoutMs: this.#timeoutMs });
      try {
        await this.#readAll(access, sender, dirty, result);
      } catch (error) {
        // The guest gets its rings back when the device has let go of this one.
        this.#guest.waitFor(access.stop());
        throw error;
      }
      await this.#patiently(access.stop());
    }
    for (const offset of this.#offsets) memory.markRange(driver.layout.gpa(offset), BLOCK_BYTES);
    await sender.end(result);
    await sender.confirm(result);
    return result;
  }

  async #readAll(access: DiskAccess, sender: PageSender, dirty: DirtyBitmap, result: RoundResult): Promise<void> {
    let batch: Chunk[] = [];
    const move = async () => {
      await Promise.all(batch.map((chunk) => {
        const { sector, count, buffer } = this.#request(chunk);
        return access.read(sector, count, buffer);
      }));
      for (const chunk of batch) await this.#put(chunk, sender, result);
      batch = [];
    };
    for (const range of chunksOf(dirty)) {
      batch.push({ range, buffer: batch.length });
      if (batch.length === access.buffers) await move();
    }
    await move();
  }

  /** Ends it: the guest has its RAM for itself again. What a device that hangs still has is left to it. */
  async close(): Promise<void> {
    for (let left = CLOSE_TRIES; left > 0; left--) {
      if (await this.#guest.driver.closeDisk().then(() => true, () => false)) return;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }
}

function diskTimeout(timeoutMs: number): SvqError {
  return new SvqError("DISK_TIMEOUT", `The disk has not answered the requests of the copy for ${timeoutMs} ms`, {
    exitCode: EXIT.migrationAborted,
    hint: "the guest goes on at the source; a longer --drain-timeout waits for longer",
  });
}
