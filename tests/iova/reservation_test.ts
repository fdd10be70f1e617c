import assert from "node:assert/strict";
import fc from "fast-check";
import { SvqError } from "../../src/errors.ts";
import { IovaPlan } from "../../src/iova/plan.ts";

const PAGE = 4096;

function plan(pages: number, reserved: { first: bigint; last: bigint }[] = []): IovaPlan {
  return new IovaPlan({ ranges: { first: 0n, last: BigInt(pages * PAGE) - 1n }, reserved });
}

function refused(code: string, work: () => unknown): void {
  assert.throws(work, (error) => error instanceof SvqError && error.code === code, code);
}

Deno.test("a reservation goes to the end of the range, or where it is asked for, and guest memory and arenas keep clear of it", () => {
  const layout = plan(64);
  assert.equal(layout.reserve({ size: PAGE, tag: "a" }).iova, BigInt(63 * PAGE));
  assert.equal(layout.reserve({ size: 2 * PAGE, iova: 8 * PAGE, tag: "b" }).iova, BigInt(8 * PAGE));
  assert.equal(layout.reserve({ size: PAGE, align: 16 * PAGE, tag: "c" }).iova, BigInt(48 * PAGE));
  assert.equal(layout.addArena({ name: "rings", size: PAGE }).iova, 62 * PAGE);
  const moved = layout.addRegion({ gpa: 8 * PAGE, size: PAGE });
  assert.equal(moved.identity, false);
  assert.equal(moved.reason, "occupied");
  assert.deepEqual(layout.reservations.map(({ tag }) => tag), ["b", "c", "a"]);
});

Deno.test("only reservations can be freed by hand, and exactly", () => {
  const layout = plan(64);
  layout.addRegion({ gpa: 0, size: 4 * PAGE });
  layout.addArena({ name: "rings", size: PAGE });
  layout.reserve({ size: 2 * PAGE, iova: 8 * PAGE, tag: "mine" });
  refused("IOVA_OWNED", () => layout.unreserve({ iova: 0 }));
  refused("IOVA_OWNED", () => layout.unreserve({ iova: 63 * PAGE, size: PAGE }));
  refused("IOVA_NOT_ALLOCATED", () => layout.unreserve({ iova: 20 * PAGE }));
  refused("IOVA_PARTIAL_FREE", () => layout.unreserve({ iova: 9 * PAGE }));
  refused("IOVA_PARTIAL_FREE", () => layout.unreserve({ iova: 8 * PAGE, size: PAGE }));
  refused("IOVA_NO_SUCH_ASID", () => layout.unreserve({ iova: 8 * PAGE, asid: 1 }));
  assert.equal(layout.unreserve({ iova: 8 * PAGE }).tag, "mine");
  refused("IOVA_NOT_ALLOCATED", () => layout.unreserve({ iova: 8 * PAGE }));
  assert.equal(layout.addRegion({ gpa: 8 * PAGE, size: PAGE }).identity, true);
});

Deno.test("a reservation is refused on what is taken, on a hole, outside the range, off a page, and when nothing is left", () => {
  const layout = plan(8, [{ first: BigInt(6 * PAGE), last: BigInt(7 * PAGE) - 1n }]);
  layout.reserve({ size: PAGE, iova: 2 * PAGE, tag: "first" });
  refused("IOVA_OVERLAP", () => layout.reserve({ size: 2 * PAGE, iova: PAGE, tag: "x" }));
  refused("IOVA_RESERVED", () => layout.reserve({ size: PAGE, iova: 6 * PAGE, tag: "x" }));
  refused("IOVA_OUTSIDE_RANGE", () => layout.reserve({ size: PAGE, iova: 8 * PAGE, tag: "x" }));
  refused("IOVA_UNALIGNED", () => layout.reserve({ size: 100, tag: "x" }));
  refused("IOVA_INVALID", () => layout.reserve({ size: 0, tag: "x" }));
  refused("IOVA_EXHAUSTED", () => layout.reserve({ size: 4 * PAGE, tag: "x" }));
  assert.equal(layout.reservations.length, 1);
});

Deno.test("whatever is reserved, plugged in and freed in whatever order, nothing overlaps and everything free is free again", () => {
  const step = fc.record({
    what: fc.constantFrom("reserve", "region", "unreserve", "unplug"),
    page: fc.nat(255),
    pages: fc.integer({ min: 1, max: 40 }),
    fixed: fc.boolean(),
  });
  fc.assert(
    fc.property(fc.array(step, { maxLength: 60 }), (steps) => {
      const layout = plan(256, [{ first: BigInt(100 * PAGE), last: BigInt(104 * PAGE) - 1n }]);
      for (const { what, page, pages, fixed } of steps) {
        const size = pages * PAGE;
        try {
          if (what === "reserve") layout.reserve({ size, tag: "r", ...(fixed ? { iova: page * PAGE } : {}) });
          else if (what === "region") layout.addRegion({ gpa: page * PAGE, size });
          else if (what === "unreserve") {
            const one = layout.reservations[page % Math.max(1, layout.reservations.length)];
            if (one !== undefined) layout.unreserve({ iova: Number(one.iova) });
          } else {
            const one = layout.regions[page % Math.max(1, layout.regions.length)];
            if (one !== undefined) layout.removeRegion(one);
          }
        } catch (error) {
          assert.ok(error instanceof SvqError && /^IOVA_/.test(error.code), String(error));
        }
        const spans = layout.space(0).entries();
        spans.slice(1).forEach((entry, i) => assert.ok(spans[i]!.iova + spans[i]!.size <= entry.iova));
        assert.equal(spans.length, layout.reservations.length + layout.regions.length);
      }
      for (const { iova } of layout.reservations) layout.unreserve({ iova: Number(iova) });
      for (const region of layout.regions) layout.removeRegion(region);
      assert.equal(layout.space(0).freeBytes, BigInt(252 * PAGE));
      assert.equal(layout.space(0).freeRanges().length, 2);
    }),
    { numRuns: 100, seed: 3 },
  );
});
