import assert from "node:assert/strict";
import { connectUnix } from "../../src/ffi/mod.ts";
import type { FaultReport } from "../support/fault_main.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { TempDir } from "../support/temp.ts";
import { Random } from "../fuzz/random.ts";

// Each call of libc fails once, with each error that it may fail with, in each command: the command ends in good time with a
// documented exit code and an error that has a code of its own, and leaves nothing. All of it in the soak, a few here.

const SOAK = Deno.env.get("SVQ_SOAK") === "1";
/** Cases of each command in a normal run. */
const SAMPLE = Number(Deno.env.get("SVQ_FAULTS") ?? 2);
/** Commands of a normal run. */
const USUAL = ["probe", "drive", "relay run", "vring dump"];
const SEED = Number(Deno.env.get("SVQ_FAULT_SEED") ?? 9);
/** Calls of one name that are made to fail, each by itself. */
const DEEPEST = SOAK ? 12 : 4;
const MAIN = new URL("../support/fault_main.ts", import.meta.url).pathname;
const LIMIT_MS = 30_000;
const EXIT_CODES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 124, 143];
const E = { EINTR: 4, EIO: 5, EAGAIN: 11, ENOMEM: 12, EMFILE: 24, EPIPE: 32 };
/** What may always be left: the reactor's, the bus guard's, and the runtime's own. */
const SPARE = ["anon_inode:[eventpoll]", "anon_inode:[eventpoll]", "anon_inode:[eventfd]", "anon_inode:[eventfd]", "anon_inode:[eventfd]"];

const MAKES_FDS = /^(open|memfd_create|eventfd|epoll_create1|socket|socketpair|accept4)$/;
const MOVES = /^(read|write|readv|writev|pread|pwrite|preadv|pwritev|recvmsg|sendmsg|write_on_pool|eventfd_read|eventfd_write|poll)$/;

function errorsOf(name: string): number[] {
  if (MAKES_FDS.test(name)) return [E.EMFILE, E.EINTR, E.ENOMEM];
  if (MOVES.test(name)) return [E.EIO, E.EINTR, E.EAGAIN, E.EPIPE];
  if (/^m(map|remap|protect)$/.test(name)) return [E.ENOMEM, E.EAGAIN];
  if (name.startsWith("epoll_wait")) return [E.EINTR, E.EIO];
  return [E.EIO, E.EINTR, E.ENOMEM];
}

interface Case {
  args: string[];
  /** Runs until it is told to stop: the socket that shows it is ready. */
  ready?: (folder: TempDir) => string;
  /** A relay called `relay` runs meanwhile. */
  relay?: boolean;
}

const front = (folder: TempDir) => folder.join("front.sock");
const DISK = "sim:blk,size=16M";
const COMMANDS: Record<string, Case> = {
  "probe": { args: ["probe", DISK] },
  "iova plan": { args: ["iova", "plan", "--region", "0x0+2GiB", "--device", DISK] },
  "iova alloc": { args: ["iova", "alloc", "relay", "2MiB"], relay: true },
  "drive": { args: ["drive", DISK, "--requests", "20"] },
  "drive of a socket": { args: ["drive", "unix:FRONT", "--requests", "20"], relay: true },
  "device run": { args: ["device", "run", "loopback", "--socket-path", "FOLDER/front.sock"], ready: front },
  "relay run": { args: ["relay", "run", "--name", "one", "--front", "unix:FOLDER/front.sock", "--device", DISK], ready: front },
  "relay start": { args: ["relay", "start", "--name", "two", "--front", "unix:FOLDER/front.sock", "--device", DISK] },
  "relay status": { args: ["relay", "status", "relay"], relay: true },
  "relay set": { args: ["relay", "set", "relay", "--mode", "shadow"], relay: true },
  "relay list": { args: ["relay", "list"], relay: true },
  "vring dump": { args: ["vring", "dump", "relay"], relay: true },
  "demo": { args: ["demo", "--mem", "16MiB"] },
  "migrate listen": { args: ["migrate", "listen", "unix:FOLDER/front.sock", "--device", DISK], ready: front },
  "migrate run": { args: ["migrate", "run", "--to", "unix:/nonexistent/socket", "--device", DISK] },
};

interface Result {
  code: number;
  signal: string | null;
  stderr: string;
  stdout: string;
  report: FaultReport | undefined;
  files: string[];
}

async function once({ args, ready }: Case, runtime: string, frontPath: string, fault: string): Promise<Result> {
  using folder = new TempDir();
  const report = folder.join("report.json");
  const child = new Deno.Command(Deno.execPath(), {
    args: [
      ...["run", "-A", "--quiet", "--no-check", MAIN, "-j"],
      ...args.map((word) => word.replace("FOLDER", folder.path).replace("FRONT", frontPath)),
    ],
    env: {
      ...{ NO_COLOR: "1", DENO_NO_UPDATE_CHECK: "1", SVQ_RUNTIME_DIR: runtime || folder.join("run") },
      ...{ SVQ_TEST_FAULT: fault, SVQ_TEST_REPORT: report },
    },
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const [stderr, stdout] = [new Response(child.stderr).text(), new Response(child.stdout).text()];
  let ended = false;
  const status = child.status.finally(() => ended = true);
  const killer = setTimeout(() => child.kill("SIGKILL"), LIMIT_MS);
  if (ready !== undefined) {
    while (!ended) {
      try {
        connectUnix(ready(folder)).close();
        child.kill("SIGTERM");
        break;
      } catch {
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
    }
  }
  const { code, signal } = await status;
  clearTimeout(killer);
  const text = await stderr;
  if (args[1] === "start") await stopRelay(folder.join("run"));
  const files = [...walk(folder.path)].filter((path) => path !== report && !path.endsWith(".log"));
  let left: FaultReport | undefined;
  try {
    left = JSON.parse(Deno.readTextFileSync(report));
  } catch {
    // It did not get that far.
  }
  return { code, signal, stderr: text, stdout: await stdout, report: left, files: files.map((path) => path.slice(folder.path.length)) };
}

// A relay in the background that was started all the same is stopped, as its user would.
async function stopRelay(runtime: string): Promise<void> {
  const main = new URL("../../src/cli/main.ts", import.meta.url).pathname;
  const args = ["run", "-A", "--quiet", "--no-check", main, "relay", "stop", "two"];
  await new Deno.Command(Deno.execPath(), { args, env: { SVQ_RUNTIME_DIR: runtime }, stdout: "null", stderr: "null" }).output();
}

function* walk(path: string): Generator<string> {
  for (const entry of Deno.readDirSync(path)) {
    if (entry.isDirectory) yield* walk(`${path}/${entry.name}`);
    else yield `${path}/${entry.name}`;
  }
}

/** What is left beyond what a good run leaves. */
function more(left: readonly string[], good: readonly string[]): string[] {
  const rest = [...good, ...SPARE];
  return left.filter((what) => {
    const at = rest.indexOf(what);
    if (at >= 0) rest.splice(at, 1);
    // The runtime opens sockets and pipes (signals) at times of its own.
    return at < 0 && !/^(socket|pipe):/.test(what);
  });
}

function complaints(result: Result, good: Result): string[] {
  const { code, signal, stderr, stdout, report, files } = result;
  const found: string[] = [];
  if (signal !== null) return [`killed by ${signal}`];
  if (!EXIT_CODES.includes(code)) found.push(`exit code ${code}`);
  if (/Uncaught|INTERNAL|at file:/.test(stderr)) found.push("an error of svq's own");
  if (code !== 0 && code !== 143 && !/"(code|faults)":/.test(stderr + stdout) && good.code === 0) found.push("no error with a code");
  if (report === undefined) found.push("no report");
  else {
    const left = more(report.left, good.report!.left);
    if (left.length > 0) found.push(`left open: ${left.join(", ")}`);
    if (report.collected.length > good.report!.collected.length) found.push(`never closed: ${report.collected.join(", ")}`);
    if (report.maps > good.report!.maps) found.push(`${report.maps - good.report!.maps} mappings more`);
  }
  const left = files.filter((path) => !good.files.includes(path));
  if (left.length > 0) found.push(`files left: ${left.join(", ")}`);
  return found;
}

function faultsOf(calls: Record<string, number>): string[] {
  // What a Worker calls is not counted here; each calls some of these.
  const workers = [
    "epoll_create1",
    "epoll_ctl",
    "epoll_wait",
    "eventfd_write",
    "memfd_create",
    "mmap",
    "mremap",
    "ftruncate",
    "pwrite",
    "preadv",
  ];
  const main = Object.entries(calls).flatMap(([name, count]) => {
    return Array.from({ length: Math.min(count, DEEPEST) }, (_, i) => errorsOf(name).map((errno) => `main:${name}:${i + 1}:${errno}`))
      .flat();
  });
  return [...main, ...workers.flatMap((name) => [1, 2].flatMap((n) => errorsOf(name).map((errno) => `worker:${name}:${n}:${errno}`)))];
}

for (const [name, command] of Object.entries(COMMANDS)) {
  if (!SOAK && Deno.env.get("SVQ_FAULTS") === undefined && !USUAL.includes(name)) continue;
  Deno.test(`a call of libc that fails once ends "${name}" in good time, with an error of its own, and leaves nothing open`, async () => {
    using folder = new TempDir();
    await using relay = command.relay === true
      ? await RelayProcess.start({ folder: folder.path, device: "sim:blk,size=16M,queues=1" })
      : { front: "", [Symbol.asyncDispose]: () => Promise.resolve() };
    const runtime = command.relay === true ? folder.path : "";
    const run = (fault: string) => once(command, runtime, relay.front, fault);
    const good = await run("");
    assert.ok(good.report !== undefined, good.stderr);
    const faults = faultsOf(good.report.calls);
    const random = new Random(SEED, name.length);
    const chosen = SOAK ? faults : Array.from({ length: SAMPLE }, () => random.pick(faults));
    const wrong: string[] = [];
    let hit = 0;
    for (const fault of chosen) {
      const result = await run(fault);
      if (result.report?.failed !== false) hit++;
      for (const complaint of complaints(result, good)) wrong.push(`${fault}: ${complaint}\n${result.stderr.slice(0, 600)}`);
    }
    if (SOAK) console.log(`${name}: ${chosen.length} faults, ${hit} of them in the main thread, ${wrong.length} wrong`);
    assert.deepEqual(wrong, []);
  });
}
