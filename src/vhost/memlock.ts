/**
 * The limit on pinned memory, and how much this process has pinned.
 *
 * @module
 */
import { SvqError } from "../errors.ts";

/** RLIMIT_MEMLOCK and what counts against it. */
export interface MemlockStatus {
  /** Bytes; Infinity for unlimited. */
  limit: number;
  /** Pinned bytes (VmPin). */
  pinned: number;
}

/** Reads /proc/self: limits and status. */
export function memlockStatus(proc = "/proc/self"): MemlockStatus {
  const limits = /^Max locked memory\s+(\S+)/m.exec(Deno.readTextFileSync(`${proc}/limits`))?.[1];
  const pinned = /^VmPin:\s+(\d+) kB/m.exec(Deno.readTextFileSync(`${proc}/status`))?.[1];
  if (limits === undefined) throw new SvqError("PROC_UNREADABLE", `${proc}/limits has no line for locked memory`);
  return { limit: limits === "unlimited" ? Infinity : Number(limits), pinned: Number(pinned ?? 0) * 1024 };
}
