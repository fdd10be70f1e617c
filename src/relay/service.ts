/**
 * A relay as a service: it opens the device, waits for a front-end, relays until the front-end leaves, and starts over.
 * The control socket shows and changes it meanwhile.
 *
 * @module
 */
import { EXIT, SvqError, toErrorRecord } from "../errors.ts";
import { boundsChecked, connectUnix, dupFd, isListening, listenUnix, OwnedFd, UnixListener, UnixStream } from "../ffi/mod.ts";
import { VIRTIO_ID } from "../uapi/virtio.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import type { MessageHook } from "../vhost_user/connection.ts";
import { RING_LIMIT } from "../uapi/vhost_user.ts";
import type { NetStateDocument } from "../net/state.ts";
import { Hold } from "../vhost_user/hold.ts";
import { BackendServer, type ServerState } from "../vhost_user/server.ts";
import { type ControlMethod, ControlServer } from "./control.ts";
import type { DeviceProcess } from "./device_process.ts";
import { DeviceKeeper, RETRY_MAX_MS, RETRY_MIN_MS } from "./device_keeper.ts";
import { FrameReader } from "./frame_reader.ts";
import { RelayIova } from "./iova_control.ts";
import { MessageLog, type TracedMessage } from "./message_log.ts";
import { importConfig, importDevice, importServer, restoreRelay } from "./handover.ts";
import { controlPath, upgradePath } from "./runtime_dir.ts";
import type { Takeover } from "./takeover.ts";
import { Upgrade, type UpgradeHost, type UpgradeReport } from "./upgrade.ts";
import { VhostUserFrontEnd } from "../vhost_user/front_end.ts";
import { maskedOf } from "../vhost/masked.ts";
import { Relay, type RelayConfig, type RelayMode } from "./relay.ts";
import { pause } from "./ring_rest.ts";
import { mapsStatus, memoryStatus, netStatus, queueStatus, type RelayStatus } from "./status.ts";
import { premap, type PremapReport } from "./premap.ts";
import { relayVrings } from "./vring_dump.ts";

/** Where the front-end is met. A descriptor is a connection, or a socket that listens. */
export type FrontAddress = { kind: "listen"; path: string } | { kind: "connect"; path: string } | { kind: "fd"; fd: number };

/** What a {@linkcode RelayService} is made of. */
export interface RelayServiceOptions {
  /** Name; its control socket is called after it. */
  name: string;
  /** Where the front-end is met. */
  front: FrontAddress;
  /** The device's address, as the user wrote it. */
  device: string;
  /** Opens the device; called again after a front-end has left, and when the device was lost. */
  openDevice: (options: { onMessage?: MessageHook }) => Promise<VhostBackend>;
  /** The device connects to us: the relay is ready before it is there. */
  deviceConnects?: boolean;
  /** Refuse guest memory and dirty logs that the VMM could shorten under the relay. */
  requireSealed?: boolean;
  /** How long a relay that is stopped waits for the device to give back what it has, ms; then it ends as if it were killed. Default: `config.stopTimeoutMs`. */
  drainTimeoutMs?: number;
  /** The time is over: the process is to end at once, without closing what the device may still use. */
  onDrainTimeout?: () => void;
  /** What of the device goes to a process of a new version, besides its connection. Absent: the relay cannot be upgraded. */
  source?: UpgradeHost["source"];
  /** The device's back-end, where the relay starts it itself. Closed by its owner. */
  deviceProcess?: DeviceProcess | undefined;
  /** The words with which this relay was started, for a process of a new version. */
  args?: readonly string[];
  /** This process goes on with the relay of another one. */
  takeover?: Takeover | undefined;
  /** Another process goes on with this relay: its id. */
  onHandedOver?: (pid: number) => void;
  /** Modes and time-outs; changed by the control socket. */
  config: RelayConfig;
  /** Where log lines go. */
  log: (level: "error" | "warning" | "info" | "debug", message: string) => void;
}

/** A front-end that stayed so long is connected to again soon, ms. */
const FRONT_GOOD_MS = 2000;
/** Longest time that one question for messages waits, ms. */
const MAX_WAIT_MS = 10_000;
/** Beyond this a timer would fire at once. */
const MAX_TIMER_MS = 2 ** 31 - 1;
/** Longest wait for the relay of the next front-end, ms. */
const NEXT_RELAY_MS = 2000;
/** How long the device may take to give back what it has for an upgrade, ms. */
const UPGRADE_DRAIN_MS = 10_000;
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
  readonly #messages = new MessageLog();
  readonly #frames: FrameReader;
  readonly #keeper: DeviceKeeper;
  readonly #iova: RelayIova;
  #connectedMs = -Infinity;
  #frontWaitMs = RETRY_MIN_MS;
  #relay: Relay | undefined;
  #stopping = false;
  #started = false;
  /** Held while the relay is being upgraded: no front-end is accepted or listened to. */
  readonly #input = new Hold();
  #server: BackendServer | undefined;
  #upgrade: Promise<UpgradeReport> | undefined;
  /** Another process has everything that this one had. */
  #handedOver = false;
  /** The front-end that this process has taken over. */
  #taken: { stream: UnixStream; server: ServerState } | undefined;

  /** Opens nothing yet. */
  constructor(options: RelayServiceOptions) {
    this.#options = options;
    this.#iova = new RelayIova(options);
    this.#frames = new FrameReader(options.name);
    this.#keeper = new DeviceKeeper({ open: options.openDevice, onMessage: this.#messages.hook("device"), log: options.log });
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
    const { name, front, takeover } = this.#options;
    if (takeover !== undefined) return await this.#takeOver(takeover);
    this.#control = new ControlServer(controlPath(name), this.#methods());
    try {
      if (this.#options.deviceConnects !== true) await this.#keeper.open();
      if (front.kind === "listen") this.#listener = listenUnix(front.path);
      if (front.kind === "fd" && isListening(front.fd)) this.#listener = new UnixListener(dupFd(front.fd));
      else if (front.kind === "fd") this.#fd = dupFd(front.fd);
      if (this.#keeper.device !== undefined) this.#newRelay(this.#keeper.device);
      this.#started = true;
    } catch (error) {
      await this.close();
      throw error;
    }
  }

  #methods(): Record<string, ControlMethod> {
    return {
      status: () => this.status(),
      set: (params) => this.set(params),
      stop: () => {
        this.stop();
        return { stopping: true };
      },
      net_state: async () => netState(await this.#relayNow()),
      frames: async (params) => await this.#frames.read(await this.#relayNow(), params),
      vrings: (params) => this.#vrings(params),
      messages: (params) => this.#readMessages(params),
      iova: async () => this.#iova.show(await this.#relayNow()),
      iova_alloc: async (params) => await this.#iova.alloc(await this.#relayNow(), params),
      iova_free: async (params) => await this.#iova.free(await this.#relayNow(), params),
      premap: async (params) => await this.#premap(params),
      upgrade: (params) => this.upgrade(params),
    };
  }

  // The relay of another process, which waits until the rings run here, or until it hears that they cannot.
  async #takeOver(takeover: Takeover): Promise<void> {
    const { state, fds } = takeover;
    const { front, config } = this.#options;
    try {
      importConfig(config, state.config);
      this.#iova.adopt(state.iova);
      await this.#takeDevice(takeover);
      const listener = fds.take(state.listener);
      if (listener !== undefined) this.#listener = new UnixListener(listener, front.kind === "listen" ? front.path : undefined);
      if (this.#keeper.device !== undefined) this.#newRelay(this.#keeper.device);
      if (state.relay !== null) await restoreRelay(this.#relay!, state.relay, fds, () => takeover.touched());
      const stream = fds.take(state.stream);
      if (stream !== undefined) this.#taken = { stream: new UnixStream(stream), server: importServer(state.server!, fds) };
    } catch (error) {
      const relay = this.#relay;
      await relay?.suspend().catch(() => {});
      const bases = relay?.queues.map(({ index, base }) => [index, base] as const) ?? [];
      // Their paths and the connection belong to the other process.
      this.#listener?.keepPath();
      this.#options.source?.listener?.keepPath();
      await takeover.failed(error, bases, await this.#keeper.giveBack());
      throw error;
    }
    await takeover.running();
    const control = new UnixListener(fds.take(state.control)!, controlPath(this.#options.name));
    this.#control = new ControlServer(controlPath(this.#options.name), this.#methods(), control);
    if (this.#taken === undefined) takeover[Symbol.dispose]();
    this.#started = true;
  }

  async #takeDevice({ state, fds }: Takeover): Promise<void> {
    if (state.device === null) {
      if (this.#options.deviceConnects !== true) await this.#keeper.open();
      return;
    }
    const stream = fds.take(state.device.stream)!;
    const sockets = { stream, channel: fds.take(state.device.channel) };
    this.#keeper.adopt(VhostUserFrontEnd.adopt(importDevice(state.device), sockets, { onMessage: this.#messages.hook("device") }));
  }

  /**
   * Hands everything to a process of a new version, and ends then. Resolves when that one has taken over.
   *
   * @param params `program`: the new version and the words in front of the relay's own; `drain_timeout_ms`
   * @throws SvqError UPGRADE_REFUSED, UPGRADE_FAILED (exit code 7): this relay goes on
   */
  async upgrade({ program, drain_timeout_ms = UPGRADE_DRAIN_MS, ...others }: Record<string, unknown>): Promise<UpgradeReport> {
    const { source, args, name, front, config, log } = this.#options;
    for (const other of Object.keys(others)) throw badParameter(`There is no parameter "${other}"`);
    if (
      !(Array.isArray(program) && program.length > 0 && program.every((word) => typeof word === "string") &&
        String(program[0]).startsWith("/"))
    ) {
      throw badParameter("program is the new version's path and the words in front of the relay's own");
    }
    if (!(typeof drain_timeout_ms === "number" && drain_timeout_ms > 0)) throw badParameter("drain_timeout_ms is a number of milliseconds");
    if (source === undefined || args === undefined) throw refused("it was not started by svq relay run");
    if (this.#upgrade !== undefined || this.#stopping || !this.#started) throw refused("it is being upgraded, or stopped, or started");
    const upgrade = new Upgrade({
      ...{ name, front, config, input: this.#input, keeper: this.#keeper, source, log, path: upgradePath(name) },
      relay: () => this.#relay,
      server: () => this.#server,
      listener: () => this.#listener?.fd,
      control: () => this.#control!.fd,
      deviceProcess: () => this.#options.deviceProcess?.pid,
      kept: () => this.#iova.kept,
    }, { program, args, drainTimeoutMs: drain_timeout_ms });
    this.#upgrade = upgrade.run();
    try {
      const report = await this.#upgrade;
      this.#retire(report.pid);
      return report;
    } finally {
      this.#upgrade = undefined;
    }
  }

  // Nothing is shut down and no path is removed: another process uses all of it.
  #retire(pid: number): void {
    this.#handedOver = true;
    this.#listener?.keepPath();
    this.#options.source?.listener?.keepPath();
    this.#options.deviceProcess?.keep();
    this.#options.onHandedOver?.(pid);
    // Its answer to whoever asked goes out first.
    const answered = this.#control!.retire();
    answered.then(() => {
      this.#server?.close();
      this.#listener?.close();
      this.#input.release();
      this.stop();
    });
  }

  #newRelay(device: VhostBackend): void {
    const { config, log } = this.#options;
    // What lives in this process (embedded devices) or in the kernel cannot be connected to again.
    const lasting = device.info.kind === "vhost-user";
    const relay: Relay = new Relay(device, config, {
      log: (message) => log("info", message),
      error: (error) => log("error", error.message),
      ...(lasting ? { deviceLost: (error) => this.#keeper.recover(relay, error, () => this.#frontIsThere()) } : {}),
    });
    relay.onFailure = (error) => this.#keeper.error = toErrorRecord(error);
    this.#relay = relay;
    // Its steps are queued before any of the front-end's.
    this.#iova.restore(relay, (message) => log("warning", message)).catch(() => {});
  }

  // A VMM whose request waits for the device is not read from, so its end shows only by its process.
  #frontIsThere(): boolean {
    if (this.#stream === undefined || this.#stream.closed) return true;
    try {
      const { pid } = this.#stream.peerCredentials();
      if (pid > 0) Deno.statSync(`/proc/${pid}`);
      return true;
    } catch (error) {
      return !(error instanceof Deno.errors.NotFound);
    }
  }

  /** Serves front-ends, one after the other, until {@linkcode stop}. */
  async run(): Promise<void> {
    const { front } = this.#options;
    while (!this.#stopping) {
      if (this.#relay === undefined) {
        const device = this.#keeper.device ?? await this.#keeper.find();
        if (device === undefined) break;
        this.#newRelay(device);
      }
      const taken = this.#taken;
      this.#taken = undefined;
      const stream = taken?.stream ?? await Promise.race([this.#nextFront(), this.#stopped.promise]);
      if (stream === undefined) break;
      this.#stream = stream;
      await this.#serve(stream, taken?.server);
      this.#stream = undefined;
      await this.#keeper.interrupt();
      await this.#frames.end();
      await this.#relay!.close();
      this.#relay = undefined;
      if (this.#stopping || this.#handedOver || this.#fd !== undefined || front.kind === "fd" && this.#listener === undefined) break;
      await this.#leaveDevice();
    }
    await this.close();
  }

  async #serve(stream: UnixStream, resume: ServerState | undefined): Promise<void> {
    const { log } = this.#options;
    const relay = this.#relay!;
    if (resume === undefined) log("info", "the front-end connected");
    const server = this.#server = new BackendServer(stream, relay, {
      hold: this.#input,
      resume,
      offerLog: relay.canLog,
      requireSealed: this.#options.requireSealed === true,
      onError: (error) => log("error", error.message),
      onMessage: this.#messages.hook("front"),
    });
    if (resume !== undefined) this.#options.takeover?.[Symbol.dispose]();
    const stop = this.#stopped.promise.then(async () => {
      if (this.#handedOver) return;
      if (relay.deviceLost) relay.giveUp("The relay was stopped while its device was away");
      await this.#drained(relay);
      stream.shutdown();
    });
    const error = await server.run();
    this.#server = undefined;
    if (this.#handedOver) return;
    if (error !== undefined) log("error", `front-end: ${toErrorRecord(error).message}`);
    if (this.#stopping) await stop;
    log("info", "the front-end left");
  }

  async #drained(relay: Relay): Promise<void> {
    const { log, config } = this.#options;
    const drainTimeoutMs = Math.min(this.#options.drainTimeoutMs ?? config.stopTimeoutMs, MAX_TIMER_MS);
    const drained = relay.suspend().catch((error) => log("error", toErrorRecord(error).message));
    let timer: ReturnType<typeof setTimeout> | undefined;
    const late = new Promise<true>((resolve) => timer = setTimeout(() => resolve(true), drainTimeoutMs));
    const failed = await Promise.race([drained, late]);
    clearTimeout(timer);
    if (failed !== true) return;
    // What is in flight stays in the VMM's record, as after a kill: whatever is still done here would only wait as well.
    const held = relay.hasInflight ? "the VMM's record of it goes to the next relay" : "the VMM keeps no record of it";
    log("error", `the device has not given back what it has within ${drainTimeoutMs} ms; ${held}`);
    this.#options.onDrainTimeout?.();
  }

  async #nextFront(): Promise<UnixStream | undefined> {
    const { front } = this.#options;
    const listener = this.#listener;
    if (listener !== undefined) {
      return await this.#input.wait(() => listener.accept(), () => listener.interrupt()).catch((error) => {
        if (this.#handedOver) return undefined;
        throw error;
      });
    }
    if (this.#fd !== undefined) return new UnixStream(new OwnedFd(this.#fd.release()));
    // A front-end that takes connections only to drop them is not asked all the time.
    let wait = performance.now() - this.#connectedMs > FRONT_GOOD_MS ? RETRY_MIN_MS : Math.min(this.#frontWaitMs * 2, RETRY_MAX_MS);
    if (wait > RETRY_MIN_MS) await Promise.race([pause(wait), this.#stopped.promise]);
    for (; !this.#stopping; wait = Math.min(wait * 2, RETRY_MAX_MS)) {
      try {
        const connect = () => Promise.resolve(this.#handedOver ? undefined : connectUnix((front as { path: string }).path));
        const stream = await this.#input.wait(connect, () => {});
        this.#connectedMs = performance.now();
        this.#frontWaitMs = wait;
        return stream;
      } catch (error) {
        this.#options.log("debug", toErrorRecord(error).message);
        await Promise.race([pause(wait), this.#stopped.promise]);
      }
    }
    return undefined;
  }

  // A fresh front-end meets a fresh device. Daemons are left and connected to again, as if the VMM itself had gone;
  // embedded devices live in this process (a disk in memory would be lost) and are reset.
  async #leaveDevice(): Promise<void> {
    const { device } = this.#keeper;
    if (device !== undefined && device.info.kind === "sim" && this.#keeper.error === undefined) {
      await device.reset();
      await device.setMemTable([]);
    } else {
      await this.#keeper.leave();
    }
  }

  get #state(): string {
    if (this.#stopping) return "stopping";
    if (!this.#started) return "starting";
    if (this.#keeper.error !== undefined) return "device-lost";
    if (this.#keeper.device === undefined) return "waiting-device";
    if (this.#stream === undefined) return "waiting";
    return this.#relay?.queues.some((queue) => queue.running) ? "running" : "connected";
  }

  /** The document `svq.relay/1`. */
  async status(): Promise<RelayStatus> {
    const { name, front, config } = this.#options;
    const relay = this.#relay;
    const device = this.#keeper.device;
    if (relay !== undefined && !relay.deviceLost) await relay.getFeatures().catch(() => {});
    const frames = device?.info.deviceId === VIRTIO_ID.net ? await device.frameCounts?.().catch(() => undefined) : undefined;
    return {
      schema: "svq.relay/1",
      name,
      pid: Deno.pid,
      state: this.#state,
      mode: config.mode,
      force_shadow: config.forceShadow,
      inflight_region: relay?.hasInflight ?? false,
      front: frontText(front),
      device: this.#options.device,
      front_connected: this.#stream !== undefined,
      device_connected: device !== undefined && this.#keeper.error === undefined,
      device_connections: this.#keeper.connections,
      device_process: this.#options.deviceProcess?.status ?? null,
      needs_reset: relay?.needsReset ?? false,
      uptime_ms: Math.round(performance.now() - this.#begun),
      logging: relay?.logging ?? false,
      marking_all: relay?.markingAll ?? false,
      wasm_bounds_checks: boundsChecked(),
      features: `0x${(relay?.features ?? 0n).toString(16)}`,
      offered_features: `0x${(relay?.offered ?? 0n).toString(16)}`,
      queue_num: device?.info.queueNum ?? 0,
      config: relay?.configSeen === undefined ? null : Array.from(relay.configSeen, (byte) => byte.toString(16).padStart(2, "0")).join(""),
      masked_features: relay?.masked.map(({ feature }) => feature) ?? [],
      masked_protocol_features: maskedOf(0n, device?.info.offeredProtocolFeatures ?? 0n).map(({ name }) => name),
      masked: relay?.masked ?? [],
      iommu: relay?.iommu?.status ?? null,
      maps: mapsStatus(relay, device),
      memory: memoryStatus(relay),
      pins_memory: this.#keeper.device?.info.pinsMemory ?? null,
      net: relay === undefined ? null : netStatus(relay),
      workers: relay?.loads ?? [],
      queues: relay?.queues.map((queue) => queueStatus(relay, queue, frames)) ?? [],
      error: this.#keeper.error ?? null,
    };
  }

  /** Changes mode, force_shadow or switch_timeout_ms; resolves with the status when every queue is in its mode. */
  async set(params: Record<string, unknown>): Promise<RelayStatus> {
    const { config } = this.#options;
    const { mode, queue, force_shadow, switch_timeout_ms, net_state, ...others } = params;
    for (const name of Object.keys(others)) throw badParameter(`There is nothing called "${name}" to set`);
    if (mode !== undefined && !MODES.includes(mode as RelayMode)) throw badParameter(`"${mode}" is no mode: ${MODES.join(", ")}`);
    if (force_shadow !== undefined && typeof force_shadow !== "boolean") throw badParameter("force_shadow is true or false");
    if (
      switch_timeout_ms !== undefined && !(typeof switch_timeout_ms === "number" && switch_timeout_ms >= 0 && switch_timeout_ms < 2 ** 31)
    ) {
      throw badParameter("switch_timeout_ms is a number of milliseconds below 2^31");
    }
    if (
      queue !== undefined &&
      !(typeof queue === "number" && Number.isInteger(queue) && queue >= 0 && queue < RING_LIMIT && mode !== undefined)
    ) {
      throw badParameter(`queue is a queue's number, below ${RING_LIMIT}, and goes with a mode`);
    }
    if (mode !== undefined && queue !== undefined) {
      (config.queueModes ??= new Map()).set(queue as number, mode as RelayMode);
    } else if (mode !== undefined) {
      config.mode = mode as RelayMode;
      delete config.queueModes;
    }
    if (force_shadow !== undefined) config.forceShadow = force_shadow;
    if (switch_timeout_ms !== undefined) config.switchTimeoutMs = switch_timeout_ms;
    if (net_state !== undefined) await (await this.#relayNow()).net.load(net_state);
    await this.#relay?.applyMode();
    return await this.status();
  }

  // Between two front-ends there is none for a moment, while the device is opened anew.
  async #relayNow(): Promise<Relay> {
    for (let waited = 0; this.#relay === undefined && !this.#stopping && waited < NEXT_RELAY_MS; waited += 20) await pause(20);
    if (this.#relay !== undefined) return this.#relay;
    throw new SvqError("DEVICE_LOST", "The device is away, so there is no layout", { exitCode: EXIT.noDevice });
  }

  async #premap(params: Record<string, unknown>): Promise<PremapReport> {
    const front = this.#stream?.closed === false ? this.#stream.peerCredentials().pid : undefined;
    return await premap(await this.#relayNow(), params, { name: this.#options.name, front, sealed: this.#options.requireSealed === true });
  }

  #vrings(params: Record<string, unknown>): unknown {
    if (this.#relay === undefined) throw new SvqError("DEVICE_LOST", "The device is away, there are no rings", { exitCode: EXIT.noDevice });
    return relayVrings(this.#options.name, this.#relay, params);
  }

  // Long polling: answers with what came after message number `after`, or waits for it for `wait_ms`.
  async #readMessages({ after = 0, wait_ms = 0 }: Record<string, unknown>): Promise<{ messages: TracedMessage[]; last: number }> {
    if (typeof after !== "number" || typeof wait_ms !== "number") throw badParameter("after and wait_ms are numbers");
    await this.#messages.wait(after, Math.min(wait_ms, MAX_WAIT_MS));
    const messages = this.#messages.since(after);
    return { messages, last: messages.at(-1)?.seq ?? after };
  }

  /** Asks {@linkcode run} to end: rings are drained and handed back first. An upgrade under way is waited for. */
  stop(): void {
    if (this.#upgrade !== undefined) {
      this.#upgrade.then(({ pid }) => Deno.kill(pid, "SIGTERM"), () => this.stop());
      return;
    }
    this.#stopping = true;
    this.#stopped.resolve();
    if (this.#relay === undefined) this.#keeper.interrupt();
  }

  /** Closes everything. */
  async close(): Promise<void> {
    this.stop();
    this.#listener?.close();
    this.#fd?.close();
    await this.#keeper.interrupt();
    await this.#frames.end();
    await this.#relay?.close();
    this.#relay = undefined;
    await this.#keeper.close();
    this.#control?.close();
  }

  /** The same as {@linkcode close}. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

function netState({ net }: Relay): NetStateDocument {
  const { document } = net;
  if (document !== undefined) return document;
  throw new SvqError("NO_CONTROL_QUEUE", "No control queue of a network device is in use here: there is no state", {
    exitCode: EXIT.missingFeature,
    hint: "The device must offer CTRL_VQ, and a guest must have started it",
  });
}

function refused(why: string): SvqError {
  return new SvqError("UPGRADE_REFUSED", `The relay cannot be upgraded now: ${why}`, { exitCode: EXIT.migrationAborted });
}

function badParameter(message: string): SvqError {
  return new SvqError("BAD_PARAMETER", message, { exitCode: EXIT.usage });
}
