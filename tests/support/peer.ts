/**
 * One end of a vhost-user conversation written by hand: sends bytes as told, right or wrong, and reads whole messages.
 *
 * @module
 */
import { unixPair, type UnixStream } from "../../src/ffi/unix_socket.ts";
import { encodeU64 } from "../../src/uapi/vhost.ts";
import { FLAG, HEADER_SIZE } from "../../src/uapi/vhost_user.ts";
import { decodeHeader, encodeMessage } from "../../src/vhost_user/message.ts";
import { closeFds } from "../../src/vhost_user/connection.ts";

/** A message as the peer saw it, its descriptors closed. */
export interface SeenMessage {
  request: number;
  flags: number;
  payload: Uint8Array<ArrayBuffer>;
  fdCount: number;
}

/** Speaks vhost-user without any check. */
export class RawPeer implements Disposable {
  constructor(readonly stream: UnixStream) {}

  /** Sends one message. */
  send(request: number, payload: Uint8Array<ArrayBuffer> = new Uint8Array(0), fds: readonly number[] = [], flags = FLAG.VERSION as number) {
    return this.stream.send(encodeMessage(request, flags, payload), fds);
  }

  /** Sends one message and reads what comes back. */
  async ask(request: number, payload?: Uint8Array<ArrayBuffer>, fds?: readonly number[], flags?: number): Promise<SeenMessage> {
    await this.send(request, payload, fds, flags);
    return await this.read();
  }

  reply(request: number, payload: Uint8Array<ArrayBuffer> | bigint): Promise<void> {
    return this.send(request, typeof payload === "bigint" ? encodeU64(payload) : payload, [], FLAG.VERSION | FLAG.REPLY);
  }

  /** The next message. @throws Error at the end of the connection */
  async read(): Promise<SeenMessage> {
    const message = await this.tryRead();
    if (message === undefined) throw new Error("The connection ended");
    return message;
  }

  /** The next message; nothing at the end. */
  async tryRead(): Promise<SeenMessage | undefined> {
    const header = new Uint8Array(HEADER_SIZE);
    const fdCount = await this.#fill(header);
    if (fdCount === undefined) return undefined;
    const { request, flags, size } = decodeHeader(header);
    const payload = new Uint8Array(size);
    if (await this.#fill(payload) === undefined) return undefined;
    return { request, flags, payload, fdCount };
  }

  async #fill(bytes: Uint8Array<ArrayBuffer>): Promise<number | undefined> {
    let fdCount = 0;
    for (let at = 0; at < bytes.length;) {
      const received = await this.stream.receive(bytes.subarray(at));
      fdCount += received.fds.length;
      closeFds(received.fds);
      if (received.bytes === 0) return undefined;
      at += received.bytes;
    }
    return fdCount;
  }

  [Symbol.dispose](): void {
    this.stream.close();
  }
}

/** A raw peer and the stream for what is tested. */
export function rawPair(): [RawPeer, UnixStream] {
  const [a, b] = unixPair();
  return [new RawPeer(a), b];
}
