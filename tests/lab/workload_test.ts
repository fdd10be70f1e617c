import assert from "node:assert/strict";
import { guest } from "../../scripts/lab/host.ts";
import { Process } from "../support/process.ts";
import { labTest } from "../support/real_parts.ts";
import { makeImage } from "../support/vm.ts";

const BLOCK = 4096;

/** Runs the workload on an image of the host, spoils it while it pauses, and returns what it says in the end. */
async function spoiled(image: string, spoil: (file: Deno.FsFile) => Promise<void>): Promise<string[]> {
  await makeImage(image, 16);
  await using workload = new Process((await guest()).workload, { args: [`dev=${image}`, "blocks=512", "depth=4", "reads=0", "report=50"] });
  await workload.stdout.wait(/^SVQ READY .*errors=0/);
  await workload.write("pause\n");
  await workload.stdout.wait(/^SVQ command pause/);
  await workload.stdout.wait(/^SVQ ops=.* inflight=0 /, { since: workload.stdout.lines.length });
  {
    using file = await Deno.open(image, { read: true, write: true });
    await spoil(file);
  }
  // Reads only, so that nothing covers the damage before it is seen.
  await workload.write("mode readonly\nresume\nstop\n");
  await workload.stdout.wait(/^SVQ DONE /);
  return workload.stdout.lines.map(({ text }) => text).filter((text) => /^SVQ (?:ERROR|DONE)/.test(text));
}

async function readBlock(file: Deno.FsFile, block: number): Promise<Uint8Array<ArrayBuffer>> {
  const bytes = new Uint8Array(BLOCK);
  await file.seek(block * BLOCK, Deno.SeekMode.Start);
  await file.read(bytes);
  return bytes;
}

async function writeAt(file: Deno.FsFile, at: number, bytes: Uint8Array<ArrayBuffer>): Promise<void> {
  await file.seek(at, Deno.SeekMode.Start);
  await file.write(bytes);
}

await labTest("the guest's workload tells a lost write, a misplaced block and a changed byte apart", ["guest"], async ({ folder }) => {
  const none = await spoiled(folder.join("none"), () => Promise.resolve());
  assert.match(none.at(-1)!, /^SVQ DONE ok /);

  const misplaced = await spoiled(folder.join("misplaced"), async (file) => await writeAt(file, 9 * BLOCK, await readBlock(file, 8)));
  assert.match(misplaced[0]!, /kind=misplaced block=9 holds=8/);
  assert.match(misplaced.at(-1)!, /^SVQ DONE FAILED /);

  const changed = await spoiled(folder.join("changed"), async (file) => {
    const block = await readBlock(file, 5);
    await writeAt(file, 5 * BLOCK + 2000, Uint8Array.of(block[2000]! ^ 1));
  });
  assert.match(changed[0]!, /kind=corrupt block=5 generation=\d+ byte=2000/);
  assert.match(changed.at(-1)!, /^SVQ DONE FAILED /);

  const lost = await spoiled(folder.join("lost"), async (file) => {
    const block = await readBlock(file, 7);
    const view = new DataView(block.buffer);
    view.setBigUint64(16, view.getBigUint64(16, true) - 1n, true);
    await writeAt(file, 7 * BLOCK, block);
  });
  assert.match(lost[0]!, /kind=lost-write block=7/);
  assert.match(lost.at(-1)!, /^SVQ DONE FAILED /);
});
