/**
 * What `svq bench ring --eventfds` puts around a relay core: the Worker's epoll, eventfds for kicks and calls, and the step that
 * a queue takes when it is woken and goes to sleep again. Beside it the same system calls with nothing between them.
 *
 * @module
 */
import { createEventfd, EPOLL, Epoll, type OwnedFd, signalEventfd } from "../ffi/mod.ts";
import type { RelayCore } from "../relay/core.ts";
import type { QueueStart } from "../relay/messages.ts";
import { QueueRunner } from "../relay/queue_runner.ts";

const KICK = 0;
const CALL = 1;

/** The four eventfds of a queue, and the epoll that watches two of them. */
export class Doorbells implements Disposable {
  readonly #stack = new DisposableStack();
  readonly #fds: readonly OwnedFd[];
  /** What watches the guest's kick and the device's call. */
  readonly epoll: Epoll;

  /** Opens them. */
  constructor() {
    using cleanup = new DisposableStack();
    this.epoll = cleanup.use(new Epoll());
    this.#fds = Array.from({ length: 4 }, () => cleanup.use(createEventfd()));
    const { kickFd, deviceCallFd } = this.fds;
    this.epoll.add(kickFd, EPOLL.IN | EPOLL.ET, KICK);
    this.epoll.add(deviceCallFd, EPOLL.IN | EPOLL.ET, CALL);
    this.#stack = cleanup.move();
  }

  /** Their numbers. */
  get fds(): Pick<QueueStart, "kickFd" | "callFd" | "deviceKickFd" | "deviceCallFd"> {
    const [kickFd, callFd, deviceKickFd, deviceCallFd] = this.#fds.map(({ fd }) => fd);
    return { kickFd: kickFd!, callFd: callFd!, deviceKickFd: deviceKickFd!, deviceCallFd: deviceCallFd! };
  }

  /** Closes them. */
  [Symbol.dispose](): void {
    this.#stack.dispose();
  }
}

/** A queue that is woken for each batch in each direction, as one that does not poll is. */
export class WokenQueue implements Disposable {
  readonly #runner: QueueRunner;
  readonly #epoll: Epoll;
  readonly #kickFd: number;
  readonly #callFd: number;

  /** @param start with the fds of `doorbells` */
  constructor(start: QueueStart, core: RelayCore, counters: Float64Array, doorbells: Doorbells) {
    this.#runner = new QueueRunner(start, core, counters);
    this.#epoll = doorbells.epoll;
    this.#kickFd = start.kickFd;
    this.#callFd = start.deviceCallFd;
    this.#runner.service();
  }

  /** The guest kicks. */
  kick(): void {
    signalEventfd(this.#kickFd);
  }

  /** The device calls. */
  call(): void {
    signalEventfd(this.#callFd);
  }

  /** Waits, moves what there is, and asks for notifications again. */
  step(): void {
    const count = this.#epoll.wait(-1);
    for (let i = 0; i < count; i++) {
      if (this.#epoll.token(i) === KICK) this.#runner.kicked();
      else this.#runner.called();
    }
    while (this.#runner.service());
  }

  /** Ends the core. */
  [Symbol.dispose](): void {
    this.#runner.close();
  }
}

/** The four system calls of a batch alone: wait, kick the device; wait, call the guest. */
export class BareSyscalls implements Disposable {
  readonly #doorbells = new Doorbells();
  readonly #fds = this.#doorbells.fds;

  /** @returns ms between the first and the last of them, without what the models' kick and call take */
  round(): number {
    const { epoll } = this.#doorbells;
    const { kickFd, callFd, deviceKickFd, deviceCallFd } = this.#fds;
    signalEventfd(kickFd);
    const t0 = performance.now();
    epoll.wait(-1);
    signalEventfd(deviceKickFd);
    const t1 = performance.now();
    signalEventfd(deviceCallFd);
    const t2 = performance.now();
    epoll.wait(-1);
    signalEventfd(callFd);
    const t3 = performance.now();
    return t1 - t0 + (t3 - t2);
  }

  /** Closes the descriptors. */
  [Symbol.dispose](): void {
    this.#doorbells[Symbol.dispose]();
  }
}
