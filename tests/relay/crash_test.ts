import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { listenUnix, type OwnedFd } from "../../src/ffi/mod.ts";
import type { InflightPlace } from "../../src/vhost/backend.ts";
import { FRONT_END_WITH_INFLIGHT, VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { serve } from "../../src/vhost_user/serve.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { TempDir } from "../support/temp.ts";
import { waitUntil } from "../support/wait.ts";

const SOAK = Deno.env.get("SVQ_SOAK") === "1";
const KILLS = SOAK ? 50 : 2;

interface Case {
  name: string;
  args: string[];
  packed: boolean;
  /** Which core runs it; default the default one. */
  core?: "js";
}

const CASES: Case[] = [
  { name: "shadow, split", args: ["--mode", "shadow"], packed: false },
  { name: "used", args: ["--mode", "used"], packed: false },
  { name: "--resilient, packed", args: ["--resilient"], packed: true },
  {
    name: "shadow, packed guest on split device rings",
    args: ["--mode", "shadow", "--guest-ring", "packed", "--device-ring", "split"],
    packed: true,
  },
  { name: "shadow, split, JavaScript core", args: ["--mode", "shadow", "--core", "js"], packed: false, core: "js" },
  { name: "--resilient, packed, JavaScript core", args: ["--resilient", "--core", "js"], packed: true, core: "js" },
];

/**
 * A disk daemon whose answers come out of order; each front-end meets it fresh.
 *
 * @param latencyUs long enough that a guest which gets no turn on a busy machine still has requests in hand when a relay is killed
 */
async function withDisk<T>(path: string, packed: boolean, body: () => Promise<T>, latencyUs = 5000): Promise<T> {
  await using sim = await SimDevice.open({ kind: "blk", size: 32 << 20, queues: 2, packed, latencyUs, jitterUs: 1500 });
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

// In the default run one case of the JavaScript core is enough: tests/relay/inflight_test.ts kills both everywhere.
for (const { name, args, packed, core } of SOAK ? CASES : CASES.slice(0, -1)) {
  Deno.test(`kill -9 of a relay under load, and a new one of the same name: nothing is lost, nothing done twice: ${name}`, async () => {
    using folder = new TempDir();
    const socket = folder.join("disk.sock");
    let seed = 20260 + name.length;
    const random = () => (seed = (seed * 1103515245 + 12345) & 0x7fffffff) / 0x7fffffff;
    await withDisk(socket, packed, async () => {
      const start = () => RelayProcess.start({ folder: folder.path, device: `unix:${socket}`, args });
      const connect = (relay: RelayProcess) => VhostUserFrontEnd.connect(relay.front, { protocolFeatures: FRONT_END_WITH_INFLIGHT });
      let relay = await start();
      await using rest = new AsyncDisposableStack();
      rest.defer(() => relay[Symbol.asyncDispose]());
      let device = await connect(relay);
      rest.defer(() => device.close());
      const options = { depth: 48, num: 64, queues: 2, packed, ramSize: 32 << 20, regionSize: 24 << 20, inflight: true };
      await using driver = await EmbeddedDriver.open(device, { ...options, workload: "blk" });
      const run = driver.run({ durationMs: 3_600_000 });
      let redone = 0;
      for (let kill = 0; kill < KILLS; kill++) {
        const before = (await driver.report()).completed;
        await waitUntil("requests", async () => (await driver.report()).completed > before + 100);
        await new Promise((resolve) => setTimeout(resolve, random() * 30));
        relay.process.kill("SIGKILL");
        await driver.bereave();
        await relay.process.status;
        await device.close();
        relay = await start();
        device = await connect(relay);
        await driver.reattach(device);
        redone += (await relay.status()).queues.reduce((sum, queue) => sum + queue.redone, 0);
      }
      assert.ok(redone > 0, "no kill came with a request in hand that the next relay did again");
      const before = (await driver.report()).completed;
      await waitUntil("requests after the last kill", async () => (await driver.report()).completed > before + 100);
      const status = await relay.status();
      assert.deepEqual(status.queues.map((queue) => queue.errors), [0, 0]);
      assert.equal(status.needs_reset, false);
      assert.equal(status.inflight_region, true);
      assert.deepEqual(status.queues.map((queue) => queue.core), [core ?? "wasm", core ?? "wasm"]);
      const report = await driver.stop();
      await run;
      assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.faults], [0, 0, 0, []]);
    });
  });
}

Deno.test("a relay that is stopped while its device answers too late ends at its deadline, and the next one does the requests again", async () => {
  using folder = new TempDir();
  const socket = folder.join("disk.sock");
  const start = () =>
    RelayProcess.start({ folder: folder.path, device: `unix:${socket}`, args: ["--resilient", "--drain-timeout", "200ms"] });
  const connect = (relay: RelayProcess) => VhostUserFrontEnd.connect(relay.front, { protocolFeatures: FRONT_END_WITH_INFLIGHT });
  await withDisk(socket, false, async () => {
    let relay = await start();
    await using rest = new AsyncDisposableStack();
    rest.defer(() => relay[Symbol.asyncDispose]());
    let device = await connect(relay);
    rest.defer(() => device.close());
    const options = { depth: 8, num: 64, ramSize: 16 << 20, regionSize: 8 << 20, inflight: true };
    await using driver = await EmbeddedDriver.open(device, { ...options, workload: "blk" });
    const run = driver.run({ requests: 8 });
    await relay.waitStatus("requests in flight", (status) => status.queues[0]?.inflight === 8);
    relay.process.kill("SIGTERM");
    await relay.process.expectExit(124);
    relay.process.stderr.matching(/record of it goes to the next relay/)[0]!;
    await device.close();
    relay = await start();
    device = await connect(relay);
    await driver.reattach(device);
    const report = await run;
    assert.deepEqual([report.completed, report.lost, report.duplicated, report.corrupted, report.faults], [8, 0, 0, 0, []]);
  }, 4_000_000);
});

for (const packed of [false, true]) {
  Deno.test(`a VMM that resets its device while no relay runs, and keeps the record, begins anew: ${packed ? "packed" : "split"}`, async () => {
    using folder = new TempDir();
    const socket = folder.join("disk.sock");
    await withDisk(socket, packed, async () => {
      const start = () => RelayProcess.start({ folder: folder.path, device: `unix:${socket}`, args: ["--resilient"] });
      const shape = {
        depth: 24,
        num: 64,
        queues: 2,
        packed,
        ramSize: 16 << 20,
        regionSize: 8 << 20,
        inflight: true,
        workload: "blk",
      } as const;
      let region: { file: OwnedFd; place: InflightPlace } | undefined;
      const connect = async (relay: RelayProcess) => {
        const front = await VhostUserFrontEnd.connect(relay.front, { protocolFeatures: FRONT_END_WITH_INFLIGHT });
        const make = front.createInflight!.bind(front);
        const createInflight = async (queues: number, num: number) => {
          region ??= await make(queues, num);
          const file = region.file.dup();
          return { file, place: { ...region.place, fd: file.fd } };
        };
        return Object.defineProperty(front, "createInflight", { value: createInflight });
      };
      {
        await using relay = await start();
        await using device = await connect(relay);
        await using driver = await EmbeddedDriver.open(device, shape);
        driver.run({ durationMs: 3_600_000 }).catch(() => {});
        await waitUntil("requests", async () => (await driver.report()).completed > 100);
        relay.process.kill("SIGKILL");
        await driver.bereave();
        await relay.process.status;
        await driver.stop(0).catch(() => {});
      }
      await using relay = await start();
      await using device = await connect(relay);
      await using driver = await EmbeddedDriver.open(device, shape);
      const report = await driver.run({ requests: 500 });
      assert.deepEqual([report.completed, report.lost, report.duplicated, report.corrupted, report.faults], [500, 0, 0, 0, []]);
      assert.ok(relay.process.stderr.matching(/was reset while no relay ran/).length > 0, relay.process.stderr.text);
      region!.file.close();
    }, 100_000);
  });
}
