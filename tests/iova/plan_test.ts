import assert from "node:assert/strict";
import fc from "fast-check";
import { SvqError } from "../../src/errors.ts";
import { iovaDocument } from "../../src/iova/document.ts";
import { type IovaPlan, planIova, type RegionRequest } from "../../src/iova/plan.ts";
import { IOVA_MAX } from "../../src/iova/range.ts";

const MIB = 2 ** 20, GIB = 2 ** 30, PAGE = 4096;
const GUEST: RegionRequest[] = [{ gpa: 0, size: 2 * GIB }, { gpa: 4 * GIB, size: 6 * GIB }];
const BITS_39 = { first: 0n, last: 2n ** 39n - 1n };

function code(run: () => unknown): string {
  try {
    run();
  } catch (error) {
    if (!(error instanceof SvqError)) throw error;
    assert.ok(error.hint, `${error.code} has no remedy`);
    return error.code;
  }
  return "ok";
}

Deno.test("guest memory keeps its address and the arena lies at the end of the range", () => {
  const plan = planIova({ ranges: BITS_39, regions: GUEST, arenas: [{ name: "rings", size: MIB }] });
  assert.deepEqual(plan.regions.map(({ gpa, iova, identity }) => [gpa, iova, identity]), [[0, 0, true], [4 * GIB, 4 * GIB, true]]);
  assert.deepEqual(plan.arenas, [{ name: "rings", iova: 2 ** 39 - MIB, size: MIB, asid: 0, perm: "rw" }]);
});

Deno.test("memory plugged in above today's keeps its address although the arena was there first", () => {
  const plan = planIova({ ranges: BITS_39, regions: GUEST, arenas: [{ name: "rings", size: MIB }] });
  const added = plan.addRegion({ gpa: 10 * GIB, size: 400 * GIB });
  assert.equal(added.identity, true);
  assert.deepEqual(plan.removeRegion({ gpa: 10 * GIB, size: 400 * GIB }), added);
  assert.deepEqual(plan.addRegion({ gpa: 10 * GIB, size: 400 * GIB }), added);
});

Deno.test("a region above the range, on a reserved hole or on something else is translated, and says why", () => {
  const plan = planIova({
    ranges: { first: 0x1000n, last: BigInt(8 * GIB) - 1n },
    reserved: [{ first: 0xfee00000n, last: 0xfeefffffn, tag: "msi" }],
    regions: [
      { gpa: 0, size: MIB, name: "low" },
      { gpa: 0xfe000000, size: 0x2000000, name: "hole" },
      { gpa: 16 * GIB, size: GIB, name: "high" },
      { gpa: 2 * GIB, size: MIB, name: "taken" },
    ],
    arenas: [{ name: "rings", size: MIB, iova: 2 * GIB }],
  });
  const why = Object.fromEntries(plan.regions.map(({ name, reason, detail, identity }) => [name, [reason, identity, detail]]));
  assert.deepEqual(why.low, ["outside-range", false, "0x0-0xfffff is outside the usable range 0x1000-0x1ffffffff"]);
  assert.deepEqual(why.hole, ["reserved", false, "0xfe000000-0xffffffff meets the reserved range 0xfee00000-0xfeefffff (msi)"]);
  assert.equal(why.high![0], "outside-range");
  assert.deepEqual(why.taken, [
    "occupied",
    false,
    "0x80000000-0x800fffff overlaps arena rings at 0x80000000-0x800fffff in address space 0",
  ]);
});

Deno.test("a large translated region keeps its offset in large pages where there is room", () => {
  const plan = planIova({
    ranges: { first: 0n, last: BigInt(8 * GIB) - 1n },
    regions: [{ gpa: 64 * GIB + 6 * MIB, size: 2 * GIB }],
    arenas: [{ name: "rings", size: MIB }],
  });
  assert.equal(plan.regions[0]!.iova, 5 * GIB + 6 * MIB);
  const tight = planIova({
    ranges: { first: BigInt(PAGE), last: BigInt(2 * GIB + PAGE) - 1n },
    regions: [{ gpa: 64 * GIB, size: 2 * GIB }],
  });
  assert.equal(tight.regions[0]!.iova, PAGE);
});

Deno.test("a region or arena with a fixed IOVA lies there or the plan is refused", () => {
  const fixed = { gpa: 0, size: MIB, iova: GIB };
  const [region] = planIova({ ranges: BITS_39, regions: [fixed] }).regions;
  assert.deepEqual([region!.iova, region!.identity, region!.reason], [GIB, false, "fixed"]);
  assert.equal(planIova({ ranges: BITS_39, regions: [{ ...fixed, iova: 0 }] }).regions[0]!.identity, true);
  assert.equal(code(() => planIova({ ranges: BITS_39, regions: [fixed], arenas: [{ name: "a", size: PAGE, iova: GIB }] })), "IOVA_OVERLAP");
  assert.equal(code(() => planIova({ ranges: BITS_39, regions: [{ ...fixed, iova: 2 ** 40 }] })), "IOVA_OUTSIDE_RANGE");
  assert.equal(code(() => planIova({ ranges: BITS_39, regions: [{ ...fixed, iova: 100 }] })), "IOVA_UNALIGNED");
});

Deno.test("address spaces are laid out independently", () => {
  const plan = planIova({
    ranges: BITS_39,
    asids: 2,
    regions: [...GUEST, { gpa: 0, size: 2 * GIB, asid: 1 }],
    arenas: [{ name: "rings", size: MIB }, { name: "cvq", size: PAGE, asid: 1 }],
  });
  assert.equal(plan.arenas[1]!.iova, 2 ** 39 - PAGE);
  assert.deepEqual(plan.spaces.map((space) => space.count), [3, 2]);
  assert.equal(plan.translation(1).toIova(4 * GIB, 1), -1);
  assert.equal(plan.translation(0).toIova(4 * GIB, 1), 4 * GIB);
  assert.equal(code(() => plan.addRegion({ gpa: 0, size: PAGE, asid: 2 })), "IOVA_NO_SUCH_ASID");
  assert.equal(code(() => plan.translation(7)), "IOVA_NO_SUCH_ASID");
});

Deno.test("a range over all 64 bits is used up to 2^52, where svq's addresses end", () => {
  const plan = planIova({ ranges: { first: 0n, last: IOVA_MAX }, regions: GUEST, arenas: [{ name: "rings", size: 5000 }] });
  assert.deepEqual([plan.arenas[0]!.iova, plan.arenas[0]!.size], [2 ** 52 - 8192, 8192]);
  assert.equal(code(() => planIova({ ranges: { first: 2n ** 60n, last: IOVA_MAX } })), "IOVA_ADDRESS_LIMIT");
  assert.equal(code(() => plan.addRegion({ gpa: 2 ** 52, size: PAGE })), "IOVA_ADDRESS_LIMIT");
});

Deno.test("a map whose regions overlap, are empty, unaligned or too large is refused by name", () => {
  const plan = (regions: RegionRequest[]) => code(() => planIova({ ranges: BITS_39, regions }));
  assert.equal(plan([{ gpa: 0, size: GIB }, { gpa: GIB - PAGE, size: GIB }]), "IOVA_REGION_OVERLAP");
  assert.equal(plan([{ gpa: 0, size: GIB }, { gpa: 0, size: GIB }]), "IOVA_REGION_OVERLAP");
  assert.equal(plan([{ gpa: 0, size: 0 }]), "IOVA_INVALID");
  assert.equal(plan([{ gpa: -PAGE, size: PAGE }]), "IOVA_INVALID");
  assert.equal(plan([{ gpa: 0, size: PAGE + 1 }]), "IOVA_UNALIGNED");
  assert.equal(plan([{ gpa: 2 ** 41, size: 2 ** 40 }]), "IOVA_EXHAUSTED");
  assert.equal(code(() => planIova({ ranges: BITS_39, asids: 0 })), "IOVA_INVALID");
  assert.equal(code(() => planIova({ ranges: [] })), "IOVA_EXHAUSTED");
});

Deno.test("an arena's name is unique, and a removed arena or region is gone", () => {
  const plan = planIova({ ranges: BITS_39, regions: GUEST, arenas: [{ name: "rings", size: MIB }] });
  assert.equal(code(() => plan.addArena({ name: "rings", size: PAGE })), "IOVA_ARENA_EXISTS");
  plan.removeArena("rings");
  assert.equal(code(() => plan.removeArena("rings")), "IOVA_NOT_ALLOCATED");
  assert.equal(code(() => plan.removeRegion({ gpa: 0, size: GIB })), "IOVA_PARTIAL_FREE");
  assert.equal(code(() => plan.removeRegion({ gpa: 3 * GIB, size: GIB })), "IOVA_NOT_ALLOCATED");
  GUEST.forEach(({ gpa, size }) => plan.removeRegion({ gpa, size }));
  assert.deepEqual(plan.spaces[0]!.freeRanges(), [BITS_39]);
});

/** Everything that must hold of a plan at any time. */
function checkPlan(plan: IovaPlan, regions: readonly RegionRequest[]): void {
  assert.equal(plan.regions.length, regions.length);
  const placed = [...plan.regions, ...plan.arenas];
  placed.forEach((a, i) => {
    const end = a.iova + a.size;
    assert.ok(a.iova % plan.align === 0 && a.size % plan.align === 0);
    assert.ok(plan.ranges.some(({ first, last }) => first <= BigInt(a.iova) && BigInt(end) - 1n <= last), "outside the range");
    assert.ok(!plan.reserved.some(({ first, last }) => first < BigInt(end) && BigInt(a.iova) <= last), "in a hole");
    placed.slice(i + 1).forEach((b) => assert.ok(a.asid !== b.asid || end <= b.iova || b.iova + b.size <= a.iova, "overlap"));
  });
  for (const region of plan.regions) {
    assert.equal(region.identity, region.iova === region.gpa);
    assert.equal(region.identity, region.reason === undefined);
    const translation = plan.translation(region.asid);
    assert.equal(translation.toIova(region.gpa, region.size), region.iova);
    assert.equal(translation.toGpa(region.iova + region.size - 1, 1), region.gpa + region.size - 1);
    assert.deepEqual(plan.regionAt(region.gpa + region.size - 1, region.asid), region);
  }
  const allocated = placed.map(({ iova, size, asid }) => `${asid} ${iova} ${size}`).sort();
  const entries = plan.spaces.flatMap((space) => space.entries().map(({ iova, size, asid }) => `${asid} ${iova} ${size}`)).sort();
  assert.deepEqual(entries, allocated);
}

const slot = fc.record({ slot: fc.nat(23), pages: fc.integer({ min: 1, max: 8 }), asid: fc.nat(1) });
const toRegion = ({ slot, pages, asid }: { slot: number; pages: number; asid: number }) => ({
  gpa: slot * 8 * PAGE,
  size: pages * PAGE,
  asid,
});
const unique = (entry: { slot: number; asid: number }) => `${entry.slot} ${entry.asid}`;

Deno.test("a plan keeps its promises for any map, and through any sequence of plugging and unplugging", () => {
  let planned = 0;
  fc.assert(
    fc.property(
      fc.uniqueArray(slot, { maxLength: 10, selector: unique }),
      fc.array(slot, { maxLength: 20 }),
      fc.tuple(fc.nat(40), fc.integer({ min: 60, max: 160 })),
      fc.array(fc.tuple(fc.nat(150), fc.nat(6)), { maxLength: 2 }),
      fc.array(fc.integer({ min: 1, max: 4 * PAGE }), { maxLength: 3 }),
      (slots, changes, [first, pages], holes, arenas) => {
        const request = {
          ranges: { first: BigInt(first * PAGE), last: BigInt((first + pages) * PAGE - 1) },
          reserved: holes.map(([page, more]) => ({ first: BigInt(page * PAGE), last: BigInt((page + more + 1) * PAGE - 1) })),
          asids: 2,
          arenas: arenas.map((size, index) => ({ name: `a${index}`, size, asid: index % 2 })),
        };
        const live = new Map(slots.map((entry) => [unique(entry), toRegion(entry)]));
        let plan: IovaPlan;
        try {
          plan = planIova({ ...request, regions: [...live.values()] });
        } catch (error) {
          assert.equal((error as SvqError).code, "IOVA_EXHAUSTED");
          return;
        }
        planned++;
        checkPlan(plan, [...live.values()]);
        // Where nothing of svq's own is in the way, identity was possible and so was given.
        for (const region of plan.regions) if (!region.identity) assert.notEqual(region.detail, undefined);
        for (const change of changes) {
          const key = unique(change);
          const present = live.get(key);
          if (present !== undefined) {
            plan.removeRegion(present);
            live.delete(key);
          } else {
            const region = toRegion(change);
            const obstacle = plan.space(region.asid).conflict(BigInt(region.gpa), BigInt(region.size));
            const before = plan.regions;
            try {
              assert.equal(plan.addRegion(region).identity, obstacle === undefined);
              live.set(key, region);
              const kept = plan.regions.filter((entry) => !(entry.gpa === region.gpa && entry.asid === region.asid));
              assert.deepEqual(kept, before, "something that was placed has moved");
            } catch (error) {
              if (!(error instanceof SvqError)) throw error;
              assert.equal(error.code, "IOVA_EXHAUSTED");
            }
          }
          checkPlan(plan, [...live.values()]);
        }
        live.forEach((region) => plan.removeRegion(region));
        arenas.forEach((_, index) => plan.removeArena(`a${index}`, index % 2));
        assert.deepEqual(
          plan.spaces.map((space) => space.freeRanges()),
          planIova({ ...request, arenas: [] }).spaces.map((s) => s.freeRanges()),
        );
      },
    ),
    { numRuns: 150, seed: 1 },
  );
  assert.ok(planned > 75, `only ${planned} plans were possible`);
});

Deno.test("every region that fits the range and no hole keeps its address in a first layout", () => {
  fc.assert(
    fc.property(fc.uniqueArray(slot, { maxLength: 12, selector: unique }), fc.integer({ min: 1, max: 200 }), (slots, pages) => {
      const request = { ranges: { first: 0n, last: BigInt(pages * PAGE - 1) }, asids: 2, regions: slots.map(toRegion) };
      let plan: IovaPlan;
      try {
        plan = planIova(request);
      } catch (error) {
        assert.equal((error as SvqError).code, "IOVA_EXHAUSTED");
        return;
      }
      for (const { gpa, size, identity } of plan.regions) assert.equal(identity, gpa + size <= pages * PAGE);
    }),
    { numRuns: 150, seed: 1 },
  );
});

Deno.test("the document svq.iova/1 has the keys that scripts rely on", () => {
  const plan = planIova({
    ranges: { first: 0n, last: 0xffffffffn },
    reserved: [{ first: 0xfee00000n, last: 0xfeefffffn, tag: "msi" }],
    regions: [{ gpa: 0, size: GIB, name: "pc.ram" }, { gpa: 2 ** 33, size: PAGE, perm: "ro" }],
    arenas: [{ name: "rings", size: PAGE }],
  });
  const total = 2 ** 32 - MIB - GIB - 2 * PAGE, largest = 0xfee00000 - GIB;
  const fragmentation = Math.round((1 - largest / total) * 1e6) / 1e6;
  assert.deepEqual(JSON.parse(JSON.stringify(iovaDocument(plan))), {
    schema: "svq.iova/1",
    range: { first: "0x0", last: "0xffffffff" },
    ranges: [{ first: "0x0", last: "0xffffffff" }],
    reserved: [{ first: "0xfee00000", last: "0xfeefffff", tag: "msi" }],
    align_bytes: 4096,
    regions: [
      { gpa: "0x0", iova: "0x0", size_bytes: GIB, identity: true, asid: 0, name: "pc.ram" },
      {
        gpa: "0x200000000",
        iova: "0xffffe000",
        size_bytes: PAGE,
        identity: false,
        asid: 0,
        name: "guest 0x200000000",
        reason: "outside-range",
        detail: "0x200000000-0x200000fff is outside the usable range 0x0-0xffffffff",
      },
    ],
    allocations: [
      { iova: "0x0", size_bytes: GIB, asid: 0, perm: "rw", tag: "pc.ram" },
      { iova: "0xffffe000", size_bytes: PAGE, asid: 0, perm: "ro", tag: "guest 0x200000000" },
      { iova: "0xfffff000", size_bytes: PAGE, asid: 0, perm: "rw", tag: "arena rings" },
    ],
    free: [{ first: "0x40000000", last: "0xfedfffff", asid: 0 }, { first: "0xfef00000", last: "0xffffdfff", asid: 0 }],
    fragmentation,
    spaces: [{
      asid: 0,
      free_bytes: total,
      largest_free_bytes: largest,
      allocated_bytes: GIB + 2 * PAGE,
      fragmentation,
    }],
  });
});
