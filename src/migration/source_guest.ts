/**
 * A running embedded guest behind a relay, as the source of a migration needs it: dirty log on and off, stop, go on.
 *
 * @module
 */
import { DirtyBitmap, logBytes } from "../dirty/bitmap.ts";
import type { EmbeddedDriver } from "../drivers/embedded_driver.ts";
import type { DriverState } from "../drivers/state.ts";
import { EXIT, SvqError } from "../errors.ts";
import { createMemfd, mapFd, type Mapping } from "../ffi/mod.ts";
import type { Relay } from "../relay/relay.ts";
import { PageMap } from "./pages.ts";

const VHOST_F_LOG_ALL = 1n << 26n;
// How long an undo, or a stop that was cancelled, waits for a device to give back a ring, milliseconds.
const HELD_MS = 1000;

/** What one can do to a harvested bitmap before it is used: for tests that show that a broken log is noticed. */
export type HarvestFilter = (harvested: DirtyBitmap) => void;

/** The guest at the source. It owns neither driver nor relay. */
export class SourceGuest implements Disposable {
  /** The guest's memory. */
  readonly map: PageMap;
  /** Called with each harvest. */
  filter: HarvestFilter | undefined;
  readonly #driver: EmbeddedDriver;
  readonly #relay: Relay;
  #log: Mapping | undefined;
  #stopping: Promise<unknown> | undefined;
  #late: Promise<void> | undefined;
  #held: Promise<unknown> | undefined;
  #throttled = 0;

  /** A guest that runs on `relay`. */
  constructor(driver: EmbeddedDriver, relay: Relay) {
    this.#driver = driver;
    this.#relay = relay;
    const half = driver.layout.options.ramSize / 2;
    this.map = new PageMap(
      driver.regions.map(({ gpa, size, uaddr, fdOffset }) => ({ gpa, size, uaddr, address: driver.address + (fdOffset === 0 ? 0 : half) })),
    );
  }

  /** The driver. */
  get driver(): EmbeddedDriver {
    return this.#driver;
  }

  /** The relay that it runs on. */
  get relay(): Relay {
    return this.#relay;
  }

  /** All memory counts as dirty for the time being: a queue has not left passthrough yet. */
  get markingAll(): boolean {
    return this.#relay.markingAll;
  }

  /** Turns the dirty log on, as a VMM does: from its return on every page that is written is marked. */
  async logOn(): Promise<void> {
    const size = Math.ceil(logBytes(this.map.endGpa) / 4096) * 4096;
    using fd = createMemfd("svq-dirty-log", size);
    this.#log = mapFd(fd.fd, { length: size, what: "dirty log" });
    const log = { fd: fd.fd, offset: 0, size };
    await this.#driver.setDirtyLog(log);
    await this.#relay.setLogBase(log);
    await this.#logRings(true);
    await this.#relay.setFeatures(this.#driver.features | VHOST_F_LOG_ALL);
  }

  // The guest's used rings are written by the relay: they are logged when a log address says so.
  async #logRings(on: boolean): Promise<void> {
    const { layout } = this.#driver;
    for (let queue = 0; queue < layout.options.queues; queue++) {
      const addresses = layout.addresses(queue);
      await this.#relay.setVringAddresses(queue, on ? { ...addresses, logGpa: addresses.used } : addresses);
    }
  }

  /** Moves what has been written since the last time into `into`. @returns dirty pages in `into` */
  harvest(into: DirtyBitmap): number {
    const harvested = DirtyBitmap.covering(this.map.endGpa);
    new DirtyBitmap(this.#log!.buffer()).harvest(harvested);
    this.filter?.(harvested);
    harvested.orInto(into);
    return into.count();
  }

  /**
   * Pauses the guest and takes the rings from the device. Afterwards memory does not change and the device is fenced.
   *
   * @param signal shortens the wait to a second: a device that hangs must not keep somebody who has cancelled
   * @throws SvqError DRAIN_TIMEOUT when the device keeps its rings for longer than `timeoutMs`; the reason of `signal`
   */
  async stop(timeoutMs: number, signal?: AbortSignal): Promise<void> {
    await this.#driver.pause();
    const stopping = this.#driver.stopRings();
    const end = Promise.withResolvers<"end">();
    const giveUp = () => end.resolve("end");
    const timer = setTimeout(giveUp, timeoutMs);
    let soon: ReturnType<typeof setTimeout> | undefined;
    const hurry = () => soon = setTimeout(giveUp, HELD_MS);
    signal?.addEventListener("abort", hurry, { once: true });
    if (signal?.aborted) hurry();
    try {
      if (await Promise.race([stopping, end.promise]) !== "end") return;
    } finally {
      clearTimeout(timer);
      clearTimeout(soon);
      signal?.removeEventListener("abort", hurry);
    }
    this.#stopping = stopping;
    signal?.throwIfAborted();
    throw drainTimeout(timeoutMs);
  }

  /**
   * Holds the guest still for a share of its time, so that it and its device write less.
   *
   * @param percent 0 to 99; 0: full speed
   */
  async throttle(percent: number): Promise<void> {
    if (percent === this.#throttled) return;
    this.#throttled = percent;
    await this.#driver.throttle(percent);
  }

  /** Has {@linkcode goOn} wait, after {@linkcode stop}: somebody else has a ring of the device until `release` is settled. */
  waitFor(release: Promise<unknown>): void {
    release.catch(() => {});
    this.#held = release;
  }

  /** All that the destination needs besides memory; after {@linkcode stop}. */
  async exportState(): Promise<DriverState> {
    const state = await this.#driver.exportState();
    const { document } = this.#relay.net;
    return document === undefined ? state : { ...state, net: document };
  }

  /** Undoes everything: the guest goes on here at full speed, without a log. */
  async goOn(): Promise<void> {
    await this.throttle(0);
    if (this.#held !== undefined) {
      const late = this.#held.catch(() => {}).then(() => this.#driver.continueHere());
      this.#held = undefined;
      this.#late = late.catch(() => {});
      // A device that hangs must not keep the caller; the guest goes on when it answers.
      let timer: ReturnType<typeof setTimeout> | undefined;
      await Promise.race([late, new Promise((resolve) => timer = setTimeout(resolve, HELD_MS))]).finally(() => clearTimeout(timer));
    } else if (this.#stopping === undefined) {
      await this.#driver.continueHere();
    } else {
      // The device has not given its rings back yet. The guest may go on meanwhile; its rings follow as soon as they can.
      const stopping = this.#stopping;
      this.#stopping = undefined;
      const late = stopping.then(() => this.#driver.continueHere());
      this.#late = late.catch(() => {});
      await this.#driver.unpause().catch(async (error) => {
        // It has just given them back.
        if (!(error instanceof SvqError && error.code === "RINGS_STOPPED")) throw error;
        await late;
      });
    }
    await this.logOff();
  }

  /** Resolves when rings that a slow device kept are back with it. */
  async settled(): Promise<void> {
    await this.#late;
  }

  /** Turns the dirty log off. */
  async logOff(): Promise<void> {
    if (this.#log === undefined) return;
    await this.#relay.setFeatures(this.#driver.features);
    await this.#driver.setDirtyLog(undefined);
    // The relay keeps a map of its own until the next log comes.
    this.#log.close();
    this.#log = undefined;
  }

  /** Frees the log. */
  [Symbol.dispose](): void {
    this.#log?.close();
    this.#log = undefined;
  }
}

/** The device does not let its rings go. */
export function drainTimeout(timeoutMs: number): SvqError {
  return new SvqError("DRAIN_TIMEOUT", `The device still holds requests ${timeoutMs} ms after its rings were to be stopped`, {
    exitCode: EXIT.migrationAborted,
    hint: "the guest goes on at the source; a longer --drain-timeout waits for longer",
  });
}
