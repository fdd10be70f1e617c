import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { DEFAULT_RELAY_CONFIG, Relay } from "../../src/relay/relay.ts";
import { waitUntil } from "../support/wait.ts";

const MODES = ["notify", "used", "shadow", "passthrough"] as const;
/** Far above what a switch takes on a busy machine, far below what it took to wait for a pause in the traffic. */
const MOST_MS = 1500;

for (const eventIdx of [true, false]) {
  Deno.test(`a guest that is sent frames without a pause changes its modes all the same${eventIdx ? "" : ", without EVENT_IDX too"}`, async () => {
    await using far = await SimDevice.open({ kind: "net", cable: "without a pause" });
    await using near = await SimDevice.open({ kind: "net", cable: "without a pause" });
    const config = { ...DEFAULT_RELAY_CONFIG, mode: "passthrough" as typeof MODES[number] };
    await using relay = new Relay(near, config, { log: () => {}, error: (error) => assert.fail(error.message) });
    await using sender = await EmbeddedDriver.open(far, { echo: false, seed: 7, rate: 2000, ramSize: 16 << 20 });
    // Many receive buffers: the device does not run out of them while its kicks are silent.
    await using hearer = await EmbeddedDriver.open(relay, { echo: false, seed: 8, num: 1024, depth: 512, eventIdx, ramSize: 192 << 20 });
    await hearer.unpause();
    const run = sender.run({ drainMs: 5000 });
    run.catch(() => {});
    let last = 0;
    for (const mode of [...MODES, ...MODES]) {
      await waitUntil("frames come", async () => {
        const { received } = (await hearer.report()).net!;
        if (received < last + 20) return false;
        last = received;
        return true;
      });
      config.mode = mode;
      const begun = performance.now();
      await relay.applyMode();
      const took = performance.now() - begun;
      assert.ok(took < MOST_MS, `${mode} took ${took.toFixed(0)} ms`);
    }
    const { sent } = (await sender.stop(5000)).net!;
    await waitUntil("all frames", async () => (await hearer.report()).net!.received === sent);
    const { missing, reordered, duplicated } = (await hearer.report()).net!;
    assert.deepEqual([missing, reordered, duplicated], [0, 0, 0]);
  });
}
