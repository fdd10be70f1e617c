/**
 * What a front-end has set for one ring of a vhost-vdpa device, and what of it the device has been told.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { dupFd, type OwnedFd, signalEventfd } from "../ffi/mod.ts";
import type { VringAddresses } from "./backend.ts";
import type { VdpaNode } from "./vdpa_node.ts";

/**
 * - `idle`: the device does not touch the ring.
 * - `prepared`: the device has its size, base and addresses and DRIVER_OK, but the ring is not enabled there.
 * - `running`: the device works on it.
 * - `parked`: stopped on a device without SUSPEND: enabled there, but nothing is in flight and nobody adds anything.
 */
export type RingState = "idle" | "prepared" | "running" | "parked";

/** One ring. */
export class VdpaRing {
  /** Descriptors; 0 before it is set. */
  num = 0;
  /** Where it starts, and where it was left. */
  base = 0;
  /** IOVAs. */
  addresses: VringAddresses | undefined;
  /** The front-end lets it run. */
  enabled = false;
  /** What the device does with it. */
  state: RingState = "idle";
  #kick: OwnedFd | undefined;
  #call: OwnedFd | undefined;
  #err: OwnedFd | undefined;
  // What the device was told.
  #toldAs = "";

  /** Nothing is set yet. */
  constructor(readonly index: number) {}

  /** Size and place are known. */
  get placed(): boolean {
    return this.num > 0 && this.addresses !== undefined;
  }

  /** The front-end has set everything. */
  get complete(): boolean {
    return this.placed && this.#kick !== undefined;
  }

  /** ... and wants it to run. */
  get ready(): boolean {
    return this.complete && this.enabled;
  }

  /** The front-end has begun with it, so it will want to run. */
  get touched(): boolean {
    return this.num > 0 || this.addresses !== undefined || this.enabled || this.#kick !== undefined;
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

  /** Remembers the driver's kick eventfd. @param fd null: none */
  setKick(fd: number | null): void {
    this.#kick = exchange(this.#kick, fd);
  }

  /** Remembers the driver's call eventfd. @param fd null: none */
  setCall(fd: number | null): void {
    this.#call = exchange(this.#call, fd);
  }

  /** Remembers the eventfd for errors. @param fd null: none */
  setErr(fd: number | null): void {
    this.#err = exchange(this.#err, fd);
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
    node.setVringKick(this.index, this.#kick?.fd ?? -1);
  }

  /** Tells the device the call eventfd. */
  tellCall(node: VdpaNode): void {
    node.setVringCall(this.index, this.#call?.fd ?? -1);
  }

  /** Tells the device the eventfd for errors. */
  tellErr(node: VdpaNode): void {
    node.setVringErr(this.index, this.#err?.fd ?? -1);
  }

  /** Kicks the device and calls the driver once: what either signalled while the ring changed hands may be lost. */
  wake(): void {
    if (this.#kick !== undefined) signalEventfd(this.#kick.fd);
    if (this.#call !== undefined) signalEventfd(this.#call.fd);
  }

  /** Kicks the device. */
  kick(): void {
    if (this.#kick !== undefined) signalEventfd(this.#kick.fd);
  }

  /** Back to how it was made. */
  forget(): void {
    this.setKick(null);
    this.setCall(null);
    this.setErr(null);
    this.num = 0;
    this.base = 0;
    this.addresses = undefined;
    this.enabled = false;
    this.state = "idle";
  }
}

function exchange(old: OwnedFd | undefined, fd: number | null): OwnedFd | undefined {
  const next = fd === null ? undefined : dupFd(fd);
  old?.close();
  return next;
}
