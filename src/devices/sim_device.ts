/**
 * Embedded devices in this process: `sim:blk`, `sim:net` and `sim:loopback`.
 *
 * The main thread keeps the device's face (features, configuration, status, memory maps, descriptors); a worker has the
 * rings and does the work. A ring starts when it has a size, addresses, a kick and is enabled, as in vhost-user: after
 * `getVringBase` it wants a new kick.
 *
 * @module
 */
import { fromErrorRecord, SvqError } from "../errors.ts";
import { createMemfd, dupFd, fileSize, O, openFd, type OwnedFd, signalEventfd, truncateFd, WorkerLink } from "../ffi/mod.ts";
import { GuestMemory } from "../memory/guest_memory.ts";
import type { MemoryRegion } from "../memory/region.ts";
import { bitsOf } from "../uapi/bits.ts";
import { VIRTIO_ID, VIRTIO_STATUS } from "../uapi/virtio.ts";
import { VIRTIO_BLK_SECTOR_BYTES } from "../uapi/virtio_blk.ts";
import type { NetStateDocument } from "../net/state.ts";
import { VIRTIO_NET_HDR_BYTES } from "../uapi/virtio_net.ts";
import { Tap } from "../vhost/tap.ts";
import type { BackendInfo, LogRegion, VhostBackend, VringAddresses } from "../vhost/backend.ts";
import type { BlkBacking } from "./blk.ts";
import type { BrokenEvent, OpenCommand, QueueFds, SimCounters, StartCommand } from "./messages.ts";
import { CableEnd } from "./cable.ts";
import type { NetBacking, NetCounters } from "./net.ts";
import {
  checkSimOptions,
  configSpace,
  DEFAULT_MAC,
  DEFAULT_MTU,
  DEFAULT_NUM,
  DEFAULT_SIZE,
  netConfig,
  offeredFeatures,
  queueCount,
  type SimOptions,
} from "./options.ts";

// What holds of an embedded device, in vhost-user's words: MQ, REPLY_ACK, CONFIG, RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS.
const PROTOCOL_FEATURES = bitsOf([0, 3, 9, 13, 15, 16]);
// A network device also has RARP and MTU.
const NET_PROTOCOL_FEATURES = bitsOf([2, 4]);
const MAX_MEM_SLOTS = 509;

class QueueState {
  num = 0;
  addresses: VringAddresses | undefined;
  base = 0;
  enabled = false;
  running = false;
  kickSet = false;
  kick: OwnedFd | undefined;
  call: OwnedFd | undefined;
  err: OwnedFd | undefined;

  get fds(): QueueFds {
    return { kick: this.kick?.fd ?? -1, call: this.call?.fd ?? -1, err: this.err?.fd ?? -1 };
  }

  close(): void {
    for (const fd of [this.kick, this.call, this.err]) fd?.close();
    this.kick = this.call = this.err = undefined;
    this.kickSet = false;
  }
}

/** An embedded device, driven like any other. */
export class SimDevice implements VhostBackend {
  /** Facts about the device. */
  readonly info: BackendInfo;
  /** Called when the status says NEEDS_RESET. */
  onConfigChange: (() => void) | undefined;
  /** Called once when the worker died. */
  onFailure: ((error: Error) => void) | undefined;
  /** Why queues stopped, in order; cleared by a reset. */
  readonly errors: SvqError[] = [];
  readonly #link: WorkerLink;
  readonly #memory = new GuestMemory();
  readonly #backing: OwnedFd | undefined;
  readonly #offered: bigint;
  readonly #config: Uint8Array<ArrayBuffer>;
  /** Announces a guest at this device's port; network devices only. */
  readonly sendRarp?: (mac: Uint8Array<ArrayBuffer>) => Promise<void>;
  /** Sets the MTU that was agreed on; network devices only. */
  readonly setMtu?: (mtu: number) => Promise<void>;
  readonly #port: NetPort | undefined;
  readonly #queues: QueueState[];
  /** Largest ring, descriptors. */
  readonly numMax: number;
  #features = 0n;
  #status = 0;
  #closing: Promise<void> | undefined;

  private constructor(options: SimOptions, address: string, link: WorkerLink, parts: Parts) {
    const { backing, port, blk } = parts;
    const queues = queueCount(options);
    this.#port = port;
    this.#link = link;
    this.#backing = backing;
    this.#offered = offeredFeatures(options);
    this.#config = configSpace(options, blk?.capacity ?? 0);
    this.#queues = Array.from({ length: queues }, () => new QueueState());
    this.numMax = options.num ?? DEFAULT_NUM;
    this.info = {
      kind: "sim",
      address,
      queueNum: queues,
      maxMemSlots: MAX_MEM_SLOTS,
      protocolFeatures: port === undefined ? PROTOCOL_FEATURES : PROTOCOL_FEATURES | NET_PROTOCOL_FEATURES,
      canSuspend: false,
      hasConfig: this.#config.length > 0,
      ...(options.kind === "loopback" ? {} : { deviceId: VIRTIO_ID[options.kind] }),
    };
    link.onEvent = (event) => this.#onBroken(event as BrokenEvent);
    link.onFailure = (error) => this.onFailure?.(error);
    if (port === undefined) return;
    this.#config.set(netConfig(options, port.up));
    port.onLink = (up) => this.#onLink(options, up);
    this.sendRarp = async (mac) => void await link.call("net-announce", mac);
    this.setMtu = (mtu) => link.call("net-mtu", mtu);
    // Somebody may have come while the worker started.
    this.#onLink(options, port.up);
  }

  #onLink(options: SimOptions, up: boolean): void {
    this.#config.set(netConfig(options, up));
    this.#link.call("net-link", up).catch(() => {});
    this.onConfigChange?.();
  }

  /**
   * Opens the disk and starts the device's worker.
   *
   * @param address what `info.address` says; default `sim:KIND`
   * @throws SvqError BAD_DEVICE_OPTION, BAD_SIZE (a disk below one sector), SysError for the file
   */
  static async open(options: SimOptions, address: string = `sim:${options.kind}`): Promise<SimDevice> {
    checkSimOptions(options);
    const backing = options.kind === "blk" ? options.backing?.dup() ?? openBacking(options) : undefined;
    const port = options.kind === "net" ? new NetPort(options) : undefined;
    let link: WorkerLink | undefined;
    try {
      const blk = backing === undefined ? undefined : describeBacking(backing, options);
      link = new WorkerLink(new Worker(new URL("./worker.ts", import.meta.url), { type: "module", name: address }));
      const command: OpenCommand = {
        blk,
        net: port === undefined ? undefined : describePort(port, options),
        queues: queueCount(options),
        latencyUs: options.latencyUs ?? 0,
        jitterUs: options.jitterUs ?? 0,
      };
      await link.call("open", command);
      return new SimDevice(options, address, link, { backing, port, blk });
    } catch (error) {
      await link?.close();
      backing?.close();
      port?.close();
      throw error;
    }
  }

  /** The disk, borrowed; undefined where it is none. */
  get backing(): OwnedFd | undefined {
    return this.#backing;
  }

  #onBroken({ broken, error }: BrokenEvent): void {
    const reason = fromErrorRecord(error);
    this.errors.push(new SvqError(reason.code, `${this.info.address} queue ${broken} stopped: ${reason.message}`));
    this.#status |= VIRTIO_STATUS.NEEDS_RESET;
    this.onConfigChange?.();
  }

  #queue(index: number): QueueState {
    const queue = this.#queues[index];
    if (queue === undefined) {
      throw new SvqError("NO_SUCH_QUEUE", `${this.info.address} has ${this.#queues.length} queues: there is no queue ${index}`);
    }
    return queue;
  }

  #stopped(index: number, what: string): QueueState {
    const queue = this.#queue(index);
    if (queue.running) throw new SvqError("QUEUE_RUNS", `${what} of queue ${index} cannot change while it runs`);
    return queue;
  }

  /** The features that it offers. */
  getFeatures(): Promise<bigint> {
    return Promise.resolve(this.#offered);
  }

  /** Takes effect for rings that start afterwards. @throws SvqError FEATURES_NOT_OFFERED */
  async setFeatures(features: bigint): Promise<void> {
    const foreign = features & ~this.#offered;
    if (foreign !== 0n) {
      throw new SvqError("FEATURES_NOT_OFFERED", `${this.info.address} does not have feature bits 0x${foreign.toString(16)}`);
    }
    this.#features = features;
  }

  /** A part of the configuration space. @throws SvqError OUTSIDE_CONFIG where none of it exists */
  async getConfig(offset: number, size: number): Promise<Uint8Array<ArrayBuffer>> {
    if (!(offset >= 0 && size >= 0 && offset <= this.#config.length && this.#config.length > 0)) {
      throw new SvqError("OUTSIDE_CONFIG", `${this.info.address} has ${this.#config.length} bytes of configuration: no ${offset}+${size}`);
    }
    // What lies behind the end reads as zeros: drivers read the space of a newer header.
    const bytes = new Uint8Array(size);
    bytes.set(this.#config.subarray(offset, offset + size));
    return bytes;
  }

  /** Nothing in the configuration space can be written. @throws SvqError CONFIG_READ_ONLY always */
  async setConfig(): Promise<void> {
    throw new SvqError("CONFIG_READ_ONLY", `The configuration of ${this.info.address} cannot be written`);
  }

  /** Replaces the memory table; regions that stay keep their mapping. */
  async setMemTable(regions: readonly MemoryRegion[]): Promise<void> {
    if (regions.length > MAX_MEM_SLOTS) {
      throw new SvqError("TOO_MANY_REGIONS", `${regions.length} memory regions: ${MAX_MEM_SLOTS} are allowed`);
    }
    const gone = this.#memory.exchange(regions);
    await this.#publishMemory(gone);
  }

  /** Adds a region. */
  async addMemRegion(region: MemoryRegion): Promise<void> {
    if (this.#memory.regions.length === MAX_MEM_SLOTS) {
      throw new SvqError("TOO_MANY_REGIONS", `All ${MAX_MEM_SLOTS} memory slots are taken`);
    }
    this.#memory.add(region);
    await this.#publishMemory();
  }

  /** Removes a region; when it resolves nothing uses it any more. */
  async removeMemRegion(region: Omit<MemoryRegion, "fd" | "fdOffset">): Promise<void> {
    await this.#publishMemory(this.#memory.detach(region));
  }

  async #publishMemory(gone?: Disposable): Promise<void> {
    await this.#link.call("memory", this.#memory.ranges());
    gone?.[Symbol.dispose]();
  }

  /** Takes memory from a VDUSE device instead of a table. @param fd its descriptor, borrowed until the device is closed */
  async useIotlb(fd: number): Promise<void> {
    await this.#link.call("iotlb", fd);
  }

  /** To be called when ranges left the VDUSE device's IOTLB; when it resolves they are not used any more. */
  async iotlbChanged(): Promise<void> {
    await this.#link.call("iotlb-changed");
  }

  /** Where a ring stands, as in {@linkcode getVringBase}, while it goes on. */
  async vringPosition(index: number): Promise<number> {
    const queue = this.#queue(index);
    return (queue.running ? await this.#link.call<number | undefined>("position", index) : undefined) ?? queue.base;
  }

  /** It cannot log what it writes. @throws SvqError NO_DIRTY_LOG always */
  async setLogBase(_log: LogRegion): Promise<void> {
    throw new SvqError("NO_DIRTY_LOG", `${this.info.address} cannot log what it writes`);
  }

  /** Sets the ring's size. @throws SvqError BAD_RING_SIZE above the device's maximum */
  async setVringNum(index: number, num: number): Promise<void> {
    const queue = this.#stopped(index, "The size");
    if (!(Number.isInteger(num) && num >= 1 && num <= this.numMax)) {
      throw new SvqError("BAD_RING_SIZE", `${this.info.address} takes rings of 1 to ${this.numMax} descriptors, not ${num}`);
    }
    queue.num = num;
  }

  /** Addresses are checked when the ring starts. Those of a running ring may be repeated, not changed. */
  async setVringAddresses(index: number, addresses: VringAddresses): Promise<void> {
    const queue = this.#queue(index);
    if (queue.running) {
      const old = queue.addresses!;
      if (old.desc === addresses.desc && old.avail === addresses.avail && old.used === addresses.used) return;
    }
    this.#stopped(index, "The addresses").addresses = { desc: addresses.desc, avail: addresses.avail, used: addresses.used };
  }

  /** Where the ring starts. */
  async setVringBase(index: number, base: number): Promise<void> {
    this.#stopped(index, "The base").base = base;
  }

  /** Stops the ring, waits for what is in flight, and answers its base. */
  async getVringBase(index: number): Promise<number> {
    const queue = this.#queue(index);
    if (queue.running) {
      queue.base = await this.#link.call<number>("stop", index);
      queue.running = false;
    }
    queue.kick?.close();
    queue.kick = undefined;
    queue.kickSet = false;
    return queue.base;
  }

  /** A new kick; null: the ring is looked at every millisecond. Starts the ring when it was all that was missing. */
  async setVringKick(index: number, fd: number | null): Promise<void> {
    const queue = this.#queue(index);
    const old = queue.kick;
    queue.kick = fd === null ? undefined : dupFd(fd);
    queue.kickSet = true;
    await this.#publishFds(index, old);
    await this.#startIfReady(index);
  }

  /** A new call; signalled once when the ring runs, since one may have gone to the old one. */
  async setVringCall(index: number, fd: number | null): Promise<void> {
    const queue = this.#queue(index);
    const old = queue.call;
    queue.call = fd === null ? undefined : dupFd(fd);
    await this.#publishFds(index, old);
    if (queue.running && fd !== null) signalEventfd(fd);
  }

  /** Signalled when the queue stops with an error. */
  async setVringErr(index: number, fd: number | null): Promise<void> {
    const queue = this.#queue(index);
    const old = queue.err;
    queue.err = fd === null ? undefined : dupFd(fd);
    await this.#publishFds(index, old);
  }

  async #publishFds(index: number, old: OwnedFd | undefined): Promise<void> {
    const queue = this.#queue(index);
    try {
      if (queue.running) await this.#link.call("fds", { queue: index, fds: queue.fds });
    } finally {
      old?.close();
    }
  }

  /** Starts or pauses the ring. One that runs as it is asked to is not told again: that would cost a turn of the device's thread. */
  async setVringEnable(index: number, enabled: boolean): Promise<void> {
    const queue = this.#queue(index);
    if (queue.running && queue.enabled === enabled) return;
    queue.enabled = enabled;
    if (queue.running) await this.#link.call("enable", { queue: index, enabled });
    else await this.#startIfReady(index);
  }

  async #startIfReady(index: number): Promise<void> {
    const queue = this.#queue(index);
    const { num, addresses, base, fds } = queue;
    if (queue.running || !queue.enabled || !queue.kickSet || num === 0 || addresses === undefined) return;
    queue.running = true;
    const command: StartCommand = { queue: index, num, addresses, base, fds, features: this.#features };
    try {
      await this.#link.call("start", command);
    } catch (error) {
      queue.running = false;
      if (queue.err !== undefined) signalEventfd(queue.err.fd);
      throw error;
    }
  }

  /** The status; NEEDS_RESET (64) is set when a queue stopped with an error. */
  getStatus(): Promise<number> {
    return Promise.resolve(this.#status);
  }

  /** 0 resets. */
  async setStatus(status: number): Promise<void> {
    if (status === 0) await this.reset();
    else this.#status = status | (this.#status & VIRTIO_STATUS.NEEDS_RESET);
  }

  /** Back to the state after opening, but for memory. When it resolves neither memory nor disk is touched any more. */
  async reset(): Promise<void> {
    await this.#link.call("reset");
    for (const queue of this.#queues) {
      queue.close();
      Object.assign(queue, { num: 0, addresses: undefined, base: 0, enabled: false, running: false });
    }
    this.#features = 0n;
    this.#status = 0;
    this.errors.length = 0;
  }

  /** Rings are stopped one by one instead. @throws SvqError NO_SUSPEND always */
  async suspend(): Promise<void> {
    throw new SvqError("NO_SUSPEND", `${this.info.address} cannot be suspended`);
  }

  /** See {@linkcode suspend}. @throws SvqError NO_SUSPEND always */
  async resume(): Promise<void> {
    throw new SvqError("NO_SUSPEND", `${this.info.address} cannot be suspended`);
  }

  /** What each queue did since the device was opened. */
  counters(): Promise<SimCounters[]> {
    return this.#link.call<SimCounters[]>("counters");
  }

  /** Network device: what the driver has set through the control queue. */
  netState(): Promise<NetStateDocument> {
    return this.#link.call<NetStateDocument>("net-state");
  }

  /** Network device: frames of each queue. */
  netCounters(): Promise<NetCounters[]> {
    return this.#link.call<NetCounters[]>("net-counters");
  }

  /** See {@linkcode VhostBackend.frameCounts}. */
  frameCounts(): Promise<NetCounters[]> {
    return this.netCounters();
  }

  /** Stops at once and lets go of everything. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    await this.#link.close();
    for (const queue of this.#queues) queue.close();
    this.#memory.clear();
    this.#backing?.close();
    this.#port?.close();
  }

  /** The same as {@linkcode close}. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

interface Parts {
  backing: OwnedFd | undefined;
  port: NetPort | undefined;
  blk: BlkBacking | undefined;
}

// Where frames go: a tap, a cable, or a cable of its own that nobody plugs into.
class NetPort implements Disposable {
  onLink: ((up: boolean) => void) | undefined;
  readonly #tap: Tap | undefined;
  readonly #end: CableEnd | undefined;

  constructor(options: SimOptions) {
    const { tap, cable } = options;
    if (tap === undefined) {
      this.#end = CableEnd.plug(cable ?? `unplugged ${crypto.randomUUID()}`, (up) => this.onLink?.(up));
      return;
    }
    this.#tap = new Tap(tap);
    this.#tap.setHeaderSize(VIRTIO_NET_HDR_BYTES);
  }

  get tap(): boolean {
    return this.#tap !== undefined;
  }

  get fd(): number {
    return this.#tap?.fd ?? this.#end!.fd;
  }

  get out(): number {
    return this.#tap?.fd ?? this.#end!.out;
  }

  get up(): boolean {
    return this.#end?.up ?? true;
  }

  close(): void {
    this.#tap?.close();
    this.#end?.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

function describePort(port: NetPort, options: SimOptions): NetBacking {
  const queues = queueCount(options);
  return {
    fd: port.fd,
    out: port.out,
    tap: port.tap,
    mac: options.mac ?? DEFAULT_MAC,
    mtu: options.mtu ?? DEFAULT_MTU,
    pairs: queues >> 1,
    control: queues % 2 === 1,
    link: port.up,
  };
}

function openBacking(options: SimOptions): OwnedFd {
  const { file, size, readOnly } = options;
  if (file === undefined) return createMemfd("svq-disk", size ?? DEFAULT_SIZE);
  const create = size !== undefined && readOnly !== true ? O.CREAT : 0;
  const fd = openFd(file, (readOnly === true ? O.RDONLY : O.RDWR) | create, 0o644);
  try {
    if (create !== 0 && fileSize(fd.fd) < size!) truncateFd(fd.fd, size!);
    return fd;
  } catch (error) {
    fd.close();
    throw error;
  }
}

function describeBacking(backing: OwnedFd, options: SimOptions): BlkBacking {
  const bytes = fileSize(backing.fd);
  if (bytes < VIRTIO_BLK_SECTOR_BYTES) {
    throw new SvqError("BAD_SIZE", `${options.file ?? "The disk"} has ${bytes} bytes: a disk has at least ${VIRTIO_BLK_SECTOR_BYTES}`, {
      hint: "Give size= to make the file as long as the disk shall be",
    });
  }
  return {
    fd: backing.fd,
    capacity: Math.floor(bytes / VIRTIO_BLK_SECTOR_BYTES),
    readOnly: options.readOnly ?? false,
    volatile: options.file === undefined,
    id: options.id ?? "svq-sim",
  };
}
