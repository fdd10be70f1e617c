/** `svq bench ring`. @module */
import { buildCommand } from "@stricli/core";
import { machineFacts } from "../../bench/machine.ts";
import { benchRing, type RingResult } from "../../bench/ring.ts";
import { CONTENDERS, overC, overSyscalls, ringCsv, ringPage, ringRecord, type RingRow, ringRows } from "../../bench/ring_report.ts";
import type { Contender, Workload } from "../../bench/ring_rig.ts";
import { VERSION } from "../../version.ts";
import type { RingFormat } from "../../vring/queue.ts";
import { writeReport } from "../bench_files.ts";
import type { CliContext } from "../context.ts";
import { durationFlag, integerFlag, numberListFlag, pathFlag } from "../parameters.ts";
import { Progress } from "../progress.ts";
import { usageError } from "../usage.ts";

const FORMATS: readonly RingFormat[] = ["split", "packed"];

interface Flags {
  readonly core: "both" | "wasm" | "js";
  readonly mode: "all" | "used" | "shadow";
  readonly guestRing: "all" | RingFormat;
  readonly deviceRing: "all" | RingFormat;
  readonly workload: "all" | Workload;
  readonly batch: number[];
  readonly num: number;
  readonly log: boolean;
  readonly repetitions: number;
  readonly time: number;
  readonly eventfds: boolean;
  readonly reference?: string;
  readonly csv?: string;
  readonly report?: string;
}

/** Cost per chain, without system calls. */
export const ring = buildCommand({
  docs: {
    brief: "Measure what the relay cores cost per descriptor chain",
    fullDescription:
      "Moves chains from a guest's ring to a device's ring and back, and times the relay alone: the models of guest and device are not timed, and check every chain. Contenders take turns, each in a thread of its own. " +
      "Chains: tx1 is one buffer of 1500 B out, 2desc 16 B out and 1536 B in, rx1 one buffer of 1536 B in. Compare contenders within one run; times of different runs mean little.\n\n" +
      "--reference takes the C relay that deno task bench:ring builds, and adds it and the bound (the bytes that any relay has to move) to the table. " +
      "--eventfds has each batch woken by a kick and by a call, through epoll, and puts the same four system calls alone beside it: the last column is what the relay adds to them. " +
      "Modes notify and passthrough touch no chain: there is nothing to measure here.\n\n" +
      "Example:\n  svq bench ring --mode shadow --batch 32,128 --report out.html",
  },
  parameters: {
    flags: {
      core: { kind: "enum", values: ["both", "wasm", "js"], brief: "Which relay cores", default: "both" },
      mode: { kind: "enum", values: ["all", "used", "shadow"], brief: "Which relay modes", default: "all" },
      guestRing: { kind: "enum", values: ["all", ...FORMATS], brief: "Format of the guest's ring", default: "all" },
      deviceRing: { kind: "enum", values: ["all", ...FORMATS], brief: "Format of the device's ring", default: "all" },
      workload: { kind: "enum", values: ["all", "tx1", "2desc", "rx1"], brief: "Which chains", default: "all" },
      batch: numberListFlag("Chains per round, e.g. 1,32,128", { default: "1,32,128" }),
      num: integerFlag("Ring size in descriptors, a power of two", { default: "256", min: 2, max: 32768 }),
      log: { kind: "boolean", brief: "Mark written pages in a dirty log", default: true },
      repetitions: integerFlag("Repetitions of each measurement", { default: "5", min: 1, max: 1000 }),
      time: durationFlag("Length of each measurement", { default: "20ms" }),
      eventfds: { kind: "boolean", brief: "With the four system calls per batch of a relay that does not poll", default: false },
      reference: pathFlag("Shared library of the C reference", { optional: true }),
      csv: pathFlag("Write comma-separated values", { optional: true }),
      report: pathFlag("Write a page with tables and pictures", { optional: true }),
    },
  },
  async func(this: CliContext, flags: Flags): Promise<void> {
    if ((flags.num & (flags.num - 1)) !== 0) {
      throw usageError(`A ring of ${flags.num} descriptors does not exist`, "--num is a power of two");
    }
    const most = flags.num >> 1;
    if (flags.batch.some((batch) => batch < 1 || batch > most)) {
      throw usageError(`A batch of ${flags.batch.join(",")} does not fit a ring of ${flags.num}`, `--batch from 1 to ${most}`);
    }
    const results = await measure(this, flags);
    const machine = machineFacts();
    if (flags.report !== undefined) writeReport(flags.report, ringPage(results, machine, VERSION));
    if (flags.csv !== undefined) writeReport(flags.csv, ringCsv(results));
    const document = { schema: "svq.bench.ring/1", machine, results: results.map(ringRecord) };
    this.output.document(document, () => printTable(this, results, machine));
  },
});

async function measure(context: CliContext, flags: Flags): Promise<RingResult[]> {
  using progress = new Progress(context.output, "measuring");
  const cores: Contender[] = flags.core === "both" ? ["wasm", "js"] : [flags.core];
  if (flags.reference !== undefined) cores.push("c", "bound");
  const formats = (chosen: "all" | RingFormat) => chosen === "all" ? FORMATS : [chosen];
  return await benchRing({
    cores,
    modes: flags.mode === "all" ? ["shadow", "used"] : [flags.mode],
    rings: formats(flags.guestRing).flatMap((guest) => formats(flags.deviceRing).map((device) => [guest, device] as const)),
    workloads: flags.workload === "all" ? ["tx1", "2desc", "rx1"] : [flags.workload],
    batches: flags.batch,
    ...{ num: flags.num, log: flags.log, repetitions: flags.repetitions, ms: flags.time / 1e6, signal: context.signal },
    eventfds: flags.eventfds,
    ...(flags.reference === undefined ? {} : { reference: resolve(flags.reference) }),
    onProgress: (share, what) => progress.update(share, what),
  });
}

// dlopen(3) looks a name without a slash up in the library path.
function resolve(path: string): string {
  return path.includes("/") ? path : `./${path}`;
}

function printTable(context: CliContext, results: readonly RingResult[], machine: ReturnType<typeof machineFacts>): void {
  const rows = ringRows(results);
  const present = CONTENDERS.filter((core) => rows.some((row) => row.results[core] !== undefined));
  const bare = present.includes("syscalls") ? present.filter((core) => core === "wasm" || core === "js") : [];
  const compared = present.includes("c") ? present.filter((core) => core === "wasm" || core === "js") : [];
  const cell = (row: RingRow, core: Contender) => {
    const result = row.results[core];
    return result === undefined ? "-" : `${result.median.toFixed(1)} (${result.min.toFixed(0)}-${result.max.toFixed(0)})`;
  };
  context.output.line(
    `ns per chain: median (spread); WebAssembly ${machine.wasm_bounds_checks === "on" ? "with" : "without"} bounds checks`,
  );
  context.output.table(
    ["mode and rings", "chain", "batch", ...present, ...compared.map((core) => `${core}/c`), ...bare.map((core) => `${core} - syscalls`)],
    rows.map((row) => [
      row.arrangement,
      row.workload,
      row.batch,
      ...present.map((core) => cell(row, core)),
      ...compared.map((core) => overC(row, core)?.toFixed(2) ?? "-"),
      ...bare.map((core) => overSyscalls(row, core)?.toFixed(1) ?? "-"),
    ]),
  );
}
