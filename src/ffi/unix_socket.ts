/**
 * Unix stream sockets that pass file descriptors. All descriptors are nonblocking; the async methods wait in the reactor.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { ERRNO, SysError } from "./errno.ts";
import { OwnedFd, setNonblocking } from "./fd.ts";
import { addressOf, errno, libc, retrying } from "./libc.ts";
import { cancelWaits, readable, writable } from "./reactor.ts";

const AF_UNIX = 1;
const SOCK_STREAM = 1;
const SOCK_SEQPACKET = 5;
const SOCK_CLOEXEC = 0x80000;
const SOCK_NONBLOCK = 0x800;
const SOL_SOCKET = 1;
const SCM_RIGHTS = 1;
const SO_PEERCRED = 17;
const SO_ACCEPTCONN = 30;
const MSG_NOSIGNAL = 0x4000;
const MSG_CMSG_CLOEXEC = 0x40000000;
const MSG_CTRUNC = 8;
const SUN_PATH_SIZE = 108;
const CMSG_HEADER = 16;

/** How many descriptors one message may carry here; Linux's own limit is 253. */
export const MAX_FDS = 253;

/** The `sockaddr_un` of a path, or of an abstract name that begins with `@`. @throws SvqError BAD_SOCKET_PATH */
export function unixAddress(path: string): Uint8Array<ArrayBuffer> {
  const name = new TextEncoder().encode(path);
  if (name.length === 0 || name.length >= SUN_PATH_SIZE) {
    throw new SvqError("BAD_SOCKET_PATH", `Socket path is ${name.length} bytes long: ${path}`, {
      exitCode: EXIT.usage,
      hint: `A unix socket's path has 1 to ${SUN_PATH_SIZE - 1} bytes`,
    });
  }
  const address = new Uint8Array(2 + name.length + 1);
  new DataView(address.buffer).setUint16(0, AF_UNIX, true);
  // '@' names the abstract namespace, as in systemd and socat.
  address.set(name, 2);
  if (path.startsWith("@")) {
    address[2] = 0;
    return address.subarray(0, 2 + name.length);
  }
  return address;
}

// msghdr (56 bytes), one iovec and the control buffer, kept together so that one object holds them alive.
class Message {
  readonly header: Uint8Array<ArrayBuffer> = new Uint8Array(56);
  readonly #view = new DataView(this.header.buffer);
  readonly #iov = new BigUint64Array(2);
  readonly control: Uint8Array<ArrayBuffer>;
  readonly controlView: DataView;

  constructor(controlSize: number) {
    this.control = new Uint8Array(controlSize);
    this.controlView = new DataView(this.control.buffer);
    this.#view.setBigUint64(16, BigInt(addressOf(new Uint8Array(this.#iov.buffer))), true);
    this.#view.setBigUint64(24, 1n, true);
    if (controlSize > 0) this.#view.setBigUint64(32, BigInt(addressOf(this.control)), true);
  }

  prepare(bytes: Uint8Array<ArrayBuffer>, controlLength: number): void {
    this.#iov[0] = BigInt(addressOf(bytes));
    this.#iov[1] = BigInt(bytes.length);
    if (controlLength === 0) this.#view.setBigUint64(32, 0n, true);
    else this.#view.setBigUint64(32, BigInt(addressOf(this.control)), true);
    this.#view.setBigUint64(40, BigInt(controlLength), true);
    this.#view.setInt32(48, 0, true);
  }

  get controlLength(): number {
    return Number(this.#view.getBigUint64(40, true));
  }

  get flags(): number {
    return this.#view.getInt32(48, true);
  }
}

function controlSpace(fds: number): number {
  return CMSG_HEADER + Math.ceil(fds * 4 / 8) * 8;
}

/** What {@linkcode UnixStream.tryReceive} returns: how many bytes came, and the descriptors that came with them. */
export interface Received {
  /** Bytes received; 0 at the end of the stream. */
  bytes: number;
  /** Descriptors received; the caller owns them. */
  fds: OwnedFd[];
}

/** The process at the other end, as of connect(2). */
export interface PeerCredentials {
  /** Process id. */
  pid: number;
  /** Effective user id. */
  uid: number;
  /** Effective group id. */
  gid: number;
}

/** One end of a connected unix stream socket. */
export class UnixStream implements Disposable {
  readonly #fd: OwnedFd;
  readonly #incoming = new Message(controlSpace(MAX_FDS));

  /** Takes ownership of `fd`, a connected stream socket. */
  constructor(fd: OwnedFd) {
    this.#fd = fd;
    setNonblocking(fd.fd, true);
  }

  /** The descriptor's number. @throws SvqError EBADF after close */
  get fd(): number {
    return this.#fd.fd;
  }

  /** Closed already. */
  get closed(): boolean {
    return this.#fd.closed;
  }

  /** Bytes that are there, with descriptors sent along; `undefined` when there is nothing; `bytes: 0` at the end. */
  tryReceive(into: Uint8Array<ArrayBuffer>): Received | undefined {
    const message = this.#incoming;
    for (;;) {
      message.prepare(into, message.control.length);
      const bytes = libc().recvmsg(this.#fd.fd, message.header, MSG_CMSG_CLOEXEC);
      if (bytes >= 0) return { bytes, fds: this.#takeFds() };
      const number = errno();
      if (number === ERRNO.EAGAIN) return undefined;
      if (number === ERRNO.ECONNRESET) return { bytes: 0, fds: [] };
      if (number !== ERRNO.EINTR) throw new SysError("recvmsg", number);
    }
  }

  #takeFds(): OwnedFd[] {
    const { controlView: view, controlLength } = this.#incoming;
    const fds: OwnedFd[] = [];
    for (let at = 0; at + CMSG_HEADER <= controlLength;) {
      const length = Number(view.getBigUint64(at, true));
      if (length < CMSG_HEADER) break;
      if (view.getInt32(at + 8, true) === SOL_SOCKET && view.getInt32(at + 12, true) === SCM_RIGHTS) {
        for (let i = at + CMSG_HEADER; i + 4 <= at + length; i += 4) fds.push(new OwnedFd(view.getInt32(i, true)));
      }
      at += Math.ceil(length / 8) * 8;
    }
    if ((this.#incoming.flags & MSG_CTRUNC) !== 0) {
      for (const fd of fds) fd.close();
      throw new SvqError("TOO_MANY_FDS", `A message carried more than ${MAX_FDS} file descriptors, or this process has no room for them`);
    }
    return fds;
  }

  /** Waits for at least one byte or the end. */
  async receive(into: Uint8Array<ArrayBuffer>): Promise<Received> {
    for (;;) {
      const received = this.tryReceive(into);
      if (received !== undefined) return received;
      await readable(this.#fd.fd);
    }
  }

  /** Sends what fits, once; `undefined` when nothing fits now. Descriptors ride with the first byte. */
  trySend(bytes: Uint8Array<ArrayBuffer>, fds: readonly number[] = []): number | undefined {
    const message = new Message(fds.length === 0 ? 0 : controlSpace(fds.length));
    if (fds.length > 0) {
      message.controlView.setBigUint64(0, BigInt(CMSG_HEADER + 4 * fds.length), true);
      message.controlView.setInt32(8, SOL_SOCKET, true);
      message.controlView.setInt32(12, SCM_RIGHTS, true);
      fds.forEach((fd, i) => message.controlView.setInt32(CMSG_HEADER + 4 * i, fd, true));
    }
    for (;;) {
      message.prepare(bytes, message.control.length);
      const sent = libc().sendmsg(this.#fd.fd, message.header, MSG_NOSIGNAL);
      if (sent >= 0) return sent;
      const number = errno();
      if (number === ERRNO.EAGAIN) return undefined;
      if (number !== ERRNO.EINTR) throw new SysError("sendmsg", number);
    }
  }

  /** Sends all of `bytes`. Concurrent calls must be serialised by the caller. */
  async send(bytes: Uint8Array<ArrayBuffer>, fds: readonly number[] = []): Promise<void> {
    let pending = fds;
    for (let rest = bytes; rest.length > 0;) {
      const sent = this.trySend(rest, pending);
      if (sent === undefined) {
        await writable(this.#fd.fd);
        continue;
      }
      pending = [];
      rest = rest.subarray(sent);
    }
  }

  /** Ends the waits of {@linkcode receive} and {@linkcode send}: they reject with ReactorCancelled, and nothing was taken. */
  interrupt(): void {
    if (!this.#fd.closed) cancelWaits(this.#fd.fd);
  }

  /** Who is at the other end (SO_PEERCRED). */
  peerCredentials(): PeerCredentials {
    const record = new Int32Array(3);
    const length = new Uint32Array([12]);
    retrying(() => libc().getsockopt(this.#fd.fd, SOL_SOCKET, SO_PEERCRED, record, length), "getsockopt", "SO_PEERCRED");
    return { pid: record[0]!, uid: record[1]!, gid: record[2]! };
  }

  /** Ends both directions; the peer reads the end. */
  shutdown(): void {
    if (!this.#fd.closed) libc().shutdown(this.#fd.fd, 2);
  }

  /** Ends the sending direction; the peer reads the end after what was sent. */
  shutdownWriting(): void {
    if (!this.#fd.closed) libc().shutdown(this.#fd.fd, 1);
  }

  /** Closes the socket and cancels waits for it; harmless when repeated. */
  close(): void {
    if (this.#fd.closed) return;
    cancelWaits(this.#fd.fd);
    this.#fd.close();
  }

  /** Same as `close`. */
  [Symbol.dispose](): void {
    this.close();
  }
}

function newSocket(): OwnedFd {
  return new OwnedFd(retrying(() => libc().socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), "socket"));
}

/** Connects to a listening socket. @throws SysError ENOENT or ECONNREFUSED (exit code 3), with the path */
export function connectUnix(path: string): UnixStream {
  const address = unixAddress(path);
  const fd = newSocket();
  try {
    retrying(() => libc().connect(fd.fd, address, address.length), "connect", path);
    return new UnixStream(fd);
  } catch (error) {
    fd.close();
    throw error;
  }
}

/** Two connected ends. */
export function unixPair(): [UnixStream, UnixStream] {
  const pair = new Int32Array(2);
  retrying(() => libc().socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair), "socketpair");
  return [new UnixStream(new OwnedFd(pair[0]!)), new UnixStream(new OwnedFd(pair[1]!))];
}

/** Two connected nonblocking ends that keep messages apart and in order; who writes too much has to wait. */
export function packetPair(): [OwnedFd, OwnedFd] {
  const pair = new Int32Array(2);
  retrying(() => libc().socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair), "socketpair");
  return [new OwnedFd(pair[0]!), new OwnedFd(pair[1]!)];
}

/** A listening unix socket; it removes its path when closed. */
export class UnixListener implements Disposable {
  readonly #fd: OwnedFd;
  /** The path it is bound to, where it owns one. */
  readonly path: string | undefined;
  #keepsPath = false;

  /** Takes ownership of a listening socket. @param path removed at close where given */
  constructor(fd: OwnedFd, path?: string) {
    this.#fd = fd;
    this.path = path;
    setNonblocking(fd.fd, true);
  }

  /** The descriptor's number. @throws SvqError EBADF after close */
  get fd(): number {
    return this.#fd.fd;
  }

  /** Closed already. */
  get closed(): boolean {
    return this.#fd.closed;
  }

  /** A waiting connection, or `undefined` when there is none. */
  tryAccept(): UnixStream | undefined {
    for (;;) {
      const fd = libc().accept4(this.#fd.fd, null, null, SOCK_CLOEXEC | SOCK_NONBLOCK);
      if (fd >= 0) return new UnixStream(new OwnedFd(fd));
      const number = errno();
      if (number === ERRNO.EAGAIN) return undefined;
      if (number !== ERRNO.EINTR) throw new SysError("accept4", number, this.path);
    }
  }

  /** The next connection. @throws SvqError CLOSED when the listener is closed meanwhile */
  async accept(): Promise<UnixStream> {
    for (;;) {
      const stream = this.tryAccept();
      if (stream !== undefined) return stream;
      await readable(this.#fd.fd);
    }
  }

  /** Ends the waits of {@linkcode accept}: they reject with ReactorCancelled, and nothing was taken. */
  interrupt(): void {
    if (!this.#fd.closed) cancelWaits(this.#fd.fd);
  }

  /** Another process listens on this socket, too: closing it here leaves its path. */
  keepPath(): void {
    this.#keepsPath = true;
  }

  /** Stops listening and removes the path; harmless when repeated. */
  close(): void {
    if (this.#fd.closed) return;
    cancelWaits(this.#fd.fd);
    this.#fd.close();
    if (this.path !== undefined && !this.#keepsPath && !this.path.startsWith("@")) {
      try {
        Deno.removeSync(this.path);
      } catch { /* gone already */ }
    }
  }

  /** Same as `close`. */
  [Symbol.dispose](): void {
    this.close();
  }
}

/** Does this socket listen (SO_ACCEPTCONN), or is it a connection? @throws SysError ENOTSOCK where it is no socket */
export function isListening(fd: number): boolean {
  const value = new Int32Array(1);
  retrying(() => libc().getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, value, new Uint32Array([4])), "getsockopt", `file descriptor ${fd}`);
  return value[0] !== 0;
}

function isLive(path: string): boolean {
  try {
    connectUnix(path).close();
    return true;
  } catch {
    return false;
  }
}

/**
 * Listens on `path`. A socket file that nobody listens on any more is replaced; any other file is left alone.
 *
 * @throws SysError EADDRINUSE where somebody listens, or where the path is no socket
 */
export function listenUnix(path: string, options: { mode?: number; backlog?: number } = {}): UnixListener {
  const address = unixAddress(path);
  const fd = newSocket();
  try {
    const abstract = path.startsWith("@");
    if (libc().bind(fd.fd, address, address.length) < 0) {
      const number = errno();
      let stale = false;
      if (number === ERRNO.EADDRINUSE && !abstract) {
        const info = Deno.lstatSync(path);
        stale = info.isSocket === true && !isLive(path);
      }
      if (!stale) {
        throw new SysError(
          "bind",
          number,
          path,
          number === ERRNO.EADDRINUSE ? "Another program listens there; choose another path" : undefined,
        );
      }
      Deno.removeSync(path);
      retrying(() => libc().bind(fd.fd, address, address.length), "bind", path);
    }
    if (!abstract && options.mode !== undefined) Deno.chmodSync(path, options.mode);
    retrying(() => libc().listen(fd.fd, options.backlog ?? 16), "listen", path);
    return new UnixListener(fd, path);
  } catch (error) {
    fd.close();
    throw error;
  }
}
