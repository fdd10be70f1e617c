import assert from "node:assert/strict";
import fc from "fast-check";
import { linearTicks, logTicks, short } from "../../src/migration/charts.ts";
import { reportPage } from "../../src/migration/report_html.ts";
import type { MigrationResult } from "../../src/migration/source_types.ts";
import { decodeSamples, encodeSamples, type Sample } from "../../src/migration/timeline.ts";

const result: MigrationResult = {
  outcome: "completed",
  phase: "completed",
  rounds: [
    { round: 1, pages: 1000, zeroPages: 400, bytes: 2_457_600, ms: 20 },
    { round: 2, pages: 10, zeroPages: 0, bytes: 40_960, ms: 1 },
  ],
  bytes: 2_500_000,
  downtimeUs: { total: 100, stop: 10, disk: 0, last_round: 20, state: 30, verify: 25, resume: 15 },
  memoryIdentical: true,
  estimate: null,
  disk: null,
  throttlePercent: 40,
  error: null,
};
const sample = (atMs: number): Sample => ({ atMs, ms: 100, completed: 50, p50: 120, p99: 900, max: 2000 });
const phases = [{ phase: "rounds", atMs: 100 }, { phase: "stop", atMs: 400 }, { phase: "completed", atMs: 500 }] as const;
const timeline = {
  source: [sample(100), sample(200), sample(300)],
  destination: [sample(600), sample(700)],
  phases: [...phases],
  rounds: [{ atMs: 300, dirtyPages: 10, throttlePercent: 40 }],
  begin: (wanted: string) => phases.find(({ phase }) => phase === wanted)?.atMs,
};
const input = { result, requests: undefined, timeline, facts: [["Device", `sim:blk,file=<script>"&'`]] as const, date: new Date(0) };

Deno.test("A report is one page that needs nothing from elsewhere, and runs nothing", () => {
  const html = reportPage(input);
  assert.doesNotMatch(html, /<script|<link|<img|src=|url\(|@import|https?:/i);
  assert.match(html, /default-src 'none'/);
  assert.ok(html.includes("sim:blk,file=&#60;script&#62;&#34;&#38;&#39;"), "what people gave it is text");
  for (const part of ["stop and drain", "last round", "state", "comparing memory", "resume"]) assert.ok(html.includes(part), part);
  assert.match(html, /held still for up to 40 %/);
  assert.doesNotMatch(html, /NaN|undefined|Infinity/);
});

Deno.test("A migration that came to nothing has a report too", () => {
  const error = { code: "ENOENT", message: "Nobody <listens>" };
  const nothing: MigrationResult = {
    ...result,
    outcome: "aborted",
    phase: "connect",
    rounds: [],
    downtimeUs: null,
    memoryIdentical: null,
    error,
  };
  const html = reportPage({
    ...input,
    result: nothing,
    timeline: { ...timeline, source: [], destination: [], phases: [], begin: () => undefined },
  });
  assert.match(html, /Given up in phase connect: Nobody &#60;listens&#62;/);
  assert.doesNotMatch(html, /NaN|undefined|<svg/);
});

Deno.test("Axes cover every value, and numbers are short", () => {
  fc.assert(
    fc.property(fc.double({ min: 1e-3, max: 1e12, noNaN: true }), (value) => {
      const ticks = linearTicks(value);
      assert.ok(ticks[0] === 0 && ticks.at(-1)! >= value * 0.999 && ticks.length <= 7, `${value}: ${ticks}`);
      const log = logTicks(value, value * 50);
      assert.ok(log[0]! <= value * 1.001 && log.at(-1)! >= value * 49.9, `${value}: ${log}`);
      assert.ok(short(value).length <= 7, short(value));
    }),
    { seed: 6, numRuns: 300 },
  );
});

Deno.test("Samples survive the stream; what is none is refused", () => {
  assert.deepEqual(decodeSamples(encodeSamples(timeline.source)), timeline.source);
  assert.deepEqual(decodeSamples(undefined), [], "a peer that sends none");
  for (
    const bad of [
      1,
      [1],
      [[1, 2]],
      [[1, 2, 3, 4, 5, "6"]],
      [[1, 2, 3, 4, 5, -6]],
      [[1, 2, 3, 4, 5, 1e300]],
      Array(1001).fill([1, 1, 1, 1, 1, 1]),
    ]
  ) {
    assert.throws(() => decodeSamples(bad), /broke the protocol/);
  }
});
