/**
 * One queue on the data path of a Worker: the guest's ring on one side, the shadow ring on the other.
 *
 * @module
 */
import { signalEventfd } from "../ffi/mod.ts";
import type { IotlbEntry } from "../iova/iotlb.ts";
import type { RelayCore } from "./core.ts";
import { COUNTER } from "./counters.ts";
import type { QueueProgress, QueueStart } from "./messages.ts";

/** Rounds of forwarding and returning before other queues get their turn. */
const ROUNDS = 8;

/** What a Worker runs for a queue. */
export interface Runner {
  /** Index of the queue. */
  readonly index: number;
  /** What it was started with. */
  readonly start: QueueStart;
  /** The guest kicked. */
  kicked(): void;
  /** The device called. */
  called(): void;
  /** Does what there is to do. @returns whether there is more to do at once */
  service(): boolean;
  /** Takes chains from the guest, or stops doing so; what is at the device still comes back. */
  pause(paused: boolean): void;
  /** The guest's call eventfd, -1 for none. */
  setCall(fd: number): void;
  /** Where writes to the guest's used ring are logged, -1 for nowhere. */
  setLogUsed(gpa: number): void;
  /** How many chains at the device touch `[gpa, gpa + size)`. */
  uses(gpa: number, size: number): number;
  /** The same by IOVA, for a guest with an IOMMU. */
  usesIova(iova: number, size: number): number;
  /** The table of the guest's IOMMU has grown. @returns whether the queue waits for something there */
  known(entry: IotlbEntry): boolean;
  /** Whether it has asked for this address of the guest's IOMMU and not been told. */
  awaits(iova: number): boolean;
  /** Where the queue stands. */
  progress(): QueueProgress;
  /** A rule was broken: the queue stops here. */
  fail(): void;
  /** The end of the mode. */
  finish(): QueueProgress;
  /** Gives up what it holds, after the end. */
  close(): void;
}

/** A queue in mode `used` or `shadow`. */
export class QueueRunner implements Runner {
  /** Index of the queue. */
  readonly index: number;
  /** It is being polled: it waits for no notification. The Worker's own mark. */
  hot = false;
  // Both sides are asked to notify; nobody looks at the rings meanwhile.
  #armed = true;
  /** What it was started with. */
  start: QueueStart;
  readonly #core: RelayCore;
  readonly #counters: Float64Array;
  #callFd: number;
  #paused: boolean;
  #failed = false;
  #lost = false;
  #finished: QueueProgress | undefined;
  /** The address of the guest's IOMMU that the main thread was told of and has not answered; -1: none. */
  #asked = -1;
  readonly #ask: (iova: number, perm: number) => void;

  /**
   * @param core over both rings, fresh
   * @param ask tells the main thread of an address that the guest's IOMMU maps, perhaps
   */
  constructor(start: QueueStart, core: RelayCore, counters: Float64Array, ask: (iova: number, perm: number) => void = () => {}) {
    this.#ask = ask;
    this.index = start.index;
    this.start = start;
    this.#core = core;
    this.#counters = counters;
    this.#callFd = start.callFd;
    this.#paused = start.paused;
    this.#count();
  }

  /** What runs it. */
  get core(): RelayCore {
    return this.#core;
  }

  /** Which core runs it. */
  get coreKind(): RelayCore["kind"] {
    return this.#core.kind;
  }

  /** The guest kicked. */
  kicked(): void {
    this.#counters[COUNTER.kicks]!++;
  }

  /** The device called. */
  called(): void {
    this.#counters[COUNTER.deviceCalls]!++;
  }

  /** Takes chains from the guest, or stops doing so; what is at the device still comes back. */
  pause(paused: boolean): void {
    this.#paused = paused;
  }

  /** The guest's call eventfd, -1 for none. */
  setCall(fd: number): void {
    this.#callFd = fd;
  }

  /** Where writes to the guest's used ring are logged, -1 for nowhere. */
  setLogUsed(gpa: number): void {
    this.#core.setLogUsed(gpa);
    // What was written to it before the VMM asked counts, too.
    this.#core.logRing();
  }

  /** How many chains at the device touch `[gpa, gpa + size)`. */
  uses(gpa: number, size: number): number {
    return this.#failed ? 0 : this.#core.uses(gpa, size);
  }

  /** The same by IOVA, for a guest with an IOMMU. */
  usesIova(iova: number, size: number): number {
    return this.#failed ? 0 : this.#core.usesIova?.(iova, size) ?? 0;
  }

  /** The table of the guest's IOMMU has grown. @returns whether the queue waits for something there */
  known({ iova, size }: IotlbEntry): boolean {
    if (this.#asked < iova || this.#asked >= iova + size) return false;
    // If it is not enough, or taken back by the time of the next look, the address is asked for again.
    this.#asked = -1;
    return true;
  }

  /** Whether it has asked for this address of the guest's IOMMU and not been told. */
  awaits(iova: number): boolean {
    return !this.#failed && this.#asked === iova;
  }

  #askMissing(): void {
    const miss = this.#core.miss;
    if (miss === undefined || miss.iova === this.#asked) return;
    this.#asked = miss.iova;
    this.#ask(miss.iova, miss.perm);
  }

  /**
   * Moves what there is, in both directions, and asks for notifications of what follows.
   *
   * @returns whether there is more to do at once
   * @throws VringError when either ring breaks a rule
   */
  service(): boolean {
    this.work();
    return this.arm();
  }

  /**
   * Moves what there is, in both directions. Neither side is asked for notifications afterwards: whoever calls this looks again
   * soon, or calls {@linkcode arm} before it sleeps.
   *
   * @returns 0: nothing was there; 1: something was moved; 2: and there may be more
   * @throws VringError when either ring breaks a rule
   */
  work(): 0 | 1 | 2 {
    if (this.#failed || this.#lost) return 0;
    const core = this.#core;
    const disarmed = this.#armed;
    if (disarmed) {
      core.disableCalls();
      if (!this.#paused) core.disableKicks();
      this.#armed = false;
    }
    let round = 0;
    for (; round < ROUNDS; round++) {
      let moved = core.returnUsed();
      if (core.callWanted) this.#call();
      // Polled, a full ring stays full until the device has returned something.
      if (!this.#paused && (disarmed || moved > 0 || !core.full)) {
        const forwarded = core.forward();
        if (forwarded > 0) this.#counters[COUNTER.batches]!++;
        moved += forwarded;
        if (core.kickWanted) this.#kickDevice();
      }
      if (moved === 0) break;
    }
    if (!this.#paused) this.#askMissing();
    if (round === 0) {
      if (disarmed) core.logRing();
      return 0;
    }
    this.#count();
    core.logRing();
    return round === ROUNDS ? 2 : 1;
  }

  /**
   * Asks both sides for notifications, and looks once more: what came before they could know of it was announced by nobody.
   *
   * @returns whether there is more to do: then the caller must not sleep
   * @throws VringError when either ring breaks a rule
   */
  arm(): boolean {
    if (this.#failed || this.#lost) return false;
    const core = this.#core;
    this.#armed = true;
    let more = core.enableCalls();
    // While the device's ring is full only the device can help: its call is wanted, not a kick. And while the guest's next chain
    // waits for the guest's IOMMU, only that can help.
    if (!this.#paused && !core.full && core.miss === undefined) more = core.enableKicks() || more;
    core.logRing();
    return more;
  }

  #call(): void {
    this.#counters[COUNTER.calls]!++;
    if (this.#callFd >= 0) signalEventfd(this.#callFd);
  }

  #kickDevice(): void {
    this.#counters[COUNTER.deviceKicks]!++;
    signalEventfd(this.start.deviceKickFd);
  }

  #count(): void {
    const counters = this.#counters;
    counters[COUNTER.inflight] = this.#core.inflight;
    counters[COUNTER.availIdx] = this.#core.guestBase & 0xffff;
    counters[COUNTER.usedIdx] = this.#core.guestUsed;
  }

  /** Where the queue stands. */
  progress(): QueueProgress {
    return this.#finished ?? this.#core.progress();
  }

  /** The device is gone: what it has returned goes to the guest, and its ring is not looked at any more. */
  lose(): void {
    this.#paused = true;
    this.service();
    this.#lost = true;
  }

  /** What a lost device held goes to its successor, in the fresh ring that `start` names. */
  renew(start: QueueStart): void {
    this.#lost = false;
    this.#core.renew(start);
    this.#core.setLogUsed(start.logUsedGpa);
    this.start = start;
    this.#callFd = start.callFd;
    this.#paused = start.paused;
    this.#count();
  }

  /** A rule was broken: the queue stops here. */
  fail(): void {
    this.#counters[COUNTER.errors]!++;
    this.abandon();
  }

  /** The queue stops here, whatever is at the device. @param keep what the in-flight region says stays as it is */
  abandon(keep = false): void {
    this.#finished ??= this.#core.abandon(keep);
    // The step that was broken off may have written to it.
    this.#core.logRing();
    this.#failed = true;
  }

  /** The end of the mode: what the device never took is the guest's again, and the guest's suppression is undone. */
  finish(): QueueProgress {
    if (this.#finished !== undefined) return this.#finished;
    const progress = this.#core.finish();
    this.#count();
    this.#finished = progress;
    this.#failed = true;
    return progress;
  }

  /** Gives up what it holds, after the end. */
  close(): void {
    this.#core.close();
  }
}
