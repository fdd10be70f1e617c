/**
 * The Workers of a relay: how each is set up, and how often it sleeps and polls.
 *
 * @module
 */
import { allowedCpus } from "../ffi/mod.ts";
import { type Counters, WORKER_COUNTER } from "./counters.ts";
import type { WorkerInit } from "./messages.ts";
import type { RelayConfig } from "./relay_config.ts";

/** What differs between Workers, and what the user chooses for all of them. */
export type WorkerSettings = Pick<WorkerInit, "core" | "index" | "poll" | "spareCpus" | "cpus">;

/** What one Worker does; part of `svq.relay/1`. */
export interface WorkerLoad {
  /** Which one; queue N belongs to Worker N modulo their number. */
  index: number;
  /** CPUs that its thread is bound to; none: it runs where the kernel puts it. */
  cpus: number[];
  /** Calls of epoll_wait. */
  waits: number;
  /** Those of them that could sleep. */
  sleeps: number;
  /** Rounds of polling. */
  polls: number;
  /** Times that polling found work. */
  poll_hits: number;
  /** Time spent in looks that found nothing, ms. */
  poll_idle_ms: number;
  /** How long it looks for more at present before it sleeps, us. */
  poll_us: number;
  /** Times that self-tuned polling stopped for a while because it did not pay: what it waited for needed the CPU. */
  poll_held_off: number;
}

/** CPUs of Worker `index` out of `workers`: they share the list out, and where it is shorter than they are many, its CPUs. */
export function workerCpus(cpus: readonly number[], index: number, workers: number): number[] {
  if (cpus.length <= workers) return cpus.length === 0 ? [] : [cpus[index % cpus.length]!];
  return cpus.filter((_, i) => i % workers === index);
}

/** What Worker `index` out of `workers` is told. */
export function workerSettings(config: RelayConfig, index: number, workers: number): WorkerSettings {
  const { core, pollUs, cpus = [] } = config;
  const usable = cpus.length > 0 ? new Set(cpus).size : allowedCpus().length;
  return { core, index, poll: pollUs, spareCpus: usable - workers, cpus: workerCpus(cpus, index, workers) };
}

/** What the Workers do now. */
export function workerLoads(counters: Counters, workers: number, config: RelayConfig): WorkerLoad[] {
  return Array.from({ length: workers }, (_, index) => {
    const slots = counters.ofWorker(index);
    const of = (name: keyof typeof WORKER_COUNTER) => slots[WORKER_COUNTER[name]]!;
    return {
      index,
      cpus: workerCpus(config.cpus ?? [], index, workers),
      waits: of("waits"),
      sleeps: of("sleeps"),
      polls: of("polls"),
      poll_hits: of("pollHits"),
      poll_idle_ms: Math.round(of("pollIdleUs") / 1000),
      poll_us: of("pollUs"),
      poll_held_off: of("pollHeldOff"),
    };
  });
}
