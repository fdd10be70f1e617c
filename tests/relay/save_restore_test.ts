import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import type { DriverState } from "../../src/drivers/state.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayConfig } from "../../src/relay/relay.ts";
import { TempDir } from "../support/temp.ts";
import { waitUntil } from "../support/wait.ts";

const HOPS = Deno.env.get("SVQ_SOAK") === "1" ? 40 : 4;
const NUM = 16;
const MODES = ["passthrough", "notify", "used", "shadow", "auto"] as const;
const BOTH = [false, true] as const;

// Every state that a guest's ring can be saved in, restored behind another relay, in another mode, on a device with rings of the
// other format: a few requests into whatever lap, while the load goes on.
for (const packed of BOTH) {
  for (const eventIdx of BOTH) {
    for (const inOrder of BOTH) {
      const ring = [packed ? "packed" : "split", eventIdx ? "EVENT_IDX" : "flags", inOrder ? "IN_ORDER" : "any order"].join(", ");
      Deno.test(`a ring is saved under load and restored behind another relay in every mode, over devices of either format: ${ring}`, async () => {
        using folder = new TempDir();
        const file = folder.join("disk.img");
        const errors: string[] = [];
        let seed = 1 + Number(packed) + 2 * Number(eventIdx) + 4 * Number(inOrder);
        const random = (below: number) => {
          seed = Math.imul(seed, 1664525) + 1013904223 >>> 0;
          return Math.floor(seed / 2 ** 32 * below);
        };
        let saved: { state: DriverState; driver: EmbeddedDriver } | undefined;
        const shape = { depth: 8, num: NUM, packed, eventIdx, inOrder, indirect: random(2) === 0, ramSize: 8 << 20, regionSize: 4 << 20 };
        const bases = new Set<number>();
        for (let hop = 0; hop <= HOPS; hop++) {
          const devicePacked = random(2) === 0;
          const config: RelayConfig = {
            ...DEFAULT_RELAY_CONFIG,
            mode: MODES[(hop + random(2)) % MODES.length]!,
            guestRing: packed ? "packed" : "split",
            deviceRing: devicePacked ? "packed" : "split",
            core: random(3) === 0 ? "js" : "wasm",
          };
          const where = `hop ${hop}, ${config.mode} on ${config.deviceRing}, ${config.core}`;
          await using device = await SimDevice.open({
            kind: "blk",
            file,
            size: 8 << 20,
            packed: devicePacked,
            latencyUs: 200,
            jitterUs: 400,
          });
          await using relay = new Relay(device, config, { log: () => {}, error: (error) => errors.push(`${where}: ${error.message}`) });
          let driver: EmbeddedDriver;
          if (saved === undefined) {
            driver = await EmbeddedDriver.open(relay, shape);
            driver.run({ durationMs: 3_600_000 }).catch(() => {});
          } else {
            const ram = saved.driver.ram.dup();
            await saved.driver.close();
            driver = await EmbeddedDriver.resume(relay, ram, saved.state);
          }
          await using stack = new AsyncDisposableStack();
          stack.defer(() => driver.close());
          const { completed } = await driver.report();
          const more = 1 + random(3 * NUM);
          await waitUntil(`${more} requests: ${where}`, async () => (await driver.report()).completed >= completed + more);
          // The other modes under the same load, before it is saved.
          config.mode = MODES[random(MODES.length)]!;
          await relay.applyMode();
          if (hop < HOPS) {
            saved = { driver, state: await driver.exportState() };
            bases.add(saved.state.bases[0]!);
            stack.move();
            continue;
          }
          const finished = driver.finished();
          await driver.stop();
          const report = await finished;
          assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.faults], [0, 0, 0, []], where);
        }
        assert.deepEqual(errors, []);
        assert.ok(bases.size > 1, "the ring was saved at more than one place");
      });
    }
  }
}
