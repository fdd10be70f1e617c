/**
 * Bundles the program into few plain JavaScript files, with no import that leads outside: what both kinds of executable are
 * made of. Commands stay apart, so that each start loads what it needs.
 *
 * @module
 */

const ROOT = new URL("../../", import.meta.url).pathname;
const WORKER_URL = /new URL\(\s*"([^"]+\.ts)",\s*import\.meta\.url,?\s*\)/g;

/** The files of the program, by name; `main.js` is the entry of the main thread, the others are pieces and Workers' entries. */
export interface Bundle {
  /** Source text by file name, sorted by name. */
  files: ReadonlyMap<string, string>;
  /** Names of the Workers' entries. */
  workers: readonly string[];
}

function* sources(folder: string): Generator<string> {
  for (const entry of Deno.readDirSync(folder)) {
    const path = `${folder}/${entry.name}`;
    if (entry.isDirectory) yield* sources(path);
    else if (entry.name.endsWith(".ts")) yield path;
  }
}

/** `/tmp/x/src/relay/worker.ts` becomes `relay_worker`. */
function workerName(src: string, path: string): string {
  return path.slice(src.length + 1).replace(/\.ts$/, "").replaceAll("/", "_");
}

/**
 * A bundler leaves the URL of a Worker as it is, so each becomes an entry of its own, and the URL leads to it. Changes the files.
 *
 * @param src folder of the sources
 * @returns the Workers' source files by entry name
 */
export function redirectWorkers(src: string): Map<string, string> {
  const found = new Map<string, string>();
  for (const path of sources(src)) {
    const text = Deno.readTextFileSync(path);
    const code = text.replace(/\/\*[\s\S]*?\*\//g, "").replace(/^\s*\/\/.*$/gm, "");
    let redirected = 0;
    const changed = text.replace(WORKER_URL, (whole, target: string) => {
      const worker = new URL(target, `file://${path}`).pathname;
      // Anything else of this form is how the program finds its own main module when it runs from source.
      if (!worker.endsWith("worker.ts") || !exists(worker)) return whole;
      redirected++;
      found.set(workerName(src, worker), worker);
      return `new URL("./${workerName(src, worker)}.js", import.meta.url)`;
    }).replaceAll("import.meta.main", "false");
    if (redirected < [...code.matchAll(/\bnew Worker\(/g)].length) {
      throw new Error(`${path} starts a Worker in a way that cannot be followed: write new URL("./…worker.ts", import.meta.url)`);
    }
    if (changed !== text) Deno.writeTextFileSync(path, changed);
  }
  return found;
}

function exists(path: string): boolean {
  try {
    return Deno.statSync(path).isFile;
  } catch {
    // An example in a comment.
    return false;
  }
}

/** Copies a folder with all that is in it. */
export function copyFolder(from: string, to: string): void {
  Deno.mkdirSync(to, { recursive: true });
  for (const entry of Deno.readDirSync(from)) {
    if (entry.isDirectory) copyFolder(`${from}/${entry.name}`, `${to}/${entry.name}`);
    else Deno.copyFileSync(`${from}/${entry.name}`, `${to}/${entry.name}`);
  }
}

/** Bundles the checkout, in a temporary folder. @throws Error with what the bundler says */
export async function bundleProgram(): Promise<Bundle> {
  const folder = await Deno.makeTempDir({ prefix: "svq-bundle-" });
  try {
    for (const name of ["deno.json", "deno.lock"]) await Deno.copyFile(ROOT + name, `${folder}/${name}`);
    copyFolder(`${ROOT}src`, `${folder}/src`);
    const workers = redirectWorkers(`${folder}/src`);
    const entries = new Map([["main", `import { main } from "../src/cli/main.ts";\nmain();\n`], ...workerEntries(workers)]);
    const bundled = await bundleEntries(folder, entries, { split: true });
    const files = new Map([...bundled].map(([name, text]) => [name, withoutPaths(text)]));
    return { files: renamed(files), workers: [...workers.keys()].sort().map((name) => `${name}.js`) };
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

/** An entry for each of the Workers that {@linkcode redirectWorkers} found. */
export function workerEntries(workers: ReadonlyMap<string, string>): [string, string][] {
  return Array.from(workers, ([name, path]) => [name, `import ${JSON.stringify(path)};\n`]);
}

/**
 * Bundles a folder that has deno.json and the sources.
 *
 * @param entries modules by name; they are written to `folder`/entries
 * @param options `split`: what entries share, and what is imported while they run, is in files of its own
 * @returns the bundle's files by name, sorted; each entry's is its name and `.js`
 * @throws Error with what the bundler says
 */
export async function bundleEntries(
  folder: string,
  entries: ReadonlyMap<string, string>,
  options: { split: boolean },
): Promise<Map<string, string>> {
  await Deno.mkdir(`${folder}/entries`);
  for (const [name, text] of entries) await Deno.writeTextFile(`${folder}/entries/${name}.ts`, text);
  const { success, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [
      ...[
        "bundle",
        "--quiet",
        "--format=esm",
        "--platform=deno",
        "--outdir",
        `${folder}/out`,
        ...options.split ? ["--code-splitting"] : [],
      ],
      ...[...entries.keys()].sort().map((name) => `entries/${name}.ts`),
    ],
    cwd: folder,
    stdin: "null",
  }).output();
  if (!success) throw new Error(`deno bundle failed:\n${new TextDecoder().decode(stdout)}${new TextDecoder().decode(stderr)}`);
  const names = [...Deno.readDirSync(`${folder}/out`)].map((entry) => entry.name).sort();
  return new Map(names.map((name) => [name, Deno.readTextFileSync(`${folder}/out/${name}`)]));
}

/** The bundler notes where each module came from; where packages are cached depends on the machine. */
function withoutPaths(text: string): string {
  return text.replace(/^\/\/ .*\/npm\/[^/]+\/(.+)$/gm, "// npm:$1");
}

/** The bundler names pieces by a hash that knows the machine's paths: count them instead, in the order in which they are met. */
function renamed(files: Map<string, string>): Map<string, string> {
  const hashed = /^(.*)-[0-9A-Z]{8}\.js$/;
  const names = new Map<string, string>();
  const visit = (name: string) => {
    if (names.has(name)) return;
    const base = hashed.exec(name)?.[1];
    const taken = new Set(names.values());
    let unique = base === undefined ? name : `${base}.js`;
    for (let i = 2; taken.has(unique) || (unique !== name && files.has(unique)); i++) unique = `${base}${i}.js`;
    names.set(name, unique);
    for (const match of files.get(name)!.matchAll(/"\.\/([\w.-]+-[0-9A-Z]{8}\.js)"/g)) if (files.has(match[1]!)) visit(match[1]!);
  };
  for (const name of [...files.keys()].sort()) if (!hashed.test(name)) visit(name);
  const result = new Map<string, string>();
  for (const [name, text] of files) {
    const unique = names.get(name);
    if (unique === undefined) continue;
    result.set(
      unique,
      text.replace(/"\.\/([\w.-]+\.js)"/g, (whole, target: string) => names.has(target) ? `"./${names.get(target)}"` : whole),
    );
  }
  return new Map([...result].sort(([a], [b]) => a < b ? -1 : 1));
}
