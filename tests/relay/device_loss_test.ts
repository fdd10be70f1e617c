import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { createMemfd, mapFd, unixPair } from "../../src/ffi/mod.ts";
import { DirtyBitmap } from "../../src/dirty/bitmap.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayConfig, type RelayMode } from "../../src/relay/relay.ts";
import { VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";
import { waitUntil } from "../support/wait.ts";

const LOG_ALL = 1n << 26n;

/** A device daemon that dies: its connection ends, and it forgets its rings with all that it had in hand. */
class Daemon {
  #server: BackendServer | undefined;
  #ended: Promise<unknown> | undefined;

  constructor(readonly sim: SimDevice) {}

  async connect(): Promise<VhostUserFrontEnd> {
    const [a, b] = unixPair();
    this.#server = new BackendServer(a, this.sim);
    this.#ended = this.#server.run();
    return await VhostUserFrontEnd.fromStream(b, { timeoutMs: 10_000 });
  }

  async die(): Promise<void> {
    this.#server?.close();
    await this.#ended;
    await this.sim.reset();
    await this.sim.setMemTable([]);
  }
}

interface Case {
  name: string;
  mode: RelayMode;
  packed?: boolean;
  /** Answers come out of order. */
  jitter?: boolean;
  depth?: number;
}

interface World {
  daemon: Daemon;
  relay: Relay;
  driver: EmbeddedDriver;
  config: RelayConfig;
  errors: string[];
  losses: () => number;
  /** Kills the daemon and puts another connection in its place. */
  replace: () => Promise<void>;
}

async function withWorld({ mode, packed = false, jitter = false, depth = 16 }: Case, body: (world: World) => Promise<void>): Promise<void> {
  const config: RelayConfig = { ...DEFAULT_RELAY_CONFIG, mode };
  const errors: string[] = [];
  let losses = 0;
  await using sim = await SimDevice.open({
    ...{ kind: "blk", size: 32 << 20, packed },
    ...(jitter ? { latencyUs: 300, jitterUs: 900 } : {}),
  });
  const daemon = new Daemon(sim);
  let device = await daemon.connect();
  await using relay = new Relay(device, config, {
    log: () => {},
    error: (error) => errors.push(error.message),
    deviceLost: () => losses++,
  });
  await using driver = await EmbeddedDriver.open(relay, { depth, num: 128, packed, ramSize: 16 << 20, regionSize: 16 << 20 });
  const replace = async () => {
    const before = losses;
    await daemon.die();
    await waitUntil("the relay to notice", () => losses > before);
    await device.close();
    device = await daemon.connect();
    await relay.attach(device);
  };
  try {
    await body({ daemon, relay, driver, config, errors, losses: () => losses, replace });
  } finally {
    await driver.stop(0).catch(() => {});
    await relay.close();
    await device.close();
  }
}

function assertClean(report: { lost: number; duplicated: number; corrupted: number; completed: number }, atLeast: number): void {
  assert.deepEqual([report.lost, report.duplicated, report.corrupted], [0, 0, 0]);
  assert.ok(report.completed >= atLeast, `${report.completed} requests`);
}

const SURVIVED: Case[] = [
  { name: "shadow", mode: "shadow" },
  { name: "shadow, answers out of order", mode: "shadow", jitter: true },
  { name: "shadow, packed rings, answers out of order", mode: "shadow", packed: true, jitter: true },
  { name: "used, answers out of order", mode: "used", jitter: true },
  { name: "passthrough, answers in order", mode: "passthrough", depth: 4 },
  { name: "notify, answers in order", mode: "notify", depth: 4 },
];

for (const entry of SURVIVED) {
  Deno.test(`the guest's requests wait for a daemon that dies again and again, and none is lost or done twice: ${entry.name}`, async () => {
    await withWorld(entry, async ({ relay, driver, errors, replace }) => {
      const run = driver.run({ durationMs: 120_000 });
      for (let round = 0; round < 6; round++) {
        const before = (await driver.report()).completed;
        await waitUntil("requests", async () => (await driver.report()).completed > before + 200);
        await replace();
        assert.equal(relay.deviceLost, false);
      }
      const before = (await driver.report()).completed;
      await waitUntil("requests after the last loss", async () => (await driver.report()).completed > before + 200);
      await driver.stop();
      assertClean(await run, 1000);
      assert.deepEqual(errors, []);
      assert.equal(relay.needsReset, false);
    });
  });
}

Deno.test("while the device is away the queues wait, the VMM's questions are held, and both go on afterwards", async () => {
  await withWorld({ name: "hold", mode: "shadow", jitter: true }, async ({ daemon, relay, driver, replace, losses }) => {
    const run = driver.run({ durationMs: 60_000 });
    await waitUntil("requests", async () => (await driver.report()).completed > 200);
    await daemon.die();
    await waitUntil("the loss", () => losses() === 1);
    await waitUntil("the queue to wait", () => relay.queues[0]!.state === "waiting");
    assert.equal(relay.deviceLost, true);
    let answered = false;
    const config = relay.getConfig(0, 8).then((bytes) => {
      answered = true;
      return bytes;
    });
    // Turning the dirty log on does not wait: nothing is written now.
    using log = createMemfd("log", 1 << 18);
    using mapping = mapFd(log.fd, { length: 1 << 18 });
    await relay.setLogBase({ fd: log.fd, offset: 0, size: 1 << 18 });
    await relay.setFeatures(relay.features | LOG_ALL);
    assert.equal(answered, false);
    const device = await daemon.connect();
    await relay.attach(device);
    assert.equal((await config).length, 8);
    await waitUntil("dirty pages", () => new DirtyBitmap(mapping.buffer()).count() > 0);
    await relay.setFeatures(relay.features);
    await waitUntil("requests", async () => (await driver.report()).completed > 400);
    await driver.stop();
    assertClean(await run, 400);
    await device.close();
    void replace;
  });
});

Deno.test("what a device had in hand when it was lost while logging is marked dirty", async () => {
  await withWorld({ name: "log", mode: "shadow" }, async ({ daemon, relay, driver, losses, replace }) => {
    // Nothing is answered from here on: all that is written is what the lost device could have written.
    await driver.pause();
    using log = createMemfd("log", 1 << 18);
    using mapping = mapFd(log.fd, { length: 1 << 18 });
    await relay.setLogBase({ fd: log.fd, offset: 0, size: 1 << 18 });
    await relay.setFeatures(relay.features | LOG_ALL);
    const run = driver.run({ durationMs: 60_000 });
    await driver.unpause();
    await waitUntil("requests", async () => (await driver.report()).completed > 100);
    await daemon.die();
    await waitUntil("the loss", () => losses() === 1);
    await waitUntil("the queue to wait", () => relay.queues[0]!.state === "waiting");
    const bitmap = new DirtyBitmap(mapping.buffer());
    bitmap.clear();
    const held = relay.counters.of(0)[6]!;
    const device = await daemon.connect();
    await relay.attach(device);
    if (held > 0) assert.ok(bitmap.count() > 0);
    await driver.stop();
    assertClean(await run, 100);
    await device.close();
    void replace;
  });
});

Deno.test("a guest that is stopped while the device is away gets its position when the device has finished what it had", async () => {
  await withWorld({ name: "stop", mode: "shadow", jitter: true }, async ({ daemon, relay, driver, losses }) => {
    const run = driver.run({ durationMs: 60_000 });
    await waitUntil("requests", async () => (await driver.report()).completed > 200);
    await daemon.die();
    await waitUntil("the loss", () => losses() === 1);
    const paused = driver.pause();
    const device = await daemon.connect();
    await relay.attach(device);
    await paused;
    await driver.unpause();
    await driver.stop();
    assertClean(await run, 200);
    await device.close();
  });
});

Deno.test("a daemon that comes back without a feature that the guest uses is refused, and a better one is taken", async () => {
  await withWorld({ name: "features", mode: "shadow" }, async ({ daemon, relay, driver, losses }) => {
    const run = driver.run({ durationMs: 60_000 });
    await waitUntil("requests", async () => (await driver.report()).completed > 100);
    await daemon.die();
    await waitUntil("the loss", () => losses() === 1);
    {
      const device = await daemon.connect();
      const poor = new Proxy(device, {
        get: (target, name) => {
          if (name === "getFeatures") return () => Promise.resolve(1n << 32n);
          const value = Reflect.get(target, name, target);
          return typeof value === "function" ? value.bind(target) : value;
        },
      });
      await assert.rejects(relay.attach(poor), { code: "FEATURES_CHANGED" });
      await device.close();
    }
    assert.equal(relay.deviceLost, true);
    const device = await daemon.connect();
    await relay.attach(device);
    await waitUntil("requests", async () => (await driver.report()).completed > 300);
    await driver.stop();
    assertClean(await run, 300);
    await device.close();
  });
});

Deno.test("in passthrough a queue goes on only where that is safe: otherwise it says that it needs a reset", async () => {
  await withWorld({ name: "unknown", mode: "passthrough", jitter: true, depth: 32 }, async ({ relay, driver, errors, replace }) => {
    const run = driver.run({ durationMs: 60_000 });
    run.catch(() => {});
    for (let round = 0; round < 100 && !relay.needsReset; round++) {
      const before = (await driver.report()).completed;
      await waitUntil("requests", async () => (await driver.report()).completed > before + 50);
      await replace();
    }
    assert.equal(relay.needsReset, true);
    assert.match(relay.queues[0]!.error!.message, /out of order/);
    assert.equal(await relay.getStatus() & 64, 64, "NEEDS_RESET");
    assert.deepEqual(errors, []);
    const { duplicated, corrupted } = await driver.report();
    assert.deepEqual([duplicated, corrupted], [0, 0]);
  });
});
