/**
 * Single messages to a unix datagram socket.
 *
 * @module
 */
import { OwnedFd } from "./fd.ts";
import { libc, retrying } from "./libc.ts";
import { unixAddress } from "./unix_socket.ts";

const AF_UNIX = 1;
const SOCK_DGRAM = 2;
const SOCK_CLOEXEC = 0x80000;

/**
 * Sends one message to the socket at `path` (`@` for an abstract name).
 *
 * @throws SysError where nobody receives there
 */
export function sendDatagram(path: string, message: Uint8Array<ArrayBuffer>): void {
  const address = unixAddress(path);
  using socket = new OwnedFd(retrying(() => libc().socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket"));
  retrying(() => libc().connect(socket.fd, address, address.length), "connect", path);
  retrying(() => libc().write(socket.fd, message, BigInt(message.length)), "write", path);
}
