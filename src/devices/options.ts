/**
 * What an embedded device can be told, and the device's face that follows from it: features and configuration space.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { bitsOf } from "../uapi/bits.ts";
import { VIRTIO_FEATURE_BITS } from "../uapi/virtio.ts";
import { encodeBlkConfig, VIRTIO_BLK_FEATURE_BITS, type VirtioBlkConfig } from "../uapi/virtio_blk.ts";

/** Options of an embedded device: what `sim:blk,…` and `svq device run` say. */
export interface SimOptions {
  /** Which device. */
  kind: "blk" | "loopback";
  /** blk: path of the disk, a file or a block device. */
  file?: string;
  /** blk: bytes of the disk; without `file` it lives in memory. A file that is shorter or missing is made this long. */
  size?: number;
  /** Time that each request takes, microseconds; many are in flight at once. Default 0: each is done at once. */
  latencyUs?: number;
  /** Random time that is added to each request, at most, microseconds: completions come out of order. Default 0. */
  jitterUs?: number;
  /** blk: the disk cannot be written. */
  readOnly?: boolean;
  /** Queues; default 1. */
  queues?: number;
  /** Largest ring, in descriptors, that the device lets be set; default 1024. */
  num?: number;
  /** blk: id string, at most 20 bytes. */
  id?: string;
  /** Offer RING_PACKED as well. */
  packed?: boolean;
  /** Offer IN_ORDER as well: what is done early waits for what was asked before it. */
  inOrder?: boolean;
}

/** Bytes of a memory disk whose size is not given. */
export const DEFAULT_SIZE: number = 64 * 1024 * 1024;
/** Rings of a device are at most this long unless it is told otherwise. */
export const DEFAULT_NUM = 1024;
/** Data segments in one block request. */
export const SEG_MAX = 126;
/** Sectors in one discard or write-zeroes range: 32 MiB. */
export const MAX_RANGE_SECTORS = 65536;
/** Ranges in one discard or write-zeroes request. */
export const MAX_RANGES = 16;

function bad(message: string): SvqError {
  return new SvqError("BAD_DEVICE_OPTION", message, { exitCode: EXIT.usage });
}

function checkInteger(name: string, value: number | undefined, low: number, high: number): void {
  if (value !== undefined && !(Number.isInteger(value) && value >= low && value <= high)) {
    throw bad(`${name} must be a whole number from ${low} to ${high}, not ${value}`);
  }
}

/** Checks options. @throws SvqError BAD_DEVICE_OPTION (exit code 2) for values that no device could have */
export function checkSimOptions(options: SimOptions): void {
  if (options.kind !== "blk" && options.kind !== "loopback") {
    throw bad(`There is no embedded device ${options.kind}: blk and loopback are there`);
  }
  checkInteger("queues", options.queues, 1, 64);
  checkInteger("num", options.num, 2, 32768);
  checkInteger("size", options.size, 512, 2 ** 50);
  const time = [["latency", options.latencyUs], ["jitter", options.jitterUs]] as const;
  for (const [name, us] of time) {
    if (us !== undefined && !(us >= 0 && us <= 3.6e9)) throw bad(`${name} must be from 0 to one hour, not ${us} us`);
  }
  if (options.kind === "loopback" && (options.file ?? options.size) !== undefined) throw bad("A loopback device has no file and no size");
  if (new TextEncoder().encode(options.id ?? "").length > 20) throw bad("A disk's id has at most 20 bytes");
}

/** The features that a device of these options offers. LOG_ALL is none of them: it cannot log what it writes. */
export function offeredFeatures(options: SimOptions): bigint {
  let features = bitsOf([VIRTIO_FEATURE_BITS.VERSION_1, VIRTIO_FEATURE_BITS.INDIRECT_DESC, VIRTIO_FEATURE_BITS.EVENT_IDX]);
  if (options.packed === true) features |= bitsOf([VIRTIO_FEATURE_BITS.RING_PACKED]);
  if (options.inOrder === true) features |= bitsOf([VIRTIO_FEATURE_BITS.IN_ORDER]);
  if (options.kind !== "blk") return features;
  features |= bitsOf([VIRTIO_BLK_FEATURE_BITS.SEG_MAX, VIRTIO_BLK_FEATURE_BITS.BLK_SIZE, VIRTIO_BLK_FEATURE_BITS.FLUSH]);
  if ((options.queues ?? 1) > 1) features |= bitsOf([VIRTIO_BLK_FEATURE_BITS.MQ]);
  return features |
    (options.readOnly === true
      ? bitsOf([VIRTIO_BLK_FEATURE_BITS.RO])
      : bitsOf([VIRTIO_BLK_FEATURE_BITS.DISCARD, VIRTIO_BLK_FEATURE_BITS.WRITE_ZEROES]));
}

/** The configuration space; empty for a loopback device. @param capacity sectors */
export function configSpace(options: SimOptions, capacity: number): Uint8Array<ArrayBuffer> {
  if (options.kind !== "blk") return new Uint8Array(0);
  const writable = options.readOnly !== true;
  const config: Partial<VirtioBlkConfig> = {
    capacity,
    segMax: SEG_MAX,
    blkSize: 512,
    numQueues: options.queues ?? 1,
    maxDiscardSectors: writable ? MAX_RANGE_SECTORS : 0,
    maxDiscardSeg: writable ? MAX_RANGES : 0,
    discardSectorAlignment: writable ? 8 : 0,
    maxWriteZeroesSectors: writable ? MAX_RANGE_SECTORS : 0,
    maxWriteZeroesSeg: writable ? MAX_RANGES : 0,
    writeZeroesMayUnmap: writable ? 1 : 0,
  };
  return encodeBlkConfig(config);
}
