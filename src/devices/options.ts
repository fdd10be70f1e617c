/**
 * What an embedded device can be told, and the device's face that follows from it: features and configuration space.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import type { OwnedFd } from "../ffi/fd.ts";
import { bitsOf } from "../uapi/bits.ts";
import { VIRTIO_FEATURE_BITS } from "../uapi/virtio.ts";
import { NET_HASH_TYPES_ALL } from "../net/flow.ts";
import { parseMac } from "../net/command.ts";
import { encodeNetConfig, VIRTIO_NET_FEATURE_BITS, VIRTIO_NET_S_LINK_UP } from "../uapi/virtio_net.ts";
import { encodeBlkConfig, VIRTIO_BLK_FEATURE_BITS, type VirtioBlkConfig } from "../uapi/virtio_blk.ts";

/** Options of an embedded device: what `sim:blk,…` and `svq device run` say. */
export interface SimOptions {
  /** Which device. */
  kind: "blk" | "net" | "loopback";
  /** net: name of the tap that carries its frames. */
  tap?: string;
  /** net: name of the cable to another device of this process; `loop`: its own frames come back. */
  cable?: string;
  /** net: MAC address, `xx:xx:xx:xx:xx:xx`; default 52:54:00:53:56:51. */
  mac?: string;
  /** net: largest payload of a frame, bytes; default 1500. */
  mtu?: number;
  /** blk: the disk, already open: another device's {@linkcode SimDevice.backing}. Duplicated. */
  backing?: OwnedFd;
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
  /** Queues; default 1. net: two of each pair, and an odd one for control; default 3. */
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

/** Queue pairs of an embedded network device, at most. */
export const NET_PAIRS = 64;
/** Address of an embedded network device that is not given one. */
export const DEFAULT_MAC = "52:54:00:53:56:51";
/** Payload of a frame where it is not said, bytes. */
export const DEFAULT_MTU = 1500;
/** Bytes of an RSS key, at most. */
export const RSS_KEY_MAX = 40;
/** Entries of an RSS indirection table, at most. */
export const RSS_TABLE_MAX = 128;

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
  if (options.kind !== "blk" && options.kind !== "net" && options.kind !== "loopback") {
    throw bad(`There is no embedded device ${options.kind}: blk, net and loopback are there`);
  }
  const net = options.kind === "net";
  checkInteger("queues", options.queues, net ? 2 : 1, net ? 2 * NET_PAIRS + 1 : 64);
  checkInteger("mtu", options.mtu, 68, 65535);
  if (net && options.tap !== undefined && options.cable !== undefined) throw bad("A network device has a tap or a cable, not both");
  if (options.mac !== undefined && (parseMac(options.mac)[0]! & 1) === 1) throw bad(`${options.mac} is the address of a group`);
  checkInteger("num", options.num, 2, 32768);
  checkInteger("size", options.size, 512, 2 ** 50);
  const time = [["latency", options.latencyUs], ["jitter", options.jitterUs]] as const;
  for (const [name, us] of time) {
    if (us !== undefined && !(us >= 0 && us <= 3.6e9)) throw bad(`${name} must be from 0 to one hour, not ${us} us`);
  }
  if (options.kind !== "blk" && (options.file ?? options.size) !== undefined) {
    throw bad(`A ${options.kind} device has no file and no size`);
  }
  if (new TextEncoder().encode(options.id ?? "").length > 20) throw bad("A disk's id has at most 20 bytes");
}

/** The features that a device of these options offers. LOG_ALL is none of them: it cannot log what it writes. */
export function offeredFeatures(options: SimOptions): bigint {
  let features = bitsOf([VIRTIO_FEATURE_BITS.VERSION_1, VIRTIO_FEATURE_BITS.INDIRECT_DESC, VIRTIO_FEATURE_BITS.EVENT_IDX]);
  if (options.packed === true) features |= bitsOf([VIRTIO_FEATURE_BITS.RING_PACKED]);
  if (options.inOrder === true) features |= bitsOf([VIRTIO_FEATURE_BITS.IN_ORDER]);
  if (options.kind === "net") return features | netFeatures(options);
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
  if (options.kind === "net") return netConfig(options, true);
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

/** Queues of a device of these options. */
export function queueCount(options: SimOptions): number {
  return options.queues ?? (options.kind === "net" ? 3 : 1);
}

function netFeatures(options: SimOptions): bigint {
  const F = VIRTIO_NET_FEATURE_BITS;
  const queues = queueCount(options);
  let features = bitsOf([F.MAC, F.MTU, F.STATUS, F.MRG_RXBUF, F.CSUM, F.GUEST_CSUM, F.HOST_TSO4, F.HOST_TSO6, F.HOST_ECN]);
  features |= bitsOf([F.GUEST_TSO4, F.GUEST_TSO6, F.GUEST_ECN]);
  if (queues >= 4) features |= bitsOf([F.MQ]);
  if (queues % 2 === 0) return features;
  features |= bitsOf([F.CTRL_VQ, F.CTRL_RX, F.CTRL_RX_EXTRA, F.CTRL_VLAN, F.CTRL_MAC_ADDR, F.CTRL_GUEST_OFFLOADS, F.GUEST_ANNOUNCE]);
  features |= bitsOf([F.NOTF_COAL, F.VQ_NOTF_COAL]);
  return queues >= 4 ? features | bitsOf([F.RSS]) : features;
}

/** The configuration space of a network device. @param link whether its link is up */
export function netConfig(options: SimOptions, link: boolean): Uint8Array<ArrayBuffer> {
  const queues = queueCount(options);
  const rss = queues >= 5 && queues % 2 === 1;
  return encodeNetConfig({
    mac: parseMac(options.mac ?? DEFAULT_MAC),
    status: link ? VIRTIO_NET_S_LINK_UP : 0,
    maxVirtqueuePairs: queues >> 1,
    mtu: options.mtu ?? DEFAULT_MTU,
    ...(rss ? { rssMaxKeySize: RSS_KEY_MAX, rssMaxIndirectionTableLength: RSS_TABLE_MAX, supportedHashTypes: NET_HASH_TYPES_ALL } : {}),
  });
}
