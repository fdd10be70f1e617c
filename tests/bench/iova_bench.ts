import { IovaSpace } from "../../src/iova/allocator.ts";
import { IOVA_MAX } from "../../src/iova/range.ts";
import { Translation } from "../../src/iova/translation.ts";

const PAGE = 4096n;
const COUNT = 100_000;

Deno.bench("IovaSpace: 100,000 ranges allocated top-down and freed out of order", { group: "allocator", n: 3, warmup: 1 }, () => {
  const space = new IovaSpace({ ranges: [{ first: 0n, last: IOVA_MAX }] });
  for (let i = 0; i < COUNT; i++) space.allocTopDown(PAGE, { tag: "x" });
  for (let i = 0; i < COUNT; i++) space.free(IOVA_MAX + 1n - BigInt((i * 61) % COUNT + 1) * PAGE, PAGE);
});

for (const count of [1, 8, 256]) {
  // Every other slot is moved, so that neighbours do not join.
  const regions = Array.from({ length: count }, (_, i) => ({ gpa: i * 2 ** 30, iova: i * 2 ** 30 + (i % 2) * 2 ** 40, size: 2 ** 30 }));
  const translation = new Translation(regions);
  const gpas = Float64Array.from({ length: 1024 }, (_, i) => (i * 7919 % count) * 2 ** 30 + i * 4096);
  Deno.bench(`Translation: 1024 segments over ${count} regions`, { group: "translation" }, () => {
    let sum = 0;
    for (let i = 0; i < gpas.length; i++) sum += translation.toIova(gpas[i]!, 1500);
    if (sum < 0) throw new Error("unmapped");
  });
}
