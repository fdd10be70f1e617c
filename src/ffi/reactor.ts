/**
 * Promises for readiness: `await readable(fd)`. One epoll instance per thread, waited for on one thread of Deno's pool
 * and only while somebody waits, so an idle program can end. For control paths (sockets, migration, notifications of
 * low rate); the data path blocks in its own {@linkcode Epoll}.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { EPOLL, Epoll } from "./epoll.ts";
import { createEventfd, drainEventfd, signalEventfd } from "./eventfd.ts";
import type { OwnedFd } from "./fd.ts";
import { libc } from "./libc.ts";

interface Waiter {
  events: number;
  resolve: () => void;
  reject: (error: unknown) => void;
}

/** Raised at those who wait for an fd that its owner closes. */
export class ReactorCancelled extends SvqError {
  constructor() {
    super("CLOSED", "Closed while waiting for it");
  }
}

class Reactor {
  readonly #epoll = new Epoll(256);
  readonly #wake: OwnedFd = createEventfd();
  readonly #waiters = new Map<number, Waiter[]>();
  #running = false;

  constructor() {
    this.#epoll.add(this.#wake.fd, EPOLL.IN, this.#wake.fd);
  }

  wait(fd: number, events: number): Promise<void> {
    return new Promise((resolve, reject) => {
      const waiters = this.#waiters.get(fd) ?? [];
      waiters.push({ events, resolve, reject });
      try {
        this.#arm(fd, waiters);
      } catch (error) {
        waiters.pop();
        reject(error);
        return;
      }
      this.#waiters.set(fd, waiters);
      if (!this.#running) this.#run();
    });
  }

  cancel(fd: number): void {
    const waiters = this.#waiters.get(fd);
    this.#epoll.delete(fd);
    if (waiters === undefined) return;
    this.#waiters.delete(fd);
    for (const waiter of waiters) waiter.reject(new ReactorCancelled());
    if (this.#waiters.size === 0) signalEventfd(this.#wake.fd);
  }

  #arm(fd: number, waiters: Waiter[]): void {
    let events = EPOLL.ONESHOT as number;
    for (const waiter of waiters) events |= waiter.events;
    this.#epoll.set(fd, events, fd);
  }

  async #run(): Promise<void> {
    this.#running = true;
    try {
      while (this.#waiters.size > 0) {
        const count = await this.#epoll.waitOnPool();
        for (let i = 0; i < count; i++) this.#dispatch(this.#epoll.token(i), this.#epoll.events(i));
        // What was woken runs, and may wait again, before the loop decides to end.
        await Promise.resolve();
      }
    } catch (error) {
      // Nobody awaits the loop itself: whoever waits in it hears of it.
      const waiters = [...this.#waiters.values()].flat();
      this.#waiters.clear();
      for (const waiter of waiters) waiter.reject(error);
    }
    this.#running = false;
  }

  #dispatch(fd: number, events: number): void {
    if (fd === this.#wake.fd) {
      drainEventfd(fd);
      return;
    }
    const waiters = this.#waiters.get(fd);
    if (waiters === undefined) return;
    const failed = (events & (EPOLL.ERR | EPOLL.HUP)) !== 0;
    const rest = waiters.filter((waiter) => !failed && (waiter.events & events) === 0);
    if (rest.length > 0) {
      this.#waiters.set(fd, rest);
      this.#arm(fd, rest);
    } else {
      this.#waiters.delete(fd);
    }
    for (const waiter of waiters) if (!rest.includes(waiter)) waiter.resolve();
  }
}

const [POLLIN, POLLOUT] = [1, 4];

let reactor: Reactor | undefined;

/** Resolves when `fd` can be read, is closed by its peer or has failed. @throws SvqError CLOSED after {@linkcode cancelWaits} */
export function readable(fd: number): Promise<void> {
  reactor ??= new Reactor();
  return reactor.wait(fd, EPOLL.IN | EPOLL.RDHUP);
}

/** Resolves when `fd` can be written or has failed. */
export function writable(fd: number): Promise<void> {
  reactor ??= new Reactor();
  return reactor.wait(fd, EPOLL.OUT);
}

/**
 * Blocks this thread until `fd` can be written or has failed, at most `ms` milliseconds: for a few of them less than the event
 * loop takes.
 *
 * @returns false when the time is over
 */
export function writableWithin(fd: number, ms: number): boolean {
  return within(fd, POLLOUT, ms);
}

/** The same for reading. @returns false when the time is over */
export function readableWithin(fd: number, ms: number): boolean {
  return within(fd, POLLIN, ms);
}

function within(fd: number, events: number, ms: number): boolean {
  const record = new Int32Array([fd, events]);
  return libc().poll(new Uint8Array(record.buffer), 1n, ms) > 0;
}

/** To be called before an fd that somebody may wait for is closed. */
export function cancelWaits(fd: number): void {
  reactor?.cancel(fd);
}
