/**
 * The old side of an upgrade: a relay hands its guest and its device to a process of a new version, and goes on itself where any
 * step fails.
 *
 * hold the front-end -> suspend the rings -> hold or close the device -> send state and descriptors -> the new process runs the
 * rings -> "go" -> this process ends
 *
 * @module
 */
import { type ErrorRecord, EXIT, SvqError, toErrorRecord } from "../errors.ts";
import { effectiveUid, listenUnix, type UnixListener } from "../ffi/mod.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import { VhostUserFrontEnd } from "../vhost_user/front_end.ts";
import type { Hold } from "../vhost_user/hold.ts";
import type { BackendServer } from "../vhost_user/server.ts";
import { VERSION } from "../version.ts";
import type { DeviceKeeper } from "./device_keeper.ts";
import {
  checkHandover,
  type ConfigHandover,
  type DeviceHandover,
  exportConfig,
  exportDevice,
  exportRelay,
  exportServer,
  FdList,
  type RelayHandover,
  type ServerHandover,
} from "./handover.ts";
import type { KeptAllocation } from "./iova_control.ts";
import { pause } from "./ring_rest.ts";
import type { Relay, RelayConfig } from "./relay.ts";
import type { FrontAddress } from "./service.ts";
import { UpgradeLink, type UpgradeMessage } from "./upgrade_link.ts";

/** Version of what is sent. */
export const UPGRADE_SCHEMA = "svq.upgrade/1";
/** Names the old process's socket to the new one. */
export const UPGRADE_VARIABLE = "SVQ_UPGRADE_SOCKET";

/** How long the new process may take to start, ms. */
const START_MS = 60_000;
/** How long it may take to make the rings run, ms. */
const TAKE_MS = 30_000;
/** How long a device that was closed may take until it can be opened again, ms. */
const REOPEN_MS = 5_000;

/** All that goes to the new process. Descriptors are places on the list that goes with it. */
export interface UpgradeState {
  /** Name of the relay. */
  name: string;
  /** Where the front-end is met. */
  front: FrontAddress;
  /** What the user has changed. */
  config: ConfigHandover;
  /** The connection of the front-end. */
  stream: number;
  /** Where front-ends connect. */
  listener: number;
  /** Where the control socket listens. */
  control: number;
  /** Where the device connects to us. */
  deviceListener: number;
  /** A disk in memory. */
  backing: number;
  /** The back-end that the relay has started itself. */
  deviceProcess: number | null;
  /** A connection to the device; null where it is to be opened. */
  device: DeviceHandover | null;
  /** What the VMM has set; null where none is connected. */
  relay: RelayHandover | null;
  /** What the VMM and the server have agreed on. */
  server: ServerHandover | null;
  /** Allocations by hand. */
  iova: readonly KeptAllocation[];
}

/** What the new process says of an attempt that failed in good order. */
export interface UpgradeFailure extends UpgradeMessage {
  /** It failed. */
  type: "failed";
  /** Why. */
  error: ErrorRecord;
  /** Where the rings stand, if it has started any. */
  bases: [index: number, base: number][];
  /** Is the connection to the device as it was handed over? */
  clean: boolean;
}

/** What an upgrade came to. */
export interface UpgradeReport {
  /** `svq.relay-upgrade/1`. */
  schema: "svq.relay-upgrade/1";
  /** Name of the relay. */
  name: string;
  /** Process that handed over. */
  pid_before: number;
  /** Process that goes on. */
  pid: number;
  /** Version of the program before. */
  version_before: string;
  /** Version now. */
  version: string;
  /** How long the rings stood still, ms. */
  stall_ms: number;
}

/** The service of which the relay is part. */
export interface UpgradeHost {
  /** Name of the relay. */
  name: string;
  /** Where the front-end is met. */
  front: FrontAddress;
  /** What the user has chosen. */
  config: RelayConfig;
  /** Held: no front-end is accepted, and none is listened to. */
  input: Hold;
  /** The relay, where there is one. */
  relay: () => Relay | undefined;
  /** The server of the front-end, where one is connected. */
  server: () => BackendServer | undefined;
  /** Where front-ends connect. */
  listener: () => number | undefined;
  /** The control socket. */
  control: () => number;
  /** The device. */
  keeper: DeviceKeeper;
  /** What the device needs besides. */
  source: { readonly listener: UnixListener | undefined; keep(device: VhostBackend): number | undefined };
  /** The back-end that the relay has started itself. */
  deviceProcess: () => number | undefined;
  /** Allocations by hand. */
  kept: () => readonly KeptAllocation[];
  /** Path of a socket for the new process. */
  path: string;
  /** Where log lines go. */
  log: (level: "error" | "warning" | "info", message: string) => void;
}

/** What is asked of an upgrade. */
export interface UpgradeRequest {
  /** The program and the words in front of the relay's own. */
  program: readonly string[];
  /** The words of the relay. */
  args: readonly string[];
  /** How long the device may take to give back what it has, ms. */
  drainTimeoutMs: number;
}

async function within<T>(ms: number, what: string, work: Promise<T>): Promise<T> {
  work.catch(() => {});
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new SvqError("UPGRADE_TIMEOUT", `${what} took longer than ${ms} ms`)), ms);
  });
  try {
    return await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** One attempt. */
export class Upgrade {
  readonly #host: UpgradeHost;
  readonly #request: UpgradeRequest;
  /** What takes each step back, the last one first. */
  readonly #undo: (() => Promise<void> | void)[] = [];
  #child: Deno.ChildProcess | undefined;
  /** The new process may use what it was given. */
  #sent = false;
  /** The new process may have taken requests of the guest. */
  #touched = false;
  #failure: UpgradeFailure | undefined;

  /** Nothing is done yet. */
  constructor(host: UpgradeHost, request: UpgradeRequest) {
    this.#host = host;
    this.#request = request;
  }

  /** The new process, once it has been told to go on alone. */
  get child(): Deno.ChildProcess | undefined {
    return this.#child;
  }

  /**
   * Resolves when the new process goes on alone: nothing that it has may be used here any more.
   *
   * @throws SvqError UPGRADE_FAILED (exit code 7): this process goes on; with exit code 8 where not even that could be done
   */
  async run(): Promise<UpgradeReport> {
    const host = this.#host;
    let link: UpgradeLink | undefined;
    let stage = "start the new version";
    try {
      this.#check();
      const hello = await this.#start();
      link = hello.link;
      const begun = performance.now();
      stage = "stop reading from the VMM";
      this.#undo.push(() => host.input.release());
      await within(this.#request.drainTimeoutMs, "The VMM's last request", host.input.hold());
      this.#check();
      const state: Partial<UpgradeState> = {};
      const list = new FdList();
      stage = "stop the rings";
      await this.#suspend();
      await this.#exportFront(state, list);
      stage = "give up the device";
      await this.#exportDevice(state, list);
      stage = "hand over";
      this.#sent = true;
      await link.send({ type: "state", schema: UPGRADE_SCHEMA, state }, list.fds);
      await within(TAKE_MS, "Taking over", this.#taken(link));
      await link.send({ type: "go" });
      const stall_ms = Math.round(performance.now() - begun);
      host.log("info", `process ${this.#child!.pid} (version ${hello.version}) goes on; the rings stood still for ${stall_ms} ms`);
      return {
        schema: "svq.relay-upgrade/1",
        ...{ name: host.name, pid_before: Deno.pid, pid: this.#child!.pid },
        ...{ version_before: VERSION, version: hello.version, stall_ms },
      };
    } catch (error) {
      throw await this.#takeBack(stage, error);
    } finally {
      link?.close();
    }
  }

  #check(): void {
    const relay = this.#host.relay();
    if (relay !== undefined) checkHandover(relay);
    if (this.#host.keeper.error !== undefined) {
      throw new SvqError("UPGRADE_REFUSED", "The relay cannot be upgraded now: its device is away");
    }
  }

  async #start(): Promise<{ link: UpgradeLink; version: string }> {
    const { program, args } = this.#request;
    const env = Deno.env.toObject();
    // Of this process only: the descriptors and the life signs that the service manager knows it by.
    for (const name of ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"]) delete env[name];
    env[UPGRADE_VARIABLE] = this.#host.path;
    using listener = listenUnix(this.#host.path, { mode: 0o600 });
    const child = new Deno.Command(program[0]!, {
      args: [...program.slice(1), ...args],
      ...{ env, clearEnv: true, stdin: "null", stdout: "inherit", stderr: "inherit" },
    }).spawn();
    this.#child = child;
    const ended = child.status.then(({ code }) => {
      throw new SvqError(
        "UPGRADE_ENDED",
        `The new version ended with exit code ${code} before it took over; its messages are in the relay's log`,
      );
    });
    return await within(START_MS, "Starting the new version", Promise.race([this.#hello(listener, child.pid), ended]));
  }

  // Whoever else connects, as the same user, is sent away.
  async #hello(listener: UnixListener, pid: number): Promise<{ link: UpgradeLink; version: string }> {
    for (;;) {
      const stream = await listener.accept();
      const peer = stream.peerCredentials();
      const link = new UpgradeLink(stream);
      if (peer.pid !== pid || (peer.uid !== effectiveUid() && peer.uid !== 0)) {
        link.close();
        continue;
      }
      const received = await link.receive();
      for (const fd of received?.fds ?? []) fd.close();
      const { type, schema, version } = received?.message ?? { type: "nothing" } as UpgradeMessage;
      if (type === "hello" && schema === UPGRADE_SCHEMA && typeof version === "string") return { link, version };
      link.close();
      throw new SvqError("UPGRADE_STATE", `The new version does not take over ${UPGRADE_SCHEMA}`);
    }
  }

  async #suspend(): Promise<void> {
    const relay = this.#host.relay();
    if (relay === undefined) return;
    const suspended = relay.suspend();
    this.#undo.push(() => {
      // A device that is late is not waited for here: its rings start again when it has given them back.
      const resumed = suspended.catch(() => {}).then(() => relay.resume());
      resumed.catch((error) => this.#host.log("error", toErrorRecord(error).message));
      return this.#late ? undefined : resumed;
    });
    try {
      await within(this.#request.drainTimeoutMs, "Giving back what the device has", suspended);
    } catch (error) {
      this.#late = error instanceof SvqError && error.code === "UPGRADE_TIMEOUT";
      throw error;
    }
    await relay.withdrawDoorbells();
  }

  #late = false;

  async #exportFront(state: Partial<UpgradeState>, list: FdList): Promise<void> {
    const { name, front, config, source } = this.#host;
    const relay = this.#host.relay();
    const server = this.#host.server();
    if (server !== undefined) this.#undo.push(() => server.releaseChannel());
    Object.assign(state, {
      ...{ name, front, config: exportConfig(config) },
      stream: list.add(server?.fd),
      listener: list.add(this.#host.listener()),
      control: list.add(this.#host.control()),
      deviceListener: list.add(source.listener?.fd),
      relay: relay === undefined || server === undefined ? null : exportRelay(relay, list),
      server: server === undefined ? null : exportServer(await server.state(), list),
      iova: this.#host.kept(),
      deviceProcess: this.#host.deviceProcess() ?? null,
    });
  }

  // A connection goes along. What the kernel has opened is bound to the memory of this process, and what is embedded lives in it:
  // those are closed here and opened there.
  async #exportDevice(state: Partial<UpgradeState>, list: FdList): Promise<void> {
    const { keeper, source } = this.#host;
    const relay = this.#host.relay();
    const device = keeper.device;
    Object.assign(state, { device: null, backing: -1 });
    if (device === undefined) return;
    if (device instanceof VhostUserFrontEnd) {
      this.#undo.push(() => this.#takeConnection(relay, device));
      state.device = exportDevice(await device.hold(), list);
      return;
    }
    state.backing = list.add(source.keep(device));
    this.#undo.push(() => this.#reopen(relay));
    if (relay !== undefined) {
      device.onFailure = undefined;
      device.onConfigChange = undefined;
    }
    await keeper.leave();
  }

  async #taken(link: UpgradeLink): Promise<void> {
    for (;;) {
      const received = await link.receive();
      for (const fd of received?.fds ?? []) fd.close();
      if (received === undefined) throw new SvqError("UPGRADE_ENDED", "The new version ended while it took over");
      const { message } = received;
      if (message.type === "touched") this.#touched = true;
      else if (message.type === "running") return;
      else if (message.type === "failed") {
        this.#failure = message as UpgradeFailure;
        throw new SvqError("UPGRADE_ENDED", `The new version could not take over: ${this.#failure.error.message}`);
      } else throw new SvqError("UPGRADE_STATE", `The new version said ${message.type}`);
    }
  }

  async #takeBack(stage: string, cause: unknown): Promise<SvqError> {
    const reason = toErrorRecord(cause);
    this.#host.log("warning", `the upgrade failed, this process goes on: cannot ${stage}: ${reason.message}`);
    const child = this.#child;
    this.#child = undefined;
    if (child !== undefined) {
      // Certain that it touches nothing any more, whatever it was doing.
      try {
        child.kill("SIGKILL");
      } catch { /* it has ended */ }
      await child.status;
    }
    try {
      for (const undo of this.#undo.reverse()) await undo();
    } catch (error) {
      // The front-end is served whatever happened: it may reset the device.
      this.#host.input.release();
      return new SvqError(
        "UPGRADE_FAILED",
        `The upgrade failed (${reason.message}), and the relay cannot go on: ${toErrorRecord(error).message}`,
        {
          exitCode: EXIT.failedAfterSwitchover,
          hint: "Restart the relay; the VMM connects again and resets the device if need be",
          cause,
        },
      );
    }
    if (reason.code === "UPGRADE_REFUSED" && cause instanceof SvqError) {
      return new SvqError(cause.code, cause.message, { exitCode: EXIT.migrationAborted, hint: cause.hint, cause });
    }
    return new SvqError("UPGRADE_FAILED", `The relay was not upgraded and goes on as it was: cannot ${stage}: ${reason.message}`, {
      exitCode: EXIT.migrationAborted,
      hint: reason.hint,
      cause,
    });
  }

  // The rings stand where the new process says, or where the record says if it ended without a word.
  #setPositions(relay: Relay): void {
    const bases = this.#failure?.bases;
    for (const queue of relay.queues) {
      const base = bases?.find(([index]) => index === queue.index)?.[1];
      if (base !== undefined && queue.state === "stopped") queue.base = base;
      else if (bases === undefined && this.#touched) queue.distrust();
    }
  }

  async #takeConnection(relay: Relay | undefined, device: VhostUserFrontEnd): Promise<void> {
    const unknown = this.#sent && this.#failure?.clean !== true;
    if (relay === undefined) return device.release();
    // What the new process has left in the connection, and started in the device, nobody knows: a new connection begins with neither.
    if (unknown && /^unix:/.test(device.info.address)) {
      device.onFailure = undefined;
      await device.close();
      return await this.#reopen(relay);
    }
    device.release();
    if (this.#touched && unknown) { for (const { index, kicked } of relay.queues) if (kicked) await device.getVringBase(index); }
    await relay.attach(device);
    this.#setPositions(relay);
  }

  async #reopen(relay: Relay | undefined): Promise<void> {
    const { keeper } = this.#host;
    const deadline = performance.now() + REOPEN_MS;
    for (let wait = 10;; wait *= 2) {
      try {
        const device = await keeper.open();
        if (relay === undefined) return;
        relay.net.lost();
        await relay.attach(device);
        return this.#setPositions(relay);
      } catch (error) {
        if (performance.now() > deadline) throw error;
        await pause(wait);
      }
    }
  }
}
