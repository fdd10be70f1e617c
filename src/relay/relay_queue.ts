/**
 * One queue of a relay, as the main thread sees it: what the front-end has set, and which mode the queue is in. All steps of
 * a queue run one after the other, in its lane.
 *
 * @module
 */
import { type ErrorRecord, SvqError, toErrorRecord } from "../errors.ts";
import { dupFd, type OwnedFd, signalEventfd } from "../ffi/mod.ts";
import { hasBit } from "../uapi/bits.ts";
import { VIRTIO_FEATURE_BITS } from "../uapi/virtio.ts";
import type { VringAddresses, VringStart } from "../vhost/backend.ts";
import { deviceIsGone } from "./device_slot.ts";
import type { Lane } from "./lane.ts";
import type { RingWindow } from "./ring_window.ts";
import type { InflightChains } from "../vring/inflight.ts";
import { type GuestRing, inflightUnknown, isRelayed, type QueueContext, QueueSteps, type RunningMode } from "./queue_steps.ts";
import type { RelayWorker } from "./worker_client.ts";

/** What a queue does now. */
export type QueueState = "stopped" | "failed" | "waiting" | RunningMode;

/** How long the last change of mode took, and the longest so far, in microseconds. */
export interface SwitchTimes {
  /** From stopping the device's side until nothing was in flight. */
  drain_us: number;
  /** The rest: new ring, base, eventfds. */
  switch_us: number;
  /** Longest time in which the queue was stopped by a switch. */
  longest_stall_us: number;
  /** Switches done. */
  count: number;
}

/** Descriptors of a ring that the relay drives by itself. */
const ALONE_NUM = 64;
const NOWHERE: VringAddresses = { desc: 0, avail: 0, used: 0 };

/** One queue: the front-end's settings and the mode it runs in. */
export class RelayQueue {
  /** Ring size in descriptors; 0 before the front-end has set it. */
  num = 0;
  /** Guest addresses of the ring. */
  addresses: VringAddresses | undefined;
  /** With an IOMMU: the ring in one piece, while `addresses` are known. */
  #window: RingWindow | undefined;
  /** With an IOMMU: what the front-end has set, IOVAs; `addresses` is where they lie once that is known. */
  iovas: VringAddresses | undefined;
  /** Where the guest's ring goes on. */
  base = 0;
  /** The base that the front-end set last; undefined before it has. */
  startBase: number | undefined;
  /** The base that the front-end got when it stopped the ring; undefined while it has not since it set one. */
  lastBase: number | undefined;
  /** Does the front-end let the queue run? */
  enabled = false;
  /** Has the front-end said whether it does? */
  enableSeen = false;
  /** Its mode, or why it has none. */
  state: QueueState = "stopped";
  /** Requests of a relay before this one that were given to the device again. */
  redone = 0;
  /** Why it failed. */
  error: ErrorRecord | undefined;
  /** What switching cost. */
  readonly times: SwitchTimes = { drain_us: 0, switch_us: 0, longest_stall_us: 0, count: 0 };

  #kick: OwnedFd | undefined;
  #kickSet = false;
  #call: OwnedFd | undefined;
  #err: OwnedFd | undefined;
  // While the device is gone: the mode whose record of what is in flight the Worker keeps.
  #record: "used" | "shadow" | undefined;
  #alone = false;
  // Of a relay before this one; until the ring has started.
  #resume: InflightChains | undefined;
  readonly #steps: QueueSteps;

  /**
   * A stopped queue.
   *
   * @param index which queue
   * @param worker runs its data path
   * @param lane the steps of this queue, in order; shared by all queues of a device that stops and starts them together
   */
  constructor(readonly index: number, worker: RelayWorker, readonly context: QueueContext, readonly lane: Lane) {
    this.#steps = new QueueSteps(index, worker, context);
  }

  /** Does the relay drive the device's ring by itself? */
  get alone(): boolean {
    return this.#alone;
  }

  /** The relay drives the device's ring by itself: the front-end has none, or not yet. The ring must be stopped. */
  driveAlone(): void {
    this.#alone = true;
    this.num = ALONE_NUM;
    this.addresses = NOWHERE;
  }

  /** Has the front-end said both that the ring starts and whether it is enabled? */
  get decided(): boolean {
    return this.#alone || (this.#kickSet && this.enableSeen);
  }

  /** Has the front-end started the ring, enabled or not? */
  get kicked(): boolean {
    return this.#kickSet || this.#alone;
  }

  /** The front-end's eventfds, borrowed: for a relay in another process. */
  get eventfds(): { kick: number | null; call: number | null; err: number | null } {
    return { kick: this.#kick?.fd ?? null, call: this.#call?.fd ?? null, err: this.#err?.fd ?? null };
  }

  /** With an IOMMU: the ring in one piece. */
  get window(): RingWindow | undefined {
    return this.#window;
  }

  /** With an IOMMU: the ring, which is stopped, was found; undefined: it is not where it was. */
  place(window: RingWindow | undefined): void {
    this.#window?.close();
    this.#window = window;
    // The log is by GPA, and only what the device's side writes is ever logged.
    this.addresses = window === undefined ? undefined : { ...window.gpas, logGpa: this.iovas?.logGpa };
  }

  /** Could the ring start if it were known where the guest's IOMMU maps it? */
  get awaitsPlace(): boolean {
    return this.#kickSet && this.state === "stopped" && this.iovas !== undefined && this.addresses === undefined;
  }

  /** Has the front-end started the ring (kick set, possibly to none) and enabled it, and is everything else known? */
  get ready(): boolean {
    return this.#kickSet && this.enabled && this.num > 0 && this.addresses !== undefined;
  }

  /** Is a device working on the ring, in any mode? */
  get running(): boolean {
    return this.mode !== undefined;
  }

  /** The mode of a running queue. */
  get mode(): RunningMode | undefined {
    return this.state === "stopped" || this.state === "failed" || this.state === "waiting" ? undefined : this.state;
  }

  /** The front-end's kick eventfd was set (null: none, the ring is polled). A step: the ring must be stopped. */
  setKick(fd: number | null): void {
    const old = this.#kick;
    this.#kick = fd === null ? undefined : dupFd(fd);
    this.#kickSet = true;
    old?.close();
  }

  /**
   * The front-end's call eventfd was set. It is handed on in the lane, since a step may be using the old one, and nobody
   * waits for that: a step can take as long as the device's slowest request.
   */
  setCall(fd: number | null): void {
    const old = this.#call;
    this.#call = fd === null ? undefined : dupFd(fd);
    this.lane.run(async () => {
      if (this.mode === undefined) return;
      await this.#steps.setCall(this.mode, this.#call?.fd ?? null);
      // A call between the two eventfds may have gone to the one that nobody reads any more.
      this.#signalGuest();
    }).catch((error) => this.context.log(`queue ${this.index}: ${toErrorRecord(error).message}`)).finally(() => old?.close());
  }

  /** The front-end's error eventfd was set. Handed to the device when the ring changes hands the next time. */
  setErr(fd: number | null): void {
    const old = this.#err;
    this.#err = fd === null ? undefined : dupFd(fd);
    this.lane.run(async () => old?.close());
  }

  #signalGuest(): void {
    if (this.#call !== undefined) signalEventfd(this.#call.fd);
  }

  /** Stops the queue for good (until it is set up anew): a broken rule, or a device that refused. */
  fail(error: unknown): void {
    this.state = "failed";
    this.error = toErrorRecord(error);
    this.context.log(`queue ${this.index} stopped: ${this.error.message}`);
    if (this.#err !== undefined) signalEventfd(this.#err.fd);
  }

  /** A queue that failed may be started again once the front-end sets it up anew. */
  forgetFailure(): void {
    if (this.state !== "failed") return;
    this.state = "stopped";
    this.error = undefined;
  }

  // ---- steps; the caller runs them in the lane

  get #ring(): GuestRing {
    if (this.#alone) {
      return { num: ALONE_NUM, addresses: NOWHERE, base: 0, enabled: true, kick: null, call: null, err: null, guestless: true };
    }
    return {
      num: this.num,
      addresses: this.addresses!,
      base: this.base,
      enabled: this.enabled,
      kick: this.#kick?.fd ?? null,
      call: this.#call?.fd ?? null,
      err: this.#err?.fd ?? null,
      window: this.#window,
      resume: this.#resume,
    };
  }

  // Before the ring starts: what a relay before this one has left. Only the modes with a record can do requests again.
  #takeOver(mode: RunningMode): RunningMode {
    if (this.#alone) return mode;
    try {
      const found = this.#steps.takeOver(this.#ring);
      if (found !== undefined) {
        this.base = found.base;
        this.#resume = found.resume;
      }
      // A record says both halves, and its ring may hold what a killed relay did not finish.
      if (found === undefined) this.base = this.#steps.wholeBase(this.#ring);
    } catch (error) {
      this.fail(error);
      throw error;
    }
    if (isRelayed(mode) || this.#resume === undefined || this.#resume.ids.length === 0) return mode;
    return hasBit(this.context.features(), VIRTIO_FEATURE_BITS.RING_PACKED) ? "shadow" : "used";
  }

  /**
   * Gives the ring to the device in `mode`; in one that keeps a record where a relay before this one has left requests.
   *
   * @throws what the device says, the queue is stopped then; SvqError INFLIGHT_INVALID, INFLIGHT_UNKNOWN, it has failed then
   */
  async enter(wanted: RunningMode): Promise<void> {
    const mode = this.#takeOver(wanted);
    try {
      await this.#steps.enter(mode, this.#ring);
    } catch (error) {
      if (deviceIsGone(error)) this.#wait(isRelayed(mode) ? mode : undefined);
      if (deviceIsGone(error) && isRelayed(mode)) this.#resume = undefined;
      throw error;
    }
    this.redone += this.#resume?.ids.length ?? 0;
    this.#resume = undefined;
    this.state = mode;
    // The front-end may have changed it in the middle of the step, without waiting for the lane.
    await this.#steps.setLogGpa(mode, this.addresses?.logGpa);
    // An eventfd consumed during the switch would be lost otherwise.
    this.#signalGuest();
    if (mode === "passthrough") this.context.doorbells.offer(this.index);
  }

  /** Takes the ring away from the device; `base` is where a successor goes on. */
  async leave(): Promise<void> {
    if (this.state === "waiting") {
      if (this.#record !== undefined) this.base = await this.#steps.drop(false);
      this.#record = undefined;
      this.state = "stopped";
    }
    if (this.mode === undefined) return;
    this.base = await this.#steps.leave(this.mode, this.#ring);
    this.state = "stopped";
    this.#takeDoorbell();
  }

  /** {@linkcode enter}, first half, for devices that start their rings together. @returns what the device is to be given */
  async prepare(mode: RunningMode): Promise<VringStart> {
    if (this.#takeOver(mode) !== mode) {
      const error = new SvqError(
        "INFLIGHT_UNKNOWN",
        `Queue ${this.index}: requests that an earlier relay left cannot be taken over in mode ${mode}`,
        {
          hint: "Start the relay with --mode used or shadow",
        },
      );
      this.fail(error);
      throw error;
    }
    return await this.#steps.prepare(mode, this.#ring);
  }

  /** Undoes {@linkcode prepare}. */
  async unprepare(mode: RunningMode): Promise<void> {
    if (mode !== "passthrough") await this.#steps.endWorker();
  }

  /** The kick eventfd is signalled, unasked: whoever listens to it looks at the ring. */
  nudge(): void {
    if (this.#kick !== undefined) signalEventfd(this.#kick.fd);
  }

  /** From `passthrough` to `notify` or back while the device goes on with the ring. */
  async exchange(mode: "passthrough" | "notify"): Promise<void> {
    if (mode === "notify") await this.context.doorbells.withdraw(this.index, () => this.nudge());
    await this.#steps.exchange(mode, this.#ring);
    this.state = mode;
    this.times.count++;
    this.#signalGuest();
    if (mode === "passthrough") this.context.doorbells.offer(this.index);
  }

  /** {@linkcode enter}, second half: the device has started the ring. */
  async entered(mode: RunningMode): Promise<void> {
    this.redone += this.#resume?.ids.length ?? 0;
    this.#resume = undefined;
    this.state = mode;
    await this.#steps.setLogGpa(mode, this.addresses?.logGpa);
    this.#steps.kickDevice(mode, this.#ring);
    this.#signalGuest();
    if (mode === "passthrough") this.context.doorbells.offer(this.index);
  }

  /** {@linkcode leave}, first half, for devices that stop their rings together: nothing more is forwarded. */
  async quiesce(rests: boolean): Promise<void> {
    if (this.mode !== undefined && isRelayed(this.mode)) await this.#steps.quiesce(this.mode, this.#ring, rests);
  }

  /** {@linkcode leave}, second half: the device has been stopped at `base` and touches nothing any more. */
  async left(base: number): Promise<void> {
    const { mode } = this;
    if (mode === undefined) return;
    const progress = mode === "passthrough" ? base : await this.#steps.endWorker();
    this.base = isRelayed(mode) ? progress : base;
    this.state = "stopped";
    this.#takeDoorbell();
  }

  // The front-end stops the ring, and may be waiting for the answer: nobody waits for the doorbell. What is kicked by it until it is
  // given back is looked for then.
  #takeDoorbell(): void {
    this.context.doorbells.withdraw(this.index, () => this.nudge()).catch((error) => this.context.log(toErrorRecord(error).message));
  }

  /**
   * Changes the mode of a running queue; a failure takes it back to the mode it was in.
   *
   * @param left called when the device has left the ring; it gets the ring again when this resolves, also in the same mode
   */
  async change(mode: RunningMode, left?: () => Promise<void>): Promise<void> {
    const before = this.mode;
    if (before === undefined || (before === mode && left === undefined)) return;
    this.#switching = true;
    try {
      await this.#change(before, mode, left);
    } finally {
      this.#switching = false;
    }
  }

  async #change(before: RunningMode, mode: RunningMode, left?: () => Promise<void>): Promise<void> {
    await this.context.doorbells.withdraw(this.index, () => this.nudge());
    const begun = performance.now();
    try {
      await this.leave();
    } catch (error) {
      // Nobody knows any more what the device does with the ring: to go on would be a guess. (A device that is gone does
      // nothing with it: that is for its successor.)
      if (!deviceIsGone(error)) this.fail(error);
      throw error;
    }
    await left?.();
    const drained = performance.now();
    try {
      await this.enter(mode);
    } catch (error) {
      if (deviceIsGone(error)) return;
      this.context.log(`queue ${this.index}: cannot enter ${mode}: ${toErrorRecord(error).message}; back to ${before}`);
      await this.enter(before);
      throw error;
    } finally {
      const done = performance.now();
      this.times.drain_us = Math.round((drained - begun) * 1000);
      this.times.switch_us = Math.round((done - drained) * 1000);
      this.times.longest_stall_us = Math.max(this.times.longest_stall_us, Math.round((done - begun) * 1000));
      this.times.count++;
    }
  }

  #switching = false;

  /** The state that an operator is shown: a queue between two modes is not one that the guest has stopped. */
  get shownState(): QueueState | "switching" {
    return this.#switching && this.state === "stopped" ? "switching" : this.state;
  }

  /** The device was lost in a mode in which it worked on the guest's own ring. */
  #lostIn: RunningMode | undefined;

  #wait(record: "used" | "shadow" | undefined): void {
    this.state = "waiting";
    this.#record = record;
  }

  /** A queue that could run waits for the device. */
  wait(): void {
    if (this.state === "stopped") this.#wait(undefined);
  }

  /**
   * The device is gone: the guest's requests wait for its successor. Where nobody has recorded what was in flight and the rings
   * do not show it, the queue fails: it needs a reset.
   */
  async lose(): Promise<void> {
    const { mode } = this;
    if (mode === undefined) return;
    const base = await this.#steps.lose(mode, this.#ring);
    if (base === undefined) return this.#failUnknown(mode);
    this.base = base;
    this.#wait(isRelayed(mode) ? mode : undefined);
    if (!isRelayed(mode)) this.#lostIn = mode;
  }

  #failUnknown(mode: RunningMode): void {
    this.fail(inflightUnknown(this.index, `the device was lost in mode ${mode}`));
  }

  /** The device has a successor. @param mode for a queue that has no record to be continued */
  async recover(mode: RunningMode): Promise<void> {
    if (this.state !== "waiting") return;
    const record = this.#record;
    if (record === undefined) {
      const lostIn = this.#lostIn;
      this.#lostIn = undefined;
      if (lostIn !== undefined) {
        const base = this.#steps.resumableBase(this.#ring);
        if (base === undefined) return this.#failUnknown(lostIn);
        this.base = base;
      }
      return await this.enter(mode);
    }
    await this.#steps.renew(record, this.#ring);
    this.#record = undefined;
    this.state = record;
    this.#signalGuest();
  }

  /** Takes a queue that broke a rule away from its Worker and its device, whatever is in flight. */
  async abandon(): Promise<void> {
    if (this.state === "waiting") {
      if (this.#record !== undefined) this.base = await this.#steps.drop(true);
      this.#record = undefined;
      this.state = "stopped";
    }
    if (this.mode === undefined) return;
    this.base = await this.#steps.abandon(this.mode, this.#ring);
    this.state = "stopped";
  }

  /** The front-end enables or disables the ring; the caller has set `enabled`. */
  async applyEnabled(): Promise<void> {
    if (this.mode !== undefined) await this.#steps.setEnabled(this.mode, this.enabled);
  }

  /** Tells the worker where writes to the guest's used ring are logged. */
  async setLogGpa(logGpa: number | undefined): Promise<void> {
    if (this.addresses !== undefined) this.addresses = { ...this.addresses, logGpa };
    if (this.mode !== undefined) await this.#steps.setLogGpa(this.mode, logGpa);
  }

  /**
   * A relay in another process has had this ring, which is stopped here, and has ended without a word: where it goes on is what the
   * VMM's record says, or else the guest's ring. A step.
   */
  distrust(): void {
    if (this.state !== "stopped" || !this.ready) return;
    if (this.#steps.recorded(this.#ring)) return this.context.inflight.lookAgain(this.index);
    const base = this.#steps.resumableBase(this.#ring);
    if (base === undefined) this.fail(inflightUnknown(this.index, "the process that was to go on with it has ended"));
    else this.base = base;
  }

  /** The front-end's settings are gone with it. */
  forget(): void {
    this.#kick?.close();
    this.#call?.close();
    this.#err?.close();
    this.#kick = this.#call = this.#err = undefined;
    this.#kickSet = false;
    this.num = 0;
    this.base = 0;
    this.#alone = false;
    this.startBase = this.lastBase = undefined;
    // A window stays until `close`: a Worker may still look at a ring whose device is gone.
    this.addresses = undefined;
    this.iovas = undefined;
    this.enabled = false;
    this.enableSeen = false;
    this.state = "stopped";
    this.#record = undefined;
    this.#resume = undefined;
    this.#lostIn = undefined;
    this.error = undefined;
  }

  /** The ring was stopped by the front-end: it starts again with a new kick eventfd. */
  unkick(): void {
    if (this.#resume !== undefined) this.context.inflight.lookAgain(this.index);
    this.#resume = undefined;
    this.#kick?.close();
    this.#kick = undefined;
    this.#kickSet = false;
  }

  /** Closes everything; the queue must be stopped. */
  close(): void {
    this.forget();
    this.place(undefined);
    this.#steps.close();
  }
}
