/**
 * From a device address to a device that can be driven.
 *
 * @module
 */
import { dupFd, listenUnix, type OwnedFd, UnixListener } from "../ffi/mod.ts";
import { type DeviceAddress, formatDeviceAddress, parseDeviceAddress, type SimAddress } from "../vhost/address.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import { openKernel } from "../vhost/open_kernel.ts";
import type { MessageHook } from "../vhost_user/connection.ts";
import { VhostUserFrontEnd } from "../vhost_user/front_end.ts";
import type { SimOptions } from "./options.ts";
import { SimDevice } from "./sim_device.ts";

/** The options of an embedded device's address. */
export function simOptions(address: SimAddress): SimOptions {
  const { queues, num, latency, jitter, packed } = address;
  const options: SimOptions = {
    kind: address.device,
    ...(queues === undefined ? {} : { queues }),
    ...(num === undefined ? {} : { num }),
    ...(latency === undefined ? {} : { latencyUs: latency / 1000 }),
    ...(jitter === undefined ? {} : { jitterUs: jitter / 1000 }),
    ...(packed === undefined ? {} : { packed }),
  };
  if (address.device === "net") {
    const { tap, cable, mac, mtu } = address;
    return {
      ...options,
      ...(tap === undefined ? {} : { tap }),
      ...(cable === undefined ? {} : { cable }),
      ...(mac === undefined ? {} : { mac }),
      ...(mtu === undefined ? {} : { mtu }),
    };
  }
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

/** Opens an embedded device. @param backing its disk, where that is open already @throws SvqError BAD_DEVICE_OPTION, CABLE_IN_USE, and of the disk's file */
export async function openSim(address: SimAddress, backing?: OwnedFd): Promise<SimDevice> {
  const options = { ...simOptions(address), ...(backing === undefined ? {} : { backing }) };
  return await SimDevice.open(options, formatDeviceAddress(address));
}

// The device connects to us: one connection, then the socket's path is gone again.
async function acceptDevice(path: string): Promise<VhostBackend> {
  using listener = listenUnix(path);
  return await VhostUserFrontEnd.fromStream(await listener.accept(), { address: `listen:${path}` });
}

/** How a device is opened. */
export interface OpenOptions {
  /** Sees every message of a vhost-user device. */
  onMessage?: MessageHook | undefined;
}

/**
 * A device that can be opened again and again: where it connects to us, its socket stays open all the time, so that it can come
 * back whenever it wants to.
 */
export class DeviceSource implements Disposable {
  readonly #address: DeviceAddress;
  readonly #listener: UnixListener | undefined;
  #backing: OwnedFd | undefined;

  /**
   * Listens, where the device connects.
   *
   * @param handed what {@linkcode DeviceSource.keep} gave in another process; owned
   * @throws SvqError USAGE for a bad address, SysError EADDRINUSE
   */
  constructor(address: DeviceAddress | string, handed: { listener?: OwnedFd | undefined; backing?: OwnedFd | undefined } = {}) {
    this.#address = typeof address === "string" ? parseDeviceAddress(address) : address;
    this.#backing = handed.backing;
    const listens = this.#address.kind === "vhost-user" && this.#address.how === "listen" ? this.#address.path : undefined;
    if (listens === undefined) handed.listener?.close();
    else this.#listener = handed.listener === undefined ? listenUnix(listens) : new UnixListener(handed.listener, listens);
  }

  /** The socket on which the device connects to us. */
  get listener(): UnixListener | undefined {
    return this.#listener;
  }

  /** Keeps what of a device would be gone with it, a disk in memory: the next {@linkcode DeviceSource.open} uses it again. @returns it, borrowed */
  keep(device: VhostBackend): number | undefined {
    if (!(device instanceof SimDevice) || device.backing === undefined) return undefined;
    this.#backing?.close();
    this.#backing = device.backing.dup();
    return this.#backing.fd;
  }

  /** Does the device connect to us? Then {@linkcode DeviceSource.open} waits until it does. */
  get listens(): boolean {
    return this.#listener !== undefined;
  }

  /** Opens it. @throws what {@linkcode openDevice} does, and CLOSED after {@linkcode DeviceSource.close} */
  async open(options: OpenOptions = {}): Promise<VhostBackend> {
    if (this.#address.kind === "sim") return await openSim(this.#address, this.#backing);
    if (this.#listener === undefined) return await openDevice(this.#address, options);
    return await VhostUserFrontEnd.fromStream(await this.#listener.accept(), {
      address: formatDeviceAddress(this.#address),
      onMessage: options.onMessage,
    });
  }

  /** Stops listening; an `open` that waits rejects. */
  close(): void {
    this.#listener?.close();
    this.#backing?.close();
    this.#backing = undefined;
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}

/**
 * Opens a device: an embedded one, one of the kernel, or a vhost-user device behind a socket (`listen:` waits until one connects).
 *
 * @param address parsed, or as typed
 * @throws SvqError USAGE for a bad address, and of connecting
 */
export async function openDevice(address: DeviceAddress | string, options: OpenOptions = {}): Promise<VhostBackend> {
  const parsed = typeof address === "string" ? parseDeviceAddress(address) : address;
  switch (parsed.kind) {
    case "sim":
      return await openSim(parsed);
    case "vhost-user":
      if (parsed.how === "listen") return await acceptDevice(parsed.path);
      return await VhostUserFrontEnd.connect(parsed.path, { address: formatDeviceAddress(parsed), ...options });
    case "fd":
      return await VhostUserFrontEnd.fromFd(dupFd(parsed.fd), { address: formatDeviceAddress(parsed), ...options });
    default:
      return openKernel(parsed);
  }
}
