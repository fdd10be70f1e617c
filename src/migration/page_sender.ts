/**
 * Pages of guest memory, and blocks of a disk, on their way out: those that are zero become numbers, the others are copied and added
 * up in one pass, and written.
 *
 * @module
 */
import type { DirtyBitmap } from "../dirty/bitmap.ts";
import { IoVector, mapAnonymous } from "../ffi/mod.ts";
import type { Channel } from "./channel.ts";
import { addNumber, addRuns, foldDigest, newDigest } from "./digest.ts";
import { PackRoom, ROOM_PAGES, type SharedPiece } from "./pack_room.ts";
import { breathe, type PageMap } from "./pages.ts";
import {
  decodeRound,
  encodeRange,
  encodeRound,
  FRAME,
  FRAME_HEADER_BYTES,
  MAX_FRAME_PAGES,
  MAX_ZERO_RANGES,
  PAGE_BYTES,
  type PageRange,
  PAGES_HEADER_BYTES,
  type RoundMark,
  RUN_HEADER_BYTES,
  violation,
} from "./protocol.ts";

const HEAD_BYTES = FRAME_HEADER_BYTES + PAGES_HEADER_BYTES;
const YIELD_MS = 20;
const LONGEST_PAUSE_MS = 100;

/** What a round moved. */
export interface RoundResult {
  /** From 1. */
  round: number;
  /** Pages that were dirty: all of them in round 1. */
  pages: number;
  /** Of these, pages that were zero and moved as a number. */
  zeroPages: number;
  /** Bytes on the wire. */
  bytes: number;
  /** From its beginning until the destination had all of it, milliseconds. */
  ms: number;
}

/** Where pages lie. */
export interface PagePlace {
  /** Their address in this process, bytes. */
  address: number;
  /** The shared memory that they are a part of, where it is. */
  piece?: SharedPiece;
}

/** How pages are sent. */
export interface SendOptions {
  /** Bytes per second; infinite for no limit. */
  maxBandwidth: number;
  /** Called now and then with the pages done. */
  onProgress?: (pages: number) => void;
}

/** Sends rounds of pages. */
export class PageSender implements Disposable {
  readonly #channel: Channel;
  readonly #map: PageMap;
  readonly #options: SendOptions;
  readonly #vector = new IoVector(2);
  readonly #head = mapAnonymous(HEAD_BYTES + MAX_FRAME_PAGES * RUN_HEADER_BYTES, "frame heads");
  readonly #headView = new DataView(this.#head.buffer());
  readonly #room = PackRoom.take();
  // The frame that is being put together: its runs, and their pages in the room.
  #runs: PageRange[] = [];
  #packed = 0;
  #digest = newDigest();
  #zeros: PageRange[] = [];
  #frozen = false;
  #disk = false;
  #checksum = newDigest();
  #began = 0;
  #bytesBefore = 0;
  #breathed = 0;

  /** Sends pages of `map` through `channel`. */
  constructor(channel: Channel, map: PageMap, options: SendOptions) {
    this.#channel = channel;
    this.#map = map;
    this.#options = options;
  }

  /**
   * Sends a round; resolves when the destination has confirmed all of it.
   *
   * @param dirty a private bitmap of what to send
   * @param frozen nothing writes memory any more
   * @throws SvqError of the link, and MIGRATION_PROTOCOL when the destination got something else
   */
  async send(round: number, dirty: DirtyBitmap, frozen: boolean): Promise<RoundResult> {
    const result = await this.sendUnconfirmed(round, dirty, frozen);
    await this.confirm(result);
    return result;
  }

  /** Sends a round without waiting for the confirmation: call {@linkcode confirm} before anything else is received. */
  async sendUnconfirmed(round: number, dirty: DirtyBitmap, frozen: boolean): Promise<RoundResult> {
    const result = await this.begin({ round, frozen, disk: false, pages: dirty.count() });
    for (let run = dirty.nextRun(0); run !== undefined; run = dirty.nextRun(run.page + run.count)) {
      for (let page = run.page; page < run.page + run.count;) {
        const { address, piece } = this.#map.find({ page, count: 1 });
        const count = Math.min(run.page + run.count - page, (piece.address + piece.size - address) / PAGE_BYTES);
        await this.put({ page, count }, { address, piece }, result);
        page += count;
      }
    }
    return await this.end(result);
  }

  /** Begins a round by hand; {@linkcode put} and {@linkcode end} follow. */
  async begin({ round, frozen, disk, pages }: Omit<RoundMark, "checksum">): Promise<RoundResult> {
    this.#frozen = frozen;
    this.#disk = disk;
    this.#checksum = newDigest();
    this.#began = this.#breathed = performance.now();
    this.#bytesBefore = this.#channel.bytesSent;
    await this.#channel.send(FRAME.ROUND, encodeRound({ round, frozen, disk, pages, checksum: 0 }));
    return { round, pages: 0, zeroPages: 0, bytes: 0, ms: 0 };
  }

  /** Ends a round that was begun by hand; it is not confirmed yet. */
  async end(result: RoundResult): Promise<RoundResult> {
    await this.flush(result);
    await this.#flushZeros();
    const mark = { round: result.round, frozen: this.#frozen, disk: this.#disk, pages: result.pages, checksum: foldDigest(this.#checksum) };
    await this.#channel.send(FRAME.ROUND_END, encodeRound(mark));
    result.bytes = this.#channel.bytesSent - this.#bytesBefore;
    return result;
  }

  /** Waits for the confirmation of the last round; completes its time. */
  async confirm(result: RoundResult): Promise<void> {
    const ack = decodeRound(await this.#channel.receive(FRAME.ROUND_ACK, 24));
    if (
      ack.round !== result.round || ack.disk !== this.#disk || ack.pages !== result.pages || ack.checksum !== foldDigest(this.#checksum)
    ) {
      throw violation(`it confirms ${ack.pages} pages of round ${ack.round}, sent were ${result.pages} of round ${result.round}`);
    }
    result.ms = performance.now() - this.#began;
  }

  /** Sends consecutive pages that lie in one piece. What is not zero is copied before this resolves. */
  async put(range: PageRange, { address, piece }: PagePlace, result: RoundResult): Promise<void> {
    for (let done = 0; done < range.count;) {
      const count = Math.min(range.count - done, ROOM_PAGES - this.#packed);
      // The guest writes while we read: the checksum is of the copy that is sent.
      const ahead = (range.count - done) * PAGE_BYTES;
      const found = this.#room.pack(this.#digest, address + done * PAGE_BYTES, count, this.#packed, piece, ahead);
      this.#record(range.page + done, count, found);
      result.zeroPages += count - found;
      result.pages += count;
      done += count;
      if (this.#packed === ROOM_PAGES) await this.flush(result);
      if (this.#zeros.length >= MAX_ZERO_RANGES - ROOM_PAGES) await this.#flushZeros();
      if (performance.now() - this.#breathed > YIELD_MS) await this.#pace(result);
    }
  }

  // Of `count` pages from `page` on `found` are packed, and the others are zero.
  #record(page: number, count: number, found: number): void {
    this.#packed += found;
    if (found === count) return extend(this.#runs, page, count);
    let next = 0;
    const places = this.#room.found;
    for (let i = 0; i < found;) {
      const at = places[i]!;
      let length = 1;
      while (i + length < found && places[i + length] === at + length) length++;
      if (at > next) extend(this.#zeros, page + next, at - next);
      extend(this.#runs, page + at, length);
      next = at + length;
      i += length;
    }
    if (next < count) extend(this.#zeros, page + next, count - next);
  }

  /** Writes what was put together so far. */
  async flush(result: RoundResult): Promise<void> {
    if (this.#packed > 0) await this.#frame();
    await this.#pace(result);
  }

  async #frame(): Promise<void> {
    const [runs, pages] = [this.#runs, this.#packed];
    const view = this.#headView;
    runs.forEach((range, i) => encodeRange(view, HEAD_BYTES + i * RUN_HEADER_BYTES, range));
    addRuns(this.#digest, runs);
    const checksum = foldDigest(this.#digest);
    addNumber(this.#checksum, checksum);
    const headBytes = HEAD_BYTES + runs.length * RUN_HEADER_BYTES;
    const length = headBytes - FRAME_HEADER_BYTES + pages * PAGE_BYTES;
    this.#channel.putHead(view, 0, this.#disk ? FRAME.BLOCKS : FRAME.PAGES, length, checksum);
    view.setUint32(FRAME_HEADER_BYTES, runs.length, true);
    view.setUint32(FRAME_HEADER_BYTES + 4, pages, true);
    this.#vector.clear();
    this.#vector.push(this.#head.address, headBytes);
    this.#vector.push(this.#room.address, pages * PAGE_BYTES);
    this.#runs = [];
    this.#packed = 0;
    this.#digest = newDigest();
    await this.#channel.sendVector(this.#vector);
  }

  async #pace(result: RoundResult): Promise<void> {
    const due = this.#began + (this.#channel.bytesSent - this.#bytesBefore) / this.#options.maxBandwidth * 1000;
    for (;;) {
      // A refusal is read now, not at the end of the round.
      if (this.#channel.poll()) await this.#channel.receiveHead([]);
      this.#options.onProgress?.(result.pages);
      const now = performance.now();
      // Not while the guest stands still. A slow link must not keep who cancels, or what ends it, for long.
      if (!this.#frozen && due - now > 1) await new Promise((resolve) => setTimeout(resolve, Math.min(due - now, LONGEST_PAUSE_MS)));
      else if (now - this.#breathed > YIELD_MS) await breathe();
      else return;
      this.#breathed = performance.now();
      if (due - this.#breathed <= 1) return;
    }
  }

  async #flushZeros(): Promise<void> {
    if (this.#zeros.length === 0) return;
    const payload = new Uint8Array(this.#zeros.length * RUN_HEADER_BYTES);
    const view = new DataView(payload.buffer);
    this.#zeros.forEach((range, i) => encodeRange(view, i * RUN_HEADER_BYTES, range));
    this.#zeros = [];
    addNumber(this.#checksum, await this.#channel.send(this.#disk ? FRAME.ZERO_BLOCKS : FRAME.ZERO, payload));
  }

  /** Frees its buffers. */
  [Symbol.dispose](): void {
    this.#head.close();
    this.#room[Symbol.dispose]();
  }
}

// Appends a range, or makes the last one longer.
function extend(ranges: PageRange[], page: number, count: number): void {
  const last = ranges.at(-1);
  if (last !== undefined && last.page + last.count === page) last.count += count;
  else ranges.push({ page, count });
}
