/**
 * Turning the capture of frames on and off, and reading what was captured. While it is on, all data queues are behind rings of
 * the relay's own and run on the JavaScript core, which sees each chain.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import type { CapturedFrame } from "../net/pcapng.ts";
import { CAPTURE_BYTES, CaptureBuffer, type CaptureStart, frameShape, SNAP_LENGTH_MAX } from "./capture.ts";

/** What a {@linkcode Capture} asks its relay. */
export interface CaptureContext {
  /** Is it a network device? */
  isNet: () => boolean;
  /** Features that the guest took. */
  features: () => bigint;
  /** Worker threads. */
  workers: number;
  /** Frames that there was no room for, over the life of the relay. */
  dropped: () => number;
  /** Brings all queues into the modes that they should be in, and starts the rings of the others anew. */
  restart: () => Promise<void>;
}

/** The capture of one relay; there is one at a time. */
export class Capture {
  readonly #context: CaptureContext;
  #buffers: CaptureBuffer[] | undefined;
  #snapLength = SNAP_LENGTH_MAX;
  #owner: unknown;
  #before = 0;

  /** Nothing is captured. */
  constructor(context: CaptureContext) {
    this.#context = context;
  }

  /** Is it on? */
  get on(): boolean {
    return this.#buffers !== undefined;
  }

  /** Frames that there was no room for since it was turned on. */
  get dropped(): number {
    return this.on ? this.#context.dropped() - this.#before : 0;
  }

  /** How the Worker captures a queue; undefined while nothing is. */
  start(_index: number, worker: number): CaptureStart | undefined {
    if (this.#buffers === undefined || !this.#context.isNet()) return undefined;
    return { shared: this.#buffers[worker]!.shared, snapLength: this.#snapLength, ...frameShape(this.#context.features()) };
  }

  /**
   * Turns it on.
   *
   * @param owner who does
   * @param snapLength most bytes that are kept of a frame
   * @param bytes of the buffer of each Worker, a power of two
   * @throws SvqError CAPTURE_BUSY, CAPTURE_IMPOSSIBLE, and of the switch
   */
  async open(owner: unknown, snapLength: number = SNAP_LENGTH_MAX, bytes: number = CAPTURE_BYTES): Promise<void> {
    const { isNet, workers, restart, dropped } = this.#context;
    if (this.on) {
      throw new SvqError("CAPTURE_BUSY", "The relay's frames are being captured already", { hint: "There is one capture at a time" });
    }
    if (!isNet()) {
      throw new SvqError("CAPTURE_IMPOSSIBLE", "No network device runs here: there are no frames", { exitCode: EXIT.missingFeature });
    }
    this.#snapLength = Math.min(Math.max(1, snapLength), SNAP_LENGTH_MAX);
    this.#buffers = Array.from({ length: workers }, () => new CaptureBuffer(bytes));
    this.#owner = owner;
    this.#before = dropped();
    try {
      await restart();
    } catch (error) {
      await this.close(owner);
      throw error;
    }
  }

  /** Takes out what was captured, by time. @param limit about as many bytes at most, of each Worker */
  read(owner: unknown, limit?: number): CapturedFrame[] {
    if (this.#owner !== owner || this.#buffers === undefined) return [];
    const frames = this.#buffers.flatMap((buffer) => buffer.read(limit));
    return this.#buffers.length === 1 ? frames : frames.sort((a, b) => a.timeNs < b.timeNs ? -1 : a.timeNs > b.timeNs ? 1 : 0);
  }

  /** Turns it off, if `owner` has turned it on; queues go back to their modes and cores. */
  async close(owner: unknown): Promise<void> {
    if (this.#owner !== owner || this.#buffers === undefined) return;
    this.#buffers = this.#owner = undefined;
    await this.#context.restart();
  }
}
