/**
 * One queue of a relay, as the main thread sees it: what the front-end has set, which mode the queue is in, and the steps
 * from one mode to another. All steps of a queue run one after the other, in its lane.
 *
 * Leaving a mode is stop + drain: the device's position equals what came back. Entering one gives the device a ring at
 * a position from which nothing is lost and nothing is done twice.
 *
 * @module
 */
import { type ErrorRecord, toErrorRecord } from "../errors.ts";
import { createEventfd, dupFd, type OwnedFd, signalEventfd } from "../ffi/mod.ts";
import type { GuestMemory } from "../memory/guest_memory.ts";
import type { VhostBackend, VringAddresses } from "../vhost/backend.ts";
import type { Arena } from "./arena.ts";
import { Lane } from "./lane.ts";
import type { QueueProgress, RingPlace } from "./messages.ts";
import type { RelayWorker } from "./worker_client.ts";

/** Modes that a queue can be in while it runs. */
export type RunningMode = "passthrough" | "shadow";
/** What a queue does now. */
export type QueueState = "stopped" | "failed" | RunningMode;

/** What all queues of a relay share. */
export interface QueueContext {
  device: VhostBackend;
  memory: GuestMemory;
  /** Shadow rings; made before the first ring starts. */
  arena: () => Arena;
  /** Negotiated features. */
  features: () => bigint;
  /** Something happened that a log reader wants to know. */
  log: (message: string) => void;
}

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

const VIRTIO_RING_F_INDIRECT_DESC = 1n << 28n;
const VIRTIO_RING_F_EVENT_IDX = 1n << 29n;
const VIRTIO_F_RING_PACKED = 1n << 34n;

/** How long a stopped device may take to give back what it holds before it is resumed, ms. */
const CATCH_UP_MS = 100;
/** Without progress for so long, a device that does not say what it holds counts as idle, ms. */
const QUIET_MS = 20;
/** The same for a device that says that it holds something, ms. */
const HELD_MS = 30_000;

/** Resolves after `ms` milliseconds. */
export function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** One queue: the front-end's settings and the mode it runs in. */
export class RelayQueue {
  /** The steps of this queue, in order. */
  readonly lane = new Lane();
  /** Ring size in descriptors; 0 before the front-end has set it. */
  num = 0;
  /** Guest addresses of the ring. */
  addresses: VringAddresses | undefined;
  /** Where the guest's ring goes on. */
  base = 0;
  /** The base that the front-end set last; undefined before it has. */
  startBase: number | undefined;
  /** The base that the front-end got when it stopped the ring; undefined while it has not since it set one. */
  lastBase: number | undefined;
  /** Does the front-end let the queue run? */
  enabled = false;
  /** Its mode, or why it has none. */
  state: QueueState = "stopped";
  /** Why it failed. */
  error: ErrorRecord | undefined;
  /** What switching cost. */
  readonly times: SwitchTimes = { drain_us: 0, switch_us: 0, longest_stall_us: 0, count: 0 };

  #kick: OwnedFd | undefined;
  #kickSet = false;
  #call: OwnedFd | undefined;
  #err: OwnedFd | undefined;
  readonly #deviceKick: OwnedFd = createEventfd();
  readonly #deviceCall: OwnedFd = createEventfd();
  readonly #silentKick: OwnedFd = createEventfd();

  constructor(readonly index: number, readonly worker: RelayWorker, readonly context: QueueContext) {}

  /** Has the front-end started the ring (kick set, possibly to none) and enabled it, and is everything else known? */
  get ready(): boolean {
    return this.#kickSet && this.enabled && this.num > 0 && this.addresses !== undefined;
  }

  /** Is a device working on the ring, in any mode? */
  get running(): boolean {
    return this.state === "passthrough" || this.state === "shadow";
  }

  /** The front-end's kick eventfd was set (null: none, the ring is polled). */
  setKick(fd: number | null): void {
    const old = this.#kick;
    this.#kick = fd === null ? undefined : dupFd(fd);
    this.#kickSet = true;
    old?.close();
  }

  /** The front-end's call eventfd was set; passed on at once where the ring runs. */
  async setCall(fd: number | null): Promise<void> {
    const old = this.#call;
    this.#call = fd === null ? undefined : dupFd(fd);
    try {
      if (this.state === "passthrough") await this.context.device.setVringCall(this.index, fd);
      else if (this.state === "shadow") await this.worker.send({ type: "call", index: this.index, fd: this.#call?.fd ?? -1 });
    } finally {
      old?.close();
    }
    // A call between the two eventfds may have gone to the one that nobody reads any more.
    if (this.running) this.#signalGuest();
  }

  /** The front-end's error eventfd was set. */
  setErr(fd: number | null): void {
    this.#err?.close();
    this.#err = fd === null ? undefined : dupFd(fd);
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

  /** Gives the ring to the device in `mode`. @throws what the device says; the queue is stopped then */
  async enter(mode: RunningMode): Promise<void> {
    if (mode === "shadow") await this.#enterShadow();
    else await this.#enterPassthrough();
    this.state = mode;
    // The front-end may have changed it in the middle of the step, without waiting for the lane.
    if (mode === "shadow") await this.setLogGpa(this.addresses!.logGpa);
    // An eventfd consumed during the switch would be lost otherwise.
    this.#signalGuest();
  }

  /** Takes the ring away from the device; `base` is where a successor goes on. */
  async leave(): Promise<void> {
    if (this.state === "shadow") await this.#leaveShadow();
    else if (this.state === "passthrough") await this.#leavePassthrough();
    else return;
    this.state = "stopped";
  }

  /** Changes the mode of a running queue; a failure takes it back to the mode it was in. */
  async change(mode: RunningMode): Promise<void> {
    const before = this.state;
    if (before === mode || (before !== "passthrough" && before !== "shadow")) return;
    const begun = performance.now();
    await this.leave();
    const drained = performance.now();
    try {
      await this.enter(mode);
    } catch (error) {
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

  #guestRing(): RingPlace {
    const features = this.context.features();
    const { desc, avail, used } = this.addresses!;
    return {
      num: this.num,
      packed: (features & VIRTIO_F_RING_PACKED) !== 0n,
      eventIdx: (features & VIRTIO_RING_F_EVENT_IDX) !== 0n,
      indirect: (features & VIRTIO_RING_F_INDIRECT_DESC) !== 0n,
      desc,
      avail,
      used,
    };
  }

  // Order as VMMs use it: NUM, BASE, ADDR, CALL, ERR, KICK, ENABLE. Some devices read the used index at ADDR, and all
  // start at KICK.
  async #giveToDevice(num: number, base: number, addresses: VringAddresses, kick: number | null, call: number | null): Promise<void> {
    const { device } = this.context;
    await device.setVringNum(this.index, num);
    await device.setVringBase(this.index, base);
    await device.setVringAddresses(this.index, addresses);
    await device.setVringCall(this.index, call);
    await device.setVringErr(this.index, this.#err?.fd ?? null);
    await device.setVringKick(this.index, kick);
    await device.setVringEnable(this.index, this.enabled);
  }

  async #enterPassthrough(): Promise<void> {
    const { desc, avail, used } = this.addresses!;
    // The device never logs: no log address goes to it.
    await this.#giveToDevice(this.num, this.base, { desc, avail, used }, this.#kick?.fd ?? null, this.#call?.fd ?? null);
    if (this.#kick !== undefined) signalEventfd(this.#kick.fd);
  }

  async #leavePassthrough(): Promise<void> {
    const { memory, device } = this.context;
    const used = new Uint16Array(memory.buffer(this.addresses!.used, 6 + 8 * this.num));
    for (;;) {
      // Kicks go to an eventfd that nobody signals: the device finishes what it has seen.
      await device.setVringKick(this.index, this.#silentKick.fd);
      await this.#settle(used);
      const base = await this.#stopDevice();
      if (await this.#until(async () => Atomics.load(used, 1) === (base & 0xffff))) {
        this.base = base;
        return;
      }
      // It left with requests in hand. Give it the ring back, so that it can return them, and try again.
      this.base = base;
      await this.#enterPassthrough();
      this.#signalGuest();
      await pause(20);
    }
  }

  /**
   * Waits until a device that gets no new chains has probably returned what it took. With EVENT_IDX the device says how far
   * it has read (avail_event); otherwise, and where it does not keep that word, a time without progress has to do. Only the
   * base that the device gives afterwards proves it; this keeps devices out of their rarely used paths.
   */
  async #settle(used: Uint16Array): Promise<void> {
    const eventIdx = (this.context.features() & VIRTIO_RING_F_EVENT_IDX) !== 0n;
    let last = Atomics.load(used, 1);
    let since = performance.now();
    for (let wait = 0;; wait = Math.min(wait + 0.2, 2)) {
      const now = Atomics.load(used, 1);
      if (now !== last) {
        last = now;
        since = performance.now();
      }
      const held = eventIdx ? (Atomics.load(used, 2 + 4 * this.num) - now) & 0xffff : -1;
      if (held === 0) return;
      const limit = held > 0 && held <= this.num ? HELD_MS : QUIET_MS;
      if (performance.now() - since > limit) return;
      await pause(wait);
    }
  }

  // A stopped device may still be finishing requests, and has closed the call eventfd that it wants to signal then:
  // qemu-storage-daemon drops the connection over that. Another one follows right behind the stop, before the answer.
  async #stopDevice(): Promise<number> {
    const { device } = this.context;
    const [base] = await Promise.all([device.getVringBase(this.index), device.setVringCall(this.index, this.#deviceCall.fd)]);
    return base;
  }

  async #enterShadow(): Promise<void> {
    const guest = this.#guestRing();
    const logGpa = this.addresses!.logGpa;
    const place = this.context.arena().place(this.index, this.num);
    const shadow: RingPlace = { ...guest, ...place.local };
    const deviceBase = shadow.packed ? 0x8000_8000 : 0;
    // The worker runs first: what the device returns must find somebody.
    await this.worker.send({
      type: "start",
      queue: {
        index: this.index,
        guest,
        device: shadow,
        guestBase: this.base,
        deviceBase,
        kickFd: this.#kick?.fd ?? -1,
        callFd: this.#call?.fd ?? -1,
        errFd: this.#err?.fd ?? -1,
        deviceKickFd: this.#deviceKick.fd,
        deviceCallFd: this.#deviceCall.fd,
        logUsedGpa: logGpa ?? -1,
        paused: !this.enabled,
      },
    });
    try {
      await this.#giveToDevice(this.num, deviceBase, place.iova, this.#deviceKick.fd, this.#deviceCall.fd);
    } catch (error) {
      this.base = (await this.worker.progress({ type: "stop", index: this.index })).guestBase;
      throw error;
    }
    signalEventfd(this.#deviceKick.fd);
  }

  async #leaveShadow(): Promise<void> {
    const { arena } = this.context;
    await this.worker.send({ type: "pause", index: this.index, paused: true });
    const used = new Uint16Array(arena().usedRing(this.index, this.num));
    for (;;) {
      const { inflight } = await this.worker.progress({ type: "poll", index: this.index });
      if (inflight > 0) await this.#settle(used);
      const base = await this.#stopDevice();
      let progress: QueueProgress | undefined;
      const back = await this.#until(async () => {
        progress = await this.worker.progress({ type: "poll", index: this.index });
        return progress.deviceBase === base;
      });
      if (back) break;
      const place = arena().peek(this.index, this.num);
      await this.#giveToDevice(this.num, base, place, this.#deviceKick.fd, this.#deviceCall.fd);
      signalEventfd(this.#deviceKick.fd);
      await pause(20);
    }
    // The device holds nothing. What it never took are the last entries that were forwarded, in order: the guest's
    // position is rewound to them.
    this.base = (await this.worker.progress({ type: "stop", index: this.index })).guestBase;
  }

  /** Takes a queue that broke a rule away from its Worker and its device, whatever is in flight. */
  async abandon(): Promise<void> {
    if (this.state === "shadow") this.base = (await this.worker.progress({ type: "stop", index: this.index })).guestBase;
    await this.#stopDevice();
    this.state = "stopped";
  }

  async #until(condition: () => Promise<boolean>): Promise<boolean> {
    const deadline = performance.now() + CATCH_UP_MS;
    for (let wait = 0;; wait = Math.min(wait + 1, 5)) {
      if (await condition()) return true;
      if (performance.now() > deadline) return false;
      await pause(wait);
    }
  }

  /** The front-end enables or disables the ring; the caller has set `enabled`. */
  async applyEnabled(): Promise<void> {
    if (this.state === "passthrough") {
      await this.context.device.setVringEnable(this.index, this.enabled);
    } else if (this.state === "shadow") {
      // Disabled means: take nothing more from the guest. The device keeps its ring, or what it has not taken yet of
      // what was forwarded would never come back.
      await this.worker.send({ type: "pause", index: this.index, paused: !this.enabled });
    }
  }

  /** Tells the worker where writes to the guest's used ring are logged. */
  async setLogGpa(logGpa: number | undefined): Promise<void> {
    if (this.addresses !== undefined) this.addresses = { ...this.addresses, logGpa };
    if (this.state === "shadow") await this.worker.send({ type: "logUsed", index: this.index, gpa: logGpa ?? -1 });
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
    this.startBase = this.lastBase = undefined;
    this.addresses = undefined;
    this.enabled = false;
    this.state = "stopped";
    this.error = undefined;
  }

  /** The ring was stopped by the front-end: it starts again with a new kick eventfd. */
  unkick(): void {
    this.#kick?.close();
    this.#kick = undefined;
    this.#kickSet = false;
  }

  /** Closes everything; the queue must be stopped. */
  close(): void {
    this.forget();
    this.#deviceKick.close();
    this.#deviceCall.close();
    this.#silentKick.close();
  }
}
