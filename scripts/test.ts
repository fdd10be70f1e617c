/**
 * Runs the tests and ends with the line `N passed, N failed, N skipped`.
 *
 *     deno run -A scripts/test.ts [--unit] [--jobs N] [FILE or FOLDER or part of a file name]...
 *
 * `--unit` leaves out what needs real parts (tests/lab), the executable (tests/ship), whole migrations, and what
 * runs relays and drivers for seconds, fuzzing, fault injection, the examples of the docs, and what starts every command.
 * `--jobs` says how many `deno test` processes run at a time: by default 2, and 1 where there is one processor. What one of them
 * prints is shown when it ends. Exit code: 0 when tests ran and none failed, else 1.
 *
 * @module
 */
import { type JunitCounts, parseJunit } from "./_junit.ts";
import { ensureHostLab } from "./lab/host.ts";
import { batches } from "./_batches.ts";

const ROOT = new URL("..", import.meta.url).pathname;
const NOT_UNIT = new RegExp(
  [
    "^tests/(faults|fuzz|lab|ship)/",
    "^tests/(docs_test|cli/contract_test|drivers/driver_test|vring/wakeup_test)",
    "^tests/migration/(cancel|dishonest|disk|faults|migration|pairs|source_guest|tls|two_hosts)_",
    "^tests/relay/(crash|device_loss|half_base|life|net_relay|overload|polling|relay|stop_timeout|stuck_end|upgrade|wasm_bounds)_test",
    "^tests/cli/commands/(demo|migrate)_",
  ].join("|"),
);
const TEST_FILE = /[._]test\.ts$/;
// Of what a failed test says, so much is shown again at the end.
const REASON_LINES = 25;
const REASON_COLUMNS = 400;
const USAGE = "usage: scripts/test.ts [--unit] [--jobs N] [FILE...]";

function testFiles(folder: string): string[] {
  const found: string[] = [];
  for (const entry of Deno.readDirSync(ROOT + folder)) {
    const path = `${folder}/${entry.name}`;
    if (entry.isDirectory) found.push(...testFiles(path));
    else if (TEST_FILE.test(entry.name)) found.push(path);
  }
  return found.sort();
}

/** Runs one `deno test` over `files`; what it prints is shown in one piece, so that two of them can run side by side. */
async function run(files: readonly string[]): Promise<JunitCounts> {
  const begun = performance.now();
  const report = await Deno.makeTempFile({ prefix: "svq-junit-", suffix: ".xml" });
  try {
    const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
      // Types were checked once; without this every Worker module is checked again when it starts.
      args: ["test", "-A", "--no-check", `--junit-path=${report}`, ...files],
      cwd: ROOT,
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).output();
    await Deno.stdout.write(stdout);
    await Deno.stdout.write(stderr);
    const what = files.length === 1 ? files[0] : `${files[0]} and ${files.length - 1} more`;
    console.log(`${what}: ${Math.round((performance.now() - begun) / 1000)} s`);
    const counts = parseJunit(await Deno.readTextFile(report));
    // A file that does not load, or leaks past its last test, fails the run without a test of its own.
    if (code !== 0 && counts.failed === 0) {
      counts.failed = 1;
      counts.failedNames.push(`deno test ${files.join(" ")} exited with ${code}`);
      counts.reasons.push(new TextDecoder().decode(stderr).split("\n").slice(-REASON_LINES).join("\n"));
    }
    return counts;
  } finally {
    await Deno.remove(report).catch(() => {});
  }
}

function reasonLines(reason: string): string[] {
  const lines = reason.split("\n").filter((line) => line.trim() !== "");
  const cut = lines.length > REASON_LINES ? [...lines.slice(0, REASON_LINES), `(${lines.length - REASON_LINES} more lines above)`] : lines;
  return cut.map((line) => `    ${line.slice(0, REASON_COLUMNS)}`);
}

function report(counts: JunitCounts): void {
  if (counts.failedNames.length > 0) {
    // Once more at the end, with the reason: of a long run often only the end is kept.
    const failed = counts.failedNames.map((name, index) => [`  ${name}`, ...reasonLines(counts.reasons[index] ?? "")].join("\n"));
    console.log(`\nFailed:\n${failed.join("\n")}`);
  }
  if (counts.skippedNames.length > 0) console.log(`\nSkipped:\n${counts.skippedNames.map((name) => `  ${name}`).join("\n")}`);
  console.log(`\n${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped`);
}

async function prepareLab(): Promise<void> {
  const { parts } = await ensureHostLab();
  for (const [name, state] of Object.entries(parts)) {
    if (!state.ok) console.log(`Tests that need ${name} are left out: ${state.reason}`);
  }
}

interface Options {
  unit: boolean;
  jobs: number;
  filters: string[];
}

function parse(args: readonly string[]): Options | string {
  const options: Options = { unit: false, jobs: Math.min(2, navigator.hardwareConcurrency), filters: [] };
  for (let index = 0; index < args.length; index++) {
    const arg = args[index]!;
    if (arg === "--unit") options.unit = true;
    else if (arg === "--jobs") {
      options.jobs = Number(args[++index]);
      if (!Number.isInteger(options.jobs) || options.jobs < 1) return `--jobs takes a number from 1 up`;
    } else if (arg.startsWith("-")) return `unknown option ${arg}`;
    else options.filters.push(arg.replace(/^\.\//, ""));
  }
  return options;
}

async function main(args: string[]): Promise<number> {
  const options = parse(args);
  if (typeof options === "string") {
    console.error(`${options}; ${USAGE}`);
    return 2;
  }
  const { unit, jobs, filters } = options;
  const isLab = (path: string) => path.startsWith("tests/lab/");
  const chosen = testFiles("tests").filter((path) => filters.length === 0 || filters.some((filter) => path.includes(filter)));
  const plain = chosen.filter((path) => !isLab(path) && !(unit && NOT_UNIT.test(path)));
  const lab = unit ? [] : chosen.filter(isLab);

  const { code } = await new Deno.Command(Deno.execPath(), { args: ["check", "--quiet"], cwd: ROOT, stdin: "null" }).spawn().status;
  if (code !== 0) return 1;
  const total: JunitCounts = { passed: 0, failed: 0, skipped: 0, passedNames: [], skippedNames: [], failedNames: [], reasons: [] };
  const work = [...batches(plain, NOT_UNIT), ...lab.map((path) => [path])];
  // The lab is set up here and once, so that no test's time includes it.
  let labReady: Promise<void> | undefined;
  const lane = async () => {
    for (let files = work.shift(); files !== undefined; files = work.shift()) {
      if (isLab(files[0]!)) await (labReady ??= prepareLab());
      const counts = await run(files);
      total.passed += counts.passed;
      total.failed += counts.failed;
      total.skipped += counts.skipped;
      total.skippedNames.push(...counts.skippedNames);
      total.failedNames.push(...counts.failedNames);
      total.reasons.push(...counts.reasons);
    }
  };
  await Promise.all(Array.from({ length: jobs }, lane));
  report(total);
  return total.failed > 0 || total.passed === 0 ? 1 : 0;
}

if (import.meta.main) Deno.exit(await main(Deno.args));
