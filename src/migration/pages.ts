/**
 * Guest memory on the stream: the sender reads pages where they lie, the receiver puts them where they belong.
 *
 * @module
 */
import { LOG_PAGE_BYTES } from "../dirty/bitmap.ts";
import type { DirtyBitmap } from "../dirty/bitmap.ts";
import { bufferAddress, bufferAt, copyMemory, IoVector, mapAnonymous } from "../ffi/mod.ts";
import type { MappedRange } from "../memory/region.ts";
import { PageScan } from "../wasm/page_scan.ts";
import type { Channel, FrameHead } from "./channel.ts";
import { addNumber, type Digest, foldDigest, isZeroPage, newDigest } from "./digest.ts";
import {
  decodeRange,
  decodeRound,
  encodeRange,
  encodeRound,
  FRAME,
  FRAME_HEADER_BYTES,
  MAX_RUN_PAGES,
  MAX_ZERO_RANGES,
  PAGE_BYTES,
  type PageRange,
  RUN_HEADER_BYTES,
  violation,
} from "./protocol.ts";

const PAGE_WORDS = PAGE_BYTES / 4;
const HEAD_BYTES = FRAME_HEADER_BYTES + RUN_HEADER_BYTES;
const BATCH_FRAMES = 256;
const STAGE_PAGES = 256;
const YIELD_MS = 10;
const DIGEST_YIELD_MS = 50;

/** Gives timers, signals and messages their turn. */
export function breathe(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, 0));
}

/** A guest's memory by page numbers. Regions are whole pages. */
export class PageMap {
  /** Pages in all. */
  readonly pages: number;
  /** Where guest memory ends, bytes. */
  readonly endGpa: number;
  readonly #regions: { first: number; end: number; address: number; words: Int32Array }[];

  /** Views over the regions. @param ranges the regions; they stay mapped for as long as this is used */
  constructor(ranges: readonly MappedRange[]) {
    this.#regions = ranges.map(({ gpa, size, address }) => ({
      first: gpa / PAGE_BYTES,
      end: (gpa + size) / PAGE_BYTES,
      address,
      words: new Int32Array(bufferAt(address, size)),
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
  find({ page, count }: PageRange): { address: number; words: Int32Array; at: number } {
    for (const { first, end, address, words } of this.#regions) {
      if (page >= first && page + count <= end) {
        return { address: address + (page - first) * PAGE_BYTES, words, at: (page - first) * PAGE_WORDS };
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
    const stage = new Stage();
    let since = performance.now();
    for (const { first, end, address, words } of this.#regions) {
      for (let page = first; page < end; page++) {
        const at = (page - first) * PAGE_WORDS;
        // Zero pages are told from others faster than they are added up.
        if (touched?.has(page) === false || isZeroPage(words, at)) continue;
        addNumber(digest, page);
        stage.put(0, address + (page - first) * PAGE_BYTES, PAGE_BYTES);
        stage.add(digest, 0, PAGE_BYTES);
        if ((page & 255) !== 0 || performance.now() - since < DIGEST_YIELD_MS) continue;
        await breathe();
        since = performance.now();
      }
    }
    return digest;
  }
}

/** Room for copies of pages, where they can be added up fast. */
class Stage {
  readonly #scan = new PageScan(STAGE_PAGES * PAGE_BYTES);
  /** Where it lies in this process, bytes. */
  readonly address: number = bufferAddress(this.#scan.buffer) + this.#scan.pagesOffset;

  /** Copies `bytes` at `address` to offset `at`. */
  put(at: number, address: number, bytes: number): void {
    if (!(at >= 0 && at + bytes <= STAGE_PAGES * PAGE_BYTES)) throw new RangeError(`No room for ${bytes} bytes at ${at}`);
    copyMemory(this.address + at, address, bytes);
  }

  /** Adds `bytes` at offset `at` to a digest. */
  add(digest: Digest, at: number, bytes: number): void {
    this.#scan.add(digest, at, bytes);
  }
}

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
  readonly #vector = new IoVector(2 * BATCH_FRAMES);
  readonly #heads = mapAnonymous(BATCH_FRAMES * HEAD_BYTES, "frame heads");
  readonly #headView = new DataView(this.#heads.buffer());
  readonly #stage = new Stage();
  #zeros: PageRange[] = [];
  #frames = 0;
  #staged = 0;
  #frozen = false;
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
    this.#frozen = frozen;
    this.#checksum = newDigest();
    this.#began = this.#breathed = performance.now();
    this.#bytesBefore = this.#channel.bytesSent;
    const result: RoundResult = { round, pages: 0, zeroPages: 0, bytes: 0, ms: 0 };
    await this.#channel.send(FRAME.ROUND, encodeRound({ round, frozen, pages: dirty.count(), checksum: 0 }));
    for (let run = dirty.nextRun(0); run !== undefined; run = dirty.nextRun(run.page + run.count)) await this.#run(run, result);
    await this.#flush(result);
    await this.#flushZeros();
    const mark = { round, frozen, pages: result.pages, checksum: foldDigest(this.#checksum) };
    await this.#channel.send(FRAME.ROUND_END, encodeRound(mark));
    result.bytes = this.#channel.bytesSent - this.#bytesBefore;
    return result;
  }

  /** Waits for the confirmation of the last round; completes its time. */
  async confirm(result: RoundResult): Promise<void> {
    const ack = decodeRound(await this.#channel.receive(FRAME.ROUND_ACK, 24));
    if (ack.round !== result.round || ack.pages !== result.pages || ack.checksum !== foldDigest(this.#checksum)) {
      throw violation(`it confirms ${ack.pages} pages of round ${ack.round}, sent were ${result.pages} of round ${result.round}`);
    }
    result.ms = performance.now() - this.#began;
  }

  // Splits a dirty run into runs that are zero and runs that are not, none longer than a frame or a region.
  async #run({ page, count }: PageRange, result: RoundResult): Promise<void> {
    for (let at = page; at < page + count;) {
      const { words, at: word } = this.#map.find({ page: at, count: 1 });
      const room = Math.min(page + count - at, (words.length - word) / PAGE_WORDS);
      const zero = isZeroPage(words, word);
      const longest = Math.min(room, zero ? room : MAX_RUN_PAGES);
      let length = 1;
      while (length < longest && isZeroPage(words, word + length * PAGE_WORDS) === zero) length++;
      if (zero) {
        this.#zeros.push({ page: at, count: length });
        result.zeroPages += length;
        if (this.#zeros.length === MAX_ZERO_RANGES) await this.#flushZeros();
      } else {
        await this.#pages({ page: at, count: length }, result);
      }
      result.pages += length;
      at += length;
    }
  }

  async #pages(range: PageRange, result: RoundResult): Promise<void> {
    const bytes = range.count * PAGE_BYTES;
    if (this.#frames === BATCH_FRAMES || this.#staged + range.count > STAGE_PAGES) await this.#flush(result);
    // The guest writes while we read: the checksum is of the copy that is sent.
    const stage = this.#staged * PAGE_BYTES;
    this.#stage.put(stage, this.#map.find(range).address, bytes);
    const digest = newDigest();
    this.#stage.add(digest, stage, bytes);
    const checksum = foldDigest(digest);
    addNumber(this.#checksum, checksum);
    const head = this.#frames * HEAD_BYTES;
    this.#channel.putHead(this.#headView, head, FRAME.PAGES, RUN_HEADER_BYTES + bytes, checksum);
    encodeRange(this.#headView, head + FRAME_HEADER_BYTES, range);
    this.#vector.push(this.#heads.address + head, HEAD_BYTES);
    this.#vector.push(this.#stage.address + stage, bytes);
    this.#frames++;
    this.#staged += range.count;
  }

  async #flush(result: RoundResult): Promise<void> {
    if (this.#frames > 0) await this.#channel.sendVector(this.#vector);
    this.#vector.clear();
    this.#frames = this.#staged = 0;
    // A refusal is read now, not at the end of the round.
    if (this.#channel.poll()) await this.#channel.receiveHead([]);
    this.#options.onProgress?.(result.pages);
    await this.#pace();
  }

  async #pace(): Promise<void> {
    const now = performance.now();
    const due = this.#began + (this.#channel.bytesSent - this.#bytesBefore) / this.#options.maxBandwidth * 1000;
    // Not while the guest stands still.
    if (!this.#frozen && due - now > 1) await new Promise((resolve) => setTimeout(resolve, due - now));
    else if (now - this.#breathed > YIELD_MS) await breathe();
    else return;
    this.#breathed = performance.now();
  }

  async #flushZeros(): Promise<void> {
    if (this.#zeros.length === 0) return;
    // Frames are numbered when they are put together, so what was put together before goes first.
    if (this.#frames > 0) {
      await this.#channel.sendVector(this.#vector);
      this.#frames = this.#staged = 0;
    }
    const payload = new Uint8Array(this.#zeros.length * RUN_HEADER_BYTES);
    const view = new DataView(payload.buffer);
    this.#zeros.forEach((range, i) => encodeRange(view, i * RUN_HEADER_BYTES, range));
    this.#zeros = [];
    addNumber(this.#checksum, await this.#channel.send(FRAME.ZERO, payload));
  }

  /** Frees its buffers. */
  [Symbol.dispose](): void {
    this.#heads.close();
  }
}

/** Receives rounds of pages into fresh memory. */
export class PageReceiver {
  readonly #channel: Channel;
  readonly #map: PageMap;
  readonly #touched: DirtyBitmap;
  readonly #stage = new Stage();
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

  /** Receives the round that `head` (a ROUND) begins, and confirms it. @throws SvqError MIGRATION_PROTOCOL and of the link */
  async receive(head: FrameHead): Promise<void> {
    const channel = this.#channel;
    const begin = decodeRound(await channel.readPayload(head, 24));
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
        const mark = { round: this.#round, frozen: this.#frozen, pages: this.#pages, checksum: foldDigest(this.#checksum) };
        if (end.round !== mark.round || end.frozen !== mark.frozen || end.pages !== mark.pages || end.checksum !== mark.checksum) {
          throw violation(`round ${mark.round} ends with ${end.pages} pages, ${mark.pages} came, or their checksum is wrong`);
        }
        await channel.send(FRAME.ROUND_ACK, encodeRound(mark));
        return;
      }
      await (next.type === FRAME.PAGES ? this.#receivePages(next) : this.#receiveZeros(next));
    }
  }

  async #receivePages({ length, checksum }: FrameHead): Promise<void> {
    if (length < RUN_HEADER_BYTES + PAGE_BYTES) throw violation(`a run of pages has ${length} bytes`);
    const range = decodeRange(await this.#channel.peekBytes(RUN_HEADER_BYTES), 0);
    const bytes = range.count * PAGE_BYTES;
    if (range.count > MAX_RUN_PAGES || length !== RUN_HEADER_BYTES + bytes) {
      throw violation(`a run of ${range.count} pages has ${length} bytes`);
    }
    const { address } = this.#map.find(range);
    this.#count(range.count);
    this.#touched.markRange(range.page * PAGE_BYTES, bytes);
    await this.#channel.readInto(address, bytes);
    const digest = newDigest();
    this.#stage.put(0, address, bytes);
    this.#stage.add(digest, 0, bytes);
    if (foldDigest(digest) !== checksum) throw violation(`the checksum of pages ${range.page}+${range.count} is wrong`);
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
