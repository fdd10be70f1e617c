/**
 * Pages of guest memory, and blocks of a disk, on their way out: runs are told into those that are zero and those that are not, put
 * into frames and written from where they lie.
 *
 * @module
 */
import type { DirtyBitmap } from "../dirty/bitmap.ts";
import { IoVector, mapAnonymous } from "../ffi/mod.ts";
import type { Channel } from "./channel.ts";
import { addNumber, foldDigest, isZeroPage, newDigest } from "./digest.ts";
import { breathe, type PageMap, Stage, STAGE_PAGES } from "./pages.ts";
import {
  decodeRound,
  encodeRange,
  encodeRound,
  FRAME,
  FRAME_HEADER_BYTES,
  MAX_RUN_PAGES,
  MAX_ZERO_RANGES,
  PAGE_BYTES,
  type PageRange,
  type RoundMark,
  RUN_HEADER_BYTES,
  violation,
} from "./protocol.ts";

const PAGE_WORDS = PAGE_BYTES / 4;
const HEAD_BYTES = FRAME_HEADER_BYTES + RUN_HEADER_BYTES;
const BATCH_FRAMES = 256;
const YIELD_MS = 10;

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
  /** Memory in words. */
  words: Int32Array;
  /** Index of the first word. */
  at: number;
  /** Its address in this process, bytes. */
  address: number;
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
        const { words, at, address } = this.#map.find({ page, count: 1 });
        const count = Math.min(run.page + run.count - page, (words.length - at) / PAGE_WORDS);
        await this.put({ page, count }, { words, at, address }, result);
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

  /**
   * Sends consecutive pages that lie in one piece, told into runs that are zero and runs that are not. What is not zero is copied
   * before this resolves.
   */
  async put(range: PageRange, place: PagePlace, result: RoundResult): Promise<void> {
    const { words, at: first, address } = place;
    for (let done = 0; done < range.count;) {
      const word = first + done * PAGE_WORDS;
      const room = range.count - done;
      const zero = isZeroPage(words, word);
      const longest = Math.min(room, zero ? room : MAX_RUN_PAGES);
      let length = 1;
      while (length < longest && isZeroPage(words, word + length * PAGE_WORDS) === zero) length++;
      const run = { page: range.page + done, count: length };
      if (zero) {
        this.#zeros.push(run);
        result.zeroPages += length;
        if (this.#zeros.length === MAX_ZERO_RANGES) await this.#flushZeros();
      } else {
        await this.#pages(run, address + done * PAGE_BYTES, result);
      }
      result.pages += length;
      done += length;
    }
  }

  async #pages(range: PageRange, address: number, result: RoundResult): Promise<void> {
    const bytes = range.count * PAGE_BYTES;
    if (this.#frames === BATCH_FRAMES || this.#staged + range.count > STAGE_PAGES) await this.flush(result);
    // The guest writes while we read: the checksum is of the copy that is sent.
    const stage = this.#staged * PAGE_BYTES;
    this.#stage.put(stage, address, bytes);
    const digest = newDigest();
    this.#stage.add(digest, stage, bytes);
    const checksum = foldDigest(digest);
    addNumber(this.#checksum, checksum);
    const head = this.#frames * HEAD_BYTES;
    this.#channel.putHead(this.#headView, head, this.#disk ? FRAME.BLOCKS : FRAME.PAGES, RUN_HEADER_BYTES + bytes, checksum);
    encodeRange(this.#headView, head + FRAME_HEADER_BYTES, range);
    this.#vector.push(this.#heads.address + head, HEAD_BYTES);
    this.#vector.push(this.#stage.address + stage, bytes);
    this.#frames++;
    this.#staged += range.count;
  }

  /** Writes what was put together so far. */
  async flush(result: RoundResult): Promise<void> {
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
    addNumber(this.#checksum, await this.#channel.send(this.#disk ? FRAME.ZERO_BLOCKS : FRAME.ZERO, payload));
  }

  /** Frees its buffers. */
  [Symbol.dispose](): void {
    this.#heads.close();
  }
}
