/**
 * A device that keeps requests for ever, when the relay itself ends.
 */
import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { unixPair } from "../../src/ffi/mod.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayMode } from "../../src/relay/relay.ts";
import type { VhostBackend } from "../../src/vhost/backend.ts";
import { VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { TempDir } from "../support/temp.ts";
import { waitUntil } from "../support/wait.ts";

const HOUR_US = 3600e6;

interface Stuck {
  device: VhostBackend;
  sim: SimDevice;
}

/** A disk that takes an hour for each request. */
async function withStuckDisk(kind: "in-process" | "vhost-user", body: (stuck: Stuck) => Promise<void>): Promise<void> {
  await using sim = await SimDevice.open({ kind: "blk", size: 1 << 20, latencyUs: HOUR_US });
  if (kind === "in-process") return await body({ device: sim, sim });
  const [a, b] = unixPair();
  const server = new BackendServer(a, sim);
  const ended = server.run();
  try {
    await using device = await VhostUserFrontEnd.fromStream(b, { timeoutMs: 10_000 });
    await body({ device, sim });
  } finally {
    server.close();
    // As a daemon that is killed: what it holds is gone.
    await sim.reset();
    await ended;
  }
}

for (const kind of ["in-process", "vhost-user"] as const) {
  for (const mode of ["shadow", "used", "passthrough"] as RelayMode[]) {
    Deno.test(`a relay that is closed while a stopped ring waits for its device ends, and whoever waited is told: ${kind}, ${mode}`, async () => {
      await withStuckDisk(kind, async ({ device, sim }) => {
        const events = { log: () => {}, error: () => {}, ...(kind === "vhost-user" ? { deviceLost: () => {} } : {}) };
        await using relay = new Relay(device, { ...DEFAULT_RELAY_CONFIG, mode, stopTimeoutMs: Infinity }, events);
        const driver = await EmbeddedDriver.open(relay, { workload: "blk", depth: 4, num: 64, ramSize: 4 << 20, regionSize: 1 << 20 });
        const run = driver.run({ requests: 4, drainMs: 60_000 }).catch(() => {});
        await waitUntil("the requests at the device", async () => (await sim.counters())[0]!.taken === 4);
        const answer = relay.getVringBase(0).then(() => "answered", (error) => error.code);
        const begun = performance.now();
        await relay.close();
        assert.ok(performance.now() - begun < 20_000);
        assert.equal(await answer, "DEVICE_LOST");
        assert.equal((await sim.counters())[0]!.used, 0);
        await driver.stop(0).catch(() => {});
        await driver[Symbol.asyncDispose]().catch(() => {});
        await run;
      });
    });
  }
}

Deno.test("SIGTERM while the device keeps requests for ever ends the relay after --stop-timeout, with exit code 124", async () => {
  using folder = new TempDir();
  await using relay = await RelayProcess.start({
    folder: folder.path,
    device: "sim:blk,latency=1h",
    args: ["--mode", "shadow", "--stop-timeout", "300ms"],
  });
  const device = await VhostUserFrontEnd.connect(relay.front);
  const driver = await EmbeddedDriver.open(device, { workload: "blk", depth: 4, num: 64, ramSize: 4 << 20, regionSize: 1 << 20 });
  const run = driver.run({ requests: 4, drainMs: 60_000 }).catch(() => {});
  await relay.waitStatus("requests in flight", (status) => status.queues[0]?.inflight === 4);
  relay.process.kill("SIGTERM");
  await relay.process.expectExit(124);
  relay.process.stderr.matching(/has not given back what it has within 300 ms/)[0]!;
  await device.close();
  await driver.stop(0).catch(() => {});
  await driver[Symbol.asyncDispose]().catch(() => {});
  await run;
});
