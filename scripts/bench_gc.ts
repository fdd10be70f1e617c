/**
 * How long the garbage collector holds a relay's data path up: a device, a relay and a driver in a process each, under load.
 *
 *     deno task bench:gc [--seconds=60] [--mode=shadow] [--core=auto] [--depth=32] [--poll-us=auto] [--limit-ms=1]
 *
 * Prints every collection in the relay's Workers during the load, the longest pause of them, and how much they had allocated for
 * each chain. Pauses are wall-clock time: on a busy machine they hold waiting for a CPU, too. Exit code 1 when one of them was
 * longer than the limit.
 *
 * @module
 */
import { V8_FLAGS } from "../src/packaging.ts";

const ROOT = new URL("..", import.meta.url).pathname;
const MAIN = `${ROOT}src/cli/main.ts`;

/** One garbage collection, as `--trace-gc --trace-gc-nvp` prints it. */
export interface Collection {
  /** Number of the isolate in its process: 0 is the main thread. */
  isolate: number;
  /** When, ms since the isolate began. */
  atMs: number;
  /** Pause, ms. */
  pauseMs: number;
  /** Bytes allocated since the one before. */
  allocated: number;
}

/** Reads what V8 printed; what is no collection is left out. */
export function collections(trace: string): Collection[] {
  return trace.split("\n").flatMap((line) => {
    const match = /\[\d+:0x[0-9a-f]+:(\d+)\]\s+(\d+) ms: GC: \{"pause":([\d.]+),.*?"allocated":(\d+)/.exec(line);
    if (match === null) return [];
    const [isolate, atMs, pauseMs, allocated] = match.slice(1).map(Number) as [number, number, number, number];
    return [{ isolate, atMs, pauseMs, allocated }];
  });
}

function option(name: string, fallback: string): string {
  return Deno.args.find((arg) => arg.startsWith(`--${name}=`))?.slice(name.length + 3) ?? fallback;
}

async function waitFor(what: string, test: () => boolean | Promise<boolean>): Promise<void> {
  const deadline = Date.now() + 60_000;
  while (!await test()) {
    if (Date.now() > deadline) throw new Error(`${what}: not within a minute`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

function exists(path: string): boolean {
  try {
    Deno.lstatSync(path);
    return true;
  } catch {
    return false;
  }
}

async function main(): Promise<number> {
  const seconds = Number(option("seconds", "60"));
  const limitMs = Number(option("limit-ms", "1"));
  const folder = await Deno.makeTempDir({ prefix: "svq-gc-" });
  await Deno.chmod(folder, 0o700);
  const env = { SVQ_RUNTIME_DIR: folder, NO_COLOR: "1" };
  const start = (flags: string[], words: string[], stdout: "piped" | "null") =>
    new Deno.Command(Deno.execPath(), {
      args: ["run", "-A", "--no-check", "--quiet", ...flags, MAIN, ...words],
      ...{ env, stdin: "null", stdout, stderr: "null" },
    }).spawn();
  const children: Deno.ChildProcess[] = [];
  const end = async (child: Deno.ChildProcess) => {
    try {
      child.kill("SIGTERM");
    } catch { /* it has ended */ }
    await child.status;
  };
  try {
    const device = start(
      [],
      ["device", "run", "blk", "--file", `${folder}/disk`, "--size", "32MiB", "--socket-path", `${folder}/dev`],
      "null",
    );
    children.push(device);
    await waitFor("the device listens", () => exists(`${folder}/dev`));
    const words = ["relay", "run", "-q", "--name", "r", "--front", `unix:${folder}/front`, "--device", `unix:${folder}/dev`];
    words.push("--mode", option("mode", "shadow"), "--core", option("core", "auto"), "--poll-us", option("poll-us", "auto"));
    const relay = start([`--v8-flags=--trace-gc,--trace-gc-nvp,${V8_FLAGS}`], words, "piped");
    children.push(relay);
    const trace = new Response(relay.stdout).text();
    await waitFor("the relay listens", () => exists(`${folder}/front`));
    const drive = start(
      [],
      ["-j", "drive", `unix:${folder}/front`, "--duration", `${seconds}s`, "--depth", option("depth", "32")],
      "piped",
    );
    children.push(drive);
    const report = JSON.parse(await new Response(drive.stdout).text()) as { requests: { completed: number }; iops: number };
    await drive.status;
    await end(relay);
    return print(collections(await trace), report, seconds, limitMs);
  } finally {
    for (const child of children.reverse()) await end(child);
    await Deno.remove(folder, { recursive: true });
  }
}

// Isolate 1 is the Worker of the driver's relay; another one is made for the next front-end when the driver has left.
function print(
  all: readonly Collection[],
  { requests: { completed }, iops }: { requests: { completed: number }; iops: number },
  seconds: number,
  limitMs: number,
): number {
  const worker = all.filter(({ isolate }) => isolate === 1);
  // Its start: modules, the core, the first compilation.
  const load = worker.filter(({ atMs }) => atMs > 3000);
  for (const { atMs, pauseMs, allocated } of load) {
    console.log(`at ${(atMs / 1000).toFixed(1)} s: ${pauseMs.toFixed(3)} ms, after ${allocated} bytes`);
  }
  const longest = Math.max(0, ...load.map(({ pauseMs }) => pauseMs));
  const total = load.reduce((sum, { allocated }) => sum + allocated, 0);
  const perSecond = load.length < 2 ? undefined : total / ((load.at(-1)!.atMs - (worker[worker.indexOf(load[0]!) - 1]?.atMs ?? 0)) / 1000);
  console.log(
    `${completed} requests in ${seconds} s (${iops}/s), ${load.length} collections in the worker, longest pause ${longest.toFixed(3)} ms`,
  );
  if (perSecond !== undefined) console.log(`${(perSecond / iops).toFixed(1)} bytes allocated for each request`);
  return longest > limitMs ? 1 : 0;
}

if (import.meta.main) Deno.exit(await main());
