import assert from "node:assert/strict";
import fc from "fast-check";
import { Iotlb, IotlbMiss } from "../../src/iova/iotlb.ts";

const PAGES = 24;
const page = fc.integer({ min: 0, max: PAGES - 1 });
const range = fc.tuple(page, page).map(([a, b]) => ({ iova: Math.min(a, b) * 4096, size: (Math.abs(a - b) + 1) * 4096 }));
const step = fc.oneof(
  fc.record({ range, gpa: page, perm: fc.integer({ min: 1, max: 3 }) }),
  fc.record({ range, gpa: fc.constant(-1), perm: fc.constant(0) }),
);

Deno.test("whatever is mapped and unmapped, an address is where it was mapped last, and unknown once it was taken back", () => {
  fc.assert(
    fc.property(fc.array(step, { maxLength: 40 }), (steps) => {
      const table = new Iotlb();
      const model = new Map<number, { gpa: number; perm: number }>();
      for (const { range: { iova, size }, gpa, perm } of steps) {
        if (gpa < 0) table.invalidate(iova, size);
        else table.update({ iova, size, gpa: gpa * 4096, perm });
        for (let at = iova; at < iova + size; at += 4096) {
          if (gpa < 0) model.delete(at);
          else model.set(at, { gpa: gpa * 4096 + at - iova, perm });
        }
      }
      for (let at = 0; at < PAGES * 4096; at += 4096) {
        for (const perm of [1, 2, 3]) {
          const expected = model.get(at);
          if (expected === undefined || (expected.perm & perm) !== perm) {
            assert.equal(table.run(at + 5, 1, perm), 0);
            assert.throws(() => table.gpaOf(at + 5, perm), IotlbMiss);
          } else {
            assert.equal(table.gpaOf(at + 5, perm), expected.gpa + 5);
            assert.ok(table.run(at + 5, 4096, perm) >= 4091);
          }
        }
      }
      const { entries } = table;
      for (const [i, entry] of entries.entries()) if (i > 0) assert.ok(entries[i - 1]!.iova + entries[i - 1]!.size <= entry.iova);
    }),
    { numRuns: 200, seed: 4 },
  );
});

Deno.test("a range is in one piece where its pages follow one another, and names the first page that is not known", () => {
  const table = new Iotlb();
  table.update({ iova: 0x1000, size: 0x1000, gpa: 0x8000, perm: 3 });
  table.update({ iova: 0x2000, size: 0x1000, gpa: 0x9000, perm: 3 });
  table.update({ iova: 0x3000, size: 0x1000, gpa: 0x1000, perm: 1 });
  assert.equal(table.place(0x1800, 0x1000, 3), 0x8800);
  assert.equal(table.place(0x1800, 0x2000, 1), -1);
  assert.throws(() => table.place(0x1800, 0x2000, 3), (error) => error instanceof IotlbMiss && error.iova === 0x3000);
  assert.throws(() => table.place(0x3800, 0x1000, 1), (error) => error instanceof IotlbMiss && error.iova === 0x4000);
});
