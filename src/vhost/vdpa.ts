/**
 * vhost-vdpa: a kernel vDPA device as a {@linkcode VhostBackend}, over the ioctls and IOTLB messages of /dev/vhost-vdpa-N.
 *
 * # States
 *
 *     reset --setFeatures--> featured --DRIVER_OK--> running <--SUSPEND / RESUME--> suspended
 *       ^                                               |                              |
 *       +------------- reset, setStatus(0), or a rebuild (see below) ------------------+
 *
 * What the front-end sets for a ring is kept here and told to the device in one go with DRIVER_OK, because the kernel takes
 * addresses and bases afterwards only under SUSPEND. Who writes DRIVER_OK:
 *
 * - a front-end that speaks of the device status (setStatus, getStatus) writes it itself, as a virtio driver does;
 * - for one that does not (vhost-user without STATUS), it is written when the first ring is complete and enabled and no other
 *   ring is half set up.
 *
 * A ring that starts or stops after DRIVER_OK is handled by what the driver can do (`info.ringStop`):
 *
 * - `each` (SUSPEND, and the driver is on the tested list of vdpa_drivers.ts): SUSPEND, read the base and disable, or write
 *   size, base, addresses and enable, RESUME. The other rings stall for microseconds.
 * - `together` (SUSPEND, not on the list): SUSPEND, read all bases, reset, set everything up again: a rebuild.
 * - `at-rest` (no SUSPEND): a ring with nothing in flight is parked: nobody adds to it, so the device leaves it alone; with
 *   its last running ring the device is reset. New addresses need the device to be reset, so no other ring may run.
 *
 * A reset drops the maps unless IOTLB_PERSIST was agreed on; they are made again before the next DRIVER_OK.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { cancelWaits, createEventfd, drainEventfd, ERRNO, type OwnedFd, readable, SysError } from "../ffi/mod.ts";
import type { MemoryRegion } from "../memory/region.ts";
import { bit, hasBit } from "../uapi/bits.ts";
import { BACKEND_FEATURE, VRING_NUM_LIMIT } from "../uapi/vhost.ts";
import { PROTOCOL_FEATURE } from "../uapi/vhost_user.ts";
import { VIRTIO_ID, VIRTIO_STATUS } from "../uapi/virtio.ts";
import type { BackendInfo, Doorbell, LogRegion, VhostBackend, VringAddresses, VringStart, VringStop } from "./backend.ts";
import { type KernelDevice, openKernelDevice } from "./kernel_device.ts";
import { memlockStatus } from "./memlock.ts";
import { pinsMemory, ringStopOf } from "./vdpa_drivers.ts";
import { VdpaEngine } from "./vdpa_engine.ts";
import { VdpaMaps } from "./vdpa_maps.ts";
import { VdpaNode } from "./vdpa_node.ts";
import type { VdpaRing } from "./vdpa_ring.ts";

const PAGE = 4096;
/** What a front-end reads while the device is reset and set up again behind its back. */
const STATUS_DRIVER_OK = VIRTIO_STATUS.ACKNOWLEDGE | VIRTIO_STATUS.DRIVER | VIRTIO_STATUS.FEATURES_OK | VIRTIO_STATUS.DRIVER_OK;
/** The address space of a ring that is kept from guest memory. */
const OWN_ASID = 1;
/** IOTLB entries that kernels from 7.2 on allow in an address space. */
const MAX_MAPS = 2048;

/** Backend features that this code knows how to use. */
const WANTED_BACKEND_FEATURES = Object.values(BACKEND_FEATURE).reduce((word, number) => word | bit(number), 0n);

/** What a {@linkcode VhostVdpa} can be told. */
export interface VdpaOptions {
  /** Parent driver, as src/vhost/sysfs.ts finds it; decides what is believed of the device. */
  driver?: string | undefined;
  /** The device address as the user wrote it (default: the path). */
  address?: string;
  /** How long a ring of a device without SUSPEND may take to come to rest, ms (default 1000). */
  restTimeoutMs?: number;
  /** Addresses that its IOMMU keeps for itself, as src/vhost/sysfs.ts finds them. */
  reserved?: BackendInfo["iovaReserved"] | undefined;
  /** For tests: whether maps pin memory. */
  pins?: boolean | undefined;
}

/** A vhost-vdpa device, owned and open. */
export class VhostVdpa implements VhostBackend {
  /** See {@linkcode VhostBackend.info}. For a net device `queueNum` counts pairs, as vhost-user does. */
  readonly info: BackendInfo;
  /** Backend features in force. */
  readonly backendFeatures: bigint;
  /** Rings that the device has, control queue included. */
  readonly vqsCount: number;
  /** Largest ring, descriptors. */
  readonly vringNumMax: number;
  /** What the device can reach. */
  readonly maps: VdpaMaps;
  /** Typed ioctls, for what the interface does not cover (groups, ASIDs). */
  readonly node: VdpaNode;
  /** See {@linkcode VhostBackend.onFailure}. */
  onFailure: ((error: Error) => void) | undefined;

  readonly #configCall: OwnedFd;
  readonly #configSize: number;
  readonly #engine: VdpaEngine;
  #closed = false;
  #onConfigChange: (() => void) | undefined;
  #watching = false;
  #tail: Promise<unknown> = Promise.resolve();

  /**
   * Opens a device by its node; the device is reset by that.
   *
   * @param path `/dev/vhost-vdpa-N`
   * @throws SvqError DEVICE_IN_USE, NO_SUCH_DEVICE, MODULE_MISSING, PERMISSION
   */
  static open(path: string, options: VdpaOptions = {}): VhostVdpa {
    return new VhostVdpa(openKernelDevice(path, "vhost-vdpa"), options);
  }

  /** Takes ownership of `device`, also when it throws. */
  constructor(device: KernelDevice, options: VdpaOptions = {}) {
    this.node = new VdpaNode(device);
    this.#configCall = createEventfd();
    try {
      setOwner(this.node, device.path);
      const { node } = this;
      const offered = node.backendFeatures() & WANTED_BACKEND_FEATURES;
      this.backendFeatures = hasBit(offered, BACKEND_FEATURE.IOTLB_ASID) ? offered : offered & ~bit(BACKEND_FEATURE.DESC_ASID);
      if (this.backendFeatures !== 0n) node.setBackendFeatures(this.backendFeatures);
      const deviceId = node.deviceId();
      const isNet = deviceId === VIRTIO_ID.net;
      this.vqsCount = node.vqsCount() ?? (isNet ? 2 : 1);
      this.vringNumMax = node.vringNumMax();
      this.#configSize = node.configSize();
      const range = node.iovaRange();
      const canSuspend = this.#has(BACKEND_FEATURE.SUSPEND);
      const addressSpaces = node.asNum() ?? 1;
      const pins = "pins" in options ? options.pins : pinsMemory(options.driver);
      this.info = {
        kind: "vhost-vdpa",
        address: options.address ?? device.path,
        deviceId,
        queueNum: isNet ? Math.max(1, Math.floor(this.vqsCount / 2)) : this.vqsCount,
        maxMemSlots: MAX_MAPS,
        protocolFeatures: bit(PROTOCOL_FEATURE.MQ) | bit(PROTOCOL_FEATURE.CONFIG) | bit(PROTOCOL_FEATURE.STATUS),
        canSuspend,
        hasConfig: this.#configSize > 0,
        iovaRange: range,
        ...(options.reserved === undefined ? {} : { iovaReserved: options.reserved }),
        addressSpaces,
        vringNumMax: this.vringNumMax,
        ringStop: ringStopOf(this.backendFeatures, options.driver),
        ...(pins === undefined ? {} : { pinsMemory: pins }),
      };
      this.maps = new VdpaMaps(node, {
        range,
        addressSpaces,
        batch: this.#has(BACKEND_FEATURE.IOTLB_BATCH),
        asids: this.#has(BACKEND_FEATURE.IOTLB_ASID),
        pins,
        memlock: memlockStatus,
      });
      this.#engine = new VdpaEngine(node, this.maps, {
        address: this.info.address,
        deviceId,
        vqsCount: this.vqsCount,
        backendFeatures: this.backendFeatures,
        ringStop: this.info.ringStop!,
        configCallFd: this.#configCall.fd,
        restTimeoutMs: options.restTimeoutMs ?? 1000,
      });
      node.setConfigCall(this.#configCall.fd);
    } catch (error) {
      device.close();
      this.#configCall.close();
      throw error;
    }
  }

  #has(feature: number): boolean {
    return hasBit(this.backendFeatures, feature);
  }

  /** The device is suspended now. */
  get suspended(): boolean {
    return this.#engine.phase === "suspended";
  }

  // One step after the other: some wait for rings to come to rest.
  #serial<T>(step: () => T | Promise<T>): Promise<T> {
    const result = this.#tail.then(() => {
      if (this.#closed) throw new SvqError("CLOSED", `${this.info.address} is closed`);
      return step();
    });
    this.#tail = result.catch(() => {});
    return result;
  }

  // ---- features, status, configuration

  /** See {@linkcode VhostBackend.getFeatures}. */
  getFeatures(): Promise<bigint> {
    return this.#serial(() => this.node.features());
  }

  /** Acknowledges features; ACCESS_PLATFORM and VERSION_1 always, where the device offers them: it needs them whatever the guest took. */
  setFeatures(features: bigint): Promise<void> {
    return this.#serial(() => this.#engine.setFeatures(features));
  }

  /** See {@linkcode VhostBackend.getConfig}. What lies behind the device's configuration space reads as zero. */
  getConfig(offset: number, size: number): Promise<Uint8Array<ArrayBuffer>> {
    return this.#serial(() => {
      const bytes = new Uint8Array(size);
      const there = Math.min(size, this.#configSize - offset);
      if (there > 0) bytes.set(this.node.config(offset, there));
      return bytes;
    });
  }

  /** See {@linkcode VhostBackend.setConfig}. */
  setConfig(offset: number, bytes: Uint8Array<ArrayBuffer>): Promise<void> {
    return this.#serial(() => this.node.setConfig(offset, bytes));
  }

  /** See {@linkcode VhostBackend.getStatus}. Whoever asks is expected to write DRIVER_OK itself. */
  getStatus(): Promise<number> {
    this.#engine.explicit = true;
    return this.#serial(() => this.node.status() | (this.#engine.frontDriverOk ? STATUS_DRIVER_OK : 0));
  }

  /** See {@linkcode VhostBackend.setStatus}. Bits are only ever added; 0 resets the device. */
  setStatus(status: number): Promise<void> {
    this.#engine.explicit = true;
    return this.#serial(() => {
      if (status === 0) return this.#resetAll();
      const before = this.node.status();
      if ((status & VIRTIO_STATUS.DRIVER_OK) !== 0 && !this.#engine.frontDriverOk) return this.#engine.go();
      // Written again, DRIVER_OK would wake some drivers from SUSPEND.
      const fresh = status & ~before & ~(this.#engine.frontDriverOk ? STATUS_DRIVER_OK : 0);
      if (fresh !== 0) this.node.setStatus(before | status);
    });
  }

  // ---- memory

  /** See {@linkcode VhostBackend.setMemTable}; `gpa` is the IOVA. @throws as {@linkcode VdpaMaps.replaceAll} */
  setMemTable(regions: readonly MemoryRegion[]): Promise<void> {
    return this.#serial(() => this.maps.replaceAll(regions));
  }

  /** See {@linkcode VhostBackend.addMemRegion}. @throws as {@linkcode VdpaMaps.replaceAll} */
  addMemRegion(region: MemoryRegion): Promise<void> {
    return this.#serial(() => this.maps.add(region));
  }

  /** See {@linkcode VhostBackend.removeMemRegion}. */
  removeMemRegion(region: Omit<MemoryRegion, "fd" | "fdOffset">): Promise<void> {
    return this.#serial(() => this.maps.remove(region));
  }

  /** See {@linkcode VhostBackend.mapCounts}. */
  mapCounts(): { mapped: number; remapped: number } {
    return this.maps.counters;
  }

  /** Not possible: vhost-vdpa has no dirty log. @throws SvqError UNSUPPORTED */
  setLogBase(_log: LogRegion): Promise<void> {
    return Promise.reject(new SvqError("UNSUPPORTED", `${this.info.address}: vhost-vdpa has no dirty log; shadow rings replace it`));
  }

  // ---- rings

  /** See {@linkcode VhostBackend.setVringNum}. @throws SvqError BAD_RING_SIZE */
  setVringNum(index: number, num: number): Promise<void> {
    return this.#set(index, (ring) => {
      this.#checkNum(index, num);
      ring.num = num;
    });
  }

  #checkNum(index: number, num: number): void {
    const max = Math.min(this.vringNumMax, VRING_NUM_LIMIT);
    if (Number.isInteger(num) && num >= 1 && num <= max && (num & (num - 1)) === 0) return;
    throw new SvqError("BAD_RING_SIZE", `Queue ${index}: ${num} descriptors; the device takes powers of two up to ${max}`, {
      hint: max < 256 ? `Give the VM's device queue-size=${max}` : undefined,
    });
  }

  /** See {@linkcode VhostBackend.setVringAddresses}; the log address is not used. */
  setVringAddresses(index: number, addresses: VringAddresses): Promise<void> {
    const { desc, avail, used } = addresses;
    return this.#set(index, (ring) => void (ring.addresses = { desc, avail, used }));
  }

  /** See {@linkcode VhostBackend.setVringBase}. */
  setVringBase(index: number, base: number): Promise<void> {
    return this.#set(index, (ring) => void (ring.base = base));
  }

  #set(index: number, change: (ring: VdpaRing) => void): Promise<void> {
    return this.#serial(() => {
      const ring = this.#engine.ring(index);
      if (ring.state === "running") {
        throw new SvqError("RING_RUNS", `Queue ${index}: its size, base and addresses cannot change while it runs`);
      }
      change(ring);
      return this.#engine.startIfReady(ring);
    });
  }

  /** Stops the ring: see the module text. @throws SvqError RING_NOT_AT_REST where the device cannot be stopped with chains in flight */
  async getVringBase(index: number): Promise<number> {
    const [base] = await this.stopVrings([{ index }]);
    return base!;
  }

  /** See {@linkcode VhostBackend.setVringKick}. @throws SvqError KICK_NEEDED for null: a kernel device does not poll */
  setVringKick(index: number, fd: number | null): Promise<void> {
    return this.#serial(() => {
      const ring = this.#engine.ring(index);
      if (fd === null) {
        throw new SvqError("KICK_NEEDED", `Queue ${index}: ${this.info.address} does not poll; the driver must give a kick eventfd`);
      }
      ring.setKick(fd);
      if (ring.state !== "idle") ring.tellKick(this.node);
      return this.#engine.startIfReady(ring);
    });
  }

  /** See {@linkcode VhostBackend.setVringCall}. */
  setVringCall(index: number, fd: number | null): Promise<void> {
    return this.#serial(() => {
      const ring = this.#engine.ring(index);
      ring.setCall(fd);
      if (ring.state !== "idle") ring.tellCall(this.node);
    });
  }

  /** See {@linkcode VhostBackend.setVringErr}. */
  setVringErr(index: number, fd: number | null): Promise<void> {
    return this.#serial(() => {
      const ring = this.#engine.ring(index);
      ring.setErr(fd);
      if (ring.state !== "idle") ring.tellErr(this.node);
    });
  }

  /** See {@linkcode VhostBackend.setVringEnable}. A device without SUSPEND cannot hold a running ring: it goes on until {@linkcode getVringBase}. */
  setVringEnable(index: number, enabled: boolean): Promise<void> {
    return this.#serial(async () => {
      const ring = this.#engine.ring(index);
      ring.enabled = enabled;
      if (enabled) this.#engine.startIfReady(ring);
      else if (ring.state === "running" && this.info.ringStop !== "at-rest") await this.#engine.stop([{ index }], false);
    });
  }

  /** See {@linkcode VhostBackend.stopVrings}. Stopped rings want a new kick before they start again. */
  stopVrings(rings: readonly VringStop[]): Promise<number[]> {
    return this.#serial(async () => {
      const known = rings.map(({ index }) => this.#engine.ring(index));
      await this.#engine.stop(rings, true);
      return known.map((ring) => ring.base);
    });
  }

  /** See {@linkcode VhostBackend.startVrings}. */
  startVrings(rings: readonly VringStart[]): Promise<void> {
    return this.#serial(() => {
      const started: VdpaRing[] = [];
      for (const { index, num, base, addresses: { desc, avail, used }, kick, call, err, enabled } of rings) {
        const ring = this.#engine.ring(index);
        if (ring.state === "running") throw new SvqError("RING_RUNS", `Queue ${index} runs already`);
        this.#checkNum(index, num);
        Object.assign(ring, { num, base, addresses: { desc, avail, used }, enabled });
        ring.setCall(call);
        ring.setErr(err);
        ring.setKick(kick);
        if (ring.ready) started.push(ring);
      }
      if (started.length === 0 || this.#engine.waitsForDriverOk) return;
      if (this.#engine.hasDriverOk) this.#engine.start(started);
      else this.#engine.go();
    });
  }

  /** See {@linkcode VhostBackend.doorbell}. */
  doorbell(index: number): Doorbell | undefined {
    this.#engine.ring(index);
    using page = this.node.doorbell(index);
    return page === undefined ? undefined : { fd: this.node.device.fd, offset: index * PAGE, size: PAGE };
  }

  // ---- the whole device

  #resetAll(): void {
    this.#engine.resetDevice();
    this.#engine.frontDriverOk = false;
    for (const ring of this.#engine.rings.values()) ring.forget();
  }

  /** Resets the device and forgets the rings; maps and features stay known. The next front-end may be one without STATUS. */
  reset(): Promise<void> {
    return this.#serial(() => {
      this.#engine.explicit = false;
      this.#resetAll();
    });
  }

  /** Stops all rings; their bases are stable. Before DRIVER_OK there is nothing to stop. @throws SvqError CANNOT_SUSPEND */
  suspend(): Promise<void> {
    return this.#serial(() => {
      if (!this.info.canSuspend) {
        throw new SvqError("CANNOT_SUSPEND", `${this.info.address}: its driver has no SUSPEND`, { exitCode: EXIT.missingFeature });
      }
      this.#engine.suspendNow();
      this.#engine.held = this.#engine.phase === "suspended";
    });
  }

  /** Undoes {@linkcode suspend}; where the driver has no RESUME, by a rebuild. */
  resume(): Promise<void> {
    return this.#serial(() => {
      this.#engine.held = false;
      if (this.#engine.phase !== "suspended" || this.#engine.inState("running").length === 0) return;
      if (this.#has(BACKEND_FEATURE.RESUME)) return this.#engine.resumeNow();
      this.#engine.readBases();
      this.#engine.rebuild();
    });
  }

  // ---- groups and address spaces

  /** Group of each ring, in order; empty where the device has no groups. */
  groups(): Promise<number[]> {
    return this.#serial(() => {
      const groups = Array.from({ length: this.vqsCount }, (_, index) => this.node.vringGroup(index));
      return groups.some((group) => group === undefined) ? [] : groups as number[];
    });
  }

  /** Puts a group into an address space; before DRIVER_OK. */
  setGroupAsid(group: number, asid: number): Promise<void> {
    return this.#serial(() => this.node.setGroupAsid(group, asid));
  }

  #isolated: MemoryRegion | undefined;

  /** See {@linkcode VhostBackend.isolate}. */
  isolate(index: number, region: MemoryRegion): Promise<boolean> {
    return this.#serial(() => {
      const engine = this.#engine;
      if (!this.#has(BACKEND_FEATURE.IOTLB_ASID) || (this.info.addressSpaces ?? 1) <= OWN_ASID) return false;
      if (engine.hasDriverOk) return engine.isolated !== undefined && sameRegion(this.#isolated, region);
      const group = this.node.vringGroup(index);
      // A group of several rings cannot be taken apart.
      const shared = (other: number) => other !== index && this.node.vringGroup(other) === group;
      if (group === undefined || Array.from({ length: this.vqsCount }, (_, other) => other).some(shared)) return false;
      if (this.#isolated !== undefined) this.maps.remove(this.#isolated, OWN_ASID);
      this.#isolated = engine.isolated = undefined;
      this.maps.add(region, OWN_ASID);
      try {
        this.node.setGroupAsid(group, OWN_ASID);
      } catch (error) {
        if (!(error instanceof SysError)) throw error;
        // Its ring is mapped in address space 0 as well, where everything else is.
        this.maps.remove(region, OWN_ASID);
        return false;
      }
      this.#isolated = { ...region };
      engine.isolated = { group, asid: OWN_ASID };
      return true;
    });
  }

  // ---- configuration changes

  /** See {@linkcode VhostBackend.onConfigChange}. */
  get onConfigChange(): (() => void) | undefined {
    return this.#onConfigChange;
  }

  /** Watched for only while somebody wants to know, so that an idle program can end. */
  set onConfigChange(handler: (() => void) | undefined) {
    this.#onConfigChange = handler;
    if (this.#closed) return;
    if (handler !== undefined && !this.#watching) this.#watch();
    else if (handler === undefined && this.#watching) cancelWaits(this.#configCall.fd);
  }

  async #watch(): Promise<void> {
    this.#watching = true;
    try {
      while (!this.#closed && this.#onConfigChange !== undefined) {
        await readable(this.#configCall.fd);
        drainEventfd(this.#configCall.fd);
        if ((this.node.status() & VIRTIO_STATUS.NEEDS_RESET) !== 0) {
          this.onFailure?.(new SvqError("DEVICE_NEEDS_RESET", `${this.info.address} is broken and asks for a reset`));
        } else this.#onConfigChange?.();
      }
    } catch (error) {
      if (!(error instanceof SvqError && error.code === "CLOSED")) {
        this.onFailure?.(error as Error);
        return;
      }
    } finally {
      this.#watching = false;
    }
    // Somebody else wants to know since the one before was let go.
    if (!this.#closed && this.#onConfigChange !== undefined) this.#watch();
  }

  /** Lets go of the device: the kernel stops, resets and unmaps it. */
  close(): Promise<void> {
    if (this.#closed) return Promise.resolve();
    this.#closed = true;
    cancelWaits(this.#configCall.fd);
    this.node[Symbol.dispose]();
    this.maps.close();
    for (const ring of this.#engine.rings.values()) ring.forget();
    this.#configCall.close();
    return Promise.resolve();
  }

  /** The same as {@linkcode close}. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

function sameRegion(a: MemoryRegion | undefined, b: MemoryRegion): boolean {
  return a !== undefined && a.gpa === b.gpa && a.size === b.size && a.fdOffset === b.fdOffset;
}

function setOwner(node: VdpaNode, path: string): void {
  try {
    node.setOwner();
  } catch (error) {
    // An inherited device may have been claimed by whoever handed it over: only the same process may go on with it.
    if (error instanceof SysError && error.errno === ERRNO.EBUSY && path.startsWith("fd:")) return;
    throw error;
  }
}
