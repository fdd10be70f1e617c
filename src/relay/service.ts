/**
 * A relay as a service: it opens the device, waits for a front-end, relays until the front-end leaves, and starts over.
 * The control socket shows and changes it meanwhile.
 *
 * @module
 */
import { type ErrorRecord, EXIT, SvqError, toErrorRecord } from "../errors.ts";
import { connectUnix, dupFd, listenUnix, OwnedFd, type UnixListener, UnixStream } from "../ffi/mod.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import { featureNames } from "../uapi/virtio.ts";
import { BackendServer } from "../vhost_user/server.ts";
import { ControlServer } from "./control.ts";
import { controlPath } from "./runtime_dir.ts";
import { MASKED_FEATURES, Relay, type RelayConfig, type RelayMode } from "./relay.ts";
import { pause } from "./queue_steps.ts";
import { queueStatus, type RelayStatus } from "./status.ts";
import { relayVrings } from "./vring_dump.ts";

/** Where the front-end is met. */
export type FrontAddress = { kind: "listen"; path: string } | { kind: "connect"; path: string } | { kind: "fd"; fd: number };

/** What a {@linkcode RelayService} is made of. */
export interface RelayServiceOptions {
  /** Name; its control socket is called after it. */
  name: string;
  /** Where the front-end is met. */
  front: FrontAddress;
  /** The device's address, as the user wrote it. */
  device: string;
  /** Opens the device; called again after a front-end has left. */
  openDevice: () => Promise<VhostBackend>;
  /** Modes and time-outs; changed by the control socket. */
  config: RelayConfig;
  /** Where log lines go. */
  log: (level: "error" | "warning" | "info" | "debug", message: string) => void;
}

const RETRY_MIN_MS = 100;
const RETRY_MAX_MS = 5000;
const MODES: readonly RelayMode[] = ["auto", "passthrough", "notify", "used", "shadow"];

/** The text form of a front address. */
export function frontText(front: FrontAddress): string {
  return front.kind === "fd" ? `fd:${front.fd}` : front.kind === "listen" ? `unix:${front.path}` : `connect:${front.path}`;
}

/** Runs a relay until stopped. */
export class RelayService implements AsyncDisposable {
  readonly #options: RelayServiceOptions;
  readonly #begun = performance.now();
  readonly #stopped = Promise.withResolvers<void>();
  #control: ControlServer | undefined;
  #listener: UnixListener | undefined;
  #fd: OwnedFd | undefined;
  #stream: UnixStream | undefined;
  #device: VhostBackend | undefined;
  #relay: Relay | undefined;
  #stopping = false;
  #started = false;
  #deviceError: ErrorRecord | undefined;

  /** Opens nothing yet. */
  constructor(options: RelayServiceOptions) {
    this.#options = options;
  }

  /** The relay of the current front-end, or the one that waits for it. */
  get relay(): Relay | undefined {
    return this.#relay;
  }

  /**
   * Opens the device and both sockets; resolves when a front-end can connect.
   *
   * @throws what opening the device says; SysError EADDRINUSE when a relay of that name runs
   */
  async start(): Promise<void> {
    const { name, front } = this.#options;
    this.#control = new ControlServer(controlPath(name), {
      status: () => this.status(),
      set: (params) => this.set(params),
      stop: () => {
        this.stop();
        return { stopping: true };
      },
      vrings: (params) => this.#vrings(params),
    });
    try {
      this.#device = await this.#options.openDevice();
      if (front.kind === "listen") this.#listener = listenUnix(front.path);
      if (front.kind === "fd") this.#fd = dupFd(front.fd);
      this.#newRelay();
      this.#started = true;
    } catch (error) {
      await this.close();
      throw error;
    }
  }

  #newRelay(): void {
    this.#relay = new Relay(this.#device!, this.#options.config, {
      log: (message) => this.#options.log("info", message),
      error: (error) => this.#options.log("error", error.message),
    });
    this.#relay.onFailure = (error) => this.#deviceError = toErrorRecord(error);
  }

  /** Serves front-ends, one after the other, until {@linkcode stop}. */
  async run(): Promise<void> {
    while (!this.#stopping) {
      const stream = await Promise.race([this.#nextFront(), this.#stopped.promise]);
      if (stream === undefined) break;
      this.#stream = stream;
      await this.#serve(stream);
      this.#stream = undefined;
      await this.#relay!.close();
      this.#relay = undefined;
      if (this.#stopping || this.#fd !== undefined) break;
      await this.#renewDevice();
    }
    await this.close();
  }

  async #serve(stream: UnixStream): Promise<void> {
    const { log } = this.#options;
    const relay = this.#relay!;
    log("info", "the front-end connected");
    const server = new BackendServer(stream, relay, {
      offerLog: true,
      onError: (error) => log("error", error.message),
    });
    const stop = this.#stopped.promise.then(async () => {
      await relay.suspend().catch((error) => log("error", toErrorRecord(error).message));
      stream.shutdown();
    });
    const error = await server.run();
    if (error !== undefined) log("error", `front-end: ${toErrorRecord(error).message}`);
    if (this.#stopping) await stop;
    log("info", "the front-end left");
  }

  async #nextFront(): Promise<UnixStream> {
    const { front } = this.#options;
    if (this.#listener !== undefined) return await this.#listener.accept();
    if (this.#fd !== undefined) return new UnixStream(new OwnedFd(this.#fd.release()));
    for (let wait = RETRY_MIN_MS;; wait = Math.min(wait * 2, RETRY_MAX_MS)) {
      try {
        return connectUnix((front as { path: string }).path);
      } catch (error) {
        this.#options.log("debug", toErrorRecord(error).message);
        await Promise.race([pause(wait), this.#stopped.promise]);
        if (this.#stopping) throw error;
      }
    }
  }

  // A fresh front-end meets a fresh device. Daemons are left and connected to again, as if the VMM itself had gone;
  // embedded devices live in this process (a disk in memory would be lost) and are reset.
  async #renewDevice(): Promise<void> {
    const old = this.#device!;
    if (old.info.kind === "sim" && this.#deviceError === undefined) {
      await old.reset();
      await old.setMemTable([]);
    } else {
      await old.close();
      this.#device = undefined;
      for (let wait = RETRY_MIN_MS; !this.#stopping; wait = Math.min(wait * 2, RETRY_MAX_MS)) {
        try {
          this.#device = await this.#options.openDevice();
          break;
        } catch (error) {
          this.#deviceError = toErrorRecord(error);
          this.#options.log("warning", `the device is away: ${this.#deviceError.message}`);
          await Promise.race([pause(wait), this.#stopped.promise]);
        }
      }
      if (this.#device === undefined) return;
    }
    this.#deviceError = undefined;
    this.#newRelay();
  }

  get #state(): string {
    if (this.#stopping) return "stopping";
    if (this.#deviceError !== undefined) return "device-lost";
    if (!this.#started) return "starting";
    if (this.#stream === undefined) return "waiting";
    return this.#relay?.queues.some((queue) => queue.running) ? "running" : "connected";
  }

  /** The document `svq.relay/1`. */
  async status(): Promise<RelayStatus> {
    const { name, front, device, config } = this.#options;
    const relay = this.#relay;
    const offered = await this.#device?.getFeatures().catch(() => 0n) ?? 0n;
    return {
      schema: "svq.relay/1",
      name,
      pid: Deno.pid,
      state: this.#state,
      mode: config.mode,
      force_shadow: config.forceShadow,
      front: frontText(front),
      device,
      uptime_ms: Math.round(performance.now() - this.#begun),
      logging: relay?.logging ?? false,
      marking_all: relay?.markingAll ?? false,
      features: `0x${(relay?.features ?? 0n).toString(16)}`,
      offered_features: `0x${(offered & ~MASKED_FEATURES).toString(16)}`,
      queue_num: this.#device?.info.queueNum ?? 0,
      config: relay?.configSeen === undefined ? null : Array.from(relay.configSeen, (byte) => byte.toString(16).padStart(2, "0")).join(""),
      masked_features: featureNames(this.#device?.info.deviceId ?? 0, offered & MASKED_FEATURES),
      maps: { guest: relay?.memory.regions.length ?? 0, shadow: relay?.arena === undefined ? 0 : 1 },
      pins_memory: this.#device?.info.pinsMemory ?? null,
      queues: relay?.queues.map((queue) => queueStatus(relay, queue)) ?? [],
      error: this.#deviceError ?? null,
    };
  }

  /** Changes mode, force_shadow or switch_timeout_ms; resolves with the status when every queue is in its mode. */
  async set(params: Record<string, unknown>): Promise<RelayStatus> {
    const { config } = this.#options;
    const { mode, queue, force_shadow, switch_timeout_ms, ...others } = params;
    for (const name of Object.keys(others)) throw badParameter(`There is nothing called "${name}" to set`);
    if (mode !== undefined && !MODES.includes(mode as RelayMode)) throw badParameter(`"${mode}" is no mode: ${MODES.join(", ")}`);
    if (force_shadow !== undefined && typeof force_shadow !== "boolean") throw badParameter("force_shadow is true or false");
    if (switch_timeout_ms !== undefined && !(typeof switch_timeout_ms === "number" && switch_timeout_ms >= 0)) {
      throw badParameter("switch_timeout_ms is a number of milliseconds");
    }
    if (queue !== undefined && !(typeof queue === "number" && Number.isInteger(queue) && queue >= 0 && mode !== undefined)) {
      throw badParameter("queue is a queue's number, and goes with a mode");
    }
    if (mode !== undefined && queue !== undefined) {
      (config.queueModes ??= new Map()).set(queue as number, mode as RelayMode);
    } else if (mode !== undefined) {
      config.mode = mode as RelayMode;
      delete config.queueModes;
    }
    if (force_shadow !== undefined) config.forceShadow = force_shadow;
    if (switch_timeout_ms !== undefined) config.switchTimeoutMs = switch_timeout_ms;
    await this.#relay?.applyMode();
    return await this.status();
  }

  #vrings(params: Record<string, unknown>): unknown {
    if (this.#relay === undefined) throw new SvqError("DEVICE_LOST", "The device is away, there are no rings", { exitCode: EXIT.noDevice });
    return relayVrings(this.#options.name, this.#relay, params);
  }

  /** Asks {@linkcode run} to end: rings are drained and handed back first. */
  stop(): void {
    this.#stopping = true;
    this.#stopped.resolve();
  }

  /** Closes everything. */
  async close(): Promise<void> {
    this.stop();
    this.#listener?.close();
    this.#fd?.close();
    await this.#relay?.close();
    this.#relay = undefined;
    await this.#device?.close();
    this.#device = undefined;
    this.#control?.close();
  }

  /** The same as {@linkcode close}. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

function badParameter(message: string): SvqError {
  return new SvqError("BAD_PARAMETER", message, { exitCode: EXIT.usage });
}
