/**
 * Guest memory on the stream: the sender reads pages where they lie, the receiver puts them where they belong.
 *
 * @module
 */
import { LOG_PAGE_BYTES } from "../dirty/bitmap.ts";
import type { DirtyBitmap } from "../dirty/bitmap.ts";
import { bufferAt } from "../ffi/mod.ts";
import type { MappedRange } from "../memory/region.ts";
import type { Channel, FrameHead } from "./channel.ts";
import { addNumber, addRuns, type Digest, foldDigest, isZeroPage, newDigest } from "./digest.ts";
import { addPages, type SharedPiece } from "./pack_room.ts";
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

const PAGE_WORDS = PAGE_BYTES / 4;
const DIGEST_YIELD_MS = 50;

/** Gives timers, signals and messages their turn. A timer of its own would take a millisecond or more. */
export function breathe(): Promise<void> {
  return new Promise((resolve) => setImmediate(() => resolve()));
}

/** A guest's memory by page numbers. Regions are whole pages. */
export class PageMap {
  /** Pages in all. */
  readonly pages: number;
  /** Where guest memory ends, bytes. */
  readonly endGpa: number;
  readonly #regions: { first: number; end: number; address: number; words: Int32Array; piece: SharedPiece }[];

  /** Views over the regions. @param ranges the regions; they stay mapped for as long as this is used */
  constructor(ranges: readonly MappedRange[]) {
    this.#regions = ranges.map(({ gpa, size, address }) => ({
      first: gpa / PAGE_BYTES,
      end: (gpa + size) / PAGE_BYTES,
      address,
      words: new Int32Array(bufferAt(address, size)),
      piece: { address, size },
    })).sort((a, b) => a.first - b.first);
    this.pages = this.#regions.reduce((sum, region) => sum + region.end - region.first, 0);
    this.endGpa = Math.max(0, ...this.#regions.map((region) => region.end * PAGE_BYTES));
  }

  /** All of it, as runs in order. */
  get ranges(): PageRange[] {
    return this.#regions.map(({ first, end }) => ({ page: first, count: end - first }));
  }

  /** Marks all of it. */
  markAll(bitmap: DirtyBitmap): void {
    for (const { page, count } of this.ranges) bitmap.markRange(page * LOG_PAGE_BYTES, count * LOG_PAGE_BYTES);
  }

  /** Where a run lies. @throws SvqError MIGRATION_PROTOCOL when it is not wholly in one region */
  find({ page, count }: PageRange): { address: number; words: Int32Array; at: number; piece: SharedPiece } {
    for (const { first, end, address, words, piece } of this.#regions) {
      if (page >= first && page + count <= end) {
        return { address: address + (page - first) * PAGE_BYTES, words, at: (page - first) * PAGE_WORDS, piece };
      }
    }
    throw violation(`pages ${page}+${count} lie outside of guest memory`);
  }

  /**
   * Digest of all pages. Nothing may write meanwhile.
   *
   * @param touched pages that were ever written, in memory that began as zeros: the others are not touched by reading either,
   *   which would allocate them
   */
  async digest(touched?: DirtyBitmap): Promise<Digest> {
    const digest = newDigest();
    let since = performance.now();
    for (const { first, end, address, words } of this.#regions) {
      for (let page = first; page < end; page++) {
        const at = (page - first) * PAGE_WORDS;
        // Zero pages are told from others faster than they are added up.
        if (touched?.has(page) === false || isZeroPage(words, at)) continue;
        addNumber(digest, page);
        addPages(digest, address + (page - first) * PAGE_BYTES, PAGE_BYTES);
        if ((page & 255) !== 0 || performance.now() - since < DIGEST_YIELD_MS) continue;
        await breathe();
        since = performance.now();
      }
    }
    return digest;
  }
}

/** Receives rounds of pages into fresh memory. */
export class PageReceiver {
  readonly #channel: Channel;
  readonly #map: PageMap;
  readonly #touched: DirtyBitmap;
  #checksum = newDigest();
  #pages = 0;
  #announced = 0;
  #round = 0;
  #frozen = false;

  /** Receives into `map`. @param touched an empty bitmap that covers `map`: memory that is still zero is not touched to make it so */
  constructor(channel: Channel, map: PageMap, touched: DirtyBitmap) {
    this.#channel = channel;
    this.#map = map;
    this.#touched = touched;
  }

  /** Rounds begun. */
  get rounds(): number {
    return this.#round;
  }

  /** The last round was sent while the guest stood still: nothing may follow it. */
  get frozen(): boolean {
    return this.#frozen;
  }

  /** Receives the round that `begin` (of a ROUND) begins, and confirms it. @throws SvqError MIGRATION_PROTOCOL and of the link */
  async receive(begin: RoundMark): Promise<void> {
    const channel = this.#channel;
    if (begin.round !== this.#round + 1 || this.#frozen) throw violation(`round ${begin.round} follows round ${this.#round}`);
    if (begin.pages > this.#map.pages) throw violation(`round ${begin.round} has ${begin.pages} pages, the guest ${this.#map.pages}`);
    this.#round = begin.round;
    this.#frozen = begin.frozen;
    this.#checksum = newDigest();
    this.#pages = 0;
    this.#announced = begin.pages;
    for (;;) {
      const next = await channel.receiveHead([FRAME.PAGES, FRAME.ZERO, FRAME.ROUND_END]);
      if (next.type === FRAME.ROUND_END) {
        const end = decodeRound(await channel.readPayload(next, 24));
        const mark = { round: this.#round, frozen: this.#frozen, disk: false, pages: this.#pages, checksum: foldDigest(this.#checksum) };
        if (
          end.round !== mark.round || end.disk || end.frozen !== mark.frozen || end.pages !== mark.pages || end.checksum !== mark.checksum
        ) {
          throw violation(`round ${mark.round} ends with ${end.pages} pages, ${mark.pages} came, or their checksum is wrong`);
        }
        await channel.send(FRAME.ROUND_ACK, encodeRound(mark));
        return;
      }
      await (next.type === FRAME.PAGES ? this.#receivePages(next) : this.#receiveZeros(next));
    }
  }

  async #receivePages({ length, checksum }: FrameHead): Promise<void> {
    const runs = await readRuns(length, (bytes) => this.#channel.peekBytes(bytes));
    const pieces = runs.map((range) => ({ address: this.#map.find(range).address, length: range.count * PAGE_BYTES }));
    for (const { page, count } of runs) {
      this.#count(count);
      this.#touched.markRange(page * PAGE_BYTES, count * PAGE_BYTES);
    }
    await this.#channel.readPieces(pieces);
    const digest = newDigest();
    for (const piece of pieces) addPages(digest, piece.address, piece.length);
    addRuns(digest, runs);
    if (foldDigest(digest) !== checksum) throw violation(`the checksum of a frame with page ${runs[0]!.page} is wrong`);
    addNumber(this.#checksum, checksum);
  }

  // Each page comes once in a round: a peer cannot keep us busy with a few bytes for long.
  #count(pages: number): void {
    this.#pages += pages;
    if (this.#pages > this.#announced) throw violation(`round ${this.#round} has more pages than the ${this.#announced} that it announced`);
  }

  async #receiveZeros(head: FrameHead): Promise<void> {
    const payload = await this.#channel.readPayload(head, MAX_ZERO_RANGES * RUN_HEADER_BYTES);
    if (payload.length % RUN_HEADER_BYTES !== 0) throw violation(`a list of zero pages has ${payload.length} bytes`);
    const view = new DataView(payload.buffer);
    for (let i = 0; i < payload.length; i += RUN_HEADER_BYTES) {
      const { page, count } = decodeRange(view, i);
      const { words, at } = this.#map.find({ page, count });
      this.#count(count);
      for (let j = 0; j < count; j++) {
        if (this.#touched.has(page + j)) words.fill(0, at + j * PAGE_WORDS, at + (j + 1) * PAGE_WORDS);
      }
    }
    addNumber(this.#checksum, head.checksum);
  }
}
