/**
 * SIGINT and SIGTERM; SIGUSR1, on which the runtime would open a debugger, is ignored.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";

let controller: AbortController | undefined;

/**
 * A signal that aborts at the first SIGINT or SIGTERM (and when the reader of stdout goes away); its `reason` is an
 * SvqError INTERRUPTED with exit code 130 or 143. A second signal ends the process at once with that code.
 *
 * A command that runs until it is stopped cleans up and returns (exit 0). A command that was cut short throws the reason.
 */
export function untilSignal(): AbortSignal {
  if (controller !== undefined) return controller.signal;
  controller = new AbortController();
  keepDebuggerShut();
  listen("SIGINT", controller, EXIT.interrupted);
  listen("SIGTERM", controller, EXIT.terminated);
  return controller.signal;
}

// The runtime installs its handler some time after the program has begun, and nothing tells when.
function keepDebuggerShut(): void {
  // Loaded here: what prints a version and ends needs no libc.
  import("../ffi/thread.ts").then(({ ignoreDebuggerSignal }) => {
    let left = 150;
    const timer = setInterval(() => {
      ignoreDebuggerSignal();
      if (--left === 0) clearInterval(timer);
    }, 20);
    Deno.unrefTimer(timer);
    ignoreDebuggerSignal();
  });
}

function listen(name: "SIGINT" | "SIGTERM", controller: AbortController, exitCode: typeof EXIT.interrupted | typeof EXIT.terminated) {
  Deno.addSignalListener(name, () => {
    if (controller.signal.aborted) Deno.exit(exitCode);
    controller.abort(new SvqError("INTERRUPTED", `Stopped by ${name}`, { exitCode }));
  });
}

/** Aborts {@linkcode untilSignal}'s signal where a command listens to it: nobody reads the output any more. */
export function stopBecauseUnread(): void {
  controller?.abort(new SvqError("UNREAD", "Nobody reads the output any more"));
}

/** Resolves when `signal` aborts. */
export function aborted(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve();
  return new Promise((resolve) => signal.addEventListener("abort", () => resolve(), { once: true }));
}

/** Resolves after `ms`, or as soon as `signal` aborts. */
export function pauseUnless(ms: number, signal?: AbortSignal): Promise<void> {
  if (signal === undefined) return new Promise((resolve) => setTimeout(resolve, ms));
  let timer: ReturnType<typeof setTimeout> | undefined;
  const slept = new Promise<void>((resolve) => timer = setTimeout(resolve, ms));
  return Promise.race([slept, aborted(signal)]).finally(() => clearTimeout(timer));
}
