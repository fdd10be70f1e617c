import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import type { SimOptions } from "../../src/devices/options.ts";
import { DirtyBitmap } from "../../src/dirty/bitmap.ts";
import { type DriverOptions, EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { type DriverReport, Histogram } from "../../src/drivers/report.ts";
import { decodeDriverState, type DriverState, encodeDriverState } from "../../src/drivers/state.ts";
import { createMemfd, mapFd, openFd, type OwnedFd } from "../../src/ffi/mod.ts";
import { type Lies, LyingDevice } from "../support/lying_device.ts";
import { within } from "../support/test_guest.ts";

async function drive(sim: SimOptions, options: DriverOptions, requests: number): Promise<DriverReport> {
  await using device = await SimDevice.open(sim);
  await using driver = await EmbeddedDriver.open(device, options);
  return await driver.run({ requests, drainMs: 5000 });
}

function assertClean(report: DriverReport, requests?: number): void {
  const { completed, lost, duplicated, corrupted, outOfOrder, missedCalls, faults } = report;
  const none = { lost: 0, duplicated: 0, corrupted: 0, outOfOrder: 0, missedCalls: 0, faults: [] };
  assert.deepEqual({ lost, duplicated, corrupted, outOfOrder, missedCalls, faults }, none);
  if (requests !== undefined) assert.equal(completed, requests);
}

/** Resolves when the driver has completed `count` requests. */
async function completed(driver: EmbeddedDriver, count: number): Promise<void> {
  const wait = async () => {
    while ((await driver.report()).completed < count) await new Promise((resolve) => setTimeout(resolve, 2));
  };
  await within(wait(), 10_000, `${count} requests are done`);
}

/** A file with the same contents, as a migration makes one. */
function copyRam(driver: EmbeddedDriver): OwnedFd {
  const size = driver.layout.options.ramSize;
  const copy = createMemfd("copied-ram", size);
  using from = mapFd(driver.ram.fd, { length: size });
  using to = mapFd(copy.fd, { length: size });
  new Uint8Array(to.buffer()).set(new Uint8Array(from.buffer()));
  return copy;
}

Deno.test("20000 requests on a memory disk come back right", async () => {
  const report = await drive({ kind: "blk" }, { seed: 7, depth: 128 }, 20_000);
  assertClean(report, 20_000);
  assert.ok(report.verified > 100_000, `${report.verified} sectors were compared`);
  assert.ok(report.latencyUs.p50 > 0 && report.latencyUs.p50 <= report.latencyUs.p99 && report.latencyUs.p99 <= report.latencyUs.max);
});

const FORMATS = [["split", false], ["packed", true]] as const;

for (const [format, packed] of FORMATS) {
  for (const features of [{}, { eventIdx: false }, { indirect: false }, { eventIdx: false, indirect: false }]) {
    const name = Object.keys(features).join(" and ") || "nothing";
    Deno.test(`Requests come back right through ${format} rings that lack ${name}`, async () => {
      const options = { ...features, packed, queues: 2, depth: 16 };
      assertClean(await drive({ kind: "blk", queues: 2, packed }, { ...options, num: 64 }, 2000), 2000);
      assertClean(await drive({ kind: "loopback", queues: 2, packed }, { ...options, num: 32 }, 2000), 2000);
    });
  }
}

Deno.test("Requests that overtake each other come back right, also through a ring that is often full", async () => {
  assertClean(await drive({ kind: "blk", latencyUs: 300, jitterUs: 3000 }, { num: 64, depth: 64, indirect: false }, 3000), 3000);
  assertClean(await drive({ kind: "loopback", jitterUs: 3000 }, { num: 32, depth: 64, indirect: false }, 3000), 3000);
});

Deno.test("A read-only disk and a disk of few sectors can be driven", async () => {
  const path = await Deno.makeTempFile();
  try {
    await Deno.writeFile(path, new Uint8Array(1 << 20));
    assertClean(await drive({ kind: "blk", file: path, readOnly: true }, {}, 500), 500);
  } finally {
    await Deno.remove(path);
  }
  assertClean(await drive({ kind: "blk", size: 8192 }, {}, 500), 500);
});

Deno.test("The disk holds afterwards what the driver says that it wrote, and a run ends after its time", async () => {
  const path = await Deno.makeTempFile();
  try {
    await using device = await SimDevice.open({ kind: "blk", file: path, size: 1 << 20 });
    await using driver = await EmbeddedDriver.open(device, { regionSize: 1 << 20 });
    const report = await driver.run({ durationMs: 300 });
    assertClean(report);
    assert.ok(report.completed > 0 && report.durationMs >= 300 && report.inflight === 0);
    const { worker: { workload: { table } } } = await driver.exportState();
    using file = openFd(path, 0);
    using map = mapFd(file.fd, { length: 1 << 20, prot: 1 });
    const words = new Uint32Array(map.buffer());
    for (const [sector, sequence] of table.entries()) {
      if (sequence === 0) continue;
      const zeros = sequence === 0xffff_ffff;
      assert.deepEqual([words[sector * 128], words[sector * 128 + 1]], zeros ? [0, 0] : [sector, sequence]);
    }
  } finally {
    await Deno.remove(path);
  }
});

const LIES: [string, Lies, Partial<DriverReport>][] = [
  ["drops an answer", { drop: 300 }, { lost: 1, completed: 999, duplicated: 0, corrupted: 0 }],
  ["corrupts an answer", { corrupt: 300 }, { lost: 0, completed: 999, duplicated: 0, corrupted: 1 }],
  ["does not announce an answer", { dropCall: 300 }, { lost: 0, completed: 1000, duplicated: 0, corrupted: 0, missedCalls: 1 }],
];
for (const [name, lies, expected] of LIES) {
  Deno.test(`A device that ${name} is found out`, async () => {
    await using device = new LyingDevice(lies);
    await using driver = await EmbeddedDriver.open(device, { num: LyingDevice.ringSize, depth: 8 });
    const report = await driver.run({ requests: 1000, drainMs: 300 });
    const found = Object.fromEntries(Object.keys(expected).map((key) => [key, report[key as keyof DriverReport]]));
    assert.deepEqual(found, expected);
  });
}

Deno.test("A device that answers twice is found out, and its queue is not used any further", async () => {
  await using device = new LyingDevice({ duplicate: 300 });
  await using driver = await EmbeddedDriver.open(device, { num: LyingDevice.ringSize, depth: 8 });
  const report = await driver.run({ requests: 1000, drainMs: 300 });
  assert.equal(report.duplicated, 1);
  assert.equal(report.corrupted, 0);
  assert.ok(report.completed >= 290 && report.completed < 1000, `${report.completed} requests`);
  assert.match(report.faults[0]!, /queue 0 stopped/);
});

Deno.test("Paused, the guest makes no requests; a pause is neither stall nor running time", async () => {
  await using device = await SimDevice.open({ kind: "blk", latencyUs: 500 });
  await using driver = await EmbeddedDriver.open(device);
  const run = driver.run({ requests: 2000 });
  await completed(driver, 100);
  await driver.pause();
  const before = await driver.report();
  const pausedMs = performance.now();
  // Far longer than a busy machine keeps a request waiting.
  await new Promise((resolve) => setTimeout(resolve, 2000));
  const after = await driver.report();
  assert.deepEqual(after, before);
  const pauseMs = performance.now() - pausedMs;
  await driver.unpause();
  const report = await run;
  assertClean(report, 2000);
  assert.ok(report.longestStallMs < pauseMs, `stall ${report.longestStallMs}`);
});

for (const [format, packed] of FORMATS) {
  Deno.test(`A driver that was saved in the middle goes on elsewhere, on another device over the same file (${format})`, async () => {
    const path = await Deno.makeTempFile();
    try {
      const sim: SimOptions = { kind: "blk", file: path, size: 16 << 20, latencyUs: 1000, jitterUs: 3000, queues: 2, packed };
      await using source = await SimDevice.open(sim);
      const driver = await EmbeddedDriver.open(source, { queues: 2, packed });
      driver.run({ requests: 4000 }).catch(() => {});
      await completed(driver, 500);
      const state = await driver.exportState();
      assert.ok(state.worker.owners.flat().length > 0, "requests were out");
      const ram = copyRam(driver);
      await driver.close();
      await using destination = await SimDevice.open(sim);
      await using moved = await EmbeddedDriver.resume(destination, ram, decodeDriverState(encodeDriverState(state)));
      const report = await moved.finished();
      assertClean(report, 4000);
      assert.ok(report.verified > 0);
    } finally {
      await Deno.remove(path);
    }
  });
}

Deno.test("A driver that was saved and that nobody took over goes on where it is", async () => {
  await using device = await SimDevice.open({ kind: "blk", latencyUs: 500 });
  await using driver = await EmbeddedDriver.open(device);
  const run = driver.run({ requests: 3000 });
  for (const count of [200, 800]) {
    await completed(driver, count);
    await driver.exportState();
    await assert.rejects(driver.unpause(), { code: "RINGS_STOPPED" });
    await driver.continueHere();
  }
  assertClean(await run, 3000);
});

Deno.test("A damaged state is refused", async () => {
  await using device = await SimDevice.open({ kind: "blk", size: 1 << 20, latencyUs: 50_000 });
  const driver = await EmbeddedDriver.open(device, { regionSize: 1 << 20, depth: 4 });
  driver.run({ requests: 1000 }).catch(() => {});
  await completed(driver, 8);
  const good = encodeDriverState(await driver.exportState());
  const ramSize = driver.layout.options.ramSize;
  await driver.close();
  const damages: ((state: DriverState) => void)[] = [
    (state) => state.bases.pop(),
    (state) => state.features = "0x10000000000000000",
    (state) => state.ram.num = 3,
    (state) => state.ram.ramSize = 4096,
    (state) => state.worker.owners[0]!.push([0, 0]),
    (state) => state.worker.owners[0]![0]![1] = 99,
    (state) => state.worker.workload.slots[0] = [0, 5000, 8, 1, 1, 0],
    (state) => state.worker.workload.slots[0] = [0, 0, 8, 1, 1, 1e6],
    (state) => state.worker.rings[0]!.used += 3,
    (state) => state.worker.workload.table = new Uint32Array(3),
  ];
  for (const damage of damages) {
    const state = decodeDriverState(good);
    damage(state);
    await using fresh = await SimDevice.open({ kind: "blk", size: 1 << 20 });
    await assert.rejects(
      EmbeddedDriver.resume(fresh, createMemfd("ram", ramSize), state),
      (error) => error instanceof Error && error.name !== "TypeError",
      damage.toString(),
    );
  }
  for (const bytes of [new Uint8Array(3), good.subarray(0, 100), new Uint8Array(8)]) {
    assert.throws(() => decodeDriverState(bytes), { code: "STATE_INVALID" });
  }
});

Deno.test("The log of the driver's own writes, with the device's, covers every page that changed", async () => {
  await using device = await SimDevice.open({ kind: "blk", latencyUs: 1000 });
  await using driver = await EmbeddedDriver.open(device, { readPercent: 0, ramSize: 16 << 20 });
  const run = driver.run({ requests: 1500 });
  await completed(driver, 100);
  await driver.pause();
  await driver.stopRings();
  using before = copyRam(driver);
  const { layout } = driver;
  const end = layout.gpa(layout.options.ramSize - 1) + 1;
  using log = createMemfd("log", Math.ceil(end / 4096 / 8 / 4096) * 4096);
  const size = Math.ceil(end / 4096 / 8 / 4096) * 4096;
  await driver.setDirtyLog({ fd: log.fd, offset: 0, size });
  await driver.continueHere();
  assertClean(await run, 1500);
  await driver.exportState();
  using logMap = mapFd(log.fd, { length: size });
  using was = mapFd(before.fd, { length: layout.options.ramSize });
  const bitmap = new DirtyBitmap(logMap.buffer());
  const old = new BigUint64Array(was.buffer());
  using ram = mapFd(driver.ram.fd, { length: layout.options.ramSize });
  const words = new BigUint64Array(ram.buffer());
  let changed = 0;
  for (let page = 0; page < layout.options.ramSize / 4096; page++) {
    const same = words.subarray(page * 512, page * 512 + 512).every((word, i) => word === old[page * 512 + i]);
    if (same) continue;
    changed++;
    assert.ok(bitmap.has(layout.gpa(page * 4096) / 4096), `page ${page} changed and is not in the log`);
  }
  assert.ok(changed > 100);
  await driver.setDirtyLog(undefined);
});

Deno.test("A device without a needed feature or with too few queues is refused", async () => {
  await using device = await SimDevice.open({ kind: "blk" });
  await assert.rejects(EmbeddedDriver.open(device, { queues: 2 }), { code: "TOO_FEW_QUEUES", exitCode: 5 });
  await assert.rejects(EmbeddedDriver.open(device, { packed: true }), { code: "MISSING_FEATURE", exitCode: 5 });
  await assert.rejects(EmbeddedDriver.open(device, { ramSize: 1 << 20 }), { code: "RAM_TOO_SMALL", exitCode: 2 });
});

Deno.test("Percentiles are exact to one part in 16", () => {
  const histogram = new Histogram();
  for (let i = 1; i <= 10_000; i++) histogram.add(i);
  const { p50, p99, p999, max } = new Histogram(histogram.save()).report();
  for (const [value, exact] of [[p50, 5000], [p99, 9900], [p999, 9990]] as const) {
    assert.ok(Math.abs(value - exact) <= exact / 16, `${value} for ${exact}`);
  }
  assert.equal(max, 10_000);
  assert.equal(new Histogram().report().p50, 0);
});
