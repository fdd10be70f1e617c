/**
 * The back-end's request channel, at the front-end's end: the device asks here (BACKEND_REQ).
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import type { OwnedFd } from "../ffi/fd.ts";
import { unixPair, UnixStream } from "../ffi/unix_socket.ts";
import { encodeU64 } from "../uapi/vhost.ts";
import { BACKEND_REQUEST, FLAG } from "../uapi/vhost_user.ts";
import type { Doorbell } from "../vhost/backend.ts";
import { closeFds, type Message, type MessageHook, VhostUserConnection } from "./connection.ts";
import { Hold } from "./hold.ts";
import { decodeVringArea } from "./message.ts";

/** What the channel tells its owner. */
export interface BackEndChannelOptions {
  /** The device's configuration changed. */
  onConfigChange: () => void;
  /** A ring's doorbell can be mapped from a file, or (undefined) must not be used any more. @returns whether that was done */
  onDoorbell?: ((index: number, doorbell: Doorbell | undefined) => boolean) | undefined;
  /** The device broke the protocol here. The channel is closed. */
  onViolation: (error: SvqError) => void;
  /** Sees every message. */
  onMessage?: MessageHook | undefined;
}

/** Answers the device's requests: CONFIG_CHANGE_MSG and, where wanted, VRING_HOST_NOTIFIER_MSG are taken, all others are refused. */
export class BackEndChannel implements Disposable {
  /** The end for the device: to be sent to it and then closed; undefined where the device has it already. */
  readonly remote: UnixStream | undefined;
  readonly #hold = new Hold();
  readonly #ended = Promise.withResolvers<void>();
  readonly #connection: VhostUserConnection;
  readonly #options: BackEndChannelOptions;

  /** Makes the socket pair and starts to listen. @param handed this end of a pair whose other end the device has already */
  constructor(options: BackEndChannelOptions, handed?: OwnedFd) {
    const [local, remote] = handed === undefined ? unixPair() : [new UnixStream(handed), undefined];
    this.remote = remote;
    this.#options = options;
    this.#connection = new VhostUserConnection(local, { channel: "back-end", expect: "requests", onMessage: options.onMessage });
    this.#serve();
  }

  async #serve(): Promise<void> {
    try {
      for (;;) {
        const message = await this.#hold.wait(() => this.#connection.receive(), () => this.#connection.interrupt());
        if (message === undefined) break;
        let done = false;
        try {
          done = this.#obey(message);
        } finally {
          closeFds(message.fds);
        }
        if ((message.flags & FLAG.NEED_REPLY) !== 0) await this.#connection.reply(message.request, encodeU64(done ? 0n : 1n));
      }
    } catch (error) {
      if (error instanceof SvqError && error.code !== "CLOSED" && error.code !== "VHOST_USER_DISCONNECTED") {
        this.#options.onViolation(error);
      }
    } finally {
      this.close();
    }
  }

  // Shared objects and IOTLB misses were not negotiated: their descriptors are of no use.
  #obey({ request, payload, fds }: Message): boolean {
    if (request === BACKEND_REQUEST.CONFIG_CHANGE_MSG) {
      this.#options.onConfigChange();
      return true;
    }
    if (request !== BACKEND_REQUEST.VRING_HOST_NOTIFIER_MSG || this.#options.onDoorbell === undefined) return false;
    const { index, size, offset } = decodeVringArea(payload, fds.length);
    return this.#options.onDoorbell(index, fds[0] === undefined ? undefined : { fd: fds[0].fd, size, offset });
  }

  /** Reads nothing more: resolves with the socket, for another process; undefined where the device has closed it. */
  async hold(): Promise<number | undefined> {
    if (this.#connection.closed) return undefined;
    // The device may close it in the meantime.
    await Promise.race([this.#hold.hold(), this.#ended.promise]);
    return this.#connection.closed ? undefined : this.#connection.fd;
  }

  /** Goes on after {@linkcode hold}. */
  release(): void {
    this.#hold.release();
  }

  /** Closes both ends. */
  close(): void {
    this.remote?.close();
    this.#connection.close();
    this.#ended.resolve();
    this.#hold.release();
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}
