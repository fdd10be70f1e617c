/**
 * One vhost-user socket: whole messages in, whole messages out, descriptors included. Both roles use it, and so does the
 * back-end's request channel.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import type { OwnedFd } from "../ffi/fd.ts";
import type { UnixStream } from "../ffi/unix_socket.ts";
import { type Channel, FLAG, HEADER_SIZE, requestName } from "../uapi/vhost_user.ts";
import { checkHeader, decodeHeader, encodeMessage, type Header, protocolError } from "./message.ts";

/** Called for every message that was received whole or is being sent. The payload is borrowed for the call. */
export type MessageHook = (
  direction: "in" | "out",
  request: number,
  flags: number,
  payload: Uint8Array<ArrayBuffer>,
  fdCount: number,
  channel: Channel,
) => void;

/** A message that was received. Whoever receives it closes `fds`, or takes them out. */
export interface Message {
  /** Request id. */
  request: number;
  /** Header flags. */
  flags: number;
  /** The payload, checked for size only. */
  payload: Uint8Array<ArrayBuffer>;
  /** Descriptors that came with it, owned by the receiver of the message. */
  fds: OwnedFd[];
}

/** How a {@linkcode VhostUserConnection} is used. */
export interface ConnectionOptions {
  /** Whose requests travel on it (default: the front-end's). */
  channel?: Channel;
  /** What the peer sends: requests, or answers to ours. */
  expect: "requests" | "replies";
  /** Sees every message. */
  onMessage?: MessageHook | undefined;
}

const NO_BYTES = new Uint8Array(0);

/** Closes all of `fds` and empties the array. */
export function closeFds(fds: OwnedFd[]): void {
  for (const fd of fds.splice(0)) fd.close();
}

/** A vhost-user connection over a unix stream socket, which it owns. */
export class VhostUserConnection implements Disposable {
  /** Whose requests travel here. */
  readonly channel: Channel;
  readonly #stream: UnixStream;
  readonly #expect: "requests" | "replies";
  readonly #onMessage: MessageHook | undefined;
  #sending: Promise<void> = Promise.resolve();
  #between = false;

  /** Takes ownership of `stream`. */
  constructor(stream: UnixStream, options: ConnectionOptions) {
    this.#stream = stream;
    this.channel = options.channel ?? "front-end";
    this.#expect = options.expect;
    this.#onMessage = options.onMessage;
  }

  /** Is the socket closed at this end? */
  get closed(): boolean {
    return this.#stream.closed;
  }

  /**
   * The next message; `undefined` when the peer closed the connection between two messages. Not to be called while a
   * call is under way.
   *
   * @throws SvqError VHOST_USER_PROTOCOL, TOO_MANY_FDS, or CLOSED after {@linkcode close}. The connection is then good for
   * `close` only: where the next message starts is unknown.
   */
  async receive(): Promise<Message | undefined> {
    const fds: OwnedFd[] = [];
    try {
      const header = await this.#receiveHeader(fds);
      if (header === undefined) return undefined;
      checkHeader(header, fds.length, this.channel, this.#expect);
      const payload = header.size === 0 ? NO_BYTES : new Uint8Array(header.size);
      if (!await this.#fill(payload, 0)) {
        throw protocolError(`${this.#name(header.request)}: the connection ended within its payload`);
      }
      this.#onMessage?.("in", header.request, header.flags, payload, fds.length, this.channel);
      return { request: header.request, flags: header.flags, payload, fds: fds.splice(0) };
    } finally {
      closeFds(fds);
    }
  }

  async #receiveHeader(fds: OwnedFd[]): Promise<Header | undefined> {
    const bytes = new Uint8Array(HEADER_SIZE);
    this.#between = true;
    const first = await this.#stream.receive(bytes).finally(() => this.#between = false);
    fds.push(...first.fds);
    if (first.bytes === 0) return undefined;
    if (!await this.#fill(bytes, first.bytes)) throw protocolError("The connection ended within a message header");
    return decodeHeader(bytes);
  }

  // False when the connection ended first. Descriptors are legal with a message's first byte only.
  async #fill(bytes: Uint8Array<ArrayBuffer>, start: number): Promise<boolean> {
    for (let at = start; at < bytes.length;) {
      const received = await this.#stream.receive(bytes.subarray(at));
      if (received.fds.length > 0) {
        closeFds(received.fds);
        throw protocolError("File descriptors in the middle of a message");
      }
      if (received.bytes === 0) return false;
      at += received.bytes;
    }
    return true;
  }

  #name(request: number): string {
    const name = requestName(this.channel, request);
    return this.#expect === "requests" ? name : `Answer to ${name}`;
  }

  /**
   * Sends one message after those before it. Descriptors are borrowed until the promise settles.
   *
   * @throws SvqError VHOST_USER_DISCONNECTED when the peer is gone
   */
  send(request: number, flags: number, payload: Uint8Array<ArrayBuffer> = NO_BYTES, fds: readonly number[] = []): Promise<void> {
    const sent = this.#sending.then(async () => {
      this.#onMessage?.("out", request, flags, payload, fds.length, this.channel);
      try {
        await this.#stream.send(encodeMessage(request, flags, payload), fds);
      } catch (cause) {
        throw new SvqError("VHOST_USER_DISCONNECTED", `${requestName(this.channel, request)} could not be sent: the connection is closed`, {
          cause,
        });
      }
    });
    // One failure is reported to the caller whose message it was; those behind it find out by themselves.
    this.#sending = sent.catch(() => {});
    return sent;
  }

  /** Sends the answer to `request`. */
  reply(request: number, payload: Uint8Array<ArrayBuffer> = NO_BYTES, fds: readonly number[] = []): Promise<void> {
    return this.send(request, FLAG.VERSION | FLAG.REPLY, payload, fds);
  }

  /** Ends a `receive` that waits between two messages: it rejects with ReactorCancelled. Within a message nothing happens. */
  interrupt(): void {
    if (this.#between) this.#stream.interrupt();
  }

  /** The socket, for another process: see {@linkcode interrupt}. */
  get fd(): number {
    return this.#stream.fd;
  }

  /** Closes the socket; a `receive` under way rejects with CLOSED. */
  close(): void {
    this.#stream.close();
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}
