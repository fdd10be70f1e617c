/**
 * The program compiled by Deno's own `deno compile`, and run under Deno 2.6: with a base runtime that lies in the tools
 * folder beside the checkout, and the Deno of npm that goes with it.
 */
import assert from "node:assert/strict";
import { ensureBuilt, LabUnavailable, recipeHash, runTool } from "../../scripts/lab/cache.ts";
import { compile, testExecutable } from "../support/executable_suite.ts";
import { TempDir } from "../support/temp.ts";

// $SVQ_TOOLS is for checkouts that lie elsewhere.
const TOOLS = Deno.env.get("SVQ_TOOLS") ?? new URL("../../../shared/tools", import.meta.url).pathname;
const ARCHIVE = `${TOOLS}/denort-2.6.10-x86_64.xz`;
const DENORT_SHA256 = "1b136202dc147212ad0b129de0c10eb5f17060917c9754c7921cd68f764ad2e2";
const DENO = "deno@2.6.8";

async function sha256(path: string): Promise<string> {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", await Deno.readFile(path))).toHex();
}

/** A folder with `deno` and `denort`. */
async function tools(): Promise<string> {
  if (Deno.build.arch !== "x86_64") throw new LabUnavailable("an x86_64 machine");
  try {
    Deno.statSync(ARCHIVE);
  } catch {
    throw new LabUnavailable("denort 2.6.10 in ../shared/tools");
  }
  return await ensureBuilt("deno-2.6", await recipeHash(DENO, DENORT_SHA256), async (folder) => {
    await runTool("npm", ["install", "--no-save", "--no-audit", "--no-fund", "--prefix", folder, DENO]);
    await Deno.copyFile(`${folder}/node_modules/@deno/linux-x64-glibc/deno`, `${folder}/deno`);
    await Deno.remove(`${folder}/node_modules`, { recursive: true });
    await runTool("sh", ["-c", 'xz -dc "$1" >"$2"', "sh", ARCHIVE, `${folder}/denort`]);
    assert.equal(await sha256(`${folder}/denort`), DENORT_SHA256);
    for (const name of ["deno", "denort"]) await Deno.chmod(`${folder}/${name}`, 0o755);
  });
}

let folder: string | undefined;
let reason = "";
try {
  folder = await tools();
} catch (error) {
  if (!(error instanceof LabUnavailable)) throw error;
  reason = error.message;
}

if (folder === undefined) {
  Deno.test({ name: `deno-compile executable (left out, needs ${reason})`, ignore: true, fn: () => {} });
} else {
  const place = new TempDir();
  globalThis.addEventListener("unload", () => place[Symbol.dispose]());
  const build = async (name: string, kind: string) => {
    await compile([`--kind=${kind}`, `--deno=${folder}/deno`, `--output=${place.join(name)}`], { DENORT_BIN: `${folder}/denort` });
    return place.join(name);
  };
  let built: Promise<string> | undefined;
  const executable = () => built ??= build("svq", "deno-compile");

  testExecutable("deno-compile", executable);

  Deno.test("deno compile of the same source again gives the same bytes", async () => {
    const first = await sha256(await executable());
    const again = await build("again", "deno-compile");
    assert.equal(await sha256(again), first);
    await Deno.remove(again);
  });
}
