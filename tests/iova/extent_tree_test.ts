import assert from "node:assert/strict";
import fc from "fast-check";
import { ExtentTree } from "../../src/iova/extent_tree.ts";

/** Height of the sparsest AVL tree of `size` nodes: one of height h has at least as many as those of h - 1 and h - 2, plus one. */
function highestAllowed(size: number): number {
  let height = 0;
  for (let lower = 0, needed = 1; needed <= size; [lower, needed] = [needed, lower + needed + 1]) height++;
  return height;
}

Deno.test("the tree stays balanced and sorted, and knows its longest extent, whatever the order of changes", () => {
  fc.assert(
    fc.property(fc.array(fc.tuple(fc.nat(200), fc.integer({ min: 1, max: 10 }), fc.nat(3)), { maxLength: 300 }), (steps) => {
      const tree = new ExtentTree<number>();
      const model = new Map<number, [number, number]>();
      steps.forEach(([slot, length, kind], index) => {
        // Slots of 10 units keep the extents disjoint.
        const start = slot * 10;
        const known = model.get(start);
        if (known === undefined && kind > 0) {
          tree.insert(start, start + length, index);
          model.set(start, [start + length, index]);
        } else if (known !== undefined && kind === 1) {
          tree.resize(start, start, start + length);
          model.set(start, [start + length, known[1]]);
        } else {
          assert.equal(tree.remove(start), known !== undefined);
          model.delete(start);
        }
        const lengths = Array.from(model, ([first, [end]]) => end - first);
        assert.equal(tree.size, model.size);
        assert.equal(tree.longest, Math.max(0, ...lengths));
        assert.equal(tree.units, lengths.reduce((a, b) => a + b, 0));
        assert.ok(tree.height <= highestAllowed(model.size), `height ${tree.height} for ${model.size}`);
      });
      const expected = [...model].sort(([a], [b]) => a - b).map(([start, [end, value]]) => [start, end, value]);
      assert.deepEqual(Array.from(tree, ({ start, end, value }) => [start, end, value]), expected);
      for (let unit = 0; unit < 2020; unit += 7) {
        const hit = expected.find(([start, end]) => start! <= unit && unit < end!);
        assert.equal(tree.at(unit)?.value, hit?.[2]);
      }
    }),
    { numRuns: 100, seed: 1 },
  );
});

Deno.test("neither ascending nor inward insertions degrade the tree into a list", () => {
  const count = 4096;
  const orders = [(i: number) => i, (i: number) => count - i, (i: number) => i % 2 === 0 ? i : 2 * count - i];
  for (const order of orders) {
    const tree = new ExtentTree<undefined>();
    for (let i = 0; i < count; i++) tree.insert(2 * order(i), 2 * order(i) + 1, undefined);
    assert.ok(tree.height <= highestAllowed(count), `height ${tree.height}`);
  }
});
