import assert from "node:assert/strict";
import { differingPages, lacksPoisonOnly, POISON } from "../support/compare_memory.ts";
import { TempDir } from "../support/temp.ts";

const PAGE_WORDS = 512;
const SECTOR_WORDS = 64;

/** Two memories of one page: the source's and the destination's, the same but for `change`. */
function pages(folder: TempDir, change: (source: BigUint64Array, destination: BigUint64Array) => void): [string, string] {
  const source = BigUint64Array.from({ length: PAGE_WORDS }, (_, i) => BigInt(i) * 0x9e37_79b9n);
  const destination = source.slice();
  change(source, destination);
  return [source, destination].map((words, i) => {
    const path = folder.join(`ram${i}`);
    Deno.writeFileSync(path, new Uint8Array(words.buffer));
    return path;
  }) as [string, string];
}

Deno.test("a page that lacks only the processor's poison is told from one that lacks what the device wrote", () => {
  using folder = new TempDir();
  const poison = (words: BigUint64Array) => {
    for (let i = 0; i < PAGE_WORDS; i += SECTOR_WORDS) words[i] = POISON;
  };
  const cases: [string, boolean, (source: BigUint64Array, destination: BigUint64Array) => void][] = [
    ["poison missing at the destination", true, (source) => poison(source)],
    ["the device's data missing at the destination, which still has the poison", false, (_, destination) => poison(destination)],
    ["poison missing, and a word of data, too", false, (source, destination) => {
      poison(source);
      destination[SECTOR_WORDS + 1] = 0n;
    }],
    ["older data at the destination, in the first word of a sector", false, (_, destination) => destination[SECTOR_WORDS] = 7n],
    ["poison in the middle of a sector, where the workload puts none", false, (source) => source[3] = POISON],
  ];
  for (const [what, expected, change] of cases) {
    const [a, b] = pages(folder, change);
    assert.deepEqual(differingPages(a, b), [0], what);
    assert.equal(lacksPoisonOnly(a, b, 0), expected, what);
  }
});
