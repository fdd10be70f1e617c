/**
 * Keeps a relay's device: opens it, and when it is lost under a VMM, looks for it again with growing pauses and puts it back.
 *
 * @module
 */
import { type ErrorRecord, toErrorRecord } from "../errors.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import type { MessageHook } from "../vhost_user/connection.ts";
import { VhostUserFrontEnd } from "../vhost_user/front_end.ts";
import { pause } from "./ring_rest.ts";
import type { Relay } from "./relay.ts";

/** Pauses between attempts double from the first to the last, ms. */
export const RETRY_MIN_MS = 100;
/** See {@linkcode RETRY_MIN_MS}. */
export const RETRY_MAX_MS = 5000;
/** A connection that lasted so long was a good one: the next attempt comes soon, ms. */
const GOOD_MS = 2000;

/** How a {@linkcode DeviceKeeper} is made. */
export interface DeviceKeeperOptions {
  /** Opens the device. */
  open: (options: { onMessage?: MessageHook }) => Promise<VhostBackend>;
  /** Sees the messages of every connection. */
  onMessage: MessageHook;
  /** Where log lines go. */
  log: (level: "warning" | "info", message: string) => void;
}

/** The search was ended by {@linkcode DeviceKeeper.interrupt}. */
class SearchEnded extends Error {}

/** The device of a relay service, over all its connections. */
export class DeviceKeeper {
  /** Connections so far. */
  connections = 0;
  /** Why the device is away. */
  error: ErrorRecord | undefined;
  readonly #options: DeviceKeeperOptions;
  #device: VhostBackend | undefined;
  /** An attempt that goes on although nobody waits for it now: the next who wants the device gets it. */
  #opening: Promise<VhostBackend> | undefined;
  #openedMs = 0;
  #pauseMs = RETRY_MIN_MS;
  #recovery: Promise<void> | undefined;
  #abort = Promise.withResolvers<void>();
  #aborted = false;
  #closed = false;

  /** Opens nothing yet. */
  constructor(options: DeviceKeeperOptions) {
    this.#options = options;
  }

  /** The device; undefined before it was opened and after {@linkcode DeviceKeeper.leave}. */
  get device(): VhostBackend | undefined {
    return this.#device;
  }

  /** Takes a device that another process has opened. */
  adopt(device: VhostBackend): void {
    this.connections++;
    this.#openedMs = performance.now();
    this.#device = device;
  }

  /**
   * The device goes back to the process that it came from: kernel and embedded devices are closed.
   *
   * @returns is a connection as that process knows it?
   */
  async giveBack(): Promise<boolean> {
    const device = this.#device;
    if (device instanceof VhostUserFrontEnd) return !device.memoryChanged;
    await this.leave();
    return true;
  }

  /** Opens it, at the first attempt. @throws what opening says */
  async open(): Promise<VhostBackend> {
    this.#opening ??= this.#options.open({ onMessage: this.#options.onMessage });
    const opening = this.#opening;
    let device: VhostBackend | undefined;
    try {
      device = await Promise.race([opening, this.#abort.promise.then(() => undefined)]);
    } catch (error) {
      this.#opening = undefined;
      throw error;
    }
    if (device === undefined) throw new SearchEnded();
    this.#opening = undefined;
    this.connections++;
    this.#openedMs = performance.now();
    return this.#device = device;
  }

  /** Opens it, however many attempts it takes. @returns undefined when it was interrupted by {@linkcode DeviceKeeper.interrupt} */
  async find(): Promise<VhostBackend | undefined> {
    while (!this.#aborted) {
      try {
        const device = await this.open();
        this.error = undefined;
        return device;
      } catch (error) {
        // interrupt() may be over by now, and a new search allowed.
        if (this.#aborted || error instanceof SearchEnded) break;
        await this.#failed(error);
      }
    }
    return undefined;
  }

  async #failed(error: unknown): Promise<void> {
    this.error = toErrorRecord(error);
    this.#options.log("warning", `the device is away: ${this.error.message}; trying again in ${this.#pauseMs} ms`);
    const wait = this.#pauseMs;
    this.#pauseMs = Math.min(this.#pauseMs * 2, RETRY_MAX_MS);
    await Promise.race([pause(wait), this.#abort.promise]);
  }

  /**
   * The device was lost: finds it again and attaches it to `relay`. One call at a time has an effect.
   *
   * @param wanted is anybody still there who needs it? Asked before each attempt; otherwise the relay is told that none comes
   */
  recover(relay: Relay, error: Error, wanted: () => boolean): void {
    if (this.#recovery !== undefined || this.#closed) return;
    this.error = toErrorRecord(error);
    this.#options.log("warning", `the device is lost: ${this.error.message}; the guest's requests wait`);
    if (performance.now() - this.#openedMs > GOOD_MS) this.#pauseMs = RETRY_MIN_MS;
    this.#recovery = this.#recover(relay, wanted).finally(() => this.#recovery = undefined);
  }

  async #recover(relay: Relay, wanted: () => boolean): Promise<void> {
    await this.#device?.close();
    while (!this.#aborted) {
      if (!wanted()) return relay.giveUp("The front-end has left, and the device has not come back");
      let device: VhostBackend | undefined;
      try {
        device = await this.open();
        const attached = device;
        // Closing it ends what waits for an answer.
        this.#abort.promise.then(() => relay.deviceLost ? attached.close() : undefined);
        await relay.attach(device);
        if (!relay.deviceLost) {
          this.error = undefined;
          this.#options.log("info", "the device is back");
          return;
        }
        throw new Error("it was lost again at once");
      } catch (error) {
        await device?.close();
        if (error instanceof SearchEnded) break;
        if (!this.#aborted) await this.#failed(error);
      }
    }
    relay.giveUp("The relay looks for its device no longer");
  }

  /** Ends a search that is under way. */
  async interrupt(): Promise<void> {
    this.#aborted = true;
    this.#abort.resolve();
    await this.#recovery;
    if (this.#closed) return;
    this.#aborted = false;
    this.#abort = Promise.withResolvers<void>();
  }

  /** Lets go of the device. */
  async leave(): Promise<void> {
    const device = this.#device;
    this.#device = undefined;
    await device?.close();
  }

  /** Ends everything. */
  async close(): Promise<void> {
    this.#closed = true;
    await this.interrupt();
    // Where it opens after all, nobody wants it.
    this.#opening?.then((device) => device.close(), () => {});
    await this.leave();
  }
}
