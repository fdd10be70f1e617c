import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayMode } from "../../src/relay/relay.ts";

// DPDK's answer to a frame is dropped where its ring is not there yet: seen with testpmd, 13 frames after a gap of 75 ms.
Deno.test("a device that stops all of its rings for one gets those back first in which it brings frames to the guest", async () => {
  await using sim = await SimDevice.open({ kind: "net", cable: "loop", queues: 4 });
  const done: string[] = [];
  const device = new Proxy(sim, {
    get(target, name) {
      if (name === "getVringBase") {
        return async (index: number) => {
          const base = await target.getVringBase(index);
          done.push(`stop ${index}`);
          return base;
        };
      }
      if (name === "setVringNum") {
        return async (index: number, num: number) => {
          // Who would not wait for the receiving rings is far ahead of them then.
          if (index % 2 === 0) await new Promise((resolve) => setTimeout(resolve, 20));
          await target.setVringNum(index, num);
          if (index % 2 === 1) done.push(`begin ${index}`);
        };
      }
      if (name === "setVringEnable") {
        return async (index: number, enabled: boolean) => {
          await target.setVringEnable(index, enabled);
          if (index % 2 === 0 && enabled) done.push(`ready ${index}`);
        };
      }
      const value = Reflect.get(target, name, target);
      return typeof value === "function" ? value.bind(target) : value;
    },
    set: (target, name, value) => Reflect.set(target, name, value, target),
  });
  const config = { ...DEFAULT_RELAY_CONFIG, mode: "shadow" as RelayMode };
  await using relay = new Relay(device, config, { log: () => {}, error: (error) => assert.fail(error.message) });
  await using driver = await EmbeddedDriver.open(relay, { queues: 2, depth: 8, num: 32, ramSize: 8 << 20 });
  const running = driver.run({ drainMs: 5000 });
  running.catch(() => {});
  const modes = ["used", "passthrough", "shadow"] as const;
  for (const mode of modes) {
    done.length = 0;
    config.mode = mode;
    await relay.applyMode();
    const order = done.map((line) => line.split(" ")[0]);
    assert.deepEqual(order, ["stop", "stop", "stop", "stop", "ready", "ready", "begin", "begin"], done.join(", "));
  }
  await driver.stop(5000);
  const { lost, duplicated, corrupted } = await running;
  assert.deepEqual([lost, duplicated, corrupted], [0, 0, 0]);
});
