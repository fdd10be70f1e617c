/**
 * The back-end's request channel, at the front-end's end: the device asks here (BACKEND_REQ).
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { unixPair, type UnixStream } from "../ffi/unix_socket.ts";
import { encodeU64 } from "../uapi/vhost.ts";
import { BACKEND_REQUEST, FLAG } from "../uapi/vhost_user.ts";
import { closeFds, type MessageHook, VhostUserConnection } from "./connection.ts";

/** What the channel tells its owner. */
export interface BackEndChannelOptions {
  /** The device's configuration changed. */
  onConfigChange: () => void;
  /** The device broke the protocol here. The channel is closed. */
  onViolation: (error: SvqError) => void;
  /** Sees every message. */
  onMessage?: MessageHook | undefined;
}

/** Answers the device's requests: CONFIG_CHANGE_MSG is taken, all others are refused. */
export class BackEndChannel implements Disposable {
  /** The end for the device: to be sent to it and then closed. */
  readonly remote: UnixStream;
  readonly #connection: VhostUserConnection;
  readonly #options: BackEndChannelOptions;

  /** Makes the socket pair and starts to listen. */
  constructor(options: BackEndChannelOptions) {
    const [local, remote] = unixPair();
    this.remote = remote;
    this.#options = options;
    this.#connection = new VhostUserConnection(local, { channel: "back-end", expect: "requests", onMessage: options.onMessage });
    this.#serve();
  }

  async #serve(): Promise<void> {
    try {
      for (;;) {
        const message = await this.#connection.receive();
        if (message === undefined) break;
        // Host notifiers, shared objects and IOTLB misses were not negotiated: their descriptors are of no use.
        closeFds(message.fds);
        const known = message.request === BACKEND_REQUEST.CONFIG_CHANGE_MSG;
        if (known) this.#options.onConfigChange();
        if ((message.flags & FLAG.NEED_REPLY) !== 0) await this.#connection.reply(message.request, encodeU64(known ? 0n : 1n));
      }
    } catch (error) {
      if (error instanceof SvqError && error.code !== "CLOSED" && error.code !== "VHOST_USER_DISCONNECTED") {
        this.#options.onViolation(error);
      }
    } finally {
      this.close();
    }
  }

  /** Closes both ends. */
  close(): void {
    this.remote.close();
    this.#connection.close();
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}
