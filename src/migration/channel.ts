/**
 * Frames over a stream socket: numbered, checked, bounded, with time-outs. See protocol.ts for their meaning.
 *
 * @module
 */
import { type ErrorRecord, EXIT, fromErrorRecord, SvqError, toErrorRecord } from "../errors.ts";
import {
  cancelWaits,
  copyMemory,
  ERRNO,
  IoVector,
  mapAnonymous,
  readable,
  readableWithin,
  SysError,
  type UnixStream,
  widenSendBuffer,
  writable,
  writableWithin,
} from "../ffi/mod.ts";
import { checksumBytes } from "./digest.ts";
import { breathe } from "./pages.ts";
import {
  FRAME,
  FRAME_HEADER_BYTES,
  frameName,
  type FrameType,
  MAX_FRAME_PAGES,
  MAX_JSON,
  PAGE_BYTES,
  PAGES_HEADER_BYTES,
  RUN_HEADER_BYTES,
  violation,
} from "./protocol.ts";

const BUFFER_BYTES = 256 * 1024;
const MAX_PAGES_PAYLOAD = PAGES_HEADER_BYTES + MAX_FRAME_PAGES * (RUN_HEADER_BYTES + PAGE_BYTES);
const LINGER_MS = 500;
const SLOW_WAITS = 32;
const TURN_MS = 20;
// A frame of pages or two: with the little that a unix socket holds by default both sides wake each other several times in each.
const SEND_BUFFER_BYTES = 2 << 20;

/** The head of a frame that has arrived; its payload is still to be read. */
export interface FrameHead {
  /** Which frame. */
  type: FrameType;
  /** Bytes of the payload. */
  length: number;
  /** Checksum of the payload; PAGES: of the pages. */
  checksum: number;
}

/** How a link was lost: the other side ended it, it was reset, or it fell silent. */
export const LOST = { end: "MIGRATION_LINK", reset: "MIGRATION_RESET", silence: "MIGRATION_TIMEOUT" } as const;

/** One of the keys of {@linkcode LOST}. */
export type LossKind = keyof typeof LOST;

/** The link fell silent, or ended where it must not. */
export function linkLost(message: string, kind: LossKind): SvqError {
  return new SvqError(LOST[kind], message, { exitCode: EXIT.migrationAborted });
}

/** How the link was lost, where that is what `error` says. */
export function lossOf(error: unknown): LossKind | undefined {
  if (!(error instanceof SvqError) || error instanceof RemoteError) return undefined;
  return (Object.keys(LOST) as LossKind[]).find((kind) => LOST[kind] === error.code);
}

/** One side of a migration stream. */
export class Channel implements Disposable {
  readonly #stream: UnixStream;
  readonly #timeoutMs: number;
  // What has been received and not been read yet: bytes #start to #end of the buffer.
  readonly #buffer = mapAnonymous(BUFFER_BYTES, "migration buffer");
  readonly #bytes = new Uint8Array(this.#buffer.buffer());
  readonly #view = new DataView(this.#buffer.buffer());
  readonly #vector = new IoVector(513);
  #start = 0;
  #end = 0;
  #sent = 0;
  #received = 0;
  #bytesSent = 0;
  // Waits through the event loop before the other side is given another chance to keep pace.
  #slow = 0;
  // When others had their turn last.
  #turned = performance.now();
  #aborted: unknown;

  /** Takes ownership of a connected stream. @param timeoutMs longest wait for the other side to send or take anything */
  constructor(stream: UnixStream, timeoutMs: number) {
    this.#stream = stream;
    this.#timeoutMs = timeoutMs;
    widenSendBuffer(stream.fd, SEND_BUFFER_BYTES);
  }

  /** Bytes sent so far. */
  get bytesSent(): number {
    return this.#bytesSent;
  }

  /** Closed already. */
  get closed(): boolean {
    return this.#stream.closed;
  }

  /** Ends every wait, now and later, with `reason`. */
  abort(reason: unknown): void {
    if (this.#aborted !== undefined) return;
    this.#aborted = reason;
    if (!this.#stream.closed) cancelWaits(this.#stream.fd);
  }

  /** Undoes {@linkcode abort}, to send a farewell. */
  forgive(): void {
    this.#aborted = undefined;
  }

  async #wait(ready: (fd: number) => Promise<void>, timeoutMs: number): Promise<void> {
    if (this.#aborted !== undefined) throw this.#aborted;
    let late = false;
    const timer = setTimeout(() => {
      late = true;
      if (!this.#stream.closed) cancelWaits(this.#stream.fd);
    }, timeoutMs);
    try {
      await ready(this.#stream.fd);
    } catch (error) {
      if (this.#aborted !== undefined) throw this.#aborted;
      if (late) throw linkLost(`The other side of the migration has been silent for ${timeoutMs} ms`, "silence");
      throw error;
    } finally {
      clearTimeout(timer);
      this.#turned = performance.now();
    }
    if (this.#aborted !== undefined) throw this.#aborted;
  }

  // ---- sending

  /** Writes a frame's head. */
  putHead(view: DataView, at: number, type: FrameType, length: number, checksum: number): void {
    view.setUint32(at, type, true);
    view.setUint32(at + 4, this.#sent++ >>> 0, true);
    view.setUint32(at + 8, length, true);
    view.setInt32(at + 12, checksum, true);
  }

  /** Sends a frame. @returns its checksum */
  async send(type: FrameType, payload: Uint8Array = new Uint8Array(0)): Promise<number> {
    const bytes = new Uint8Array(FRAME_HEADER_BYTES + payload.length);
    const checksum = checksumBytes(payload);
    this.putHead(new DataView(bytes.buffer), 0, type, payload.length, checksum);
    bytes.set(payload, FRAME_HEADER_BYTES);
    for (let rest = bytes; rest.length > 0;) {
      const sent = this.#attempt(() => this.#stream.trySend(rest));
      if (sent === undefined) await this.#wait(writable, this.#timeoutMs);
      else rest = rest.subarray(sent);
    }
    this.#bytesSent += bytes.length;
    return checksum;
  }

  /** Sends a frame with a JSON document. */
  async sendJson(type: FrameType, document: unknown): Promise<void> {
    await this.send(type, new TextEncoder().encode(JSON.stringify(document)));
  }

  /** Sends whole frames that lie in memory, heads by {@linkcode putHead} included; empties the vector. */
  async sendVector(vector: IoVector): Promise<void> {
    this.#bytesSent += vector.length;
    while (vector.count > 0) {
      const sent = this.#attempt(() => vector.tryWrite(this.#stream.fd));
      if (sent === undefined) await this.#room();
      else vector.advance(sent);
    }
  }

  // A receiver that keeps pace makes room within microseconds: less than it takes to be woken through the event loop.
  #room(): Promise<void> {
    return this.#soon(writableWithin, writable);
  }

  async #soon(within: (fd: number, ms: number) => boolean, ready: (fd: number) => Promise<void>): Promise<void> {
    await this.#turn();
    if (this.#aborted !== undefined) throw this.#aborted;
    if (this.#slow === 0) {
      if (within(this.#stream.fd, 1)) return;
      this.#slow = SLOW_WAITS;
    } else {
      this.#slow--;
    }
    await this.#wait(ready, this.#timeoutMs);
  }

  // A peer that is always just in time, on purpose or not, must not keep timers, signals and other connections from their turn.
  async #turn(): Promise<void> {
    if (performance.now() - this.#turned < TURN_MS) return;
    await breathe();
    this.#turned = performance.now();
  }

  #attempt(write: () => number | undefined): number | undefined {
    if (this.#aborted !== undefined) throw this.#aborted;
    try {
      return write();
    } catch (error) {
      if (error instanceof SysError && (error.errno === ERRNO.EPIPE || error.errno === ERRNO.ECONNRESET)) {
        throw linkLost(`The other side of the migration is gone (${error.code})`, error.errno === ERRNO.EPIPE ? "end" : "reset");
      }
      throw error;
    }
  }

  /** Tells the other side why this one ends, as well as it can, and gives it time to read that before the link is closed. */
  async farewell(error: unknown): Promise<void> {
    if (this.#stream.closed) return;
    this.forgive();
    const { code, message, hint } = toErrorRecord(error);
    const record = { code, message: message.slice(0, 2000), hint };
    const late = setTimeout(() => this.abort(new Error("late")), LINGER_MS);
    try {
      await this.sendJson(FRAME.ERROR, record);
      this.#stream.shutdownWriting();
      // An unread byte would turn our close into a reset, and that could overtake the reason.
      for (;;) {
        this.#start = this.#end = 0;
        if (await this.#fill(this.#timeoutMs) === 0) return;
      }
    } catch {
      /* it is gone, or does not listen */
    } finally {
      clearTimeout(late);
    }
  }

  // ---- receiving

  // Bytes that came; 0 at the end.
  async #fill(timeoutMs: number): Promise<number> {
    if (this.#start > 0) {
      this.#bytes.copyWithin(0, this.#start, this.#end);
      this.#end -= this.#start;
      this.#start = 0;
    }
    this.#vector.clear();
    this.#vector.push(this.#buffer.address + this.#end, BUFFER_BYTES - this.#end);
    for (;;) {
      const bytes = this.#tryRead();
      if (bytes !== undefined) {
        this.#end += bytes;
        return bytes;
      }
      await this.#wait(readable, timeoutMs);
    }
  }

  #tryRead(): number | undefined {
    if (this.#aborted !== undefined) throw this.#aborted;
    try {
      return this.#vector.tryRead(this.#stream.fd);
    } catch (error) {
      if (error instanceof SysError && error.errno === ERRNO.ECONNRESET) throw linkLost("The link was reset", "reset");
      throw error;
    }
  }

  async #need(bytes: number, timeoutMs: number): Promise<void> {
    while (this.#end - this.#start < bytes) {
      if (await this.#fill(timeoutMs) === 0) throw linkLost("The other side of the migration closed the link", "end");
    }
  }

  /** Is something there to be read? Looks once, without waiting. */
  poll(): boolean {
    if (this.#end > this.#start) return true;
    this.#start = this.#end = 0;
    this.#vector.clear();
    this.#vector.push(this.#buffer.address, BUFFER_BYTES);
    this.#end = this.#tryRead() ?? 0;
    return this.#end > 0;
  }

  /**
   * The head of the next frame. A frame ERROR is thrown as the error that it carries.
   *
   * @param expected the types that may come now
   * @throws SvqError MIGRATION_PROTOCOL, MIGRATION_TIMEOUT, MIGRATION_LINK, and the other side's error
   */
  async receiveHead(expected: readonly FrameType[], timeoutMs: number = this.#timeoutMs): Promise<FrameHead> {
    await this.#need(FRAME_HEADER_BYTES, timeoutMs);
    const view = this.#view;
    const at = this.#start;
    const type = view.getUint32(at, true) as FrameType;
    const number = view.getUint32(at + 4, true);
    const head = { type, length: view.getUint32(at + 8, true), checksum: view.getInt32(at + 12, true) };
    this.#start += FRAME_HEADER_BYTES;
    if (number !== this.#received) throw violation(`frame ${number} came where ${this.#received} was due`);
    this.#received = (this.#received + 1) >>> 0;
    if (type === FRAME.ERROR) throw remoteError(await this.readPayload(head, MAX_JSON));
    if (!expected.includes(type)) throw violation(`${frameName(type)} came where ${expected.map(frameName).join(" or ")} was due`);
    const pages = type === FRAME.PAGES || type === FRAME.BLOCKS;
    if (pages && head.length > MAX_PAGES_PAYLOAD) throw violation(`a frame of pages has ${head.length} bytes`);
    return head;
  }

  /** The payload of a frame, checked. @param limit most bytes that it may have */
  async readPayload({ type, length, checksum }: FrameHead, limit: number): Promise<Uint8Array<ArrayBuffer>> {
    if (length > limit) throw violation(`${frameName(type)} has ${length} bytes, at most ${limit} are allowed`);
    // Room is made as the bytes come, not for what the head promises.
    const parts: Uint8Array[] = [];
    for (let rest = length; rest > 0;) {
      await this.#need(1, this.#timeoutMs);
      const part = this.#bytes.slice(this.#start, Math.min(this.#end, this.#start + rest));
      this.#start += part.length;
      rest -= part.length;
      parts.push(part);
    }
    const payload = new Uint8Array(length);
    let at = 0;
    for (const part of parts) {
      payload.set(part, at);
      at += part.length;
    }
    if (checksumBytes(payload) !== checksum) throw violation(`the checksum of a frame ${frameName(type)} is wrong`);
    return payload;
  }

  /** The JSON document in a frame. @throws SvqError MIGRATION_PROTOCOL when it is no object */
  async readJson(head: FrameHead): Promise<Record<string, unknown>> {
    return parseJson(await this.readPayload(head, MAX_JSON), head.type);
  }

  /** The next frame, which must be of `type`, with its payload. */
  async receive(type: FrameType, limit: number, timeoutMs: number = this.#timeoutMs): Promise<Uint8Array<ArrayBuffer>> {
    return await this.readPayload(await this.receiveHead([type], timeoutMs), limit);
  }

  /** Reads the next `length` bytes of a payload, at most 64 KiB, into a view that is valid until the next call. */
  async peekBytes(length: number): Promise<DataView> {
    await this.#need(length, this.#timeoutMs);
    const view = new DataView(this.#view.buffer, this.#start, length);
    this.#start += length;
    return view;
  }

  /** Reads the next `length` bytes of a payload to an address of this process, which the caller has checked. */
  async readInto(address: number, length: number): Promise<void> {
    await this.readPieces([{ address, length }]);
  }

  /** Reads the next bytes of a payload to several places, at most 512, which the caller has checked. */
  async readPieces(pieces: readonly { address: number; length: number }[]): Promise<void> {
    await this.#turn();
    const vector = this.#vector;
    let rest = 0;
    vector.clear();
    for (const { address, length } of pieces) {
      const there = Math.min(length, this.#end - this.#start);
      if (there > 0) copyMemory(address, this.#buffer.address + this.#start, there);
      this.#start += there;
      if (length > there) vector.push(address + there, length - there);
      rest += length - there;
    }
    if (rest === 0) return;
    this.#start = this.#end = 0;
    // What comes behind goes into the buffer, which is empty.
    vector.push(this.#buffer.address, BUFFER_BYTES);
    while (rest > 0) {
      const bytes = this.#tryRead();
      if (bytes === undefined) {
        // In the middle of a frame: the rest is on its way.
        await this.#soon(readableWithin, readable);
        continue;
      }
      if (bytes === 0) throw linkLost("The other side of the migration closed the link", "end");
      vector.advance(bytes);
      this.#end = Math.max(0, bytes - rest);
      rest -= Math.min(rest, bytes);
    }
  }

  /** Closes the link. */
  close(): void {
    if (this.#stream.closed) return;
    this.#stream.close();
    this.#buffer.close();
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}

function parseJson(bytes: Uint8Array, type: FrameType): Record<string, unknown> {
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch {
    throw violation(`${frameName(type)} is no JSON`);
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw violation(`${frameName(type)} is no JSON object`);
  return value as Record<string, unknown>;
}

/** An error that the other side reported; texts are bounded. */
export class RemoteError extends SvqError {
  /** Always `RemoteError`. */
  override readonly name = "RemoteError";
}

function remoteError(payload: Uint8Array): SvqError {
  const { code, message, hint } = parseJson(payload, FRAME.ERROR);
  const text = (value: unknown, limit: number) => typeof value === "string" ? value.slice(0, limit) : undefined;
  const record: ErrorRecord = { code: text(code, 64) ?? "REFUSED", message: text(message, 2000) ?? "no reason given" };
  const { code: name, message: reason } = fromErrorRecord(record);
  return new RemoteError(name, `The other side: ${reason}`, { exitCode: EXIT.migrationAborted, hint: text(hint, 1000) });
}
