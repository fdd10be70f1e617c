/**
 * One interface for everything a driver needs of a device: implemented by the vhost-user front-end, vhost-vdpa, vhost-net,
 * the embedded devices and the relay itself. Whoever calls it (relay, embedded driver, probe, the vhost-user back-end
 * server) cannot tell which.
 *
 * Ring addresses are given in the address space of the memory table's `gpa` field (GPA or IOVA); an implementation that
 * needs another one (uaddr for vhost-user, its own addresses for vhost-net) translates.
 *
 * @module
 */
import type { OwnedFd } from "../ffi/fd.ts";
import type { MemoryRegion } from "../memory/region.ts";

/** What stands behind a {@linkcode VhostBackend}. */
export type BackendKind = "vhost-user" | "vhost-vdpa" | "vhost-net" | "sim" | "relay";

/** Facts about a device that do not change while it is open. */
export interface BackendInfo {
  /** What it is. */
  kind: BackendKind;
  /** The device address as the user wrote it. */
  address: string;
  /** Virtio device id, where the device tells it (vhost-user does not). */
  deviceId?: number;
  /** Queues that the device has. */
  queueNum: number;
  /** Memory regions that it accepts. */
  maxMemSlots: number;
  /** vhost-user protocol features, where it is one; otherwise the equivalents that hold. */
  protocolFeatures: bigint;
  /** Can SUSPEND and RESUME (vhost-vdpa). */
  canSuspend: boolean;
  /**
   * May the kick eventfd of a running ring be exchanged (default yes)? Back-ends on rust-vmm's crates do not listen to the new one
   * and then fail to stop the ring.
   */
  kickExchange?: boolean;
  /** vhost-user: protocol features that the device offers, used here or not. */
  offeredProtocolFeatures?: bigint;
  /** Has a device configuration space that can be read. */
  hasConfig: boolean;
  /** Addresses that the device can be given, both ends inclusive, bytes; undefined where no limit is known. */
  iovaRange?: { readonly first: bigint; readonly last: bigint };
  /** Holes in that range which its IOMMU claims, with names. */
  iovaReserved?: readonly { readonly first: bigint; readonly last: bigint; readonly tag?: string }[];
  /** Address spaces (ASIDs), where the device tells it; undefined means 1. */
  addressSpaces?: number;
  /** Largest ring, descriptors, where the device tells it. */
  vringNumMax?: number;
  /** Its doorbells can be mapped by whoever drives it, and {@linkcode VhostBackend.onDoorbell} is told of them. */
  doorbells?: boolean;
  /** It pins the guest's memory, which then must not be given back to the host; undefined where nobody knows. */
  pinsMemory?: boolean;
  /** How its rings stop; undefined means `each`. */
  ringStop?: RingStop;
}

/**
 * How a device's rings can be stopped while it runs.
 *
 * - `each`: any ring by itself, the others go on.
 * - `together`: only all at one time. Stopping one stalls the others while the device is reset and set up again: stop and
 *   start rings in one call ({@linkcode VhostBackend.stopVrings}).
 * - `at-rest`: not at all while something is in flight (vDPA drivers without SUSPEND). A ring can be stopped when everything
 *   came back, and the whole device by a reset. Such a device cannot leave passthrough while its driver runs: run its rings
 *   as shadow rings from the start.
 */
export type RingStop = "each" | "together" | "at-rest";

/** A ring to stop: see {@linkcode VhostBackend.stopVrings}. */
export interface VringStop {
  /** Ring. */
  index: number;
  /**
   * The caller has recorded every chain that it made available and sees to those that the device does not return (shadow
   * rings). Then a ring of an `at-rest` device may be stopped with chains in flight.
   */
  recorded?: boolean;
}

/** A ring to start: all that a ring needs. See {@linkcode VhostBackend.startVrings}. */
export interface VringStart {
  /** Ring. */
  index: number;
  /** Size in descriptors. */
  num: number;
  /** As for {@linkcode VhostBackend.setVringBase}. */
  base: number;
  /** Where its parts lie. */
  addresses: VringAddresses;
  /** Eventfd, borrowed; null: none. */
  kick: number | null;
  /** Eventfd, borrowed; null: none. */
  call: number | null;
  /** Eventfd, borrowed; null: none. */
  err: number | null;
  /** Does it run at once? */
  enabled: boolean;
}

/** Where a ring's doorbell page can be mapped by whoever drives it. */
export interface Doorbell {
  /** The device, borrowed. */
  fd: number;
  /** Bytes. */
  offset: number;
  /** Bytes. */
  size: number;
}

/** Where the parts of a vring lie (GPA or IOVA, bytes). Packed: descriptor ring, driver area, device area. */
export interface VringAddresses {
  /** Descriptor table; packed: descriptor ring. */
  desc: number;
  /** Avail ring; packed: driver event area. */
  avail: number;
  /** Used ring; packed: device event area. */
  used: number;
  /** Where used-ring writes are logged (GPA of the used ring), when the VHOST_VRING_F_LOG flag asks for it. */
  logGpa?: number | undefined;
}

/** Which way a device's state goes: out of the source, into the destination. */
export type DeviceStateDirection = "save" | "load";

/** A change of the guest's IOMMU: addresses in bytes, `perm` 1 for reading, 2 for writing, 3 for both. */
export type IotlbChange =
  | { type: "update"; iova: number; size: number; gpa: number; perm: number }
  | { type: "invalidate"; iova: number; size: number };

/** A dirty log in a shared file: bit n of it is page n of 4096 bytes, least significant bit first. */
export interface LogRegion {
  /** Borrowed for the call. */
  fd: number;
  /** Bytes. */
  offset: number;
  /** Bytes. */
  size: number;
}

/** A region that records what is in flight, in a shared file: see src/vring/inflight.ts. */
export interface InflightPlace {
  /** Borrowed for the call. */
  fd: number;
  /** Bytes. */
  offset: number;
  /** Bytes. */
  size: number;
  /** Queues that it has a part for. */
  queues: number;
  /** Descriptors of the largest of them. */
  num: number;
}

/**
 * A device. All methods reject with SvqError; after a rejection of a connection error the object is only good for `close`.
 *
 * A ring runs when it has num, addresses, base, kick and is enabled; `getVringBase` stops it and keeps its indices. File
 * descriptors are borrowed for the call; an implementation that keeps one duplicates it.
 */
export interface VhostBackend extends AsyncDisposable {
  /** Facts that do not change while it is open. */
  readonly info: BackendInfo;
  /** Feature bits that the device offers. */
  getFeatures(): Promise<bigint>;
  /** Acknowledges features. @param features virtio and vhost bits (LOG_ALL is bit 26), without bit 30 */
  setFeatures(features: bigint): Promise<void>;
  /** Reads `size` bytes of the device configuration space at `offset`. */
  getConfig(offset: number, size: number): Promise<Uint8Array<ArrayBuffer>>;
  /** Writes into the device configuration space at `offset`. */
  setConfig(offset: number, bytes: Uint8Array<ArrayBuffer>): Promise<void>;
  /** Replaces the whole table. */
  setMemTable(regions: readonly MemoryRegion[]): Promise<void>;
  /** Adds one region to the table. */
  addMemRegion(region: MemoryRegion): Promise<void>;
  /** Resolves when nothing uses the region any more. */
  removeMemRegion(region: Omit<MemoryRegion, "fd" | "fdOffset">): Promise<void>;
  /** Gives the device the log that it sets bits in when LOG_ALL is acknowledged. */
  setLogBase(log: LogRegion): Promise<void>;
  /** Sets the queue size in descriptors. */
  setVringNum(index: number, num: number): Promise<void>;
  /** Sets where the ring's parts lie. */
  setVringAddresses(index: number, addresses: VringAddresses): Promise<void>;
  /** Sets the indices at which the ring starts. @param base split: avail index; packed: avail | wrap<<15 | used<<16 | wrap<<31 */
  setVringBase(index: number, base: number): Promise<void>;
  /** Stops the ring. Resolves with its base when the device has left it. */
  getVringBase(index: number): Promise<number>;
  /** Sets what the driver signals when chains are available. @param fd an eventfd, or null for none (the device polls) */
  setVringKick(index: number, fd: number | null): Promise<void>;
  /** Sets what the device signals when chains are used. @param fd an eventfd, or null for none */
  setVringCall(index: number, fd: number | null): Promise<void>;
  /** Sets what the device signals when the ring is broken. @param fd an eventfd, or null for none */
  setVringErr(index: number, fd: number | null): Promise<void>;
  /** Lets the ring run, or holds it. */
  setVringEnable(index: number, enabled: boolean): Promise<void>;
  /** The virtio device status byte. */
  getStatus(): Promise<number>;
  /** Sets the virtio device status byte (virtio 1.3, 2.1). */
  setStatus(status: number): Promise<void>;
  /** Back to the state after opening; memory table and ownership may stay. */
  reset(): Promise<void>;
  /** Stops all rings and keeps their state; nothing of guest memory is touched after it resolves. */
  suspend(): Promise<void>;
  /** Undoes `suspend`. */
  resume(): Promise<void>;
  /**
   * Stops several rings at one time, as {@linkcode getVringBase} stops one; the bases, in the same order. Present where that
   * costs less than one after the other, or where it is the only way (see {@linkcode RingStop}).
   */
  stopVrings?(rings: readonly VringStop[]): Promise<number[]>;
  /** Sets up and starts several rings at one time; present where {@linkcode stopVrings} is. */
  startVrings?(rings: readonly VringStart[]): Promise<void>;
  /** Where the ring's doorbell can be mapped; undefined where it has none. */
  doorbell?(index: number): Doorbell | undefined;
  /**
   * Set by who drives it, where that can map doorbells: it is given a ring's doorbell, or (undefined) must stop using it. Resolves
   * with whether it has done so.
   */
  onDoorbell?: ((index: number, doorbell: Doorbell | undefined) => Promise<boolean>) | undefined;
  /** virtio-net: announce the guest (6 bytes MAC), where the device has VHOST_USER_PROTOCOL_F_RARP. */
  sendRarp?(mac: Uint8Array<ArrayBuffer>): Promise<void>;
  /** virtio-net: what the device counts of each queue, where it tells it. */
  frameCounts?(): Promise<{ frames: number; bytes: number; drops: number }[]>;
  /** How many IOTLB maps were made so far, and how many of them again because a reset had dropped them; kernel vDPA devices only. */
  mapCounts?(): { mapped: number; remapped: number };
  /** virtio-net: the MTU agreed on, where the device has VHOST_USER_PROTOCOL_F_MTU. */
  setMtu?(mtu: number): Promise<void>;
  /**
   * Moves the device's internal state through a pipe, where the device has VHOST_USER_PROTOCOL_F_DEVICE_STATE; its rings are
   * stopped then.
   *
   * @param phase 0: stopped, the only one there is
   * @param fd the pipe end that the device writes (save) or reads (load), borrowed
   * @returns a descriptor that is to be used instead, where the device gives one
   */
  setDeviceStateFd?(direction: DeviceStateDirection, phase: number, fd: number): Promise<OwnedFd | undefined>;
  /** Resolves when the device has moved its whole state well. @throws SvqError DEVICE_REFUSED */
  checkDeviceState?(): Promise<void>;
  /**
   * What the IOMMU of a guest maps, where ACCESS_PLATFORM was acknowledged and the addresses of rings and buffers are IOVAs.
   * `invalidate` resolves when nothing uses the range any more.
   */
  iotlb?(message: IotlbChange): Promise<void>;
  /** Asks what `iova` is mapped to: {@linkcode VhostBackend.iotlb} is called with it. Rejects where nothing is. */
  onIotlbMiss?: ((iova: number, perm: number) => Promise<void>) | undefined;
  /** Makes a zeroed in-flight region, for whoever drives the device to keep. @returns the file, which is the caller's, and its place */
  createInflight?(queues: number, num: number): Promise<{ file: OwnedFd; place: InflightPlace }>;
  /** Gives the device the region in which it records what is in flight, and finds what was; before any ring starts. */
  setInflight?(place: InflightPlace): Promise<void>;
  /**
   * Puts ring `index` into an address space of its own, in which the device sees nothing but `region`; before the device's first
   * ring starts, and until it is closed or called again.
   *
   * @returns false where the device has no group or no address space for it: everything is as before then
   */
  isolate?(index: number, region: MemoryRegion): Promise<boolean>;
  /** Called when the device's configuration changed. */
  onConfigChange: (() => void) | undefined;
  /** Called once when the device is gone (connection lost, worker died). */
  onFailure: ((error: Error) => void) | undefined;
  /** Lets go of the device; harmless when repeated. */
  close(): Promise<void>;
}
