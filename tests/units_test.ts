import assert from "node:assert/strict";
import fc from "fast-check";
import { SvqError } from "../src/errors.ts";
import { editDistance, suggest, suggestionHint } from "../src/suggest.ts";
import {
  formatCount,
  formatDuration,
  formatDurationExact,
  formatSize,
  formatSizeExact,
  hexU64,
  parseAddress,
  parseDuration,
  parseInteger,
  parseNumberList,
  parseRate,
  parseSize,
} from "../src/units.ts";

const whole = fc.nat({ max: Number.MAX_SAFE_INTEGER });
const usage = (error: unknown) => error instanceof SvqError && error.code === "USAGE" && error.exitCode === 2 && error.hint !== undefined;

Deno.test("exact sizes and durations are read back to the same number", () => {
  fc.assert(fc.property(whole, (n) => assert.equal(parseSize(formatSizeExact(n)), n)), { seed: 1 });
  fc.assert(fc.property(whole, (n) => assert.equal(parseDuration(formatDurationExact(n)), n)), { seed: 1 });
});

Deno.test("addresses are read back from their hex form, up to 2^64 - 1", () => {
  fc.assert(fc.property(fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }), (n) => assert.equal(parseAddress(hexU64(n)), n)), { seed: 1 });
  assert.equal(parseAddress("4GiB"), 1n << 32n);
  assert.equal(parseAddress("18446744073709551615"), 2n ** 64n - 1n);
  for (const text of ["18446744073709551616", "0x10000000000000000", "-1", "", "0x", "x"]) {
    assert.throws(() => parseAddress(text), usage, text);
  }
});

Deno.test("sizes take binary and decimal units and fractions that are whole bytes", () => {
  for (
    const [text, bytes] of [
      ["4096", 4096],
      ["64MiB", 2 ** 26],
      ["64M", 2 ** 26],
      ["1.5G", 1.5 * 2 ** 30],
      ["10kB", 10000],
      [
        "0x1000",
        4096,
      ],
      ["1 GiB", 2 ** 30],
      ["2k", 2048],
      ["3TB", 3e12],
    ] as const
  ) assert.equal(parseSize(text), bytes, text);
  for (const text of ["", "x", "-1", "1.5", "64Mb", "1e3", "9999999T", "MiB", "1.0000001K"]) {
    assert.throws(() => parseSize(text), usage, text);
  }
});

Deno.test("rates are bytes per second, from bytes or bits", () => {
  assert.equal(parseRate("32MiB/s"), 2 ** 25);
  assert.equal(parseRate("1Gbit"), 125_000_000);
  assert.equal(parseRate("8kbps"), 1000);
  assert.throws(() => parseRate("fast"), usage);
});

Deno.test("durations need a unit, and several units may be joined", () => {
  for (
    const [text, ns] of [
      ["8s", 8e9],
      ["500ms", 5e8],
      ["100us", 1e5],
      ["100µs", 1e5],
      ["7ns", 7],
      ["1m30s", 90e9],
      ["2h", 7200e9],
      ["0", 0],
      [
        "1.5ms",
        1.5e6,
      ],
    ] as const
  ) assert.equal(parseDuration(text), ns, text);
  for (const text of ["8", "", "s", "1s x", "-1s", "1 s 2", "3d"]) assert.throws(() => parseDuration(text), usage, text);
});

Deno.test("numbers are held within bounds and lists expand ranges", () => {
  assert.equal(parseInteger("0x10"), 16);
  for (const text of ["1.5", "", "abc", "0b1", "9007199254740993"]) assert.throws(() => parseInteger(text), usage, text);
  assert.throws(() => parseInteger("0", { min: 1, max: 4 }), /out of range/);
  assert.deepEqual(parseNumberList("0-3,8,2"), [0, 1, 2, 3, 8]);
  for (const text of ["3-1", "1-2-3", "a", "1,,2", "0-9999999"]) assert.throws(() => parseNumberList(text), usage, text);
});

Deno.test("figures for people are rounded to what can be read", () => {
  assert.deepEqual([0, 1023, 65536, 1.5 * 2 ** 30, 123456789].map(formatSize), ["0 B", "1023 B", "64 KiB", "1.5 GiB", "118 MiB"]);
  assert.deepEqual([5, 1500, 2.5e6, 8e9, 125e9, 7260e9].map(formatDuration), ["5 ns", "1.5 us", "2.5 ms", "8 s", "2 min 5 s", "2 h 1 min"]);
  assert.equal(formatCount(1234567), "1,234,567");
  assert.equal(hexU64(-1n), "0xffffffffffffffff");
});

Deno.test("edit distance is a metric that counts a swap of neighbours once", () => {
  const word = fc.string({ maxLength: 8 });
  fc.assert(
    fc.property(word, word, (a, b) => {
      assert.equal(editDistance(a, b), editDistance(b, a));
      assert.equal(editDistance(a, b) === 0, a === b);
      assert.ok(editDistance(a, b) <= Math.max([...a].length * 2, b.length * 2));
    }),
    { seed: 1 },
  );
  assert.equal(editDistance("relya", "relay"), 1);
});

Deno.test("suggestions name what is near, and everything where nothing is", () => {
  assert.deepEqual(suggest("migate", ["migrate", "relay"]), ["migrate"]);
  assert.deepEqual(suggest("comp", ["completions", "relay"]), ["completions"]);
  assert.equal(suggestionHint("zzz", ["a", "b"], "choices"), "choices: a, b");
  assert.equal(suggestionHint("siez", ["size", "file"], "options"), "did you mean size?");
});
