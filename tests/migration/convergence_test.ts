import assert from "node:assert/strict";
import fc from "fast-check";
import { Convergence, NO_CONVERGENCE, type RoundOutcome, THROTTLE_STEPS } from "../../src/migration/convergence.ts";

const limits = { downtimeLimitMs: 300, maxIterations: 10 } as const;
const bad: RoundOutcome = { sent: 1000, dirty: 900, estimateMs: 301 };
const good: RoundOutcome = { sent: 1000, dirty: 500, estimateMs: 301 };

Deno.test("The guest is stopped when the limit is met exactly, and not a millisecond before", () => {
  const convergence = new Convergence({ ...limits, onNoConvergence: "abort" });
  assert.equal(convergence.next({ ...bad, estimateMs: 300.001 }), "round");
  assert.equal(convergence.next({ ...bad, estimateMs: 300 }), "stop");
});

Deno.test("At the last iteration `stop` stops, `abort` and `throttle` give up", () => {
  for (const [onNoConvergence, last] of [["stop", "stop"], ["abort", "give-up"], ["throttle", "give-up"]] as const) {
    const convergence = new Convergence({ ...limits, onNoConvergence });
    for (let round = 1; round < 10; round++) assert.equal(convergence.next(bad), "round", onNoConvergence);
    assert.equal(convergence.next(bad), last, onNoConvergence);
  }
});

Deno.test("The guest is slowed down after two bad rounds, a step further after each bad one, and not after good ones", () => {
  const convergence = new Convergence({ ...limits, maxIterations: 100, onNoConvergence: "throttle" });
  const percents = [bad, good, bad, bad, good, bad, bad, bad].map((round) => {
    assert.equal(convergence.next(round), "round");
    return convergence.throttlePercent;
  });
  assert.deepEqual(percents, [0, 0, 0, 20, 20, 20, 40, 60]);
});

Deno.test("Whatever rounds are like: it ends within the iterations, throttles only when told, and never less than before", () => {
  const round = fc.record({ sent: fc.nat(10_000), dirty: fc.nat(10_000), estimateMs: fc.double({ min: 0, max: 10_000, noNaN: true }) });
  fc.assert(
    fc.property(
      fc.constantFrom(...NO_CONVERGENCE),
      fc.integer({ min: 1, max: 50 }),
      fc.array(round, { minLength: 50, maxLength: 50 }),
      (onNoConvergence, maxIterations, rounds) => {
        const convergence = new Convergence({ downtimeLimitMs: 300, maxIterations, onNoConvergence });
        let percent = 0;
        for (const [i, one] of rounds.entries()) {
          const next = convergence.next(one);
          assert.ok(convergence.throttlePercent >= percent);
          percent = convergence.throttlePercent;
          assert.ok(percent === 0 || (onNoConvergence === "throttle" && THROTTLE_STEPS.includes(percent)));
          if (next === "stop") assert.ok(one.estimateMs <= 300 || (i + 1 === maxIterations && onNoConvergence === "stop"));
          if (next === "give-up") assert.ok(i + 1 === maxIterations && onNoConvergence !== "stop");
          if (next !== "round") return;
        }
        assert.fail("it never ended");
      },
    ),
    { seed: 6, numRuns: 200 },
  );
});
