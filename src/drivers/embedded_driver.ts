/**
 * A guest without a guest: RAM, a driver and a checked workload on any {@linkcode VhostBackend}.
 *
 * The main thread plays the VMM (it brings the device up, stops and starts its rings); a worker plays the guest's
 * processor. Paused, the worker touches nothing; then the rings can be stopped and the state saved, and another
 * EmbeddedDriver goes on with it, here or elsewhere, as a migrated guest does.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { createEventfd, createMemfd, drainEventfd, mapFd, type Mapping, type OwnedFd, WorkerLink } from "../ffi/mod.ts";
import type { MemoryRegion } from "../memory/region.ts";
import { VIRTIO_STATUS } from "../uapi/virtio.ts";
import { encodeNetCommand, type NetCommand } from "../net/command.ts";
import type { InflightPlace, LogRegion, VhostBackend } from "../vhost/backend.ts";
import { PACKED_BASE_START } from "../vring/packed.ts";
import { RamLayout } from "./layout.ts";
import type { DiskOpenCommand, DiskRequest, FinishedEvent, OpenCommand, RunCommand, WorkerState, WorkloadOptions } from "./messages.ts";
import type { DriverReport } from "./report.ts";
import { DEFAULT_RAM_SIZE, type DriverOptions, type DriverShape, missingFeature, negotiate } from "./driver_shape.ts";
import { checkDriverState, type DriverState } from "./state.ts";

export { DEFAULT_RAM_SIZE, type DriverOptions, type DriverShape };

/** When a run ends. Without a limit it goes on until `stop`. */
export interface RunOptions {
  /** After so many requests in all since the workload began. */
  requests?: number;
  /** After so many milliseconds of running. */
  durationMs?: number;
  /** How long the last answers may take then before they count as lost, milliseconds; default 30000. */
  drainMs?: number;
}

const DEFAULT_DRAIN_MS = 30_000;
const STATUS_UP = VIRTIO_STATUS.ACKNOWLEDGE | VIRTIO_STATUS.DRIVER;

interface QueueFds {
  kick: OwnedFd;
  call: OwnedFd;
  err: OwnedFd;
}

/** The driver. It does not own the device: close that after it. */
export class EmbeddedDriver implements AsyncDisposable {
  /** The guest's RAM. */
  readonly ram: OwnedFd;
  /** Where things lie in it. */
  readonly layout: RamLayout;
  #backend: VhostBackend;
  #inflight: { file: OwnedFd; place: InflightPlace } | undefined;
  readonly #shape: DriverShape;
  readonly #mapping: Mapping;
  readonly #fds: QueueFds[];
  readonly #link: WorkerLink;
  #log: Mapping | undefined;
  #bases: number[] | undefined;
  #run: PromiseWithResolvers<DriverReport> | undefined;
  #closing: Promise<void> | undefined;

  private constructor(backend: VhostBackend, shape: DriverShape, ram: OwnedFd) {
    this.layout = new RamLayout(shape.ram);
    this.ram = ram;
    this.#backend = backend;
    this.#shape = shape;
    using made = new DisposableStack();
    const event = () => made.use(createEventfd());
    this.#mapping = made.use(mapFd(ram.fd, { length: shape.ram.ramSize, what: "guest RAM" }));
    this.#fds = Array.from({ length: shape.ram.queues }, () => ({ kick: event(), call: event(), err: event() }));
    this.#link = new WorkerLink(new Worker(new URL("./worker.ts", import.meta.url), { type: "module", name: "guest" }));
    made.move();
    this.#link.onEvent = (event) => this.#run?.resolve((event as FinishedEvent).finished);
    this.#link.onFailure = (error) => this.#run?.reject(error);
  }

  /**
   * Brings a device up that nobody drives yet; the workload starts with {@linkcode run}.
   *
   * @throws SvqError MISSING_FEATURE (exit code 5), TOO_FEW_QUEUES, RAM_TOO_SMALL, and what the device fails with
   */
  static async open(backend: VhostBackend, options: DriverOptions = {}): Promise<EmbeddedDriver> {
    const shape = await negotiate(backend, options);
    const ram = createMemfd("guest-ram", shape.ram.ramSize);
    return EmbeddedDriver.#start(backend, shape, ram, options.inflight === true);
  }

  /**
   * Goes on where a driver was saved, on another device over the same backing. A run that was going on goes on.
   *
   * @param ram the RAM with the contents of the saved one; taken over, also when this fails
   * @throws SvqError STATE_INVALID, MISSING_FEATURE (exit code 5), and what the device fails with
   */
  static async resume(backend: VhostBackend, ram: OwnedFd, state: DriverState): Promise<EmbeddedDriver> {
    try {
      checkDriverState(state);
    } catch (error) {
      ram.close();
      throw error;
    }
    const shape = { ram: state.ram, features: BigInt(state.features), workload: state.workload };
    const driver = await EmbeddedDriver.standby(backend, ram, shape);
    try {
      await driver.load(state);
      await driver.startRings();
      await driver.unpause();
      return driver;
    } catch (error) {
      await driver.close();
      throw error;
    }
  }

  /**
   * A driver that waits for a saved state: the device knows features and memory, no ring is set up. {@linkcode load},
   * {@linkcode startRings} and {@linkcode unpause} follow.
   *
   * @param ram of the right size; its contents may come later. Taken over, also when this fails
   * @throws SvqError MISSING_FEATURE (exit code 5), and what the device fails with
   */
  static async standby(backend: VhostBackend, ram: OwnedFd, shape: DriverShape): Promise<EmbeddedDriver> {
    let driver: EmbeddedDriver;
    try {
      const missing = shape.features & ~await backend.getFeatures();
      if (missing !== 0n) throw missingFeature(backend, missing);
      driver = new EmbeddedDriver(backend, shape, ram);
    } catch (error) {
      ram.close();
      throw error;
    }
    try {
      await driver.introduce();
      return driver;
    } catch (error) {
      await driver.close();
      throw error;
    }
  }

  /**
   * Takes over a saved state after {@linkcode standby}; starts nothing.
   *
   * @throws SvqError STATE_INVALID, also when it is of a driver of another shape
   */
  async load(state: DriverState): Promise<void> {
    checkDriverState(state);
    const { ram, features, workload } = this.#shape;
    if (BigInt(state.features) !== features || canonical([state.ram, state.workload]) !== canonical([ram, workload])) {
      throw new SvqError("STATE_INVALID", "The driver's state cannot be used: it is of a driver of another shape");
    }
    await this.#open(state.worker);
    if (state.worker.run !== undefined) this.#newRun();
    this.#bases = state.bases;
    await this.#setRings(state.bases);
  }

  /** Lets the device have the rings that {@linkcode load} has set up. The guest's processor stays paused. */
  async startRings(): Promise<void> {
    await this.#enableRings();
    await this.#backend.setStatus(STATUS_UP | VIRTIO_STATUS.FEATURES_OK | VIRTIO_STATUS.DRIVER_OK);
  }

  static async #start(backend: VhostBackend, shape: DriverShape, ram: OwnedFd, inflight: boolean): Promise<EmbeddedDriver> {
    let driver: EmbeddedDriver;
    try {
      driver = new EmbeddedDriver(backend, shape, ram);
    } catch (error) {
      ram.close();
      throw error;
    }
    try {
      await driver.#open(undefined);
      await driver.introduce();
      if (inflight) {
        driver.#inflight = await backend.createInflight?.(shape.ram.queues, shape.ram.num);
        if (driver.#inflight !== undefined) await backend.setInflight!(driver.#inflight.place);
      }
      await driver.#setRings(driver.#fds.map(() => driver.#firstBase));
      await driver.startRings();
      await driver.#link.call("kick");
      await driver.#setPairs();
      return driver;
    } catch (error) {
      await driver.close();
      throw error;
    }
  }

  async #setPairs(): Promise<void> {
    const { workload } = this.#shape;
    if (workload.kind !== "net" || !workload.options.control || workload.options.pairs === 1) return;
    const { pairs } = workload.options;
    if (await this.control({ name: "VQ_PAIRS_SET", pairs })) return;
    throw new SvqError("DEVICE_REFUSED", `${this.#backend.info.address} refused to use ${pairs} queue pairs`);
  }

  async #open(state: WorkerState | undefined): Promise<void> {
    const command: OpenCommand = {
      ...this.#shape,
      address: this.#mapping.address,
      queues: this.#fds.map(({ kick, call }) => ({ kick: kick.fd, call: call.fd })),
      state,
    };
    await this.#link.call("open", command);
  }

  /** After the device was reset in {@linkcode standby}: features and memory once more. */
  async introduce(): Promise<void> {
    const backend = this.#backend;
    await backend.setStatus(STATUS_UP);
    await backend.setFeatures(this.#shape.features);
    await backend.setStatus(STATUS_UP | VIRTIO_STATUS.FEATURES_OK);
    await backend.setMemTable(this.regions);
  }

  /** The device's index of a queue: a network device's control queue is its last one, however many pairs are used. */
  deviceIndex(queue: number): number {
    const { workload } = this.#shape;
    return workload.kind === "net" && queue === workload.options.pairs * 2 ? workload.options.controlIndex : queue;
  }

  get #firstBase(): number {
    return this.#shape.ram.packed ? PACKED_BASE_START : 0;
  }

  async #setRings(bases: readonly number[]): Promise<void> {
    const backend = this.#backend;
    for (const [queue, { call, err }] of this.#fds.entries()) {
      const index = this.deviceIndex(queue);
      await backend.setVringNum(index, this.#shape.ram.num);
      await backend.setVringBase(index, bases[queue]!);
      await backend.setVringAddresses(index, this.layout.addresses(queue));
      await backend.setVringCall(index, call.fd);
      await backend.setVringErr(index, err.fd);
    }
  }

  async #enableRings(): Promise<void> {
    for (const [queue, { kick }] of this.#fds.entries()) {
      const index = this.deviceIndex(queue);
      await this.#backend.setVringKick(index, kick.fd);
      await this.#backend.setVringEnable(index, true);
    }
    this.#bases = undefined;
  }

  /** The device died: what it has answered and not announced is no lost call, until {@linkcode EmbeddedDriver.reattach}. */
  async bereave(): Promise<void> {
    await this.#link.call("alone");
  }

  /**
   * The device died and has a successor: hands it features, memory, the in-flight region and the rings, as a VMM does. The
   * guest's processor runs on meanwhile.
   *
   * @throws SvqError MISSING_FEATURE (exit code 5), and what the successor fails with; then another one may be tried
   */
  async reattach(backend: VhostBackend): Promise<void> {
    const missing = this.#shape.features & ~await backend.getFeatures();
    if (missing !== 0n) throw missingFeature(backend, missing);
    this.#backend = backend;
    await this.introduce();
    if (this.#inflight !== undefined) await backend.setInflight?.(this.#inflight.place);
    await this.#setRings(this.#fds.map((_, index) => this.#usedBase(index)));
    await this.startRings();
    await this.#link.call("kick");
  }

  // All that a VMM knows of a ring whose device died. Of a packed ring it is nothing.
  #usedBase(index: number): number {
    if (this.#shape.ram.packed) return PACKED_BASE_START;
    const used = this.layout.ringOffset(index) + this.layout.ring.used.offset;
    return Atomics.load(new Uint16Array(this.#mapping.buffer(used, 4)), 1);
  }

  /** The memory table, as the device has it. */
  get regions(): MemoryRegion[] {
    return this.layout.regions(this.ram.fd);
  }

  /** The negotiated features. */
  get features(): bigint {
    return this.#shape.features;
  }

  /** What the driver does. */
  get workload(): WorkloadOptions {
    return this.#shape.workload;
  }

  /** Where the RAM lies in this process, bytes: valid until `close`. */
  get address(): number {
    return this.#mapping.address;
  }

  /**
   * net: has the device do a control command.
   *
   * @returns whether it took it
   * @throws SvqError NO_CONTROL_QUEUE
   */
  async control(command: NetCommand): Promise<boolean> {
    await this.unpause();
    return await this.#link.call<boolean>("control", encodeNetCommand(command));
  }

  /** Starts the workload, or goes on with it. @returns how it went, when it ended by its limits or by `stop` */
  async run(options: RunOptions = {}): Promise<DriverReport> {
    const { promise } = this.#newRun();
    const command: RunCommand = { drainMs: DEFAULT_DRAIN_MS, ...options };
    await this.#link.call("run", command);
    await this.unpause();
    return this.#withDeviceErrors(await promise);
  }

  #newRun(): PromiseWithResolvers<DriverReport> {
    this.#run = Promise.withResolvers<DriverReport>();
    // Nobody may be waiting for it.
    this.#run.promise.catch(() => {});
    return this.#run;
  }

  /** How the run ends that was going on when the state was saved which this driver resumed. */
  async finished(): Promise<DriverReport> {
    const { promise } = this.#run ?? this.#newRun();
    return this.#withDeviceErrors(await promise);
  }

  #withDeviceErrors(report: DriverReport): DriverReport {
    const broken = this.#fds.flatMap(({ err }, index) => drainEventfd(err.fd) > 0 ? [`queue ${index}: the device signalled an error`] : []);
    return { ...report, faults: [...report.faults, ...broken] };
  }

  /** Stops the guest's processor where it is; requests stay out. Resolves when it touches nothing any more. */
  pause(): Promise<void> {
    return this.#link.call("pause");
  }

  /** Lets it go on, and has it look at its rings. */
  async unpause(): Promise<void> {
    if (this.#bases !== undefined) {
      throw new SvqError("RINGS_STOPPED", "The device's rings are stopped: start them before the driver goes on");
    }
    await this.#link.call("unpause");
    await this.#link.call("kick");
  }

  /**
   * Holds the guest's processor still for a share of its time, in slices of a few milliseconds: it writes less memory and makes
   * fewer requests. Not part of a saved state.
   *
   * @param percent 0 (full speed) to 99
   */
  throttle(percent: number): Promise<void> {
    return this.#link.call("throttle", percent);
  }

  /** How it goes. `lost` is 0 until the end of a run. */
  report(): Promise<DriverReport> {
    return this.#link.call<DriverReport>("report");
  }

  /** Latencies since the workload began, as Histogram saves them. */
  latencies(): Promise<{ counts: number[]; max: number }> {
    return this.#link.call("latencies");
  }

  /** Ends a run: makes no new requests and waits for those that are out. What is not back then is lost. */
  async stop(drainMs = DEFAULT_DRAIN_MS): Promise<DriverReport> {
    await this.unpause();
    return this.#withDeviceErrors(await this.#link.call<DriverReport>("drain", drainMs));
  }

  /**
   * Records the pages that the driver itself writes, as a VMM's log of its processors does (the device's writes are the
   * relay's or the device's business). Nothing ends it.
   */
  async setDirtyLog(log: LogRegion | undefined): Promise<void> {
    const mapping = log === undefined ? undefined : mapFd(log.fd, { offset: log.offset, length: log.size, what: "dirty log" });
    await this.#link.call("log", mapping === undefined ? undefined : { address: mapping.address, size: mapping.length });
    this.#log?.close();
    this.#log = mapping;
  }

  /**
   * Makes ready for copying the disk while the guest works, through the guest's own first queue; {@linkcode closeDisk} undoes it.
   *
   * @param buffers how many are wanted at most, each of BLOCK_BYTES
   * @param dirty where the workload's writes are marked from now on, a bit for each 4096 bytes of disk
   * @returns offsets in RAM: of a block for heads, then of the buffers
   * @throws SvqError NO_DISK, RAM_TOO_SMALL; DISK_BUSY when the device still has requests of an earlier copy
   */
  openDisk(buffers: number, dirty: SharedArrayBuffer): Promise<number[]> {
    return this.#link.call<number[]>("disk-open", { buffers, dirty } satisfies DiskOpenCommand);
  }

  /** Does requests on the disk, each in a buffer of its own; resolves when all are back. @throws SvqError DISK_IO */
  diskRequests(requests: readonly DiskRequest[]): Promise<void> {
    return this.#link.call("disk", requests);
  }

  /** Keeps some sectors free of the workload's requests, until {@linkcode closeDisk}. @returns undefined when all are in use */
  holdSectors(): Promise<{ sector: number; count: number } | undefined> {
    return this.#link.call("disk-hold");
  }

  /** Marks what the writes that are out may change, as if they were done: when the guest stands still for the last time. */
  markDiskWrites(): Promise<void> {
    return this.#link.call("disk-mark");
  }

  /** Ends a copy: buffers go back to the workload, and nothing is marked any more. @throws SvqError DISK_BUSY */
  closeDisk(): Promise<void> {
    return this.#link.call("disk-close");
  }

  /** Stops the device's rings; it drains what is out. @returns the base of each queue */
  async stopRings(): Promise<number[]> {
    if (this.#bases !== undefined) return this.#bases;
    const bases: number[] = [];
    for (const index of this.#fds.keys()) bases.push(await this.#backend.getVringBase(this.deviceIndex(index)));
    return this.#bases = bases;
  }

  /** Pauses, stops the rings and saves all that another driver needs besides the RAM's contents, which are final now. */
  async exportState(): Promise<DriverState> {
    await this.pause();
    const bases = await this.stopRings();
    const worker = await this.#link.call<WorkerState>("save");
    const { ram, features, workload } = this.#shape;
    return { version: 1, ram, features: `0x${features.toString(16)}`, bases, workload, worker };
  }

  /** Goes on here after {@linkcode exportState}: nobody took the state over. */
  async continueHere(): Promise<void> {
    if (this.#bases !== undefined) {
      await this.#setRings(this.#bases);
      await this.#enableRings();
    }
    await this.unpause();
  }

  /** Stops the guest's processor for good, and lets go of its RAM. The device's rings are stopped first where it still answers. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    await this.#link.close();
    try {
      await this.#backend.reset();
    } catch { /* The device is gone: nothing of it uses the RAM any more. */ }
    this.#run?.reject(new SvqError("CLOSED", "The driver was closed while it ran"));
    for (const { kick, call, err } of this.#fds) {
      for (const fd of [kick, call, err]) fd.close();
    }
    this.#log?.close();
    this.#inflight?.file.close();
    this.#mapping.close();
    this.ram.close();
  }

  /** The same as {@linkcode close}. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

// JSON with sorted keys: for comparing plain data.
function canonical(value: unknown): string {
  return JSON.stringify(
    value,
    (_key, item) =>
      typeof item === "object" && item !== null && !Array.isArray(item)
        ? Object.fromEntries(Object.entries(item).sort(([a], [b]) => a < b ? -1 : 1))
        : item,
  );
}
