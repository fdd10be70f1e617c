/**
 * Builds the program as one executable file.
 *
 *     deno task compile [--kind=auto|deno-compile|packed] [--output=FILE] [--deno=FILE | --target=TARGET]
 *
 * `deno-compile` is Deno's own `deno compile`. It needs the base runtime `denort`, which no package registry carries: it is
 * looked for in $DENORT_BIN, beside deno and in Deno's cache, and Deno's release server is asked for a few seconds. Where it
 * cannot be had, `packed` builds a file for the same use from the deno executable itself (see ship/pack.ts). `svq version`
 * says which kind it is. `--deno` names another deno executable to compile with or to pack; packing takes one of another machine,
 * too. `--target`, e.g. aarch64-unknown-linux-gnu, fetches that machine's runtime from the package registry and packs it.
 *
 * @module
 */
import { V8_FLAGS } from "../src/packaging.ts";
import { type Bundle, bundleProgram } from "./ship/bundle.ts";
import { fetchRuntime } from "./ship/runtime.ts";
import { packProgram, PERMISSION } from "./ship/pack.ts";

const ROOT = new URL("..", import.meta.url).pathname;
const KINDS = ["auto", "deno-compile", "packed"] as const;
type Kind = typeof KINDS[number];
const RELEASE_SERVER = "https://dl.deno.land/release";
const SERVER_PATIENCE_MS = 4000;

interface Options {
  kind: Kind;
  output: string;
  deno: string;
  target: string | undefined;
}

function parseArguments(args: readonly string[]): Options {
  const options: Options = { kind: "auto", output: `${ROOT}dist/svq`, deno: Deno.execPath(), target: undefined };
  for (const arg of args) {
    const [name, value] = [arg.split("=", 1)[0], arg.slice(arg.indexOf("=") + 1)];
    if (name === "--kind" && KINDS.includes(value as Kind)) options.kind = value as Kind;
    else if (name === "--output" && arg.includes("=")) options.output = value;
    else if (name === "--deno" && arg.includes("=")) options.deno = value;
    else if (name === "--target" && arg.includes("=")) options.target = value;
    else {
      const usage = `deno task compile [--kind=${KINDS.join("|")}] [--output=FILE] [--deno=FILE | --target=TARGET]`;
      throw new Error(`Unknown option ${arg}; usage: ${usage}`);
    }
  }
  if (options.target !== undefined && options.kind === "deno-compile") throw new Error("--target packs: leave --kind=deno-compile out");
  return options;
}

function exists(path: string): boolean {
  try {
    return Deno.statSync(path).isFile;
  } catch {
    return false;
  }
}

/** Version of a deno executable; undefined where it does not run here. */
async function versionOf(deno: string): Promise<string | undefined> {
  if (deno === Deno.execPath()) return Deno.version.deno;
  try {
    const { stdout } = await new Deno.Command(deno, { args: ["--version"], stderr: "null", stdin: "null" }).output();
    return /^deno (\S+)/.exec(new TextDecoder().decode(stdout))?.[1];
  } catch {
    return undefined;
  }
}

/** Where denort is, as a sentence; undefined where it cannot be had. */
async function findDenort(deno: string): Promise<string | undefined> {
  const named = Deno.env.get("DENORT_BIN");
  if (named) return `$DENORT_BIN, ${named}`;
  const version = await versionOf(deno);
  if (version === undefined) return undefined;
  const archive = `denort-${Deno.build.target}.zip`;
  const beside = deno.replace(/[^/]*$/, "denort");
  if (exists(beside)) {
    Deno.env.set("DENORT_BIN", beside);
    return beside;
  }
  const home = Deno.env.get("HOME");
  const cache = Deno.env.get("DENO_DIR") ?? (Deno.env.get("XDG_CACHE_HOME") ?? (home && `${home}/.cache`)) + "/deno";
  const cached = `${cache}/dl/release/v${version}/${archive}`;
  if (exists(cached)) return cached;
  try {
    const url = `${RELEASE_SERVER}/v${version}/${archive}`;
    const response = await fetch(url, { method: "HEAD", signal: AbortSignal.timeout(SERVER_PATIENCE_MS) });
    if (response.ok) return url;
  } catch { /* no way to the server */ }
  return undefined;
}

/** Calls `deno compile` over the bundled files. */
async function denoCompile(bundle: Bundle, output: string, deno: string): Promise<void> {
  // The name of the folder ends up in the executable: it is always the same one.
  const folder = `${ROOT}dist/.bundle`;
  await Deno.remove(folder, { recursive: true }).catch(() => {});
  await Deno.mkdir(folder, { recursive: true });
  try {
    for (const [name, text] of bundle.files) {
      await Deno.writeTextFile(`${folder}/${name}`, text);
      // The time ends up in the executable, too.
      await Deno.utime(`${folder}/${name}`, 1, 1);
    }
    const { success, stderr } = await new Deno.Command(deno, {
      args: [
        ...["compile", "--quiet", "--no-check", "--no-config", "--no-lock", "--no-remote", "--no-npm", "--no-prompt"],
        // Its place is a file in /tmp with a name that anybody can guess.
        "--no-code-cache",
        PERMISSION,
        `--v8-flags=${V8_FLAGS}`,
        ...bundle.workers.flatMap((name) => ["--include", name]),
        ...["--output", output, "main.js"],
      ],
      cwd: folder,
      stdin: "null",
      stdout: "null",
      stderr: "piped",
    }).output();
    if (!success) throw new Error(`deno compile failed: ${new TextDecoder().decode(stderr).trim()}`);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

async function packed(bundle: Bundle, output: string, runtime: string): Promise<void> {
  const bytes = await Deno.readFile(runtime);
  const boot = await Deno.readTextFile(new URL("./ship/boot.js", import.meta.url));
  let result: Uint8Array<ArrayBuffer>;
  try {
    result = packProgram(bytes, bundle, boot);
  } catch (cause) {
    throw new Error(`${runtime} cannot be packed: ${cause instanceof Error ? cause.message : cause}`, { cause });
  }
  // A running executable cannot be written to, but it can be replaced.
  const unfinished = `${output}.${Deno.pid}.tmp`;
  try {
    await Deno.writeFile(unfinished, result, { mode: 0o755 });
    await Deno.rename(unfinished, output);
  } catch (error) {
    await Deno.remove(unfinished).catch(() => {});
    throw error;
  }
}

async function main(args: string[]): Promise<void> {
  const options = parseArguments(args);
  if (options.target === undefined || options.target === Deno.build.target) return await build(options);
  const folder = await Deno.makeTempDir({ prefix: "svq-runtime-" });
  try {
    const { path, version } = await fetchRuntime(options.target, folder);
    console.log(`runtime of ${options.target}: deno ${version}${version === Deno.version.deno ? "" : ` (not ${Deno.version.deno})`}`);
    await build({ ...options, kind: "packed", deno: path });
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

async function build(options: Options): Promise<void> {
  const output = options.output.startsWith("/") ? options.output : `${Deno.cwd()}/${options.output}`;
  const denort = options.kind === "packed" ? undefined : await findDenort(options.deno);
  if (options.kind === "deno-compile" && denort === undefined) {
    throw new Error(`denort for ${options.deno} was not found; name it: DENORT_BIN=FILE deno task compile`);
  }
  await Deno.mkdir(output.replace(/[^/]*$/, ""), { recursive: true });
  const bundle = await bundleProgram();
  if (denort !== undefined) await denoCompile(bundle, output, options.deno);
  else await packed(bundle, output, options.deno);
  const bytes = await Deno.readFile(output);
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)).toHex();
  console.log(
    `${output}: ${
      denort === undefined ? `packed${options.kind === "auto" ? " (denort was not found)" : ""}` : `deno-compile, with ${denort}`
    }`,
  );
  console.log(`${(bytes.length / 1e6).toFixed(1)} MB, sha256 ${hash}`);
}

if (import.meta.main) {
  try {
    await main(Deno.args);
  } catch (error) {
    console.error(`error: ${error instanceof Error ? error.message : error}`);
    Deno.exit(1);
  }
}
