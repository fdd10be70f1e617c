/**
 * Devices that stop and start their rings only together (vDPA drivers without SUSPEND, or whose rings cannot be set up anew
 * under it): they run on rings of the relay's own from the start, and are quiesced by not forwarding. Or, where the relay was
 * started in mode passthrough or notify, on the guest's rings to the end: such a guest cannot be migrated.
 *
 * All of this runs in the one lane that the queues of such a device share.
 *
 * @module
 */
import { VIRTIO_ID } from "../uapi/virtio.ts";
import type { VhostBackend, VringStart } from "../vhost/backend.ts";
import { SvqError } from "../errors.ts";
import { isRelayed, type RunningMode } from "./queue_steps.ts";
import type { RelayQueue } from "./relay_queue.ts";

/** What a {@linkcode RingGroup} asks its relay. */
export interface GroupContext {
  /** The device; it has `startVrings` and `stopVrings`. */
  device: () => VhostBackend;
  /** The queues that the front-end has touched. */
  queues: () => readonly RelayQueue[];
  /** The mode that a queue should be in. */
  wantedMode: (index: number) => RunningMode;
  /** Rings are about to start, the control queue of a network device among them. */
  beforeStart: () => Promise<void>;
  /** They have. */
  afterStart: () => Promise<void>;
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
    const wrong = queues().filter((queue) => queue.running && queue.mode !== wantedMode(queue.index));
    // A ring that the guest and the device share cannot be taken from a running guest, but its eventfds can change hands.
    const direct = wrong.filter((queue) => !isRelayed(queue.mode!));
    for (const queue of direct) if (isRelayed(wantedMode(queue.index))) throw this.#cannotLeave(queue);
    for (const queue of direct) await queue.exchange(wantedMode(queue.index) === "notify" ? "notify" : "passthrough");
    if (direct.length === wrong.length) return;
    await this.restart();
  }

  /** Stops all rings and starts them anew, in the modes that they should be in. */
  async restart(): Promise<void> {
    const direct = this.#context.queues().find((queue) => queue.running && !isRelayed(queue.mode!));
    if (direct !== undefined) throw this.#cannotLeave(direct);
    await this.stop();
    await this.start();
  }

  #cannotLeave({ index, mode }: RelayQueue): SvqError {
    const { address } = this.#context.device().info;
    return new SvqError("CANNOT_LEAVE_MODE", `Queue ${index}: ${address} cannot be taken out of mode ${mode} while its guest runs`, {
      hint: "Its driver has no SUSPEND. Start the relay without --mode passthrough or notify; it then runs on rings of its own",
    });
  }

  /**
   * Starts all rings that the front-end has started, when the last one of them is decided: a device that starts once must be
   * given every ring at once.
   */
  async start(): Promise<void> {
    const { device, wantedMode, check, beforeStart, afterStart } = this.#context;
    if (!this.#context.queues().some((queue) => queue.kicked && !queue.alone)) return;
    await beforeStart();
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
      for (const queue of prepared) await queue.unprepare(wantedMode(queue.index));
      for (const queue of queues) queue.fail(error);
      throw error;
    }
    for (const queue of queues) await queue.entered(wantedMode(queue.index));
    await afterStart();
  }

  /** Stops all running rings: what is in flight comes back first, where the device is one that returns what it took. */
  async stop(): Promise<void> {
    const { device } = this.#context;
    const queues = this.#context.queues().filter((queue) => queue.running);
    if (queues.length === 0) return;
    const rests = device().info.deviceId !== VIRTIO_ID.net;
    await Promise.all(queues.map((queue) => queue.quiesce(rests)));
    const bases = await device().stopVrings!(queues.map(({ index, mode }) => ({ index, recorded: isRelayed(mode!) })));
    for (const [i, queue] of queues.entries()) await queue.left(bases[i]!);
  }
}
