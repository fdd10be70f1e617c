import assert from "node:assert/strict";
import fc from "fast-check";
import { run, steps } from "./model.ts";
import { packedRig, packedShapes, TABLE } from "./rigs.ts";

Deno.test("A packed ring loses, repeats and alters no chain and misses no wake-up, whatever both sides do", () => {
  let done = 0;
  fc.assert(
    fc.property(
      packedShapes.chain((shape) =>
        fc.tuple(fc.constant(shape), steps(shape.indirect ? Math.max(shape.num, TABLE) : Math.min(shape.num, 5), 2 ** 48))
      ),
      ([shape, schedule]) => void (done += run(packedRig(shape), schedule).done),
    ),
    { numRuns: 300, seed: 1 },
  );
  assert.ok(done > 1500, `only ${done} chains went through`);
});
