import assert from "node:assert/strict";
import fc from "fast-check";
import { estimateMigration, FIXED_MS } from "../../src/migration/estimate.ts";

const input = {
  pages: 262_144,
  dirtyPages: 0,
  ms: 100,
  maxBandwidth: 409.6e6,
  downtimeLimitMs: 300,
  maxIterations: 30,
  onNoConvergence: "stop",
} as const;

Deno.test("A guest that writes nothing takes one round", () => {
  assert.deepEqual(estimateMigration(input), {
    dirtyBytesPerS: 0,
    bandwidth: 409.6e6,
    rounds: 1,
    converges: true,
    downtimeMs: FIXED_MS,
    throttlePercent: 0,
  });
});

Deno.test("What is left shrinks by the share of the bandwidth that the guest's writes take", () => {
  // 50 of 100 pages per millisecond: each round takes half as long as the one before, from 2621 ms on.
  const { rounds, converges, downtimeMs } = estimateMigration({ ...input, dirtyPages: 5000 });
  assert.deepEqual([rounds, converges], [4, true]);
  assert.ok(Math.abs(downtimeMs - FIXED_MS - 2621.44 / 16) < 0.01, `${downtimeMs}`);
});

Deno.test("A guest that writes faster than the link does not converge, and never more than all memory is left", () => {
  const faster = estimateMigration({ ...input, dirtyPages: 20_000 });
  assert.deepEqual([faster.rounds, faster.converges], [30, false]);
  fc.assert(
    fc.property(fc.nat({ max: 10 ** 7 }), fc.integer({ min: 1, max: 10 ** 10 }), (dirtyPages, maxBandwidth) => {
      const { downtimeMs, rounds } = estimateMigration({ ...input, dirtyPages, maxBandwidth });
      const all = FIXED_MS + input.pages * 4096 / maxBandwidth * 1000;
      assert.ok(downtimeMs <= all * (1 + 1e-9) && rounds <= 30, `${downtimeMs} of ${all} ms`);
    }),
    { seed: 6, numRuns: 300 },
  );
});

Deno.test("Slowed down, a guest that writes three times as fast as the link converges", () => {
  const faster = { ...input, dirtyPages: 30_000 };
  assert.equal(estimateMigration(faster).converges, false);
  const slowed = estimateMigration({ ...faster, onNoConvergence: "throttle" });
  assert.deepEqual([slowed.converges, slowed.throttlePercent >= 80], [true, true], JSON.stringify(slowed));
});
