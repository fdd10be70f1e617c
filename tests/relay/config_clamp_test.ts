import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { segmentLimit } from "../../src/relay/config_clamp.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayConfig } from "../../src/relay/relay.ts";
import type { BackendInfo } from "../../src/vhost/backend.ts";
import { shapedDevice } from "../support/shaped_device.ts";

const SEG_MAX_AT = 12;
const u32 = (bytes: Uint8Array<ArrayBuffer>, at: number) => new DataView(bytes.buffer, bytes.byteOffset).getUint32(at, true);

async function withDisk(config: Partial<RelayConfig>, info: Partial<BackendInfo>, body: (relay: Relay, raw: SimDevice) => Promise<void>) {
  await using sim = await SimDevice.open({ kind: "blk", size: 1 << 20 });
  const device = shapedDevice(sim, info);
  await using relay = new Relay(device, { ...DEFAULT_RELAY_CONFIG, ...config }, { log: () => {}, error: () => {} });
  await body(relay, sim);
}

Deno.test("a disk's seg_max is lowered to what the device's ring holds beside header and status; the rest is the device's", async () => {
  for (const [size, expected] of [[16, 14], [64, 62], [128, 126], [1024, 126], [4, 2]] as const) {
    await withDisk({ deviceRingSize: size }, {}, async (relay, raw) => {
      const whole = await relay.getConfig(0, 60);
      assert.equal(u32(whole, SEG_MAX_AT), expected);
      const own = await raw.getConfig(0, 60);
      own.set(whole.subarray(SEG_MAX_AT, SEG_MAX_AT + 4), SEG_MAX_AT);
      assert.deepEqual(whole, own);
      // In parts it is the same.
      const parts = await Promise.all(Array.from({ length: 20 }, (_, i) => relay.getConfig(3 * i, 3)));
      assert.deepEqual(new Uint8Array(parts.flatMap((part) => [...part])), whole);
    });
  }
});

Deno.test("a device that says how long its rings may be gets no request that is longer", async () => {
  await withDisk({}, { vringNumMax: 32 }, async (relay) => assert.equal(u32(await relay.getConfig(0, 60), SEG_MAX_AT), 30));
});

Deno.test("where nothing is known about the device's ring its configuration is not touched", async () => {
  await withDisk({}, {}, async (relay) => assert.equal(u32(await relay.getConfig(0, 60), SEG_MAX_AT), 126));
});

Deno.test("a vhost-user device counts as a disk by its features; one that can announce a guest never does", () => {
  const user = (protocolFeatures: bigint, hasConfig = true): BackendInfo => ({
    kind: "vhost-user",
    address: "unix:/x",
    queueNum: 1,
    maxMemSlots: 8,
    protocolFeatures,
    canSuspend: false,
    hasConfig,
  });
  const disk = 1n << 2n | 1n << 6n | 1n << 9n;
  assert.equal(segmentLimit(user(1n << 9n), disk)?.offset, SEG_MAX_AT);
  assert.equal(segmentLimit(user(1n << 9n), 1n << 2n), undefined);
  assert.equal(segmentLimit(user(1n << 9n, false), disk), undefined);
  assert.equal(segmentLimit(user(1n << 9n | 1n << 2n), disk), undefined, "RARP: a network device");
  assert.equal(segmentLimit({ ...user(1n << 9n), deviceId: 1 }, disk), undefined);
  assert.equal(segmentLimit({ ...user(1n << 9n), deviceId: 8 }, 0n)?.offset, 4);
});

Deno.test("rings that are longer than the device can have are refused when features are set", async () => {
  await withDisk({ deviceRingSize: 256 }, { vringNumMax: 128 }, async (relay) => {
    await assert.rejects(relay.setFeatures(1n << 32n), /rings of up to 128 descriptors, not 256/);
  });
});
