/**
 * From a device address to a device that can be driven.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { dupFd, listenUnix } from "../ffi/mod.ts";
import { type DeviceAddress, formatDeviceAddress, parseDeviceAddress, type SimAddress } from "../vhost/address.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import { openKernel } from "../vhost/open_kernel.ts";
import { VhostUserFrontEnd } from "../vhost_user/front_end.ts";
import type { SimOptions } from "./options.ts";
import { SimDevice } from "./sim_device.ts";

/** The options of an embedded device's address. @throws SvqError UNSUPPORTED_DEVICE for kinds that are not embedded here */
export function simOptions(address: SimAddress): SimOptions {
  const { queues, num, latency, jitter, packed } = address;
  if (address.device === "net") throw unsupported(address, "There is no embedded net device in this build");
  const options: SimOptions = {
    kind: address.device,
    ...(queues === undefined ? {} : { queues }),
    ...(num === undefined ? {} : { num }),
    ...(latency === undefined ? {} : { latencyUs: latency / 1000 }),
    ...(jitter === undefined ? {} : { jitterUs: jitter / 1000 }),
    ...(packed === undefined ? {} : { packed }),
  };
  if (address.device !== "blk") return options;
  const { file, size, ro, id } = address;
  return {
    ...options,
    ...(file === undefined ? {} : { file }),
    ...(size === undefined ? {} : { size }),
    ...(ro === undefined ? {} : { readOnly: ro }),
    ...(id === undefined ? {} : { id }),
  };
}

function unsupported(address: DeviceAddress, message: string): SvqError {
  return new SvqError("UNSUPPORTED_DEVICE", `${formatDeviceAddress(address)}: ${message}`, { exitCode: EXIT.usage });
}

/** Opens an embedded device. @throws SvqError BAD_DEVICE_OPTION, UNSUPPORTED_DEVICE, and of the disk's file */
export async function openSim(address: SimAddress): Promise<SimDevice> {
  return await SimDevice.open(simOptions(address), formatDeviceAddress(address));
}

// The device connects to us: one connection, then the socket's path is gone again.
async function acceptDevice(path: string): Promise<VhostBackend> {
  using listener = listenUnix(path);
  return await VhostUserFrontEnd.fromStream(await listener.accept(), { address: `listen:${path}` });
}

/**
 * Opens a device: an embedded one, one of the kernel, or a vhost-user device behind a socket (`listen:` waits until one connects).
 *
 * @param address parsed, or as typed
 * @throws SvqError USAGE for a bad address, UNSUPPORTED_DEVICE, and of connecting
 */
export async function openDevice(address: DeviceAddress | string): Promise<VhostBackend> {
  const parsed = typeof address === "string" ? parseDeviceAddress(address) : address;
  switch (parsed.kind) {
    case "sim":
      return await openSim(parsed);
    case "vhost-user":
      if (parsed.how === "listen") return await acceptDevice(parsed.path);
      return await VhostUserFrontEnd.connect(parsed.path, { address: formatDeviceAddress(parsed) });
    case "fd":
      return await VhostUserFrontEnd.fromFd(dupFd(parsed.fd), { address: formatDeviceAddress(parsed) });
    default:
      return openKernel(parsed);
  }
}
