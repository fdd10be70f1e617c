/**
 * Flags of the Workers of a relay, the same wherever one is started.
 *
 * @module
 */
import { allowedCpus } from "../ffi/mod.ts";
import type { RelayConfig } from "../relay/relay_config.ts";
import { integerFlag, numberListFlag, pollFlag } from "./parameters.ts";
import { usageError } from "./usage.ts";

/** Values of {@linkcode WORKER_FLAGS}. */
export interface WorkerFlags {
  /** Worker threads. */
  readonly workers: number;
  /** How long each looks for more before it sleeps, us. */
  readonly pollUs: number | "auto";
  /** CPUs for them. */
  readonly cpus?: number[];
}

/** The flags. */
export const WORKER_FLAGS = {
  workers: integerFlag("Worker threads for the queues", { default: "1", min: 1, max: 64 }),
  pollUs: pollFlag("How long a worker looks for more before it sleeps, microseconds; 0 is never, auto as long as it pays", {
    default: "auto",
  }),
  cpus: numberListFlag("CPUs to bind the workers to, in turn, e.g. 2,3 or 4-7 (default: the kernel chooses)", { optional: true }),
} as const;

/** What a relay is told. @throws SvqError USAGE for a CPU that this process may not use */
export function workerConfig({ workers, pollUs, cpus }: WorkerFlags): Pick<RelayConfig, "workers" | "pollUs" | "cpus"> {
  if (cpus === undefined) return { workers, pollUs };
  const allowed = allowedCpus();
  const foreign = cpus.filter((cpu) => !allowed.includes(cpu));
  if (foreign.length > 0) {
    throw usageError(`This process may not run on CPU ${foreign.join(", ")}`, `--cpus takes some of ${listText(allowed)}`);
  }
  return { workers, pollUs, cpus };
}

/** The same as words of a command line. */
export function workerWords({ workers, pollUs, cpus }: WorkerFlags): string[] {
  return ["--workers", String(workers), "--poll-us", String(pollUs), ...(cpus === undefined ? [] : ["--cpus", cpus.join(",")])];
}

/** Sorted numbers as ranges: `0-3,8`. */
export function listText(numbers: readonly number[]): string {
  const parts: string[] = [];
  for (let i = 0; i < numbers.length;) {
    let end = i;
    while (numbers[end + 1] === numbers[end]! + 1) end++;
    parts.push(end === i ? String(numbers[i]) : `${numbers[i]}-${numbers[end]}`);
    i = end + 1;
  }
  return parts.join(",");
}
