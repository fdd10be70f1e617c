import assert from "node:assert/strict";
import fc from "fast-check";
import { SvqError } from "../../src/errors.ts";
import { NO_ROOM, type TranslatedRegion, Translation, UNMAPPED } from "../../src/iova/translation.ts";

const GIB = 2 ** 30;

/** Disjoint regions on both sides: GPA slots in order, IOVA slots shuffled, sizes up to a full slot so that neighbours touch. */
const regionsArbitrary = fc.array(fc.integer({ min: 1, max: 16 }), { minLength: 1, maxLength: 12 }).chain((sizes) =>
  fc.shuffledSubarray(sizes.map((_, slot) => slot), { minLength: sizes.length }).map((slots) =>
    sizes.map((size, index): TranslatedRegion => ({ gpa: index * 16, iova: 1000 + slots[index]! * 16, size }))
  )
);

function buffers(capacity: number) {
  return { addresses: new Float64Array(capacity), lengths: new Uint32Array(capacity) };
}

Deno.test("every byte of any segment translates as a list of regions says, there and back", () => {
  fc.assert(
    fc.property(
      regionsArbitrary,
      fc.array(fc.tuple(fc.nat(210), fc.integer({ min: 1, max: 60 })), { maxLength: 40 }),
      (regions, segments) => {
        const translation = new Translation(regions);
        const byteToIova = (gpa: number) => {
          const region = regions.find((region) => region.gpa <= gpa && gpa < region.gpa + region.size);
          return region === undefined ? undefined : gpa - region.gpa + region.iova;
        };
        for (const [gpa, length] of segments) {
          const bytes = Array.from({ length }, (_, n) => byteToIova(gpa + n));
          const mapped = bytes.every((byte) => byte !== undefined);
          const out = buffers(64);
          const count = translation.splitToIova(gpa, length, out, 3);
          if (!mapped) {
            assert.equal(count, UNMAPPED);
            assert.equal(translation.toIova(gpa, length), UNMAPPED);
            continue;
          }
          const flat: number[] = [];
          for (let i = 3; i < 3 + count; i++) for (let n = 0; n < out.lengths[i]!; n++) flat.push(out.addresses[i]! + n);
          assert.deepEqual(flat, bytes);
          assert.equal(translation.toIova(gpa, length), count === 1 ? bytes[0] : UNMAPPED);
          for (let i = 3; i < 3 + count; i++) {
            const back = translation.toGpa(out.addresses[i]!, out.lengths[i]!);
            assert.equal(byteToIova(back), out.addresses[i]);
          }
          // A piece ends only where the next byte is elsewhere.
          for (let i = 4; i < 3 + count; i++) assert.notEqual(out.addresses[i], out.addresses[i - 1]! + out.lengths[i - 1]!);
        }
      },
    ),
    { numRuns: 200, seed: 1 },
  );
});

Deno.test("identity regions that touch are one span, and a segment across them is one piece", () => {
  const translation = new Translation([{ gpa: GIB, iova: GIB, size: GIB }, { gpa: 0, iova: 0, size: GIB }]);
  assert.equal(translation.count, 1);
  assert.equal(translation.toIova(GIB - 100, 200), GIB - 100);
});

Deno.test("an address right after, before or far above the regions, and NaN, are unmapped", () => {
  const translation = new Translation([{ gpa: 4096, iova: 8192, size: 4096 }]);
  assert.equal(translation.toIova(4096, 4096), 8192);
  for (const [gpa, length] of [[8192, 1], [4095, 2], [4096, 4097], [2 ** 51, 1], [NaN, 1], [4096, NaN]] as const) {
    assert.equal(translation.toIova(gpa, length), UNMAPPED, `${gpa} ${length}`);
  }
  assert.equal(new Translation([]).toIova(0, 1), UNMAPPED);
  assert.equal(new Translation([]).splitToGpa(0, 1, buffers(1), 0), UNMAPPED);
});

Deno.test("a split that does not fit the output says so and writes nothing behind it", () => {
  const translation = new Translation([{ gpa: 0, iova: 4096, size: 4096 }, { gpa: 4096, iova: 0, size: 4096 }]);
  const out = buffers(2);
  assert.equal(translation.splitToIova(4000, 200, out, 1), NO_ROOM);
  assert.equal(translation.splitToIova(4000, 200, out, 0), 2);
  assert.deepEqual([...out.addresses, ...out.lengths], [8096, 0, 96, 104]);
});

Deno.test("regions that share a GPA or an IOVA, or end above 2^52, make no translation", () => {
  const code = (regions: TranslatedRegion[]) => {
    try {
      new Translation(regions);
    } catch (error) {
      return error instanceof SvqError ? error.code : error;
    }
    return "made";
  };
  assert.equal(code([{ gpa: 0, iova: 0, size: 8 }, { gpa: 7, iova: 100, size: 8 }]), "IOVA_OVERLAP");
  assert.equal(code([{ gpa: 0, iova: 0, size: 8 }, { gpa: 100, iova: 7, size: 8 }]), "IOVA_OVERLAP");
  assert.equal(code([{ gpa: 0, iova: 2 ** 52 - 4, size: 8 }]), "IOVA_ADDRESS_LIMIT");
  assert.equal(code([{ gpa: 0, iova: 0.5, size: 8 }]), "IOVA_INVALID");
  assert.equal(code([{ gpa: 0, iova: 2 ** 52 - 8, size: 8 }]), "made");
});
