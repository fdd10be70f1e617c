/**
 * What a front-end sets for one ring of a kernel device, its eventfds included.
 *
 * @module
 */
import { dupFd, type OwnedFd, signalEventfd } from "../ffi/mod.ts";
import type { VringAddresses } from "./backend.ts";

/** One ring's settings. */
export class KickedRing {
  /** Descriptors; 0 before it is set. */
  num = 0;
  /** Where it starts, and where it was left. */
  base = 0;
  /** Where its parts lie. */
  addresses: VringAddresses | undefined;
  /** The front-end lets it run. */
  enabled = false;
  /** The device works on it. */
  running = false;
  /** It ran before, and the front-end has stopped it. */
  stopped = false;
  #kick: OwnedFd | undefined;
  #call: OwnedFd | undefined;
  #err: OwnedFd | undefined;

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

  /** The kick eventfd; -1 for none. */
  get kickFd(): number {
    return this.#kick?.fd ?? -1;
  }

  /** The call eventfd; -1 for none. */
  get callFd(): number {
    return this.#call?.fd ?? -1;
  }

  /** The eventfd for errors; -1 for none. */
  get errFd(): number {
    return this.#err?.fd ?? -1;
  }

  /** Remembers the driver's kick eventfd (a duplicate). @param fd null: none */
  setKick(fd: number | null): void {
    this.#kick = exchange(this.#kick, fd);
    if (fd !== null) this.stopped = false;
  }

  /** Remembers the driver's call eventfd (a duplicate). @param fd null: none */
  setCall(fd: number | null): void {
    this.#call = exchange(this.#call, fd);
  }

  /** Remembers the eventfd for errors (a duplicate). @param fd null: none */
  setErr(fd: number | null): void {
    this.#err = exchange(this.#err, fd);
  }

  /** Kicks the device. */
  kick(): void {
    if (this.#kick !== undefined) signalEventfd(this.#kick.fd);
  }

  /** Kicks the device and calls the driver once: what either signalled while the ring changed hands may be lost. */
  wake(): void {
    this.kick();
    if (this.#call !== undefined) signalEventfd(this.#call.fd);
  }

  /** Back to how it was made; the device must have let go. */
  forget(): void {
    this.setKick(null);
    this.setCall(null);
    this.setErr(null);
    this.num = 0;
    this.base = 0;
    this.addresses = undefined;
    this.enabled = false;
    this.running = false;
    this.stopped = false;
  }
}

function exchange(old: OwnedFd | undefined, fd: number | null): OwnedFd | undefined {
  const next = fd === null ? undefined : dupFd(fd);
  old?.close();
  return next;
}
