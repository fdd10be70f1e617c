import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { listenUnix } from "../../src/ffi/mod.ts";
import { FRONT_END_WITH_INFLIGHT, VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { serve } from "../../src/vhost_user/serve.ts";
import type { UpgradeReport } from "../../src/relay/upgrade.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { TempDir } from "../support/temp.ts";
import { waitUntil } from "../support/wait.ts";

const TIMES = Deno.env.get("SVQ_SOAK") === "1" ? 20 : 3;

/** A disk daemon whose answers come out of order; each front-end meets it fresh. */
async function withDisk<T>(path: string, packed: boolean, body: () => Promise<T>): Promise<T> {
  await using sim = await SimDevice.open({ kind: "blk", size: 32 << 20, queues: 2, packed, latencyUs: 300, jitterUs: 1500 });
  using listener = listenUnix(path);
  const served = serve(listener, async () => {
    await sim.reset();
    await sim.setMemTable([]);
    return { backend: sim };
  });
  try {
    return await body();
  } finally {
    listener.close();
    await served;
  }
}

interface World {
  relay: RelayProcess;
  driver: EmbeddedDriver;
  /** Waits until more requests have come back. */
  progress: () => Promise<void>;
  upgrade: (program?: string[]) => Promise<UpgradeReport>;
}

async function underLoad(
  folder: TempDir,
  device: string,
  options: { args: string[]; packed: boolean },
  body: (world: World) => Promise<void>,
) {
  await using relay = await RelayProcess.start({ folder: folder.path, device, args: options.args });
  await using front = await VhostUserFrontEnd.connect(relay.front, { protocolFeatures: FRONT_END_WITH_INFLIGHT });
  const shape = { depth: 48, num: 64, queues: 2, packed: options.packed, ramSize: 32 << 20, regionSize: 24 << 20, inflight: true };
  await using driver = await EmbeddedDriver.open(front, { ...shape, workload: "blk" });
  const run = driver.run({ durationMs: 3_600_000 });
  const progress = async () => {
    const before = (await driver.report()).completed;
    await waitUntil("requests", async () => (await driver.report()).completed > before + 100);
  };
  const upgrade = (program?: string[]) => relay.upgrade(program);
  try {
    await progress();
    await body({ relay, driver, progress, upgrade });
    await progress();
    const status = await relay.status();
    assert.deepEqual(status.queues.map((queue) => queue.errors), [0, 0]);
    const report = await driver.stop();
    await run;
    assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.faults], [0, 0, 0, []]);
  } finally {
    await driver.stop(0).catch(() => {});
  }
}

const CASES = [
  { name: "shadow, a vhost-user device", args: ["--mode", "shadow"], packed: false, device: "daemon" },
  { name: "passthrough, packed, a vhost-user device", args: ["--mode", "passthrough"], packed: true, device: "daemon" },
  {
    name: "used, a disk in the relay's own memory",
    args: ["--mode", "used"],
    packed: false,
    device: "sim:blk,size=32MiB,queues=2,latency=300us,jitter=1500us",
  },
];

for (const { name, args, packed, device } of CASES) {
  Deno.test(`a relay is upgraded again and again under checked load, and nothing is lost or done twice: ${name}`, async () => {
    using folder = new TempDir();
    const socket = folder.join("disk.sock");
    await withDisk(
      socket,
      packed,
      () =>
        underLoad(folder, device === "daemon" ? `unix:${socket}` : device, { args, packed }, async ({ relay, progress, upgrade }) => {
          let { pid } = await relay.status();
          for (let time = 0; time < TIMES; time++) {
            const report = await upgrade();
            assert.equal(report.pid_before, pid);
            assert.notEqual(report.pid, pid);
            pid = report.pid;
            await progress();
          }
          const status = await relay.status();
          assert.equal(status.pid, pid);
          assert.equal(status.state, "running");
          await relay.process.expectExit(0);
        }),
    );
  });
}

const BAD = new URL("../support/bad_upgrade.ts", import.meta.url).pathname;
const WAYS = [
  "ends at once",
  "does not know the format",
  "dies with the state in its hands",
  "cannot use the state",
  "dies in front of the first ring",
  "fails with its rings running",
  "dies with its rings running",
];

for (const { name, args, packed, device } of CASES) {
  Deno.test(`a new version that fails at any step leaves the old relay running, and nothing is lost or done twice: ${name}`, async () => {
    using folder = new TempDir();
    const socket = folder.join("disk.sock");
    await withDisk(
      socket,
      packed,
      () =>
        underLoad(folder, device === "daemon" ? `unix:${socket}` : device, { args, packed }, async ({ relay, progress, upgrade }) => {
          // In passthrough nobody records what the new version has taken: where it dies without a word the guest has to reset its device.
          for (const way of args[1] === "passthrough" ? WAYS.slice(0, -1) : WAYS) {
            await assert.rejects(
              upgrade([Deno.execPath(), "run", "-A", "--quiet", BAD, way]),
              { code: "UPGRADE_FAILED", exitCode: 7 },
              way,
            );
            await progress();
            const status = await relay.status();
            assert.deepEqual([status.pid, status.state, status.needs_reset], [relay.process.pid, "running", false], way);
          }
          await assert.rejects(upgrade(["/no/such/program"]), { code: "UPGRADE_FAILED", exitCode: 7 });
          await progress();
          const { pid } = await upgrade();
          await progress();
          assert.equal((await relay.status()).pid, pid);
        }),
    );
  });
}

Deno.test("a device that does not give back what it has in time keeps its relay from being upgraded, and its requests come back", async () => {
  using folder = new TempDir();
  const device = "sim:blk,size=32MiB,queues=2,latency=2s";
  await using relay = await RelayProcess.start({ folder: folder.path, device, args: ["--mode", "shadow"] });
  await using front = await VhostUserFrontEnd.connect(relay.front);
  await using driver = await EmbeddedDriver.open(front, { depth: 4, num: 64, ramSize: 16 << 20, regionSize: 8 << 20, workload: "blk" });
  const run = driver.run({ requests: 8 });
  await relay.waitStatus("requests in flight", (status) => status.queues[0]?.inflight === 4);
  const refused = relay.upgrade(undefined, { drain_timeout_ms: 100 });
  await assert.rejects(refused, { code: "UPGRADE_FAILED", exitCode: 7, message: /longer than 100 ms/ });
  const report = await run;
  assert.deepEqual([report.completed, report.lost, report.duplicated, report.corrupted], [8, 0, 0, 0]);
  assert.equal((await relay.status()).pid, relay.process.pid);
  await relay.stop();
});

Deno.test("a relay without a front-end is upgraded, and the next front-end meets the new version", async () => {
  using folder = new TempDir();
  await using relay = await RelayProcess.start({ folder: folder.path, device: "sim:blk,size=32MiB", args: [] });
  const { pid } = await relay.upgrade();
  await relay.process.expectExit(0);
  await using front = await VhostUserFrontEnd.connect(relay.front);
  await using driver = await EmbeddedDriver.open(front, { depth: 8, num: 64, ramSize: 16 << 20, regionSize: 8 << 20, workload: "blk" });
  const report = await driver.run({ requests: 500 });
  assert.deepEqual([report.completed, report.lost], [500, 0]);
  assert.equal((await relay.status()).pid, pid);
});
