/**
 * What becomes of more requests than a device takes, and of their order when it is lost.
 */
import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { unixPair } from "../../src/ffi/mod.ts";
import { DEFAULT_RELAY_CONFIG, Relay } from "../../src/relay/relay.ts";
import { VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";
import { type Lies, LyingDevice } from "../support/lying_device.ts";
import { waitUntil } from "../support/wait.ts";

const quiet = { log: () => {}, error: () => {} };

for (const core of ["wasm", "js"] as const) {
  Deno.test(`a guest that floods a slow device is held by its own ring: the device is given no more than its ring holds, and the relay does not grow: core ${core}`, async () => {
    const num = 16;
    await using sim = await SimDevice.open({ kind: "blk", size: 8 << 20, latencyUs: 2000 });
    await using relay = new Relay(sim, { ...DEFAULT_RELAY_CONFIG, mode: "shadow", deviceRingSize: num, indirect: "flatten", core }, quiet);
    const shape = { workload: "blk", depth: 256, num: 1024, ramSize: 64 << 20, regionSize: 4 << 20, requestSize: 512 } as const;
    await using driver = await EmbeddedDriver.open(relay, shape);
    const run = driver.run({ requests: 1500, drainMs: 60_000 });
    const done = async () => (await driver.report()).completed;
    await waitUntil("the beginning", async () => await done() > 200, 30_000);
    const before = Deno.memoryUsage().rss;
    let most = 0;
    let waiting = 0;
    await waitUntil("the flood's end", async () => {
      const { taken, used } = (await sim.counters())[0]!;
      most = Math.max(most, taken - used);
      const { avail } = relay.queues[0]!.addresses!;
      const offered = new Uint16Array(relay.memory.buffer(avail, 4))[1]!;
      waiting = Math.max(waiting, (offered - taken) & 0xffff);
      return await done() >= 1500;
    }, 60_000);
    const report = await run;
    assert.deepEqual([report.completed, report.lost, report.duplicated, report.corrupted], [1500, 0, 0, 0]);
    assert.ok(most > 0 && most <= num, `${most} requests at the device at once`);
    assert.ok(waiting > 100, `${waiting} requests waited in the guest's ring`);
    const grown = Deno.memoryUsage().rss - before;
    assert.ok(grown < 64 << 20, `${grown >> 20} MiB more`);
  });
}

for (const mode of ["used", "shadow"] as const) {
  Deno.test(`what a lost device held is offered to its successor in the order in which it was taken, before anything newer: ${mode}`, async () => {
    await using rest = new AsyncDisposableStack();
    const connect = async (lies: Lies) => {
      const [a, b] = unixPair();
      const device = rest.use(new LyingDevice(lies));
      const server = new BackendServer(a, device);
      const ended = server.run().finally(() => device.close());
      rest.defer(async () => {
        server.close();
        await ended;
      });
      return { device, server, front: rest.use(await VhostUserFrontEnd.fromStream(b, { timeoutMs: 10_000 })) };
    };
    const kept = [20, 23, 24, 31];
    const first = await connect({ keep: kept });
    let losses = 0;
    await using relay = new Relay(first.front, { ...DEFAULT_RELAY_CONFIG, mode }, { ...quiet, deviceLost: () => losses++ });
    const shape = { num: LyingDevice.ringSize, depth: 8, workload: "loopback" } as const;
    await using driver = await EmbeddedDriver.open(relay, shape);
    const run = driver.run({ requests: 600, drainMs: 60_000 });
    await waitUntil("requests around those that are kept", () => first.device.seen.length > 200, 30_000);
    first.server.close();
    await waitUntil("the loss", () => losses === 1);
    const held = first.device.held;
    assert.ok(kept.length <= held.length && held.length <= 8, `${held.length} held`);
    const second = await connect({});
    await relay.attach(second.front);
    const report = await run;
    assert.deepEqual([report.completed, report.lost, report.duplicated, report.corrupted], [600, 0, 0, 0]);
    assert.deepEqual(second.device.seen.slice(0, held.length), held);
  });
}
