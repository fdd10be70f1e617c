/**
 * How fast svq and QEMU put the same memory into the same sink, one after the other, in one run:
 *
 *     deno run -A scripts/bench_migrate_qemu.ts [--mem=1GiB] [--runs=3] [--qemu=7.2|10]
 *
 * QEMU migrates a guest that never ran, whose memory is a file that holds the same contents. Only the ratio
 * counts: of the medians of runs that take turns.
 *
 * @module
 */
import { CONTENTS, fillMemory, SINKS, streamInto, Taker } from "../src/bench/migrate.ts";
import { createMemfd, listenUnix, mapFd } from "../src/ffi/mod.ts";
import { QmpClient } from "../src/migration/qmp.ts";
import { parseSize } from "../src/units.ts";
import { type Program, qemuProgram, type QemuVersion } from "./lab/host.ts";

function option(name: string, fallback: string): string {
  return Deno.args.find((arg) => arg.startsWith(`--${name}=`))?.slice(name.length + 3) ?? fallback;
}

/** Starts QEMU on `file`, migrates it into a discarding socket, and returns how long that took, ms. */
async function qemuOnce(
  taker: Taker,
  dir: string,
  qemu: Program,
  file: string,
  bytes: number,
): Promise<number> {
  const [monitor, path] = [`${dir}/qmp`, `${dir}/stream`];
  using listener = listenUnix(path);
  const memory = `memory-backend-file,id=m,size=${bytes},mem-path=${file},share=on`;
  const child = new Deno.Command(qemu.command, {
    args: [
      ...[...qemu.args, "-S", "-nodefaults", "-display", "none", "-accel", "tcg", "-object", memory],
      ...["-machine", "q35,memory-backend=m", "-m", `size=${bytes / 2 ** 20}M`, "-qmp", `unix:${monitor},server=on,wait=off`],
    ],
    ...(qemu.env === undefined ? {} : { env: qemu.env }),
    stdout: "null",
    stderr: "inherit",
  }).spawn();
  try {
    const client = await connect(monitor);
    try {
      await client.execute("migrate-set-parameters", { "max-bandwidth": 2 ** 40, "downtime-limit": 1 });
      const accepted = listener.accept();
      await client.execute("migrate", { uri: `unix:${path}` });
      const begun = performance.now();
      const taken = taker.discard(await accepted);
      for (;;) {
        const { status } = await client.execute<{ status: string }>("query-migrate");
        if (status === "completed") break;
        if (status === "failed") throw new Error("QEMU's migration failed");
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
      await taken;
      return performance.now() - begun;
    } finally {
      await client.close();
    }
  } finally {
    child.kill("SIGKILL");
    await child.status;
    for (const one of [monitor, path]) await Deno.remove(one).catch(() => {});
  }
}

async function connect(monitor: string): Promise<QmpClient> {
  const deadline = performance.now() + 20_000;
  for (;;) {
    try {
      return await QmpClient.connect(monitor);
    } catch (error) {
      if (performance.now() > deadline) throw error;
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }
}

function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[values.length >> 1]!;
}

const bytes = parseSize(option("mem", "1GiB"));
const runs = Number(option("runs", "3"));
const version = option("qemu", "7.2") as QemuVersion;
const qemu = await qemuProgram(version, "qemu-system-x86_64");
const dir = await Deno.makeTempDir({ dir: "/dev/shm", prefix: "svq-bench-" });
try {
  await using taker = new Taker();
  using ram = createMemfd("svq-bench", bytes);
  using mapping = mapFd(ram.fd, { length: bytes, what: "bench memory" });
  for (const contents of CONTENTS) {
    fillMemory(new Uint32Array(mapping.buffer()), contents);
    const file = `${dir}/ram`;
    await Deno.copyFile(`/proc/self/fd/${ram.fd}`, file);
    const svq: number[] = [];
    const theirs: number[] = [];
    const receiver: number[] = [];
    for (let run = 0; run < runs; run++) {
      svq.push((await streamInto(taker, mapping, SINKS[0])).ms);
      theirs.push(await qemuOnce(taker, dir, qemu, file, bytes));
      receiver.push((await streamInto(taker, mapping, SINKS[1])).ms);
    }
    const rate = (ms: number) => `${(bytes / ms / 1e6).toFixed(2)} GB/s`;
    const [ours, other] = [median(svq), median(theirs)];
    // The fastest run is the one that the rest of the machine disturbed least.
    const best = Math.min(...theirs) / Math.min(...svq);
    console.log(
      `${contents}: svq ${rate(ours)}, QEMU ${version} ${rate(other)}: ${(other / ours).toFixed(2)} times (fastest runs: ` +
        `${best.toFixed(2)}); svq into a receiver ${rate(median(receiver))}`,
    );
  }
} finally {
  await Deno.remove(dir, { recursive: true });
}
