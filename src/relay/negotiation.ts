/**
 * Features between a guest and a device: what the guest is offered, what it took, and what the device is told of that.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import { MASKED_FEATURES } from "../vhost/masked.ts";
import type { DeviceSlot } from "./device_slot.ts";
import type { RelayConfig } from "./relay_config.ts";

/** The VMM turns the dirty log on with it; never set at the device. */
export const VHOST_F_LOG_ALL: bigint = 1n << 26n;

const RING_PACKED = 1n << 34n;

/** The features of both sides. */
export class Negotiation {
  readonly #slot: DeviceSlot;
  readonly #config: RelayConfig;
  #features = 0n;
  #set = false;
  #devicePacked = false;
  #offered: bigint | undefined;

  /** Nothing is asked of the device yet. */
  constructor(slot: DeviceSlot, config: RelayConfig) {
    this.#slot = slot;
    this.#config = config;
  }

  /** What the guest took, without LOG_ALL. */
  get features(): bigint {
    return this.#features;
  }

  /** Has the guest taken features? */
  get set(): boolean {
    return this.#set;
  }

  /** Does the guest have packed rings? */
  get guestPacked(): boolean {
    return (this.#features & RING_PACKED) !== 0n;
  }

  /** Does the device have packed rings? */
  get devicePacked(): boolean {
    return this.#devicePacked;
  }

  /** What the device offers, as far as it was asked. */
  get offered(): bigint | undefined {
    return this.#offered;
  }

  // They do not change while the device is there, and are asked for often: QEMU does it to know that it was heard.
  async #deviceFeatures(): Promise<bigint> {
    return this.#offered ??= await this.#slot.use((device) => device.getFeatures());
  }

  /** What the guest is offered. */
  async offer(): Promise<bigint> {
    const offered = await this.#deviceFeatures() & ~MASKED_FEATURES;
    const { guestRing } = this.#config;
    if (guestRing === "auto") return offered;
    return guestRing === "packed" ? offered | RING_PACKED : offered & ~RING_PACKED;
  }

  /**
   * The guest takes `features`; the device is told where they are news.
   *
   * @param features without LOG_ALL
   * @throws SvqError FEATURES_NOT_OFFERED, MISSING_FEATURE, and what the device says
   */
  async acknowledge(features: bigint): Promise<void> {
    const foreign = features & ~await this.offer();
    if (foreign !== 0n) {
      throw new SvqError("FEATURES_NOT_OFFERED", `Features 0x${foreign.toString(16)} were set that the device does not offer`);
    }
    if (this.#set && features === this.#features) return;
    this.#devicePacked = await this.#chooseDeviceRing((features & RING_PACKED) !== 0n);
    await this.#slot.use((device) => device.setFeatures(this.#word(features)));
    this.#features = features;
    this.#set = true;
  }

  #word(features: bigint): bigint {
    return this.#devicePacked ? features | RING_PACKED : features & ~RING_PACKED;
  }

  async #chooseDeviceRing(guestPacked: boolean): Promise<boolean> {
    const has = (await this.#deviceFeatures() & RING_PACKED) !== 0n;
    const { deviceRing } = this.#config;
    if (deviceRing === "packed" && !has) {
      throw new SvqError("MISSING_FEATURE", `${this.#slot.device.info.address} has no packed rings`, {
        exitCode: EXIT.missingFeature,
        hint: "Leave --device-ring out, or set it to split",
      });
    }
    return deviceRing === "auto" ? guestPacked && has : deviceRing === "packed";
  }

  /**
   * Can `device` take the place of the one that was lost?
   *
   * @returns what does the rest when it is in its place
   * @throws SvqError FEATURES_CHANGED
   */
  async compare(device: VhostBackend): Promise<() => Promise<void>> {
    const offered = await device.getFeatures();
    const word = this.#word(this.#features);
    const missing = word & ~offered;
    if (this.#set && missing !== 0n) {
      throw new SvqError("FEATURES_CHANGED", `The device has come back without features that the guest uses: 0x${missing.toString(16)}`);
    }
    return async () => {
      if (this.#set) await device.setFeatures(word);
      this.#offered = offered;
    };
  }
}
