/**
 * The life of a relay's rings: when each starts and stops, and what becomes of it when it fails, when the guest resets its
 * device, and when the device is lost.
 *
 * @module
 */
import { type ErrorRecord, fromErrorRecord, SvqError, toErrorRecord } from "../errors.ts";
import type { GuestMemory } from "../memory/guest_memory.ts";
import { packedLayout, splitLayout } from "../vring/layout.ts";
import { checkRing } from "./check_ring.ts";
import { deviceIsGone, type DeviceSlot } from "./device_slot.ts";
import type { DeviceStatus } from "./device_status.ts";
import type { GuestIommu } from "./guest_iommu.ts";
import type { NetControl } from "./net_control.ts";
import type { Negotiation } from "./negotiation.ts";
import { pause } from "./ring_rest.ts";
import type { RunningMode } from "./queue_steps.ts";
import type { RelayEvents } from "./relay_config.ts";
import type { RelayQueue } from "./relay_queue.ts";
import type { RingGroup } from "./ring_group.ts";
import { PARTS } from "./ring_window.ts";

/** What a {@linkcode RingLife} asks its relay. */
export interface RingContext {
  /** The device, or the wait for it. */
  slot: DeviceSlot;
  /** The features of both sides. */
  negotiation: Negotiation;
  /** The device's status. */
  status: DeviceStatus;
  /** The guest's memory. */
  memory: () => GuestMemory;
  /** Set where the device stops and starts all of its rings together. */
  group: RingGroup | undefined;
  /** The control queue of a network device. */
  control: NetControl;
  /** The guest's IOMMU, where the user allows one. */
  iommu: () => GuestIommu | undefined;
  /** The queues that the front-end has touched, by index. */
  queues: () => readonly RelayQueue[];
  /** The mode that a queue should be in. */
  wantedMode: (index: number) => RunningMode;
  /** Brings every running queue into the wanted mode. */
  applyMode: () => Promise<void>;
  /** Did the device fail for good? */
  deviceFailed: () => boolean;
  /** How long a device may hold a ring that the front-end stops, ms. */
  stopTimeoutMs: () => number;
  /** Takes a device that cannot be stopped away from its rings: it counts as lost. */
  fence: (error: SvqError) => void;
  /** Whom to tell. */
  events: RelayEvents;
  /** An error that nobody waits for. */
  report: (error: unknown) => void;
}

/** How long a step that runs when the relay ends may go on waiting for the device, ms. */
const END_GRACE_MS = 1000;
/** Beyond this a timer would fire at once. */
const MAX_TIMER_MS = 2 ** 31 - 1;

/** The rings of one relay. Whatever changes one runs in the lane of its queue. */
export class RingLife {
  readonly #context: RingContext;
  #released = false;

  /** @param context asked anew each time */
  constructor(context: RingContext) {
    this.#context = context;
  }

  /** Was the device taken away because the relay ends? */
  get released(): boolean {
    return this.#released;
  }

  get #successors(): boolean {
    return this.#context.events.deviceLost !== undefined;
  }

  /** Starts a ring, in its lane, if everything that it needs is there. @throws what the ring or the device has to say; the queue has failed then */
  async start(queue: RelayQueue): Promise<void> {
    const { group, queues, slot, status, wantedMode, applyMode, report } = this.#context;
    if (!this.#placed(queue)) return;
    if (group !== undefined) {
      // They start together, when the last one can.
      if (queues().every((other) => !other.kicked || this.#placed(other))) await group.start();
      return;
    }
    if (queue.state !== "stopped" || !queue.ready) return;
    try {
      this.check(queue);
      if (slot.lost !== undefined) return queue.wait();
      await status.ensureDriverOk();
      if (queue.index !== this.#context.control.index) await this.#context.control.beforeData();
      await queue.enter(wantedMode(queue.index));
      // What a relay before this one had in hand is done first, in a mode that keeps a record.
      if (queue.mode !== wantedMode(queue.index)) applyMode().catch(report);
    } catch (error) {
      if (deviceIsGone(error) && this.#successors) return queue.wait();
      queue.fail(error);
      throw error;
    }
  }

  /** Starts those rings that waited for the guest's IOMMU to say where they are. */
  startPlaced(): void {
    for (const queue of this.#context.queues()) {
      if (queue.awaitsPlace) queue.lane.run(() => this.start(queue)).catch(this.#context.report);
    }
  }

  /** @throws SvqError for a ring that cannot be used */
  check(queue: RelayQueue): void {
    // Checked when it was mapped.
    if (queue.window === undefined && !queue.alone) checkRing(queue, this.#context.memory(), this.#context.negotiation.guestPacked);
  }

  // Where the ring of a guest with an IOMMU lies. @returns false while that is not known
  #placed(queue: RelayQueue): boolean {
    const { negotiation, memory, iommu } = this.#context;
    // Before its kick, what is mapped there is not for this ring to know: it would be the memory of the driver before this one.
    if (!negotiation.iommu || !queue.kicked || queue.iovas === undefined || queue.addresses !== undefined || queue.num === 0) return true;
    const failed = (error: unknown) => this.failed(queue, toErrorRecord(error));
    queue.place(iommu()!.ring(memory(), queue.iovas, queue.num, negotiation.guestPacked, failed));
    return queue.addresses !== undefined;
  }

  /** Stops a ring, in its lane: the device holds nothing of it then. */
  async leave(queue: RelayQueue): Promise<void> {
    if (this.#context.group !== undefined) await this.#context.group.stop();
    else await queue.leave();
  }

  /**
   * Stops a ring and does `next`, both in its lane. Where the device was lost with requests in hand that cannot be made
   * available again, its successor finishes them first.
   */
  async left<T>(queue: RelayQueue, next: () => Promise<T>): Promise<T> {
    const { slot } = this.#context;
    for (let retried = false;;) {
      try {
        return await queue.lane.run(async () => {
          await this.leave(queue);
          return await next();
        });
      } catch (error) {
        const lost = slot.lost !== undefined && error instanceof SvqError && error.code === "RING_GAP";
        if (!(lost || deviceIsGone(error)) || !this.#successors) throw error;
        // The ring is forgotten by now: its base would be a guess.
        if (this.#released) throw new SvqError("DEVICE_LOST", "The relay has ended while the device held requests", { cause: error });
        await pause(0);
        // Lost in the middle of this: the record may say that nobody is needed to finish what was in flight.
        const again: boolean = !lost && !retried && slot.lost !== undefined;
        if (!again) await slot.present();
        retried = again;
      }
    }
  }

  /** {@linkcode left}, for a front-end that waits for it: a device that does not let go in time is fenced. */
  async stopped<T>(queue: RelayQueue, next: () => Promise<T>): Promise<T> {
    const { slot, stopTimeoutMs, fence } = this.#context;
    const timeoutMs = stopTimeoutMs();
    if (timeoutMs > MAX_TIMER_MS) return await this.left(queue, next);
    // Again and again: its successor may be no better.
    const timer = setInterval(() => {
      if (slot.lost !== undefined) return;
      const message = `Queue ${queue.index}: the device still holds requests ${timeoutMs / 1000} s after it was to give up its ring`;
      fence(
        new SvqError("DRAIN_TIMEOUT", message, { hint: "Its connection is closed; look at the device's storage, or give --stop-timeout" }),
      );
    }, timeoutMs);
    try {
      return await this.left(queue, next);
    } finally {
      clearInterval(timer);
    }
  }

  /**
   * The guest unmaps this range: the rings in it stop, and start again where they are mapped next.
   *
   * @param flush the VMM forgets what it has told: rings that run stay where they are
   */
  async unmap(iova: number, size: number, flush: boolean): Promise<void> {
    for (const queue of this.#context.queues()) {
      const { iovas } = queue;
      if (iovas === undefined || queue.num === 0) continue;
      const sizes = (this.#context.negotiation.guestPacked ? packedLayout : splitLayout)(queue.num);
      if (!PARTS.some((part) => iovas[part] < iova + size && iovas[part] + sizes[part].size > iova)) continue;
      const forget = async () => {
        if (queue.state === "stopped") queue.place(undefined);
      };
      if (queue.running && !flush) await this.left(queue, () => forget().then(() => this.start(queue)));
      else await queue.lane.run(forget);
    }
  }

  /** A ring cannot go on. The others of a device that stops all of its rings together do. */
  failed(queue: RelayQueue, error: ErrorRecord): void {
    const { group, events, report } = this.#context;
    events.error(error);
    queue.lane.run(async () => {
      if (!queue.running) return;
      try {
        if (group !== undefined) await group.stop();
        else await queue.abandon();
      } finally {
        queue.fail(fromErrorRecord(error));
      }
      await group?.start();
    }).catch(report);
  }

  /** The guest resets its device: every ring stops. */
  async stop(): Promise<void> {
    for (const queue of this.#context.queues()) {
      const unkick = () => Promise.resolve(queue.unkick());
      if (this.#context.deviceFailed()) await queue.lane.run(unkick);
      else await this.stopped(queue, unkick);
    }
  }

  /** The guest resets a device that is lost: what it held is of no interest any more. */
  async drop(): Promise<void> {
    for (const queue of this.#context.queues()) {
      await queue.lane.run(async () => {
        if (queue.state === "waiting") await queue.abandon();
        if (!this.#context.deviceFailed()) await this.leave(queue);
        queue.unkick();
      });
    }
  }

  /** Stops every ring; they can be resumed. */
  async suspend(): Promise<void> {
    await Promise.all(this.#context.queues().map((queue) => queue.lane.run(() => this.leave(queue))));
  }

  /** Starts what {@linkcode suspend} stopped. */
  async resume(): Promise<void> {
    await Promise.all(this.#context.queues().map((queue) => queue.lane.run(() => this.start(queue))));
  }

  /**
   * The relay ends: every ring stops as well as it can, and is forgotten. Where a step still waits for requests that the device does
   * not give back, the device is taken away from its rings: nobody wants the answers any more.
   */
  async end(): Promise<void> {
    let released: Promise<void> | undefined;
    const timer = setTimeout(() => released = this.#release(), END_GRACE_MS);
    try {
      for (const queue of this.#context.queues()) {
        await queue.lane.run(async () => {
          const reachable = !this.#context.deviceFailed() && this.#context.slot.lost === undefined;
          if (reachable) await this.leave(queue).catch(this.#context.report);
          queue.forget();
        });
      }
    } finally {
      clearTimeout(timer);
      await released;
    }
  }

  // Kernel devices answer within the call: no step can be waiting for one.
  async #release(): Promise<void> {
    const { slot: { device }, events } = this.#context;
    const { kind, address } = device.info;
    if (kind !== "vhost-user" && kind !== "sim") return;
    this.#released = true;
    events.log(
      `${address} still holds requests ${END_GRACE_MS / 1000} s after the relay ended: it is ${kind === "sim" ? "reset" : "left"}`,
    );
    await (kind === "sim" ? device.reset() : device.close()).catch((error) => events.log(toErrorRecord(error).message));
  }

  /** The device is lost: every ring waits for its successor. */
  lose(): void {
    for (const queue of this.#context.queues()) queue.lane.run(() => queue.lose()).catch(this.#context.report);
  }

  /** The successor is there: every ring goes on from where it stood. */
  async recover(): Promise<void> {
    if (this.#context.queues().some((queue) => queue.state === "waiting")) await this.#context.control.beforeData();
    for (const queue of this.#context.queues()) await queue.lane.run(() => queue.recover(this.#context.wantedMode(queue.index)));
  }
}
