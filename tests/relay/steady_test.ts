import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayConfig } from "../../src/relay/relay.ts";
import { countFds } from "../support/fds.ts";
import { waitUntil } from "../support/wait.ts";

const SOAK = Deno.env.get("SVQ_SOAK") === "1";
const SWITCHES = SOAK ? 1000 : 100;
const MODES = ["passthrough", "notify", "used", "shadow"] as const;
/** Growth of the whole process that is noise, bytes. */
const GROWTH = 64 << 20;

const mappings = () => Deno.readTextFileSync("/proc/self/maps").split("\n").filter((line) => line.includes("/memfd:")).length;

/** Descriptors of the kinds that a relay makes; the runtime opens files of its own when it loads a Worker's modules. */
function ours(): string[] {
  const kinds = [...Deno.readDirSync("/proc/self/fd")].map(({ name }) => {
    try {
      return Deno.readLinkSync(`/proc/self/fd/${name}`);
    } catch {
      return "";
    }
  });
  return kinds.filter((kind) => /eventfd|memfd/.test(kind)).sort();
}

async function life(switches: number): Promise<void> {
  await using device = await SimDevice.open({ kind: "blk", size: 16 << 20, queues: 2 });
  const config: RelayConfig = { ...DEFAULT_RELAY_CONFIG, mode: "passthrough" };
  await using relay = new Relay(device, config, { log: () => {}, error: (error) => assert.fail(error.message) });
  await using driver = await EmbeddedDriver.open(relay, { workload: "blk", queues: 2, depth: 16, ramSize: 8 << 20, regionSize: 4 << 20 });
  const run = driver.run({ durationMs: 3_600_000 });
  run.catch(() => {});
  const change = async (index: number) => {
    config.mode = MODES[index % MODES.length]!;
    await relay.applyMode();
    await waitUntil("the mode", () => relay.queues.every((queue) => queue.state === config.mode));
  };
  // What is made once has been made after a few of each.
  let index = 0;
  for (; index < 12; index++) await change(index);
  const steady = { fds: countFds(), maps: mappings(), rss: Deno.memoryUsage().rss };
  for (; index < switches; index++) await change(index);
  while (index % MODES.length !== 0) await change(index++);
  const { completed } = await driver.report();
  await waitUntil("requests after the last switch", async () => (await driver.report()).completed > completed + 50);
  const now = { fds: countFds(), maps: mappings(), rss: Deno.memoryUsage().rss };
  assert.equal(now.fds, steady.fds);
  // Neighbours count as one where the kernel joins them.
  assert.ok(now.maps <= steady.maps + 1, `${now.maps} mappings, ${steady.maps} before`);
  assert.ok(now.rss - steady.rss < GROWTH, `${now.rss - steady.rss} bytes more`);
  if (SOAK) console.log(`${index} switches, ${completed} requests, grown by ${((now.rss - steady.rss) / 2 ** 20).toFixed(1)} MiB`);
  const report = await driver.stop();
  assert.deepEqual([report.lost, report.duplicated, report.corrupted], [0, 0, 0]);
  await run;
}

Deno.test(`${SWITCHES} mode switches under load: descriptors, mappings and memory are as many as before, and no request is lost`, async () => {
  await life(12);
  const before = ours();
  await life(SWITCHES);
  // A Worker's thread ends a little after it was closed.
  await waitUntil("what was there before", () => ours().length <= before.length, 10_000);
});
