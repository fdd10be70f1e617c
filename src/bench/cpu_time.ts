/**
 * Processor time of this process.
 *
 * @module
 */

const TASKS = "/proc/self/task";

/**
 * Nanoseconds that the threads of this process that live now have run, from /proc/self/task/TID/schedstat; 0 where the
 * kernel does not keep them (CONFIG_SCHED_INFO).
 */
export function processCpuNs(): number {
  let total = 0;
  try {
    for (const { name } of Deno.readDirSync(TASKS)) total += threadCpuNs(name);
  } catch { /* not this kernel */ }
  return total;
}

function threadCpuNs(tid: string): number {
  try {
    return Number(Deno.readTextFileSync(`${TASKS}/${tid}/schedstat`).split(" ")[0]);
  } catch {
    // It ended meanwhile.
    return 0;
  }
}
