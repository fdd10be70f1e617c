import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { createMemfd, mapFd } from "../../src/ffi/mod.ts";
import { DirtyBitmap } from "../../src/dirty/bitmap.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayConfig } from "../../src/relay/relay.ts";
import type { BackendInfo } from "../../src/vhost/backend.ts";
import { shapedDevice } from "../support/shaped_device.ts";
import { waitUntil } from "../support/wait.ts";

interface Case {
  name: string;
  config?: Partial<RelayConfig>;
  packedDevice?: boolean;
  packedGuest?: boolean;
  queues?: number;
  eventIdx?: boolean;
  indirect?: boolean;
  num?: number;
  /** Facts that the device states instead of its own. */
  info?: Partial<BackendInfo>;
  /** The device offers IN_ORDER; the driver takes it where it is offered. */
  inOrderDevice?: boolean;
  inOrderGuest?: boolean;
  /** The device's answers overtake each other by up to so much. */
  jitterUs?: number;
  /** The device stops and starts its rings only together. */
  together?: boolean;
}

const MODES = ["passthrough", "notify", "used", "shadow"] as const;
const LOG_ALL = 1n << 26n;
/** Covers the driver's RAM, part of which lies above 4 GiB. */
const LOG_BYTES = 1 << 18;

async function withRelay(
  options: Case,
  body: (relay: Relay, driver: EmbeddedDriver, config: RelayConfig, errors: string[]) => Promise<void>,
): Promise<void> {
  const config: RelayConfig = { ...DEFAULT_RELAY_CONFIG, ...options.config };
  const errors: string[] = [];
  const queues = options.queues ?? 1;
  await using sim = await SimDevice.open({
    kind: "blk",
    size: 32 << 20,
    queues,
    packed: options.packedDevice ?? false,
    inOrder: options.inOrderDevice ?? false,
    jitterUs: options.jitterUs ?? 0,
  });
  const device = shapedDevice(sim, options.info ?? {}, options.together);
  await using relay = new Relay(device, config, { log: () => {}, error: (error) => errors.push(error.message) });
  await using driver = await EmbeddedDriver.open(relay, {
    queues,
    depth: 16,
    num: options.num ?? 128,
    packed: options.packedGuest ?? false,
    eventIdx: options.eventIdx ?? true,
    inOrder: options.inOrderGuest ?? false,
    indirect: options.indirect ?? true,
    ramSize: 16 << 20,
    regionSize: 16 << 20,
  });
  await body(relay, driver, config, errors);
}

function assertClean(report: { lost: number; duplicated: number; corrupted: number; completed: number }, atLeast: number): void {
  assert.deepEqual([report.lost, report.duplicated, report.corrupted], [0, 0, 0]);
  assert.ok(report.completed >= atLeast, `${report.completed} requests`);
}

const CASES: Case[] = [
  { name: "split rings" },
  { name: "split rings without EVENT_IDX", eventIdx: false },
  { name: "split rings without indirect tables", indirect: false },
  { name: "a small split ring", num: 16 },
  { name: "two queues on two workers", queues: 2, config: { workers: 2 } },
  { name: "packed rings", packedDevice: true, packedGuest: true },
  { name: "packed rings without EVENT_IDX", packedDevice: true, packedGuest: true, eventIdx: false },
  { name: "a split guest on a packed device", packedDevice: true, config: { deviceRing: "packed" } },
  { name: "a device that cannot reach the guest's addresses", info: { iovaRange: { first: 0n, last: 2n ** 31n - 1n }, vringNumMax: 256 } },
  {
    name: "a device that cannot reach the guest's addresses, with packed rings",
    info: { iovaRange: { first: 2n ** 20n, last: 2n ** 30n - 1n } },
    packedDevice: true,
    packedGuest: true,
  },
  { name: "a device whose rings stop only together", queues: 2, info: { ringStop: "at-rest", deviceId: 2 }, together: true },
  { name: "a packed guest on a split device", packedGuest: true, config: { guestRing: "packed" } },
  { name: "a device ring that is smaller than the guest's", config: { deviceRingSize: 8 }, info: {} },
  { name: "a device ring that is larger than the guest's", num: 32, config: { deviceRingSize: 512 }, info: {} },
  { name: "a device whose rings are shorter than the guest's", info: { vringNumMax: 64 } },
  {
    name: "a packed device ring of an odd size for a split guest",
    packedDevice: true,
    config: { deviceRing: "packed", deviceRingSize: 23 },
  },
  { name: "the guest's own indirect tables", config: { indirect: "pass" } },
  { name: "the guest's own indirect tables, packed", packedDevice: true, packedGuest: true, config: { indirect: "pass" } },
  {
    name: "the guest's own indirect tables, which the device could not read",
    packedDevice: true,
    config: { indirect: "pass", deviceRing: "packed" },
  },
  { name: "indirect tables that are flattened", config: { indirect: "flatten" }, info: {} },
  {
    name: "indirect tables that are flattened into packed rings",
    packedDevice: true,
    config: { indirect: "flatten", deviceRing: "packed" },
  },
  { name: "IN_ORDER on both sides", inOrderDevice: true, inOrderGuest: true, jitterUs: 200 },
  { name: "IN_ORDER on both sides, packed", inOrderDevice: true, inOrderGuest: true, jitterUs: 200, packedDevice: true, packedGuest: true },
  { name: "IN_ORDER kept by the relay alone", inOrderGuest: true, jitterUs: 200, config: { inOrder: "on" }, info: {} },
  {
    name: "IN_ORDER kept by the relay alone, packed",
    inOrderGuest: true,
    jitterUs: 200,
    config: { inOrder: "on" },
    packedDevice: true,
    packedGuest: true,
    info: {},
  },
];

for (const entry of CASES) {
  Deno.test(`no request is lost, done twice or altered while the relay changes its mode at random: ${entry.name}`, async () => {
    await withRelay(entry, async (relay, driver, config, errors) => {
      const finished = driver.run({ requests: 6000 });
      let done = false;
      finished.catch(() => {}).finally(() => done = true);
      const random = seeded(7);
      while (!done) {
        config.mode = MODES[Math.floor(random() * MODES.length)]!;
        await relay.applyMode();
        await new Promise((resolve) => setTimeout(resolve, Math.floor(random() * 15)));
      }
      const report = await finished;
      assertClean(report, 6000);
      assert.deepEqual(errors, []);
      const translated = (entry.packedDevice ?? false) !== (entry.packedGuest ?? false);
      const [queue] = relay.queues;
      assert.equal(queue!.running, true);
      if (translated) assert.equal(queue!.state, "shadow");
      else if (entry.info === undefined) assert.ok(queue!.times.count > 0);
      else assert.equal(queue!.mode === "passthrough" || queue!.mode === "notify", false);
    });
  });
}

function seeded(seed: number): () => number {
  let state = seed;
  return () => {
    state = Math.imul(state, 1664525) + 1013904223 | 0;
    return (state >>> 0) / 2 ** 32;
  };
}

Deno.test("turning the dirty log on moves every queue to a mode that logs; what the device writes is marked; turning it off goes back", async () => {
  await withRelay({ name: "log", queues: 2 }, async (relay, driver) => {
    const run = driver.run({ durationMs: 60_000 });
    using log = createMemfd("log", LOG_BYTES);
    using mapping = mapFd(log.fd, { length: LOG_BYTES });
    const bitmap = new DirtyBitmap(mapping.buffer());
    await relay.setLogBase({ fd: log.fd, offset: 0, size: LOG_BYTES });
    await relay.setFeatures(relay.features | LOG_ALL);
    assert.deepEqual(relay.queues.map((queue) => queue.state), ["used", "used"]);
    await waitUntil("dirty pages", () => bitmap.count() > 0);
    await relay.setFeatures(relay.features);
    await waitUntil("passthrough", () => relay.queues.every((queue) => queue.state === "passthrough"));
    bitmap.clear();
    await driver.pause();
    assert.equal(bitmap.count(), 0, "nothing is marked any more");
    await driver.unpause();
    await driver.stop();
    assertClean(await run, 1);
  });
});
