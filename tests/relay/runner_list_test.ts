import assert from "node:assert/strict";
import fc from "fast-check";
import { RunnerList } from "../../src/relay/runner_list.ts";

Deno.test("A list of queues is a set in the order in which they came, also for queues that begin anew", () => {
  const step = fc.record({ add: fc.boolean(), index: fc.constantFrom(0, 1, 2, 3, 64, 500), life: fc.nat({ max: 1 }) });
  fc.assert(
    fc.property(fc.array(step, { maxLength: 60 }), (steps) => {
      const runners = new Map<string, { index: number }>();
      const list = new RunnerList<{ index: number }>();
      const model: { index: number }[] = [];
      for (const { add, index, life } of steps) {
        const key = `${index}.${life}`;
        const runner = runners.get(key) ?? { index };
        runners.set(key, runner);
        if (!add) {
          list.delete(runner);
          if (model.includes(runner)) model.splice(model.indexOf(runner), 1);
        } else {
          list.add(runner);
          // A Worker runs one queue of an index at a time.
          if (!model.some((one) => one.index === index)) model.push(runner);
        }
        assert.deepEqual(Array.from({ length: list.size }, (_, i) => list.at(i)), model);
        assert.equal(list.at(list.size), undefined);
      }
    }),
    { numRuns: 200, seed: 7 },
  );
});
