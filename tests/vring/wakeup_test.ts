import assert from "node:assert/strict";
import { Chain, type DeviceQueue, type DriverQueue } from "../../src/vring/queue.ts";
import { PackedDevice, PackedDriver } from "../../src/vring/packed.ts";
import { SplitDevice, SplitDriver } from "../../src/vring/split.ts";
import { FlatMemory, packedPlace, splitPlace } from "../support/ring_memory.ts";
import { explore, type Outcome } from "./interleavings.ts";

interface Scenario {
  format: "split" | "packed";
  num: number;
  eventIdx: boolean;
  /** Chains sent in all, and how many in one batch. */
  chains: number;
  batch: number;
  /** Split: where the indices start. */
  base: number;
  /** Sides that go to sleep without looking again. */
  careless?: "driver" | "device";
  /** Sides that turn notifications off while they are awake. */
  suppress: boolean;
  /** Fruitless looks, notifications off, before a side asks for notifications: the polling state. */
  polls?: number;
}

function check(scenario: Scenario): Outcome {
  const { num, eventIdx, base, polls = 0 } = scenario;
  const memory = new FlatMemory(192);
  const place = scenario.format === "split" ? splitPlace(memory, num) : packedPlace(memory, num);
  if (scenario.format === "split") {
    for (const part of [place.avail, place.used]) memory.view.setUint16(part.byteOffset + 2, base, true);
  }
  const driverOf = (): DriverQueue =>
    scenario.format === "split" ? new SplitDriver({ ...place, eventIdx, base }) : new PackedDriver({ ...place, eventIdx });
  // Made outside of the exploration: reading the used index at the start is no step of the handshake.
  const deviceOf = (): DeviceQueue =>
    scenario.format === "split"
      ? new SplitDevice({ ...place, eventIdx, indirect: false, base })
      : new PackedDevice({ ...place, eventIdx, indirect: false });
  return explore(memory.bytes, [
    () => (steps) => {
      const driver = driverOf();
      let sent = 0;
      for (let back = 0;;) {
        if (scenario.suppress) driver.disableCalls();
        for (let looks = 0; looks <= polls; looks++) {
          while (driver.take() >= 0) {
            back++;
            looks = 0;
          }
        }
        steps.mark(`${sent} sent, ${back} back`);
        if (back === scenario.chains) return;
        let added = 0;
        while (sent < scenario.chains && added < scenario.batch && driver.add([{ address: 64, length: 1 }], []) >= 0) {
          sent++;
          added++;
        }
        if (added > 0) {
          if (driver.publish()) steps.notify();
          if (sent < scenario.chains && driver.numFree > 0) continue;
        }
        if (driver.enableCalls() && scenario.careless !== "driver") continue;
        steps.sleep();
      }
    },
    () => (steps) => {
      const device = deviceOf();
      const chain = new Chain(num);
      for (;;) {
        if (scenario.suppress) device.disableKicks();
        for (let looks = 0; looks <= polls; looks++) {
          while (device.pop(chain)) {
            device.push(chain.id, 0);
            looks = 0;
          }
          if (device.flush()) steps.notify();
        }
        steps.mark(`${device.base}`);
        if (device.enableKicks() && scenario.careless !== "device") continue;
        steps.sleep();
      }
    },
  ], 0);
}

const scenarios: Scenario[] = [];
for (const format of ["split", "packed"] as const) {
  for (const eventIdx of [false, true]) {
    for (const suppress of [false, true]) {
      for (const [num, chains, batch, base] of [[1, 2, 1, 0], [2, 3, 1, 0xfffe], [4, 3, 2, 0xffff]] as const) {
        // The largest one only where most can happen.
        if (num === 2 && !(suppress && eventIdx)) continue;
        scenarios.push({ format, eventIdx, suppress, num, chains, batch, base });
        // Polling looks as often as it likes; once more than not at all has every step that there is.
        if (suppress && (num === 1 && eventIdx || Deno.env.has("SVQ_SOAK"))) {
          scenarios.push({ format, eventIdx, suppress, num, chains, batch, base, polls: 1 });
        }
      }
    }
  }
}

Deno.test("In every interleaving of both sides' atomic steps, nobody sleeps through work", () => {
  let states = 0;
  for (const scenario of scenarios) {
    const outcome = check(scenario);
    assert.deepEqual(outcome.stuck, [], `a wake-up was lost: ${JSON.stringify(scenario)}`);
    states += outcome.states;
  }
  assert.ok(states > 5000, `only ${states} states were reached`);
});

Deno.test("The check finds the lost wake-up when either side does not look again before it sleeps", () => {
  for (const careless of ["driver", "device"] as const) {
    for (const scenario of scenarios.filter(({ suppress }) => suppress)) {
      const outcome = check({ ...scenario, careless });
      assert.notDeepEqual(outcome.stuck, [], `not found: ${careless} ${JSON.stringify(scenario)}`);
    }
  }
});
