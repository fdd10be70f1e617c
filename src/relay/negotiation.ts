/**
 * Features between a guest and a device: what the guest is offered, what it took, and what the device is told of that.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import { MASKED_FEATURES, maskedOf } from "../vhost/masked.ts";
import type { DeviceSlot } from "./device_slot.ts";
import type { RelayConfig } from "./relay_config.ts";

/** The VMM turns the dirty log on with it; never set at the device. */
export const VHOST_F_LOG_ALL: bigint = 1n << 26n;

const ACCESS_PLATFORM = 1n << 33n;
const INDIRECT_DESC = 1n << 28n;
const RING_PACKED = 1n << 34n;
const IN_ORDER = 1n << 35n;

/** The features of both sides. */
export class Negotiation {
  readonly #slot: DeviceSlot;
  readonly #config: RelayConfig;
  #features = 0n;
  #set = false;
  #devicePacked = false;
  #word = 0n;
  #offered: bigint | undefined;
  readonly #extra: (guest: bigint, offered: bigint) => Promise<bigint>;

  /** Nothing is asked of the device yet. @param extra what the relay takes besides the guest's features */
  constructor(slot: DeviceSlot, config: RelayConfig, extra: (guest: bigint, offered: bigint) => Promise<bigint>) {
    this.#slot = slot;
    this.#extra = extra;
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

  /** What the guest is offered, as far as the device was asked. */
  get offered(): bigint | undefined {
    return this.#offered === undefined ? undefined : this.#toGuest(this.#offered);
  }

  // They do not change while the device is there, and are asked for often: QEMU does it to know that it was heard.
  async #deviceFeatures(): Promise<bigint> {
    return this.#offered ??= await this.#slot.use((device) => device.getFeatures());
  }

  /** What the guest is offered. */
  async offer(): Promise<bigint> {
    return this.#toGuest(await this.#deviceFeatures());
  }

  #toGuest(features: bigint): bigint {
    const { guestRing, inOrder, guestIommu } = this.#config;
    let offered = features & ~MASKED_FEATURES;
    if (guestIommu) offered |= ACCESS_PLATFORM;
    if (guestRing !== "auto") offered = guestRing === "packed" ? offered | RING_PACKED : offered & ~RING_PACKED;
    if (inOrder !== "auto") offered = inOrder === "on" ? offered | IN_ORDER : offered & ~IN_ORDER;
    return offered;
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
    const devicePacked = await this.#chooseDeviceRing((features & RING_PACKED) !== 0n);
    const word = await this.#wordOf(features, devicePacked);
    this.#checkRingSize();
    await this.#slot.use((device) => device.setFeatures(word));
    this.#devicePacked = devicePacked;
    this.#word = word;
    this.#features = features;
    this.#set = true;
  }

  async #wordOf(features: bigint, devicePacked: boolean): Promise<bigint> {
    let word = devicePacked ? features | RING_PACKED : features & ~RING_PACKED;
    // What the guest's IOMMU does is the relay's work; a device that wants the bit for itself gets it from its driver here.
    word &= ~ACCESS_PLATFORM;
    if (this.#config.indirect === "flatten") word &= ~INDIRECT_DESC;
    // Offered by the relay alone: then the order is the relay's work.
    const offered = await this.#deviceFeatures();
    if ((offered & IN_ORDER) === 0n) word &= ~IN_ORDER;
    return word | await this.#extra(features, offered);
  }

  /** What the device was told. */
  get deviceFeatures(): bigint {
    return this.#word;
  }

  /** Do the guest's rings and descriptors name addresses of an IOMMU of its own? */
  get iommu(): boolean {
    return (this.#features & ACCESS_PLATFORM) !== 0n;
  }

  /** What the device offers and the guest does not see, and why. */
  get masked(): { feature: string; reason: string }[] {
    const { inOrder, guestIommu } = this.#config;
    const offered = this.#offered ?? 0n;
    const hidden = maskedOf(guestIommu ? offered & ~ACCESS_PLATFORM : offered, 0n).map(({ name, text }) => ({
      feature: name,
      reason: text,
    }));
    if (inOrder === "off" && (offered & IN_ORDER) !== 0n) hidden.push({ feature: "IN_ORDER", reason: "Hidden by --in-order off" });
    return hidden;
  }

  /** Does the guest make chains that the device cannot be given as they are, so that they are rebuilt? */
  get rebuilt(): boolean {
    return this.iommu || this.#devicePacked !== this.guestPacked || (this.#features & ~this.#word & INDIRECT_DESC) !== 0n;
  }

  /** Does the guest want its buffers back in order from a device that does not keep it? */
  get reordered(): boolean {
    return (this.#features & ~this.#word & IN_ORDER) !== 0n;
  }

  #checkRingSize(): void {
    const { deviceRingSize } = this.#config;
    const { address, vringNumMax } = this.#slot.device.info;
    if (deviceRingSize !== undefined && vringNumMax !== undefined && deviceRingSize > vringNumMax) {
      throw new SvqError("BAD_RING_SIZE", `${address} has rings of up to ${vringNumMax} descriptors, not ${deviceRingSize}`);
    }
  }

  /** Most descriptors in a ring of the device, where that is known; the guest may have more. */
  get deviceRingLimit(): number | undefined {
    return this.#config.deviceRingSize ?? this.#slot.device.info.vringNumMax;
  }

  /** Descriptors in the device's ring for a guest's ring of `num`: a split ring needs a power of two, a packed one may have any number. */
  deviceNum(num: number): number {
    const { deviceRingSize } = this.#config;
    const { vringNumMax } = this.#slot.device.info;
    if (this.#devicePacked) return deviceRingSize ?? Math.min(num, vringNumMax ?? num);
    if (deviceRingSize !== undefined) return 2 ** Math.floor(Math.log2(deviceRingSize));
    const whole = 2 ** Math.ceil(Math.log2(num));
    return vringNumMax === undefined || whole <= vringNumMax ? whole : 2 ** Math.floor(Math.log2(vringNumMax));
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
    const word = this.#word;
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
