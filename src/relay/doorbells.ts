/**
 * Doorbells: pages of a device that the VMM maps into its guest (HOST_NOTIFIER), so that a kick needs no exit. They are given
 * out in mode `passthrough` only: a kick by that way passes the relay by.
 *
 * @module
 */
import { SvqError, toErrorRecord } from "../errors.ts";
import type { Doorbell, VhostBackend } from "../vhost/backend.ts";
import { Lane } from "./lane.ts";

const RETURN_MS = 5000;

/** Tells the VMM of a ring's doorbell, or (undefined) that it may use it no more; resolves with whether it agrees. */
export type DoorbellSender = (index: number, doorbell: Doorbell | undefined) => Promise<boolean>;

/** What {@linkcode Doorbells} asks its relay. */
export interface DoorbellContext {
  /** The device. */
  device: () => VhostBackend;
  /** The way to the VMM, where it can map doorbells. */
  sender: () => DoorbellSender | undefined;
  /** A line for the log. */
  log: (message: string) => void;
  /** How long the VMM may take to give a doorbell back, ms (default 5000). */
  returnMs?: number;
}

/** Does a device have doorbells that can be mapped? */
export function hasDoorbells(device: VhostBackend): boolean {
  try {
    return device.doorbell?.(0) !== undefined;
  } catch {
    return false;
  }
}

/** Who has the doorbell of which ring. */
export class Doorbells {
  readonly #context: DoorbellContext;
  readonly #given = new Set<number>();
  readonly #lanes = new Map<number, Lane>();

  /** Nobody has one. */
  constructor(context: DoorbellContext) {
    this.#context = context;
  }

  /** Rings whose doorbell the VMM has, in order. */
  get given(): number[] {
    return [...this.#given].sort((a, b) => a - b);
  }

  #lane(index: number): Lane {
    let lane = this.#lanes.get(index);
    if (lane === undefined) this.#lanes.set(index, lane = new Lane());
    return lane;
  }

  /** Offers the VMM a ring's doorbell. Nobody waits for that: the VMM may be waiting for an answer itself. */
  offer(index: number): void {
    const sender = this.#context.sender();
    if (sender === undefined) return;
    this.#lane(index).run(async () => {
      const doorbell = this.#context.device().doorbell?.(index);
      if (doorbell === undefined || this.#given.has(index)) return;
      // Given from now on: the VMM may use it before its answer is here.
      this.#given.add(index);
      const taken = await sender(index, doorbell);
      if (!taken) this.#given.delete(index);
      this.#context.log(taken ? `queue ${index}: the VMM kicks the device itself` : `queue ${index}: the VMM does not map doorbells`);
    }).catch((error) => this.#context.log(`queue ${index}: ${toErrorRecord(error).message}`));
  }

  /**
   * Takes a ring's doorbell back: when this resolves, the VMM has confirmed that every further kick comes as an event.
   *
   * @param kick called then, where the VMM had it: what was kicked meanwhile must be looked for
   * @throws SvqError DOORBELL_KEPT
   */
  async withdraw(index: number, kick: () => void): Promise<void> {
    const lane = this.#lanes.get(index);
    if (lane === undefined) return;
    let timer: ReturnType<typeof setTimeout> | undefined;
    const late = new Promise<false>((resolve) => timer = setTimeout(() => resolve(false), this.#context.returnMs ?? RETURN_MS));
    try {
      // Behind an offer that has not been answered yet. What comes back later is still heard of.
      const returned = lane.run(() => this.#takeBack(index, kick));
      returned.catch(() => {});
      if (await Promise.race([returned, late])) return;
    } finally {
      clearTimeout(timer);
    }
    throw new SvqError("DOORBELL_KEPT", `Queue ${index}: the VMM has not given the device's doorbell back`, {
      hint: "Its kicks would pass the relay by: the queue stays in mode passthrough",
    });
  }

  async #takeBack(index: number, kick: () => void): Promise<boolean> {
    if (!this.#given.has(index)) return true;
    const sender = this.#context.sender();
    // Without one the VMM has gone, and its mapping with it.
    if (sender !== undefined && !await sender(index, undefined)) return false;
    this.#given.delete(index);
    kick();
    return true;
  }

  /** The VMM has gone, and its mappings with it. */
  forget(): void {
    this.#given.clear();
  }
}
