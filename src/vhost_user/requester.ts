/**
 * The asking side of a vhost-user connection: requests out, their answers back in order, time-outs, and what happens to
 * all of them when the connection is lost.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import type { OwnedFd } from "../ffi/fd.ts";
import type { UnixStream } from "../ffi/unix_socket.ts";
import { decodeU64 } from "../uapi/vhost.ts";
import { type Channel, FLAG, requestName } from "../uapi/vhost_user.ts";
import { closeFds, type MessageHook, VhostUserConnection } from "./connection.ts";
import { Hold } from "./hold.ts";
import { protocolError } from "./message.ts";

/** How a {@linkcode Requester} is made. */
export interface RequesterOptions {
  /** Whose requests travel here (default: the front-end's). */
  channel?: Channel;
  /** Sees every message. */
  onMessage?: MessageHook | undefined;
  /** Called once when the connection is lost or the peer broke the protocol; not after `close`. */
  onLost?: (error: SvqError) => void;
}

/** How one request is made. */
export interface CallOptions {
  /** Descriptors to send along, borrowed until the promise settles. */
  fds?: readonly number[];
  /** Milliseconds to wait for the answer; none or Infinity: for ever. A connection whose answer is late is closed. */
  timeoutMs?: number | undefined;
  /** For messages: `queue 3`. */
  what?: string;
  /** Is given the descriptors that come with the answer, as their owner; otherwise they are closed. */
  onFds?: (fds: OwnedFd[]) => void;
}

interface Pending {
  request: number;
  what: string;
  resolve: (payload: Uint8Array<ArrayBuffer>) => void;
  reject: (error: unknown) => void;
  timer: ReturnType<typeof setTimeout> | undefined;
  onFds: ((fds: OwnedFd[]) => void) | undefined;
}

const NO_BYTES = new Uint8Array(0);

/** Sends requests and matches answers. It owns its stream, and reads it from the start: a lost peer is noticed at once. */
export class Requester implements Disposable {
  /** Has REPLY_ACK been negotiated, so that every request is answered? */
  replyAck = false;
  readonly #connection: VhostUserConnection;
  readonly #pending: Pending[] = [];
  readonly #onLost: ((error: SvqError) => void) | undefined;
  readonly #hold = new Hold();
  #failure: SvqError | undefined;

  /** Takes ownership of `stream`. */
  constructor(stream: UnixStream, options: RequesterOptions = {}) {
    this.#connection = new VhostUserConnection(stream, {
      channel: options.channel ?? "front-end",
      expect: "replies",
      onMessage: options.onMessage,
    });
    this.#onLost = options.onLost;
    this.#read();
  }

  /** Why no request can be made any more. */
  get failure(): SvqError | undefined {
    return this.#failure;
  }

  async #read(): Promise<void> {
    try {
      for (;;) {
        const message = await this.#hold.wait(() => this.#connection.receive(), () => this.#connection.interrupt());
        if (message === undefined) break;
        const pending = this.#pending.shift();
        if (pending?.onFds !== undefined && pending.request === message.request) pending.onFds(message.fds.splice(0));
        closeFds(message.fds);
        if (pending === undefined) throw protocolError(`Unasked answer to ${this.#name(message.request)}`);
        clearTimeout(pending.timer);
        if (message.request !== pending.request) {
          const error = protocolError(`Answer to ${this.#name(message.request)} where one to ${this.#name(pending.request)} was due`);
          pending.reject(error);
          throw error;
        }
        pending.resolve(message.payload);
      }
      this.fail(new SvqError("VHOST_USER_DISCONNECTED", "The other side closed the vhost-user connection", { exitCode: EXIT.failed }));
    } catch (error) {
      this.fail(error instanceof SvqError ? error : new SvqError("INTERNAL", String(error), { cause: error }));
    }
  }

  #name(request: number): string {
    return requestName(this.#connection.channel, request);
  }

  /**
   * Sends a request that has an answer of its own.
   *
   * @returns the answer's payload, of a size that is right for the request
   * @throws SvqError VHOST_USER_DISCONNECTED, VHOST_USER_TIMEOUT, VHOST_USER_PROTOCOL, CLOSED
   */
  call(request: number, payload: Uint8Array<ArrayBuffer> = NO_BYTES, options: CallOptions = {}): Promise<Uint8Array<ArrayBuffer>> {
    return this.#request(request, FLAG.VERSION, payload, options);
  }

  #request(request: number, flags: number, payload: Uint8Array<ArrayBuffer>, options: CallOptions): Promise<Uint8Array<ArrayBuffer>> {
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    return new Promise((resolve, reject) => {
      const what = options.what === undefined ? this.#name(request) : `${this.#name(request)}, ${options.what}`;
      const { timeoutMs } = options;
      const timer = timeoutMs === undefined || timeoutMs === Infinity ? undefined : setTimeout(() => {
        this.fail(
          new SvqError("VHOST_USER_TIMEOUT", `${what}: no answer within ${timeoutMs} ms`, {
            exitCode: EXIT.timeout,
            hint: "A vhost-user back-end serves one front-end at a time: another one may be connected to it",
          }),
        );
      }, timeoutMs);
      // Before the message goes out: its answer cannot overtake this.
      this.#pending.push({ request, what, resolve, reject, timer, onFds: options.onFds });
      this.#connection.send(request, flags, payload, options.fds).catch((error) => this.fail(error));
    });
  }

  /**
   * Sends a request without an answer of its own; with REPLY_ACK it asks for one and waits for it.
   *
   * @throws SvqError DEVICE_REFUSED where the peer answers with an error, and what {@linkcode call} throws
   */
  async command(request: number, payload: Uint8Array<ArrayBuffer> = NO_BYTES, options: CallOptions = {}): Promise<void> {
    if (!this.replyAck) return await this.tell(request, payload, options);
    const answer = decodeU64(await this.#request(request, FLAG.VERSION | FLAG.NEED_REPLY, payload, options));
    if (answer === 0n) return;
    const what = options.what === undefined ? "" : `, ${options.what}`;
    throw new SvqError("DEVICE_REFUSED", `${this.#name(request)}${what}: the other side answered with error ${answer}`, {
      hint: "The device's own log may say why",
    });
  }

  /** Sends a request that nobody answers; resolves when it is sent. @throws SvqError VHOST_USER_DISCONNECTED, CLOSED */
  async tell(request: number, payload: Uint8Array<ArrayBuffer> = NO_BYTES, options: CallOptions = {}): Promise<void> {
    if (this.#failure !== undefined) throw this.#failure;
    try {
      await this.#connection.send(request, FLAG.VERSION, payload, options.fds);
    } catch (error) {
      // Reading knows better why: the peer's end or a time-out.
      if (error instanceof SvqError) this.fail(error);
      throw this.#failure ?? error;
    }
  }

  /**
   * Reads nothing more, so that another process can go on with the socket: resolves with it. Nothing may be asked until
   * {@linkcode release}.
   *
   * @throws SvqError ANSWER_DUE while an answer is due, and why the connection was lost
   */
  async hold(): Promise<number> {
    if (this.#failure !== undefined) throw this.#failure;
    if (this.#pending.length > 0) {
      throw new SvqError("ANSWER_DUE", "The other side still owes an answer: the connection cannot be handed over", {
        hint: "Try again",
      });
    }
    await this.#hold.hold();
    return this.#connection.fd;
  }

  /** Goes on after {@linkcode hold}. */
  release(): void {
    this.#hold.release();
  }

  /** Ends the connection because of `error`, as if the peer had caused it. Only the first failure counts. */
  fail(error: SvqError): void {
    if (this.#end(error)) this.#onLost?.(error);
  }

  #end(error: SvqError): boolean {
    if (this.#failure !== undefined) return false;
    this.#failure = error;
    this.#connection.close();
    this.#hold.release();
    for (const pending of this.#pending.splice(0)) {
      clearTimeout(pending.timer);
      pending.reject(
        error.code === "VHOST_USER_DISCONNECTED"
          ? new SvqError(error.code, `${pending.what}: the other side closed the connection`, {
            cause: error,
            hint: "It may have refused this message; its own log may say why",
          })
          : error,
      );
    }
    return true;
  }

  /** Closes the connection; what is pending rejects with CLOSED. */
  close(): void {
    this.#end(new SvqError("CLOSED", "The vhost-user connection was closed"));
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}
