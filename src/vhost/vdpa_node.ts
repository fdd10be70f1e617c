/**
 * The ioctls of a vhost-vdpa device as typed calls (linux/vhost.h), one to one and without any policy.
 *
 * @module
 */
import { ERRNO, SysError } from "../ffi/errno.ts";
import type { Mapping } from "../ffi/mapping.ts";
import {
  ACCESS,
  decodeVringState,
  encodeIotlbV2,
  encodeU64,
  encodeVdpaConfig,
  encodeVringAddr,
  encodeVringFile,
  encodeVringState,
  IOTLB,
  VHOST,
  VHOST_VDPA,
  viewOf,
} from "../uapi/vhost.ts";
import type { VringAddresses } from "./backend.ts";
import type { KernelDevice } from "./kernel_device.ts";

const PAGE = 4096;

/** Errnos by which a kernel says that it does not know a request, or a driver that it cannot do it. */
const UNKNOWN: readonly number[] = [ERRNO.ENOTTY, ERRNO.EOPNOTSUPP, ERRNO.EINVAL];

/** One range of the IOTLB. */
export interface IotlbRange {
  /** Start, bytes. */
  iova: number;
  /** Bytes. */
  size: number;
  /** Address in this process that it is mapped to. */
  address: number;
}

/** Typed ioctls over a {@linkcode KernelDevice}. Every method throws SysError named after its request. */
export class VdpaNode implements Disposable {
  /** Takes ownership of `device`. */
  constructor(readonly device: KernelDevice) {}

  #get(size: number, request: number, name: string): DataView<ArrayBuffer> {
    const bytes = new Uint8Array(size);
    this.device.ioctl(request, bytes, name);
    return viewOf(bytes);
  }

  #state(request: number, name: string, index: number, num = 0): number {
    const bytes = encodeVringState({ index, num });
    this.device.ioctl(request, bytes, name);
    return decodeVringState(bytes).num;
  }

  #word(request: number, name: string, value: bigint): void {
    this.device.ioctl(request, encodeU64(value), name);
  }

  /** VHOST_SET_OWNER: binds the device to this process's memory. @throws SysError EBUSY when it has an owner */
  setOwner(): void {
    this.device.ioctl(VHOST.SET_OWNER, null, "VHOST_SET_OWNER");
  }

  /** VHOST_GET_FEATURES. */
  features(): bigint {
    return this.#get(8, VHOST.GET_FEATURES, "VHOST_GET_FEATURES").getBigUint64(0, true);
  }

  /** VHOST_SET_FEATURES; before FEATURES_OK. */
  setFeatures(features: bigint): void {
    this.#word(VHOST.SET_FEATURES, "VHOST_SET_FEATURES", features);
  }

  /** VHOST_GET_BACKEND_FEATURES. */
  backendFeatures(): bigint {
    return this.#get(8, VHOST.GET_BACKEND_FEATURES, "VHOST_GET_BACKEND_FEATURES").getBigUint64(0, true);
  }

  /** VHOST_SET_BACKEND_FEATURES. */
  setBackendFeatures(features: bigint): void {
    this.#word(VHOST.SET_BACKEND_FEATURES, "VHOST_SET_BACKEND_FEATURES", features);
  }

  /** VHOST_VDPA_GET_DEVICE_ID: the virtio device id. */
  deviceId(): number {
    return this.#get(4, VHOST_VDPA.GET_DEVICE_ID, "VHOST_VDPA_GET_DEVICE_ID").getUint32(0, true);
  }

  /** VHOST_VDPA_GET_STATUS. */
  status(): number {
    return this.#get(1, VHOST_VDPA.GET_STATUS, "VHOST_VDPA_GET_STATUS").getUint8(0);
  }

  /** VHOST_VDPA_SET_STATUS; 0 resets. */
  setStatus(status: number): void {
    this.device.ioctl(VHOST_VDPA.SET_STATUS, Uint8Array.of(status), "VHOST_VDPA_SET_STATUS");
  }

  /** VHOST_VDPA_GET_CONFIG_SIZE, bytes. */
  configSize(): number {
    return this.#get(4, VHOST_VDPA.GET_CONFIG_SIZE, "VHOST_VDPA_GET_CONFIG_SIZE").getUint32(0, true);
  }

  /** VHOST_VDPA_GET_CONFIG. */
  config(offset: number, size: number): Uint8Array<ArrayBuffer> {
    const bytes = encodeVdpaConfig(offset, new Uint8Array(size));
    this.device.ioctl(VHOST_VDPA.GET_CONFIG, bytes, "VHOST_VDPA_GET_CONFIG");
    return bytes.slice(8);
  }

  /** VHOST_VDPA_SET_CONFIG. */
  setConfig(offset: number, config: Uint8Array<ArrayBuffer>): void {
    this.device.ioctl(VHOST_VDPA.SET_CONFIG, encodeVdpaConfig(offset, config), "VHOST_VDPA_SET_CONFIG");
  }

  /** VHOST_VDPA_GET_VRING_NUM: the largest ring, in descriptors. */
  vringNumMax(): number {
    return this.#get(2, VHOST_VDPA.GET_VRING_NUM, "VHOST_VDPA_GET_VRING_NUM").getUint16(0, true);
  }

  /** VHOST_VDPA_GET_VQS_COUNT; undefined before Linux 5.18. */
  vqsCount(): number | undefined {
    return this.#optional(() => this.#get(4, VHOST_VDPA.GET_VQS_COUNT, "VHOST_VDPA_GET_VQS_COUNT").getUint32(0, true));
  }

  /** VHOST_VDPA_GET_IOVA_RANGE: both ends inclusive. */
  iovaRange(): { first: bigint; last: bigint } {
    const view = this.#get(16, VHOST_VDPA.GET_IOVA_RANGE, "VHOST_VDPA_GET_IOVA_RANGE");
    return { first: view.getBigUint64(0, true), last: view.getBigUint64(8, true) };
  }

  /** VHOST_VDPA_GET_GROUP_NUM; undefined before Linux 6.0. */
  groupNum(): number | undefined {
    return this.#optional(() => this.#get(4, VHOST_VDPA.GET_GROUP_NUM, "VHOST_VDPA_GET_GROUP_NUM").getUint32(0, true));
  }

  /** VHOST_VDPA_GET_AS_NUM; undefined before Linux 6.0. */
  asNum(): number | undefined {
    return this.#optional(() => this.#get(4, VHOST_VDPA.GET_AS_NUM, "VHOST_VDPA_GET_AS_NUM").getUint32(0, true));
  }

  /** VHOST_VDPA_GET_VRING_GROUP; undefined where the driver has no groups. Needs an owner. */
  vringGroup(index: number): number | undefined {
    return this.#optional(() => this.#state(VHOST_VDPA.GET_VRING_GROUP, "VHOST_VDPA_GET_VRING_GROUP", index));
  }

  /** VHOST_VDPA_GET_VRING_DESC_GROUP; undefined where the driver has none. Needs an owner. */
  vringDescGroup(index: number): number | undefined {
    return this.#optional(() => this.#state(VHOST_VDPA.GET_VRING_DESC_GROUP, "VHOST_VDPA_GET_VRING_DESC_GROUP", index));
  }

  /** VHOST_VDPA_SET_GROUP_ASID. */
  setGroupAsid(group: number, asid: number): void {
    this.#state(VHOST_VDPA.SET_GROUP_ASID, "VHOST_VDPA_SET_GROUP_ASID", group, asid);
  }

  /** VHOST_SET_VRING_NUM: a power of two. */
  setVringNum(index: number, num: number): void {
    this.#state(VHOST.SET_VRING_NUM, "VHOST_SET_VRING_NUM", index, num);
  }

  /** VHOST_SET_VRING_ADDR with IOVAs. @throws SysError EINVAL after DRIVER_OK, unless suspended */
  setVringAddresses(index: number, { desc, avail, used }: VringAddresses): void {
    const record = encodeVringAddr({ index, flags: 0, desc, avail, used, logGuestAddr: 0 });
    this.device.ioctl(VHOST.SET_VRING_ADDR, record, "VHOST_SET_VRING_ADDR");
  }

  /** VHOST_SET_VRING_BASE. @throws SysError EINVAL after DRIVER_OK, unless suspended */
  setVringBase(index: number, base: number): void {
    this.#state(VHOST.SET_VRING_BASE, "VHOST_SET_VRING_BASE", index, base);
  }

  /** VHOST_GET_VRING_BASE. @throws SysError EOPNOTSUPP for drivers that cannot tell */
  vringBase(index: number): number {
    return this.#state(VHOST.GET_VRING_BASE, "VHOST_GET_VRING_BASE", index);
  }

  /** VHOST_SET_VRING_KICK. @param fd -1 unbinds */
  setVringKick(index: number, fd: number): void {
    this.device.ioctl(VHOST.SET_VRING_KICK, encodeVringFile(index, fd), "VHOST_SET_VRING_KICK");
  }

  /** VHOST_SET_VRING_CALL. @param fd -1 unbinds */
  setVringCall(index: number, fd: number): void {
    this.device.ioctl(VHOST.SET_VRING_CALL, encodeVringFile(index, fd), "VHOST_SET_VRING_CALL");
  }

  /** VHOST_SET_VRING_ERR. @param fd -1 unbinds */
  setVringErr(index: number, fd: number): void {
    this.device.ioctl(VHOST.SET_VRING_ERR, encodeVringFile(index, fd), "VHOST_SET_VRING_ERR");
  }

  /** VHOST_VDPA_SET_VRING_ENABLE. */
  setVringEnable(index: number, enabled: boolean): void {
    this.#state(VHOST_VDPA.SET_VRING_ENABLE, "VHOST_VDPA_SET_VRING_ENABLE", index, enabled ? 1 : 0);
  }

  /** VHOST_VDPA_SET_CONFIG_CALL. @param fd -1 unbinds */
  setConfigCall(fd: number): void {
    const bytes = new Uint8Array(4);
    viewOf(bytes).setInt32(0, fd, true);
    this.device.ioctl(VHOST_VDPA.SET_CONFIG_CALL, bytes, "VHOST_VDPA_SET_CONFIG_CALL");
  }

  /** VHOST_VDPA_SUSPEND. */
  suspend(): void {
    this.device.ioctl(VHOST_VDPA.SUSPEND, null, "VHOST_VDPA_SUSPEND");
  }

  /** VHOST_VDPA_RESUME. */
  resume(): void {
    this.device.ioctl(VHOST_VDPA.RESUME, null, "VHOST_VDPA_RESUME");
  }

  /** IOTLB UPDATE, readable and writable. @throws SysError EFAULT whatever is wrong: range, overlap, pin limit */
  map(range: IotlbRange, asid: number): void {
    const message = { iova: range.iova, size: range.size, uaddr: range.address, perm: ACCESS.RW, type: IOTLB.UPDATE };
    this.device.write(encodeIotlbV2(message, asid), "VHOST_IOTLB_UPDATE");
  }

  /** IOTLB INVALIDATE. */
  unmap(range: Pick<IotlbRange, "iova" | "size">, asid: number): void {
    const message = { iova: range.iova, size: range.size, uaddr: 0, perm: 0, type: IOTLB.INVALIDATE };
    this.device.write(encodeIotlbV2(message, asid), "VHOST_IOTLB_INVALIDATE");
  }

  /** IOTLB BATCH_BEGIN: maps of this address space reach the driver together at {@linkcode endBatch}. */
  beginBatch(asid: number): void {
    this.#batch(IOTLB.BATCH_BEGIN, asid, "VHOST_IOTLB_BATCH_BEGIN");
  }

  /** IOTLB BATCH_END. */
  endBatch(asid: number): void {
    this.#batch(IOTLB.BATCH_END, asid, "VHOST_IOTLB_BATCH_END");
  }

  #batch(type: number, asid: number, name: string): void {
    this.device.write(encodeIotlbV2({ iova: 0, size: 0, uaddr: 0, perm: 0, type }, asid), name);
  }

  /** The doorbell page of a ring, mapped write-only; undefined where the parent has none. */
  doorbell(index: number): Mapping | undefined {
    try {
      return this.device.mapPage(index * PAGE);
    } catch {
      return undefined;
    }
  }

  #optional<T>(ask: () => T): T | undefined {
    try {
      return ask();
    } catch (error) {
      if (error instanceof SysError && UNKNOWN.includes(error.errno)) return undefined;
      throw error;
    }
  }

  /** Closes the device. */
  [Symbol.dispose](): void {
    this.device.close();
  }
}
