/** `svq bench relay`. @module */
import { buildCommand, type Command } from "@stricli/core";
import { machineFacts } from "../../bench/machine.ts";
import { benchIdleMemory, benchRelay, benchSwitch } from "../../bench/relay.ts";
import { loadText, type RelayBench, relayCsv, relayPage, relayRecord, relayTable, switchTable } from "../../bench/relay_report.ts";
import { type DeviceLink, RELAY_CONTENDERS, type RelayContender, type RelayLoad } from "../../bench/relay_rig.ts";
import type { CoreChoice } from "../../relay/core.ts";
import { formatSize } from "../../units.ts";
import { VERSION } from "../../version.ts";
import { writeReport } from "../bench_files.ts";
import type { CliContext } from "../context.ts";
import { durationFlag, integerFlag, pathFlag, sizeFlag, sizeListFlag } from "../parameters.ts";
import { Progress } from "../progress.ts";
import { usageError } from "../usage.ts";
import { WORKER_FLAGS, workerConfig, type WorkerFlags } from "../worker_flags.ts";

const MODES = RELAY_CONTENDERS.filter((contender) => contender !== "direct");

interface Flags extends WorkerFlags {
  readonly mode: "all" | Exclude<RelayContender, "direct">;
  readonly over: DeviceLink;
  readonly latency: number;
  readonly depth: number;
  readonly queues: number;
  readonly requestSize: number;
  readonly core: CoreChoice;
  readonly repetitions: number;
  readonly time: number;
  readonly switches: number;
  readonly guestMem: number[];
  readonly idleQueues: number;
  readonly csv?: string;
  readonly report?: string;
}

/** Cost of a relay with all that belongs to it. */
export const relay: Command<CliContext> = buildCommand({
  docs: {
    brief: "Measure what a relay costs a guest: requests per second, latency, CPU, switching",
    fullDescription:
      "Drives an embedded disk with checked requests through real eventfds and threads: directly, and through a relay in each mode. Contenders take turns in every repetition, " +
      "and ratios are of one repetition: compare those, not the times of different runs. Then a guest under load is switched from passthrough to shadow and back, with several sizes of memory; " +
      "and the memory that idle queues take is measured. Needs no privileges.\n\n" +
      "CPU per request is that of driver, relay and device together. Latencies are exact to 1 part in 16. System calls per batch are those of the relay's workers: " +
      "waits, kicks and calls for each time that chains were given to the device.\n\n" +
      "Examples:\n  svq bench relay --latency 100us --depth 32 --report out.html\n  svq bench relay --latency 0 --poll-us 0 --mode shadow",
  },
  parameters: {
    flags: {
      mode: { kind: "enum", values: ["all", ...MODES], brief: "Which mode to compare with no relay", default: "all" },
      over: { kind: "enum", values: ["sim", "vhost-user"], brief: "Reach the device in this process, or over a socket", default: "sim" },
      latency: durationFlag("Time that the device takes for each request; 0: as fast as its CPU", { default: "100us" }),
      depth: integerFlag("Requests in flight in each queue", { default: "32", min: 1, max: 128 }),
      queues: integerFlag("Queues", { default: "1", min: 1, max: 64 }),
      requestSize: sizeFlag("Size of a request, a multiple of 512 up to 64KiB", { default: "4KiB" }),
      core: { kind: "enum", values: ["auto", "wasm", "js"], brief: "What runs the data path", default: "auto" },
      ...WORKER_FLAGS,
      repetitions: integerFlag("Repetitions of each measurement", { default: "5", min: 1, max: 1000 }),
      time: durationFlag("Length of each measurement", { default: "500ms" }),
      switches: integerFlag("Switches in each direction, for each size of memory; 0: none", { default: "20", max: 10_000 }),
      guestMem: sizeListFlag("Sizes of guest memory to switch with", { default: "64MiB,1GiB,4GiB" }),
      idleQueues: integerFlag("Queues whose memory is measured while they do nothing; 0: none", { default: "64", max: 64 }),
      csv: pathFlag("Write comma-separated values", { optional: true }),
      report: pathFlag("Write a page with tables and pictures", { optional: true }),
    },
  },
  async func(this: CliContext, flags: Flags): Promise<void> {
    const { requestSize, idleQueues } = flags;
    if (requestSize < 512 || requestSize > 65536 || requestSize % 512 !== 0) {
      throw usageError(`Requests of ${requestSize} bytes do not exist`, "--request-size is a multiple of 512, up to 64KiB");
    }
    if (idleQueues === 1) throw usageError("One idle queue cannot be told from the relay itself", "--idle-queues 0, or 2 to 64");
    if (flags.time < 1e6) throw usageError("Nothing can be measured in less than a millisecond", "--time 500ms");
    const load: RelayLoad = {
      ...{ link: flags.over, latencyUs: flags.latency / 1000, queues: flags.queues, depth: flags.depth, requestSize },
      // A block of 64 KiB for each request, and room for the rings.
      memoryBytes: Math.max(64 << 20, 2 ** Math.ceil(Math.log2(flags.queues * flags.depth * 2 * 65536))),
      config: { core: flags.core, ...workerConfig(flags) },
    };
    const bench = await measure(this, flags, load);
    const machine = machineFacts();
    if (flags.report !== undefined) writeReport(flags.report, relayPage(bench, { machine, version: VERSION }));
    if (flags.csv !== undefined) writeReport(flags.csv, relayCsv(bench));
    this.output.document({ schema: "svq.bench.relay/1", machine, ...relayRecord(bench) }, () => print(this, bench));
  },
});

async function measure(context: CliContext, flags: Flags, load: RelayLoad): Promise<RelayBench> {
  using progress = new Progress(context.output, "measuring");
  const { signal } = context;
  const onProgress = (share: number, what: string) => progress.update(share, what);
  const contenders: RelayContender[] = flags.mode === "all" ? [...RELAY_CONTENDERS] : ["direct", flags.mode];
  const results = await benchRelay({ contenders, load, repetitions: flags.repetitions, ms: flags.time / 1e6, signal, onProgress });
  const switches = await benchSwitch({ load, memorySizes: flags.guestMem, switches: flags.switches, signal, onProgress });
  const idle = flags.idleQueues === 0 ? undefined : await benchIdleMemory({ ...load, queues: flags.idleQueues });
  return { load, results, switches, idle };
}

function print(context: CliContext, bench: RelayBench): void {
  const { output } = context;
  output.line(loadText(bench.load));
  output.line("median (spread); ratios to direct are of the same repetition");
  const contenders = relayTable(bench);
  output.table(contenders.header, contenders.rows);
  for (const { contender, syscallsPerBatch, chainsPerBatch, sleepsPerBatch } of bench.results) {
    if (syscallsPerBatch === null || chainsPerBatch === null || sleepsPerBatch === null) continue;
    output.line(
      `${contender}: ${syscallsPerBatch.median.toFixed(2)} system calls and ${sleepsPerBatch.median.toFixed(2)} sleeps for each batch of ` +
        `${chainsPerBatch.median.toFixed(1)} chains`,
    );
  }
  if (bench.switches.length > 0) {
    output.line();
    const switched = switchTable(bench);
    output.table(switched.header, switched.rows);
  }
  if (bench.idle === undefined) return;
  output.line();
  output.line(`an idle queue in mode shadow takes ${formatSize(bench.idle.bytesPerQueue)} of memory`);
}
