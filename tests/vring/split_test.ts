import assert from "node:assert/strict";
import fc from "fast-check";
import { Chain } from "../../src/vring/queue.ts";
import { run, steps } from "./model.ts";
import { splitRig, splitShapes, TABLE } from "./rigs.ts";

Deno.test("A split ring loses, repeats and alters no chain and misses no wake-up, whatever both sides do", () => {
  let done = 0;
  fc.assert(
    fc.property(
      splitShapes.chain((shape) =>
        fc.tuple(fc.constant(shape), steps(shape.indirect ? Math.max(shape.num, TABLE) : Math.min(shape.num, 5), 2 ** 48))
      ),
      ([shape, schedule]) => void (done += run(splitRig(shape), schedule).done),
    ),
    { numRuns: 300, seed: 1 },
  );
  assert.ok(done > 1500, `only ${done} chains went through`);
});

Deno.test("A split ring runs through the wrap of its 16-bit indices", () => {
  for (const eventIdx of [false, true]) {
    const { driver, device } = splitRig({ num: 8, eventIdx, indirect: false, inOrder: false, base: 0xff00, skew: 2 });
    const chain = new Chain(8);
    for (let round = 0; round < 70000; round += 3) {
      assert.equal(device.enableKicks(), false);
      assert.equal(driver.enableCalls(), false);
      for (let i = 0; i < 3; i++) driver.add([{ address: 64 + i, length: 1 }], [{ address: 128, length: 2 }]);
      assert.ok(driver.publish());
      const ids = [];
      while (device.pop(chain)) ids.push(chain.id);
      for (const id of ids.reverse()) device.push(id, 1);
      assert.ok(device.flush());
      for (const id of ids) assert.equal(driver.take(), id);
    }
  }
});
