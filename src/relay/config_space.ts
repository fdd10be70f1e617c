/**
 * The device's configuration space as the guest sees it.
 *
 * @module
 */
import type { VhostBackend } from "../vhost/backend.ts";
import { clampedConfig, segmentLimit } from "./config_clamp.ts";
import type { DeviceSlot } from "./device_slot.ts";
import type { Negotiation } from "./negotiation.ts";

/** The configuration space of a relay's device. */
export class ConfigSpace {
  readonly #slot: DeviceSlot;
  readonly #negotiation: Negotiation;
  #seen: Uint8Array<ArrayBuffer> | undefined;

  /** Nothing was read. */
  constructor(slot: DeviceSlot, negotiation: Negotiation) {
    this.#slot = slot;
    this.#negotiation = negotiation;
  }

  /** It as the front-end last read it from its start. */
  get seen(): Uint8Array<ArrayBuffer> | undefined {
    return this.#seen;
  }

  /** Reads `size` bytes at `offset`, with what svq changes in them. */
  async read(offset: number, size: number): Promise<Uint8Array<ArrayBuffer>> {
    const bytes = await this.#slot.use((device) => this.#readFrom(device, offset, size));
    if (offset === 0) this.#seen = bytes.slice();
    return bytes;
  }

  // A request that the guest may make must fit the device's ring.
  async #readFrom(device: VhostBackend, offset: number, size: number): Promise<Uint8Array<ArrayBuffer>> {
    const read = (at: number, bytes: number) => device.getConfig(at, bytes);
    const num = this.#negotiation.deviceRingLimit;
    if (num === undefined) return await read(offset, size);
    const limit = segmentLimit(device.info, await device.getFeatures());
    return limit === undefined ? await read(offset, size) : await clampedConfig(read, offset, size, limit, num);
  }

  /** Is it other than what the front-end last read? A disk may have been resized while nobody was there to tell. */
  async changed(): Promise<boolean> {
    const seen = this.#seen;
    if (seen === undefined) return false;
    const now = await this.#readFrom(this.#slot.device, 0, seen.length);
    return now.some((byte, i) => byte !== seen[i]);
  }
}
