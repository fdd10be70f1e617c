/**
 * Room where pages are packed and added up: a WebAssembly memory with windows on the memory that they come from.
 *
 * @module
 */
import { copyMemory, WindowMemory } from "../ffi/mod.ts";
import { MAX_PACK_PAGES, PageScan, SCAN_BYTES } from "../wasm/page_scan.ts";
import type { Digest } from "./digest.ts";
import { PAGE_BYTES } from "./protocol.ts";

/** Pages that fit into a room. */
export const ROOM_PAGES: number = MAX_PACK_PAGES;
const ROOM_BYTES = ROOM_PAGES * PAGE_BYTES;
// What a window shows at a time: few enough to be made at once, many enough to be made seldom. Short runs are copied for less.
const WINDOW_BYTES = 64 << 20;
const LEAST_WINDOW_BYTES = 2 << 20;

/** Memory that is mapped shared: bytes from an address of this process on. */
export interface SharedPiece {
  /** Where it begins. */
  address: number;
  /** Bytes. */
  size: number;
}

const idle: PackRoom[] = [];

/** A room. Address space for such memories is scarce: rooms are used again. */
export class PackRoom implements Disposable {
  /** Where packed pages lie in this process, bytes. */
  readonly address: number;
  readonly #windows = new WindowMemory();
  readonly #scan: PageScan;
  readonly #out: number;
  readonly #copies: number;
  #window: { address: number; size: number; start: number } | undefined;
  #refused: SharedPiece | undefined;

  private constructor() {
    this.#scan = new PageScan(this.#windows.memory, this.#windows.alloc(SCAN_BYTES));
    this.#out = this.#windows.alloc(ROOM_BYTES);
    this.#copies = this.#windows.alloc(ROOM_BYTES);
    this.address = this.#windows.address(this.#out);
  }

  /** A room for the caller alone, until it is disposed of. */
  static take(): PackRoom {
    return idle.pop() ?? new PackRoom();
  }

  /** Which of the pages that {@linkcode pack} looked at are not zero. */
  get found(): Int32Array {
    return this.#scan.found;
  }

  /**
   * Packs those of `pages` pages at `address` that are not zero into the room, behind `after` pages that are there.
   *
   * @param piece the shared memory that they lie in; without it they are copied first
   * @param ahead bytes from `address` on that are going to be packed, all in `piece`
   * @returns how many
   */
  pack(digest: Digest, address: number, pages: number, after: number, piece: SharedPiece | undefined, ahead: number): number {
    if (!(after >= 0 && after + pages <= ROOM_PAGES)) throw new RangeError(`No room for ${pages} pages behind ${after}`);
    let from = piece === undefined ? undefined : this.#show(piece, address, pages * PAGE_BYTES, ahead);
    if (from === undefined) {
      from = this.#copies;
      copyMemory(this.#windows.address(from), address, pages * PAGE_BYTES);
    }
    return this.#scan.pack(digest, from, pages, this.#out + after * PAGE_BYTES);
  }

  // The offset at which a window shows `address`.
  #show(piece: SharedPiece, address: number, bytes: number, ahead: number): number | undefined {
    const { address: shown = 0, size: length = 0, start = 0 } = this.#window ?? {};
    if (address >= shown && address + bytes <= shown + length) return start + address - shown;
    if (piece === this.#refused || ahead < LEAST_WINDOW_BYTES) return undefined;
    this.#close();
    const size = Math.min(WINDOW_BYTES, ahead, piece.address + piece.size - address);
    const opened = size < bytes ? undefined : this.#windows.map(address, size);
    if (opened === undefined) {
      this.#refused = piece;
      return undefined;
    }
    this.#windows.populate(opened, size);
    this.#window = { address, size, start: opened };
    return opened;
  }

  /** Adds `bytes` (a multiple of 128) at `address` to a digest. */
  add(digest: Digest, address: number, bytes: number): void {
    for (let done = 0; done < bytes; done += ROOM_BYTES) {
      const length = Math.min(ROOM_BYTES, bytes - done);
      copyMemory(this.#windows.address(this.#copies), address + done, length);
      this.#scan.add(digest, this.#copies, length);
    }
  }

  #close(): void {
    if (this.#window !== undefined) this.#windows.release(this.#window.start, this.#window.size);
    this.#window = undefined;
  }

  /** Closes its window; the room is for others now. */
  [Symbol.dispose](): void {
    this.#close();
    this.#refused = undefined;
    idle.push(this);
  }
}

let own: PackRoom | undefined;

/** Adds `bytes` (a multiple of 128) at `address` of this process to a digest. */
export function addPages(digest: Digest, address: number, bytes: number): void {
  own ??= PackRoom.take();
  own.add(digest, address, bytes);
}
