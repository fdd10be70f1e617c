/**
 * The socket between a relay and the process that is to take its place: messages of JSON, with descriptors.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import type { OwnedFd, UnixStream } from "../ffi/mod.ts";

/** Descriptors in one message. Linux takes 253. */
const FDS_PER_MESSAGE = 200;
/** Longest message, bytes: 256 queues and 512 regions fit many times. */
const MAX_BYTES = 4 << 20;
/** Most descriptors before one message. */
const MAX_TOTAL_FDS = 4096;

/** A message; what else is in it depends on its type. */
export interface UpgradeMessage {
  /** What it says. */
  type: string;
  /** The rest. */
  [key: string]: unknown;
}

/** One end. It owns its stream. */
export class UpgradeLink implements Disposable {
  readonly #stream: UnixStream;

  /** Takes ownership of `stream`. */
  constructor(stream: UnixStream) {
    this.#stream = stream;
  }

  /** Sends a message. Descriptors are borrowed until the promise settles. */
  async send(message: UpgradeMessage, fds: readonly number[] = []): Promise<void> {
    for (let at = 0; fds.length - at > FDS_PER_MESSAGE; at += FDS_PER_MESSAGE) {
      await this.#send({ type: "fds" }, fds.slice(at, at + FDS_PER_MESSAGE));
    }
    const rest = fds.length === 0 ? 0 : (Math.ceil(fds.length / FDS_PER_MESSAGE) - 1) * FDS_PER_MESSAGE;
    await this.#send(message, fds.slice(rest));
  }

  async #send(message: UpgradeMessage, fds: readonly number[]): Promise<void> {
    const body = new TextEncoder().encode(JSON.stringify(message));
    const bytes = new Uint8Array(4 + body.length);
    new DataView(bytes.buffer).setUint32(0, body.length, true);
    bytes.set(body, 4);
    await this.#stream.send(bytes, fds);
  }

  /**
   * The next message and the descriptors that came with it, which are the caller's; undefined at the end.
   *
   * @throws SvqError UPGRADE_STATE for what is no message
   */
  async receive(): Promise<{ message: UpgradeMessage; fds: OwnedFd[] } | undefined> {
    const fds: OwnedFd[] = [];
    try {
      for (;;) {
        const size = await this.#fill(new Uint8Array(4), fds);
        if (size === undefined) return undefined;
        const length = new DataView(size.buffer).getUint32(0, true);
        if (length > MAX_BYTES) throw new SvqError("UPGRADE_STATE", `A message of ${length} bytes`);
        const body = await this.#fill(new Uint8Array(length), fds);
        if (body === undefined) return undefined;
        if (fds.length > MAX_TOTAL_FDS) throw new SvqError("UPGRADE_STATE", `More than ${MAX_TOTAL_FDS} file descriptors`);
        const message = parse(new TextDecoder().decode(body));
        if (message.type !== "fds") return { message, fds: fds.splice(0) };
      }
    } finally {
      for (const fd of fds) fd.close();
    }
  }

  async #fill(bytes: Uint8Array<ArrayBuffer>, fds: OwnedFd[]): Promise<Uint8Array<ArrayBuffer> | undefined> {
    for (let at = 0; at < bytes.length;) {
      const received = await this.#stream.receive(bytes.subarray(at));
      fds.push(...received.fds);
      if (received.bytes === 0) return undefined;
      at += received.bytes;
    }
    return bytes;
  }

  /** Closes the socket; a `receive` under way rejects. */
  close(): void {
    this.#stream.close();
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}

function parse(text: string): UpgradeMessage {
  try {
    const value = JSON.parse(text);
    if (typeof value === "object" && value !== null && typeof value.type === "string") return value;
  } catch { /* said below */ }
  throw new SvqError("UPGRADE_STATE", "A message that is no JSON object with a type");
}
