/**
 * Devices that stop and start their rings only together (vDPA drivers without SUSPEND, or whose rings cannot be set up anew
 * under it): they run on rings of the relay's own from the start, and are quiesced by not forwarding.
 *
 * All of this runs in the one lane that the queues of such a device share.
 *
 * @module
 */
import { VIRTIO_ID } from "../uapi/virtio.ts";
import type { VhostBackend, VringStart } from "../vhost/backend.ts";
import type { RunningMode } from "./queue_steps.ts";
import type { RelayQueue } from "./relay_queue.ts";

/** What a {@linkcode RingGroup} asks its relay. */
export interface GroupContext {
  /** The device; it has `startVrings` and `stopVrings`. */
  device: () => VhostBackend;
  /** The queues that the front-end has touched. */
  queues: () => readonly RelayQueue[];
  /** The mode that a queue should be in. */
  wantedMode: (index: number) => RunningMode;
  /** Throws for a ring that cannot be used. */
  check: (queue: RelayQueue) => void;
}

/** The rings of such a device. */
export class RingGroup {
  readonly #context: GroupContext;

  constructor(context: GroupContext) {
    this.#context = context;
  }

  /** Brings every running queue into the mode that it should be in. */
  async reconcile(): Promise<void> {
    const { queues, wantedMode } = this.#context;
    if (!queues().some((queue) => queue.running && queue.mode !== wantedMode(queue.index))) return;
    await this.stop();
    await this.start();
  }

  /**
   * Starts all rings that the front-end has started, when the last one of them is decided: a device that starts once must be
   * given every ring at once.
   */
  async start(): Promise<void> {
    const { device, wantedMode, check } = this.#context;
    const all = this.#context.queues();
    const queues = all.filter((queue) => queue.kicked && queue.state === "stopped" && queue.num > 0 && queue.addresses !== undefined);
    if (queues.length === 0 || all.some((queue) => queue.kicked && !queue.decided)) return;
    const prepared: RelayQueue[] = [];
    try {
      const rings: VringStart[] = [];
      for (const queue of queues) {
        check(queue);
        rings.push(await queue.prepare(wantedMode(queue.index)));
        prepared.push(queue);
      }
      await device().startVrings!(rings);
    } catch (error) {
      for (const queue of prepared) await queue.unprepare();
      for (const queue of queues) queue.fail(error);
      throw error;
    }
    for (const queue of queues) await queue.entered(wantedMode(queue.index));
  }

  /** Stops all running rings: what is in flight comes back first, where the device is one that returns what it took. */
  async stop(): Promise<void> {
    const { device } = this.#context;
    const queues = this.#context.queues().filter((queue) => queue.running);
    if (queues.length === 0) return;
    const rests = device().info.deviceId !== VIRTIO_ID.net;
    await Promise.all(queues.map((queue) => queue.quiesce(rests)));
    await device().stopVrings!(queues.map(({ index }) => ({ index, recorded: true })));
    for (const queue of queues) await queue.left();
  }
}
