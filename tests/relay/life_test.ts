import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { createEventfd, drainEventfd, signalEventfd, unixPair } from "../../src/ffi/mod.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayConfig, type RelayMode } from "../../src/relay/relay.ts";
import { VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";
import { HandMemory, HandRing } from "../support/hand_ring.ts";
import { waitUntil } from "../support/wait.ts";

interface World {
  sim: SimDevice;
  relay: Relay;
  config: RelayConfig;
  /** The VMM's end of the socket to the relay. */
  vmm: VhostUserFrontEnd;
  errors: string[];
}

async function withWorld(
  mode: RelayMode,
  body: (world: World) => Promise<void>,
  device: Parameters<typeof SimDevice.open>[0] = { kind: "blk", size: 32 << 20, queues: 4 },
): Promise<void> {
  const config: RelayConfig = { ...DEFAULT_RELAY_CONFIG, mode };
  const errors: string[] = [];
  await using sim = await SimDevice.open(device);
  await using relay = new Relay(sim, config, { log: () => {}, error: (error) => errors.push(error.message) });
  const [a, b] = unixPair();
  const ended = new BackendServer(a, relay, { offerLog: true, onError: (error) => errors.push(error.message) }).run();
  {
    await using vmm = await VhostUserFrontEnd.fromStream(b, { timeoutMs: 20_000 });
    await body({ sim, relay, config, vmm, errors });
  }
  assert.equal(await ended, undefined);
}

function assertClean(report: { lost: number; duplicated: number; corrupted: number; completed: number }, atLeast: number): void {
  assert.deepEqual([report.lost, report.duplicated, report.corrupted], [0, 0, 0]);
  assert.ok(report.completed >= atLeast, `${report.completed} requests`);
}

const SHAPES = [
  { queues: 1, num: 64, depth: 4, eventIdx: false, indirect: false },
  { queues: 4, num: 256, depth: 32, eventIdx: true, indirect: true },
  { queues: 2, num: 16, depth: 4, eventIdx: true, indirect: false },
] as const;

for (const mode of ["passthrough", "notify", "used", "shadow"] as const) {
  for (const how of ["RESET_DEVICE", "STATUS 0"] as const) {
    Deno.test(`one driver after the other, with other features and ring sizes, each reset by ${how} under load: ${mode}`, async () => {
      await withWorld(mode, async ({ relay, vmm, errors }) => {
        for (const shape of [...SHAPES, ...SHAPES]) {
          await using driver = await EmbeddedDriver.open(vmm, { ...shape, ramSize: 16 << 20, regionSize: 8 << 20 });
          const run = driver.run({ durationMs: 60_000 });
          run.catch(() => {});
          await waitUntil("requests", async () => (await driver.report()).completed > 100);
          assert.deepEqual(relay.queues.filter((queue) => queue.running).map((queue) => queue.mode), Array(shape.queues).fill(mode));
          await driver.pause();
          if (how === "RESET_DEVICE") await vmm.reset();
          else await vmm.setStatus(0);
          assert.equal(relay.queues.some((queue) => queue.running), false);
          const { duplicated, corrupted } = await driver.report();
          assert.deepEqual([duplicated, corrupted], [0, 0]);
        }
        await using driver = await EmbeddedDriver.open(vmm, { queues: 1, ramSize: 16 << 20, regionSize: 8 << 20 });
        assertClean(await driver.run({ requests: 500 }), 500);
        assert.deepEqual(errors, []);
      });
    });
  }

  Deno.test(`queues are disabled and enabled one by one under load, and nothing is lost: ${mode}`, async () => {
    await withWorld(mode, async ({ vmm, relay, config, errors }) => {
      await using driver = await EmbeddedDriver.open(vmm, { queues: 4, depth: 8, num: 64, ramSize: 16 << 20, regionSize: 8 << 20 });
      const run = driver.run({ durationMs: 60_000 });
      for (let i = 0; i < 12; i++) {
        const index = i % 4;
        await vmm.setVringEnable(index, false);
        if (i % 3 === 2) {
          config.mode = config.mode === mode ? "shadow" : mode;
          await relay.applyMode();
        }
        await new Promise((resolve) => setTimeout(resolve, 5));
        await vmm.setVringEnable(index, true);
      }
      const { completed } = await driver.report();
      await waitUntil("more requests", async () => (await driver.report()).completed > completed + 200);
      await driver.stop();
      assertClean(await run, 200);
      assert.deepEqual(errors, []);
    });
  });
}

Deno.test("a change of the configuration reaches the VMM, and what it writes there reaches the device", async () => {
  await withWorld("auto", async ({ sim, vmm }) => {
    let changes = 0;
    vmm.onConfigChange = () => changes++;
    sim.onConfigChange!();
    await waitUntil("the message", () => changes === 1);
    const before = await vmm.getConfig(0, 60);
    assert.deepEqual(before, await sim.getConfig(0, 60));
    const written: unknown[] = [];
    const setConfig = (offset: number, bytes: Uint8Array) => {
      written.push([offset, [...bytes]]);
      return Promise.resolve();
    };
    Object.assign(sim, { setConfig });
    await vmm.setConfig(32, Uint8Array.of(1));
    assert.deepEqual(written, [[32, [1]]]);
  });
});

Deno.test("a queue that breaks a rule shows as NEEDS_RESET in the status and on its err eventfd, until the device is reset", async () => {
  await withWorld("shadow", async ({ vmm, relay }) => {
    using memory = new HandMemory();
    using ring = new HandRing(memory, 0, 0);
    using err = createEventfd();
    const start = async () => {
      const { num, base, addresses, kick, call } = ring.start();
      await vmm.setStatus(3);
      await vmm.setFeatures(1n << 32n);
      await vmm.setMemTable([{ ...memory.region, uaddr: 0x7000_0000_0000 }]);
      await vmm.setVringNum(0, num);
      await vmm.setVringBase(0, base);
      await vmm.setVringAddresses(0, addresses);
      await vmm.setVringCall(0, call);
      await vmm.setVringErr(0, err.fd);
      await vmm.setVringKick(0, kick);
      await vmm.setVringEnable(0, true);
      await vmm.setStatus(15);
    };
    await start();
    assert.equal(await vmm.getStatus(), 15);
    ring.offer([2 ** 40, 64, false]);
    signalEventfd(ring.kick.fd);
    await waitUntil("the failure", () => relay.needsReset);
    assert.equal(await vmm.getStatus(), 15 | 64);
    assert.ok(drainEventfd(err.fd) > 0);
    await vmm.setStatus(0);
    assert.equal(await vmm.getStatus(), 0);
    ring.availIdx = 0;
    await start();
    assert.equal(await vmm.getStatus(), 15);
    memory.bytes.fill(5, 0x8000, 0x8040);
    ring.offer([0x8000, 64, false], [0x9000, 64, true]);
    signalEventfd(ring.kick.fd);
    await waitUntil("the answer", () => ring.usedIdx === 1);
    assert.equal(memory.bytes[0x9000], 5);
  }, { kind: "loopback" });
});
