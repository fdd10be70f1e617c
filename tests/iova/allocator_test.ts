import assert from "node:assert/strict";
import fc from "fast-check";
import { SvqError } from "../../src/errors.ts";
import type { IovaAllocation } from "../../src/iova/allocation.ts";
import { IovaSpace } from "../../src/iova/allocator.ts";
import { IOVA_MAX } from "../../src/iova/range.ts";

const PAGE = 4096n;
const RUNS = { numRuns: 200, seed: 1 };

function refusal(code: string, pattern?: RegExp): (error: unknown) => boolean {
  return (error) => {
    assert.ok(error instanceof SvqError, String(error));
    assert.equal(error.code, code, error.message);
    if (pattern !== undefined) assert.match(error.message, pattern);
    assert.ok(error.hint, `${code} has no remedy`);
    return true;
  };
}

/** The naive model: who owns each page. `null` is free, `undefined` is not usable. */
class PageList {
  readonly owner: (string | null | undefined)[];

  constructor(pages: number, usable: (page: number) => boolean) {
    this.owner = Array.from({ length: pages }, (_, page) => usable(page) ? null : undefined);
  }

  fits(start: number, pages: number): boolean {
    return start >= 0 && start + pages <= this.owner.length && this.owner.slice(start, start + pages).every((owner) => owner === null);
  }

  /** All places where it fits, in order. */
  places(pages: number, align: number, phase: number): number[] {
    return this.owner.keys().filter((start) => start % align === phase % align && this.fits(start, pages)).toArray();
  }

  runs(isIn: (owner: string | null | undefined) => boolean): [number, number][] {
    const runs: [number, number][] = [];
    this.owner.forEach((owner, page) => {
      if (!isIn(owner)) return;
      if (runs.at(-1)?.[1] === page) runs.at(-1)![1] = page + 1;
      else runs.push([page, page + 1]);
    });
    return runs;
  }
}

const PAGES = 96;
const span = fc.tuple(fc.nat(PAGES - 1), fc.nat(11)).map(([first, extra]) => [first, Math.min(first + extra, PAGES - 1)] as const);
const action = fc.oneof(
  fc.record({
    kind: fc.constantFrom("top" as const, "bottom" as const),
    pages: fc.integer({ min: 1, max: 12 }),
    align: fc.constantFrom(1, 1, 2, 4, 8),
    phase: fc.nat(7),
  }),
  fc.record({ kind: fc.constant("at" as const), start: fc.nat(PAGES + 4), pages: fc.integer({ min: 1, max: 12 }) }),
  fc.record({ kind: fc.constant("free" as const), pick: fc.nat() }),
  fc.record({ kind: fc.constant("wrongFree" as const), start: fc.nat(PAGES - 1), pages: fc.integer({ min: 1, max: 12 }) }),
  fc.record({ kind: fc.constant("release" as const), span }),
);

Deno.test("a space agrees with a list of pages after every step of any sequence of allocations and frees", () => {
  fc.assert(
    fc.property(
      fc.array(span, { minLength: 1, maxLength: 3 }),
      fc.array(span, { maxLength: 3 }),
      fc.array(action, { maxLength: 60 }),
      fc.constantFrom(0n, 1n << 40n, IOVA_MAX + 1n - BigInt(PAGES) * PAGE),
      (usable, holes, actions, base) => {
        const inSome = (spans: readonly (readonly [number, number])[], page: number) => spans.some(([a, b]) => a <= page && page <= b);
        const model = new PageList(PAGES, (page) => inSome(usable, page) && !inSome(holes, page));
        fc.pre(model.owner.includes(null));
        const toRange = ([a, b]: readonly [number, number]) => ({ first: base + BigInt(a) * PAGE, last: base + BigInt(b + 1) * PAGE - 1n });
        const space = new IovaSpace({ ranges: usable.map(toRange), reserved: holes.map(toRange) });
        const live = new Map<string, IovaAllocation>();
        const pageOf = (iova: bigint) => Number((iova - base) / PAGE);
        const add = (allocation: IovaAllocation) => {
          const start = pageOf(allocation.iova), pages = Number(allocation.size / PAGE);
          assert.ok(model.fits(start, pages), "overlaps, or lies outside the usable pages");
          model.owner.fill(allocation.tag, start, start + pages);
          live.set(allocation.tag, allocation);
        };
        const drop = ({ tag, iova, size }: IovaAllocation) => {
          live.delete(tag);
          model.owner.fill(null, pageOf(iova), pageOf(iova + size));
        };

        actions.forEach((step, index) => {
          const tag = `step ${index}`;
          switch (step.kind) {
            case "top":
            case "bottom": {
              const places = model.places(step.pages, step.align, step.phase);
              const options = { tag, align: BigInt(step.align) * PAGE, congruentTo: base + BigInt(step.phase) * PAGE };
              const size = BigInt(step.pages) * PAGE;
              const alloc = () => step.kind === "top" ? space.allocTopDown(size, options) : space.allocBottomUp(size, options);
              if (places.length === 0) {
                assert.throws(alloc, refusal("IOVA_EXHAUSTED"));
              } else {
                const got = alloc();
                assert.equal(pageOf(got.iova), step.kind === "top" ? places.at(-1) : places[0]);
                add(got);
              }
              break;
            }
            case "at": {
              const iova = base + BigInt(step.start) * PAGE;
              if (iova > IOVA_MAX) break;
              if (model.fits(step.start, step.pages)) add(space.allocAt(iova, BigInt(step.pages) * PAGE, { tag }));
              else {
                const pages = Array.from({ length: step.pages }, (_, n) => step.start + n);
                const outside = pages.some((page) => !inSome(usable, page));
                const reserved = pages.some((page) => inSome(holes, page));
                const code = outside ? "IOVA_OUTSIDE_RANGE" : reserved ? "IOVA_RESERVED" : "IOVA_OVERLAP";
                const owner = model.owner.slice(step.start, step.start + step.pages).find((owner) => typeof owner === "string");
                assert.throws(
                  () => space.allocAt(iova, BigInt(step.pages) * PAGE, { tag }),
                  refusal(code, code === "IOVA_OVERLAP" ? new RegExp(`overlaps ${owner} at`) : undefined),
                );
              }
              break;
            }
            case "free": {
              const all = [...live.values()];
              const chosen = all[step.pick % all.length];
              if (chosen === undefined) break;
              assert.deepEqual(space.free(chosen.iova, chosen.size), chosen);
              drop(chosen);
              break;
            }
            case "wrongFree": {
              const iova = base + BigInt(step.start) * PAGE, size = BigInt(step.pages) * PAGE;
              if ([...live.values()].some((entry) => entry.iova === iova && entry.size === size)) break;
              const meets = model.owner.slice(step.start, step.start + step.pages).some((owner) => typeof owner === "string");
              assert.throws(() => space.free(iova, size), refusal(meets ? "IOVA_PARTIAL_FREE" : "IOVA_NOT_ALLOCATED"));
              break;
            }
            case "release": {
              const range = toRange(step.span);
              const meets = [...live.values()].filter(({ iova, size }) => iova <= range.last && iova + size > range.first);
              if (meets.every(({ iova, size }) => iova >= range.first && iova + size - 1n <= range.last)) {
                assert.deepEqual(new Set(space.release(range)), new Set(meets));
                meets.forEach(drop);
              } else {
                assert.throws(() => space.release(range), refusal("IOVA_PARTIAL_FREE"));
              }
              break;
            }
          }

          const byAddress = [...live.values()].sort((a, b) => a.iova < b.iova ? -1 : 1);
          assert.deepEqual(space.entries(), byAddress);
          const free = model.runs((owner) => owner === null);
          assert.deepEqual(space.freeRanges().map(({ first, last }) => [pageOf(first), pageOf(last + 1n)]), free);
          const lengths = free.map(([a, b]) => b - a);
          const total = lengths.reduce((a, b) => a + b, 0);
          assert.equal(space.freeBytes, BigInt(total) * PAGE);
          assert.equal(space.largestFree, BigInt(Math.max(0, ...lengths)) * PAGE);
          assert.equal(space.fragmentation(), total === 0 ? 0 : 1 - Math.max(...lengths) / total);
          const probe = (index * 37) % PAGES;
          assert.equal(space.find(base + BigInt(probe) * PAGE + 5n)?.tag, model.owner[probe] ?? undefined);
        });

        const copy = IovaSpace.deserialise(JSON.parse(JSON.stringify(space.serialise())));
        assert.deepEqual(copy.entries(), space.entries());
        assert.deepEqual(copy.freeRanges(), space.freeRanges());
        const clone = space.clone();
        space.entries().forEach(({ iova, size }) => space.free(iova, size));
        assert.deepEqual(clone.entries(), copy.entries());
        assert.equal(space.count, 0);
      },
    ),
    RUNS,
  );
});

Deno.test("exhaustion finds every aligned place that a list of pages finds", () => {
  fc.assert(
    fc.property(
      fc.array(span, { maxLength: 8 }),
      fc.integer({ min: 1, max: 6 }),
      fc.constantFrom(1, 2, 4, 8, 16),
      fc.boolean(),
      (holes, pages, align, topDown) => {
        const model = new PageList(PAGES, (page) => !holes.some(([a, b]) => a <= page && page <= b));
        fc.pre(model.owner.includes(null));
        const space = new IovaSpace({
          ranges: [{ first: 0n, last: BigInt(PAGES) * PAGE - 1n }],
          reserved: holes.map(([a, b]) => ({ first: BigInt(a) * PAGE, last: BigInt(b) * PAGE })),
        });
        for (;;) {
          const place = model.places(pages, align, 0).at(topDown ? -1 : 0);
          const options = { tag: "x", align: BigInt(align) * PAGE };
          const alloc = () =>
            topDown ? space.allocTopDown(BigInt(pages) * PAGE, options) : space.allocBottomUp(BigInt(pages) * PAGE, options);
          if (place === undefined) {
            assert.throws(alloc, refusal("IOVA_EXHAUSTED"));
            return;
          }
          assert.equal(alloc().iova, BigInt(place) * PAGE);
          model.owner.fill("x", place, place + pages);
        }
      },
    ),
    RUNS,
  );
});

Deno.test("the whole 64-bit space can be allocated, also as one range", () => {
  const space = new IovaSpace({ ranges: [{ first: 0n, last: IOVA_MAX }] });
  assert.equal(space.freeBytes, 2n ** 64n);
  const whole = space.allocTopDown(2n ** 64n, { tag: "whole" });
  assert.deepEqual([whole.iova, whole.size, space.freeBytes, space.fragmentation()], [0n, 2n ** 64n, 0n, 0]);
  assert.equal(space.find(IOVA_MAX), whole);
  space.free(0n, 2n ** 64n);
  const top = space.allocTopDown(PAGE, { tag: "top" });
  assert.equal(top.iova, IOVA_MAX + 1n - PAGE);
  assert.equal(space.find(IOVA_MAX), top);
  assert.equal(space.find(IOVA_MAX + 1n), undefined);
  assert.throws(() => space.allocAt(IOVA_MAX + 1n - PAGE, 2n * PAGE, { tag: "over" }), refusal("IOVA_OUTSIDE_RANGE"));
  assert.throws(() => space.allocAt(IOVA_MAX + 1n, PAGE, { tag: "over" }), refusal("IOVA_INVALID"));
  assert.equal(space.allocTopDown(1n << 63n, { tag: "half", align: 1n << 63n }).iova, 0n);
});

Deno.test("a colliding fixed allocation names the owner, the address space and a remedy", () => {
  const space = new IovaSpace({ asid: 1, ranges: [{ first: 0n, last: 0xffffffffn }] });
  space.allocAt(0x10000n, 0x4000n, { tag: "arena rings", perm: "ro" });
  assert.throws(() => space.allocAt(0x13000n, 0x2000n, { tag: "guest" }), (error) => {
    assert.ok(error instanceof SvqError);
    assert.equal(error.message, "0x13000-0x14fff overlaps arena rings at 0x10000-0x13fff in address space 1");
    assert.equal(error.hint, "Choose another address, or free arena rings first.");
    return true;
  });
  assert.equal(space.conflict(0x14000n, PAGE), undefined);
});

Deno.test("what is not whole pages, positive, aligned or a known permission is refused by name", () => {
  const space = new IovaSpace({ ranges: [{ first: 0n, last: 0xfffffn }] });
  assert.throws(() => space.allocTopDown(100n, { tag: "x" }), refusal("IOVA_UNALIGNED", /Size 0x64 .*4KiB/));
  assert.throws(() => space.allocAt(0x800n, PAGE, { tag: "x" }), refusal("IOVA_UNALIGNED", /Address 0x800/));
  assert.throws(() => space.allocAt(0x1000n, PAGE, { tag: "x", align: 0x2000n }), refusal("IOVA_UNALIGNED", /aligned to 8KiB/));
  assert.throws(() => space.allocTopDown(0n, { tag: "x" }), refusal("IOVA_INVALID"));
  assert.throws(() => space.allocTopDown(-PAGE, { tag: "x" }), refusal("IOVA_INVALID"));
  assert.throws(() => space.allocTopDown(PAGE, { tag: "x", align: 3n * PAGE }), refusal("IOVA_INVALID"));
  assert.throws(() => space.allocTopDown(PAGE, { tag: "x", perm: "rx" as "ro" }), refusal("IOVA_INVALID"));
  assert.throws(() => new IovaSpace({ ranges: [{ first: 5n, last: 4n }] }), refusal("IOVA_INVALID"));
  assert.throws(() => new IovaSpace({ ranges: [{ first: 0n, last: IOVA_MAX + 1n }] }), refusal("IOVA_INVALID"));
  assert.throws(() => new IovaSpace({ ranges: [{ first: 0n, last: IOVA_MAX }], pageSize: 2048n }), refusal("IOVA_INVALID"));
  assert.throws(() => new IovaSpace({ ranges: [{ first: 1n, last: 4096n }] }), refusal("IOVA_EXHAUSTED"));
  assert.throws(() => new IovaSpace({ ranges: [] }), refusal("IOVA_EXHAUSTED"));
  assert.equal(space.count, 0);
  assert.equal(space.freeBytes, 0x100000n);
});

Deno.test("exhaustion tells a small device from a fragmented space and from an alignment", () => {
  const space = new IovaSpace({ ranges: [{ first: 0n, last: 8n * PAGE - 1n }] });
  const hint = (size: bigint, align = PAGE) => {
    try {
      space.allocTopDown(size, { tag: "x", align });
    } catch (error) {
      return (error as SvqError).hint;
    }
    return "allocated";
  };
  assert.match(hint(9n * PAGE)!, /too small/);
  for (const page of [1n, 3n, 5n, 7n]) space.allocAt(page * PAGE, PAGE, { tag: "odd" });
  assert.match(hint(2n * PAGE)!, /fragmented/);
  assert.equal(space.fragmentation(), 0.75);
  space.free(7n * PAGE, PAGE);
  space.allocAt(0n, PAGE, { tag: "zero" });
  space.free(5n * PAGE, PAGE);
  space.allocAt(4n * PAGE, PAGE, { tag: "four" });
  assert.match(hint(3n * PAGE, 4n * PAGE)!, /alignment of 16KiB/);
});

Deno.test("pages that the range or a reserved hole cover in part are not used", () => {
  const space = new IovaSpace({ ranges: [{ first: 1n, last: 0x5ffen }], reserved: [{ first: 0x2fffn, last: 0x3000n, tag: "msi" }] });
  assert.deepEqual(space.freeRanges(), [{ first: 0x1000n, last: 0x1fffn }, { first: 0x4000n, last: 0x4fffn }]);
  assert.throws(() => space.allocAt(0x2000n, PAGE, { tag: "x" }), refusal("IOVA_RESERVED", /0x2fff-0x3000 \(msi\)/));
  assert.throws(() => space.allocAt(0n, PAGE, { tag: "x" }), refusal("IOVA_OUTSIDE_RANGE"));
  assert.throws(() => space.allocAt(0x5000n, PAGE, { tag: "x" }), refusal("IOVA_OUTSIDE_RANGE"));
});

Deno.test("larger pages are honoured", () => {
  const space = new IovaSpace({ ranges: [{ first: 0x1000n, last: 0x4ffffn }], pageSize: 0x10000n });
  assert.deepEqual(space.freeRanges(), [{ first: 0x10000n, last: 0x4ffffn }]);
  assert.throws(() => space.allocTopDown(0x1000n, { tag: "x" }), refusal("IOVA_UNALIGNED"));
  assert.equal(space.allocTopDown(0x10000n, { tag: "x" }).iova, 0x40000n);
});

Deno.test("a serialised space with overlapping or foreign allocations is refused", () => {
  const space = new IovaSpace({ ranges: [{ first: 0n, last: 0xffffn }] });
  space.allocAt(0x1000n, 0x2000n, { tag: "a" });
  const record = space.serialise();
  const [entry] = record.allocations;
  assert.throws(() => IovaSpace.deserialise({ ...record, allocations: [entry!, entry!] }), refusal("IOVA_OVERLAP"));
  assert.throws(() => IovaSpace.deserialise({ ...record, allocations: [{ ...entry!, iova: "0x10000" }] }), refusal("IOVA_OUTSIDE_RANGE"));
  assert.throws(() => IovaSpace.deserialise({ ...record, allocations: [{ ...entry!, iova: "zero" }] }), refusal("IOVA_INVALID"));
});

Deno.test("the work per operation grows with the logarithm: 100,000 ranges in and out", () => {
  const count = 100_000;
  const space = new IovaSpace({ ranges: [{ first: 0n, last: IOVA_MAX }] });
  for (let i = 0; i < count; i++) space.allocTopDown(PAGE, { tag: "x" });
  // 61 has no factor in common with 100,000: every second pick leaves a hole, so that the free space shatters on the way.
  for (let i = 0; i < count; i++) space.free(IOVA_MAX + 1n - BigInt((i * 61) % count + 1) * PAGE, PAGE);
  assert.equal(space.freeBytes, 2n ** 64n);
  const perOperation = space.visits / (2 * count);
  assert.ok(perOperation < 4 * Math.log2(count), `${perOperation} nodes per operation`);
});
