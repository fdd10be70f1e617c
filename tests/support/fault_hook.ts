/**
 * Makes one call of libc fail, once: `SVQ_TEST_FAULT=THREAD:NAME:N:ERRNO` says which (THREAD is `main` or `worker`, NAME of
 * src/ffi/libc.ts, N from 1 in each thread, ERRNO a number). Nothing of svq reads the variable: this module does, and only
 * fault_main.ts imports it. What was called is told by {@linkcode calls}.
 *
 * @module
 */
import { type Libc, LIBC_HOOK } from "../../src/ffi/libc.ts";
import { hookWorkers } from "./libc_hook.ts";

/** Calls of this thread so far, by name. */
export const calls: Record<string, number> = {};
/** Has the call failed? */
export let failed = false;

// Giving back cannot be made to fail usefully: the kernel does it whatever it answers.
const SPARED = new Set(["__errno_location", "close", "munmap", "memcpy", "memcmp", "geteuid", "freeaddrinfo", "signal", "sched_yield"]);
const thread = "importScripts" in globalThis || "DedicatedWorkerGlobalScope" in globalThis ? "worker" : "main";
const [wantedThread, wantedName, wantedCall, wantedErrno] = (Deno.env.get("SVQ_TEST_FAULT") ?? "").split(":");

function failing(functions: Libc): Libc {
  const location = functions.__errno_location();
  const errno = new Int32Array(Deno.UnsafePointerView.getArrayBuffer(location!, 4));
  const wrap = (name: string, call: (...words: unknown[]) => unknown) => (...words: unknown[]): unknown => {
    calls[name] = (calls[name] ?? 0) + 1;
    if (wantedThread !== thread || wantedName !== name || calls[name] !== Number(wantedCall)) return call(...words);
    failed = true;
    errno[0] = Number(wantedErrno);
    if (name === "mmap" || name === "mremap") return Deno.UnsafePointer.create(0xffff_ffff_ffff_ffffn);
    // getaddrinfo says it by its result: EAI_FAIL.
    if (name === "getaddrinfo") return Promise.resolve(-4);
    if (name.endsWith("_on_pool")) return Promise.resolve(-1);
    return name === "lseek" ? -1n : -1;
  };
  const wrapped = Object.entries(functions).map(([name, call]) => [name, SPARED.has(name) ? call : wrap(name, call as never)]);
  return Object.fromEntries(wrapped) as Libc;
}

(globalThis as Record<symbol, unknown>)[LIBC_HOOK] = failing;
hookWorkers(import.meta.url);
