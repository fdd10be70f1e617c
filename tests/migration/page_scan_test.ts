import assert from "node:assert/strict";
import fc from "fast-check";
import { addWords, newDigest } from "../../src/migration/digest.ts";
import { PageScan } from "../../src/wasm/page_scan.ts";

Deno.test("The WebAssembly digest is the one in JavaScript, wherever the bytes lie and however they are cut", () => {
  const scan = new PageScan(8192);
  const words = new Int32Array(scan.buffer, scan.pagesOffset, 2048);
  fc.assert(
    fc.property(fc.integer(), fc.nat(96), fc.integer({ min: 1, max: 32 }), fc.integer({ min: 1, max: 31 }), (seed, at, blocks, cut) => {
      let x = seed | 1;
      for (let i = 0; i < words.length; i++) words[i] = x = Math.imul(x, 0x9e3779b1) ^ (x >>> 13);
      const wanted = newDigest();
      addWords(wanted, words, at * 16, blocks * 16);
      const whole = newDigest();
      scan.add(whole, at * 64, blocks * 64);
      assert.deepEqual(whole, wanted);
      const first = Math.min(cut, blocks);
      const parts = newDigest();
      scan.add(parts, at * 64, first * 64);
      if (blocks > first) scan.add(parts, (at + first) * 64, (blocks - first) * 64);
      assert.deepEqual(parts, wanted);
    }),
    { seed: 6, numRuns: 200 },
  );
});

Deno.test("A digest of nothing, of odd lengths, and outside of the memory is refused", () => {
  const scan = new PageScan(8192);
  for (const [offset, bytes] of [[0, 0], [0, 63], [-64, 64], [65536, 64], [0, 65536 + 64]] as const) {
    assert.throws(() => scan.add(newDigest(), offset, bytes), RangeError, `${offset}+${bytes}`);
  }
});
