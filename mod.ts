/**
 * svq as a library: live migration of vhost and vDPA devices in software, through shadow virtqueues.
 *
 * The whole of it turns on one interface, {@linkcode VhostBackend}: a device, whatever it is. Devices are opened with
 * {@linkcode openDevice}, put behind a {@linkcode Relay}, and driven by a VMM through a {@linkcode BackendServer}, or by an
 * {@linkcode EmbeddedDriver}.
 *
 * ```ts
 * import { DEFAULT_RELAY_CONFIG, EmbeddedDriver, openDevice, Relay } from "@svq/svq";
 *
 * await using device = await openDevice("sim:blk,size=64MiB");
 * await using relay = new Relay(device, { ...DEFAULT_RELAY_CONFIG }, { log: () => {}, error: console.error });
 * await using driver = await EmbeddedDriver.open(relay, { ramSize: 16 << 20, regionSize: 8 << 20 });
 * const report = await driver.run({ requests: 1000 });
 * console.assert(report.lost === 0 && report.corrupted === 0);
 * ```
 *
 * @module
 */
export * from "./src/errors.ts";
export * from "./src/memory/region.ts";
export * from "./src/memory/guest_memory.ts";
export * from "./src/memory/range_table.ts";
export * from "./src/uapi/virtio.ts";
export * from "./src/vring/queue.ts";
export * from "./src/vring/layout.ts";
export * from "./src/vring/rules.ts";
export * from "./src/vring/split.ts";
export * from "./src/vring/packed.ts";
export * from "./src/vring/snapshot.ts";
export * from "./src/vring/image.ts";
export {
  type ChainDump,
  type DescriptorDump,
  type DumpOptions,
  dumpRing,
  type RingDump,
  type SuppressionDump,
  type WindowEntry,
} from "./src/vring/dump.ts";
export { type VerifyOptions, verifyRing, verifyShape } from "./src/vring/verify.ts";
export { type ChainName, diffImages, type FieldChange, type RingDiff } from "./src/vring/diff.ts";
export * from "./src/iova/mod.ts";
export * from "./src/dirty/bitmap.ts";
export * from "./src/net/command.ts";
export * from "./src/net/state.ts";
export type { NetCounters } from "./src/devices/net.ts";
export type { NetWorkloadOptions } from "./src/drivers/net_workload.ts";
export * from "./src/vhost/address.ts";
export * from "./src/vhost/backend.ts";
export { describeBackend, describeFailure, describeSocket, missingFeatures, type ProbedDevice, scanHost } from "./src/vhost/probe.ts";
export * from "./src/vhost_user/mod.ts";
export * from "./src/relay/relay.ts";
export * from "./src/relay/service.ts";
export * from "./src/relay/control.ts";
export * from "./src/devices/sim_device.ts";
export * from "./src/devices/open.ts";
export * from "./src/drivers/embedded_driver.ts";
export * from "./src/drivers/ring_image.ts";
export * from "./src/drivers/report.ts";
export * from "./src/drivers/state.ts";
export * from "./src/migration/qmp.ts";
export { ERRNO, OwnedFd, SysError, UnixListener, UnixStream } from "./src/ffi/mod.ts";
export type { PeerCredentials, Received } from "./src/ffi/mod.ts";
export type { ModeName, Reason, Verdict } from "./src/vhost/assess.ts";
export type { Holder } from "./src/vhost/holders.ts";
export type { SysfsPlaces } from "./src/vhost/sysfs.ts";
export type { NetlinkVdpa } from "./src/vhost/netlink.ts";
export type { MaskedFeature } from "./src/vhost/masked.ts";
export type { ManualAllocation, MapFigures, PlacedMemory } from "./src/relay/placed_memory.ts";
export { layoutOf, premap } from "./src/relay/premap.ts";
export type { PremapRegion, PremapReport } from "./src/relay/premap.ts";
export type { InflightPart, InflightRegion } from "./src/relay/inflight_region.ts";
export type { Doorbells } from "./src/relay/doorbells.ts";
export type { InflightChains } from "./src/vring/inflight.ts";
export type { CoreChoice } from "./src/relay/core.ts";
export type { UpgradeFailure, UpgradeHost, UpgradeReport, UpgradeState } from "./src/relay/upgrade.ts";
export type { UpgradeMessage } from "./src/relay/upgrade_link.ts";
export type { DeviceProcess, DeviceProcessStatus } from "./src/relay/device_process.ts";
export type { Takeover } from "./src/relay/takeover.ts";
export type { DeviceKeeper, DeviceKeeperOptions } from "./src/relay/device_keeper.ts";
export type { KeptAllocation } from "./src/relay/iova_control.ts";
export type {
  ConfigHandover,
  DeviceHandover,
  FilePart,
  QueueHandover,
  ReceivedFds,
  RegionState,
  RelayHandover,
  ServerHandover,
} from "./src/relay/handover.ts";
export type { Hold } from "./src/vhost_user/hold.ts";
export type { KnownRegion } from "./src/vhost_user/device_memory.ts";
export type { PARTS, RingWindow } from "./src/relay/ring_window.ts";
export type { Iotlb, IotlbEntry } from "./src/iova/iotlb.ts";
export type { GuestIommu, IommuStatus } from "./src/relay/guest_iommu.ts";
export type { Channel } from "./src/uapi/vhost_user.ts";
export type { Arena, RingParts } from "./src/relay/arena.ts";
export type { Counters } from "./src/relay/counters.ts";
export type { DirtyLogging } from "./src/relay/dirty_logging.ts";
export type { QueueState, RelayQueue, SwitchTimes } from "./src/relay/relay_queue.ts";
export type { GuestRing, QueueContext, RunningMode } from "./src/relay/queue_steps.ts";
export type { FrameCounts, MapsStatus, MemoryStatus, NetStatus, QueueStatus, RelayStatus } from "./src/relay/status.ts";
export type { Capture } from "./src/relay/capture_control.ts";
export type { CaptureStart } from "./src/relay/capture.ts";
export type { CapturedFrame, FrameDirection } from "./src/net/pcapng.ts";
export type { ControlSource, NetControl } from "./src/relay/net_control.ts";
export type { PollChoice } from "./src/relay/polling.ts";
export type { WorkerLoad } from "./src/relay/worker_load.ts";
export type { DiskRequest } from "./src/drivers/messages.ts";
export type { SimCounters } from "./src/devices/messages.ts";
export type { SimOptions } from "./src/devices/options.ts";
export type { RamLayout, RamOptions } from "./src/drivers/layout.ts";
export type { RunCommand, WorkerState, WorkloadOptions } from "./src/drivers/messages.ts";
export type { VringState } from "./src/uapi/vhost.ts";
export type { ControlEvent, ControlStart, IndirectTables, OwnCommand } from "./src/relay/messages.ts";
export type { Lane } from "./src/relay/lane.ts";
export type { RingPlace } from "./src/relay/messages.ts";
export type { BlkWorkloadOptions } from "./src/drivers/blk_workload.ts";
export type { LoopbackWorkloadOptions } from "./src/drivers/loopback_workload.ts";
export type { WorkloadState } from "./src/drivers/workload.ts";
