import assert from "node:assert/strict";
import { migrateCsv, migratePage } from "../../src/bench/migrate_report.ts";
import { collections } from "../../scripts/bench_gc.ts";
import { bars, csv, page } from "../../src/bench/page.ts";
import { benchIdleMemory, benchRelay, benchSwitch } from "../../src/bench/relay.ts";
import { relayCsv, relayPage, relayRecord } from "../../src/bench/relay_report.ts";
import type { RelayContender, RelayLoad } from "../../src/bench/relay_rig.ts";

const CONTENDERS: RelayContender[] = ["direct", "notify", "shadow"];
const LOAD: RelayLoad = {
  ...{ link: "sim", latencyUs: 0, queues: 2, depth: 4, requestSize: 4096, memoryBytes: 8 << 20, config: { pollUs: 0 } },
};

Deno.test("bench relay compares modes with no relay, and reports all that it found in each form", async () => {
  const results = await benchRelay({ contenders: CONTENDERS, load: LOAD, repetitions: 2, ms: 15 });
  assert.deepEqual(results.map(({ contender }) => contender), CONTENDERS);
  for (const { iops, p50, p99, p999, cpuUs, iopsRatio } of results) {
    for (const { min, median, max } of [iops, p50, p99, p999, cpuUs, iopsRatio]) {
      assert.ok(min <= median && median <= max && median > 0, JSON.stringify({ min, median, max }));
    }
    assert.ok(p50.median <= p99.median && p99.median <= p999.median);
  }
  assert.deepEqual(results[0]!.iopsRatio, { median: 1, min: 1, max: 1 });
  for (const { contender, syscallsPerBatch } of results) {
    assert.equal(syscallsPerBatch !== null, contender === "used" || contender === "shadow", contender);
  }
  const switches = await benchSwitch({ load: LOAD, memorySizes: [8 << 20], switches: 1 });
  assert.deepEqual(switches.map(({ memoryBytes, to, count }) => [memoryBytes >> 20, to, count]), [
    [8, "shadow", 2],
    [8, "passthrough", 2],
  ]);
  const bench = { load: LOAD, results, switches, idle: { queues: 3, bytesPerQueue: 5000.4 } };
  const record = relayRecord(bench) as { results: unknown[]; idle: unknown };
  assert.equal(record.results.length, 3);
  assert.deepEqual(record.idle, { queues: 3, bytes_per_queue: 5000 });
  assert.match(relayCsv(bench), /^name,figure,median,min,max\ndirect,iops,/);
  const html = relayPage(bench, { machine: { cpu: "<one>" }, version: "1.2.3" });
  assert.ok(html.includes("<svg") && html.includes("&lt;one&gt;") && !html.includes("http"), "a page that stands alone");
});

Deno.test("with a sleeping relay a batch takes about four system calls: two waits, a kick and a call", async () => {
  const load = { ...LOAD, queues: 1, depth: 32, latencyUs: 0 };
  const [, shadow] = await benchRelay({ contenders: ["direct", "shadow"], load, repetitions: 3, ms: 20 });
  // A wait may also be cut short by what comes while the thread is awake: the greatest is left out.
  assert.ok(shadow!.syscallsPerBatch!.min <= 4.5, JSON.stringify(shadow!.syscallsPerBatch));
  assert.ok(shadow!.sleepsPerBatch!.min > 0);
});

Deno.test("over a vhost-user socket the same is measured", async () => {
  const results = await benchRelay({
    ...{ contenders: ["direct", "used"], load: { ...LOAD, link: "vhost-user" }, repetitions: 1, ms: 15 },
  });
  assert.equal(results.length, 2);
});

Deno.test("an idle queue takes memory within bounds", async () => {
  const { queues, bytesPerQueue } = await benchIdleMemory({ ...LOAD, queues: 32 });
  assert.equal(queues, 31);
  assert.ok(bytesPerQueue < 1 << 20, `${bytesPerQueue} bytes`);
});

Deno.test("pages and tables keep what they are given in its place", () => {
  assert.equal(csv([{ a: 'x,"y"', b: null }, { a: 1, b: 2 }], ["a", "b"]), 'a,b\n"x,""y""",\n1,2\n');
  assert.match(page({ title: "<t>", about: "&", machine: {}, version: "1" }, []), /&lt;t&gt;[^]*&amp;/);
  assert.match(bars("x", [{ label: "a<b", value: 0, min: 0, max: 0 }]), /a&lt;b/);
  const stream = { contents: "zero", sink: "discard", memoryBytes: 2e9, streamBytes: 10, ms: 1000, allMs: [1000, 2000] } as const;
  const result = { ...stream, allMs: [...stream.allMs] };
  const gap = { migrations: 1, memoryBytes: 1, allUs: [5], p50: 5, p90: 5, p99: 5, max: 5 };
  assert.match(migrateCsv([result], gap), /zero into discard,gb_per_s,2\n[^]*downtime,p99_us,5/);
  assert.match(migratePage([result], gap, { machine: {}, version: "1" }), /2\.00 GB\/s/);
});

Deno.test("collections are read from what V8 prints of them", () => {
  const trace = [
    "[7:0x55bc3431e000:0]      405 ms: Memory pool: Removed pages: 0",
    '[7:0x7fc9a8060000:1]    13185 ms: GC: {"pause":1.184,"mutator":13127.5,"gc":"s","reason":"x","allocated":980264,"promoted":0}',
  ];
  assert.deepEqual(collections(trace.join("\n")), [{ isolate: 1, atMs: 13185, pauseMs: 1.184, allocated: 980264 }]);
});
