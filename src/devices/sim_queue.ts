/**
 * One queue of an embedded device, in the device's worker: takes chains, gives them to the model when their time has come,
 * and publishes what came back.
 *
 * @module
 */
import { toErrorRecord } from "../errors.ts";
import { signalEventfd } from "../ffi/mod.ts";
import type { DeviceQueue } from "../vring/queue.ts";
import type { BrokenEvent, QueueFds, SimCounters, StartCommand } from "./messages.ts";
import { type DeviceModel, WAIT } from "./model.ts";
import type { NetModel } from "./net.ts";
import { type PendingHeap, PendingRequest } from "./pending.ts";
import { type CurrentMemory, locateRing, openRing, type RingPlace } from "./ring.ts";

// Chains taken before the others get their turn.
const BATCH = 64;
// Frames received before the others get their turn.
const RECEIVE_BATCH = 256;

/** Longest chain that is taken, in segments. */
export const MAX_CHAIN = 1024;

/** What the queues of a device share. */
export interface SimShared {
  /** What requests mean. */
  model: DeviceModel;
  /** The same, where it is a network device, which offers things of its own accord. */
  net: NetModel | undefined;
  /** Guest memory. */
  memory: CurrentMemory;
  /** Requests that wait for their time. */
  pending: PendingHeap;
  /** Microseconds per request. */
  latencyUs: number;
  /** Random microseconds added, at most. */
  jitterUs: number;
  /** Calls the driver without an eventfd (VDUSE); false: the kernel takes no calls yet, try again. Absent: by eventfd. */
  interrupt?: (index: number) => boolean;
  /** Tells the main thread. */
  emit: (event: BrokenEvent) => void;
}

/** A queue of {@linkcode SimShared}'s device. */
export class SimQueue {
  /** What it did since the device was opened. */
  readonly counters: SimCounters = { taken: 0, used: 0, calls: 0, kicks: 0 };
  /** Its notifications; the worker registers the kick. */
  fds: QueueFds = { kick: -1, call: -1, err: -1 };
  /** There may be chains to take. */
  kicked = false;
  /** May take chains. */
  enabled = false;
  #ring: DeviceQueue | undefined;
  #place: RingPlace | undefined;
  #located: number[] = [];
  #free: PendingRequest[] = [];
  #waiting = 0;
  // Buffers of the frame that is being received.
  readonly #taken: PendingRequest[] = [];
  #dirty = false;
  #whenDrained: (() => void)[] = [];
  #broken = false;
  #owesCall = false;

  /** Queue `index` of a device. */
  constructor(readonly index: number, readonly shared: SimShared) {}

  /** Is it started? */
  get started(): boolean {
    return this.#ring !== undefined;
  }

  /** Does somebody have to look for chains because nobody kicks? */
  get polled(): boolean {
    return this.started && this.fds.kick < 0 && this.#takes;
  }

  /** Where a started queue stands, as in GET_VRING_BASE, while it goes on. */
  get position(): number | undefined {
    return this.#ring?.base;
  }

  get #takes(): boolean {
    return this.enabled && !this.#broken && this.#whenDrained.length === 0;
  }

  /** Starts. @throws SvqError when the ring cannot be one; the queue stays stopped */
  start(command: StartCommand): void {
    const place = { num: command.num, addresses: command.addresses, features: command.features };
    this.#located = locateRing(place, this.shared.memory);
    this.#ring = openRing(place, this.shared.memory, command.base);
    this.#place = place;
    this.#broken = false;
    this.fds = command.fds;
    this.enabled = true;
    this.kicked = true;
    this.shared.net?.setRunning(this.index, true);
  }

  /** Takes no more chains and calls back when none is left in flight. */
  drain(whenDrained: () => void): void {
    this.#whenDrained.push(whenDrained);
    this.#checkDrained();
  }

  #checkDrained(): void {
    if (this.#waiting > 0 || this.#whenDrained.length === 0) return;
    this.flush();
    const callbacks = this.#whenDrained;
    this.#whenDrained = [];
    for (const callback of callbacks) callback();
  }

  /** Stops a drained queue. @returns its base */
  stop(): number {
    const base = this.#ring?.base ?? 0;
    this.#forget();
    return base;
  }

  /** Stops at once: what is in flight is not done. */
  abandon(): void {
    for (const request of this.shared.pending.remove(this.index)) this.#free.push(request);
    this.#waiting = 0;
    this.#dirty = false;
    this.#forget();
    this.#checkDrained();
  }

  #forget(): void {
    this.#ring = undefined;
    this.#owesCall = false;
    this.#place = undefined;
    this.enabled = false;
    this.kicked = false;
    this.shared.net?.setRunning(this.index, false);
  }

  /** The ring's memory as the new table has it. @returns whether it lies elsewhere now, or is gone */
  hasMoved(): boolean {
    if (this.#place === undefined) return false;
    try {
      const now = locateRing(this.#place, this.shared.memory);
      return now.some((address, i) => address !== this.#located[i]);
    } catch {
      return true;
    }
  }

  /** Goes on, drained, where the new table has the ring. It breaks when it is not there any more. */
  relocate(): void {
    if (this.#ring === undefined || this.#place === undefined) return;
    try {
      this.#located = locateRing(this.#place, this.shared.memory);
      const ring = openRing(this.#place, this.shared.memory, this.#ring.base);
      ring.restore(this.#ring.save());
      this.#ring = ring;
      this.kicked = true;
    } catch (error) {
      this.break(error);
    }
  }

  /** Takes up to a batch of chains. Leaves `kicked` set when there may be more. */
  serve(): void {
    const ring = this.#ring;
    this.kicked = false;
    if (ring === undefined || !this.#takes) return;
    const { net } = this.shared;
    if (net !== undefined && net.receives(this.index)) {
      this.#receive(ring, net);
      return;
    }
    try {
      ring.disableKicks();
      let taken = 0;
      let waits = false;
      while (taken < BATCH) {
        const request = this.#free.pop() ?? new PendingRequest(this.index, MAX_CHAIN);
        if (!ring.pop(request.chain)) {
          this.#free.push(request);
          break;
        }
        if (!this.#accept(request)) {
          ring.unpop();
          waits = true;
          break;
        }
        taken++;
      }
      this.counters.taken += taken;
      this.flush();
      // A queue that waits is looked at when the model can go on: kicks would not help it.
      this.kicked = !waits && (taken === BATCH || ring.enableKicks());
    } catch (error) {
      this.break(error);
    }
  }

  // Whether it was taken: a model that has to wait leaves it in the ring.
  #accept(request: PendingRequest): boolean {
    const { latencyUs, jitterUs, pending } = this.shared;
    if (latencyUs === 0 && jitterUs === 0) return this.#execute(request, true);
    request.due = performance.now() + (latencyUs + Math.random() * jitterUs) / 1000;
    this.#waiting++;
    pending.push(request);
    return true;
  }

  #execute(request: PendingRequest, mayWait: boolean): boolean {
    const { model, memory } = this.shared;
    const written = model.execute(request.chain, memory.table, this.index, mayWait);
    if (written === WAIT) {
      this.#free.push(request);
      return false;
    }
    this.#ring!.push(request.chain.id, written);
    this.counters.used++;
    this.#dirty = true;
    this.#free.push(request);
    return true;
  }

  // Takes buffers only for frames that are there; what is taken is given back at once, in order.
  #receive(ring: DeviceQueue, net: NetModel): void {
    try {
      ring.disableKicks();
      for (let count = 0; net.next(performance.now()) === this.index;) {
        if (!this.#gather(ring, net)) {
          // Buffers may have come between the last look and now; the driver kicks for those that come later.
          if (ring.enableKicks()) continue;
          if (!net.lacksBuffers()) return;
        } else this.#deliver(ring, net);
        if (++count === RECEIVE_BATCH) {
          this.kicked = true;
          break;
        }
      }
      this.flush();
    } catch (error) {
      this.#release();
      this.break(error);
    }
  }

  // Buffers for the frame that is held; false when the ring has too few, which all stay there then.
  #gather(ring: DeviceQueue, net: NetModel): boolean {
    let room = 0;
    do {
      const request = this.#free.pop() ?? new PendingRequest(this.index, MAX_CHAIN);
      if (!ring.pop(request.chain)) {
        this.#free.push(request);
        // Only what was flushed is not in flight any more.
        this.flush();
        if (this.#taken.length > 0) ring.rewind();
        this.#release();
        return false;
      }
      this.#taken.push(request);
      room += request.chain.writableBytes;
    } while (room < net.heldBytes && net.mergeable);
    if (room >= net.heldBytes) return true;
    ring.unpop();
    this.#release();
    net.dropHeld();
    return true;
  }

  #deliver(ring: DeviceQueue, net: NetModel): void {
    if (this.#taken.length === 0) return;
    net.deliver(this.#taken.map(({ chain }) => chain), this.shared.memory.table, (id, written) => ring.push(id, written));
    this.counters.taken += this.#taken.length;
    this.counters.used += this.#taken.length;
    this.#dirty = true;
    this.#release();
  }

  #release(): void {
    this.#free.push(...this.#taken.splice(0));
  }

  /** Does a request whose time has come; `flush` publishes it. */
  complete(request: PendingRequest): void {
    this.#waiting--;
    if (this.#broken || this.#ring === undefined) {
      this.#free.push(request);
    } else {
      try {
        this.#execute(request, false);
      } catch (error) {
        this.break(error);
      }
    }
    this.#checkDrained();
  }

  /** Publishes what came back, and calls the driver where it wants it. */
  flush(): void {
    if (!this.#dirty || this.#ring === undefined) return;
    this.#dirty = false;
    if (this.#ring.flush()) this.#call();
  }

  #call(): void {
    if (this.shared.interrupt !== undefined) {
      this.counters.calls++;
      this.#owesCall = true;
      this.retryCall();
    } else if (this.fds.call >= 0) {
      this.counters.calls++;
      signalEventfd(this.fds.call);
    }
  }

  /** Is the driver still to be called? */
  get owesCall(): boolean {
    return this.#owesCall;
  }

  /** Calls the driver, where that was not possible before. */
  retryCall(): void {
    if (!this.#owesCall) return;
    try {
      this.#owesCall = !this.shared.interrupt!(this.index);
    } catch (error) {
      this.#owesCall = false;
      this.break(error);
    }
  }

  /** Stops for good because the ring or a request broke a rule; the other queues go on. */
  break(error: unknown): void {
    if (this.#broken) return;
    this.flush();
    this.#broken = true;
    for (const request of this.shared.pending.remove(this.index)) this.#free.push(request);
    this.#waiting = 0;
    if (this.fds.err >= 0) signalEventfd(this.fds.err);
    this.shared.emit({ broken: this.index, error: toErrorRecord(error) });
    this.#checkDrained();
  }
}
