/**
 * What a service manager expects of its services: word of their state (sd_notify(3)), signs of life (WATCHDOG_USEC), and
 * that they take the sockets which it opened for them (sd_listen_fds(3)). Without one, everything here does nothing.
 *
 * @module
 */
import { sendDatagram } from "../ffi/mod.ts";

const FIRST_FD = 3;

/** The service manager that started this process, if one did. */
export class ServiceManager implements Disposable {
  readonly #path: string | undefined;
  readonly #watchdogUs: number;
  #timer: ReturnType<typeof setInterval> | undefined;

  /** Reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID. @param env an environment variable */
  constructor(env: (name: string) => string | undefined) {
    const path = env("NOTIFY_SOCKET");
    // Other transports (vsock:) are for virtual machines.
    this.#path = path !== undefined && /^[/@]./.test(path) ? path : undefined;
    const forUs = (env("WATCHDOG_PID") ?? String(Deno.pid)) === String(Deno.pid);
    this.#watchdogUs = this.#path !== undefined && forUs ? Number(env("WATCHDOG_USEC") ?? 0) || 0 : 0;
  }

  #send(lines: readonly string[]): void {
    if (this.#path === undefined) return;
    try {
      sendDatagram(this.#path, new TextEncoder().encode(lines.join("\n")));
    } catch { /* a manager that went away is no reason to stop */ }
  }

  /** The service can be used. @param status one line for `systemctl status` */
  ready(status: string): void {
    this.#send(["READY=1", `STATUS=${oneLine(status)}`]);
  }

  /** What it does now, one line. */
  status(text: string): void {
    this.#send([`STATUS=${oneLine(text)}`]);
  }

  /** Another process, a child of this one, is the service from now on. */
  handOver(pid: number): void {
    this.#send([`MAINPID=${pid}`]);
  }

  /** It has begun to stop. */
  stopping(): void {
    this.#send(["STOPPING=1"]);
  }

  /**
   * Sends a sign of life twice per interval that the manager asks for, as long as `alive` resolves: a service that hangs is
   * restarted.
   */
  watch(alive: () => Promise<unknown>): void {
    if (this.#watchdogUs === 0) return;
    let busy = false;
    this.#timer = setInterval(async () => {
      if (busy) return;
      busy = true;
      try {
        await alive();
        this.#send(["WATCHDOG=1"]);
      } catch {
        /* no sign of life */
      } finally {
        busy = false;
      }
    }, Math.max(this.#watchdogUs / 2000, 1));
  }

  /** Ends the signs of life. */
  [Symbol.dispose](): void {
    if (this.#timer !== undefined) clearInterval(this.#timer);
  }
}

function oneLine(text: string): string {
  // deno-lint-ignore no-control-regex
  return text.replace(/[\x00-\x1f]+/g, " ");
}

/** The descriptors that the service manager passes to this process, by LISTEN_PID and LISTEN_FDS; they begin at 3. */
export function passedFds(env: (name: string) => string | undefined): number[] {
  if (env("LISTEN_PID") !== String(Deno.pid)) return [];
  const count = Number(env("LISTEN_FDS") ?? 0);
  if (!Number.isSafeInteger(count) || count < 0) return [];
  return Array.from({ length: count }, (_, index) => FIRST_FD + index);
}
