/**
 * Runs lab tests many times, to see whether any of them ever fails.
 *
 *     deno task soak [--times N] [--anew] [NAME]...
 *
 * NAME is a part of the name of a file in tests/lab, or of one of those outside of it that have full counts; without one all
 * of them are run. Default 20 times. After each run the counts go to a state file in the lab's cache folder, so that a soak that was interrupted goes on where it stopped, as long
 * as the code is the same; `--anew` forgets them. What each run printed is kept beside it. The dated report at the end is
 * what docs/guarantees.md quotes. Exit code 1 when anything failed.
 *
 * @module
 */
import { parseJunit } from "./_junit.ts";
import { labFolder, recipeHash } from "./lab/cache.ts";
import { ensureHostLab } from "./lab/host.ts";

const ROOT = new URL("..", import.meta.url).pathname;
const USAGE = "usage: deno task soak [--times N] [--anew] [NAME]...";

/** Tests outside of tests/lab whose full counts are the soak's. */
const ELSEWHERE = [
  "tests/fuzz/fuzz_test.ts",
  "tests/faults/fault_injection_test.ts",
  "tests/relay/js_litmus_test.ts",
  "tests/relay/litmus_test.ts",
  "tests/relay/ordering_test.ts",
  "tests/relay/steady_test.ts",
];

interface Counts {
  passed: number;
  failed: number;
  skipped: number;
}

interface FileState {
  runs: number;
  totalMs: number;
  tests: Record<string, Counts>;
}

/** What is kept between two calls. */
interface SoakState {
  /** Of everything that the tests depend on. */
  code: string;
  begun: string;
  files: Record<string, FileState>;
}

function filesBelow(folder: string): string[] {
  return [...Deno.readDirSync(ROOT + folder)].flatMap((entry) => {
    const path = `${folder}/${entry.name}`;
    return entry.isDirectory ? filesBelow(path) : [path];
  }).sort();
}

async function codeHash(): Promise<string> {
  const paths = [...filesBelow("src"), ...filesBelow("tests"), ...filesBelow("scripts"), "deno.json", "deno.lock"];
  return await recipeHash(...paths, ...await Promise.all(paths.map((path) => Deno.readFile(ROOT + path))));
}

function load(path: string, code: string): SoakState {
  try {
    const state = JSON.parse(Deno.readTextFileSync(path)) as SoakState;
    if (state.code === code) return state;
    console.log("The code has changed since the last soak: counting starts anew");
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound) && !(error instanceof SyntaxError)) throw error;
  }
  return { code, begun: new Date().toISOString(), files: {} };
}

// An interruption must not leave half a file.
function save(path: string, state: SoakState): void {
  Deno.writeTextFileSync(`${path}.new`, JSON.stringify(state, undefined, 1));
  Deno.renameSync(`${path}.new`, path);
}

let running: Deno.ChildProcess | undefined;

// A soak that is told to end takes its test along. The run that it cut short is not counted.
function endWithChild(): void {
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    Deno.addSignalListener(signal, () => {
      const child = running;
      if (child === undefined) Deno.exit(130);
      child.kill("SIGTERM");
      child.status.then(() => Deno.exit(130));
    });
  }
}

async function runOnce(file: string, state: FileState, logPath: string): Promise<boolean> {
  const report = await Deno.makeTempFile({ prefix: "svq-soak-", suffix: ".xml" });
  const begun = performance.now();
  try {
    const child = new Deno.Command(Deno.execPath(), {
      args: ["test", "-A", "--no-check", `--junit-path=${report}`, file],
      cwd: ROOT,
      env: { NO_COLOR: "1", SVQ_SOAK: "1" },
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    running = child;
    const { code, stdout, stderr } = await child.output();
    running = undefined;
    const decoder = new TextDecoder();
    Deno.writeTextFileSync(logPath, decoder.decode(stdout) + decoder.decode(stderr));
    const counts = parseJunit(await Deno.readTextFile(report));
    if (code !== 0 && counts.failed === 0) counts.failedNames.push(`${file} as a whole`);
    const add = (names: string[], what: keyof Counts) => {
      for (const name of names) (state.tests[name] ??= { passed: 0, failed: 0, skipped: 0 })[what]++;
    };
    add(counts.passedNames, "passed");
    add(counts.failedNames, "failed");
    add(counts.skippedNames, "skipped");
    state.runs++;
    state.totalMs += performance.now() - begun;
    return code === 0;
  } finally {
    await Deno.remove(report).catch(() => {});
  }
}

function printReport(state: SoakState, files: readonly string[]): boolean {
  const sum: Counts = { passed: 0, failed: 0, skipped: 0 };
  const date = (iso: string) => iso.slice(0, 16).replace("T", " ");
  console.log(`\nSoak of ${date(state.begun)} to ${date(new Date().toISOString())} UTC, code ${state.code}`);
  console.log(`Deno ${Deno.version.deno}, Linux ${Deno.osRelease()}, ${Deno.build.arch}, ${navigator.hardwareConcurrency} processors`);
  for (const file of files) {
    const { runs, totalMs, tests } = state.files[file] ?? { runs: 0, totalMs: 0, tests: {} };
    console.log(`\n${file}: ${runs} runs, ${(totalMs / 1000 / Math.max(1, runs)).toFixed(0)} s each`);
    for (const [name, counts] of Object.entries(tests)) {
      const skipped = counts.skipped > 0 ? `, ${counts.skipped} skipped` : "";
      console.log(`  ${counts.passed} passed, ${counts.failed} failed${skipped}  ${name}`);
      for (const key of ["passed", "failed", "skipped"] as const) sum[key] += counts[key];
    }
  }
  console.log(`\n${sum.passed} passed, ${sum.failed} failed, ${sum.skipped} skipped`);
  return sum.failed === 0 && sum.passed > 0;
}

interface SoakOptions {
  times: number;
  anew: boolean;
  names: string[];
}

function parseWords(words: readonly string[]): SoakOptions | string {
  const options: SoakOptions = { times: 20, anew: false, names: [] };
  for (let i = 0; i < words.length; i++) {
    const word = words[i]!;
    if (word === "--anew") options.anew = true;
    else if (word === "--times" || word.startsWith("--times=")) {
      options.times = Number(word === "--times" ? words[++i] : word.slice("--times=".length));
      if (!(Number.isInteger(options.times) && options.times > 0)) return "--times takes a whole number above 0";
    } else if (word.startsWith("-")) return `Unknown option ${word}`;
    else options.names.push(word);
  }
  return options;
}

async function main(words: readonly string[]): Promise<number> {
  const options = parseWords(words);
  if (typeof options === "string") {
    console.error(`${options}\n${USAGE}`);
    return 2;
  }
  const { times, anew, names } = options;
  const all = [...filesBelow("tests/lab"), ...ELSEWHERE].filter((path) => path.endsWith("_test.ts"));
  const files = all.filter((path) => names.length === 0 || names.some((name) => path.includes(name)));
  const unused = names.find((name) => !all.some((path) => path.includes(name)));
  if (unused !== undefined || files.length === 0) {
    console.error(`No file of the soak is called like ${unused}: ${all.map((path) => path.replace("tests/lab/", "")).join(", ")}`);
    return 2;
  }
  endWithChild();
  await ensureHostLab();
  const folder = `${labFolder()}/soak`;
  await Deno.mkdir(folder, { recursive: true });
  const statePath = `${folder}/state.json`;
  if (anew) await Deno.remove(statePath).catch(() => {});
  const state = load(statePath, await codeHash());
  // Round by round, so that an interrupted soak has something of each.
  for (let round = 1; round <= times; round++) {
    for (const file of files) {
      const fileState = state.files[file] ??= { runs: 0, totalMs: 0, tests: {} };
      if (fileState.runs >= round) continue;
      const log = `${folder}/${file.slice(file.lastIndexOf("/") + 1)}-${fileState.runs + 1}.log`;
      const good = await runOnce(file, fileState, log);
      console.log(`${new Date().toISOString()}  ${file}, run ${fileState.runs} of ${times}: ${good ? "ok" : `FAILED, see ${log}`}`);
      save(statePath, state);
    }
  }
  return printReport(state, files) ? 0 : 1;
}

if (import.meta.main) Deno.exit(await main(Deno.args));
