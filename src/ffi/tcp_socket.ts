/**
 * TCP stream sockets behind the same classes as unix sockets ({@linkcode UnixStream}, {@linkcode UnixListener}), so that pages
 * can be written straight from guest memory.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { ERRNO, SysError } from "./errno.ts";
import { OwnedFd } from "./fd.ts";
import { bufferAt, cString, errno, libc, pointer, retrying } from "./libc.ts";
import { cancelWaits, writable } from "./reactor.ts";
import { UnixListener, UnixStream } from "./unix_socket.ts";

const AF_INET = 2;
const AF_INET6 = 10;
const SOCK_STREAM = 1;
const SOCK_CLOEXEC = 0x80000;
const SOCK_NONBLOCK = 0x800;
const SOL_SOCKET = 1;
const SO_REUSEADDR = 2;
const SO_ERROR = 4;
const IPPROTO_TCP = 6;
const TCP_NODELAY = 1;
const AI_PASSIVE = 1;
const ADDRINFO_BYTES = 48;

/** An address that a name stands for. */
export interface TcpAddress {
  /** AF_INET or AF_INET6. */
  family: number;
  /** struct sockaddr_in or sockaddr_in6. */
  sockaddr: Uint8Array<ArrayBuffer>;
  /** It is of this host only: 127.0.0.0/8 or ::1. */
  loopback: boolean;
}

function isLoopback(family: number, sockaddr: Uint8Array): boolean {
  if (family === AF_INET) return sockaddr[4] === 127;
  return sockaddr.subarray(8, 23).every((byte) => byte === 0) && sockaddr[23] === 1;
}

/**
 * What a host name and a port stand for (getaddrinfo(3)).
 *
 * @param host a name or a literal address; empty: all addresses of this host, to listen on
 * @throws SvqError NO_SUCH_HOST (exit code 3)
 */
export async function resolveTcp(host: string, port: number): Promise<TcpAddress[]> {
  const hints = new Uint8Array(ADDRINFO_BYTES);
  const view = new DataView(hints.buffer);
  view.setInt32(0, host === "" ? AI_PASSIVE : 0, true);
  view.setInt32(8, SOCK_STREAM, true);
  const result = new BigUint64Array(1);
  const out = new Uint8Array(result.buffer);
  // Held until the call is over: it runs on another thread.
  const texts = [host === "" ? null : cString(host), cString(String(port))] as const;
  const code = await libc().getaddrinfo(texts[0], texts[1], hints, out);
  if (code !== 0 || texts.length + hints.length + out.length === 0) {
    throw new SvqError("NO_SUCH_HOST", `${host}: no such host`, {
      exitCode: EXIT.noDevice,
      hint: "write an address like 192.0.2.7 or [2001:db8::7], or a name that this host can resolve",
    });
  }
  const addresses: TcpAddress[] = [];
  for (let at = Number(result[0]); at !== 0;) {
    const entry = new DataView(bufferAt(at, ADDRINFO_BYTES));
    const family = entry.getInt32(4, true);
    if (family === AF_INET || family === AF_INET6) {
      const length = entry.getUint32(16, true);
      const sockaddr = new Uint8Array(bufferAt(Number(entry.getBigUint64(24, true)), length)).slice();
      addresses.push({ family, sockaddr, loopback: isLoopback(family, sockaddr) });
    }
    at = Number(entry.getBigUint64(40, true));
  }
  libc().freeaddrinfo(pointer(Number(result[0])));
  return addresses;
}

function newSocket(family: number): OwnedFd {
  const fd = new OwnedFd(retrying(() => libc().socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), "socket"));
  setOption(fd.fd, IPPROTO_TCP, TCP_NODELAY);
  return fd;
}

function setOption(fd: number, level: number, name: number): void {
  retrying(() => libc().setsockopt(fd, level, name, new Uint8Array(new Int32Array([1]).buffer), 4), "setsockopt");
}

/**
 * Connects to one address.
 *
 * @param what for messages
 * @throws SysError ECONNREFUSED (exit code 3), ETIMEDOUT after `timeoutMs`
 */
export async function connectTcp(address: TcpAddress, what: string, timeoutMs: number): Promise<UnixStream> {
  const fd = newSocket(address.family);
  try {
    if (libc().connect(fd.fd, address.sockaddr, address.sockaddr.length) < 0) {
      const number = errno();
      if (number !== ERRNO.EINPROGRESS && number !== ERRNO.EINTR) throw new SysError("connect", number, what);
      await connected(fd.fd, what, timeoutMs);
    }
    return new UnixStream(fd);
  } catch (error) {
    cancelWaits(fd.fd);
    fd.close();
    throw error;
  }
}

async function connected(fd: number, what: string, timeoutMs: number): Promise<void> {
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    cancelWaits(fd);
  }, timeoutMs);
  try {
    await writable(fd);
  } catch (error) {
    throw late ? new SysError("connect", ERRNO.ETIMEDOUT, what) : error;
  } finally {
    clearTimeout(timer);
  }
  const value = new Int32Array(1);
  retrying(() => libc().getsockopt(fd, SOL_SOCKET, SO_ERROR, value, new Uint32Array([4])), "getsockopt", "SO_ERROR");
  if (value[0] !== 0) throw new SysError("connect", value[0]!, what);
}

/** Listens on one address. @throws SysError EADDRINUSE */
export function listenTcp(address: TcpAddress, what: string): UnixListener {
  const fd = newSocket(address.family);
  try {
    setOption(fd.fd, SOL_SOCKET, SO_REUSEADDR);
    retrying(() => libc().bind(fd.fd, address.sockaddr, address.sockaddr.length), "bind", what);
    retrying(() => libc().listen(fd.fd, 16), "listen", what);
    return new UnixListener(fd);
  } catch (error) {
    fd.close();
    throw error;
  }
}

/** The port that a TCP socket is bound to. */
export function boundPort(fd: number): number {
  const address = new Uint8Array(28);
  retrying(() => libc().getsockname(fd, address, new Uint32Array([address.length])), "getsockname");
  return address[2]! * 256 + address[3]!;
}
