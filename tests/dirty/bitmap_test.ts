import assert from "node:assert/strict";
import fc from "fast-check";
import { DirtyBitmap, LOG_PAGE_BYTES, logBytes } from "../../src/dirty/bitmap.ts";

Deno.test("A bitmap marks exactly the pages that a range touches, and its runs name them", () => {
  const range = fc.record({ gpa: fc.nat({ max: 300 * 4096 }), length: fc.nat({ max: 90 * 4096 }) });
  fc.assert(
    fc.property(fc.array(range, { maxLength: 12 }), (ranges) => {
      const map = DirtyBitmap.covering(256 * 4096);
      assert.equal(map.pages, 256);
      const model = new Set<number>();
      let rejected = 0;
      for (const { gpa, length } of ranges) {
        let inside = true;
        for (let page = Math.floor(gpa / 4096); length > 0 && page <= Math.floor((gpa + length - 1) / 4096); page++) {
          if (page < 256) model.add(page);
          else inside = false;
        }
        assert.equal(map.markRange(gpa, length), inside);
        if (!inside) rejected++;
      }
      assert.equal(map.rejected, rejected);
      assert.equal(map.count(), model.size);
      for (let page = -1; page < 258; page++) assert.equal(map.has(page), model.has(page));
      const seen: number[] = [];
      for (const { page, count } of map.runs()) {
        assert.ok(count > 0 && !map.has(page - 1) && !map.has(page + count), "a run is as long as it can be");
        for (let i = 0; i < count; i++) seen.push(page + i);
      }
      assert.deepEqual(seen, [...model].sort((a, b) => a - b));
      const taken = DirtyBitmap.covering(256 * 4096);
      assert.ok(map.harvest(taken));
      assert.equal(map.count(), 0);
      assert.equal(taken.count(), model.size);
      assert.ok(taken.orInto(map));
      assert.equal(map.count(), model.size);
      assert.equal(taken.count(), model.size);
    }),
    { numRuns: 300, seed: 1 },
  );
});

Deno.test("Page p is bit p % 8 of byte p / 8, as the protocol says", () => {
  const bytes = new Uint8Array(64);
  const map = new DirtyBitmap(bytes.buffer, 8, 32);
  map.markPage(0);
  map.markRange(11 * LOG_PAGE_BYTES + 4095, 2);
  map.markPage(255);
  assert.equal(bytes[8], 1);
  assert.equal(bytes[9], 0b0001_1000);
  assert.equal(bytes[39], 0x80);
  assert.equal(bytes.reduce((sum, byte) => sum + byte, 0), 1 + 0b0001_1000 + 0x80);
});

Deno.test("Pages far up are found without arithmetic overflow", () => {
  const map = DirtyBitmap.covering(2 ** 40);
  assert.equal(map.pages, 2 ** 28);
  assert.ok(map.markRange(2 ** 40 - 1, 1));
  assert.deepEqual([...map.runs()], [{ page: 2 ** 28 - 1, count: 1 }]);
  assert.equal(map.markRange(2 ** 51, 2 ** 32), false);
  assert.equal(map.markRange(-4096, 8192), false);
  assert.equal(map.markRange(NaN, 1), false);
  assert.equal(map.markPage(2 ** 28), false);
});

Deno.test("Marks beyond the end of the harvesting bitmap are reported, not dropped in silence", () => {
  const wide = DirtyBitmap.covering(256 * 4096);
  const narrow = DirtyBitmap.covering(128 * 4096);
  wide.markPage(200);
  wide.markPage(5);
  assert.equal(wide.orInto(narrow), false);
  assert.equal(narrow.rejected, 1);
  assert.deepEqual([...narrow.runs()], [{ page: 5, count: 1 }]);
});

Deno.test("A log that is misaligned or too small for its memory is refused", () => {
  for (const [offset, size] of [[2, 4], [-4, 4], [0, 1025], [1024, 4], [0.5, 4]] as const) {
    assert.throws(() => new DirtyBitmap(new ArrayBuffer(1024), offset, size), { code: "BAD_LOG" });
  }
  assert.equal(logBytes(0), 0);
  assert.equal(logBytes(1), 4);
  assert.equal(logBytes(2 ** 30), 2 ** 30 / 4096 / 8);
});

Deno.test("A mark set by another thread during a harvest is never lost", async () => {
  const pages = 64;
  const rounds = 20_000;
  const log = new SharedArrayBuffer(pages / 8);
  const control = new SharedArrayBuffer(8);
  const flags = new Int32Array(control);
  const module = new URL("../../src/dirty/bitmap.ts", import.meta.url).href;
  const source = `
    import { DirtyBitmap } from ${JSON.stringify(module)};
    self.onmessage = ({ data: { log, control, rounds, pages } }) => {
      const map = new DirtyBitmap(log);
      const flags = new Int32Array(control);
      // One page a time; the next one only when this one was seen, so that a lost mark would stop us for good.
      for (let round = 1; round <= rounds; round++) {
        map.markRange((round % pages) * 4096, 1);
        Atomics.store(flags, 0, round);
        while (Atomics.load(flags, 1) < round - 40);
      }
      self.postMessage("done");
    };`;
  const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/typescript" })), { type: "module" });
  try {
    const done = Promise.withResolvers<void>();
    worker.onmessage = () => done.resolve();
    worker.onerror = (event) => done.reject(new Error(event.message));
    worker.postMessage({ log, control, rounds, pages });
    const shared = new DirtyBitmap(log);
    let taken = DirtyBitmap.covering(pages * 4096);
    const deadline = Date.now() + 20_000;
    for (let seen = 0; seen < rounds;) {
      const upTo = Atomics.load(flags, 0);
      shared.harvest(taken);
      for (let round = seen + 1; round <= upTo; round++) assert.ok(taken.has(round % pages), `the mark of round ${round} is lost`);
      // Marks of later rounds may be in it already: they stay. The writer is at most 40 rounds ahead, so pages do not repeat.
      const later = DirtyBitmap.covering(pages * 4096);
      for (let round = upTo + 1; round <= seen + 41; round++) if (taken.has(round % pages)) later.markPage(round % pages);
      taken = later;
      seen = upTo;
      Atomics.store(flags, 1, seen);
      if (Date.now() > deadline) assert.fail("the writer does not get on");
      if (seen === 0) await new Promise((resolve) => setTimeout(resolve, 0));
    }
    await done.promise;
  } finally {
    worker.terminate();
  }
});
