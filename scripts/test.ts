/**
 * Runs the tests and ends with the line `N passed, N failed, N skipped`.
 *
 *     deno run -A scripts/test.ts [--unit] [FILE or FOLDER or part of a file name]...
 *
 * `--unit` leaves out what needs real parts (tests/lab), the executable (tests/ship), and whole migrations and device losses. Exit code: 0 when tests ran and none failed, else 1.
 *
 * @module
 */
import { type JunitCounts, parseJunit } from "./_junit.ts";
import { ensureHostLab } from "./lab/host.ts";

const ROOT = new URL("..", import.meta.url).pathname;
const NOT_UNIT =
  /^tests\/(lab|ship)\/|^tests\/migration\/(dishonest|faults|migration|source_guest)_|^tests\/relay\/(device_loss|life)_|^tests\/cli\/commands\/(demo|migrate)_/;
const TEST_FILE = /[._]test\.ts$/;

function testFiles(folder: string): string[] {
  const found: string[] = [];
  for (const entry of Deno.readDirSync(ROOT + folder)) {
    const path = `${folder}/${entry.name}`;
    if (entry.isDirectory) found.push(...testFiles(path));
    else if (TEST_FILE.test(entry.name)) found.push(path);
  }
  return found.sort();
}

/** Runs `deno test` over `files`, one after the other; the output goes straight to the terminal. */
async function run(files: string[]): Promise<JunitCounts> {
  const report = await Deno.makeTempFile({ prefix: "svq-junit-", suffix: ".xml" });
  try {
    const { code } = await new Deno.Command(Deno.execPath(), {
      // Types were checked once; without this every Worker module is checked again when it starts.
      args: ["test", "-A", "--no-check", `--junit-path=${report}`, ...files],
      cwd: ROOT,
      stdin: "null",
    }).spawn().status;
    const counts = parseJunit(await Deno.readTextFile(report));
    // A file that does not load, or leaks past its last test, fails the run without a test of its own.
    if (code !== 0 && counts.failed === 0) {
      counts.failed = 1;
      counts.failedNames.push(`deno test exited with ${code}`);
    }
    return counts;
  } finally {
    await Deno.remove(report).catch(() => {});
  }
}

function report(counts: JunitCounts): void {
  if (counts.failedNames.length > 0) console.log(`\nFailed:\n${counts.failedNames.map((name) => `  ${name}`).join("\n")}`);
  if (counts.skippedNames.length > 0) console.log(`\nSkipped:\n${counts.skippedNames.map((name) => `  ${name}`).join("\n")}`);
  console.log(`\n${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped`);
}

async function prepareLab(): Promise<void> {
  const { parts } = await ensureHostLab();
  for (const [name, state] of Object.entries(parts)) {
    if (!state.ok) console.log(`Tests that need ${name} are left out: ${state.reason}`);
  }
}

async function main(args: string[]): Promise<number> {
  const unitOnly = args.includes("--unit");
  const unknown = args.find((arg) => arg.startsWith("-") && arg !== "--unit");
  if (unknown !== undefined) {
    console.error(`Unknown option ${unknown}; usage: scripts/test.ts [--unit] [FILE...]`);
    return 2;
  }
  const filters = args.filter((arg) => !arg.startsWith("-")).map((arg) => arg.replace(/^\.\//, ""));
  const isLab = (path: string) => path.startsWith("tests/lab/");
  const chosen = testFiles("tests").filter((path) => filters.length === 0 || filters.some((filter) => path.includes(filter)));
  const groups = unitOnly ? [chosen.filter((path) => !NOT_UNIT.test(path))] : [chosen.filter((path) => !isLab(path)), chosen.filter(isLab)];

  const { code } = await new Deno.Command(Deno.execPath(), { args: ["check", "--quiet"], cwd: ROOT, stdin: "null" }).spawn().status;
  if (code !== 0) return 1;
  const total: JunitCounts = { passed: 0, failed: 0, skipped: 0, passedNames: [], skippedNames: [], failedNames: [] };
  for (const files of groups) {
    if (files.length === 0) continue;
    // The lab is set up here, before the first test, so that no test's time includes it.
    if (files.some(isLab)) await prepareLab();
    const counts = await run(files);
    total.passed += counts.passed;
    total.failed += counts.failed;
    total.skipped += counts.skipped;
    total.skippedNames.push(...counts.skippedNames);
    total.failedNames.push(...counts.failedNames);
  }
  report(total);
  return total.failed > 0 || total.passed === 0 ? 1 : 0;
}

if (import.meta.main) Deno.exit(await main(Deno.args));
