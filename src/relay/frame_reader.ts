/**
 * What `svq trace --pcapng` asks of a relay: captured frames as pieces of a pcapng file, until whoever asks stops asking.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { join, pcapngFrame, pcapngHeader, pcapngStatistics } from "../net/pcapng.ts";
import { SNAP_LENGTH_MAX } from "./capture.ts";
import { pause } from "./ring_rest.ts";
import type { Relay } from "./relay.ts";

/** A reader that has not asked for so long has gone, ms. */
const LEASE_MS = 10_000;
/** Longest time that one question waits, ms. */
const MAX_WAIT_MS = 5000;
/** How often it is looked whether there are frames, ms. */
const LOOK_MS = 20;
/** About as many bytes of frames in one answer. */
const ANSWER_BYTES = 4 << 20;

/** One answer. */
export interface FramesAnswer {
  /** What comes next in the file, base64. */
  pcapng: string;
  /** Frames in it. */
  frames: number;
  /** Frames that there was no room for, since the capture began. */
  dropped: number;
  /** Nothing comes any more: the guest has gone, or the reader has said so. */
  ended: boolean;
}

interface Reading {
  reader: string;
  relay: Relay;
  timer: ReturnType<typeof setTimeout>;
}

/** The one reader of a relay's frames. */
export class FrameReader {
  readonly #name: string;
  #reading: Reading | undefined;

  /** @param name of the relay: frames are seen on an interface of that name */
  constructor(name: string) {
    this.#name = name;
  }

  /**
   * Begins or goes on with a capture, or ends it.
   *
   * @param relay the one of the front-end that is there now
   * @param params `reader`, any text that tells readers apart; `wait_ms`; `snap_length`, looked at by the first question; `stop`
   * @throws SvqError BAD_PARAMETER, CAPTURE_BUSY, CAPTURE_IMPOSSIBLE
   */
  async read(relay: Relay, params: Record<string, unknown>): Promise<FramesAnswer> {
    const { reader, wait_ms = 0, snap_length = SNAP_LENGTH_MAX, stop = false } = params;
    if (typeof reader !== "string" || typeof wait_ms !== "number" || typeof snap_length !== "number" || typeof stop !== "boolean") {
      throw new SvqError("BAD_PARAMETER", "reader is a text, wait_ms and snap_length are numbers, stop is true or false", {
        exitCode: EXIT.usage,
      });
    }
    if (this.#reading?.reader !== reader) {
      if (stop) return { pcapng: "", frames: 0, dropped: 0, ended: true };
      await relay.capture.open(reader, snap_length);
      this.#reading = { reader, relay, timer: setTimeout(() => {}, 0) };
      this.#lease();
      return { pcapng: pcapngHeader(this.#name, Math.min(snap_length, SNAP_LENGTH_MAX)).toBase64(), frames: 0, dropped: 0, ended: false };
    }
    this.#lease();
    return await this.#next(this.#reading, relay, Math.min(wait_ms, MAX_WAIT_MS), stop);
  }

  async #next(reading: Reading, now: Relay, waitMs: number, stop: boolean): Promise<FramesAnswer> {
    const { relay, reader } = reading;
    // Another front-end has come: its frames are for another capture.
    const ended = stop || now !== relay || !relay.capture.on;
    const dropped = relay.capture.dropped;
    let frames = relay.capture.read(reader, ended ? undefined : ANSWER_BYTES);
    for (let waited = 0; frames.length === 0 && !ended && waited < waitMs; waited += LOOK_MS) {
      await pause(LOOK_MS);
      frames = relay.capture.read(reader, ANSWER_BYTES);
    }
    const parts = frames.map(pcapngFrame);
    if (ended) {
      await this.end();
      parts.push(pcapngStatistics(BigInt(Date.now()) * 1_000_000n, dropped));
    }
    return { pcapng: join(parts).toBase64(), frames: frames.length, dropped, ended };
  }

  #lease(): void {
    const reading = this.#reading!;
    clearTimeout(reading.timer);
    reading.timer = setTimeout(() => void this.end(), LEASE_MS + MAX_WAIT_MS);
  }

  /** Ends the capture, if there is one. */
  async end(): Promise<void> {
    const reading = this.#reading;
    this.#reading = undefined;
    if (reading === undefined) return;
    clearTimeout(reading.timer);
    await reading.relay.capture.close(reading.reader).catch(() => {});
  }
}
