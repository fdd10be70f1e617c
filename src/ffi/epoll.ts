/**
 * epoll(7) for the data path: a Worker that blocks in {@linkcode Epoll.wait}. Control paths use the reactor instead.
 *
 * @module
 */
import { ERRNO, SysError } from "./errno.ts";
import { OwnedFd } from "./fd.ts";
import { errno, libc, retrying } from "./libc.ts";

const EPOLL_CLOEXEC = 0x80000;
const EPOLL_CTL_ADD = 1;
const EPOLL_CTL_DEL = 2;
const EPOLL_CTL_MOD = 3;
// struct epoll_event is packed on x86-64 only.
const EVENT_SIZE = Deno.build.arch === "x86_64" ? 12 : 16;
const DATA_OFFSET = Deno.build.arch === "x86_64" ? 4 : 8;

/** Event bits of epoll_ctl(2). */
export const EPOLL = { IN: 1, OUT: 4, ERR: 8, HUP: 0x10, RDHUP: 0x2000, ONESHOT: 1 << 30, ET: 1 << 31 } as const;

/**
 * An epoll instance. A registration carries a token (0 to 2^31 - 1), which {@linkcode token} gives back.
 *
 * With EPOLL.ET an eventfd needs no read: each write to it is an edge of its own.
 */
export class Epoll implements Disposable {
  readonly #fd: OwnedFd;
  readonly #events: Uint8Array<ArrayBuffer>;
  readonly #view: DataView;
  readonly #record = new Uint8Array(16);
  readonly #recordView = new DataView(this.#record.buffer);

  /** Opens an epoll instance. @param maxEvents most events that one wait returns */
  constructor(readonly maxEvents = 128) {
    this.#fd = new OwnedFd(retrying(() => libc().epoll_create1(EPOLL_CLOEXEC), "epoll_create1"));
    this.#events = new Uint8Array(maxEvents * EVENT_SIZE);
    this.#view = new DataView(this.#events.buffer);
  }

  /** The epoll descriptor. @throws SvqError EBADF after close */
  get fd(): number {
    return this.#fd.fd;
  }

  #control(op: number, fd: number, events: number, token: number): number {
    this.#recordView.setUint32(0, events >>> 0, true);
    this.#recordView.setUint32(DATA_OFFSET, token, true);
    return libc().epoll_ctl(this.#fd.fd, op, fd, this.#record);
  }

  /** @throws SysError EEXIST where `fd` is registered already */
  /** Starts watching `fd` for `events` (bits of EPOLL); `token` names it in the results. */
  add(fd: number, events: number, token: number): void {
    retrying(() => this.#control(EPOLL_CTL_ADD, fd, events, token), "epoll_ctl", `fd ${fd}`);
  }

  /** Changes what a watched `fd` is watched for. */
  modify(fd: number, events: number, token: number): void {
    retrying(() => this.#control(EPOLL_CTL_MOD, fd, events, token), "epoll_ctl", `fd ${fd}`);
  }

  /** Adds, or changes a registration that is there. */
  set(fd: number, events: number, token: number): void {
    if (this.#control(EPOLL_CTL_MOD, fd, events, token) >= 0) return;
    if (errno() !== ERRNO.ENOENT) throw new SysError("epoll_ctl", errno(), `fd ${fd}`);
    this.add(fd, events, token);
  }

  /** Forgets `fd`; harmless where it is closed or was not registered. */
  delete(fd: number): void {
    this.#control(EPOLL_CTL_DEL, fd, 0, 0);
  }

  /**
   * Blocks the thread until something is ready. An interruption by a signal counts as nothing ready.
   *
   * @param timeoutMs -1 for ever, 0 not at all
   * @returns how many events {@linkcode token} and {@linkcode events} hold
   */
  wait(timeoutMs: number): number {
    const count = libc().epoll_wait(this.#fd.fd, this.#events, this.maxEvents, timeoutMs);
    if (count >= 0) return count;
    const number = errno();
    if (number === ERRNO.EINTR) return 0;
    throw new SysError("epoll_wait", number);
  }

  /** Waits on a thread of Deno's pool: for the reactor. */
  async waitOnPool(): Promise<number> {
    // errno of the pool's thread is lost; the only failure of a valid call is EINTR.
    return Math.max(0, await libc().epoll_wait_on_pool(this.#fd.fd, this.#events, this.maxEvents, -1));
  }

  /** The token of event `index` of the last wait. */
  token(index: number): number {
    return this.#view.getUint32(index * EVENT_SIZE + DATA_OFFSET, true);
  }

  /** The event bits of event `index` of the last wait. */
  events(index: number): number {
    return this.#view.getUint32(index * EVENT_SIZE, true);
  }

  /** Closes the epoll descriptor; harmless when repeated. */
  close(): void {
    this.#fd.close();
  }

  /** Same as `close`. */
  [Symbol.dispose](): void {
    this.close();
  }
}
