/**
 * `svq bench ring`: what a relay core costs per chain, without any system call. Contenders take turns, so that what the
 * machine does meanwhile meets all of them: only ratios within one run mean anything.
 *
 * @module
 */
import { fromErrorRecord, SvqError } from "../errors.ts";
import type { RingFormat } from "../vring/queue.ts";
import type { RingReply, RingRequest } from "./ring_messages.ts";
import type { Contender, RingCase, Workload } from "./ring_rig.ts";
import { summarize, type Summary } from "./statistics.ts";

/** What to measure. */
export interface RingBenchOptions {
  /** Which contenders; those of the C reference take part only in mode shadow with split rings. */
  cores: readonly Contender[];
  /** Relay modes. */
  modes: readonly ("used" | "shadow")[];
  /** Pairs of the guest's and the device's ring. */
  rings: readonly (readonly [RingFormat, RingFormat])[];
  /** Chain shapes. */
  workloads: readonly Workload[];
  /** Chains per round. */
  batches: readonly number[];
  /** Descriptors per ring. */
  num: number;
  /** Mark written pages. */
  log: boolean;
  /** Repetitions of each measurement. */
  repetitions: number;
  /** Length of each, ms. */
  ms: number;
  /** With the eventfds and waits of a relay that does not poll; then the cores stand beside the bare system calls. */
  eventfds?: boolean;
  /** Shared library of the C reference. */
  reference?: string;
  /** Ends the run early. */
  signal?: AbortSignal;
  /** Called after each repetition. @param share done so far, 0 to 1 */
  onProgress?: (share: number, what: string) => void;
}

/** One line of the result. */
export interface RingResult extends Summary {
  /** Who relayed. */
  core: Contender;
  /** Relay mode. */
  mode: "used" | "shadow";
  /** The guest's ring. */
  guestRing: RingFormat;
  /** The device's ring. */
  deviceRing: RingFormat;
  /** Chain shape. */
  workload: Workload;
  /** Chains per round. */
  batch: number;
}

/** Talks to one contender's Worker. */
class Station implements Disposable {
  readonly #worker = new Worker(new URL("./ring_worker.ts", import.meta.url).href, { type: "module", name: "bench" });
  #settle: { resolve: (reply: RingReply) => void; reject: (error: unknown) => void } | undefined;

  constructor(readonly ring: RingCase) {
    this.#worker.onmessage = (event: MessageEvent<RingReply>) => {
      const { error } = event.data;
      if (error === undefined) this.#settle?.resolve(event.data);
      else this.#settle?.reject(fromErrorRecord(error));
    };
    this.#worker.onerror = (event) => {
      event.preventDefault();
      this.#settle?.reject(new SvqError("BENCH_FAILED", `A worker ended: ${event.message}`));
    };
  }

  ask(request: RingRequest): Promise<RingReply> {
    return new Promise((resolve, reject) => {
      this.#settle = { resolve, reject };
      this.#worker.postMessage(request);
    });
  }

  [Symbol.dispose](): void {
    this.#worker.terminate();
  }
}

/** The arrangements that `options` ask for and that exist. */
export function ringCases(options: RingBenchOptions): RingCase[][] {
  const { num, log, reference, eventfds = false } = options;
  const groups: RingCase[][] = [];
  for (const mode of options.modes) {
    for (const [guestRing, deviceRing] of options.rings) {
      // In mode used the device reads the guest's own descriptor table.
      if (mode === "used" && (guestRing !== "split" || deviceRing !== "split")) continue;
      const inC = !eventfds && mode === "shadow" && guestRing === "split" && deviceRing === "split" && reference !== undefined;
      const cores = options.cores.filter((core) => inC || (core !== "c" && core !== "bound"));
      if (eventfds && cores.length > 0) cores.push("syscalls");
      const more = { eventfds, ...(reference === undefined ? {} : { reference }) };
      groups.push(cores.map((core) => ({ core, mode, guestRing, deviceRing, num, log, ...more })));
    }
  }
  return groups.filter((group) => group.length > 0);
}

/**
 * Measures.
 *
 * @throws SvqError BENCH_WRONG when a contender lost or changed a chain, NO_CORE when one does not run here
 */
export async function benchRing(options: RingBenchOptions): Promise<RingResult[]> {
  const results: RingResult[] = [];
  const groups = ringCases(options);
  const total = groups.length * options.repetitions;
  let done = 0;
  for (const group of groups) {
    const { mode, guestRing, deviceRing } = group[0]!;
    const stations = group.map((ring) => new Station(ring));
    const values = new Map<string, number[]>();
    try {
      for (const station of stations) await station.ask({ type: "open", ring: station.ring });
      // The first pass is for the compilers; it is not counted.
      for (let pass = 0; pass <= options.repetitions; pass++) {
        for (const workload of options.workloads) {
          for (const batch of options.batches) {
            for (const station of stations) {
              options.signal?.throwIfAborted();
              const { ns } = await station.ask({ type: "measure", workload, batch, ms: options.ms });
              const key = `${station.ring.core} ${workload} ${batch}`;
              if (pass > 0) values.set(key, [...values.get(key) ?? [], ns!]);
            }
          }
        }
        if (pass > 0) options.onProgress?.(++done / total, `${mode}, ${guestRing} to ${deviceRing}`);
      }
      for (const station of stations) await station.ask({ type: "close" });
    } finally {
      for (const station of stations) station[Symbol.dispose]();
    }
    for (const workload of options.workloads) {
      for (const batch of options.batches) {
        for (const { core } of group) {
          results.push({ core, mode, guestRing, deviceRing, workload, batch, ...summarize(values.get(`${core} ${workload} ${batch}`)!) });
        }
      }
    }
  }
  return results;
}
