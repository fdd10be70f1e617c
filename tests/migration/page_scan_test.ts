import assert from "node:assert/strict";
import fc from "fast-check";
import { createMemfd, mapFd } from "../../src/ffi/mod.ts";
import { addWords, newDigest } from "../../src/migration/digest.ts";
import { PackRoom, ROOM_PAGES } from "../../src/migration/pack_room.ts";
import { PageScan, SCAN_BYTES } from "../../src/wasm/page_scan.ts";

const PAGES_AT = 65536;

function newScan(): { scan: PageScan; words: Int32Array } {
  const memory = new WebAssembly.Memory({ initial: 2, maximum: 65536, shared: true });
  return { scan: new PageScan(memory, 64), words: new Int32Array(memory.buffer, PAGES_AT, 2048) };
}

Deno.test("The WebAssembly digest is the one in JavaScript, wherever the bytes lie and however they are cut", () => {
  assert.ok(64 + SCAN_BYTES <= PAGES_AT);
  const { scan, words } = newScan();
  fc.assert(
    fc.property(fc.integer(), fc.nat(32), fc.integer({ min: 1, max: 32 }), fc.integer({ min: 1, max: 31 }), (seed, at, blocks, cut) => {
      let x = seed | 1;
      for (let i = 0; i < words.length; i++) words[i] = x = Math.imul(x, 0x9e3779b1) ^ (x >>> 13);
      const wanted = newDigest();
      addWords(wanted, words, at * 32, blocks * 32);
      const whole = newDigest();
      scan.add(whole, PAGES_AT + at * 128, blocks * 128);
      assert.deepEqual(whole, wanted);
      const first = Math.min(cut, blocks);
      const parts = newDigest();
      scan.add(parts, PAGES_AT + at * 128, first * 128);
      if (blocks > first) scan.add(parts, PAGES_AT + (at + first) * 128, (blocks - first) * 128);
      assert.deepEqual(parts, wanted);
    }),
    { seed: 6, numRuns: 200 },
  );
});

Deno.test("Packing finds the pages that are not zero, wherever their one byte is, copies them, and adds up the copy", () => {
  const words = 4 * ROOM_PAGES * 1024;
  using file = createMemfd("pages", words * 4);
  using mapping = mapFd(file.fd, { length: words * 4, what: "pages" });
  const memory = new Int32Array(mapping.buffer());
  using room = PackRoom.take();
  fc.assert(
    fc.property(
      fc.array(fc.tuple(fc.nat(1023), fc.integer({ min: 1 })), { maxLength: 12 }),
      fc.integer({ min: 1, max: 12 }),
      fc.nat(500),
      fc.nat(8),
      fc.boolean(),
      (marks, count, first, after, shared) => {
        memory.fill(0);
        marks.forEach(([word, value], i) => memory[(first + i) * 1024 + word] = i % 3 === 2 ? 0 : value);
        const wanted = newDigest();
        const places: number[] = [];
        for (let page = 0; page < count; page++) {
          const at = (first + page) * 1024;
          if (memory.subarray(at, at + 1024).every((word) => word === 0)) continue;
          places.push(page);
          addWords(wanted, memory, at, 1024);
        }
        const digest = newDigest();
        const piece = shared ? { address: mapping.address, size: mapping.length } : undefined;
        const found = room.pack(digest, mapping.address + first * 4096, count, after, piece, 2 << 20);
        assert.deepEqual([...room.found.subarray(0, found)], places);
        assert.deepEqual(digest, wanted);
        const copy = newDigest();
        if (found > 0) room.add(copy, room.address + after * 4096, found * 4096);
        assert.deepEqual(copy, wanted, "the room holds what was added up");
      },
    ),
    { seed: 6, numRuns: 200 },
  );
});

Deno.test("A digest of nothing, of odd lengths, and outside of the memory is refused", () => {
  const { scan } = newScan();
  for (const [from, bytes] of [[0, 0], [0, 127], [-128, 128], [131072, 128], [0, 131072 + 128]] as const) {
    assert.throws(() => scan.add(newDigest(), from, bytes), RangeError, `${from}+${bytes}`);
  }
  assert.throws(() => scan.pack(newDigest(), 0, 1, 131072), RangeError);
});
