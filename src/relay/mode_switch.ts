/**
 * Which mode each queue should be in, and bringing all of them there.
 *
 * @module
 */
import type { BackendInfo } from "../vhost/backend.ts";
import { Gate } from "./gate.ts";
import type { Lane } from "./lane.ts";
import type { RunningMode } from "./queue_steps.ts";
import type { RelayConfig } from "./relay_config.ts";
import type { RelayQueue } from "./relay_queue.ts";
import type { RingGroup } from "./ring_group.ts";

/** What a {@linkcode ModeSwitch} asks its relay. */
export interface ModeContext {
  /** What the user has chosen. */
  config: RelayConfig;
  /** The queues that the front-end has touched. */
  queues: () => readonly RelayQueue[];
  /** Set where the device stops and starts all of its rings together. */
  group: () => RingGroup | undefined;
  /** Such a device is on the guest's rings to the end: see {@linkcode isBound}. */
  bound: boolean;
  /** The lane of all queues of such a device. */
  groupLane: Lane;
  /** Does the device forget at the stop of one ring that the others are enabled? */
  forgetful: boolean;
  /** Does the guest have packed rings? */
  guestPacked: () => boolean;
  /** Does the device need descriptors of its own for this queue: another format, another place in its address space, … */
  translated: (index: number) => boolean;
  /** Is it a control queue, whose commands are always copied? */
  control: (index: number) => boolean;
  /** Which way frames go in a data queue of a network device; undefined for other queues. */
  frames: (index: number) => "in" | "out" | undefined;
  /** Must what the device uses go through the relay at least? */
  relayed: () => boolean;
  /** Is the dirty log on? */
  logging: () => boolean;
  /** A queue has changed its mode. */
  changed: () => void;
}

/**
 * Is a relay over such a device to leave it on the guest's rings to the end? Where it was started in mode passthrough or notify. The
 * guest can then not be migrated: the dirty log is not offered.
 */
export function isBound(info: BackendInfo, { mode, forceShadow, queueModes }: RelayConfig): boolean {
  const together = (info.ringStop ?? "each") !== "each";
  return together && !forceShadow && queueModes === undefined && (mode === "passthrough" || mode === "notify");
}

/** Where the queues of a forgetful device meet while its rings start anew. */
interface Restart {
  /** The device has left all rings. */
  left: Gate;
  /** It has all rings again in which it brings frames to the guest. */
  receives: Gate;
}

/** The modes of all queues of a relay. */
export class ModeSwitch {
  readonly #context: ModeContext;

  /** @param context asked anew each time */
  constructor(context: ModeContext) {
    this.#context = context;
  }

  /** The mode that queue `index` should be in now. */
  wanted(index: number): RunningMode {
    const { config, guestPacked, translated, relayed, logging, group } = this.#context;
    const mode = config.queueModes?.get(index) ?? config.mode;
    if (config.forceShadow || mode === "shadow" || this.#context.control(index) || translated(index)) return "shadow";
    if (this.#context.bound && (mode === "passthrough" || mode === "notify")) return mode;
    // A device whose rings cannot be stopped one by one in mid-flight stays behind rings of the relay's own. Packed rings have
    // no used ring of their own that could be the relay's.
    if (mode === "used" || relayed() || logging() || group() !== undefined) return guestPacked() ? "shadow" : "used";
    return mode === "auto" ? "passthrough" : mode;
  }

  /** Is this queue, where it runs, in the mode that it should be in? */
  done(queue: RelayQueue): boolean {
    return queue.mode === undefined || queue.mode === this.wanted(queue.index);
  }

  /**
   * Brings every running queue into the wanted mode; resolves when all are.
   *
   * @param renew rings that are in it already start anew, too
   * @throws the first error of a queue
   */
  async apply(renew = false): Promise<void> {
    const { queues, groupLane } = this.#context;
    const group = this.#context.group();
    if (group !== undefined) return await groupLane.run(() => renew ? group.restart() : group.reconcile());
    const restart = this.#restart(renew);
    const results = await Promise.allSettled(queues().map((queue) => queue.lane.run(() => this.#reconcile(queue, restart, renew))));
    for (const result of results) if (result.status === "rejected") throw result.reason;
  }

  // DPDK forgets at the stop of one ring that the others are enabled, and is told so again only where they start anew: its
  // rings all stop before any starts.
  #restart(renew: boolean): Restart | undefined {
    const { forgetful, frames } = this.#context;
    if (!forgetful) return undefined;
    const queues = this.#context.queues();
    if (!renew && queues.every((queue) => this.done(queue))) return undefined;
    return { left: new Gate(queues.length), receives: new Gate(queues.filter(({ index }) => frames(index) === "in").length) };
  }

  // A frame that the guest has sent is often answered, or looped back, at once. A ring that is not there yet cannot take the
  // answer, and the device drops it: rings that receive start first.
  async #startAnew(queue: RelayQueue, { left, receives }: Restart): Promise<void> {
    const way = this.#context.frames(queue.index);
    let passed = false;
    try {
      if (!queue.running) return;
      await queue.change(this.wanted(queue.index), async () => {
        passed = true;
        await left.pass();
        if (way === "out") await receives.opened;
      });
    } finally {
      if (!passed) left.skip();
      if (way === "in") receives.skip();
    }
  }

  async #reconcile(queue: RelayQueue, restart: Restart | undefined, renew: boolean): Promise<void> {
    if (restart !== undefined) {
      await this.#startAnew(queue, restart);
    } else if (renew && queue.running && !this.#context.control(queue.index)) {
      await queue.change(this.wanted(queue.index), () => Promise.resolve());
    }
    // The wish may change while a step waits for the device.
    while (!this.done(queue)) {
      await queue.change(this.wanted(queue.index));
      this.#context.changed();
    }
  }
}
