import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import type { SimOptions } from "../../src/devices/options.ts";
import { type DriverOptions, EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import type { DriverReport } from "../../src/drivers/report.ts";

async function drive(sim: SimOptions, options: DriverOptions, requests: number): Promise<DriverReport> {
  await using device = await SimDevice.open(sim);
  await using driver = await EmbeddedDriver.open(device, options);
  return await driver.run({ requests, drainMs: 5000 });
}

function assertClean(report: DriverReport, requests: number): void {
  const { completed, lost, duplicated, corrupted, outOfOrder, missedCalls, faults } = report;
  assert.deepEqual({ completed, lost, duplicated, corrupted, outOfOrder, missedCalls, faults }, {
    completed: requests,
    lost: 0,
    duplicated: 0,
    corrupted: 0,
    outOfOrder: 0,
    missedCalls: 0,
    faults: [],
  });
}

Deno.test("20000 requests on a memory disk come back right", async () => {
  const report = await drive({ kind: "blk" }, { seed: 7 }, 20_000);
  assertClean(report, 20_000);
  assert.ok(report.verified > 100_000, `${report.verified} sectors were compared`);
  assert.ok(report.latencyUs.p50 > 0 && report.latencyUs.p50 <= report.latencyUs.p99 && report.latencyUs.p99 <= report.latencyUs.max);
});
