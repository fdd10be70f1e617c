import assert from "node:assert/strict";
import { svqCommand } from "../../support/cli.ts";
import { svq } from "../../support/cli.ts";
import { RelayProcess } from "../../support/relay_process.ts";
import { assertMatchesSchema } from "../../support/schema.ts";
import { TempDir } from "../../support/temp.ts";

const PAGE = 4096;

Deno.test("svq iova shows, allocates and frees in a running relay, named or found by its device", async () => {
  using folder = new TempDir();
  const device = "sim:blk,size=1MiB";
  await using relay = await RelayProcess.start({ folder: folder.path, device, args: ["--mode", "shadow"] });
  const env = { SVQ_RUNTIME_DIR: folder.path };
  const run = (...words: string[]) => svq(["-j", "iova", ...words], env);
  const json = async (...words: string[]) => {
    const { code, stdout, stderr } = await run(...words);
    assert.equal(code, 0, stderr);
    assertMatchesSchema("svq.iova/1", stdout);
    return JSON.parse(stdout);
  };
  const fails = async (expected: number, code: string, ...words: string[]) => {
    const result = await run(...words);
    assert.equal(result.code, expected, result.stdout + result.stderr);
    const { error } = JSON.parse(result.stderr.trimEnd().split("\n").at(-1)!);
    assert.equal(error.code, code);
    assert.ok(error.hint.length > 0);
  };
  assert.deepEqual((await json("show", "relay")).allocations, []);
  const made = await json("alloc", "relay", "2MiB", "--tag", "mine", "--map");
  assert.equal(made.relay, "relay");
  assert.deepEqual([made.allocated.tag, made.allocated.size_bytes], ["mine", 2 << 20]);
  const fixed = await json("alloc", device, "4KiB", "--iova", "0x5000");
  assert.equal(fixed.allocated.iova, "0x5000");
  // A guest comes: its memory keeps clear of 0x5000, so it is moved, and works.
  const drive = await svqCommand(["drive", `unix:${relay.front}`, "--requests", "50", "--ram", "8MiB", "--region", "512KiB"], env).output();
  assert.equal(drive.code, 0, new TextDecoder().decode(drive.stderr));
  const shown = await json("show", device);
  assert.deepEqual(shown.allocations.map(({ tag }: { tag: string }) => tag).filter((tag: string) => !tag.startsWith("arena")).sort(), [
    "mine",
    "operator",
  ]);
  const ranges = await json("ranges", "relay");
  assert.ok(
    ranges.free.every(({ first, last }: { first: string; last: string }) => !(BigInt(first) <= 0x5000n && BigInt(last) >= 0x5000n)),
  );
  await fails(1, "IOVA_OVERLAP", "alloc", "relay", "8KiB", "--iova", "0x4000");
  await fails(1, "IOVA_UNALIGNED", "alloc", "relay", "100");
  await fails(1, "IOVA_PARTIAL_FREE", "free", "relay", "0x5000", "--size", "8KiB");
  await fails(1, "IOVA_NOT_ALLOCATED", "free", "relay", "0x9000");
  await fails(2, "IOVA_NO_SUCH_ASID", "alloc", "relay", "4KiB", "--asid", "3");
  const freed = await json("free", "relay", "0x5000", "--size", String(PAGE));
  assert.equal(freed.freed.iova, "0x5000");
  await json("free", device, made.allocated.iova);
  await fails(1, "IOVA_NOT_ALLOCATED", "free", "relay", "0x5000");
  await fails(3, "NO_SUCH_RELAY", "show", "nobody");
  const text = await svq(["iova", "ranges", "relay"], env);
  assert.match(text.stdout, /usable +0x0-0x3fffffffffff +64 TiB/);
});

Deno.test("svq iova on a device that no relay has shows its range, tries an allocation on it, and has nothing to free", async () => {
  using folder = new TempDir();
  const env = { SVQ_RUNTIME_DIR: folder.path };
  const ranges = await svq(["-j", "iova", "ranges", "sim:blk"], env);
  assert.equal(ranges.code, 0, ranges.stderr);
  assertMatchesSchema("svq.iova/1", ranges.stdout);
  const alloc = await svq(["iova", "alloc", "sim:blk", "1MiB"], env);
  assert.equal(alloc.code, 0, alloc.stderr);
  assert.match(alloc.stdout, /^0x[0-9a-f]+ 1MiB: the device takes it; given back$/m);
  const free = await svq(["iova", "free", "sim:blk", "0x1000"], env);
  assert.equal(free.code, 3);
  assert.match(free.stderr, /No relay has sim:blk/);
  const user = await svq(["iova", "alloc", "unix:/nonexistent/socket", "4KiB"], env);
  assert.equal(user.code, 2);
  assert.match(user.stderr, /without a relay/);
});
