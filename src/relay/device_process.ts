/**
 * A back-end that the relay starts itself (`--device-exec`): some end when their front-end leaves, and are started again for the next one.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { ERRNO, SysError } from "../ffi/mod.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import { pause } from "./ring_rest.ts";

/** How long it may take until its socket can be connected to, ms. */
const READY_MS = 10_000;
/** Between two looks, ms. */
const LOOK_MS = 20;
/** How long it may take to end when it is told to, ms. */
const END_MS = 2000;

/** What the status says of it. */
export interface DeviceProcessStatus {
  /** The command. */
  command: string;
  /** Its process; null while none runs. */
  pid: number | null;
  /** How often it was started. */
  starts: number;
  /** How the last one ended: `exit code 1` or `SIGSEGV`; null before one has. */
  last_end: string | null;
}

/** Starts a back-end when nobody listens, and ends it with the relay. */
export class DeviceProcess implements AsyncDisposable {
  readonly #command: string;
  readonly #log: (level: "warning" | "info", message: string) => void;
  #child: Deno.ChildProcess | undefined;
  /** Started by another process that has handed it over. */
  #adopted: number | undefined;
  #starts = 0;
  #lastEnd: string | undefined;
  #kept = false;

  /** Starts nothing yet. @param command for /bin/sh */
  constructor(command: string, log: (level: "warning" | "info", message: string) => void) {
    this.#command = command;
    this.#log = log;
  }

  /** See {@linkcode DeviceProcessStatus}. */
  get status(): DeviceProcessStatus {
    return { command: this.#command, pid: this.pid ?? null, starts: this.#starts, last_end: this.#lastEnd ?? null };
  }

  /** The process, while it runs. It leads a session and a process group of its own. */
  get pid(): number | undefined {
    if (this.#child !== undefined) return this.#child.pid;
    if (this.#adopted !== undefined && !isAlive(this.#adopted)) this.#adopted = undefined;
    return this.#adopted;
  }

  /** Takes over a process that was started elsewhere. */
  adopt(pid: number): void {
    this.#adopted = pid;
  }

  /** Another process has taken it over: it is not ended here. */
  keep(): void {
    this.#kept = true;
  }

  /**
   * Opens the device; where nobody listens, the back-end is started first, and waited for.
   *
   * @param open one attempt
   * @throws SvqError DEVICE_EXEC, and what `open` says of anything else than that nobody listens
   */
  async open(open: () => Promise<VhostBackend>): Promise<VhostBackend> {
    const deadline = performance.now() + READY_MS;
    const startsBefore = this.#starts;
    for (;;) {
      try {
        return await open();
      } catch (error) {
        if (!isAbsent(error)) throw error;
        if (this.pid === undefined && this.#starts > startsBefore) throw this.#failure(`it ended with ${this.#lastEnd}`, error);
        if (performance.now() > deadline) throw this.#failure(`nobody listens after ${READY_MS} ms`, error);
      }
      if (this.pid === undefined) this.#start();
      await pause(LOOK_MS);
    }
  }

  /** Starts it if it does not run: for a device that connects to us. */
  ensure(): void {
    if (this.pid === undefined) this.#start();
  }

  #failure(what: string, cause: unknown): SvqError {
    return new SvqError("DEVICE_EXEC", `The device's back-end was started (${this.#command}), but ${what}`, {
      exitCode: EXIT.noDevice,
      hint: "Its own messages are in the relay's log",
      cause,
    });
  }

  #start(): void {
    // A group of its own: what the command starts ends with it.
    const child = new Deno.Command("setsid", {
      args: ["/bin/sh", "-c", this.#command],
      ...{ stdin: "null", stdout: "inherit", stderr: "inherit" },
    }).spawn();
    this.#child = child;
    this.#starts++;
    this.#log("info", `started the device's back-end, process ${child.pid}`);
    child.status.then(({ code, signal }) => {
      if (this.#child === child) this.#child = undefined;
      this.#lastEnd = signal ?? `exit code ${code}`;
      if (!this.#kept) this.#log(code === 0 ? "info" : "warning", `the device's back-end ended with ${this.#lastEnd}`);
    });
  }

  /** Ends it: SIGTERM, and SIGKILL where that does not help. */
  async close(): Promise<void> {
    const pid = this.pid;
    if (pid === undefined || this.#kept) return;
    signalGroup(pid, "SIGTERM");
    for (const deadline = performance.now() + END_MS; this.pid !== undefined && performance.now() < deadline;) await pause(LOOK_MS);
    if (this.pid !== undefined) signalGroup(pid, "SIGKILL");
    await this.#child?.status;
  }

  /** The same as {@linkcode close}. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

function isAbsent(error: unknown): boolean {
  return error instanceof SysError && (error.errno === ERRNO.ENOENT || error.errno === ERRNO.ECONNREFUSED);
}

function signalGroup(pid: number, signal: Deno.Signal): void {
  try {
    Deno.kill(-pid, signal);
  } catch { /* it has ended */ }
}

function isAlive(pid: number): boolean {
  try {
    return !/^State:\s+Z/m.test(Deno.readTextFileSync(`/proc/${pid}/status`));
  } catch {
    return false;
  }
}
