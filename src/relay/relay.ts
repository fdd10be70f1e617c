/**
 * The relay: a device in front of a device. Towards the guest's side (a VMM through the back-end server, or an embedded
 * driver) it is a {@linkcode VhostBackend}; towards the device it is that device's driver. Each queue runs in a mode
 * (passthrough or shadow), which changes while the guest runs.
 *
 * @module
 */
import { SvqError, toErrorRecord } from "../errors.ts";
import type { GuestMemory } from "../memory/guest_memory.ts";
import type { MemoryRegion } from "../memory/region.ts";
import { VIRTIO_ID } from "../uapi/virtio.ts";
import type { OwnedFd } from "../ffi/mod.ts";
import type {
  BackendInfo,
  DeviceStateDirection,
  Doorbell,
  InflightPlace,
  IotlbChange,
  LogRegion,
  VhostBackend,
  VringAddresses,
} from "../vhost/backend.ts";
import type { IovaPlan } from "../iova/plan.ts";
import type { Arena } from "./arena.ts";
import { ConfigSpace } from "./config_space.ts";
import { Capture } from "./capture_control.ts";
import { COUNTER, Counters, MAX_WORKERS } from "./counters.ts";
import { DeviceStatus } from "./device_status.ts";
import { deviceIsGone, DeviceSlot } from "./device_slot.ts";
import { DirtyLogging } from "./dirty_logging.ts";
import { Doorbells, hasDoorbells } from "./doorbells.ts";
import { GuestIommu } from "./guest_iommu.ts";
import { InflightRegion } from "./inflight_region.ts";
import { Lane } from "./lane.ts";
import { LogSwitch } from "./log_switch.ts";
import { isBound, ModeSwitch } from "./mode_switch.ts";
import { NetControl } from "./net_control.ts";
import { Negotiation, VHOST_F_LOG_ALL } from "./negotiation.ts";
import type { QueueContext, RunningMode } from "./queue_steps.ts";
import type { RelayConfig, RelayEvents } from "./relay_config.ts";
import type { PlacedMemory } from "./placed_memory.ts";
import { RelayMemory } from "./relay_memory.ts";
import { RelayQueue } from "./relay_queue.ts";
import { RingGroup } from "./ring_group.ts";
import { RingLife } from "./ring_life.ts";
import { RelayWorker } from "./worker_client.ts";
import { type WorkerLoad, workerLoads, type WorkerSettings, workerSettings } from "./worker_load.ts";

export * from "./relay_config.ts";

const MAX_QUEUES = 256;

/** A relay over one device, for one front-end. */
export class Relay implements VhostBackend {
  /** What the guest's side sees of the device. */
  readonly info: BackendInfo;
  /** Counters of all queues. */
  readonly counters: Counters;
  /** The dirty log. */
  readonly dirty: DirtyLogging;
  /** The control queue of a network device. */
  readonly net: NetControl;
  /** What is captured of its frames. */
  readonly capture: Capture;
  /** See {@linkcode VhostBackend.onConfigChange}. */
  onConfigChange: (() => void) | undefined;
  /** See {@linkcode VhostBackend.onFailure}. */
  onFailure: ((error: Error) => void) | undefined;
  /** See {@linkcode VhostBackend.onDoorbell}. */
  onDoorbell: ((index: number, doorbell: Doorbell | undefined) => Promise<boolean>) | undefined;

  /** See {@linkcode VhostBackend.sendRarp}. */
  readonly sendRarp?: (mac: Uint8Array<ArrayBuffer>) => Promise<void>;
  /** See {@linkcode VhostBackend.setMtu}. */
  readonly setMtu?: (mtu: number) => Promise<void>;
  /** See {@linkcode VhostBackend.setDeviceStateFd}. */
  readonly setDeviceStateFd?: (direction: DeviceStateDirection, phase: number, fd: number) => Promise<OwnedFd | undefined>;
  /** See {@linkcode VhostBackend.checkDeviceState}. */
  readonly checkDeviceState?: () => Promise<void>;
  /** See {@linkcode VhostBackend.onIotlbMiss}. */
  onIotlbMiss: ((iova: number, perm: number) => Promise<void>) | undefined;
  /** The guest's IOMMU, where the user allows one. */
  readonly iommu: GuestIommu | undefined;

  readonly #slot: DeviceSlot;
  readonly #config: RelayConfig;
  readonly #events: RelayEvents;
  readonly #workers: RelayWorker[] = [];
  readonly #queues = new Map<number, RelayQueue>();
  readonly #maxQueues: number;
  /** Set where the device stops and starts all of its rings together. */
  readonly #group: RingGroup | undefined;
  readonly #groupLane = new Lane();
  /** The guest and the device share the rings to the end. */
  readonly #bound: boolean;
  readonly #doorbells = new Doorbells({
    device: () => this.#device,
    sender: () => this.onDoorbell,
    log: (message) => this.#events.log(message),
  });
  readonly #memory: RelayMemory;
  readonly #inflight: InflightRegion;
  readonly #negotiation: Negotiation;
  readonly #log: LogSwitch;
  readonly #modes: ModeSwitch;
  readonly #status: DeviceStatus;
  readonly #rings: RingLife;
  readonly #configSpace: ConfigSpace;
  #closed = false;
  #deviceError: Error | undefined;
  #losses = 0;

  /** Starts the Workers; nothing is asked of the device yet. @param device open, with nothing set up; the relay drives it from now on, and does not close it */
  constructor(device: VhostBackend, config: RelayConfig, events: RelayEvents) {
    this.#slot = new DeviceSlot(device);
    this.#config = config;
    this.#events = events;
    this.#status = new DeviceStatus(this.#slot);
    const { queueNum, deviceId } = device.info;
    // Net devices count queue pairs, and have a control queue; vhost-user does not say what a device is.
    this.#maxQueues = Math.min(MAX_QUEUES, deviceId === undefined || deviceId === VIRTIO_ID.net ? 2 * queueNum + 1 : queueNum);
    this.net = this.#newNetControl(config);
    this.#negotiation = new Negotiation(this.#slot, config, (guest, offered) => this.net.extraFeatures(guest, offered));
    if ((device.info.ringStop ?? "each") !== "each") {
      this.#group = new RingGroup({
        device: () => this.#device,
        queues: () => this.queues,
        wantedMode: (index) => this.wantedMode(index),
        check: (queue) => this.#rings.check(queue),
        beforeStart: () => this.net.beforeStart(),
        afterStart: () => this.net.afterStart(),
      });
    }
    this.counters = new Counters(this.#maxQueues);
    this.#bound = isBound(device.info, config);
    const doorbells = (this.#group === undefined || this.#bound) && hasDoorbells(device);
    this.info = { ...device.info, kind: "relay", maxMemSlots: Math.max(1, device.info.maxMemSlots - 1), doorbells };
    this.#inflight = new InflightRegion(this.#maxQueues);
    const workers = Math.min(MAX_WORKERS, Math.max(1, config.workers));
    for (let i = 0; i < workers; i++) this.#workers.push(this.#newWorker(workerSettings(config, i, workers)));
    const running = () => this.queues.some((queue) => queue.running);
    this.#memory = new RelayMemory({ info: device.info, reach: (work) => this.#ofMemory(work), running }, this.#maxQueues, this.#workers);
    this.dirty = new DirtyLogging(async (place) => void await this.#tellWorkers({ type: "log", ...place }));
    if (device.sendRarp !== undefined) this.sendRarp = (mac) => this.#slot.use((device) => device.sendRarp!(mac));
    if (device.setMtu !== undefined) this.setMtu = (mtu) => this.#slot.use((device) => device.setMtu!(mtu));
    if (deviceId === VIRTIO_ID.net) {
      // Where rings cannot be taken from a running guest one by one, the guest announces itself.
      if (this.#group === undefined) this.sendRarp ??= (mac) => this.net.announce(mac);
      this.setMtu ??= (mtu) => this.net.checkMtu(mtu);
    }
    if (device.setDeviceStateFd !== undefined) {
      this.setDeviceStateFd = (direction, phase, fd) => this.#slot.use((device) => device.setDeviceStateFd!(direction, phase, fd));
      this.checkDeviceState = () => this.#slot.use((device) => device.checkDeviceState!());
    }
    this.#configSpace = new ConfigSpace(this.#slot, this.#negotiation);
    this.#rings = this.#newRings();
    this.#modes = this.#newModes(config);
    this.capture = new Capture({
      isNet: () => this.net.isNet(this.features),
      features: () => this.features,
      workers: this.#workers.length,
      dropped: () => this.queues.reduce((sum, { index }) => sum + this.counters.of(index)[COUNTER.uncaptured]!, 0),
      restart: () => this.#modes.apply(true),
    });
    this.#log = this.#newLog(config);
    this.iommu = config.guestIommu ? this.#newIommu() : undefined;
    // The record of what is in flight names guest memory, and a guest with an IOMMU does not: no VMM is to rely on one.
    if (config.guestIommu) Object.defineProperty(this, "setInflight", { value: undefined });
    this.#listen(device);
  }

  #newNetControl({ mac }: RelayConfig): NetControl {
    return new NetControl({
      device: () => this.#device,
      features: () => this.features,
      queues: () => this.queues,
      queue: (index) => this.#queue(index),
      maxQueues: this.#maxQueues,
      spare: ({ index, lane }) => this.#newQueue(index, lane),
      inject: async (index, commands) => void await this.#workerOf(index).send({ type: "inject", index, commands }),
      region: (index) => this.#memory.ringRegion(index),
      together: (this.#slot.device.info.ringStop ?? "each") !== "each",
      mac,
      log: (message) => this.#events.log(message),
    });
  }

  #newIommu(): GuestIommu {
    return new GuestIommu({
      tell: (command) => this.#tellWorkers(command),
      ask: async (iova, perm) => await this.onIotlbMiss?.(iova, perm),
      known: () => this.#rings.startPlaced(),
      unmapRings: (iova, size, flush) => this.#rings.unmap(iova, size, flush),
      log: (message) => this.#events.log(message),
    });
  }

  #missed(index: number, iova: number, perm: number): void {
    this.iommu?.miss(iova, perm).catch(async (error) => {
      // A ring that was stopped since, or started anew, does not fail for an address of the time before.
      if (await this.#tellWorkers({ type: "awaits", index, iova }) > 0) this.#rings.failed(this.#queue(index), toErrorRecord(error));
    }).catch((error) => this.#report(error));
  }

  /** See {@linkcode VhostBackend.iotlb}. @throws SvqError UNSUPPORTED unless the guest took ACCESS_PLATFORM */
  async iotlb(change: IotlbChange): Promise<void> {
    if (this.iommu === undefined || !this.#negotiation.iommu) {
      throw new SvqError("UNSUPPORTED", "The guest's IOMMU is not relayed: start the relay with --guest-iommu");
    }
    if (change.type === "invalidate") await this.iommu.invalidate(change.iova, change.size);
    else await this.iommu.update({ iova: change.iova, size: change.size, gpa: change.gpa, perm: change.perm });
  }

  #newRings(): RingLife {
    return new RingLife({
      slot: this.#slot,
      negotiation: this.#negotiation,
      status: this.#status,
      memory: () => this.memory,
      group: this.#group,
      control: this.net,
      iommu: () => this.iommu,
      queues: () => this.queues,
      wantedMode: (index) => this.wantedMode(index),
      applyMode: () => this.applyMode(),
      deviceFailed: () => this.#deviceError !== undefined,
      // Only a connection can be closed under a device: the others' rings are this process's or this kernel's to stop.
      stopTimeoutMs: () => this.#device.info.kind === "vhost-user" ? this.#config.stopTimeoutMs : Infinity,
      fence: (error) => this.#fence(error),
      events: this.#events,
      report: (error) => this.#report(error),
    });
  }

  #newModes(config: RelayConfig): ModeSwitch {
    return new ModeSwitch({
      config,
      queues: () => this.queues,
      group: () => this.#group,
      bound: this.#bound,
      groupLane: this.#groupLane,
      // DPDK. (Only net devices have SEND_RARP.)
      forgetful: this.#slot.device.sendRarp !== undefined,
      guestPacked: () => this.#negotiation.guestPacked,
      translated: (index) => this.#negotiation.rebuilt || this.#memory.moved || this.#otherSize(index),
      control: (index) => index === this.net.index,
      frames: (index) => this.net.frames(index, this.features),
      relayed: () => this.#negotiation.reordered || this.capture.on,
      logging: () => this.logging,
      // What the device wrote between the last mark and the end of passthrough has no bit of its own.
      changed: () => this.#log.markAllIfBehind(),
    });
  }

  #otherSize(index: number): boolean {
    const { num } = this.#queue(index);
    return num > 0 && this.#negotiation.deviceNum(num) !== num;
  }

  #newLog(config: RelayConfig): LogSwitch {
    return new LogSwitch(this.dirty, this.memory, {
      applyMode: () => this.applyMode(),
      applied: () => this.queues.every((queue) => this.#modes.done(queue)),
      closed: () => this.#closed,
      timeoutMs: () => config.switchTimeoutMs,
      log: (message) => this.#events.log(message),
      report: (error) => this.#report(error),
    });
  }

  #listen(device: VhostBackend): void {
    device.onConfigChange = () => this.onConfigChange?.();
    device.onFailure = (error) => this.#deviceGone(device, error);
  }

  get #device(): VhostBackend {
    return this.#slot.device;
  }

  #newWorker(settings: WorkerSettings): RelayWorker {
    return new RelayWorker(
      { counters: this.counters.shared, ...settings },
      (index, reason) => this.#events.log(`queue ${index} runs on the slower JavaScript core: ${reason}`),
      (index, error) => this.#rings.failed(this.#queue(index), error),
      (index, iova, perm) => this.#missed(index, iova, perm),
      (error) => this.#deviceFailed(error),
      (event) => this.net.answered(event),
    );
  }

  // The sum of the counts in their answers.
  async #tellWorkers(command: Parameters<RelayWorker["send"]>[0]): Promise<number> {
    const replies = await Promise.all(this.#workers.map((worker) => worker.send(command)));
    return replies.reduce((sum, { count = 0 }) => sum + count, 0);
  }

  /** What each Worker does. */
  get loads(): WorkerLoad[] {
    return workerLoads(this.counters, this.#workers.length, this.#config);
  }

  /** The queues that the front-end has touched, by index. */
  get queues(): readonly RelayQueue[] {
    return [...this.#queues.values()].sort((a, b) => a.index - b.index);
  }

  /** Has the front-end turned the dirty log on? */
  get logging(): boolean {
    return this.#log.on;
  }

  /** Is all guest memory being marked dirty because a switch takes long? */
  get markingAll(): boolean {
    return this.#log.markingAll;
  }

  /** Can the dirty log be turned on? Not where the device is on the guest's rings and cannot be taken off them. */
  get canLog(): boolean {
    return !this.#bound;
  }

  /** Rings that the VMM kicks by the device's own doorbell, past the relay. */
  get doorbells(): readonly number[] {
    return this.#doorbells.given;
  }

  /** Negotiated features, without LOG_ALL. */
  get features(): bigint {
    return this.#negotiation.features;
  }

  /** Does the device have packed rings? */
  get devicePacked(): boolean {
    return this.#negotiation.devicePacked;
  }

  /** Features negotiated with the device. */
  get deviceFeatures(): bigint {
    return this.#negotiation.deviceFeatures;
  }

  /** Descriptors in the device's ring of a running queue. */
  deviceNum(queue: RelayQueue): number {
    return queue.mode === "shadow" ? this.#negotiation.deviceNum(queue.num) : queue.num;
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
      queue = this.#newQueue(index, this.#group !== undefined ? this.#groupLane : new Lane());
      this.#queues.set(index, queue);
    }
    return queue;
  }

  #workerOf(index: number): RelayWorker {
    return this.#workers[index % this.#workers.length]!;
  }

  #newQueue(index: number, lane: Lane): RelayQueue {
    const context: QueueContext = {
      device: () => this.#device,
      memory: this.memory,
      arena: () => this.#memory.arena!,
      inflight: this.#inflight,
      features: () => this.features,
      devicePacked: () => this.devicePacked,
      deviceFeatures: () => this.#negotiation.deviceFeatures,
      deviceNum: (num) => this.#negotiation.deviceNum(num),
      control: (index, guestless) => this.net.start(index, guestless),
      capture: (index) => this.capture.start(index, index % this.#workers.length),
      frames: (index) => this.net.frames(index, this.features),
      passTables: this.#config.indirect === "pass",
      doorbells: this.#doorbells,
      released: () => this.#rings.released,
      log: (message) => this.#events.log(message),
    };
    return new RelayQueue(index, this.#workerOf(index), context, lane);
  }

  /** The mode that queue `index` should be in now. */
  wantedMode(index: number): RunningMode {
    return this.#modes.wanted(index);
  }

  // ---- features and the dirty log

  /** See {@linkcode VhostBackend.getFeatures}. */
  async getFeatures(): Promise<bigint> {
    return await this.#negotiation.offer();
  }

  /**
   * Takes the features; with LOG_ALL, resolves when every running queue logs, or after the switch time-out (then all guest
   * memory is marked dirty until it does). The device is never told of LOG_ALL.
   */
  async setFeatures(features: bigint): Promise<void> {
    const first = !this.#negotiation.set;
    await this.#negotiation.acknowledge(features & ~VHOST_F_LOG_ALL);
    await this.net.negotiated(this.#negotiation.deviceFeatures);
    if (!this.#negotiation.iommu) await this.iommu?.forget();
    else if (!this.queues.some((queue) => queue.running)) await this.iommu?.flush();
    await this.#log.set((features & VHOST_F_LOG_ALL) !== 0n, first);
  }

  /** What the device offers and the guest does not see, and why. */
  get masked(): { feature: string; reason: string }[] {
    return this.#negotiation.masked;
  }

  /** What the guest is offered, as far as the device was asked. */
  get offered(): bigint | undefined {
    return this.#negotiation.offered;
  }

  /** Brings every running queue into the wanted mode; resolves when all are. @throws the first error of a queue */
  async applyMode(): Promise<void> {
    await this.#modes.apply();
  }

  /** See {@linkcode VhostBackend.setLogBase}. */
  async setLogBase(log: LogRegion): Promise<void> {
    await this.dirty.setVmmLog(log, this.memory.endGpa);
    this.#log.markAllIfBehind();
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

  /** Guest memory and what else the device can reach: what the operator does to it, past the VMM. */
  get placed(): PlacedMemory {
    return this.#memory;
  }

  async #memoryGrew(): Promise<void> {
    await this.dirty.grow(this.memory.endGpa);
    this.#log.memoryGrew();
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

  /** What src/relay/handover.ts cannot see otherwise. */
  get parts(): { featuresSet: boolean; iommu: boolean; status: number | undefined; inflight: InflightPlace | undefined } {
    const { set, iommu } = this.#negotiation;
    return { featuresSet: set, iommu, status: this.#status.given, inflight: this.#inflight.place };
  }

  /** Takes every doorbell back from the VMM. @throws SvqError DOORBELL_KEPT */
  async withdrawDoorbells(): Promise<void> {
    for (const queue of this.queues) await this.#doorbells.withdraw(queue.index, () => queue.nudge());
  }

  /** Has the front-end given a region that outlives the relay, in which it records what is in flight? */
  get hasInflight(): boolean {
    return this.#inflight.given;
  }

  // ---- rings

  /** See {@linkcode VhostBackend.setVringNum}. */
  async setVringNum(index: number, num: number): Promise<void> {
    const queue = this.#stoppedQueue(index, "its size");
    const packed = this.#negotiation.guestPacked;
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
    const now = queue.iovas ?? queue.addresses;
    const same = now !== undefined && (queue.iovas !== undefined) === this.#negotiation.iommu && now.desc === addresses.desc &&
      now.avail === addresses.avail && now.used === addresses.used;
    if (same) {
      if (queue.iovas !== undefined) {
        queue.iovas = addresses;
        // A driver that starts anew may find the same IOVAs, with other memory behind them.
        if (queue.state === "stopped" || queue.state === "failed") queue.place(undefined);
      }
      await queue.setLogGpa(addresses.logGpa);
      return;
    }
    const stopped = this.#stoppedQueue(index, "the address of a part");
    // Rings come after memory: what the VMM has not given by now, it does not give.
    await this.#memory.settle();
    stopped.place(undefined);
    stopped.iovas = this.#negotiation.iommu ? addresses : undefined;
    stopped.addresses = this.#negotiation.iommu ? undefined : addresses;
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
    const base = await this.#rings.stopped(queue, async () => {
      // The VMM reads the log when it has the answer: of a queue that could not be switched, nothing else is known.
      this.#log.markAllIfBehind();
      queue.unkick();
      queue.lastBase = queue.base;
      return queue.base;
    });
    if (this.#negotiation.iommu) await this.iommu?.flush();
    return base;
  }

  /** See {@linkcode VhostBackend.setVringKick}. */
  async setVringKick(index: number, fd: number | null): Promise<void> {
    const queue = this.#queue(index);
    // A new kick eventfd for a ring that runs: the ring changes hands once.
    await this.#rings.left(queue, async () => {
      queue.setKick(fd);
      await this.#rings.start(queue);
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
      else await this.#rings.start(queue);
    });
    await this.net.enabled(index);
  }

  // From here on it is as for any lost device.
  #fence(error: SvqError): void {
    const device = this.#device;
    this.#events.error(toErrorRecord(error));
    device.close().catch((problem) => this.#report(problem));
    this.#deviceGone(device, error);
  }

  // Its owner may find a successor; meanwhile the VMM is held and the guest's requests wait.
  #deviceGone(device: VhostBackend, error: Error): void {
    if (this.#closed || device !== this.#device) return;
    if (this.#events.deviceLost === undefined) return this.#deviceFailed(error);
    const first = this.#slot.lost === undefined;
    this.#losses++;
    this.#slot.lose(error);
    this.net.lost();
    this.#rings.lose();
    if (first) this.#events.deviceLost(error);
  }

  /**
   * Puts `device`, another connection to the device that was lost, in its place: features, memory, status, and every ring
   * from where it stood. Where the Worker has a record, what was in flight is done again, in order.
   *
   * @throws SvqError FEATURES_CHANGED, and what the device says; the relay still waits for a device then
   */
  async attach(device: VhostBackend): Promise<void> {
    const adopt = await this.#negotiation.compare(device);
    const losses = this.#losses;
    this.#slot.replace(device);
    this.#listen(device);
    try {
      await adopt();
      if (this.#memory.atDevice) await device.setMemTable(this.#memory.table());
      await this.#status.beforeRings(device);
      await this.#rings.recover();
      await this.#status.afterRings(device);
      if (losses !== this.#losses) throw new SvqError("DEVICE_LOST", "The device was lost again at once");
    } catch (error) {
      for (const queue of this.queues) await queue.lane.run(() => queue.lose());
      throw error;
    }
    this.#slot.found();
    // What became ready in the meantime, and what the VMM wishes by now.
    await this.#rings.recover();
    this.applyMode().catch((error) => this.#report(error));
    this.#configSpace.changed().then((changed) => changed && this.onConfigChange?.()).catch((error) => this.#report(error));
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
    return await this.#configSpace.read(offset, size);
  }

  /** The configuration space as the front-end last read it from its start. */
  get configSeen(): Uint8Array<ArrayBuffer> | undefined {
    return this.#configSpace.seen;
  }

  /** See {@linkcode VhostBackend.setConfig}. */
  setConfig(offset: number, bytes: Uint8Array<ArrayBuffer>): Promise<void> {
    return this.#slot.use((device) => device.setConfig(offset, bytes));
  }

  /** See {@linkcode VhostBackend.getStatus}; with NEEDS_RESET where a queue has failed. */
  async getStatus(): Promise<number> {
    return await this.#status.get(this.needsReset);
  }

  /**
   * See {@linkcode VhostBackend.setStatus}. Status 0 stops all rings first. Their bases stay: QEMU 7.2 clears the status
   * and only then asks for them.
   */
  async setStatus(status: number): Promise<void> {
    if (status === 0) await this.#rings.stop();
    if (status === 0) this.net.reset();
    await this.#status.set(status);
  }

  /** See {@linkcode VhostBackend.reset}. */
  async reset(): Promise<void> {
    if (this.#slot.lost !== undefined) await this.#rings.drop();
    else await this.#rings.stop();
    this.net.reset();
    this.#status.clear();
    await this.#slot.use((device) => device.reset());
  }

  /** See {@linkcode VhostBackend.suspend}. Stops every ring. */
  async suspend(): Promise<void> {
    await this.#memory.settle();
    await this.#rings.suspend();
  }

  /** See {@linkcode VhostBackend.resume}. Starts what {@linkcode suspend} stopped. */
  async resume(): Promise<void> {
    await this.#rings.resume();
  }

  /** Stops every ring, lets go of guest memory, and leaves the device to its owner. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#slot.giveUp("The relay has ended");
    await this.#rings.end();
    this.#device.onConfigChange = undefined;
    this.#device.onFailure = undefined;
    for (const worker of this.#workers) await worker.close();
    this.net.close();
    for (const queue of this.#queues.values()) queue.close();
    this.#queues.clear();
    this.#doorbells.forget();
    this.dirty.close();
    this.#memory.close();
    this.#inflight.close();
  }

  /** The same as {@linkcode close}. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}
