/**
 * Captures frames on their way through the relay. A frame is copied when its chain is at its end (the device has given it back,
 * the guest has not been told), into a buffer of bounded size that the main thread empties. What has no room is counted and
 * goes its way uncaptured: nobody on the data path ever waits for a reader.
 *
 * @module
 */
import type { CapturedFrame } from "../net/pcapng.ts";
import { hasBit } from "../uapi/bits.ts";
import { VIRTIO_FEATURE_BITS } from "../uapi/virtio.ts";
import {
  VIRTIO_NET_FEATURE_BITS,
  VIRTIO_NET_HDR_BYTES,
  VIRTIO_NET_HDR_HASH_BYTES,
  VIRTIO_NET_HDR_LEGACY_BYTES,
} from "../uapi/virtio_net.ts";
import type { RangeTable } from "../memory/range_table.ts";

/** Bytes of the buffer of one Worker. */
export const CAPTURE_BYTES: number = 8 << 20;
/** Most bytes that are kept of a frame. */
export const SNAP_LENGTH_MAX = 65_535;

// The first words of the buffer: both run on, modulo 2^32.
const HEAD = 0;
const TAIL = 1;
const CONTROL_BYTES = 64;
// A record: bytes in all, queue, bytes of the frame, bytes kept, dropped before it; then f64 milliseconds since 1970.
const RECORD_BYTES = 32;

/** How a Worker captures a queue. Plain data. */
export interface CaptureStart {
  /** See {@linkcode CaptureBuffer}. */
  shared: SharedArrayBuffer;
  /** Most bytes that are kept of a frame. */
  snapLength: number;
  /** Bytes of the packet header before each frame. */
  headerBytes: number;
  /** May a received frame take several chains? */
  mergeable: boolean;
}

/** What a queue's capture needs to know of the negotiated features. */
export function frameShape(features: bigint): Pick<CaptureStart, "headerBytes" | "mergeable"> {
  const mergeable = hasBit(features, VIRTIO_NET_FEATURE_BITS.MRG_RXBUF);
  if (hasBit(features, VIRTIO_NET_FEATURE_BITS.HASH_REPORT)) return { headerBytes: VIRTIO_NET_HDR_HASH_BYTES, mergeable };
  const long = mergeable || hasBit(features, VIRTIO_FEATURE_BITS.VERSION_1);
  return { headerBytes: long ? VIRTIO_NET_HDR_BYTES : VIRTIO_NET_HDR_LEGACY_BYTES, mergeable };
}

/** The buffer between one Worker, which writes, and the main thread, which reads. */
export class CaptureBuffer {
  /** To be posted to the Worker. */
  readonly shared: SharedArrayBuffer;
  readonly #words: Int32Array;
  readonly #bytes: Uint8Array;
  readonly #view: DataView;
  readonly #size: number;

  /** A new buffer, or the other side of one. */
  constructor(shared: SharedArrayBuffer | number) {
    this.shared = typeof shared === "number" ? new SharedArrayBuffer(CONTROL_BYTES + shared) : shared;
    this.#words = new Int32Array(this.shared, 0, 2);
    this.#size = this.shared.byteLength - CONTROL_BYTES;
    this.#bytes = new Uint8Array(this.shared, CONTROL_BYTES, this.#size);
    this.#view = new DataView(this.shared, CONTROL_BYTES, this.#size);
  }

  /**
   * Writes a frame. @param frame what is kept of it @returns whether there was room
   */
  write(queue: number, timeMs: number, length: number, frame: Uint8Array, dropped: number): boolean {
    const total = (RECORD_BYTES + frame.length + 7) & ~7;
    const head = Atomics.load(this.#words, HEAD) >>> 0;
    const used = (head - Atomics.load(this.#words, TAIL)) >>> 0;
    const at = head % this.#size;
    const toEnd = this.#size - at;
    // A record lies in one piece: the rest of the buffer is skipped where it does not fit.
    const skip = total > toEnd ? toEnd : 0;
    if (used + skip + total > this.#size) return false;
    if (skip > 0) this.#view.setUint32(at, 0, true);
    const start = skip > 0 ? 0 : at;
    const view = this.#view;
    view.setUint32(start, total, true);
    view.setUint32(start + 4, queue, true);
    view.setUint32(start + 8, length, true);
    view.setUint32(start + 12, frame.length, true);
    view.setUint32(start + 16, dropped, true);
    view.setFloat64(start + 24, timeMs, true);
    this.#bytes.set(frame, start + RECORD_BYTES);
    Atomics.store(this.#words, HEAD, (head + skip + total) | 0);
    return true;
  }

  /** Takes out what is there. @param limit about as many bytes at most */
  read(limit: number = this.#size): CapturedFrame[] {
    const frames: CapturedFrame[] = [];
    const head = Atomics.load(this.#words, HEAD) >>> 0;
    let tail = Atomics.load(this.#words, TAIL) >>> 0;
    for (let taken = 0; tail !== head && taken < limit;) {
      const at = tail % this.#size;
      const view = this.#view;
      const total = view.getUint32(at, true);
      if (total === 0) {
        tail = (tail + this.#size - at) >>> 0;
        continue;
      }
      const queue = view.getUint32(at + 4, true);
      const kept = view.getUint32(at + 12, true);
      frames.push({
        timeNs: BigInt(Math.round(view.getFloat64(at + 24, true) * 1000)) * 1000n,
        queue,
        direction: queue % 2 === 0 ? "in" : "out",
        length: view.getUint32(at + 8, true),
        bytes: this.#bytes.slice(at + RECORD_BYTES, at + RECORD_BYTES + kept),
        dropped: view.getUint32(at + 16, true),
      });
      tail = (tail + total) >>> 0;
      taken += total;
    }
    Atomics.store(this.#words, TAIL, tail | 0);
    return frames;
  }
}

/** Puts the frames of one queue together out of chains, and copies them. */
export class QueueCapture {
  readonly #queue: number;
  readonly #start: CaptureStart;
  readonly #buffer: CaptureBuffer;
  readonly #memory: () => RangeTable;
  readonly #dropped: () => void;
  readonly #frame: Uint8Array<ArrayBuffer>;
  readonly #header = new Uint8Array(VIRTIO_NET_HDR_HASH_BYTES);
  #length = 0;
  #chains = 0;
  #missed = 0;
  // Of the chain that is being shown.
  #left = 0;
  #skip = 0;
  #headerAt = 0;

  /** @param memory guest memory, asked anew each time @param dropped counts a frame that was not captured */
  constructor(queue: number, start: CaptureStart, memory: () => RangeTable, dropped: () => void) {
    this.#queue = queue;
    this.#start = start;
    this.#buffer = new CaptureBuffer(start.shared);
    this.#memory = memory;
    this.#dropped = dropped;
    this.#frame = new Uint8Array(start.snapLength);
  }

  /** Do its chains bring frames to the guest? */
  get receives(): boolean {
    return this.#queue % 2 === 0;
  }

  /** A chain is at its end. @param bytes of it that make up the frame */
  begin(bytes: number): void {
    this.#left = bytes;
    if (this.#chains > 0) return;
    this.#length = 0;
    this.#headerAt = 0;
    this.#skip = this.#start.headerBytes;
  }

  /** A segment of it: readable ones of a queue that sends, writable ones of one that receives. */
  segment(gpa: number, length: number): void {
    let at = gpa;
    let rest = Math.min(length, this.#left);
    this.#left -= rest;
    if (this.#skip > 0) {
      const part = Math.min(this.#skip, rest);
      this.#memory().readBytes(at, this.#header, this.#headerAt, part);
      this.#headerAt += part;
      this.#skip -= part;
      at += part;
      rest -= part;
    }
    const kept = Math.min(rest, Math.max(0, this.#frame.length - this.#length));
    if (kept > 0 && !this.#memory().readBytes(at, this.#frame, this.#length, kept)) this.#frame.fill(0, this.#length, this.#length + kept);
    this.#length += rest;
  }

  /** The chain was shown to its end. */
  end(): void {
    const { mergeable } = this.#start;
    if (this.#chains > 0) this.#chains--;
    else if (mergeable && this.receives) this.#chains = Math.max(0, (this.#header[10]! | this.#header[11]! << 8) - 1);
    if (this.#chains > 0) return;
    const now = performance.timeOrigin + performance.now();
    const kept = this.#frame.subarray(0, Math.min(this.#length, this.#frame.length));
    if (this.#buffer.write(this.#queue, now, this.#length, kept, this.#missed)) this.#missed = 0;
    else {
      this.#missed++;
      this.#dropped();
    }
  }
}
