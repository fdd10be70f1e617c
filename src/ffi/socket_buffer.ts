/**
 * Buffers of sockets.
 *
 * @module
 */
import { libc } from "./libc.ts";

const SOL_SOCKET = 1;
const SO_SNDBUF = 7;
const SO_DOMAIN = 39;
const AF_UNIX = 1;

/**
 * Has a unix socket hold about `bytes` that its peer has not read yet; the kernel may allow less (net.core.wmem_max). Other
 * sockets are left alone: TCP sizes its buffers by itself, until somebody sets them.
 */
export function widenSendBuffer(fd: number, bytes: number): void {
  const domain = new Int32Array(1);
  if (libc().getsockopt(fd, SOL_SOCKET, SO_DOMAIN, domain, new Uint32Array([4])) < 0 || domain[0] !== AF_UNIX) return;
  // What the kernel refuses is a slower stream, and nothing else.
  libc().setsockopt(fd, SOL_SOCKET, SO_SNDBUF, new Uint8Array(new Int32Array([bytes]).buffer), 4);
}
