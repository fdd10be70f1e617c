import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { DEFAULT_RELAY_CONFIG, Relay } from "../../src/relay/relay.ts";
import { waitUntil } from "../support/wait.ts";

const PAIRS = 64;

Deno.test("64 queue pairs run behind one relay, each in a mode of its own, and no frame is lost when all change it", async () => {
  await using sim = await SimDevice.open({ kind: "net", cable: "loop", queues: PAIRS * 2 + 1 });
  const config = {
    ...DEFAULT_RELAY_CONFIG,
    mode: "passthrough" as "passthrough" | "used",
    queueModes: new Map([[4, "shadow"], [5, "notify"]] as const),
  };
  await using relay = new Relay(sim, config, { log: () => {}, error: (error) => assert.fail(error.message) });
  await using driver = await EmbeddedDriver.open(relay, { queues: PAIRS, depth: 2, num: 8, ramSize: 32 << 20 });
  assert.deepEqual((await sim.netState()).steering, [{ pairs: PAIRS }]);
  const running = driver.run({ drainMs: 20_000 });
  running.catch(() => {});
  const received = async () => (await driver.report()).net!.received;
  await waitUntil("frames", async () => await received() > 300);
  const modes = () => relay.queues.map(({ mode }) => mode);
  assert.deepEqual([modes().length, modes()[3], modes()[4], modes()[5], modes()[6]], [
    PAIRS * 2 + 1,
    "passthrough",
    "shadow",
    "notify",
    "passthrough",
  ]);
  config.mode = "used";
  await relay.applyMode();
  const rest = modes().filter((_, index) => index !== 4 && index !== 5 && index !== PAIRS * 2);
  assert.deepEqual(new Set(rest), new Set(["used"]));
  const before = await received();
  await waitUntil("frames after it", async () => await received() > before + 300);
  const report = await driver.stop(20_000);
  assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.missedCalls], [0, 0, 0, 0]);
  // Every pair has sent.
  const sent = (await sim.netCounters()).filter((_, index) => index % 2 === 1).map(({ frames }) => frames);
  assert.ok(sent.length === PAIRS && sent.every((frames) => frames > 0), sent.join(" "));
});
