import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayConfig } from "../../src/relay/relay.ts";
import type { VhostBackend } from "../../src/vhost/backend.ts";

// DPDK, as a device and as a front-end, knows only the avail half of a packed ring's base. In a lap whose wrap counter is 0, half
// a base can also be a whole one, of a ring with chains in flight: only the ring itself tells.

/** A peer that sends halves, and takes the lower half for both. */
function half(peer: VhostBackend, packed: boolean, takes: boolean): VhostBackend {
  const extra: Partial<VhostBackend> = {
    getVringBase: async (index) => await peer.getVringBase(index) & 0xffff,
    setVringBase: (index, base) => {
      const low = base & 0xffff;
      return peer.setVringBase(index, packed && takes ? (low | low << 16) >>> 0 : low);
    },
  };
  return new Proxy(peer, {
    get(target, name) {
      if (name in extra) return extra[name as "getVringBase"];
      const value = Reflect.get(target, name, target);
      return typeof value === "function" ? value.bind(target) : value;
    },
    set: (target, name, value) => Reflect.set(target, name, value, target),
  });
}

function inTime<T>(what: string, work: Promise<T>): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => timer = setTimeout(() => reject(new Error(`${what} takes too long`)), 30_000));
  return Promise.race([work, late]).finally(() => clearTimeout(timer));
}

const MODES = ["passthrough", "shadow", "used", "notify", "shadow"] as const;

for (const guestPacked of [false, true]) {
  for (const devicePacked of [false, true]) {
    for (const peer of ["device", "front-end"] as const) {
      // Of a split ring a base has one half only.
      if (!(peer === "device" ? devicePacked : guestPacked)) continue;
      const name = `${guestPacked ? "packed" : "split"} guest, ${devicePacked ? "packed" : "split"} device`;
      Deno.test(`a ${peer} that knows half a base loses nothing in any mode, idle in any lap or under load: ${name}`, async () => {
        const errors: string[] = [];
        const config: RelayConfig = {
          ...DEFAULT_RELAY_CONFIG,
          guestRing: guestPacked ? "packed" : "split",
          deviceRing: devicePacked ? "packed" : "split",
        };
        await using sim = await SimDevice.open({ kind: "blk", size: 8 << 20, packed: devicePacked });
        const device = peer === "device" ? half(sim, devicePacked, true) : sim;
        await using relay = new Relay(device, config, { log: () => {}, error: (error) => errors.push(error.message) });
        // With a front-end that sends halves the very first base is one, too.
        if (peer === "front-end") config.mode = "shadow";
        await using driver = await EmbeddedDriver.open(peer === "device" ? relay : half(relay, guestPacked, false), {
          ...{ depth: 8, num: 16, packed: guestPacked, ramSize: 8 << 20, regionSize: 4 << 20 },
        });
        const pass = async (round: number) => {
          config.mode = MODES[round % MODES.length]!;
          await inTime(`switch ${round} to ${config.mode}`, relay.applyMode());
          // A VMM that stops the guest and goes on.
          if (round % 2 === 0) return;
          await driver.pause();
          await inTime(`stop ${round} in ${config.mode}`, driver.stopRings());
          await inTime(`start ${round} in ${config.mode}`, driver.startRings());
          await driver.unpause();
        };
        await pass(1);
        let completed = 0;
        // Every slot of both laps is where the ring stops once.
        for (let round = 0; round < 34; round++) {
          const report = await inTime(`run ${round} in ${config.mode}`, driver.run({ requests: ++completed }));
          assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.faults], [0, 0, 0, []]);
          await pass(round);
        }
        let done = false;
        const run = driver.run({ requests: completed + 1500 }).finally(() => done = true);
        for (let round = 0; !done; round++) await pass(round);
        const report = await inTime("the load", run);
        assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.faults], [0, 0, 0, []]);
        assert.ok(report.completed >= completed + 1500, `${report.completed} requests`);
        assert.deepEqual(errors, []);
        assert.ok(relay.queues[0]!.running);
      });
    }
  }
}
