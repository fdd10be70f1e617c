/**
 * Packed virtqueues from both sides (virtio 1.3, 2.8).
 *
 * @module
 */
export { PackedDevice, type PackedDeviceOptions } from "./packed_device.ts";
export { PackedDriver, type PackedDriverOptions } from "./packed_driver.ts";
export { completePackedBase, PACKED_BASE_START, packedBase, packedDistance, packedPosition } from "./packed_event.ts";
