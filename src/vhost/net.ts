/**
 * vhost-net: the kernel's network data path between a ring pair and a tap, as a {@linkcode VhostBackend}. Ring 0 receives,
 * ring 1 transmits; split rings only. A ring runs from NET_SET_BACKEND with the tap to NET_SET_BACKEND with -1.
 *
 * Ring addresses and the memory table are addresses of this process for the kernel: there is nothing to map in a device.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { mapFd, type Mapping } from "../ffi/mod.ts";
import { GuestMemory } from "../memory/guest_memory.ts";
import type { MemoryRegion } from "../memory/region.ts";
import { bit, hasBit } from "../uapi/bits.ts";
import { TUN_F } from "../uapi/tun.ts";
import {
  decodeVringState,
  encodeKernelMemory,
  encodeU64,
  encodeVringAddr,
  encodeVringFile,
  encodeVringState,
  VHOST,
  VHOST_VRING_F_LOG,
  viewOf,
  VRING_NUM_LIMIT,
} from "../uapi/vhost.ts";
import { PROTOCOL_FEATURE } from "../uapi/vhost_user.ts";
import {
  VHOST_NET_F_VIRTIO_NET_HDR,
  VIRTIO_F_ACCESS_PLATFORM,
  VIRTIO_F_RING_RESET,
  VIRTIO_F_VERSION_1,
  VIRTIO_ID,
} from "../uapi/virtio.ts";
import { VIRTIO_NET_FEATURE_BITS, VIRTIO_NET_HDR_BYTES, VIRTIO_NET_HDR_LEGACY_BYTES } from "../uapi/virtio_net.ts";
import type { BackendInfo, LogRegion, VhostBackend, VringAddresses } from "./backend.ts";
import { type KernelDevice, openKernelDevice } from "./kernel_device.ts";
import { KickedRing } from "./kicked_ring.ts";
import { Tap } from "./tap.ts";

const RINGS = 2;
/** Regions that vhost takes unless the module was told otherwise (max_mem_regions). */
const MAX_REGIONS = 64;

const NET = VIRTIO_NET_FEATURE_BITS;
/** What a tap with virtio-net headers does for the guest. */
const TAP_FEATURES = [
  ...[NET.CSUM, NET.GUEST_CSUM, NET.GUEST_TSO4, NET.GUEST_TSO6, NET.GUEST_ECN],
  ...[NET.HOST_TSO4, NET.HOST_TSO6, NET.HOST_ECN],
].reduce((word, number) => word | bit(number), 0n);
/** Of the kernel's offer: the header is the tap's business, translation and ring reset are not for us. */
const NOT_OFFERED = VHOST_NET_F_VIRTIO_NET_HDR | VIRTIO_F_ACCESS_PLATFORM | VIRTIO_F_RING_RESET;

/** The tap as {@linkcode VhostNet} needs it; a fake in tests. */
export type TapLike = Pick<Tap, "fd" | "setHeaderSize" | "setOffloads" | "close">;

/** What a {@linkcode VhostNet} can be told. */
export interface VhostNetOptions {
  /** The device address as the user wrote it. */
  address?: string;
  /** Microseconds that the kernel polls before it sleeps (default 0: not at all). */
  pollUs?: number;
}

/** A vhost-net device with its tap. */
export class VhostNet implements VhostBackend {
  /** See {@linkcode VhostBackend.info}; `queueNum` counts pairs. */
  readonly info: BackendInfo;
  /** Never called: the kernel's device has no configuration. */
  onConfigChange: (() => void) | undefined;
  /** Never called. */
  onFailure: ((error: Error) => void) | undefined;

  readonly #device: KernelDevice;
  readonly #tap: TapLike;
  readonly #memory = new GuestMemory();
  readonly #rings = Array.from({ length: RINGS }, (_, index) => new KickedRing(index));
  readonly #pollUs: number;
  #log: Mapping | undefined;
  #status = 0;
  #closed = false;

  /**
   * Opens /dev/vhost-net and a tap.
   *
   * @param path normally `/dev/vhost-net`
   * @param tap interface name
   * @throws SvqError of opening either
   */
  static open(path: string, tap: string, options: VhostNetOptions = {}): VhostNet {
    const device = openKernelDevice(path, "vhost-net");
    try {
      return new VhostNet(device, new Tap(tap), { address: `${path},tap=${tap}`, ...options });
    } catch (error) {
      device.close();
      throw error;
    }
  }

  /** Takes ownership of both, also when it throws. */
  constructor(device: KernelDevice, tap: TapLike, options: VhostNetOptions = {}) {
    this.#device = device;
    this.#tap = tap;
    this.#pollUs = options.pollUs ?? 0;
    this.info = {
      kind: "vhost-net",
      address: options.address ?? device.path,
      deviceId: VIRTIO_ID.net,
      queueNum: 1,
      maxMemSlots: MAX_REGIONS,
      protocolFeatures: bit(PROTOCOL_FEATURE.LOG_SHMFD),
      canSuspend: false,
      hasConfig: false,
      ringStop: "each",
    };
    try {
      device.ioctl(VHOST.SET_OWNER, null, "VHOST_SET_OWNER");
    } catch (error) {
      device.close();
      tap.close();
      throw error;
    }
  }

  #step<T>(step: () => T): Promise<T> {
    return new Promise((resolve) => {
      if (this.#closed) throw new SvqError("CLOSED", `${this.info.address} is closed`);
      resolve(step());
    });
  }

  #ring(index: number): KickedRing {
    const ring = this.#rings[index];
    if (ring === undefined) throw new SvqError("NO_SUCH_QUEUE", `Queue ${index}: ${this.info.address} has ${RINGS} queues`);
    return ring;
  }

  #stoppedRing(index: number): KickedRing {
    const ring = this.#ring(index);
    if (ring.running) throw new SvqError("RING_RUNS", `Queue ${index}: its size and base cannot change while it runs`);
    return ring;
  }

  // ---- features

  #kernelFeatures(): bigint {
    const bytes = new Uint8Array(8);
    this.#device.ioctl(VHOST.GET_FEATURES, bytes, "VHOST_GET_FEATURES");
    return viewOf(bytes).getBigUint64(0, true);
  }

  /** What the kernel offers for the rings, and what a tap with headers offers for packets. */
  getFeatures(): Promise<bigint> {
    return this.#step(() => (this.#kernelFeatures() & ~NOT_OFFERED) | TAP_FEATURES);
  }

  /** See {@linkcode VhostBackend.setFeatures}; LOG_ALL may change while the rings run. */
  setFeatures(features: bigint): Promise<void> {
    return this.#step(() => {
      const kernel = this.#kernelFeatures() & ~NOT_OFFERED;
      const unknown = features & ~(kernel | TAP_FEATURES);
      if (unknown !== 0n) {
        throw new SvqError("FEATURES_NOT_OFFERED", `${this.info.address} does not offer features 0x${unknown.toString(16)}`);
      }
      const longHeader = (features & (VIRTIO_F_VERSION_1 | bit(NET.MRG_RXBUF))) !== 0n;
      this.#tap.setHeaderSize(longHeader ? VIRTIO_NET_HDR_BYTES : VIRTIO_NET_HDR_LEGACY_BYTES);
      this.#tap.setOffloads(offloads(features));
      this.#device.ioctl(VHOST.SET_FEATURES, encodeU64(features & kernel), "VHOST_SET_FEATURES");
    });
  }

  /** Not possible: vhost-net has no configuration. @throws SvqError UNSUPPORTED */
  getConfig(_offset: number, _size: number): Promise<Uint8Array<ArrayBuffer>> {
    return Promise.reject(this.#noConfig());
  }

  /** Not possible: vhost-net has no configuration. @throws SvqError UNSUPPORTED */
  setConfig(_offset: number, _bytes: Uint8Array<ArrayBuffer>): Promise<void> {
    return Promise.reject(this.#noConfig());
  }

  #noConfig(): SvqError {
    return new SvqError("UNSUPPORTED", `${this.info.address} has no configuration space: the VMM keeps it`);
  }

  // ---- memory

  /** See {@linkcode VhostBackend.setMemTable}. Running rings go over to the new table at once. */
  setMemTable(regions: readonly MemoryRegion[]): Promise<void> {
    return this.#step(() => {
      using _gone = this.#memory.exchange(regions);
      this.#tellMemory();
    });
  }

  /** See {@linkcode VhostBackend.addMemRegion}. */
  addMemRegion(region: MemoryRegion): Promise<void> {
    return this.#step(() => {
      this.#memory.add(region);
      try {
        this.#tellMemory();
      } catch (error) {
        this.#memory.remove(region);
        throw error;
      }
    });
  }

  /** See {@linkcode VhostBackend.removeMemRegion}. */
  removeMemRegion(region: Omit<MemoryRegion, "fd" | "fdOffset">): Promise<void> {
    return this.#step(() => {
      using _gone = this.#memory.detach(region);
      this.#tellMemory();
    });
  }

  #tellMemory(): void {
    this.#device.ioctl(VHOST.SET_MEM_TABLE, encodeKernelMemory(this.#memory.ranges()), "VHOST_SET_MEM_TABLE");
  }

  /** See {@linkcode VhostBackend.setLogBase}; the kernel sets the bits itself. */
  setLogBase(log: LogRegion): Promise<void> {
    return this.#step(() => {
      const mapping = mapFd(log.fd, { offset: log.offset, length: log.size, what: "dirty log" });
      try {
        this.#device.ioctl(VHOST.SET_LOG_BASE, encodeU64(BigInt(mapping.address)), "VHOST_SET_LOG_BASE");
      } catch (error) {
        mapping.close();
        throw error;
      }
      this.#log?.close();
      this.#log = mapping;
    });
  }

  // ---- rings

  /** See {@linkcode VhostBackend.setVringNum}. @throws SvqError BAD_RING_SIZE */
  setVringNum(index: number, num: number): Promise<void> {
    return this.#step(() => {
      const ring = this.#stoppedRing(index);
      if (!(Number.isInteger(num) && num >= 1 && num <= VRING_NUM_LIMIT && (num & (num - 1)) === 0)) {
        throw new SvqError("BAD_RING_SIZE", `Queue ${index}: ${num} descriptors; a split ring has a power of two up to ${VRING_NUM_LIMIT}`);
      }
      ring.num = num;
      this.#startIfReady(ring);
    });
  }

  /** See {@linkcode VhostBackend.setVringAddresses}. On a running ring only the log address may change. */
  setVringAddresses(index: number, addresses: VringAddresses): Promise<void> {
    return this.#step(() => {
      const ring = this.#ring(index);
      ring.addresses = { ...addresses };
      if (ring.running) this.#tellAddresses(ring);
      else this.#startIfReady(ring);
    });
  }

  // The kernel wants addresses of this process, and the log address as a guest address.
  #tellAddresses(ring: KickedRing): void {
    const { desc, avail, used, logGpa } = ring.addresses!;
    const record = encodeVringAddr({
      index: ring.index,
      flags: logGpa === undefined ? 0 : VHOST_VRING_F_LOG,
      desc: this.#memory.addressOf(desc, 16 * ring.num),
      avail: this.#memory.addressOf(avail, 6 + 2 * ring.num),
      used: this.#memory.addressOf(used, 6 + 8 * ring.num),
      logGuestAddr: logGpa ?? 0,
    });
    this.#device.ioctl(VHOST.SET_VRING_ADDR, record, "VHOST_SET_VRING_ADDR");
  }

  /** See {@linkcode VhostBackend.setVringBase}. */
  setVringBase(index: number, base: number): Promise<void> {
    return this.#step(() => void (this.#stoppedRing(index).base = base));
  }

  /** See {@linkcode VhostBackend.getVringBase}. */
  getVringBase(index: number): Promise<number> {
    return this.#step(() => {
      const ring = this.#ring(index);
      this.#stop(ring);
      ring.setKick(null);
      return ring.base;
    });
  }

  /** See {@linkcode VhostBackend.setVringKick}. @throws SvqError KICK_NEEDED for null, unless the kernel polls */
  setVringKick(index: number, fd: number | null): Promise<void> {
    return this.#step(() => {
      const ring = this.#ring(index);
      if (fd === null) throw new SvqError("KICK_NEEDED", `Queue ${index}: ${this.info.address} needs a kick eventfd`);
      ring.setKick(fd);
      if (ring.running) this.#file(VHOST.SET_VRING_KICK, "VHOST_SET_VRING_KICK", index, ring.kickFd);
      else this.#startIfReady(ring);
    });
  }

  /** See {@linkcode VhostBackend.setVringCall}. */
  setVringCall(index: number, fd: number | null): Promise<void> {
    return this.#step(() => {
      const ring = this.#ring(index);
      ring.setCall(fd);
      if (ring.running) this.#file(VHOST.SET_VRING_CALL, "VHOST_SET_VRING_CALL", index, ring.callFd);
    });
  }

  /** See {@linkcode VhostBackend.setVringErr}. */
  setVringErr(index: number, fd: number | null): Promise<void> {
    return this.#step(() => {
      const ring = this.#ring(index);
      ring.setErr(fd);
      if (ring.running) this.#file(VHOST.SET_VRING_ERR, "VHOST_SET_VRING_ERR", index, ring.errFd);
    });
  }

  /** See {@linkcode VhostBackend.setVringEnable}. */
  setVringEnable(index: number, enabled: boolean): Promise<void> {
    return this.#step(() => {
      const ring = this.#ring(index);
      ring.enabled = enabled;
      if (enabled) this.#startIfReady(ring);
      else this.#stop(ring);
    });
  }

  #file(request: number, name: string, index: number, fd: number): void {
    this.#device.ioctl(request, encodeVringFile(index, fd), name);
  }

  #startIfReady(ring: KickedRing): void {
    if (ring.running || !ring.ready) return;
    const { index } = ring;
    const state = (request: number, name: string, num: number) => this.#device.ioctl(request, encodeVringState({ index, num }), name);
    state(VHOST.SET_VRING_NUM, "VHOST_SET_VRING_NUM", ring.num);
    state(VHOST.SET_VRING_BASE, "VHOST_SET_VRING_BASE", ring.base);
    this.#tellAddresses(ring);
    this.#file(VHOST.SET_VRING_ERR, "VHOST_SET_VRING_ERR", index, ring.errFd);
    this.#file(VHOST.SET_VRING_CALL, "VHOST_SET_VRING_CALL", index, ring.callFd);
    this.#file(VHOST.SET_VRING_KICK, "VHOST_SET_VRING_KICK", index, ring.kickFd);
    if (this.#pollUs > 0) state(VHOST.SET_VRING_BUSYLOOP_TIMEOUT, "VHOST_SET_VRING_BUSYLOOP_TIMEOUT", this.#pollUs);
    this.#file(VHOST.NET_SET_BACKEND, "VHOST_NET_SET_BACKEND", index, this.#tap.fd);
    ring.running = true;
    ring.kick();
  }

  #stop(ring: KickedRing): void {
    if (!ring.running) return;
    this.#file(VHOST.NET_SET_BACKEND, "VHOST_NET_SET_BACKEND", ring.index, -1);
    ring.running = false;
    const bytes = encodeVringState({ index: ring.index, num: 0 });
    this.#device.ioctl(VHOST.GET_VRING_BASE, bytes, "VHOST_GET_VRING_BASE");
    // Above bit 15 newer kernels put the used index.
    ring.base = decodeVringState(bytes).num & 0xffff;
  }

  // ---- the whole device

  /** The status that was set last: the kernel's device has none. */
  getStatus(): Promise<number> {
    return this.#step(() => this.#status);
  }

  /** Kept; 0 stops the rings. */
  setStatus(status: number): Promise<void> {
    return this.#step(() => {
      if (status === 0) this.#resetRings();
      this.#status = status;
    });
  }

  #resetRings(): void {
    for (const ring of this.#rings) {
      this.#stop(ring);
      ring.forget();
    }
    this.#status = 0;
  }

  /** Stops the rings and forgets them; the memory table stays. */
  reset(): Promise<void> {
    return this.#step(() => this.#resetRings());
  }

  /** Stops the rings. */
  suspend(): Promise<void> {
    return this.#step(() => {
      for (const ring of this.#rings) this.#stop(ring);
    });
  }

  /** Starts what {@linkcode suspend} stopped. */
  resume(): Promise<void> {
    return this.#step(() => {
      for (const ring of this.#rings) this.#startIfReady(ring);
    });
  }

  /** Stops everything and lets go of device and tap. */
  close(): Promise<void> {
    if (this.#closed) return Promise.resolve();
    this.#closed = true;
    this.#device.close();
    this.#tap.close();
    for (const ring of this.#rings) ring.forget();
    this.#memory.clear();
    this.#log?.close();
    return Promise.resolve();
  }

  /** The same as {@linkcode close}. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

function offloads(features: bigint): number {
  const has = (number: number) => hasBit(features, number);
  if (!has(NET.GUEST_CSUM)) return 0;
  let bits = TUN_F.CSUM as number;
  if (has(NET.GUEST_TSO4)) bits |= TUN_F.TSO4;
  if (has(NET.GUEST_TSO6)) bits |= TUN_F.TSO6;
  if (has(NET.GUEST_ECN) && (bits & (TUN_F.TSO4 | TUN_F.TSO6)) !== 0) bits |= TUN_F.TSO_ECN;
  return bits;
}

/** The error for `/dev/vhost-net` without a tap. */
export function tapMissing(address: string): SvqError {
  return new SvqError("TAP_MISSING", `${address}: which tap interface should it serve?`, {
    exitCode: EXIT.usage,
    hint: `Write ${address},tap=IFNAME; make one with: ip tuntap add IFNAME mode tap vnet_hdr`,
  });
}
