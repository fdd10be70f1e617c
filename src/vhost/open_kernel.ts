/**
 * From a device address to an open kernel device.
 *
 * @module
 */
import type { VdpaNameAddress, VdpaPathAddress, VhostNetAddress } from "./address.ts";
import { formatDeviceAddress } from "./address.ts";
import { tapMissing, VhostNet } from "./net.ts";
import { findByNode, nodeOfName } from "./sysfs.ts";
import { VhostVdpa } from "./vdpa.ts";

/** Addresses of kernel devices. */
export type KernelAddress = VdpaPathAddress | VdpaNameAddress | VhostNetAddress;

/**
 * Opens a kernel device, exclusively.
 *
 * @throws SvqError NO_SUCH_DEVICE, MODULE_MISSING, NOT_VHOST, DEVICE_IN_USE, PERMISSION, TAP_MISSING
 */
export function openKernel(parsed: KernelAddress): VhostVdpa | VhostNet {
  const address = formatDeviceAddress(parsed);
  if (parsed.kind === "vhost-net") {
    if (parsed.tap === undefined) throw tapMissing(parsed.path);
    return VhostNet.open(parsed.path, parsed.tap, { address });
  }
  // What is believed of a device depends on its driver.
  const listing = parsed.kind === "vdpa" ? nodeOfName(parsed.name) : findByNode(parsed.path);
  const path = parsed.kind === "vdpa" ? (listing as { node: string }).node : parsed.path;
  return VhostVdpa.open(path, { driver: listing?.driver, address, reserved: listing?.reserved });
}
