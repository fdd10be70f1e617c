/**
 * An embedded guest with all that belongs to it: driver, relay and device.
 *
 * @module
 */
import { type DriverOptions, EmbeddedDriver } from "../drivers/embedded_driver.ts";
import { Relay, type RelayConfig } from "../relay/relay.ts";
import type { VhostBackend } from "../vhost/backend.ts";

/** Where the log lines of a guest's relay go. */
export type GuestLog = (level: "error" | "warning" | "info" | "debug", message: string) => void;

/** A guest on its relay. It owns driver, relay and device. */
export class Guest implements AsyncDisposable {
  #closing: Promise<void> | undefined;

  /** Takes ownership of all three. */
  constructor(
    /** Drives. */
    readonly driver: EmbeddedDriver,
    /** Between driver and device. */
    readonly relay: Relay,
    /** The device. */
    readonly device: VhostBackend,
  ) {}

  /**
   * Starts a guest on a device; its workload does not run yet.
   *
   * @param device taken over, also when this fails
   */
  static async open(device: VhostBackend, config: RelayConfig, options: DriverOptions, log: GuestLog): Promise<Guest> {
    let relay: Relay | undefined;
    try {
      relay = newRelay(device, config, log);
      return new Guest(await EmbeddedDriver.open(relay, options), relay, device);
    } catch (error) {
      await relay?.close();
      await device.close();
      throw error;
    }
  }

  /** Ends the guest and closes everything. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    await this.driver.close();
    await this.relay.close();
    await this.device.close();
  }

  /** The same as {@linkcode close}. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

/** A relay whose messages go to `log`. */
export function newRelay(device: VhostBackend, config: RelayConfig, log: GuestLog): Relay {
  return new Relay(device, config, {
    log: (message) => log("debug", `relay: ${message}`),
    error: (error) => log("error", `relay: ${error.message}`),
  });
}
