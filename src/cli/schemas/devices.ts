/**
 * Schemas of what describes devices and address spaces: probe, iova. Rings have a file of their own.
 *
 * @module
 */
import { choice, count, document, flag, hex, type JsonSchema, list, map, nullable, number, object, optional, text } from "./build.ts";
import { VRING_SCHEMAS } from "./vrings.ts";

const reason = object({
  code: text("Stable name of the reason"),
  text: text("One sentence"),
  remedy: text("What to do about it"),
});
const verdict = (description: string) => object({ possible: flag(), reasons: list(reason) }, description);
const range = object({ first: hex(), last: hex("Inclusive") });

const device = object({
  address: text("Device address as every command takes it"),
  kind: text("vhost-vdpa, vhost-net, vhost-user or sim"),
  device_id: optional(nullable(count("Virtio device id, where the device tells it"))),
  device_name: optional(nullable(text("blk, net, …"))),
  parent: optional(nullable(text("Management device or driver"))),
  in_use_by: optional(nullable(object({ pid: count(), name: text() }))),
  features: optional(nullable(hex("Feature bits that the device offers"))),
  feature_names: optional(nullable(list(text(), "Kernel names without prefix; unknown ones bit_N"))),
  backend_features: optional(nullable(hex("Backend features (vhost-vdpa) or protocol features (vhost-user)"))),
  backend_feature_names: optional(nullable(list(text()))),
  queues: optional(nullable(count())),
  vring_num_max: optional(nullable(count("Largest ring size in descriptors"))),
  iova_range: optional(nullable(range)),
  groups: optional(nullable(count())),
  address_spaces: optional(nullable(count())),
  config: optional(nullable(map(true, "Device configuration space, decoded"))),
  modes: optional(nullable(object({
    passthrough: verdict("Relay mode passthrough"),
    notify: verdict("Relay mode notify"),
    used: verdict("Relay mode used"),
    shadow: verdict("Relay mode shadow"),
  }))),
  migratable: optional(nullable(verdict("Can be migrated through a relay"))),
  masked: optional(nullable(list(
    object({ kind: choice(["feature", "protocol"], "Virtio or vhost-user"), name: text(), bit: count(), text: text("Why") }),
  ))),
  error: optional(nullable(object({ code: text(), message: text(), hint: optional(text()) }))),
});

const allocation = object({
  iova: hex(),
  size_bytes: count(),
  asid: count("Address space"),
  perm: choice(["ro", "wo", "rw"], "What the device may do"),
  tag: text("What lies there"),
});

const iova = document("svq.iova/1", "Layout of a device's address space", {
  range,
  regions: list(object({ gpa: hex(), iova: hex(), size_bytes: count(), identity: flag("IOVA = GPA") })),
  allocations: list(allocation),
  free: list(range),
  relay: optional(text("Relay that was asked")),
  device: optional(text("Device that was asked, or the relay's")),
  allocated: optional(allocation),
  freed: optional(allocation),
  fragmentation: { ...number("0: all free space is one range; towards 1: scattered"), minimum: 0, maximum: 1 },
});

/** By document name. */
export const DEVICE_SCHEMAS: Readonly<Record<string, JsonSchema>> = {
  "svq.probe/1": document("svq.probe/1", "Devices of this host, or those that were named", { devices: list(device) }),
  "svq.iova/1": iova,
  ...VRING_SCHEMAS,
};
