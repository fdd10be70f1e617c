/**
 * What devices there are and what they can do: the `svq.probe/1` document.
 *
 * {@linkcode scanHost} looks at sysfs, netlink, /dev and /proc and opens nothing. The describing functions open the device
 * that they are given: a vhost-vdpa device is reset by that, which is harmless only while nobody is about to use it; a
 * vhost-user back-end is sent GET messages and nothing else.
 *
 * @module
 */
import { type ErrorRecord, SvqError, toErrorRecord } from "../errors.ts";
import { SysError } from "../ffi/errno.ts";
import { bitNames, hasBit } from "../uapi/bits.ts";
import { BACKEND_FEATURE, VHOST, viewOf } from "../uapi/vhost.ts";
import { PROTOCOL_FEATURE, VHOST_USER_F_PROTOCOL_FEATURES } from "../uapi/vhost_user.ts";
import { deviceName, featureNames, statusNames, VIRTIO_ID } from "../uapi/virtio.ts";
import { decodeBlkConfig } from "../uapi/virtio_blk.ts";
import { decodeNetConfig } from "../uapi/virtio_net.ts";
import { probeVhostUser } from "../vhost_user/probe.ts";
import { assess, type AssessedDevice, type ModeName, type Verdict } from "./assess.ts";
import type { VhostBackend } from "./backend.ts";
import { findHolders, type Holder } from "./holders.ts";
import { openKernelDevice } from "./kernel_device.ts";
import { scanVdpa, type SysfsPlaces, type VdpaListing } from "./sysfs.ts";
import { pinsMemory, ringStopOf } from "./vdpa_drivers.ts";
import { VdpaNode } from "./vdpa_node.ts";
import { type MaskedFeature, maskedOf } from "./masked.ts";

/** One device of `svq.probe/1`. What is not known is null; what makes no sense for the kind is absent. */
export interface ProbedDevice {
  /** Device address as every command takes it. */
  address: string;
  /** vhost-vdpa, vdpa (on the bus, without node), vhost-net, vhost-user or sim. */
  kind: string;
  /** It was asked, not only looked at. */
  opened: boolean;
  /** Name on the vdpa bus. */
  name?: string;
  /** Parent driver. */
  driver?: string | null;
  /** Bus driver: vhost_vdpa or virtio_vdpa. */
  bus_driver?: string | null;
  /** Management device. */
  management_device?: string | null;
  /** Virtio device id. */
  device_id: number | null;
  /** Its name. */
  device_name: string | null;
  /** Device that it belongs to. */
  parent: string | null;
  /** Who has it open. */
  in_use_by: Holder | null;
  /** Virtio status. */
  status?: number | null;
  /** Names of its bits. */
  status_names?: string[] | null;
  /** Features offered. */
  features: bigint | null;
  /** Names of their bits. */
  feature_names: string[] | null;
  /** Backend features, or vhost-user protocol features. */
  backend_features: bigint | null;
  /** Names of their bits. */
  backend_feature_names: string[] | null;
  /** Queues; for vhost-user net devices pairs. */
  queues: number | null;
  /** Largest ring, descriptors. */
  vring_num_max: number | null;
  /** Addresses that the device can be given. */
  iova_range: { first: bigint; last: bigint } | null;
  /** Groups of queues. */
  groups: number | null;
  /** Group of each queue. */
  vring_groups?: number[] | null;
  /** Group of each queue's descriptors, where they have one of their own. */
  descriptor_groups?: number[] | null;
  /** Address spaces. */
  address_spaces: number | null;
  /** Bytes of configuration. */
  config_size?: number | null;
  /** Configuration, decoded for net and blk. */
  config: Record<string, unknown> | null;
  /** Doorbells can be mapped. */
  doorbell?: boolean | null;
  /** SUSPEND is offered. */
  suspend?: boolean | null;
  /** RESUME is offered. */
  resume?: boolean | null;
  /** How rings stop: each, together or at-rest. */
  ring_stop?: string | null;
  /** Memory slots (vhost-user). */
  mem_slots?: number | null;
  /** Relay modes; null while the device was not asked. */
  modes: Record<ModeName, Verdict> | null;
  /** Migration through a relay; null while the device was not asked. */
  migratable: Verdict | null;
  /** What it offers and a relay does not pass on, and why; null while the device was not asked. */
  masked: MaskedFeature[] | null;
  /** What could not be found out, and warnings. */
  notes: string[];
  /** Why the device could not be asked. */
  error: ErrorRecord | null;
}

function blank(address: string, kind: string): ProbedDevice {
  return {
    address,
    kind,
    opened: false,
    device_id: null,
    device_name: null,
    parent: null,
    in_use_by: null,
    features: null,
    feature_names: null,
    backend_features: null,
    backend_feature_names: null,
    queues: null,
    vring_num_max: null,
    iova_range: null,
    groups: null,
    address_spaces: null,
    config: null,
    modes: null,
    migratable: null,
    masked: null,
    notes: [],
    error: null,
  };
}

function failed(device: ProbedDevice, error: unknown): ProbedDevice {
  return { ...device, error: toErrorRecord(error) };
}

function nameOf(deviceId: number | null | undefined): string | null {
  return deviceId === null || deviceId === undefined ? null : deviceName(deviceId);
}

// ---- the host

/** Everything that this host has, without opening any of it. */
export function scanHost(places: SysfsPlaces = {}): ProbedDevice[] {
  const devices = scanVdpa(places).map((listing) => fromListing(listing));
  const net = `${places.dev ?? "/dev"}/vhost-net`;
  if (exists(net)) {
    devices.push({
      ...blank(net, "vhost-net"),
      device_id: VIRTIO_ID.net,
      device_name: "net",
      notes: [`To use it, name a tap: ${net},tap=IFNAME`],
    });
  }
  return devices;
}

function exists(path: string): boolean {
  try {
    return Deno.statSync(path).isCharDevice === true;
  } catch {
    return false;
  }
}

function fromListing(listing: VdpaListing): ProbedDevice {
  const { name, node, busDriver, parent, driver, managementDevice, deviceId } = listing;
  const device: ProbedDevice = {
    ...blank(node ?? `vdpa:${name}`, node === undefined ? "vdpa" : "vhost-vdpa"),
    name,
    driver: driver ?? null,
    bus_driver: busDriver ?? null,
    management_device: managementDevice ?? null,
    device_id: deviceId ?? null,
    device_name: nameOf(deviceId),
    parent: parent ?? null,
    in_use_by: node === undefined ? null : findHolders(node)[0] ?? null,
  };
  if (node === undefined) {
    device.notes.push(
      busDriver === undefined
        ? "No driver has it: modprobe vhost_vdpa gives it a node in /dev"
        : `${busDriver} has it: unbind it there and bind it to vhost_vdpa to use it with svq`,
    );
  }
  return device;
}

// ---- vhost-vdpa

/**
 * Asks a vhost-vdpa device; a failure is in `error`.
 *
 * @param listing from {@linkcode scanVdpa}, where sysfs knows the device
 */
export function describeVdpa(node: string, listing: VdpaListing | undefined): ProbedDevice {
  const device = listing === undefined ? blank(node, "vhost-vdpa") : fromListing({ ...listing, node });
  if (device.in_use_by === null) device.in_use_by = findHolders(node)[0] ?? null;
  try {
    using open = new VdpaNode(openKernelDevice(node, "vhost-vdpa"));
    return askVdpa(device, open, listing?.driver);
  } catch (error) {
    return failed(device, error);
  }
}

/** Fills a record with a device's answers. Exported for tests, which have no kernel. */
export function askVdpa(device: ProbedDevice, node: VdpaNode, driver: string | undefined): ProbedDevice {
  // Group questions need an owner. The device is reset when it is closed.
  node.setOwner();
  const features = node.features();
  const backendFeatures = node.backendFeatures();
  const deviceId = node.deviceId();
  const status = node.status();
  const queues = node.vqsCount() ?? null;
  const configSize = node.configSize();
  const has = (feature: number) => hasBit(backendFeatures, feature);
  const indices = Array.from({ length: queues ?? 0 }, (_, index) => index);
  using doorbell = node.doorbell(0);
  const canSuspend = has(BACKEND_FEATURE.SUSPEND);
  const ringStop = ringStopOf(backendFeatures, driver);
  return withVerdicts({
    ...device,
    opened: true,
    in_use_by: null,
    device_id: deviceId,
    device_name: deviceName(deviceId),
    status,
    status_names: statusNames(status),
    features,
    feature_names: featureNames(deviceId, features),
    backend_features: backendFeatures,
    backend_feature_names: bitNames(backendFeatures, BACKEND_FEATURE),
    queues,
    vring_num_max: node.vringNumMax(),
    iova_range: node.iovaRange(),
    groups: node.groupNum() ?? null,
    vring_groups: known(indices.map((index) => node.vringGroup(index))),
    descriptor_groups: has(BACKEND_FEATURE.DESC_ASID) ? known(indices.map((index) => node.vringDescGroup(index))) : null,
    address_spaces: node.asNum() ?? null,
    config_size: configSize,
    config: decodeConfig(deviceId, node.config(0, Math.min(configSize, CONFIG_READ))),
    doorbell: doorbell !== undefined,
    suspend: canSuspend,
    resume: has(BACKEND_FEATURE.RESUME),
    ring_stop: ringStop,
  }, { kind: "vhost-vdpa", deviceId, features, protocolFeatures: 0n, ringStop, pins: pinsMemory(driver) });
}

/** What net and blk have; some drivers claim whole pages. */
const CONFIG_READ = 256;

function known(values: (number | undefined)[]): number[] | null {
  return values.length === 0 || values.includes(undefined) ? null : values as number[];
}

function withVerdicts(device: ProbedDevice, facts: AssessedDevice): ProbedDevice {
  return { ...device, ...assess(facts), masked: maskedOf(facts.features, facts.protocolFeatures) };
}

function decodeConfig(deviceId: number, bytes: Uint8Array<ArrayBuffer>): Record<string, unknown> | null {
  if (bytes.length === 0) return null;
  if (deviceId === VIRTIO_ID.blk) return snake({ ...decodeBlkConfig(bytes) });
  if (deviceId !== VIRTIO_ID.net) return { bytes: bytes.toHex() };
  const { mac, ...rest } = decodeNetConfig(bytes);
  return { mac: Array.from(mac, (byte) => byte.toString(16).padStart(2, "0")).join(":"), ...snake(rest) };
}

function snake(record: Record<string, unknown>): Record<string, unknown> {
  const key = (name: string) => name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
  return Object.fromEntries(Object.entries(record).map(([name, value]) => [key(name), value]));
}

// ---- vhost-net

/** Asks vhost-net; several processes may have it open at a time, so nobody is disturbed. */
export function describeVhostNet(path: string): ProbedDevice {
  const device = { ...blank(path, "vhost-net"), device_id: VIRTIO_ID.net, device_name: "net" };
  try {
    using open = openKernelDevice(path, "vhost-net");
    const word = (request: number, name: string) => {
      const bytes = new Uint8Array(8);
      open.ioctl(request, bytes, name);
      return viewOf(bytes).getBigUint64(0, true);
    };
    const features = word(VHOST.GET_FEATURES, "VHOST_GET_FEATURES");
    const backendFeatures = word(VHOST.GET_BACKEND_FEATURES, "VHOST_GET_BACKEND_FEATURES");
    const described: ProbedDevice = {
      ...device,
      opened: true,
      features,
      // Bit 27 means another thing here than in virtio.
      feature_names: featureNames(VIRTIO_ID.net, features).map((name) => name === "ANY_LAYOUT" ? "VIRTIO_NET_HDR" : name),
      backend_features: backendFeatures,
      backend_feature_names: bitNames(backendFeatures, BACKEND_FEATURE),
      queues: 2,
      suspend: false,
      resume: false,
      ring_stop: "each",
      notes: [`To use it, name a tap: ${path},tap=IFNAME`],
    };
    return withVerdicts(described, { kind: "vhost-net", deviceId: VIRTIO_ID.net, features, protocolFeatures: 0n, ringStop: "each" });
  } catch (error) {
    return failed(device, error);
  }
}

// ---- vhost-user

/** Asks the back-end behind a socket, with GET messages only. @param timeoutMs for each answer */
export async function describeSocket(path: string, address: string, timeoutMs: number): Promise<ProbedDevice> {
  const device = blank(address, "vhost-user");
  device.notes.push("Daemons that serve one connection and then exit have done so now: start them again");
  try {
    const { features, protocolFeatures, queueNum, maxMemSlots, config, notes } = await probeVhostUser(path, timeoutMs);
    const described: ProbedDevice = {
      ...device,
      opened: true,
      features,
      feature_names: featureNames(0, features),
      backend_features: protocolFeatures,
      backend_feature_names: bitNames(protocolFeatures, PROTOCOL_FEATURE),
      queues: queueNum ?? (hasBit(features, VHOST_USER_F_PROTOCOL_FEATURES) ? null : 1),
      mem_slots: maxMemSlots ?? null,
      config: config === undefined ? null : { bytes: config.toHex() },
      suspend: null,
      resume: null,
      ring_stop: "each",
      notes: [...device.notes, ...notes],
    };
    return withVerdicts(described, { kind: "vhost-user", deviceId: undefined, features, protocolFeatures, ringStop: "each" });
  } catch (error) {
    if (error instanceof SysError) return failed(device, socketError(path, error));
    return failed(device, error);
  }
}

function socketError(path: string, error: SysError): SvqError {
  return new SvqError(error.code, error.message, {
    exitCode: error.exitCode,
    errno: error.errno,
    syscall: error.syscall,
    hint: error.hint ?? `Is a back-end listening at ${path}?`,
    cause: error,
  });
}

// ---- what is open already

/** Asks a device that is open: an embedded one. */
export async function describeBackend(address: string, backend: VhostBackend): Promise<ProbedDevice> {
  const { kind, deviceId, queueNum, maxMemSlots, protocolFeatures, canSuspend, hasConfig, iovaRange, ringStop = "each" } = backend.info;
  const device = blank(address, kind);
  const features = await backend.getFeatures();
  const config = !hasConfig || deviceId === undefined ? null : decodeConfig(deviceId, await backend.getConfig(0, configBytes(deviceId)));
  return withVerdicts({
    ...device,
    opened: true,
    device_id: deviceId ?? null,
    device_name: nameOf(deviceId),
    features,
    feature_names: featureNames(deviceId ?? 0, features),
    backend_features: protocolFeatures,
    backend_feature_names: bitNames(protocolFeatures, PROTOCOL_FEATURE),
    queues: queueNum,
    mem_slots: maxMemSlots,
    iova_range: iovaRange ?? null,
    config,
    suspend: canSuspend,
    resume: canSuspend,
    ring_stop: ringStop,
  }, { kind, deviceId, features, protocolFeatures, ringStop, pins: false });
}

function configBytes(deviceId: number): number {
  return deviceId === VIRTIO_ID.net ? 24 : 60;
}

/** A record for a device that could not even be named properly. */
export function describeFailure(address: string, kind: string, error: unknown): ProbedDevice {
  return failed(blank(address, kind), error);
}

/**
 * Names in `wanted` that a device does not offer. A name is looked up among the device's features first, then among its
 * backend or protocol features; `backend:NAME` means the latter only.
 */
export function missingFeatures(device: ProbedDevice, wanted: readonly string[]): string[] {
  const plain = (name: string) => name.toUpperCase().replace(/^(?:VIRTIO|VHOST)_(?:[A-Z]+_)*F_/, "");
  const features = (device.feature_names ?? []).map(plain);
  const backend = (device.backend_feature_names ?? []).map(plain);
  return wanted.filter((name) => {
    const only = /^(?:backend|protocol):(.*)$/i.exec(name);
    const wantedName = plain(only?.[1] ?? name);
    return !(backend.includes(wantedName) || (only === null && features.includes(wantedName)));
  });
}
