/**
 * The relay: a device in front of a device. Towards the guest's side (a VMM through the back-end server, or an embedded
 * driver) it is a {@linkcode VhostBackend}; towards the device it is that device's driver. Each queue runs in a mode
 * (passthrough or shadow), which changes while the guest runs.
 *
 * @module
 */
import { type ErrorRecord, EXIT, fromErrorRecord, SvqError, toErrorRecord } from "../errors.ts";
import type { GuestMemory } from "../memory/guest_memory.ts";
import type { MemoryRegion } from "../memory/region.ts";
import { hasBit } from "../uapi/bits.ts";
import { PROTOCOL_FEATURE } from "../uapi/vhost_user.ts";
import { VIRTIO_FEATURE_BITS, VIRTIO_ID, VIRTIO_STATUS } from "../uapi/virtio.ts";
import type { OwnedFd } from "../ffi/mod.ts";
import type { BackendInfo, DeviceStateDirection, InflightPlace, LogRegion, VhostBackend, VringAddresses } from "../vhost/backend.ts";
import type { IovaPlan } from "../iova/plan.ts";
import type { Arena } from "./arena.ts";
import { checkRing } from "./check_ring.ts";
import { Counters } from "./counters.ts";
import { deviceIsGone, DeviceSlot } from "./device_slot.ts";
import { DirtyLogging } from "./dirty_logging.ts";
import { Gate } from "./gate.ts";
import { InflightRegion } from "./inflight_region.ts";
import { Lane } from "./lane.ts";
import { pause, type RunningMode } from "./queue_steps.ts";
import { RelayMemory } from "./relay_memory.ts";
import { RelayQueue } from "./relay_queue.ts";
import { RingGroup } from "./ring_group.ts";
import { RelayWorker } from "./worker_client.ts";

/** Modes that can be asked for: `auto` is passthrough until the VMM turns the dirty log on. */
export type RelayMode = "auto" | RunningMode;

/** What the user chooses; may be changed while the relay runs (then call {@linkcode Relay.applyMode}). */
export interface RelayConfig {
  /** Mode of all queues. */
  mode: RelayMode;
  /** Modes of single queues, instead of `mode`. */
  queueModes?: Map<number, RelayMode>;
  /** Stay in shadow mode, whatever the modes say. */
  forceShadow: boolean;
  /** How long turning the dirty log on may keep the VMM waiting, ms. */
  switchTimeoutMs: number;
  /** Worker threads. */
  workers: number;
  /** Ring format that the guest is offered: the device's, or one of them whatever the device has. */
  guestRing: RingChoice;
  /** Ring format of the device: the guest's, or one of them whatever the guest has. */
  deviceRing: RingChoice;
}

/** How a ring format is chosen. */
export type RingChoice = "auto" | "split" | "packed";

/** The defaults of {@linkcode RelayConfig}. */
export const DEFAULT_RELAY_CONFIG: RelayConfig = {
  mode: "auto",
  forceShadow: false,
  switchTimeoutMs: 500,
  workers: 1,
  guestRing: "auto",
  deviceRing: "auto",
};

const VHOST_F_LOG_ALL = 1n << 26n;

// Features that the relay cannot carry between the two sides: docs/architecture.md has the reasons.
const IN_ORDER = 1n << 35n;
const NOTIFICATION_DATA = 1n << 38n;
const RING_RESET = 1n << 40n;
const ACCESS_PLATFORM = 1n << 33n;
const RING_PACKED = 1n << 34n;
/** Feature bits that the relay hides from the guest. */
export const MASKED_FEATURES: bigint = IN_ORDER | NOTIFICATION_DATA | RING_RESET | ACCESS_PLATFORM | VHOST_F_LOG_ALL;

/** While a device that nobody follows writes guest memory, all of it is marked dirty this often, ms. */
const MARK_ALL_INTERVAL_MS = 50;
/** After a switch that failed, the next attempt, ms. */
const SWITCH_RETRY_MS = 500;
const MAX_QUEUES = 256;
const { ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK } = VIRTIO_STATUS;
const RUNNING_STATUS = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

/** What a relay reports to its owner. */
export interface RelayEvents {
  /** A line for the log. */
  log(message: string): void;
  /** A queue stopped, or the device is gone. */
  error(error: ErrorRecord): void;
  /** The device is gone: {@linkcode Relay.attach} another connection to it, or {@linkcode Relay.giveUp}. Absent: queues fail. */
  deviceLost?: (error: Error) => void;
}

/** A relay over one device, for one front-end. */
export class Relay implements VhostBackend {
  /** What the guest's side sees of the device. */
  readonly info: BackendInfo;
  /** Counters of all queues. */
  readonly counters: Counters;
  /** The dirty log. */
  readonly dirty: DirtyLogging;
  /** See {@linkcode VhostBackend.onConfigChange}. */
  onConfigChange: (() => void) | undefined;
  /** See {@linkcode VhostBackend.onFailure}. */
  onFailure: ((error: Error) => void) | undefined;

  /** See {@linkcode VhostBackend.sendRarp}. */
  readonly sendRarp?: (mac: Uint8Array<ArrayBuffer>) => Promise<void>;
  /** See {@linkcode VhostBackend.setMtu}. */
  readonly setMtu?: (mtu: number) => Promise<void>;
  /** See {@linkcode VhostBackend.setDeviceStateFd}. */
  readonly setDeviceStateFd?: (direction: DeviceStateDirection, phase: number, fd: number) => Promise<OwnedFd | undefined>;
  /** See {@linkcode VhostBackend.checkDeviceState}. */
  readonly checkDeviceState?: () => Promise<void>;

  readonly #slot: DeviceSlot;
  readonly #config: RelayConfig;
  readonly #events: RelayEvents;
  readonly #workers: RelayWorker[] = [];
  readonly #queues = new Map<number, RelayQueue>();
  readonly #maxQueues: number;
  /** Set where the device stops and starts all of its rings together. */
  readonly #group: RingGroup | undefined;
  readonly #groupLane = new Lane();
  readonly #memory: RelayMemory;
  readonly #inflight: InflightRegion;
  /** The VMM began with the dirty log on: a relay before this one was logging when it ended. */
  #tookOverLog = false;
  #features = 0n;
  #featuresSet = false;
  #devicePacked = false;
  #logging = false;
  #markingAll = 0;
  #statusByGuest = false;
  #driverOk = false;
  #status = 0;
  #closed = false;
  #deviceError: Error | undefined;
  #configSeen: Uint8Array<ArrayBuffer> | undefined;
  #offered: bigint | undefined;
  #losses = 0;

  /** Starts the Workers; nothing is asked of the device yet. @param device open, with nothing set up; the relay drives it from now on, and does not close it */
  constructor(device: VhostBackend, config: RelayConfig, events: RelayEvents) {
    this.#slot = new DeviceSlot(device);
    this.#config = config;
    this.#events = events;
    const { queueNum, deviceId } = device.info;
    // Net devices count queue pairs, and have a control queue; vhost-user does not say what a device is.
    this.#maxQueues = Math.min(MAX_QUEUES, deviceId === undefined || deviceId === VIRTIO_ID.net ? 2 * queueNum + 1 : queueNum);
    if ((device.info.ringStop ?? "each") !== "each") {
      this.#group = new RingGroup({
        device: () => this.#device,
        queues: () => this.queues,
        wantedMode: (index) => this.wantedMode(index),
        check: (queue) => this.#check(queue),
      });
    }
    this.counters = new Counters(this.#maxQueues);
    this.#inflight = new InflightRegion(this.#maxQueues);
    this.info = { ...device.info, kind: "relay", maxMemSlots: Math.max(1, device.info.maxMemSlots - 1) };
    for (let i = 0; i < Math.max(1, config.workers); i++) this.#workers.push(this.#newWorker());
    this.#memory = new RelayMemory({ info: device.info, reach: (work) => this.#ofMemory(work) }, this.#maxQueues, this.#workers);
    this.dirty = new DirtyLogging((place) => this.#tellWorkers({ type: "log", ...place }));
    if (device.sendRarp !== undefined) this.sendRarp = (mac) => this.#slot.use((device) => device.sendRarp!(mac));
    if (device.setMtu !== undefined) this.setMtu = (mtu) => this.#slot.use((device) => device.setMtu!(mtu));
    if (device.setDeviceStateFd !== undefined) {
      this.setDeviceStateFd = (direction, phase, fd) => this.#slot.use((device) => device.setDeviceStateFd!(direction, phase, fd));
      this.checkDeviceState = () => this.#slot.use((device) => device.checkDeviceState!());
    }
    this.#listen(device);
  }

  #listen(device: VhostBackend): void {
    device.onConfigChange = () => this.onConfigChange?.();
    device.onFailure = (error) => this.#deviceGone(device, error);
  }

  get #device(): VhostBackend {
    return this.#slot.device;
  }

  #newWorker(): RelayWorker {
    return new RelayWorker(
      this.counters.shared,
      (index, error) => this.#queueFailed(index, error),
      (error) => this.#deviceFailed(error),
    );
  }

  async #tellWorkers(command: Parameters<RelayWorker["send"]>[0]): Promise<void> {
    await Promise.all(this.#workers.map((worker) => worker.send(command)));
  }

  /** The queues that the front-end has touched, by index. */
  get queues(): readonly RelayQueue[] {
    return [...this.#queues.values()].sort((a, b) => a.index - b.index);
  }

  /** Has the front-end turned the dirty log on? */
  get logging(): boolean {
    return this.#logging;
  }

  /** Is all guest memory being marked dirty because a switch takes long? */
  get markingAll(): boolean {
    return this.#markingAll > 0;
  }

  /** Negotiated features, without LOG_ALL. */
  get features(): bigint {
    return this.#features;
  }

  /** Does the device have packed rings? */
  get devicePacked(): boolean {
    return this.#devicePacked;
  }

  /** Why the device is gone, if it is. */
  get deviceError(): Error | undefined {
    return this.#deviceError;
  }

  /** The shadow rings, once there are any. */
  get arena(): Arena | undefined {
    return this.#memory.arena;
  }

  /** Guest memory as mapped here. */
  get memory(): GuestMemory {
    return this.#memory.guest;
  }

  /** The layout of the device's address space. */
  get plan(): IovaPlan {
    return this.#memory.plan;
  }

  #queue(index: number): RelayQueue {
    let queue = this.#queues.get(index);
    if (queue === undefined) {
      if (!(Number.isInteger(index) && index >= 0 && index < this.#maxQueues)) {
        throw new SvqError("NO_SUCH_QUEUE", `Queue ${index}: the device has ${this.#device.info.queueNum} queues`);
      }
      queue = new RelayQueue(index, this.#workers[index % this.#workers.length]!, {
        device: () => this.#device,
        memory: this.memory,
        arena: () => this.#memory.arena!,
        inflight: this.#inflight,
        features: () => this.#features,
        devicePacked: () => this.#devicePacked,
        log: (message) => this.#events.log(message),
      }, this.#group !== undefined ? this.#groupLane : new Lane());
      this.#queues.set(index, queue);
    }
    return queue;
  }

  /** The mode that queue `index` should be in now. */
  wantedMode(index: number): RunningMode {
    const { forceShadow } = this.#config;
    const mode = this.#config.queueModes?.get(index) ?? this.#config.mode;
    const guestPacked = hasBit(this.#features, VIRTIO_FEATURE_BITS.RING_PACKED);
    const translated = this.#devicePacked !== guestPacked;
    // A device whose rings cannot be stopped one by one in mid-flight stays behind rings of the relay's own.
    const stoppable = this.#group === undefined;
    if (forceShadow || translated || this.#memory.moved || mode === "shadow") return "shadow";
    // Packed rings have no used ring of their own that could be the relay's.
    if (mode === "used" || this.#logging || !stoppable) return guestPacked ? "shadow" : "used";
    return mode === "auto" ? "passthrough" : mode;
  }

  // ---- features and the dirty log

  /** See {@linkcode VhostBackend.getFeatures}. */
  async getFeatures(): Promise<bigint> {
    const offered = await this.#deviceFeatures() & ~MASKED_FEATURES;
    const { guestRing } = this.#config;
    if (guestRing === "auto") return offered;
    return guestRing === "packed" ? offered | RING_PACKED : offered & ~RING_PACKED;
  }

  /**
   * Takes the features; with LOG_ALL, resolves when every running queue logs, or after the switch time-out (then all guest
   * memory is marked dirty until it does). The device is never told of LOG_ALL.
   */
  async setFeatures(features: bigint): Promise<void> {
    const logging = (features & VHOST_F_LOG_ALL) !== 0n;
    const rest = features & ~VHOST_F_LOG_ALL;
    const offered = await this.getFeatures();
    if ((rest & ~offered) !== 0n) {
      throw new SvqError("FEATURES_NOT_OFFERED", `Features 0x${(rest & ~offered).toString(16)} were set that the device does not offer`);
    }
    if (!this.#featuresSet && logging) this.#tookOverLog = true;
    if (!this.#featuresSet || rest !== this.#features) {
      this.#devicePacked = await this.#chooseDeviceRing((rest & RING_PACKED) !== 0n);
      await this.#slot.use((device) => device.setFeatures(this.#deviceWord(rest)));
      this.#features = rest;
      this.#featuresSet = true;
    }
    if (logging !== this.#logging) {
      this.#logging = logging;
      if (logging) await this.dirty.start(this.memory.endGpa);
      this.#events.log(logging ? "the VMM turned the dirty log on" : "the VMM turned the dirty log off");
    }
    const switched = this.applyMode();
    if (logging) await this.#orMarkAll(switched);
    else switched.then(() => this.#logging ? undefined : this.dirty.stop()).catch((error) => this.#report(error));
  }

  #deviceWord(features: bigint): bigint {
    return this.#devicePacked ? features | RING_PACKED : features & ~RING_PACKED;
  }

  // They do not change while the device is there, and are asked for often: QEMU does it to know that it was heard.
  async #deviceFeatures(): Promise<bigint> {
    return this.#offered ??= await this.#slot.use((device) => device.getFeatures());
  }

  /** What the device offers, as far as it was asked. */
  get offered(): bigint | undefined {
    return this.#offered;
  }

  async #chooseDeviceRing(guestPacked: boolean): Promise<boolean> {
    const has = (await this.#deviceFeatures() & RING_PACKED) !== 0n;
    const { deviceRing } = this.#config;
    if (deviceRing === "packed" && !has) {
      throw new SvqError("MISSING_FEATURE", `${this.#device.info.address} has no packed rings`, {
        exitCode: EXIT.missingFeature,
        hint: "Leave --device-ring out, or set it to split",
      });
    }
    return deviceRing === "auto" ? guestPacked && has : deviceRing === "packed";
  }

  async #orMarkAll(switched: Promise<void>): Promise<void> {
    let done = false;
    const finished = this.#untilLogging(switched).then(() => done = true);
    let timer: ReturnType<typeof setTimeout> | undefined;
    const timeout = new Promise<void>((resolve) => timer = setTimeout(resolve, this.#config.switchTimeoutMs));
    await Promise.race([finished, timeout]);
    clearTimeout(timer);
    if (!done) this.#markAllUntil(() => done);
  }

  // A switch that fails leaves a device at work that nobody follows: the migration must not end before another try went well.
  async #untilLogging(switched: Promise<void>): Promise<void> {
    for (;;) {
      await switched.catch((error) => this.#report(error));
      const logs = this.queues.every((queue) => queue.mode === undefined || queue.mode === this.wantedMode(queue.index));
      if (logs || !this.#logging || this.#closed) return;
      await pause(SWITCH_RETRY_MS);
      switched = this.applyMode();
    }
  }

  // Never refused and never late: an older VMM would abort. All memory counts as dirty until every queue logs.
  #markAllUntil(done: () => boolean): void {
    this.#events.log(`switching takes longer than ${this.#config.switchTimeoutMs} ms: all guest memory counts as dirty until it is done`);
    this.#markingAll++;
    this.dirty.markAll(this.memory.regions);
    (async () => {
      while (!done() && !this.#closed) {
        await pause(MARK_ALL_INTERVAL_MS);
        if (this.#logging) this.dirty.markAll(this.memory.regions);
      }
      this.#markingAll--;
    })();
  }

  /** Brings every running queue into the wanted mode; resolves when all are. @throws the first error of a queue */
  async applyMode(): Promise<void> {
    const group = this.#group;
    if (group !== undefined) return await this.#groupLane.run(() => group.reconcile());
    const gate = this.#restartGate();
    const results = await Promise.allSettled(this.queues.map((queue) => queue.lane.run(() => this.#reconcile(queue, gate))));
    for (const result of results) if (result.status === "rejected") throw result.reason;
  }

  // DPDK forgets at the stop of one ring that the others are enabled, and is told so again only where they start anew: its
  // rings all stop before any starts. (Only net devices have SEND_RARP.)
  #restartGate(): Gate | undefined {
    if (this.sendRarp === undefined) return undefined;
    const changing = this.queues.some((queue) => queue.running && queue.mode !== this.wantedMode(queue.index));
    return changing ? new Gate(this.queues.length) : undefined;
  }

  async #reconcile(queue: RelayQueue, gate: Gate | undefined): Promise<void> {
    if (gate !== undefined) {
      let passed = false;
      const left = () => {
        passed = true;
        return gate.pass();
      };
      try {
        if (queue.running) await queue.change(this.wantedMode(queue.index), left);
      } finally {
        if (!passed) gate.skip();
      }
    }
    // The wish may change while a step waits for the device.
    while (queue.running && queue.mode !== this.wantedMode(queue.index)) {
      await queue.change(this.wantedMode(queue.index));
      // What the device wrote between the last mark and the end of passthrough has no bit of its own.
      if (this.markingAll && this.#logging) this.dirty.markAll(this.memory.regions);
    }
  }

  async #leave(queue: RelayQueue): Promise<void> {
    if (this.#group !== undefined) await this.#group.stop();
    else await queue.leave();
  }

  /** See {@linkcode VhostBackend.setLogBase}. */
  async setLogBase(log: LogRegion): Promise<void> {
    await this.dirty.setVmmLog(log, this.memory.endGpa);
    if (this.markingAll) this.dirty.markAll(this.memory.regions);
  }

  // ---- memory

  /** See {@linkcode VhostBackend.setMemTable}. */
  async setMemTable(regions: readonly MemoryRegion[]): Promise<void> {
    await this.#memory.set(regions);
    await this.#memoryGrew();
  }

  // The successor of a lost device gets the whole table.
  async #ofMemory(work: (device: VhostBackend) => Promise<void>): Promise<void> {
    if (this.#slot.lost !== undefined) return;
    try {
      await work(this.#device);
    } catch (error) {
      if (!deviceIsGone(error) || this.#events.deviceLost === undefined) throw error;
    }
  }

  /** See {@linkcode VhostBackend.addMemRegion}. */
  async addMemRegion(region: MemoryRegion): Promise<void> {
    await this.#memory.add(region);
    await this.#memoryGrew();
  }

  /** See {@linkcode VhostBackend.removeMemRegion}. */
  async removeMemRegion(region: Omit<MemoryRegion, "fd" | "fdOffset">): Promise<void> {
    await this.#memory.remove(region);
  }

  async #memoryGrew(): Promise<void> {
    await this.dirty.grow(this.memory.endGpa);
    // What its predecessor's device wrote last may have no bit: everything has been written once.
    if (this.#tookOverLog && this.#logging) this.dirty.markAll(this.memory.regions);
    this.#tookOverLog = false;
    // A region that lies elsewhere for the device forbids the modes without translation.
    await this.applyMode();
  }

  // ---- in-flight region

  /** See {@linkcode VhostBackend.createInflight}. */
  async createInflight(queues: number, num: number): Promise<{ file: OwnedFd; place: InflightPlace }> {
    return this.#inflight.create(queues, num);
  }

  /** See {@linkcode VhostBackend.setInflight}. @throws SvqError RING_RUNS, INFLIGHT_INVALID */
  async setInflight(place: InflightPlace): Promise<void> {
    if (this.queues.some((queue) => queue.running)) {
      throw new SvqError("RING_RUNS", "The in-flight region cannot be changed while a ring runs");
    }
    this.#inflight.set(place, this.queues.every((queue) => queue.state === "stopped"));
  }

  /** Has the front-end given a region that outlives the relay, in which it records what is in flight? */
  get hasInflight(): boolean {
    return this.#inflight.given;
  }

  // ---- rings

  /** See {@linkcode VhostBackend.setVringNum}. */
  async setVringNum(index: number, num: number): Promise<void> {
    const queue = this.#stoppedQueue(index, "its size");
    const packed = (this.#features & RING_PACKED) !== 0n;
    if (!(num >= 1 && num <= 32768 && (packed || (num & (num - 1)) === 0))) {
      throw new SvqError("BAD_RING_SIZE", `Queue ${index}: a ${packed ? "packed" : "split"} ring cannot have ${num} descriptors`);
    }
    queue.num = num;
  }

  #stoppedQueue(index: number, what: string): RelayQueue {
    const queue = this.#queue(index);
    queue.forgetFailure();
    if (queue.running) throw new SvqError("RING_RUNS", `Queue ${index}: ${what} cannot be changed while the ring runs`);
    return queue;
  }

  /** See {@linkcode VhostBackend.setVringAddresses}. On a running ring only the log flag may change; it never reaches the device. */
  async setVringAddresses(index: number, addresses: VringAddresses): Promise<void> {
    const queue = this.#queue(index);
    const now = queue.addresses;
    const same = now !== undefined && now.desc === addresses.desc && now.avail === addresses.avail && now.used === addresses.used;
    if (same) {
      await queue.setLogGpa(addresses.logGpa);
      return;
    }
    this.#stoppedQueue(index, "the address of a part").addresses = addresses;
  }

  /** See {@linkcode VhostBackend.setVringBase}. */
  async setVringBase(index: number, base: number): Promise<void> {
    const queue = this.#stoppedQueue(index, "its base");
    queue.base = queue.startBase = base;
    queue.lastBase = undefined;
  }

  /** See {@linkcode VhostBackend.getVringBase}. Resolves when the device holds nothing and the last dirty bit is set. */
  async getVringBase(index: number): Promise<number> {
    const queue = this.#queue(index);
    return await this.#left(queue, async () => {
      // The VMM reads the log when it has the answer: of a queue that could not be switched, nothing else is known.
      if (this.markingAll && this.#logging) this.dirty.markAll(this.memory.regions);
      queue.unkick();
      queue.lastBase = queue.base;
      return queue.base;
    });
  }

  // Where the device was lost with requests in hand that cannot be made available again, its successor finishes them first.
  async #left<T>(queue: RelayQueue, next: () => Promise<T>): Promise<T> {
    for (;;) {
      try {
        return await queue.lane.run(async () => {
          await this.#leave(queue);
          return await next();
        });
      } catch (error) {
        const lost = this.#slot.lost !== undefined && error instanceof SvqError && error.code === "RING_GAP";
        if (!(lost || deviceIsGone(error)) || this.#events.deviceLost === undefined) throw error;
        await pause(0);
        await this.#slot.present();
      }
    }
  }

  /** See {@linkcode VhostBackend.setVringKick}. */
  async setVringKick(index: number, fd: number | null): Promise<void> {
    const queue = this.#queue(index);
    // A new kick eventfd for a ring that runs: the ring changes hands once.
    await this.#left(queue, async () => {
      queue.setKick(fd);
      await this.#startIfReady(queue);
    });
  }

  /** See {@linkcode VhostBackend.setVringCall}. */
  async setVringCall(index: number, fd: number | null): Promise<void> {
    this.#queue(index).setCall(fd);
  }

  /** See {@linkcode VhostBackend.setVringErr}. */
  async setVringErr(index: number, fd: number | null): Promise<void> {
    this.#queue(index).setErr(fd);
  }

  /** See {@linkcode VhostBackend.setVringEnable}. */
  async setVringEnable(index: number, enabled: boolean): Promise<void> {
    const queue = this.#queue(index);
    queue.enabled = enabled;
    queue.enableSeen = true;
    await queue.lane.run(async () => {
      if (queue.running) await queue.applyEnabled();
      else await this.#startIfReady(queue);
    });
  }

  async #startIfReady(queue: RelayQueue): Promise<void> {
    if (this.#group !== undefined) return await this.#group.start();
    if (queue.state !== "stopped" || !queue.ready) return;
    try {
      this.#check(queue);
      if (this.#slot.lost !== undefined) return queue.wait();
      await this.#ensureDriverOk();
      await queue.enter(this.wantedMode(queue.index));
      // What a relay before this one had in hand is done first, in a mode that keeps a record.
      if (queue.mode !== this.wantedMode(queue.index)) this.applyMode().catch((error) => this.#report(error));
    } catch (error) {
      if (deviceIsGone(error) && this.#events.deviceLost !== undefined) return queue.wait();
      queue.fail(error);
      throw error;
    }
  }

  // A front-end without STATUS never says DRIVER_OK, and a device with it may wait for that before it touches a ring.
  async #ensureDriverOk(): Promise<void> {
    // Kernel devices say DRIVER_OK by themselves, when all of their rings are set up.
    if (this.#isKernel || this.#statusByGuest || this.#driverOk || !hasBit(this.#device.info.protocolFeatures, PROTOCOL_FEATURE.STATUS)) {
      return;
    }
    await this.#device.setStatus(RUNNING_STATUS);
    this.#driverOk = true;
  }

  #check(queue: RelayQueue): void {
    checkRing(queue, this.memory, hasBit(this.#features, VIRTIO_FEATURE_BITS.RING_PACKED));
  }

  #queueFailed(index: number, error: ErrorRecord): void {
    const queue = this.#queue(index);
    this.#events.error(error);
    queue.lane.run(async () => {
      if (!queue.running) return;
      try {
        if (this.#group !== undefined) await this.#group.stop();
        else await queue.abandon();
      } finally {
        queue.fail(fromErrorRecord(error));
      }
      await this.#group?.start();
    }).catch((failure) => this.#report(failure));
  }

  // Its owner may find a successor; meanwhile the VMM is held and the guest's requests wait.
  #deviceGone(device: VhostBackend, error: Error): void {
    if (this.#closed || device !== this.#device) return;
    if (this.#events.deviceLost === undefined) return this.#deviceFailed(error);
    const first = this.#slot.lost === undefined;
    this.#losses++;
    this.#slot.lose(error);
    for (const queue of this.queues) queue.lane.run(() => queue.lose()).catch((failure) => this.#report(failure));
    if (first) this.#events.deviceLost(error);
  }

  /**
   * Puts `device`, another connection to the device that was lost, in its place: features, memory, status, and every ring
   * from where it stood. Where the Worker has a record, what was in flight is done again, in order.
   *
   * @throws SvqError FEATURES_CHANGED, and what the device says; the relay still waits for a device then
   */
  async attach(device: VhostBackend): Promise<void> {
    const offered = await device.getFeatures();
    const word = this.#deviceWord(this.#features);
    const missing = word & ~offered;
    if (this.#featuresSet && missing !== 0n) {
      throw new SvqError("FEATURES_CHANGED", `The device has come back without features that the guest uses: 0x${missing.toString(16)}`);
    }
    const losses = this.#losses;
    this.#slot.replace(device);
    this.#listen(device);
    try {
      if (this.#featuresSet) await device.setFeatures(word);
      if (this.#memory.atDevice) await device.setMemTable(this.#memory.table());
      if (this.#driverOk) await device.setStatus(RUNNING_STATUS);
      this.#offered = offered;
      for (const queue of this.queues) await queue.lane.run(() => queue.recover(this.wantedMode(queue.index)));
      if (this.#statusByGuest) await device.setStatus(this.#status);
      if (losses !== this.#losses) throw new SvqError("DEVICE_LOST", "The device was lost again at once");
    } catch (error) {
      for (const queue of this.queues) await queue.lane.run(() => queue.lose());
      throw error;
    }
    this.#slot.found();
    // What became ready in the meantime, and what the VMM wishes by now.
    for (const queue of this.queues) await queue.lane.run(() => queue.recover(this.wantedMode(queue.index)));
    this.applyMode().catch((error) => this.#report(error));
    this.#compareConfig().catch((error) => this.#report(error));
  }

  // A disk may have been resized while nobody was there to tell.
  async #compareConfig(): Promise<void> {
    const seen = this.#configSeen;
    if (seen === undefined) return;
    const now = await this.#device.getConfig(0, seen.length);
    if (now.some((byte, i) => byte !== seen[i])) this.onConfigChange?.();
  }

  /** No successor will come: whoever waits for one is told so. */
  giveUp(reason: string): void {
    this.#slot.giveUp(reason);
  }

  /** Is the device gone, and its successor not there yet? */
  get deviceLost(): boolean {
    return this.#slot.lost !== undefined;
  }

  /** Has a queue failed, so that the guest must reset the device? */
  get needsReset(): boolean {
    return this.queues.some((queue) => queue.state === "failed");
  }

  #deviceFailed(error: Error): void {
    if (this.#closed) return;
    this.#deviceError = error;
    this.#events.error(toErrorRecord(error));
    for (const queue of this.#queues.values()) if (queue.running) queue.fail(error);
    this.onFailure?.(error);
  }

  #report(error: unknown): void {
    if (!this.#closed) this.#events.error(toErrorRecord(error));
  }

  // ---- the rest is passed on

  /** See {@linkcode VhostBackend.getConfig}. */
  async getConfig(offset: number, size: number): Promise<Uint8Array<ArrayBuffer>> {
    const bytes = await this.#slot.use((device) => device.getConfig(offset, size));
    if (offset === 0) this.#configSeen = bytes.slice();
    return bytes;
  }

  /** The configuration space as the front-end last read it from its start. */
  get configSeen(): Uint8Array<ArrayBuffer> | undefined {
    return this.#configSeen;
  }

  /** See {@linkcode VhostBackend.setConfig}. */
  setConfig(offset: number, bytes: Uint8Array<ArrayBuffer>): Promise<void> {
    return this.#slot.use((device) => device.setConfig(offset, bytes));
  }

  /** See {@linkcode VhostBackend.getStatus}; with NEEDS_RESET where a queue has failed. */
  async getStatus(): Promise<number> {
    const status = this.#isKernel ? this.#status : await this.#slot.use((device) => device.getStatus());
    return this.needsReset && status !== 0 ? status | VIRTIO_STATUS.NEEDS_RESET : status;
  }

  get #isKernel(): boolean {
    return this.#device.info.kind === "vhost-vdpa" || this.#device.info.kind === "vhost-net";
  }

  /**
   * See {@linkcode VhostBackend.setStatus}. Status 0 stops all rings first. Their bases stay: QEMU 7.2 clears the status
   * and only then asks for them.
   */
  async setStatus(status: number): Promise<void> {
    if (status === 0) await this.#stopRings();
    this.#statusByGuest = status !== 0;
    this.#driverOk = false;
    // NEEDS_RESET is the device's to set.
    this.#status = status & ~VIRTIO_STATUS.NEEDS_RESET;
    if (!this.#isKernel) await this.#slot.use((device) => device.setStatus(this.#status));
    else if (status === 0) await this.#device.reset();
  }

  /** See {@linkcode VhostBackend.reset}. */
  async reset(): Promise<void> {
    if (this.#slot.lost !== undefined) await this.#dropRings();
    else await this.#stopRings();
    this.#driverOk = this.#statusByGuest = false;
    this.#status = 0;
    await this.#slot.use((device) => device.reset());
  }

  async #stopRings(): Promise<void> {
    for (const queue of this.queues) {
      if (this.#deviceError === undefined) await this.#left(queue, () => Promise.resolve(queue.unkick()));
      else await queue.lane.run(() => Promise.resolve(queue.unkick()));
    }
  }

  // What a lost device held is of no interest to a guest that resets it.
  async #dropRings(): Promise<void> {
    for (const queue of this.queues) {
      await queue.lane.run(async () => {
        if (queue.state === "waiting") await queue.abandon();
        if (this.#deviceError === undefined) await this.#leave(queue);
        queue.unkick();
      });
    }
  }

  /** See {@linkcode VhostBackend.suspend}. Stops every ring. */
  async suspend(): Promise<void> {
    await Promise.all(this.queues.map((queue) => queue.lane.run(() => this.#leave(queue))));
  }

  /** See {@linkcode VhostBackend.resume}. Starts what {@linkcode suspend} stopped. */
  async resume(): Promise<void> {
    await Promise.all(this.queues.map((queue) => queue.lane.run(() => this.#startIfReady(queue))));
  }

  async #stopAll(): Promise<void> {
    for (const queue of this.queues) {
      await queue.lane.run(async () => {
        const reachable = this.#deviceError === undefined && this.#slot.lost === undefined;
        if (reachable) await this.#leave(queue).catch((error) => this.#report(error));
        queue.forget();
      });
    }
  }

  /** Stops every ring, lets go of guest memory, and leaves the device to its owner. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#slot.giveUp("The relay has ended");
    await this.#stopAll();
    this.#device.onConfigChange = undefined;
    this.#device.onFailure = undefined;
    for (const worker of this.#workers) await worker.close();
    for (const queue of this.#queues.values()) queue.close();
    this.#queues.clear();
    this.dirty.close();
    this.#memory.close();
    this.#inflight.close();
  }

  /** The same as {@linkcode close}. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}
