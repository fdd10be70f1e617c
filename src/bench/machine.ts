/**
 * What a benchmark's document says of the machine.
 *
 * @module
 */
import { boundsChecked } from "../ffi/mod.ts";

function read(path: string): string {
  try {
    return Deno.readTextFileSync(path);
  } catch {
    return "";
  }
}

/** Processor, kernel and runtime; no names of hosts or people. */
export function machineFacts(): Record<string, string | number> {
  const cpuInfo = read("/proc/cpuinfo");
  const cpu = /^(?:model name|Model)\s*:\s*(.+)$/m.exec(cpuInfo)?.[1] ?? Deno.build.arch;
  const load = Number(read("/proc/loadavg").split(" ")[0] ?? 0);
  return {
    cpu,
    cpus: navigator.hardwareConcurrency,
    kernel: read("/proc/sys/kernel/osrelease").trim(),
    deno: Deno.version.deno,
    v8: Deno.version.v8,
    load_average: load,
    wasm_bounds_checks: boundsChecked() ? "on" : "off",
  };
}
