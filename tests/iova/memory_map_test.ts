import assert from "node:assert/strict";
import fc from "fast-check";
import { SvqError } from "../../src/errors.ts";
import { iovaDocument } from "../../src/iova/document.ts";
import { parseMemoryMap, parseRange, parseRegion, parseReserved } from "../../src/iova/memory_map.ts";
import { planIova } from "../../src/iova/plan.ts";
import { formatRange, IOVA_MAX } from "../../src/iova/range.ts";

const GIB = 2 ** 30;

function failure(run: () => unknown): SvqError {
  try {
    run();
  } catch (error) {
    assert.ok(error instanceof SvqError, String(error));
    assert.equal(error.exitCode, 2);
    return error;
  }
  throw new Error("nothing was thrown");
}

Deno.test("a plain map takes both range forms, units, comments, names and fixed IOVAs", () => {
  const text = `# a guest
0x0-0x7fffffff        below 4G
0x100000000+2GiB = 0x80000000 : above   # moved

4096K+4K=0
`;
  assert.deepEqual(parseMemoryMap(text), [
    { gpa: 0, size: 2 * GIB, name: "below 4G" },
    { gpa: 4 * GIB, size: 2 * GIB, iova: 2 * GIB, name: "above" },
    { gpa: 4 * 2 ** 20, size: 4096, iova: 0 },
  ]);
});

Deno.test("/proc/iomem gives its System RAM in whole pages", () => {
  const text = `00000000-00000fff : Reserved
00001000-0009fbff : System RAM
000a0000-000bffff : PCI Bus 0000:00
00100000-7ffdcfff : System RAM
  01000000-01ffffff : Kernel code
100000000-17fffffff : System RAM
fd00000000-fd3fffffff : CXL Window 0
  fd00000000-fd3fffffff : System RAM (kmem)
`;
  assert.deepEqual(parseMemoryMap(text).map(({ gpa, size }) => [gpa, size]), [
    [0x1000, 0x9e000],
    [0x100000, 0x7fedd000],
    [0x100000000, 2 * GIB],
    [0xfd00000000, GIB],
  ]);
});

Deno.test("an iomem that an ordinary user read is told from an empty one", () => {
  assert.match(failure(() => parseMemoryMap("00000000-00000000 : Reserved\n00000000-00000000 : System RAM\n")).hint!, /as root/);
  assert.equal(failure(() => parseMemoryMap("00000000-00000fff : Reserved\n")).code, "MEMORY_MAP_EMPTY");
  assert.equal(failure(() => parseMemoryMap("\n# nothing\n")).code, "MEMORY_MAP_EMPTY");
});

const MTREE = `FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-00000000000bffff (prio 0, ram): pc.ram KVM

FlatView #2
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom KVM
  0000000000100000-0000000007ffffff (prio 0, ram): pc.ram @0000000000100000 KVM

FlatView #3
 AS "nic", root: bus master container
 Root memory region: (none)
  0000000000000000-0000000007ffffff (prio 0, ram): pc.ram
`;

Deno.test("QEMU's flat view of system memory gives its ram, and no other view does", () => {
  assert.deepEqual(parseMemoryMap(MTREE), [
    { gpa: 0, size: 0xa0000, name: "pc.ram" },
    { gpa: 0x100000, size: 0x7f00000, name: "pc.ram" },
  ]);
  assert.equal(parseMemoryMap(MTREE.split(/Root memory region: system\n|FlatView #3/)[1]!).length, 2);
});

Deno.test("JSON is taken as an array or as a document with regions", () => {
  const regions = [{ gpa: "0x0", size_bytes: 4096 }, { gpa: 8192, size_bytes: "1M", fixed_iova: "0x100000", asid: 1, name: "dimm" }];
  const expected = [{ gpa: 0, size: 4096 }, { gpa: 8192, size: 2 ** 20, iova: 2 ** 20, asid: 1, name: "dimm" }];
  assert.deepEqual(parseMemoryMap(JSON.stringify(regions)), expected);
  assert.deepEqual(parseMemoryMap(` ${JSON.stringify({ regions })}`), expected);
});

Deno.test("a plan's own document is a memory map: it leads to the same layout", () => {
  const ranges = { first: 0n, last: 2n ** 33n - 1n };
  const plan = planIova({ ranges, regions: [{ gpa: 0, size: GIB }, { gpa: 2 ** 34, size: GIB }] });
  const again = planIova({ ranges, regions: parseMemoryMap(JSON.stringify(iovaDocument(plan))) });
  assert.deepEqual(again.regions, plan.regions);
});

Deno.test("an error names the line or the entry, what is wrong and what to write", () => {
  const cases: [string, RegExp, RegExp][] = [
    ["0x0-0xfff\n\n0x2000_0x3000\n", /^Line 3 \(0x2000_0x3000\): /, /FIRST-LAST/],
    ["0x0-7fffffff\n", /^Line 1 .*Bad address: 7fffffff/, /0x7fffffff/],
    ["0x0+2GX\n", /^Line 1 .*2GX/, /MiB/],
    ["0x2000-0x1000\n", /^Line 1 .*is not a range/, /lower one first/],
    ["0x0+0\n", /^Line 1 .*is not a range/, /inclusive/],
    ["0x10000000000000-0x1fffffffffffff\n", /^Line 1 .*above 2\^52/, /below 2\^52/],
    ["0x0+4K\n0x4000+4K=zz\n", /^Line 2 .*Bad address: zz/, /0x/],
    ['[{"gpa": 0}]', /^Entry 1 .*size_bytes is missing/, /number/],
    ['[{"gpa": -1, "size_bytes": 1}]', /^Entry 1 .*gpa is not an address/, /number/],
    ["[1]", /^Entry 1 \(1\): not an object/, /gpa, size_bytes/],
    ['{"gpa": 1}', /neither an array/, /$/],
    ["[{]", /not JSON/, /$/],
    ["00002000-00001000 : System RAM\n", /^Line 1 /, /lower one first/],
  ];
  for (const [text, message, hint] of cases) {
    const error = failure(() => parseMemoryMap(text));
    assert.equal(error.code, "MEMORY_MAP_INVALID");
    assert.match(error.message, message);
    assert.match(error.hint ?? "", hint);
  }
});

Deno.test("no text makes the parser throw anything but its own errors", () => {
  const word = fc.constantFrom(
    "0x0",
    "-",
    "+",
    "=",
    " : ",
    "System RAM",
    "7fff",
    "2GiB",
    "\n",
    "[",
    "{",
    "}",
    '"gpa"',
    ":",
    "#",
    " (prio 0, ram): ",
  );
  fc.assert(
    fc.property(fc.oneof(fc.string(), fc.array(word, { maxLength: 12 }).map((words) => words.join(""))), (text) => {
      try {
        parseMemoryMap(text);
      } catch (error) {
        assert.ok(error instanceof SvqError, `${error}`);
      }
    }),
    { numRuns: 300, seed: 1 },
  );
});

Deno.test("a printed range reads back as the same range", () => {
  fc.assert(
    fc.property(fc.bigInt({ min: 0n, max: IOVA_MAX }), fc.bigInt({ min: 0n, max: IOVA_MAX }), (a, b) => {
      const range = a < b ? { first: a, last: b } : { first: b, last: a };
      assert.deepEqual(parseRange(formatRange(range)), range);
    }),
    { numRuns: 200, seed: 1 },
  );
});

Deno.test("a reserved hole has an optional name, and a region's hexadecimal B is a digit", () => {
  assert.deepEqual(parseReserved("0xfee00000-0xfeefffff=msi"), { first: 0xfee00000n, last: 0xfeefffffn, tag: "msi" });
  assert.deepEqual(parseReserved("0x0+1M"), { first: 0n, last: 0xfffffn });
  assert.deepEqual(parseRegion("0x1B000+0x1000B"), { gpa: 0x1b000, size: 0x1000b });
});
