/**
 * An AF_NETLINK socket to the kernel, for generic netlink. Requests are handled by the kernel while they are sent, so answers
 * can be read at once and nothing waits.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { OwnedFd, readFd, writeFd } from "./fd.ts";
import { libc, retrying } from "./libc.ts";

const AF_NETLINK = 16;
const SOCK_RAW = 3;
const SOCK_NONBLOCK = 0x800;
const SOCK_CLOEXEC = 0x80000;
const NETLINK_GENERIC = 16;
// struct sockaddr_nl: family u16, padding u16, port id u32, groups u32.
const ADDRESS_SIZE = 12;
// The kernel cuts its answers into pieces of at most this.
const RECEIVE_SIZE = 32768;

/** A socket to the kernel's generic netlink. */
export class NetlinkSocket implements Disposable {
  readonly #fd: OwnedFd;
  readonly #buffer = new Uint8Array(RECEIVE_SIZE);

  /** Opens a socket; needs no privileges. */
  constructor() {
    const type = SOCK_RAW | SOCK_NONBLOCK | SOCK_CLOEXEC;
    this.#fd = new OwnedFd(retrying(() => libc().socket(AF_NETLINK, type, NETLINK_GENERIC), "socket", "netlink"));
    const kernel = new Uint8Array(ADDRESS_SIZE);
    new DataView(kernel.buffer).setUint16(0, AF_NETLINK, true);
    retrying(() => libc().connect(this.#fd.fd, kernel, ADDRESS_SIZE), "connect", "netlink");
  }

  /** Sends one message, header included. */
  send(message: Uint8Array<ArrayBuffer>): void {
    if (writeFd(this.#fd.fd, message) === undefined) throw new SvqError("NETLINK", "The netlink socket is full");
  }

  /** Like {@linkcode send}, for requests that the kernel may take long for: it handles them on another thread. */
  async sendOnPool(message: Uint8Array<ArrayBuffer>): Promise<void> {
    const sent = await libc().write_on_pool(this.#fd.fd, message, BigInt(message.length));
    if (sent !== message.length) throw new SvqError("NETLINK", "The kernel did not take a message over netlink");
  }

  /** The next datagram, which may hold several messages. @throws SvqError NETLINK when there is none */
  receive(): Uint8Array<ArrayBuffer> {
    const size = readFd(this.#fd.fd, this.#buffer);
    if (size === undefined || size === 0) throw new SvqError("NETLINK", "The kernel did not answer over netlink");
    return this.#buffer.slice(0, size);
  }

  /** Closes the socket. */
  [Symbol.dispose](): void {
    this.#fd.close();
  }
}
