/**
 * Where a relay keeps its device: the connection may be lost, and another one may take its place while a VMM is there.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import type { VhostBackend } from "../vhost/backend.ts";

const GONE: ReadonlySet<string> = new Set([
  "VHOST_USER_DISCONNECTED",
  "VHOST_USER_TIMEOUT",
  "VHOST_USER_PROTOCOL",
  "CLOSED",
  "DEVICE_LOST",
]);

/** Does this error mean that the device cannot be reached any more, and not that it refused something? */
export function deviceIsGone(error: unknown): boolean {
  return error instanceof SvqError && GONE.has(error.code);
}

/** A device, or the wait for its successor. */
export class DeviceSlot {
  #device: VhostBackend;
  #lost: Error | undefined;
  #givenUp: Error | undefined;
  #back = Promise.withResolvers<void>();

  /** A slot with a device in it. @param device there from the start */
  constructor(device: VhostBackend) {
    this.#device = device;
  }

  /** The device, or the one that was lost: its methods reject then. */
  get device(): VhostBackend {
    return this.#device;
  }

  /** Why it is gone, if it is and no other has taken its place. */
  get lost(): Error | undefined {
    return this.#lost ?? this.#givenUp;
  }

  /** The device is gone; whoever needs it waits from now on. */
  lose(error: Error): void {
    if (this.#lost === undefined) this.#back = Promise.withResolvers<void>();
    this.#lost = error;
  }

  /** Another one is being set up in its place; it counts as lost until {@linkcode DeviceSlot.found}. */
  replace(device: VhostBackend): void {
    this.#device = device;
  }

  /** The successor works. */
  found(): void {
    this.#lost = undefined;
    this.#back.resolve();
  }

  /** Nobody will come: those who wait are told so. */
  giveUp(reason: string): void {
    this.#givenUp = new SvqError("DEVICE_LOST", reason, { exitCode: EXIT.noDevice });
    this.#back.resolve();
  }

  /** Resolves when the device is there. @throws SvqError DEVICE_LOST after {@linkcode giveUp} */
  async present(): Promise<VhostBackend> {
    // A loop: it may have been lost again before this went on.
    while (this.#lost !== undefined && this.#givenUp === undefined) await this.#back.promise;
    if (this.#givenUp !== undefined) throw this.#givenUp;
    return this.#device;
  }

  /**
   * Asks the device; where it is gone, or goes in the middle of it, its successor is asked.
   *
   * @param work may be done more than once
   */
  async use<T>(work: (device: VhostBackend) => Promise<T>): Promise<T> {
    for (;;) {
      const device = await this.present();
      try {
        return await work(device);
      } catch (error) {
        if (!deviceIsGone(error)) throw error;
        // The loss is announced a moment after the calls under way have failed.
        await new Promise((resolve) => setTimeout(resolve, 0));
        if (this.lost === undefined && this.#device === device) throw error;
      }
    }
  }
}
