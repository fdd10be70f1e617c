/**
 * OFFER: what the source wants to bring, as JSON, and the checks of the destination before anything moves.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { RamLayout, type RamOptions } from "../drivers/layout.ts";
import type { WorkloadOptions } from "../drivers/messages.ts";
import { bitsOf } from "../uapi/bits.ts";
import { featureNames, VIRTIO_FEATURE_BITS } from "../uapi/virtio.ts";
import { NET_FRAME_RANGE, type NetWorkloadOptions } from "../drivers/net_workload.ts";
import { decodeNetConfig, netControlQueueIndex, VIRTIO_NET_CONFIG_BYTES } from "../uapi/virtio_net.ts";
import { decodeBlkConfig } from "../uapi/virtio_blk.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import { violation } from "./protocol.ts";

/** What the source wants to bring. */
export interface Offer {
  /** The session that the destination made up, 32 hexadecimal digits. */
  session: string;
  /** Negotiated features of the guest. */
  features: bigint;
  /** RAM, queues, ring size and ring format. */
  ram: RamOptions;
  /** The memory table: where RAM lies in the guest's address space. */
  regions: { gpa: number; size: number }[];
  /** What the guest does. */
  workload: WorkloadOptions;
  /** Compare all of memory at the end. */
  verify: boolean;
  /** Report how the guest does after the hand-over. */
  follow: boolean;
  /** Only ask. */
  dryRun: boolean;
  /** Copy the disk where the destination's is another one, or in any case; null: both share it. */
  disk: "auto" | "yes" | null;
}

/** The JSON form. */
export function encodeOffer(offer: Offer): Record<string, unknown> {
  const { session, features, ram, regions, workload, verify, follow, dryRun, disk } = offer;
  return { session, features: `0x${features.toString(16)}`, ram, regions, workload, verify, follow, dry_run: dryRun, disk };
}

function record(value: unknown, what: string): Record<string, unknown> {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw violation(`${what} in its OFFER is no object`);
  return value as Record<string, unknown>;
}

function whole(value: unknown, low: number, high: number, what: string): number {
  if (!(typeof value === "number" && Number.isInteger(value) && value >= low && value <= high)) {
    throw violation(`${what} in its OFFER is no whole number from ${low} to ${high}`);
  }
  return value;
}

function truth(value: unknown, what: string): boolean {
  if (typeof value !== "boolean") throw violation(`${what} in its OFFER is neither true nor false`);
  return value;
}

/** Most sectors under test: their table is memory of the driver. 8 GiB of disk. */
const MAX_SECTORS = 2 ** 24;

function decodeRam(value: unknown): RamOptions {
  const ram = record(value, "ram");
  return {
    ramSize: whole(ram.ramSize, 8192, 2 ** 40, "ram.ramSize"),
    queues: whole(ram.queues, 1, 256, "ram.queues"),
    num: whole(ram.num, 2, 32768, "ram.num"),
    depth: whole(ram.depth, 1, 32768, "ram.depth"),
    packed: truth(ram.packed, "ram.packed"),
  };
}

function decodeNet(options: Record<string, unknown>): NetWorkloadOptions {
  const [least, most] = NET_FRAME_RANGE;
  if (typeof options.mac !== "string" || !/^([0-9a-f]{2}:){5}[0-9a-f]{2}$/.test(options.mac)) {
    throw violation("workload.options.mac in its OFFER is no address");
  }
  return {
    stream: whole(options.stream, -(2 ** 31), 2 ** 32, "workload.options.stream"),
    size: whole(options.size, least, most, "workload.options.size"),
    rate: whole(options.rate, 0, 2 ** 32, "workload.options.rate"),
    echo: truth(options.echo, "workload.options.echo"),
    pairs: whole(options.pairs, 1, 64, "workload.options.pairs"),
    control: truth(options.control, "workload.options.control"),
    controlIndex: whole(options.controlIndex, 0, 255, "workload.options.controlIndex"),
    mac: options.mac,
  };
}

function decodeWorkload(value: unknown): WorkloadOptions {
  const workload = record(value, "workload");
  const options = record(workload.options, "workload.options");
  if (workload.kind === "net") return { kind: "net", options: decodeNet(options) };
  const seed = whole(options.seed, -(2 ** 31), 2 ** 32, "workload.options.seed");
  if (workload.kind === "loopback") return { kind: "loopback", options: { seed } };
  if (workload.kind !== "blk") throw violation("its OFFER names no workload that is known");
  const unit = whole(options.unit, 1, 128, "workload.options.unit");
  const sectors = whole(options.sectors, unit, MAX_SECTORS, "workload.options.sectors");
  if (sectors % unit !== 0) throw violation("workload.options.sectors in its OFFER is no multiple of the unit");
  return {
    kind: "blk",
    options: {
      sectors,
      unit,
      segMax: whole(options.segMax, 1, 65536, "workload.options.segMax"),
      readPercent: whole(options.readPercent, 0, 100, "workload.options.readPercent"),
      flush: truth(options.flush, "workload.options.flush"),
      writeZeroes: truth(options.writeZeroes, "workload.options.writeZeroes"),
      seed,
    },
  };
}

function workloadOf(value: unknown, ram: RamOptions): WorkloadOptions {
  const workload = decodeWorkload(value);
  if (workload.kind === "net" && ram.queues !== workload.options.pairs * 2 + (workload.options.control ? 1 : 0)) {
    throw violation("its queues and its pairs of queues do not agree");
  }
  return workload;
}

// A source that does not know of it shares the disk.
function decodeDisk(value: unknown): Offer["disk"] {
  if (value === undefined || value === null) return null;
  if (value !== "auto" && value !== "yes") throw violation("disk in its OFFER is neither auto nor yes");
  return value;
}

/**
 * Reads an OFFER that a peer sent.
 *
 * @param session the session that it must be for
 * @throws SvqError MIGRATION_PROTOCOL, MIGRATION_SESSION, RAM_TOO_SMALL
 */
export function decodeOffer(document: Record<string, unknown>, session: string): Offer {
  if (document.session !== session) {
    throw new SvqError("MIGRATION_SESSION", "The offer is for another session: a recorded stream, or one for another destination", {
      exitCode: EXIT.migrationAborted,
    });
  }
  if (typeof document.features !== "string" || !/^0x[0-9a-f]{1,32}$/.test(document.features)) throw violation("its features are no number");
  const ram = decodeRam(document.ram);
  const layout = new RamLayout(ram);
  const regions = layout.regions(-1).map(({ gpa, size }) => ({ gpa, size }));
  if (JSON.stringify(document.regions) !== JSON.stringify(regions)) throw violation("its memory table is not the one of such a guest");
  return {
    session,
    features: BigInt(document.features),
    ram,
    regions,
    workload: workloadOf(document.workload, ram),
    verify: truth(document.verify, "verify"),
    follow: truth(document.follow, "follow"),
    dryRun: truth(document.dry_run, "dry_run"),
    disk: decodeDisk(document.disk),
  };
}

function refused(code: string, message: string, hint?: string): SvqError {
  return new SvqError(code, message, { exitCode: EXIT.migrationAborted, hint });
}

/** Bytes of memory that this host can still give away (MemAvailable); infinite where it does not say. */
export function availableMemory(): number {
  try {
    const [, kib] = /^MemAvailable:\s+(\d+) kB/m.exec(Deno.readTextFileSync("/proc/meminfo")) ?? [];
    return kib === undefined ? Infinity : Number(kib) * 1024;
  } catch {
    return Infinity;
  }
}

/**
 * Can the guest live on this device and this host?
 *
 * @param limit most bytes of guest memory to take
 * @throws SvqError MISSING_FEATURE, TOO_FEW_QUEUES, RING_TOO_LARGE, DISK_DIFFERS, NO_MEMORY: each says what is the matter
 */
export async function checkOffer(offer: Offer, device: VhostBackend, limit: number): Promise<void> {
  const { info } = device;
  // Rings are the relay's business: it offers the guest's kind whatever the device has.
  const missing = offer.features & ~await device.getFeatures() & ~bitsOf([VIRTIO_FEATURE_BITS.RING_PACKED]);
  if (missing !== 0n) {
    const names = featureNames(info.deviceId ?? 0, missing).join(", ");
    throw refused("MISSING_FEATURE", `${info.address} lacks ${names}, which the guest uses`, "choose a device that offers them");
  }
  // Some network devices count pairs.
  const { workload } = offer;
  if ((workload.kind === "net" ? workload.options.pairs : offer.ram.queues) > info.queueNum) {
    throw refused("TOO_FEW_QUEUES", `${info.address} has ${info.queueNum} queues, the guest uses ${offer.ram.queues}`);
  }
  if (info.vringNumMax !== undefined && offer.ram.num > info.vringNumMax) {
    throw refused("RING_TOO_LARGE", `${info.address} takes rings of ${info.vringNumMax} descriptors, the guest's have ${offer.ram.num}`);
  }
  if (workload.kind === "net") await checkNet(workload.options, offer.features, device);
  if (offer.workload.kind === "blk") await checkDisk(offer.workload.options, device);
  const room = Math.min(limit, availableMemory());
  if (offer.ram.ramSize > room) {
    throw refused("NO_MEMORY", `The guest has ${offer.ram.ramSize} bytes of memory, ${Math.floor(room)} can be given to it`);
  }
}

async function checkNet(net: NetWorkloadOptions, features: bigint, device: VhostBackend): Promise<void> {
  if (!device.info.hasConfig) return;
  const { maxVirtqueuePairs } = decodeNetConfig(await device.getConfig(0, VIRTIO_NET_CONFIG_BYTES));
  const pairs = Math.max(1, maxVirtqueuePairs);
  if (net.pairs > pairs) throw refused("TOO_FEW_QUEUES", `${device.info.address} has ${pairs} queue pairs, the guest uses ${net.pairs}`);
  if (net.control && net.controlIndex !== netControlQueueIndex(features, pairs)) {
    throw refused(
      "TOO_FEW_QUEUES",
      `${device.info.address} has its control queue behind ${pairs} queue pairs, where the guest does not look for it`,
      "choose a device with as many queue pairs",
    );
  }
}

async function checkDisk(disk: { sectors: number; unit: number; segMax: number }, device: VhostBackend): Promise<void> {
  const { address, hasConfig } = device.info;
  if (!hasConfig) throw refused("DISK_DIFFERS", `${address} is no disk`);
  const config = decodeBlkConfig(await device.getConfig(0, 36));
  if (config.capacity < disk.sectors) {
    throw refused(
      "DISK_DIFFERS",
      `${address} has ${config.capacity} sectors, the guest uses ${disk.sectors}`,
      "both devices must show the same disk",
    );
  }
  if (config.blkSize > disk.unit * 512) {
    throw refused("DISK_DIFFERS", `${address} has blocks of ${config.blkSize} bytes, the guest uses blocks of ${disk.unit * 512}`);
  }
  if (config.segMax > 0 && config.segMax < disk.segMax) {
    throw refused("DISK_DIFFERS", `${address} takes ${config.segMax} segments in a request, the guest uses ${disk.segMax}`);
  }
}
