/**
 * How the embedded driver drives a device: what it is asked for, and what the device makes of it.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { formatMac } from "../net/command.ts";
import { looksLikeNet } from "../net/recognize.ts";
import { bitsOf, hasBit } from "../uapi/bits.ts";
import { featureNames, VIRTIO_FEATURE_BITS, VIRTIO_ID } from "../uapi/virtio.ts";
import { decodeBlkConfig, VIRTIO_BLK_FEATURE_BITS } from "../uapi/virtio_blk.ts";
import { decodeNetConfig, netControlQueueIndex, VIRTIO_NET_CONFIG_BYTES, VIRTIO_NET_FEATURE_BITS } from "../uapi/virtio_net.ts";
import type { BackendInfo, VhostBackend } from "../vhost/backend.ts";
import type { RamOptions } from "./layout.ts";
import type { WorkloadOptions } from "./messages.ts";
import { NET_FRAME_RANGE, type NetWorkloadOptions } from "./net_workload.ts";

/** How a driver is made. */
export interface DriverOptions {
  /** Default: blk where the device says so or has a configuration space, else loopback. */
  workload?: "blk" | "net" | "loopback";
  /** Queues to use; default 1. net: queue pairs. */
  queues?: number;
  /** Ring size in descriptors; default 256. */
  num?: number;
  /** Requests in flight in each queue; default 32. */
  depth?: number;
  /** Share of reads among the requests that move data; default 50. */
  readPercent?: number;
  /** Random numbers follow from it; default 1. */
  seed?: number;
  /** Bytes of guest RAM, a multiple of 128 KiB; default 64 MiB. */
  ramSize?: number;
  /** blk: bytes at the disk's beginning that are used; default 32 MiB, or the disk where it is smaller. They are overwritten. */
  regionSize?: number;
  /** Take RING_PACKED where it is offered; default no. */
  packed?: boolean;
  /** Take EVENT_IDX where it is offered; default yes. */
  eventIdx?: boolean;
  /** Use IN_ORDER where it is offered; default no. */
  inOrder?: boolean;
  /** Take INDIRECT_DESC where it is offered; default yes. */
  indirect?: boolean;
  /** Keep an in-flight region for the device, where it has one: what `EmbeddedDriver.reattach` needs; default no. */
  inflight?: boolean;
  /** blk: bytes of each request that moves data, a multiple of 512 and at most 64 KiB; default: random. */
  requestSize?: number;
  /** net: bytes of a frame; default 512. */
  frameSize?: number;
  /** net: frames per second; default as fast as they are taken. */
  rate?: number;
  /** net: the frames are ICMP echo requests from one IPv4 address to another one, which answers them. */
  ping?: { address: string; target: string };
  /** net: the frames come back (default); otherwise the other end is another driver, of another seed. */
  echo?: boolean;
}

/** Bytes of guest RAM by default. */
export const DEFAULT_RAM_SIZE: number = 64 << 20;
const DEFAULT_REGION_SIZE = 32 << 20;

/** What decides how a driver drives its device. */
export interface DriverShape {
  /** RAM, queues and rings. */
  ram: RamOptions;
  /** Negotiated features. */
  features: bigint;
  /** What the driver does. */
  workload: WorkloadOptions;
}

/** The error of a device that lacks features. @param missing their bits */
export function missingFeature(backend: VhostBackend, missing: bigint): SvqError {
  const names = featureNames(backend.info.deviceId ?? 0, missing).join(", ");
  return new SvqError("MISSING_FEATURE", `${backend.info.address} lacks ${names}`, { exitCode: EXIT.missingFeature });
}

/**
 * Chooses features, queues and workload.
 *
 * @throws SvqError MISSING_FEATURE, TOO_FEW_QUEUES, BAD_FRAME_SIZE, DISK_TOO_SMALL
 */
export async function negotiate(backend: VhostBackend, options: DriverOptions): Promise<DriverShape> {
  const { info } = backend;
  const offered = await backend.getFeatures();
  const { VERSION_1, ACCESS_PLATFORM, RING_PACKED, EVENT_IDX, INDIRECT_DESC, IN_ORDER } = VIRTIO_FEATURE_BITS;
  if (!hasBit(offered, VERSION_1)) throw missingFeature(backend, bitsOf([VERSION_1]));
  if (options.packed === true && !hasBit(offered, RING_PACKED)) throw missingFeature(backend, bitsOf([RING_PACKED]));
  const kind = options.workload ?? kindOf(info, offered);
  const wanted: number[] = [VERSION_1, ACCESS_PLATFORM];
  if (options.packed === true) wanted.push(RING_PACKED);
  if (options.eventIdx !== false) wanted.push(EVENT_IDX);
  if (options.inOrder === true) wanted.push(IN_ORDER);
  if (options.indirect !== false) wanted.push(INDIRECT_DESC);
  if (kind === "blk") {
    const { SEG_MAX, RO, BLK_SIZE, FLUSH, MQ, WRITE_ZEROES } = VIRTIO_BLK_FEATURE_BITS;
    wanted.push(SEG_MAX, RO, BLK_SIZE, FLUSH, MQ, WRITE_ZEROES);
  }
  const pairs = options.queues ?? 1;
  if (kind === "net") wanted.push(...netFeatures(info, pairs));
  const features = offered & bitsOf(wanted);
  const net = kind === "net" ? await netOptions(backend, features, options, pairs) : undefined;
  const queues = net === undefined ? pairs : pairs * 2 + (net.control ? 1 : 0);
  // Some network devices count pairs.
  if ((net === undefined ? queues : pairs) > info.queueNum) throw tooFewQueues(info, queues);
  const ram: RamOptions = {
    ramSize: options.ramSize ?? DEFAULT_RAM_SIZE,
    queues,
    num: options.num ?? 256,
    depth: options.depth ?? 32,
    packed: hasBit(features, RING_PACKED),
  };
  const seed = options.seed ?? 1;
  const workload: WorkloadOptions = net !== undefined
    ? { kind: "net", options: net }
    : kind === "blk"
    ? { kind, options: await blkOptions(backend, features, options, seed) }
    : { kind: "loopback", options: { seed } };
  return { ram, features, workload };
}

function tooFewQueues(info: BackendInfo, queues: number): SvqError {
  return new SvqError("TOO_FEW_QUEUES", `${info.address} has ${info.queueNum} queues: ${queues} cannot be driven`, {
    exitCode: EXIT.missingFeature,
  });
}

function kindOf(info: BackendInfo, offered: bigint): "blk" | "net" | "loopback" {
  if (info.deviceId === VIRTIO_ID.net || (info.deviceId === undefined && looksLikeNet(offered))) return "net";
  return info.deviceId === VIRTIO_ID.blk || (info.deviceId === undefined && info.hasConfig) ? "blk" : "loopback";
}

// A vhost-user device that counts pairs, or an even number of queues, has no control queue.
function netFeatures(info: BackendInfo, pairs: number): number[] {
  const F = VIRTIO_NET_FEATURE_BITS;
  const wanted: number[] = [F.MAC, F.MTU, F.STATUS, F.MRG_RXBUF];
  if (pairs > 1) wanted.push(F.MQ);
  if (info.deviceId === undefined && (info.queueNum < 3 || info.queueNum % 2 === 0)) return wanted;
  if (pairs > 1) wanted.push(F.RSS);
  wanted.push(F.CTRL_VQ, F.CTRL_RX, F.CTRL_RX_EXTRA, F.CTRL_VLAN, F.CTRL_MAC_ADDR, F.CTRL_GUEST_OFFLOADS);
  return [...wanted, F.GUEST_CSUM, F.NOTF_COAL, F.VQ_NOTF_COAL];
}

async function netOptions(backend: VhostBackend, features: bigint, options: DriverOptions, pairs: number): Promise<NetWorkloadOptions> {
  const size = options.frameSize ?? 512;
  const [shortest, most] = NET_FRAME_RANGE;
  // The mark, the numbers and the checksum have to fit behind the headers.
  const least = options.ping === undefined ? shortest : 66;
  if (!(Number.isInteger(size) && size >= least && size <= most)) {
    throw new SvqError("BAD_FRAME_SIZE", `Frames have ${least} to ${most} bytes, not ${size}`, { exitCode: EXIT.usage });
  }
  const config = backend.info.hasConfig ? decodeNetConfig(await backend.getConfig(0, VIRTIO_NET_CONFIG_BYTES)) : undefined;
  if (backend.info.deviceId === VIRTIO_ID.net && pairs > Math.max(1, config?.maxVirtqueuePairs ?? pairs)) {
    throw tooFewQueues(backend.info, pairs * 2);
  }
  return {
    stream: options.seed ?? 1,
    size,
    rate: options.rate ?? 0,
    echo: options.echo ?? true,
    ping: options.ping,
    pairs,
    control: hasBit(features, VIRTIO_NET_FEATURE_BITS.CTRL_VQ),
    controlIndex: netControlQueueIndex(features, config?.maxVirtqueuePairs ?? pairs),
    mac: config === undefined ? "52:54:00:53:56:51" : formatMac(config.mac),
  };
}

async function blkOptions(backend: VhostBackend, features: bigint, options: DriverOptions, seed: number) {
  const has = (bit: keyof typeof VIRTIO_BLK_FEATURE_BITS) => hasBit(features, VIRTIO_BLK_FEATURE_BITS[bit]);
  const config = decodeBlkConfig(await backend.getConfig(0, 36));
  const unit = has("BLK_SIZE") ? Math.max(1, config.blkSize / 512) : 1;
  const wanted = Math.floor((options.regionSize ?? DEFAULT_REGION_SIZE) / 512);
  const sectors = Math.floor(Math.min(wanted, config.capacity) / unit) * unit;
  if (sectors < unit) throw new SvqError("DISK_TOO_SMALL", `${backend.info.address} has ${config.capacity} sectors: nothing to drive`);
  return {
    sectors,
    unit,
    segMax: has("SEG_MAX") ? Math.max(1, config.segMax) : 1,
    readPercent: has("RO") ? 100 : options.readPercent ?? 50,
    flush: has("FLUSH"),
    writeZeroes: has("WRITE_ZEROES"),
    seed,
    ...(options.requestSize === undefined ? {} : { requestSectors: options.requestSize / 512 }),
  };
}
