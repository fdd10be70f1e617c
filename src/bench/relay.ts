/**
 * `svq bench relay`: what a relay costs a guest, in requests per second and latency, against the same device without one; and
 * how long switching modes takes. Contenders take turns: only ratios within one run mean anything.
 *
 * @module
 */
import { percentile } from "./migrate.ts";
import { type RelayContender, type RelayLoad, RelayRig, type RelaySample } from "./relay_rig.ts";
import { summarize, type Summary } from "./statistics.ts";

/** What to measure. */
export interface RelayBenchOptions {
  /** Who takes part; the first one is what the others are compared with. */
  contenders: readonly RelayContender[];
  /** The same for all of them. */
  load: RelayLoad;
  /** Repetitions of each measurement. */
  repetitions: number;
  /** Length of each, ms. */
  ms: number;
  /** Ends the run early. */
  signal?: AbortSignal;
  /** Called after each repetition. @param share done so far, 0 to 1 */
  onProgress?: (share: number, what: string) => void;
}

/** Medians and spreads of one contender. */
export interface RelayResult {
  /** Who. */
  contender: RelayContender;
  /** Completed requests per second. */
  iops: Summary;
  /** Half of the requests took no longer, us. */
  p50: Summary;
  /** 99 of 100. */
  p99: Summary;
  /** 999 of 1000. */
  p999: Summary;
  /** Processor time for a request, us: driver, relay and device together. */
  cpuUs: Summary;
  /** Requests per second over those of the first contender in the same repetition. */
  iopsRatio: Summary;
  /** The same of `p99`. */
  p99Ratio: Summary;
  /** The same of `cpuUs`. */
  cpuRatio: Summary;
  /** System calls of the relay's Workers for each batch that they forwarded; null where none forwards. */
  syscallsPerBatch: Summary | null;
  /** Chains in a batch. */
  chainsPerBatch: Summary | null;
  /** Sleeps for each batch. */
  sleepsPerBatch: Summary | null;
}

/** Measures. @throws SvqError BENCH_FAILED */
export async function benchRelay(options: RelayBenchOptions): Promise<RelayResult[]> {
  const { contenders, load, repetitions, ms } = options;
  await using stack = new AsyncDisposableStack();
  const rigs: RelayRig[] = [];
  for (const contender of contenders) rigs.push(stack.use(await RelayRig.open(contender, load)));
  const samples = contenders.map((): RelaySample[] => []);
  // The first pass is for the compilers; it is not counted.
  for (let pass = 0; pass <= repetitions; pass++) {
    for (const [i, rig] of rigs.entries()) {
      options.signal?.throwIfAborted();
      const sample = await rig.measure(ms);
      if (pass > 0) samples[i]!.push(sample);
      options.onProgress?.((pass * rigs.length + i + 1) / ((repetitions + 1) * rigs.length), contenders[i]!);
    }
  }
  return contenders.map((contender, i) => resultOf(contender, samples[i]!, samples[0]!));
}

function resultOf(contender: RelayContender, samples: readonly RelaySample[], base: readonly RelaySample[]): RelayResult {
  const of = (name: "iops" | "p50" | "p99" | "p999" | "cpuUs") => summarize(samples.map((sample) => sample[name]));
  const ratio = (name: "iops" | "p99" | "cpuUs") =>
    summarize(samples.map((sample, i) => base[i]![name] === 0 ? 1 : sample[name] / base[i]![name]));
  const batch = (name: "syscallsPerBatch" | "chainsPerBatch" | "sleepsPerBatch") => {
    const values = samples.flatMap((sample) => sample[name] ?? []);
    return values.length === 0 ? null : summarize(values);
  };
  return {
    contender,
    ...{ iops: of("iops"), p50: of("p50"), p99: of("p99"), p999: of("p999"), cpuUs: of("cpuUs") },
    ...{ iopsRatio: ratio("iops"), p99Ratio: ratio("p99"), cpuRatio: ratio("cpuUs") },
    ...{ syscallsPerBatch: batch("syscallsPerBatch"), chainsPerBatch: batch("chainsPerBatch"), sleepsPerBatch: batch("sleepsPerBatch") },
  };
}

/** What switching from passthrough to shadow and back took a guest under load. */
export interface SwitchResult {
  /** Bytes of guest memory. */
  memoryBytes: number;
  /** Where to. */
  to: "shadow" | "passthrough";
  /** Switches. */
  count: number;
  /** Waiting until the device held nothing, us. */
  drainUs: Summary;
  /** The rest: new ring, base, eventfds, us. */
  switchUs: Summary;
  /** 99 of 100 of the latter took no longer, us. */
  switchP99: number;
}

/** What is switched. */
export interface SwitchBenchOptions {
  /** The load; its `memoryBytes` is each of `memorySizes` in turn. */
  load: RelayLoad;
  /** Bytes of guest memory. */
  memorySizes: readonly number[];
  /** Switches in each direction, for each size. */
  switches: number;
  /** Ends the run early. */
  signal?: AbortSignal;
  /** Called after each pair of switches. */
  onProgress?: (share: number, what: string) => void;
}

/** Switches a guest under load back and forth; the sizes of memory take turns. @throws SvqError BENCH_FAILED */
export async function benchSwitch(options: SwitchBenchOptions): Promise<SwitchResult[]> {
  const { load, memorySizes, switches } = options;
  if (switches === 0 || memorySizes.length === 0) return [];
  await using stack = new AsyncDisposableStack();
  const guests: SwitchedGuest[] = [];
  for (const memoryBytes of memorySizes) guests.push(stack.use(await SwitchedGuest.open({ ...load, memoryBytes })));
  // The first pass is for the compilers; it is not counted.
  for (let pass = 0; pass <= switches; pass++) {
    for (const [i, guest] of guests.entries()) {
      options.signal?.throwIfAborted();
      await guest.thereAndBack(pass > 0);
      options.onProgress?.((pass * guests.length + i + 1) / ((switches + 1) * guests.length), "switching");
    }
  }
  return guests.flatMap((guest) => guest.results);
}

// Load is on only while it is this guest's turn: the others would take the CPUs.
class SwitchedGuest implements AsyncDisposable {
  readonly #seen = {
    shadow: { drain: [] as number[], rest: [] as number[] },
    passthrough: { drain: [] as number[], rest: [] as number[] },
  };

  private constructor(readonly rig: RelayRig, readonly load: RelayLoad) {}

  static async open(load: RelayLoad): Promise<SwitchedGuest> {
    return new SwitchedGuest(await RelayRig.open("passthrough", load), load);
  }

  async thereAndBack(counts: boolean): Promise<void> {
    const { rig } = this;
    const relay = rig.relay!;
    const running = rig.measure(30);
    running.catch(() => {});
    for (const mode of ["shadow", "passthrough"] as const) {
      await rig.changeMode(mode);
      if (!counts) continue;
      for (const { times } of relay.queues) {
        this.#seen[mode].drain.push(times.drain_us);
        this.#seen[mode].rest.push(times.switch_us);
      }
    }
    await running;
  }

  get results(): SwitchResult[] {
    return (["shadow", "passthrough"] as const).map((to) => {
      const { drain, rest } = this.#seen[to];
      return {
        ...{ memoryBytes: this.load.memoryBytes, to, count: rest.length },
        ...{ drainUs: summarize(drain), switchUs: summarize(rest), switchP99: percentile(rest, 0.99) },
      };
    });
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.rig[Symbol.asyncDispose]();
  }
}

/** What queues that do nothing take. */
export interface IdleMemory {
  /** Queues that were looked at. */
  queues: number;
  /** Growth of the process for each, bytes: from passthrough, where the relay has nothing of its own, to shadow. */
  bytesPerQueue: number;
}

/** Measures {@linkcode IdleMemory}. @param load of at least two queues; its depth and latency do not matter */
export async function benchIdleMemory(load: RelayLoad): Promise<IdleMemory> {
  const rss = () => {
    const match = /^VmRSS:\s+(\d+) kB$/m.exec(Deno.readTextFileSync("/proc/self/status"));
    return Number(match?.[1] ?? 0) * 1024;
  };
  await using rig = await RelayRig.open("passthrough", { ...load, depth: 1 });
  // What the first queue brings along (code, the core itself) counts for no queue.
  await rig.changeMode("shadow", 0);
  const before = rss();
  await rig.changeMode("shadow");
  const more = load.queues - 1;
  return { queues: more, bytesPerQueue: Math.max(0, rss() - before) / more };
}
