/**
 * The device status byte between a guest and a device (virtio 1.3, 2.1).
 *
 * @module
 */
import { hasBit } from "../uapi/bits.ts";
import { PROTOCOL_FEATURE } from "../uapi/vhost_user.ts";
import { VIRTIO_STATUS } from "../uapi/virtio.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import type { DeviceSlot } from "./device_slot.ts";

const { ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET } = VIRTIO_STATUS;
const RUNNING_STATUS = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

/** What the guest has set, and what the device was told. */
export class DeviceStatus {
  readonly #slot: DeviceSlot;
  #byGuest = false;
  #driverOk = false;
  #status = 0;

  /** Nothing was set. */
  constructor(slot: DeviceSlot) {
    this.#slot = slot;
  }

  get #isKernel(): boolean {
    const { kind } = this.#slot.device.info;
    return kind === "vhost-vdpa" || kind === "vhost-net";
  }

  /** What the guest has set; undefined where it never did. */
  get given(): number | undefined {
    return this.#byGuest ? this.#status : undefined;
  }

  /** The status as the guest reads it. @param needsReset a queue has failed */
  async get(needsReset: boolean): Promise<number> {
    const status = this.#isKernel ? this.#status : await this.#slot.use((device) => device.getStatus());
    return needsReset && status !== 0 ? status | NEEDS_RESET : status;
  }

  /** The guest sets the status; 0 is a reset. */
  async set(status: number): Promise<void> {
    this.#byGuest = status !== 0;
    this.#driverOk = false;
    // NEEDS_RESET is the device's to set.
    this.#status = status & ~NEEDS_RESET;
    if (!this.#isKernel) await this.#slot.use((device) => device.setStatus(this.#status));
    else if (status === 0) await this.#slot.device.reset();
  }

  /** The device is reset, by another message. */
  clear(): void {
    this.#driverOk = this.#byGuest = false;
    this.#status = 0;
  }

  /** A front-end without STATUS never says DRIVER_OK, and a device with it may wait for that before it touches a ring. */
  async ensureDriverOk(): Promise<void> {
    const { device } = this.#slot;
    // Kernel devices say DRIVER_OK by themselves, when all of their rings are set up.
    if (this.#isKernel || this.#byGuest || this.#driverOk || !hasBit(device.info.protocolFeatures, PROTOCOL_FEATURE.STATUS)) return;
    await device.setStatus(RUNNING_STATUS);
    this.#driverOk = true;
  }

  /** The successor of a lost device, before its rings start. */
  async beforeRings(device: VhostBackend): Promise<void> {
    if (this.#driverOk) await device.setStatus(RUNNING_STATUS);
  }

  /** The same, when they have been started. */
  async afterRings(device: VhostBackend): Promise<void> {
    if (this.#byGuest) await device.setStatus(this.#status);
  }
}
