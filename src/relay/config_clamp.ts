/**
 * The limits in a device's configuration space, made to fit the ring that the relay has with the device.
 *
 * @module
 */
import { hasBit } from "../uapi/bits.ts";
import { PROTOCOL_FEATURE } from "../uapi/vhost_user.ts";
import { VIRTIO_ID } from "../uapi/virtio.ts";
import type { BackendInfo } from "../vhost/backend.ts";

/** A 32-bit field that says how many data segments a request may have, beside which it has `more` of its own. */
interface SegmentLimit {
  /** Bytes from the start of the configuration space. */
  offset: number;
  /** Segments of a request that are not data: header and status. */
  more: number;
}

/** `seg_max` of virtio-blk (virtio 1.3, 5.2.4) and virtio-scsi (5.6.4). */
const LIMITS: ReadonlyMap<number, SegmentLimit> = new Map([
  [VIRTIO_ID.blk, { offset: 12, more: 2 }],
  [VIRTIO_ID.scsi, { offset: 4, more: 2 }],
]);

const BLK_F_SEG_MAX = 1n << 2n;
const BLK_F_BLK_SIZE = 1n << 6n;
const BLK_F_FLUSH = 1n << 9n;

/**
 * Where the device has such a field. vhost-user does not say what a device is: one that shows a configuration space, cannot
 * announce a guest (network devices can) and offers SEG_MAX with BLK_SIZE or FLUSH is a disk.
 *
 * @param features what the device offers
 */
export function segmentLimit(info: BackendInfo, features: bigint): SegmentLimit | undefined {
  if (info.deviceId !== undefined) return LIMITS.get(info.deviceId);
  const disk = (features & BLK_F_SEG_MAX) !== 0n && (features & (BLK_F_BLK_SIZE | BLK_F_FLUSH)) !== 0n;
  return disk && info.hasConfig && !hasBit(info.protocolFeatures, PROTOCOL_FEATURE.RARP) ? LIMITS.get(VIRTIO_ID.blk) : undefined;
}

/**
 * Reads `size` bytes of the configuration space at `offset`, with the limit lowered to what a ring of `num` descriptors holds.
 * A chain that is longer than the ring is forbidden also where indirect tables could hold it (virtio 1.3, 2.7.5.3.1).
 *
 * @param read the device's own bytes
 */
export async function clampedConfig(
  read: (offset: number, size: number) => Promise<Uint8Array<ArrayBuffer>>,
  offset: number,
  size: number,
  limit: SegmentLimit,
  num: number,
): Promise<Uint8Array<ArrayBuffer>> {
  const bytes = await read(offset, size);
  const first = Math.max(0, limit.offset - offset);
  const end = Math.min(bytes.length, limit.offset + 4 - offset);
  if (first >= end) return bytes;
  // Somebody may read the field in parts.
  const field = end - first === 4 ? bytes.slice(first, end) : await read(limit.offset, 4);
  if (field.length < 4) return bytes;
  const view = new DataView(field.buffer, field.byteOffset, 4);
  view.setUint32(0, Math.min(view.getUint32(0, true), Math.max(1, num - limit.more)), true);
  const skip = offset + first - limit.offset;
  bytes.set(field.subarray(skip, skip + end - first), first);
  return bytes;
}
