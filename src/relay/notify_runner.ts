/**
 * Mode `notify`: the device works on the guest's own ring, and only kicks and calls go through the Worker, which counts them.
 *
 * @module
 */
import { signalEventfd } from "../ffi/mod.ts";
import { COUNTER } from "./counters.ts";
import type { QueueProgress, QueueStart } from "./messages.ts";
import type { Runner } from "./queue_runner.ts";

/** A queue in mode `notify`. */
export class NotifyRunner implements Runner {
  /** Index of the queue. */
  readonly index: number;
  readonly #counters: Float64Array;
  #callFd: number;
  #kick = false;
  #call = false;

  constructor(readonly start: QueueStart, counters: Float64Array) {
    this.index = start.index;
    this.#callFd = start.callFd;
    this.#counters = counters;
  }

  /** The guest kicked. */
  kicked(): void {
    this.#counters[COUNTER.kicks]!++;
    this.#kick = true;
  }

  /** The device called. */
  called(): void {
    this.#counters[COUNTER.deviceCalls]!++;
    this.#call = true;
  }

  /** Passes on what was signalled. */
  service(): boolean {
    if (this.#kick) {
      this.#kick = false;
      this.#counters[COUNTER.deviceKicks]!++;
      signalEventfd(this.start.deviceKickFd);
    }
    if (this.#call) {
      this.#call = false;
      this.#counters[COUNTER.calls]!++;
      if (this.#callFd >= 0) signalEventfd(this.#callFd);
    }
    return false;
  }

  /** The device takes chains by itself: it is paused by the device interface. */
  pause(): void {}

  /** The guest's call eventfd, -1 for none. */
  setCall(fd: number): void {
    this.#callFd = fd;
  }

  /** The device writes the used ring, and does not log. */
  setLogUsed(): void {}

  /** The Worker knows of no chains. */
  uses(): number {
    return 0;
  }

  /** The same by IOVA: such a guest is relayed in mode shadow only. */
  usesIova(): number {
    return 0;
  }

  /** See {@linkcode Runner.known}. */
  known(): boolean {
    return false;
  }

  /** See {@linkcode Runner.awaits}. */
  awaits(): boolean {
    return false;
  }

  /** The Worker knows of no positions. */
  progress(): QueueProgress {
    return { deviceBase: this.start.guestBase, inflight: 0, guestBase: this.start.guestBase };
  }

  /** Nothing here breaks a rule. */
  fail(): void {}

  /** The end of the mode. */
  finish(): QueueProgress {
    return this.progress();
  }

  /** Nothing is held. */
  close(): void {}
}
