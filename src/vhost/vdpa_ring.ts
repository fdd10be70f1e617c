/**
 * What a front-end has set for one ring of a vhost-vdpa device, and what of it the device has been told.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { KickedRing } from "./kicked_ring.ts";
import type { VdpaNode } from "./vdpa_node.ts";

/**
 * - `idle`: the device does not touch the ring.
 * - `prepared`: the device has its size, base and addresses and DRIVER_OK, but the ring is not enabled there.
 * - `running`: the device works on it.
 * - `parked`: stopped on a device without SUSPEND: enabled there, but nothing is in flight and nobody adds anything.
 */
export type RingState = "idle" | "prepared" | "running" | "parked";

/** One ring. */
export class VdpaRing extends KickedRing {
  #state: RingState = "idle";
  // What the device was told.
  #toldAs = "";

  /** What the device does with it. */
  get state(): RingState {
    return this.#state;
  }

  /** Set by whoever told the device. */
  set state(state: RingState) {
    this.#state = state;
    this.running = state === "running";
  }

  #signature(): string {
    const { desc, avail, used } = this.addresses ?? { desc: 0, avail: 0, used: 0 };
    return [this.num, desc, avail, used, this.base].join();
  }

  /** Stopped at `base`, though the device still has it. */
  park(base: number): void {
    this.base = base;
    this.state = "parked";
    this.#toldAs = this.#signature();
  }

  /** The device was told size, base and addresses as they are now. */
  get told(): boolean {
    return this.#toldAs === this.#signature();
  }

  /** Parked, and nothing about it has changed since. */
  get canUnpark(): boolean {
    return this.state === "parked" && this.told;
  }

  /** Tells the device size, base, addresses and eventfds; enabled is told apart. */
  configure(node: VdpaNode): void {
    if (this.addresses === undefined) throw new SvqError("RING_INCOMPLETE", `Ring ${this.index} has no addresses yet`);
    node.setVringNum(this.index, this.num);
    node.setVringBase(this.index, this.base);
    node.setVringAddresses(this.index, this.addresses);
    this.tellCall(node);
    this.tellErr(node);
    this.tellKick(node);
    this.#toldAs = this.#signature();
  }

  /** Tells the device the kick eventfd. */
  tellKick(node: VdpaNode): void {
    node.setVringKick(this.index, this.kickFd);
  }

  /** Tells the device the call eventfd. */
  tellCall(node: VdpaNode): void {
    node.setVringCall(this.index, this.callFd);
  }

  /** Tells the device the eventfd for errors. */
  tellErr(node: VdpaNode): void {
    node.setVringErr(this.index, this.errFd);
  }

  /** Back to how it was made. */
  override forget(): void {
    super.forget();
    this.state = "idle";
  }
}
