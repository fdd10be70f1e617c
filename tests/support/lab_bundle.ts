/**
 * A lab test and all that it imports as a few files of JavaScript. Under emulation Deno takes ten seconds and more to read the
 * modules of the program one by one, and each Worker does so again.
 *
 * @module
 */
import { bundleEntries, copyFolder, redirectWorkers, workerEntries } from "../../scripts/ship/bundle.ts";

const ROOT = new URL("../../", import.meta.url).pathname;
const FOLDERS = ["src", "scripts/lab", "scripts/ship", "tests/lab", "tests/support"];

/** The bundle's entry that is the test. */
export const TEST_ENTRY = "lab_test.js";
/** The bundle's entry that is the program svq. */
export const SVQ_ENTRY = "svq.js";
/** The bundle's entry that is tests/support/bad_upgrade.ts. */
export const BAD_UPGRADE_ENTRY = "bad_upgrade.js";

/** Modules go on to know where they were: only what is imported is elsewhere. */
function keepUrls(folder: string, name: string): void {
  for (const entry of Deno.readDirSync(`${folder}/${name}`)) {
    const path = `${name}/${entry.name}`;
    if (entry.isDirectory) keepUrls(folder, path);
    if (!entry.isFile || !path.endsWith(".ts")) continue;
    const text = Deno.readTextFileSync(`${folder}/${path}`);
    const kept = text.replaceAll("import.meta.main", "false").replace(
      /(new URL\(\s*"[^"]+\.js",\s*)?import\.meta\.url/g,
      (whole, worker: string | undefined) => worker === undefined ? JSON.stringify(`file://${ROOT}${path}`) : whole,
    );
    if (kept !== text) Deno.writeTextFileSync(`${folder}/${path}`, kept);
  }
}

/**
 * Bundles tests.
 *
 * @param urls `import.meta.url` of each file
 * @returns the files by name, with {@linkcode TEST_ENTRY} and {@linkcode SVQ_ENTRY} among them
 */
export async function bundleLabTest(urls: readonly string[]): Promise<Record<string, string>> {
  const folder = await Deno.makeTempDir({ prefix: "svq-lab-bundle-" });
  try {
    for (const name of ["deno.json", "deno.lock"]) await Deno.copyFile(ROOT + name, `${folder}/${name}`);
    for (const name of FOLDERS) copyFolder(ROOT + name, `${folder}/${name}`);
    const workers = redirectWorkers(`${folder}/src`);
    for (const name of FOLDERS) keepUrls(folder, name);
    const entries = new Map([
      [TEST_ENTRY.slice(0, -3), urls.map((url) => `import "../${new URL(url).pathname.slice(ROOT.length)}";\n`).join("")],
      [SVQ_ENTRY.slice(0, -3), `import { main } from "../src/cli/main.ts";\nmain();\n`],
      [BAD_UPGRADE_ENTRY.slice(0, -3), `import "../tests/support/bad_upgrade.ts";\n`],
      ...workerEntries(workers),
    ]);
    return Object.fromEntries(await bundleEntries(folder, entries, { split: false }));
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}
