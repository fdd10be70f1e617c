/**
 * Split virtqueues from both sides (virtio 1.3, 2.7).
 *
 * @module
 */
export { SplitDevice, type SplitDeviceOptions } from "./split_device.ts";
export { type IndirectArea, SplitDriver, type SplitDriverOptions } from "./split_driver.ts";
