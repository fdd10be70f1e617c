import assert from "node:assert/strict";
import { compile, Installed, PEOPLE, testExecutable } from "../support/executable_suite.ts";
import { TempDir } from "../support/temp.ts";

const FOLDER = new TempDir();
globalThis.addEventListener("unload", () => FOLDER[Symbol.dispose]());

let built: Promise<string> | undefined;
function packed(): Promise<string> {
  built ??= compile(["--kind=packed", `--output=${FOLDER.join("svq")}`]).then(() => FOLDER.join("svq"));
  return built;
}

async function hash(path: string): Promise<string> {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", await Deno.readFile(path))).toHex();
}

testExecutable("packed", packed);

Deno.test("packing the same source again, from another folder, gives the same bytes", async () => {
  const first = await hash(await packed());
  // A second name of the same checkout: its path is another one.
  const link = FOLDER.join("elsewhere");
  await Deno.symlink(new URL("../../", import.meta.url).pathname.replace(/\/$/, ""), link);
  const { success, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-check", `${link}/scripts/compile.ts`, "--kind=packed", `--output=${FOLDER.join("again")}`],
  }).output();
  assert.ok(success, new TextDecoder().decode(stderr));
  assert.equal(await hash(FOLDER.join("again")), first);
  await Deno.remove(FOLDER.join("again"));
});

Deno.test("a packed file that was not copied to its end says so", async () => {
  using svq = new Installed(await packed(), PEOPLE[0]!);
  await Deno.truncate(svq.path, Deno.statSync(svq.path).size - 1000);
  const { code, stderr } = await svq.run(["version"]);
  assert.equal(code, 1);
  assert.match(stderr, /this file of svq is incomplete/);
});

Deno.test("a packed file of an executable of another kind is refused with the reason", async () => {
  const other = FOLDER.join("other");
  await Deno.writeTextFile(other, "#!/bin/sh\n");
  await assert.rejects(
    compile(["--kind=packed", `--deno=${other}`, `--output=${FOLDER.join("never")}`]),
    /cannot be packed: not an ELF file/,
  );
  assert.throws(() => Deno.statSync(FOLDER.join("never")), Deno.errors.NotFound);
});
