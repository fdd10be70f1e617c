import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { DEFAULT_RELAY_CONFIG, Relay } from "../../src/relay/relay.ts";
import { waitUntil } from "../support/wait.ts";

const LOG_ALL = 1n << 26n;
const MODES = ["passthrough", "notify", "used", "shadow"] as const;

for (const [pairs, packed] of [[1, false], [2, false], [1, true]] as const) {
  const rings = packed ? "packed rings" : "split rings";
  Deno.test(`no frame is lost, repeated or overtaken while the relay changes its mode: ${rings}, ${pairs} queue pairs`, async () => {
    const errors: string[] = [];
    await using sim = await SimDevice.open({ kind: "net", cable: "loop", queues: pairs * 2 + 1, packed });
    const config = { ...DEFAULT_RELAY_CONFIG };
    await using relay = new Relay(sim, config, { log: () => {}, error: (error) => errors.push(error.message) });
    await using driver = await EmbeddedDriver.open(relay, { queues: pairs, depth: 16, num: 64, packed, ramSize: 16 << 20 });
    const run = driver.run({ drainMs: 20_000 });
    run.catch(() => {});
    let last = 0;
    const moving = () =>
      waitUntil("frames come", async () => {
        const { net } = await driver.report();
        if (net!.received < last + 50) return false;
        last = net!.received;
        return true;
      });
    for (const mode of [...MODES, ...MODES.toReversed(), "shadow", "passthrough"] as const) {
      await moving();
      config.mode = mode;
      await relay.applyMode();
      const receive = relay.queues.find(({ index }) => index === 0)!;
      // Packed rings have no mode of their own for the used ring only.
      assert.equal(receive.mode, packed && mode === "used" ? "shadow" : mode);
    }
    // A guest announces itself and is filtered as before, whatever happened to its rings.
    assert.ok(await driver.control({ name: "VLAN_ADD", vlan: 9 }));
    assert.deepEqual((await sim.netState()).vlans, [9]);
    await moving();
    const report = await driver.stop(20_000);
    assert.deepEqual(errors, []);
    assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.missedCalls], [0, 0, 0, 0]);
    // Two pairs take two ways: only within one is there an order.
    if (pairs === 1) assert.equal(report.outOfOrder, 0);
  });
}

Deno.test("every queue of a net device logs as soon as the answer to LOG_ALL is there, twice in a row, and none does after a cancel", async () => {
  await using sim = await SimDevice.open({ kind: "net", cable: "loop", queues: 5 });
  await using relay = new Relay(sim, { ...DEFAULT_RELAY_CONFIG, mode: "auto" }, { log: () => {}, error: () => {} });
  await using driver = await EmbeddedDriver.open(relay, { queues: 2, depth: 16, num: 64, ramSize: 16 << 20 });
  const run = driver.run({ drainMs: 20_000 });
  run.catch(() => {});
  // The control queue stays behind a ring of the relay's own.
  const modes = () => relay.queues.filter(({ index }) => index !== relay.net.index).map(({ mode }) => mode);
  for (let migration = 0; migration < 2; migration++) {
    await relay.setFeatures(driver.features | LOG_ALL);
    assert.ok(modes().every((mode) => mode === "used" || mode === "shadow"), `${modes()}`);
    const before = (await driver.report()).net!.received;
    await waitUntil("frames come while it logs", async () => (await driver.report()).net!.received > before + 100);
    await relay.setFeatures(driver.features);
    await waitUntil("all are back in passthrough", () => modes().every((mode) => mode === "passthrough"));
    const cancelled = (await driver.report()).net!.received;
    // The call eventfds still reach the driver: the link lives.
    await waitUntil("frames come after the cancel", async () => (await driver.report()).net!.received > cancelled + 100);
  }
  const report = await driver.stop(20_000);
  assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.missedCalls], [0, 0, 0, 0]);
});
