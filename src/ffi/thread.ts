/**
 * The calling thread and process: affinity, identity, limits.
 *
 * @module
 */
import { libc, retrying } from "./libc.ts";

/** Binds the calling thread to `cpus` (numbers below 1024). */
export function pinThread(cpus: readonly number[]): void {
  const mask = new Uint8Array(128);
  for (const cpu of cpus) mask[cpu >> 3]! |= 1 << (cpu & 7);
  retrying(() => libc().sched_setaffinity(0, 128n, mask), "sched_setaffinity", `cpus ${cpus.join(",")}`);
}

/** The CPUs that the calling thread may run on, in order. */
export function allowedCpus(): number[] {
  const mask = new Uint8Array(128);
  retrying(() => libc().sched_getaffinity(0, 128n, mask), "sched_getaffinity");
  return Array.from({ length: mask.length * 8 }, (_, cpu) => cpu).filter((cpu) => (mask[cpu >> 3]! & 1 << (cpu & 7)) !== 0);
}

const SIGUSR1 = 10;
const SIG_IGN = 1n;

/**
 * The runtime opens a debugger on a TCP port of this host when SIGUSR1 comes: whoever connects to it can do what this process
 * can. From now on the signal is ignored.
 */
export function ignoreDebuggerSignal(): void {
  libc().signal(SIGUSR1, SIG_IGN);
}

const CLOCK_PROCESS_CPUTIME_ID = 2;

/** Nanoseconds that all threads of this process have run, those that have ended included. */
export function processCpuNs(): number {
  const time = new BigInt64Array(2);
  retrying(() => libc().clock_gettime(CLOCK_PROCESS_CPUTIME_ID, new Uint8Array(time.buffer)), "clock_gettime");
  return Number(time[0]) * 1e9 + Number(time[1]);
}

/** Lets another thread run. */
export function yieldThread(): void {
  libc().sched_yield();
}

/** Effective user id. */
export function effectiveUid(): number {
  return libc().geteuid();
}

/** Soft and hard RLIMIT_MEMLOCK in bytes; Infinity where unlimited. */
export function memlockLimit(): { soft: number; hard: number } {
  const limits = new BigUint64Array(2);
  retrying(() => libc().getrlimit(8, limits), "getrlimit");
  const [soft, hard] = [...limits].map((limit) => limit === 0xffff_ffff_ffff_ffffn ? Infinity : Number(limit));
  return { soft: soft!, hard: hard! };
}
