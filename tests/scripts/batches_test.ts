import assert from "node:assert/strict";
import { batches } from "../../scripts/_batches.ts";

Deno.test("every test file is in exactly one batch, and long ones come first and by themselves", () => {
  const files = Array.from({ length: 40 }, (_, index) => `${index % 7 === 0 ? "long" : "quick"}_${index}_test.ts`);
  const made = batches(files, /^long/);
  assert.deepEqual(made.flat().sort(), [...files].sort());
  const long = files.filter((path) => path.startsWith("long"));
  assert.deepEqual(made.slice(0, long.length), long.map((path) => [path]));
  assert.ok(made.slice(long.length).every((batch) => batch.length <= 12 && batch.every((path) => path.startsWith("quick"))));
});

Deno.test("no files make no batches", () => assert.deepEqual(batches([], /x/), []));
