import assert from "node:assert/strict";
import { ensureBuilt } from "../../scripts/lab/cache.ts";
import { TempDir } from "../support/temp.ts";

const OLD = new Date(Date.now() - 15 * 86_400_000);

Deno.test("what no recipe has asked for in two weeks is removed when a new one is built; what is in use, or is another thing, stays", async () => {
  using folder = new TempDir();
  const before = Deno.env.get("SVQ_LAB");
  Deno.env.set("SVQ_LAB", folder.path);
  try {
    const nothing = () => Promise.resolve();
    const stale = await ensureBuilt("guest", "000000000001", nothing);
    const used = await ensureBuilt("guest", "000000000002", nothing);
    const other = await ensureBuilt("guest-base", "000000000003", nothing);
    for (const path of [stale, used, other]) await Deno.utime(path, OLD, OLD);
    await ensureBuilt("guest", "000000000002", () => assert.fail("it is there"));
    const made = await ensureBuilt("guest", "000000000004", nothing);
    const left = Array.from(Deno.readDirSync(folder.path), (entry) => `${folder.path}/${entry.name}`).filter((path) => /-0/.test(path))
      .sort();
    assert.deepEqual(left, [used, made, other].sort());
  } finally {
    if (before === undefined) Deno.env.delete("SVQ_LAB");
    else Deno.env.set("SVQ_LAB", before);
  }
});
