import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { DirtyBitmap } from "../../src/dirty/bitmap.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { SvqError } from "../../src/errors.ts";
import { createMemfd, mapFd } from "../../src/ffi/mod.ts";
import { DEFAULT_RELAY_CONFIG, Relay } from "../../src/relay/relay.ts";
import type { VhostBackend } from "../../src/vhost/backend.ts";
import { waitUntil } from "../support/wait.ts";

const LOG_ALL = 1n << 26n;
const LOG_BYTES = 1 << 18;

/** `device` that refuses every second ring it is given, `times` times, once told so: what is tried after a refusal works. */
function refusing(device: VhostBackend): { device: VhostBackend; refuse: (times: number) => void } {
  let left = 0;
  let next = true;
  const setVringNum = async (index: number, num: number) => {
    if (left > 0 && next) {
      left--;
      next = false;
      throw new SvqError("FAKE", "The device refuses the ring, as told");
    }
    next = true;
    await device.setVringNum(index, num);
  };
  const proxy = new Proxy(device, {
    get(target, name) {
      if (name === "setVringNum") return setVringNum;
      const value = Reflect.get(target, name, target);
      return typeof value === "function" ? value.bind(target) : value;
    },
    set: (target, name, value) => Reflect.set(target, name, value, target),
  });
  return { device: proxy, refuse: (times) => left = times };
}

Deno.test("while a device refuses to be switched, all memory counts as dirty and the switch is tried again", async () => {
  await using sim = await SimDevice.open({ kind: "blk", size: 32 << 20 });
  const { device, refuse } = refusing(sim);
  const config = { ...DEFAULT_RELAY_CONFIG, switchTimeoutMs: 50 };
  await using relay = new Relay(device, config, { log: () => {}, error: () => {} });
  await using driver = await EmbeddedDriver.open(relay, { ramSize: 16 << 20, regionSize: 16 << 20 });
  const run = driver.run({ durationMs: 60_000 });
  using log = createMemfd("log", LOG_BYTES);
  using mapping = mapFd(log.fd, { length: LOG_BYTES });
  const bitmap = new DirtyBitmap(mapping.buffer());
  await relay.setLogBase({ fd: log.fd, offset: 0, size: LOG_BYTES });
  const pages = relay.memory.regions.reduce((sum, { size }) => sum + size, 0) / 4096;

  refuse(2);
  await relay.setFeatures(relay.features | LOG_ALL);
  assert.equal(relay.markingAll, true, "nobody follows the device");
  assert.equal(bitmap.count(), pages);
  await waitUntil("the refused switch is undone", () => relay.queues[0]!.state === "passthrough");
  bitmap.clear();
  await waitUntil("all memory is marked again", () => bitmap.count() === pages);
  await waitUntil("the switch is done", () => !relay.markingAll);
  assert.equal(relay.queues[0]!.state, "used");

  await driver.stop();
  const report = await run;
  assert.deepEqual([report.lost, report.duplicated, report.corrupted], [0, 0, 0]);
  assert.ok(report.completed > 0);
});
