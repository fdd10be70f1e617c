/**
 * Tests that every kind of executable must pass: of the file itself, copied alone into an empty folder and run with an
 * empty environment, as root and as an ordinary user.
 *
 * @module
 */
import assert from "node:assert/strict";
import { COMMANDS } from "../../src/cli/commands.ts";
import { VERSION } from "../../src/version.ts";
import { assertMatchesSchema } from "./schema.ts";

const NOBODY = 65534;
const ROOT = new URL("../../", import.meta.url).pathname;

/** Who runs the program. A test that is not run by root has only itself. */
export type Person = "root" | "nobody" | "self";

/** The people that this test run can be. */
export const PEOPLE: readonly Person[] = Deno.uid() === 0 ? ["root", "nobody"] : ["self"];

/** How a run differs from an empty environment in an empty folder. */
export interface RunOptions {
  /** The whole environment. */
  env?: Record<string, string>;
  /** Default: the folder of the file, where nothing else is. */
  cwd?: string;
  /** Words in front of the program, e.g. `unshare -n`. */
  before?: readonly string[];
}

/** What came of a run. */
export interface RunResult {
  code: number;
  stdout: string;
  stderr: string;
}

/** Calls the compile script. @throws Error with its output where it fails */
export async function compile(args: readonly string[], env: Record<string, string> = {}): Promise<void> {
  const { success, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-check", `${ROOT}scripts/compile.ts`, ...args],
    env,
    stdin: "null",
    stdout: "null",
    stderr: "piped",
  }).output();
  if (!success) throw new Error(`compile ${args.join(" ")} failed: ${new TextDecoder().decode(stderr)}`);
}

/** A copy of the executable, alone in a folder that everybody may enter. */
export class Installed implements Disposable {
  /** Holds the file and nothing else. */
  readonly folder: string;
  /** A folder of the person's own. */
  readonly home: string;
  /** The file. */
  readonly path: string;
  readonly #top: string;

  constructor(file: string, readonly person: Person) {
    this.#top = Deno.makeTempDirSync({ prefix: "svq-" });
    Deno.chmodSync(this.#top, 0o755);
    this.folder = `${this.#top}/bin`;
    this.home = `${this.#top}/home`;
    this.path = `${this.folder}/svq`;
    Deno.mkdirSync(this.folder);
    Deno.mkdirSync(this.home);
    Deno.copyFileSync(file, this.path);
    Deno.chmodSync(this.path, 0o755);
    if (person === "nobody") Deno.chownSync(this.home, NOBODY, NOBODY);
  }

  /** The words that run a program as this person with an empty environment. */
  words(options: RunOptions = {}): string[] {
    const who = this.person === "nobody"
      ? ["setpriv", `--reuid=${NOBODY}`, `--regid=${NOBODY}`, "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
      : [];
    const env = Object.entries(options.env ?? {}).map(([name, value]) => `${name}=${value}`);
    return [...options.before ?? [], ...who, "env", "-i", ...env, this.path];
  }

  /** Runs the program to its end. */
  async run(args: readonly string[], options: RunOptions = {}): Promise<RunResult> {
    const [command, ...rest] = [...this.words(options), ...args];
    const output = await new Deno.Command(command!, { args: rest, cwd: options.cwd ?? this.folder, stdin: "null" }).output();
    const decoder = new TextDecoder();
    return { code: output.code, stdout: decoder.decode(output.stdout), stderr: decoder.decode(output.stderr) };
  }

  /** Runs the program; it must end with 0 and an empty stderr, unless a pattern says what may stand there. */
  async good(args: readonly string[], options: RunOptions = {}, stderr: RegExp = /^$/): Promise<string> {
    const result = await this.run(args, options);
    assert.equal(result.code, 0, `svq ${args.join(" ")}: ${result.stderr}${result.stdout}`);
    assert.match(result.stderr, stderr);
    return result.stdout;
  }

  /** Everything that lies in a folder, with times and sizes. */
  listing(folder: string): string[] {
    const found: string[] = [];
    const visit = (path: string) => {
      const info = Deno.lstatSync(path);
      found.push(`${path} ${info.size} ${info.mtime?.getTime()}`);
      if (info.isDirectory) { for (const entry of Deno.readDirSync(path)) visit(`${path}/${entry.name}`); }
    };
    visit(folder);
    return found.sort();
  }

  /** Removes the copy. */
  [Symbol.dispose](): void {
    Deno.removeSync(this.#top, { recursive: true });
  }
}

/** Registers the tests. @param packaging what `svq version` must say @param file gives the executable, built at the first call */
export function testExecutable(packaging: string, file: () => Promise<string>): void {
  for (const person of PEOPLE) {
    const test = (name: string, body: (svq: Installed) => Promise<void>) => {
      Deno.test(`${packaging} executable as ${person}: ${name}`, async () => {
        using svq = new Installed(await file(), person);
        await body(svq);
      });
    };

    test("alone in an empty folder with an empty environment it says its version and writes nothing", async (svq) => {
      const before = svq.listing(svq.folder);
      const text = await svq.good(["version", "-j"]);
      assertMatchesSchema("version", text);
      const document = JSON.parse(text);
      assert.deepEqual([document.version, document.packaging], [VERSION, packaging]);
      assert.match(await svq.good(["--version"], { env: { HOME: svq.home } }), new RegExp(`^svq ${VERSION} \\(.*, ${packaging}\\)\n$`));
      assert.deepEqual(svq.listing(svq.folder), before);
      assert.deepEqual(svq.listing(svq.home).length, 1, "no cache in the home");
    });

    test("every command is in the file and explains itself", async (svq) => {
      for (const name of Object.keys(COMMANDS)) {
        const text = await svq.good([name, "--help"]);
        assert.match(text, new RegExp(`Usage:\n  svq ${name}`));
      }
    });

    test("usage errors, JSON errors and checks that fail have their exit codes", async (svq) => {
      assert.equal((await svq.run(["verison"])).code, 2);
      const missing = await svq.run(["-j", "relay", "status", "none"], { env: { SVQ_RUNTIME_DIR: svq.home } });
      assert.deepEqual([missing.code, missing.stdout], [3, ""]);
      assertMatchesSchema("error", missing.stderr);
      const doctor = await svq.run(["doctor", "-j"]);
      assertMatchesSchema("doctor", doctor.stdout);
      assert.equal(doctor.code, JSON.parse(doctor.stdout).ready ? 0 : 6);
      assert.match(doctor.stdout, /no bounds checks/);
      // What deno compile puts into its executable stands above the environment.
      if (JSON.parse((await svq.run(["version", "-j"])).stdout).packaging === "packed") {
        assert.match((await svq.run(["doctor", "-j"], { env: { DENO_V8_FLAGS: "--wasm-bounds-checks" } })).stdout, /checks each address/);
      }
      if (person === "nobody") {
        const closed = await Deno.makeTempDir({ prefix: "svq-closed-" });
        try {
          const denied = await svq.run(["device", "run", "blk", "-j", "--socket-path", `${closed}/socket`]);
          assert.equal(denied.code, 4, denied.stderr);
          assertMatchesSchema("error", denied.stderr);
        } finally {
          await Deno.remove(closed);
        }
      }
    });

    test("it plans addresses, and lists devices", async (svq) => {
      const plan = await svq.good(["iova", "plan", "-j", "--region", "0x0+1GiB", "--range", "0x0-0x7fffffffff", "--arena", "rings=8MiB"]);
      assertMatchesSchema("iova", plan);
      assertMatchesSchema("probe", await svq.good(["probe", "-j"]));
    });

    test("a relay in the background carries a checked workload to an embedded disk and back", async (svq) => {
      const env = { SVQ_RUNTIME_DIR: svq.home };
      const front = `unix:${svq.home}/front`;
      const started = await svq.good(["relay", "start", "-j", "--name", "r", "--front", front, "--device", "sim:blk", "--force-shadow"], {
        env,
      });
      const { pid } = JSON.parse(started);
      try {
        const drive = JSON.parse(await svq.good(["drive", front, "-j", "--requests", "500"], { env }));
        assertMatchesSchema("drive", drive);
        assert.deepEqual([drive.requests.completed, drive.requests.lost, drive.requests.corrupted], [500, 0, 0]);
        const words = Deno.readTextFileSync(`/proc/${pid}/cmdline`).split("\0");
        assert.deepEqual(words.slice(0, 3), [svq.path, "relay", "run"], "its process is called as the user would call it");
        assert.doesNotMatch(Deno.readTextFileSync(`/proc/${pid}/environ`), /DENO/);
      } finally {
        await svq.good(["relay", "stop", "r"], { env });
      }
    });

    test("several first starts at once", async (svq) => {
      const texts = await Promise.all([1, 2, 3, 4].map(() => svq.good(["version"], { env: { HOME: svq.home } })));
      assert.equal(new Set(texts).size, 1);
    });

    test("files that somebody planted where it is started, in its home or in its temporary folder change nothing", async (svq) => {
      const trap = `console.log("trapped"); Deno.exit(99);`;
      for (const folder of [svq.home, `${svq.home}/.cache/deno`, `${svq.home}/.cache/svq`]) {
        Deno.mkdirSync(folder, { recursive: true });
        Deno.writeTextFileSync(`${folder}/deno.json`, `{ "imports": { "x": `);
        Deno.writeTextFileSync(`${folder}/package.json`, `{ broken`);
        Deno.writeTextFileSync(`${folder}/deno.lock`, `broken`);
        for (const name of ["main.js", "version", "run", "boot.js", "svq"]) {
          Deno.writeTextFileSync(`${folder}/${name}`, trap, { mode: 0o755 });
        }
        for (const name of ["deno-compile-svq.cache", "v8_code_cache_v2", "dep_analysis_cache_v2"]) {
          Deno.writeTextFileSync(`${folder}/${name}`, "planted");
        }
      }
      const before = svq.listing(svq.home);
      const env = { HOME: svq.home, TMPDIR: svq.home, XDG_CACHE_HOME: `${svq.home}/.cache`, PATH: svq.home };
      assert.match(await svq.good(["version"], { cwd: svq.home, env }), new RegExp(packaging));
      const drive = JSON.parse(await svq.good(["drive", "sim:blk", "-j", "--requests", "50"], { cwd: svq.home, env }));
      assert.equal(drive.requests.completed, 50, "threads start, too");
      assert.deepEqual(svq.listing(svq.home), before);
    });

    test("a home that cannot be written to, or is not there, is no hindrance", async (svq) => {
      Deno.chmodSync(svq.home, 0o500);
      for (const HOME of [svq.home, "/proc/1/nowhere", ""]) await svq.good(["version"], { env: { HOME } });
    });

    if (person !== "root") return;

    test("with a full disk, a noexec cache and no network it starts and drives a device", async (svq) => {
      const script =
        'mount -t tmpfs -o size=4k,noexec,nosuid none "$1" && { head -c 8192 /dev/zero >"$1/full" 2>/dev/null; shift; exec "$@"; }';
      const before = ["unshare", "--net", "--mount", "sh", "-c", script, "sh", svq.home];
      const env = { HOME: svq.home, TMPDIR: svq.home, XDG_CACHE_HOME: svq.home };
      assert.match(await svq.good(["version"], { before, env }), new RegExp(packaging));
      const drive = JSON.parse(await svq.good(["drive", "sim:blk", "-j", "--requests", "50"], { before, env }));
      assert.equal(drive.requests.completed, 50);
    });

    test("the demo migrates a guest", async (svq) => {
      const demo = JSON.parse(await svq.good(["demo", "-j"], { env: { TMPDIR: svq.home, SVQ_RUNTIME_DIR: svq.home } }, /[^]*/));
      assertMatchesSchema("demo", demo);
      assert.equal(demo.memory_identical, true);
    });
  }
}
