/**
 * Fuzzes what hostile peers reach: each target in a process of its own, with guard pages, which is watched from here.
 *
 *     deno task fuzz [TARGET]... [--count N] [--seed S] [--resume] [--keep]
 *
 * Without TARGET all of them. `--count`: messages or ring mutations of each (default: those of a full run, 1 or 10 million).
 * `--seed`: which ones (default: today's date); the same seed and the same corpus give the same inputs. `--resume` goes on where an
 * interrupted run of the same code and seed stopped. `--keep` writes inputs that showed something new to tests/fuzz/corpus.
 *
 * A process that ends by a signal, by an error, or that hangs (one of its threads used 1 s of processor time in a
 * round, or it took 30 s) fails the target: seed,
 * round and input are printed, and the input is kept in a file. Exit code 1 then.
 *
 * @module
 */
import { labFolder, recipeHash } from "./lab/cache.ts";
import { TARGETS } from "../tests/fuzz/targets.ts";

const ROOT = new URL("..", import.meta.url).pathname;
const USAGE = `usage: deno task fuzz [${Object.keys(TARGETS).join("|")}]... [--count N] [--seed S] [--resume] [--keep]`;
const LOOK_MS = 200;
const HANG_CPU_MS = 1000;
const HANG_WALL_MS = 30_000;
/** Ticks of /proc/PID/stat in a second: on every Linux that Deno runs on. */
const TICKS = 100;

interface Progress {
  seed: number;
  round: number;
  done: number;
  step?: number;
  input?: unknown;
  /** What inputs ended with, each once. */
  signs?: string[];
  grown?: { fds: number; maps: number; bytes: number };
}

interface Options {
  names: string[];
  count: number | undefined;
  seed: number;
  resume: boolean;
  keep: boolean;
}

function parse(words: readonly string[]): Options | string {
  const options: Options = {
    names: [],
    count: undefined,
    seed: Number(new Date().toISOString().slice(0, 10).replaceAll("-", "")),
    resume: false,
    keep: false,
  };
  for (let i = 0; i < words.length; i++) {
    const word = words[i]!;
    if (word === "--resume") options.resume = true;
    else if (word === "--keep") options.keep = true;
    else if (word === "--count" || word === "--seed") {
      const value = Number(words[++i]);
      if (!Number.isSafeInteger(value) || value < 0) return `${word} takes a whole number`;
      options[word === "--count" ? "count" : "seed"] = value;
    } else if (word in TARGETS) options.names.push(word);
    else return `There is no target or option ${word}`;
  }
  if (options.names.length === 0) options.names = Object.keys(TARGETS);
  return options;
}

async function codeHash(): Promise<string> {
  const files = (folder: string): string[] =>
    [...Deno.readDirSync(ROOT + folder)].flatMap((entry) =>
      entry.isDirectory ? files(`${folder}/${entry.name}`) : [`${folder}/${entry.name}`]
    );
  const paths = [...files("src"), ...files("tests/fuzz"), "deno.lock"].sort();
  return await recipeHash(...paths, ...await Promise.all(paths.map((path) => Deno.readFile(ROOT + path))));
}

function readProgress(path: string): Progress | undefined {
  try {
    return JSON.parse(Deno.readTextFileSync(path)) as Progress;
  } catch {
    // Not there yet, or half of it.
    return undefined;
  }
}

/** Processor time that each thread of a process has used, ms. */
function cpuMs(pid: number): Map<string, number> {
  const used = new Map<string, number>();
  try {
    for (const { name } of Deno.readDirSync(`/proc/${pid}/task`)) {
      const fields = Deno.readTextFileSync(`/proc/${pid}/task/${name}/stat`).split(") ")[1]!.split(" ");
      used.set(name, (Number(fields[11]) + Number(fields[12])) * 1000 / TICKS);
    }
  } catch {
    // It, or one of its threads, has just ended.
  }
  return used;
}

/** The most that one thread has used since `before`, ms. */
function busiest(before: Map<string, number>, now: Map<string, number>): number {
  return Math.max(0, ...[...now].map(([thread, ms]) => ms - (before.get(thread) ?? 0)));
}

/** Watches a process until it ends. @returns why it was killed */
async function watch(child: Deno.ChildProcess, path: string): Promise<string | undefined> {
  let ended = false;
  child.status.then(() => ended = true);
  let [place, cpu, since] = ["", new Map<string, number>(), performance.now()];
  while (!ended) {
    await Promise.race([child.status, new Promise((resolve) => setTimeout(resolve, LOOK_MS))]);
    const now = readProgress(path);
    // Half of it, or what comes before and after all rounds.
    if (now?.input === undefined) continue;
    const here = `${now.round} ${now.step}`;
    if (here !== place) {
      [place, cpu, since] = [here, cpuMs(child.pid), performance.now()];
      continue;
    }
    const busy = busiest(cpu, cpuMs(child.pid));
    if (busy <= HANG_CPU_MS && performance.now() - since <= HANG_WALL_MS) continue;
    child.kill("SIGKILL");
    return `hung: ${Math.round(busy)} ms of processor time and ${Math.round(performance.now() - since)} ms in one round`;
  }
  return undefined;
}

interface Result {
  ok: boolean;
  line: string;
}

async function fuzz(name: string, options: Options, statePath: string): Promise<Result> {
  const target = TARGETS[name]!;
  const count = options.count ?? target.full;
  const old = options.resume ? readProgress(statePath) : undefined;
  const from = old?.seed === options.seed ? { round: Math.max(0, old.round), done: old.done } : { round: 0, done: 0 };
  if (from.done >= count) from.done = from.round = 0;
  const begun = performance.now();
  const words = [statePath, name, options.seed, from.round, from.done, count].map(String);
  const child = new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-check", "--v8-flags=--expose-gc", `${ROOT}tests/fuzz/main.ts`, ...words],
    // The check for a newer Deno opens sockets of its own.
    env: { NO_COLOR: "1", DENO_NO_UPDATE_CHECK: "1", ...(options.keep ? { SVQ_FUZZ_KEEP: "1" } : {}) },
    stdin: "null",
    stdout: "null",
    stderr: "piped",
  }).spawn();
  const text = new Response(child.stderr).text();
  const hung = await watch(child, statePath);
  const { code, signal } = await child.status;
  const last = readProgress(statePath);
  const seconds = Math.round((performance.now() - begun) / 1000);
  const date = new Date().toISOString().slice(0, 16).replace("T", " ");
  const facts = `${last?.done ?? 0} of ${count} ${target.unit}, seed ${options.seed}, ${last?.round ?? 0} rounds, ${seconds} s`;
  if (code === 0 && hung === undefined && last?.grown !== undefined) {
    const { fds, maps, bytes } = last.grown;
    const steady = `grown: ${fds} descriptors, ${maps} mappings, ${(bytes / 2 ** 20).toFixed(1)} MiB`;
    return { ok: true, line: `${date}  ${name}: ok, ${facts}, ${last.signs?.length} outcomes; ${steady}` };
  }
  const kept = `${statePath.replace(/\.json$/, "")}-failed-${options.seed}-${last?.round}.json`;
  Deno.writeTextFileSync(kept, JSON.stringify(last, undefined, 1));
  const why = hung ?? (signal === null ? `ended with ${code}` : `killed by ${signal}`);
  const said = (await text).split("\n").slice(0, 30).join("\n");
  return { ok: false, line: `${date}  ${name}: FAILED, ${why}; round ${last?.round}, ${facts}; its input: ${kept}\n${said}` };
}

async function main(words: readonly string[]): Promise<number> {
  const options = parse(words);
  if (typeof options === "string") {
    console.error(`${options}\n${USAGE}`);
    return 2;
  }
  const folder = `${labFolder()}/fuzz/${(await codeHash()).slice(0, 16)}`;
  await Deno.mkdir(folder, { recursive: true });
  let good = true;
  for (const name of options.names) {
    const { ok, line } = await fuzz(name, options, `${folder}/${name}.json`);
    console.log(line);
    good &&= ok;
  }
  return good ? 0 : 1;
}

if (import.meta.main) Deno.exit(await main(Deno.args));
