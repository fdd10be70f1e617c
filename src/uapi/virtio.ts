/**
 * Numbers that all virtio devices share: device ids, status bits, feature bits and their names. Source: virtio 1.3, 2.1, 2.2,
 * 5 and 6; linux/virtio_config.h, linux/virtio_ids.h, linux/vhost.h. Ring formats: src/vring/layout.ts.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { VIRTIO_BLK_FEATURE_BITS } from "./virtio_blk.ts";
import { VIRTIO_NET_FEATURE_BITS } from "./virtio_net.ts";

/** Device ids (virtio 1.3, 5) by name. */
export const VIRTIO_ID = {
  net: 1,
  blk: 2,
  console: 3,
  rng: 4,
  balloon: 5,
  scsi: 8,
  "9p": 9,
  gpu: 16,
  input: 18,
  vsock: 19,
  crypto: 20,
  iommu: 23,
  mem: 24,
  snd: 25,
  fs: 26,
  pmem: 27,
  i2c: 34,
  gpio: 41,
  spi: 45,
} as const;

/** Short name of a device, as in {@linkcode VIRTIO_ID}. */
export type VirtioDeviceName = keyof typeof VIRTIO_ID;

/** Bits of the device status field (virtio 1.3, 2.1; SUSPEND from 1.4); writing 0 resets. */
export const VIRTIO_STATUS = {
  ACKNOWLEDGE: 1,
  DRIVER: 2,
  DRIVER_OK: 4,
  FEATURES_OK: 8,
  SUSPEND: 16,
  NEEDS_RESET: 64,
  FAILED: 128,
} as const;

/** Feature bits of the transport and the rings (virtio 1.3, 6), by kernel name without prefix: bit numbers. */
export const VIRTIO_FEATURE_BITS = {
  NOTIFY_ON_EMPTY: 24,
  ANY_LAYOUT: 27,
  INDIRECT_DESC: 28,
  EVENT_IDX: 29,
  VERSION_1: 32,
  ACCESS_PLATFORM: 33,
  RING_PACKED: 34,
  IN_ORDER: 35,
  ORDER_PLATFORM: 36,
  SR_IOV: 37,
  NOTIFICATION_DATA: 38,
  NOTIF_CONFIG_DATA: 39,
  RING_RESET: 40,
  ADMIN_VQ: 41,
  SUSPEND: 43,
} as const;

/** Bits that vhost puts among the virtio features: bit numbers. Bit 27 is VIRTIO_NET_HDR for vhost-net, ANY_LAYOUT otherwise. */
export const VHOST_FEATURE_BITS = {
  LOG_ALL: 26,
  PROTOCOL_FEATURES: 30,
} as const;

/** Legacy: call when the ring runs empty even if calls are suppressed. */
export const VIRTIO_F_NOTIFY_ON_EMPTY: bigint = 1n << 24n;
/** vhost: log every write to guest memory. */
export const VHOST_F_LOG_ALL: bigint = 1n << 26n;
/** Legacy: any layout of a request in descriptors; implied by VERSION_1. */
export const VIRTIO_F_ANY_LAYOUT: bigint = 1n << 27n;
/** vhost-net: the device adds and strips the packet header (same bit as ANY_LAYOUT). */
export const VHOST_NET_F_VIRTIO_NET_HDR: bigint = 1n << 27n;
/** Indirect descriptor tables. */
export const VIRTIO_RING_F_INDIRECT_DESC: bigint = 1n << 28n;
/** Notification suppression by index. */
export const VIRTIO_RING_F_EVENT_IDX: bigint = 1n << 29n;
/** vhost-user: protocol features exist. */
export const VHOST_USER_F_PROTOCOL_FEATURES: bigint = 1n << 30n;
/** virtio 1.0 or later. */
export const VIRTIO_F_VERSION_1: bigint = 1n << 32n;
/** Addresses are subject to an IOMMU. */
export const VIRTIO_F_ACCESS_PLATFORM: bigint = 1n << 33n;
/** Packed rings. */
export const VIRTIO_F_RING_PACKED: bigint = 1n << 34n;
/** Buffers are used in the order in which they were made available. */
export const VIRTIO_F_IN_ORDER: bigint = 1n << 35n;
/** Memory accesses are ordered as the platform orders them. */
export const VIRTIO_F_ORDER_PLATFORM: bigint = 1n << 36n;
/** Single-root I/O virtualisation. */
export const VIRTIO_F_SR_IOV: bigint = 1n << 37n;
/** A kick carries the ring position. */
export const VIRTIO_F_NOTIFICATION_DATA: bigint = 1n << 38n;
/** A kick carries data that the device chose. */
export const VIRTIO_F_NOTIF_CONFIG_DATA: bigint = 1n << 39n;
/** Queues can be reset one by one. */
export const VIRTIO_F_RING_RESET: bigint = 1n << 40n;
/** The device has administration queues. */
export const VIRTIO_F_ADMIN_VQ: bigint = 1n << 41n;
/** The device can be suspended through its status (virtio 1.4). */
export const VIRTIO_F_SUSPEND: bigint = 1n << 43n;

const COMMON: Readonly<Record<string, number>> = { ...VIRTIO_FEATURE_BITS, ...VHOST_FEATURE_BITS };
const BY_DEVICE = new Map<number, Readonly<Record<string, number>>>([
  [VIRTIO_ID.net, VIRTIO_NET_FEATURE_BITS],
  [VIRTIO_ID.blk, VIRTIO_BLK_FEATURE_BITS],
]);

function nameIn(bits: Readonly<Record<string, number>> | undefined, bit: number): string | undefined {
  return bits === undefined ? undefined : Object.keys(bits).find((name) => bits[name] === bit);
}

/** The short name of a device id; `device_N` for an unknown one. */
export function deviceName(deviceId: number): string {
  return nameIn(VIRTIO_ID, deviceId) ?? `device_${deviceId}`;
}

/** The name of one feature bit of a device: the kernel's without prefix, `bit_N` for an unknown one. */
export function featureName(deviceId: number, bit: number): string {
  return nameIn(BY_DEVICE.get(deviceId), bit) ?? nameIn(COMMON, bit) ?? `bit_${bit}`;
}

/**
 * Names of the feature bits that are set, lowest first.
 *
 * @param deviceId virtio device id; 0 where it is not known: then only common bits have names
 * @param bits not negative, any width
 */
export function featureNames(deviceId: number, bits: bigint): string[] {
  const names: string[] = [];
  for (let bit = 0, rest = bits; rest > 0n; bit++, rest >>= 1n) {
    if ((rest & 1n) === 1n) names.push(featureName(deviceId, bit));
  }
  return names;
}

/**
 * The number of the feature bit with this name: as {@linkcode featureName} gives it, in any case, with or without the
 * kernel's prefix (`VIRTIO_NET_F_MRG_RXBUF`, `mrg_rxbuf`).
 *
 * @throws SvqError UNKNOWN_FEATURE
 */
export function featureBit(deviceId: number, name: string): number {
  const plain = name.trim().toUpperCase().replace(/^(?:VIRTIO|VHOST)_(?:[A-Z0-9]+_)?F_/, "");
  for (const bits of [BY_DEVICE.get(deviceId), COMMON]) {
    if (bits !== undefined && Object.hasOwn(bits, plain)) return bits[plain]!;
  }
  const number = Number(/^BIT_(\d{1,3})$/.exec(plain)?.[1] ?? NaN);
  if (number < 128) return number;
  throw new SvqError("UNKNOWN_FEATURE", `No feature of a ${deviceId === 0 ? "virtio" : deviceName(deviceId)} device is called ${name}`, {
    hint: "svq probe lists the names; any bit can be given as bit_N",
  });
}

/** The bits that names stand for; see {@linkcode featureBit}. @throws SvqError UNKNOWN_FEATURE */
export function parseFeatures(deviceId: number, names: Iterable<string>): bigint {
  let bits = 0n;
  for (const name of names) bits |= 1n << BigInt(featureBit(deviceId, name));
  return bits;
}

/** Names of the device status bits that are set, lowest first; `bit_N` for an unknown one. */
export function statusNames(status: number): string[] {
  const names: string[] = [];
  for (let bit = 0; bit < 8; bit++) {
    if ((status & (1 << bit)) !== 0) names.push(nameIn(VIRTIO_STATUS, 1 << bit) ?? `bit_${bit}`);
  }
  return names;
}
