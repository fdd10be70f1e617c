import assert from "node:assert/strict";
import { benchRing, type RingBenchOptions } from "../../src/bench/ring.ts";
import { overC, overSyscalls, ringCsv, ringPage, ringRows } from "../../src/bench/ring_report.ts";
import { summarize } from "../../src/bench/statistics.ts";
import { buildReference } from "../../scripts/bench_ring.ts";
import { TempDir } from "../support/temp.ts";

const QUICK: RingBenchOptions = {
  cores: ["wasm", "js"],
  modes: ["shadow", "used"],
  rings: [["split", "split"], ["packed", "split"]],
  workloads: ["tx1", "2desc", "rx1"],
  batches: [1, 128],
  num: 256,
  log: true,
  repetitions: 1,
  ms: 1,
};

Deno.test("the median of an even number of values lies between the middle two", () => {
  assert.deepEqual(summarize([4, 1, 3, 2]), { median: 2.5, min: 1, max: 4 });
  assert.deepEqual(summarize([7]), { median: 7, min: 7, max: 7 });
});

Deno.test("bench ring measures every arrangement that exists, and each result has its bounds", async () => {
  const results = await benchRing(QUICK);
  // Shadow with both pairs, used with split rings only; two cores, three workloads, two batches.
  assert.equal(results.length, 3 * 2 * 3 * 2);
  for (const { median, min, max } of results) assert.ok(min <= median && median <= max && median > 0);
  assert.equal(ringCsv(results).trimEnd().split("\n").length, 1 + results.length);
  const page = ringPage(results, { cpu: "<one>" }, "1.2.3");
  assert.ok(page.includes("<svg") && page.includes("&lt;one&gt;") && !page.includes("http"), "a page that stands alone");
});

Deno.test("with eventfds a batch is woken by a kick and by a call, and stands beside the bare system calls", async () => {
  const results = await benchRing({ ...QUICK, eventfds: true, workloads: ["2desc"], rings: [["split", "split"]] });
  assert.deepEqual([...new Set(results.map(({ core }) => core))], ["wasm", "js", "syscalls"]);
  for (const row of ringRows(results)) assert.ok(overSyscalls(row, "js")! > 0 && row.results.syscalls!.median > 0);
});

Deno.test("the C reference passes the same checks as the cores, and results are compared with it", async (t) => {
  using folder = new TempDir();
  const reference = await buildReference(folder.path);
  if (reference === undefined) {
    await t.step({ name: "a C compiler", ignore: true, fn: () => {} });
    return;
  }
  const results = await benchRing({ ...QUICK, cores: ["js", "c", "bound"], modes: ["shadow"], rings: [["split", "split"]], reference });
  assert.equal(results.length, 3 * 3 * 2);
  const row = ringRows(results).find(({ batch }) => batch === 128)!;
  assert.ok(overC(row, "js")! > 0.5);
});
