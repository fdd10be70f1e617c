import assert from "node:assert/strict";
import { openDevice } from "../../src/devices/open.ts";
import { assess, type AssessedDevice } from "../../src/vhost/assess.ts";
import { askVdpa, describeBackend, describeVdpa, missingFeatures, type ProbedDevice } from "../../src/vhost/probe.ts";
import { VdpaNode } from "../../src/vhost/vdpa_node.ts";
import { FakeVdpa } from "./fake_vdpa.ts";

const BLK: AssessedDevice = {
  kind: "vhost-vdpa",
  deviceId: 2,
  features: 1n << 32n,
  protocolFeatures: 0n,
  ringStop: "each",
  pins: false,
};

const codes = (reasons: readonly { code: string }[]) => reasons.map((reason) => reason.code);

Deno.test("a device that suspends can be run in every mode and migrated", () => {
  const { modes, migratable } = assess(BLK);
  assert.deepEqual(Object.values(modes).map((mode) => mode.possible), [true, true, true, true]);
  assert.deepEqual(migratable, { possible: true, reasons: [], caveats: [] });
});

Deno.test("a device without SUSPEND is told to stay in shadow mode", () => {
  const { modes, migratable } = assess({ ...BLK, ringStop: "at-rest", pins: true });
  assert.deepEqual(codes(modes.passthrough.caveats), ["NO_SUSPEND", "PINNED_MEMORY"]);
  assert.deepEqual(codes(modes.shadow.caveats), ["PINNED_MEMORY"]);
  assert.deepEqual(codes(migratable.caveats), ["NO_SUSPEND", "PINNED_MEMORY"]);
  assert.match(migratable.caveats[0]!.remedy, /--mode shadow/);
});

Deno.test("a legacy device cannot be relayed, and one with state of its own not migrated without DEVICE_STATE", () => {
  const legacy = assess({ ...BLK, features: 0n });
  assert.deepEqual(codes(legacy.modes.shadow.reasons), ["NO_VERSION_1"]);
  assert.equal(legacy.modes.passthrough.possible, true);
  assert.equal(legacy.migratable.possible, false);
  assert.deepEqual(codes(assess({ ...BLK, kind: "vhost-user", deviceId: 26 }).migratable.reasons), ["DEVICE_STATE"]);
  assert.equal(assess({ ...BLK, kind: "vhost-user", deviceId: 26, protocolFeatures: 1n << 19n }).migratable.possible, true);
});

Deno.test("an embedded device is described with its configuration by name", async () => {
  await using device = await openDevice("sim:blk,size=1MiB");
  const probed = await describeBackend("sim:blk,size=1MiB", device);
  assert.equal(probed.device_name, "blk");
  assert.equal(probed.config!.capacity, 2048);
  assert.ok(probed.feature_names!.includes("VERSION_1"));
});

Deno.test("a vDPA device is asked without being set up", () => {
  const fake = new FakeVdpa({ features: 1n << 32n | 1n << 50n });
  const blank = describeVdpa("/dev/vhost-vdpa-9999", undefined);
  assert.equal(blank.error!.code, "NO_SUCH_DEVICE");
  const probed = askVdpa(blank, new VdpaNode(fake), "vdpasim_blk");
  assert.deepEqual(probed.feature_names, ["VERSION_1", "bit_50"]);
  assert.equal(probed.ring_stop, "each");
  assert.equal(probed.doorbell, false);
  assert.deepEqual(probed.vring_groups, [0, 0]);
  assert.deepEqual(fake.log.filter((entry) => entry.startsWith("SET")), ["SET_OWNER"]);
});

Deno.test("a required feature is found by any spelling of its name, among the features or the backend's", () => {
  const device = { feature_names: ["EVENT_IDX", "bit_50"], backend_feature_names: ["SUSPEND"] } as unknown as ProbedDevice;
  assert.deepEqual(missingFeatures(device, ["event_idx", "VIRTIO_RING_F_EVENT_IDX", "bit_50", "suspend", "backend:SUSPEND"]), []);
  assert.deepEqual(missingFeatures(device, ["RING_PACKED", "backend:EVENT_IDX"]), ["RING_PACKED", "backend:EVENT_IDX"]);
});
