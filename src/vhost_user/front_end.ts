/**
 * The vhost-user front-end: drives a device in another process (qemu-storage-daemon, testpmd, `svq device run`) as a
 * {@linkcode VhostBackend}.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import type { OwnedFd } from "../ffi/fd.ts";
import { connectUnix, UnixStream } from "../ffi/unix_socket.ts";
import type { MemoryRegion } from "../memory/region.ts";
import { bit, bitsOf, hasBit } from "../uapi/bits.ts";
import {
  decodeU64,
  decodeVringState,
  encodeU64,
  encodeVringAddr,
  encodeVringState,
  VHOST_VRING_F_LOG,
  VRING_NUM_LIMIT,
} from "../uapi/vhost.ts";
import { MEM_TABLE_LIMIT, PROTOCOL_FEATURE, REQUEST, RING_LIMIT, VHOST_USER_F_PROTOCOL_FEATURES } from "../uapi/vhost_user.ts";
import type {
  BackendInfo,
  DeviceStateDirection,
  Doorbell,
  InflightPlace,
  LogRegion,
  VhostBackend,
  VringAddresses,
} from "../vhost/backend.ts";
import { BackEndChannel } from "./back_end_channel.ts";
import { closeFds, type MessageHook } from "./connection.ts";
import { DeviceMemory, type KnownRegion } from "./device_memory.ts";
import {
  decodeConfig,
  decodeInflight,
  DEVICE_STATE_NO_FD,
  encodeConfig,
  encodeDeviceState,
  encodeInflight,
  encodeLog,
  encodeMac,
  encodeVringFd,
  protocolError,
  requireRing,
} from "./message.ts";
import { probeVhostUser, type VhostUserProbe } from "./probe.ts";
import { type CallOptions, Requester } from "./requester.ts";
import { ringSizes } from "./region_table.ts";

const RING_PACKED = 34;
/** What QEMU and libvhost-user let one GET_CONFIG carry. */
const CONFIG_READ_LIMIT = 256;
const DEFAULT_TIMEOUT_MS = 60_000;

/** The protocol features that this front-end can use. */
export const FRONT_END_PROTOCOL_FEATURES: bigint = bitsOf([
  PROTOCOL_FEATURE.MQ,
  PROTOCOL_FEATURE.LOG_SHMFD,
  PROTOCOL_FEATURE.RARP,
  PROTOCOL_FEATURE.REPLY_ACK,
  PROTOCOL_FEATURE.MTU,
  PROTOCOL_FEATURE.BACKEND_REQ,
  PROTOCOL_FEATURE.CONFIG,
  PROTOCOL_FEATURE.RESET_DEVICE,
  PROTOCOL_FEATURE.CONFIGURE_MEM_SLOTS,
  PROTOCOL_FEATURE.STATUS,
  PROTOCOL_FEATURE.DEVICE_STATE,
]);

/** The same with INFLIGHT_SHMFD: for whoever gives the device an in-flight region before its rings start, as some then require. */
export const FRONT_END_WITH_INFLIGHT: bigint = FRONT_END_PROTOCOL_FEATURES | bit(PROTOCOL_FEATURE.INFLIGHT_SHMFD);

/** How a {@linkcode VhostUserFrontEnd} is made. */
export interface FrontEndOptions {
  /** The device address as the user wrote it, for messages and `info`. */
  address?: string;
  /** Protocol features that may be negotiated (default {@linkcode FRONT_END_PROTOCOL_FEATURES}). */
  protocolFeatures?: bigint;
  /** Milliseconds to wait for an answer (default 60000; Infinity: for ever). A late answer closes the connection. */
  timeoutMs?: number;
  /** The same for GET_VRING_BASE, which waits for all requests in flight (default Infinity). */
  vringBaseTimeoutMs?: number;
  /**
   * Takes a ring's doorbell, borrowed for the call, or (undefined) stops using it; says whether that was done. Where it is given,
   * HOST_NOTIFIER may be negotiated.
   */
  onDoorbell?: ((index: number, doorbell: Doorbell | undefined) => boolean) | undefined;
  /** Sees every message of the connection and of the back-end's channel. */
  onMessage?: MessageHook | undefined;
}

/** What was negotiated with a device, for a process that goes on with the connection. */
export interface FrontEndState {
  /** Facts about the device. */
  info: BackendInfo;
  /** Did the device offer bit 30? */
  hasProtocolFeatures: boolean;
  /** The memory that the device has, where it was told region by region. */
  memory: KnownRegion[];
}

/**
 * A device behind a vhost-user socket.
 *
 * - `info.queueNum` is what the device answers: for a net device that may be pairs; 1 where it lacks MQ.
 * - A stopped ring (getVringBase) has lost its kick and call eventfds in some devices: set both to start it again.
 * - Without STATUS, getStatus gives back what setStatus was given. Where STATUS is negotiated (info.protocolFeatures), some
 *   devices process nothing until DRIVER_OK is set.
 * - Without bit 30 there are no protocol features, and a ring runs from its kick on: setVringEnable does nothing.
 */
export class VhostUserFrontEnd implements VhostBackend {
  readonly info: BackendInfo;
  onConfigChange: (() => void) | undefined;
  readonly sendRarp?: (mac: Uint8Array<ArrayBuffer>) => Promise<void>;
  readonly setMtu?: (mtu: number) => Promise<void>;
  readonly setDeviceStateFd?: (direction: DeviceStateDirection, phase: number, fd: number) => Promise<OwnedFd | undefined>;
  readonly checkDeviceState?: () => Promise<void>;
  readonly createInflight?: (queues: number, num: number) => Promise<{ file: OwnedFd; place: InflightPlace }>;
  readonly setInflight?: (place: InflightPlace) => Promise<void>;
  readonly #requester: Requester;
  readonly #memory: DeviceMemory;
  readonly #channel: BackEndChannel | undefined;
  readonly #timeoutMs: number;
  readonly #vringBaseTimeoutMs: number;
  readonly #hasProtocolFeatures: boolean;
  readonly #nums = new Map<number, number>();
  readonly #kicked = new Set<number>();
  #packed = false;
  #status = 0;
  #onFailure: ((error: Error) => void) | undefined;
  #lost: SvqError | undefined;

  private constructor(start: Negotiated, options: FrontEndOptions) {
    this.info = start.info;
    this.#requester = start.requester;
    this.#channel = start.channel;
    this.#hasProtocolFeatures = start.hasProtocolFeatures;
    this.#timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS;
    this.#vringBaseTimeoutMs = options.vringBaseTimeoutMs ?? Infinity;
    this.#memory = new DeviceMemory(
      (request, payload, fds, what) => this.#settled(request, payload, { fds, what }),
      this.#has(PROTOCOL_FEATURE.CONFIGURE_MEM_SLOTS),
      start.info.maxMemSlots,
    );
    if (this.#has(PROTOCOL_FEATURE.RARP)) this.sendRarp = async (mac) => await this.#command(REQUEST.SEND_RARP, encodeMac(mac));
    if (this.#has(PROTOCOL_FEATURE.DEVICE_STATE)) {
      this.setDeviceStateFd = (direction, phase, fd) => this.#setDeviceStateFd(direction, phase, fd);
      this.checkDeviceState = () => this.#checkDeviceState();
    }
    if (this.#has(PROTOCOL_FEATURE.INFLIGHT_SHMFD)) {
      this.createInflight = (queues, num) => this.#createInflight(queues, num);
      this.setInflight = (place) => this.#settled(REQUEST.SET_INFLIGHT_FD, encodeInflight(place), { fds: [place.fd] });
    }
    if (this.#has(PROTOCOL_FEATURE.MTU)) this.setMtu = async (mtu) => await this.#command(REQUEST.NET_SET_MTU, encodeU64(BigInt(mtu)));
  }

  async #createInflight(queues: number, num: number): Promise<{ file: OwnedFd; place: InflightPlace }> {
    const received: OwnedFd[] = [];
    const options = { onFds: (fds: OwnedFd[]) => void received.push(...fds) };
    const answer = await this.#call(REQUEST.GET_INFLIGHT_FD, encodeInflight({ size: 0, offset: 0, queues, num }), options);
    const [file, ...rest] = received;
    closeFds(rest);
    const { size, offset } = decodeInflight(answer);
    if (size > 0 && file !== undefined) return { file, place: { fd: file.fd, size, offset, queues, num } };
    file?.close();
    throw new SvqError("DEVICE_REFUSED", `${this.info.address} gave no in-flight region for ${queues} queues of ${num} descriptors`);
  }

  async #setDeviceStateFd(direction: DeviceStateDirection, phase: number, fd: number): Promise<OwnedFd | undefined> {
    const received: OwnedFd[] = [];
    const options = { fds: [fd], onFds: (fds: OwnedFd[]) => void received.push(...fds) };
    const answer = decodeU64(await this.#call(REQUEST.SET_DEVICE_STATE_FD, encodeDeviceState({ direction, phase }), options));
    const failed = (answer & 0xffn) !== 0n;
    if (!failed && received.length > 0 && (answer & DEVICE_STATE_NO_FD) === 0n) return received[0]!;
    closeFds(received);
    if (failed) throw new SvqError("DEVICE_REFUSED", `${this.info.address} refused to ${direction} its state: error ${answer & 0xffn}`);
    return undefined;
  }

  async #checkDeviceState(): Promise<void> {
    // The device answers when it has written or read everything.
    const answer = decodeU64(await this.#call(REQUEST.CHECK_DEVICE_STATE, undefined, { timeoutMs: this.#vringBaseTimeoutMs }));
    if (answer !== 0n) throw new SvqError("DEVICE_REFUSED", `${this.info.address} could not move its state: error ${answer}`);
  }

  /** Connects to the device that listens on `path`. @throws SvqError of connecting or negotiating */
  static connect(path: string, options: FrontEndOptions = {}): Promise<VhostUserFrontEnd> {
    return VhostUserFrontEnd.fromStream(connectUnix(path), { address: `unix:${path}`, ...options });
  }

  /** Takes ownership of `fd`, a connected stream socket. */
  static fromFd(fd: OwnedFd, options: FrontEndOptions = {}): Promise<VhostUserFrontEnd> {
    const address = `fd:${fd.fd}`;
    return VhostUserFrontEnd.fromStream(new UnixStream(fd), { address, ...options });
  }

  /** Takes ownership of a connected stream, e.g. one that a listener accepted from a device that connects. */
  static async fromStream(stream: UnixStream, options: FrontEndOptions = {}): Promise<VhostUserFrontEnd> {
    // What happens before there is an object to tell it to is kept for it.
    const events: { device?: VhostUserFrontEnd } = {};
    const requester = new Requester(stream, {
      onMessage: options.onMessage,
      onLost: (error) => {
        if (events.device !== undefined) events.device.#lose(error);
      },
    });
    let channel: BackEndChannel | undefined;
    try {
      const start = await negotiate(requester, options, () => {
        channel = new BackEndChannel({
          onMessage: options.onMessage,
          onConfigChange: () => events.device?.onConfigChange?.(),
          onDoorbell: options.onDoorbell,
          onViolation: (error) => requester.fail(error),
        });
        return channel;
      });
      const device = new VhostUserFrontEnd(start, options);
      events.device = device;
      if (requester.failure !== undefined) device.#lose(requester.failure);
      return device;
    } catch (error) {
      channel?.close();
      requester.close();
      throw error;
    }
  }

  /**
   * Goes on with the connection of another process, which {@linkcode hold} gave: it is negotiated, its rings are stopped.
   * Nothing is sent.
   *
   * @param sockets owned: the connection, and the channel where there is one
   */
  static adopt(
    state: FrontEndState,
    sockets: { stream: OwnedFd; channel?: OwnedFd | undefined },
    options: FrontEndOptions = {},
  ): VhostUserFrontEnd {
    const events: { device?: VhostUserFrontEnd } = {};
    const requester = new Requester(new UnixStream(sockets.stream), {
      onMessage: options.onMessage,
      onLost: (error) => {
        if (events.device !== undefined) events.device.#lose(error);
      },
    });
    requester.replyAck = hasBit(state.info.protocolFeatures, PROTOCOL_FEATURE.REPLY_ACK);
    const channel = sockets.channel === undefined ? undefined : new BackEndChannel({
      onMessage: options.onMessage,
      onConfigChange: () => events.device?.onConfigChange?.(),
      onDoorbell: options.onDoorbell,
      onViolation: (error) => requester.fail(error),
    }, sockets.channel);
    const { info, hasProtocolFeatures, memory } = state;
    const device = new VhostUserFrontEnd({ info, hasProtocolFeatures, requester, channel }, options);
    device.#memory.adopt(memory);
    events.device = device;
    if (requester.failure !== undefined) device.#lose(requester.failure);
    return device;
  }

  /**
   * Stops using the connection, so that another process can: nothing may be asked until {@linkcode release}. Rings must be stopped.
   *
   * @throws SvqError of the connection; then it is used as before
   */
  async hold(): Promise<{ state: FrontEndState; stream: number; channel: number | undefined }> {
    try {
      const channel = await this.#channel?.hold();
      const stream = await this.#requester.hold();
      const state = { info: this.info, hasProtocolFeatures: this.#hasProtocolFeatures, memory: this.#memory.known };
      return { state, stream, channel };
    } catch (error) {
      this.release();
      throw error;
    }
  }

  /** Has the device been told of other memory, region by region, since this object was made? */
  get memoryChanged(): boolean {
    return this.#has(PROTOCOL_FEATURE.CONFIGURE_MEM_SLOTS) && this.#memory.changes > 0;
  }

  /** Uses the connection again. */
  release(): void {
    this.#channel?.release();
    this.#requester.release();
  }

  /** Asks a device what it is with GET messages only. See {@linkcode probeVhostUser}. */
  static probe(path: string, timeoutMs = 1000): Promise<VhostUserProbe> {
    return probeVhostUser(path, timeoutMs);
  }

  get onFailure(): ((error: Error) => void) | undefined {
    return this.#onFailure;
  }

  /** A handler that comes after the failure is told too: the device may be lost before its owner has looked at it. */
  set onFailure(handler: ((error: Error) => void) | undefined) {
    this.#onFailure = handler;
    if (this.#lost !== undefined) this.#lose(this.#lost);
  }

  #lose(error: SvqError): void {
    this.#lost = error;
    const handler = this.#onFailure;
    if (handler === undefined) return;
    this.#lost = undefined;
    queueMicrotask(() => handler(error));
  }

  #has(feature: number): boolean {
    return hasBit(this.info.protocolFeatures, feature);
  }

  #require(feature: number, what: string): void {
    if (!this.#has(feature)) throw new SvqError("UNSUPPORTED", `${this.info.address} has no ${what}`);
  }

  #call(request: number, payload?: Uint8Array<ArrayBuffer>, options: CallOptions = {}): Promise<Uint8Array<ArrayBuffer>> {
    return this.#requester.call(request, payload, { timeoutMs: this.#timeoutMs, ...options });
  }

  #command(request: number, payload?: Uint8Array<ArrayBuffer>, options: CallOptions = {}): Promise<void> {
    return this.#requester.command(request, payload, { timeoutMs: this.#timeoutMs, ...options });
  }

  // For requests after which the device must have acted: without REPLY_ACK, an answered request behind it proves that.
  async #settled(request: number, payload?: Uint8Array<ArrayBuffer>, options: CallOptions = {}): Promise<void> {
    await this.#command(request, payload, options);
    if (!this.#requester.replyAck) await this.#call(REQUEST.GET_FEATURES);
  }

  async getFeatures(): Promise<bigint> {
    return decodeU64(await this.#call(REQUEST.GET_FEATURES)) & ~bit(VHOST_USER_F_PROTOCOL_FEATURES);
  }

  async setFeatures(features: bigint): Promise<void> {
    // Without bit 30 a device would enable all of its rings.
    const word = this.#hasProtocolFeatures ? features | bit(VHOST_USER_F_PROTOCOL_FEATURES) : features;
    await this.#settled(REQUEST.SET_FEATURES, encodeU64(word));
    this.#packed = hasBit(features, RING_PACKED);
  }

  /** Reads from the first byte on: back-ends built on libvhost-user ignore the offset. */
  async getConfig(offset: number, size: number): Promise<Uint8Array<ArrayBuffer>> {
    this.#require(PROTOCOL_FEATURE.CONFIG, "device configuration");
    const end = offset + size;
    if (!(offset >= 0 && size >= 0 && end <= CONFIG_READ_LIMIT)) {
      throw new SvqError("OUT_OF_RANGE", `Configuration bytes ${offset}+${size} lie outside ${CONFIG_READ_LIMIT}`);
    }
    const answer = await this.#call(REQUEST.GET_CONFIG, encodeConfig({ offset: 0, flags: 0, bytes: new Uint8Array(end) }));
    if (answer.length === 0) throw new SvqError("DEVICE_REFUSED", `${this.info.address} refused to read configuration bytes 0+${end}`);
    const config = decodeConfig(answer);
    if (config.bytes.length !== end) {
      throw protocolError(`Answer to GET_CONFIG: ${config.bytes.length} bytes of configuration instead of ${end}`);
    }
    return config.bytes.slice(offset);
  }

  async setConfig(offset: number, bytes: Uint8Array<ArrayBuffer>): Promise<void> {
    this.#require(PROTOCOL_FEATURE.CONFIG, "device configuration");
    await this.#command(REQUEST.SET_CONFIG, encodeConfig({ offset, flags: 0, bytes }));
  }

  setMemTable(regions: readonly MemoryRegion[]): Promise<void> {
    return this.#memory.set(regions);
  }

  addMemRegion(region: MemoryRegion): Promise<void> {
    return this.#memory.add(region);
  }

  removeMemRegion(region: Omit<MemoryRegion, "fd" | "fdOffset">): Promise<void> {
    return this.#memory.remove(region);
  }

  async setLogBase(log: LogRegion): Promise<void> {
    this.#require(PROTOCOL_FEATURE.LOG_SHMFD, "dirty log in shared memory");
    // Devices answer with nothing, the request's first 8 bytes or all 16; none of them tells success from failure.
    const answer = await this.#call(REQUEST.SET_LOG_BASE, encodeLog(log), { fds: [log.fd] });
    if (![0, 8, 16].includes(answer.length)) throw protocolError(`Answer to SET_LOG_BASE of ${answer.length} bytes`);
  }

  async setVringNum(index: number, num: number): Promise<void> {
    if (!(Number.isInteger(num) && num > 0 && num <= VRING_NUM_LIMIT)) throw new SvqError("BAD_RING_SIZE", `Ring ${index}: size ${num}`);
    await this.#command(REQUEST.SET_VRING_NUM, this.#state(index, num), { what: `ring ${index}` });
    this.#nums.set(index, num);
  }

  #state(index: number, num: number): Uint8Array<ArrayBuffer> {
    return encodeVringState({ index: requireRing(index), num });
  }

  async setVringAddresses(index: number, addresses: VringAddresses): Promise<void> {
    const sizes = ringSizes(this.#nums.get(requireRing(index)) ?? 1, this.#packed);
    const payload = encodeVringAddr({
      index,
      flags: addresses.logGpa === undefined ? 0 : VHOST_VRING_F_LOG,
      desc: this.#memory.toUaddr(addresses.desc, sizes.desc, `Descriptors of ring ${index}`),
      used: this.#memory.toUaddr(addresses.used, sizes.used, `Used ring of ring ${index}`),
      avail: this.#memory.toUaddr(addresses.avail, sizes.avail, `Avail ring of ring ${index}`),
      logGuestAddr: addresses.logGpa ?? 0,
    });
    await this.#command(REQUEST.SET_VRING_ADDR, payload, { what: `ring ${index}` });
  }

  async setVringBase(index: number, base: number): Promise<void> {
    await this.#command(REQUEST.SET_VRING_BASE, this.#state(index, base), { what: `ring ${index}` });
  }

  async getVringBase(index: number): Promise<number> {
    const options = { timeoutMs: this.#vringBaseTimeoutMs, what: `ring ${index}` };
    const answer = decodeVringState(await this.#call(REQUEST.GET_VRING_BASE, this.#state(index, 0), options));
    if (answer.index !== index) throw protocolError(`Answer to GET_VRING_BASE of ring ${index} names ring ${answer.index}`);
    this.#kicked.delete(index);
    return answer.num;
  }

  async setVringKick(index: number, fd: number | null): Promise<void> {
    await this.#setVringFd(REQUEST.SET_VRING_KICK, index, fd);
    this.#kicked.add(index);
  }

  setVringCall(index: number, fd: number | null): Promise<void> {
    return this.#setVringFd(REQUEST.SET_VRING_CALL, index, fd);
  }

  setVringErr(index: number, fd: number | null): Promise<void> {
    return this.#setVringFd(REQUEST.SET_VRING_ERR, index, fd);
  }

  async #setVringFd(request: number, index: number, fd: number | null): Promise<void> {
    await this.#command(request, encodeVringFd({ index, hasFd: fd !== null }), { fds: fd === null ? [] : [fd], what: `ring ${index}` });
  }

  async setVringEnable(index: number, enabled: boolean): Promise<void> {
    const payload = this.#state(index, enabled ? 1 : 0);
    if (this.#hasProtocolFeatures) await this.#settled(REQUEST.SET_VRING_ENABLE, payload, { what: `ring ${index}` });
  }

  async getStatus(): Promise<number> {
    if (!this.#has(PROTOCOL_FEATURE.STATUS)) return this.#status;
    return Number(decodeU64(await this.#call(REQUEST.GET_STATUS)) & 0xffn);
  }

  async setStatus(status: number): Promise<void> {
    if (this.#has(PROTOCOL_FEATURE.STATUS)) await this.#settled(REQUEST.SET_STATUS, encodeU64(BigInt(status)));
    this.#status = status;
  }

  /** RESET_DEVICE where the device has it, else every ring is disabled and stopped and the status cleared. */
  async reset(): Promise<void> {
    if (this.#has(PROTOCOL_FEATURE.RESET_DEVICE)) {
      await this.#settled(REQUEST.RESET_DEVICE);
    } else {
      for (const index of [...this.#kicked]) {
        await this.setVringEnable(index, false);
        await this.getVringBase(index);
      }
      await this.setStatus(0);
    }
    this.#kicked.clear();
    this.#nums.clear();
    this.#packed = false;
    this.#status = 0;
  }

  /** vhost-user has no such request: stop the rings with getVringBase. @throws SvqError UNSUPPORTED */
  suspend(): Promise<void> {
    return Promise.reject(new SvqError("UNSUPPORTED", "A vhost-user device is suspended by stopping its rings"));
  }

  /** vhost-user has no such request either. @throws SvqError UNSUPPORTED */
  resume(): Promise<void> {
    return Promise.reject(new SvqError("UNSUPPORTED", "A vhost-user device is resumed by starting its rings"));
  }

  close(): Promise<void> {
    this.#channel?.close();
    this.#requester.close();
    this.#memory[Symbol.dispose]();
    return Promise.resolve();
  }

  /** The same as {@linkcode close}. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

interface Negotiated {
  info: BackendInfo;
  requester: Requester;
  channel: BackEndChannel | undefined;
  hasProtocolFeatures: boolean;
}

// Features, owner and channel, in QEMU's order.
async function negotiate(requester: Requester, options: FrontEndOptions, openChannel: () => BackEndChannel): Promise<Negotiated> {
  const timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS;
  const getU64 = async (request: number): Promise<bigint> => decodeU64(await requester.call(request, undefined, { timeoutMs }));
  const getCount = async (request: number, limit: number): Promise<number> => {
    const count = await getU64(request);
    return count < BigInt(limit) ? Number(count) : limit;
  };
  const features = await getU64(REQUEST.GET_FEATURES);
  const hasProtocolFeatures = hasBit(features, VHOST_USER_F_PROTOCOL_FEATURES);
  let protocolFeatures = 0n;
  let offeredProtocolFeatures = 0n;
  if (hasProtocolFeatures) {
    offeredProtocolFeatures = await getU64(REQUEST.GET_PROTOCOL_FEATURES);
    const doorbells = options.onDoorbell === undefined ? 0n : bitsOf([PROTOCOL_FEATURE.HOST_NOTIFIER, PROTOCOL_FEATURE.BACKEND_SEND_FD]);
    protocolFeatures = offeredProtocolFeatures & (options.protocolFeatures ?? FRONT_END_PROTOCOL_FEATURES | doorbells);
    await requester.tell(REQUEST.SET_PROTOCOL_FEATURES, encodeU64(protocolFeatures));
    requester.replyAck = hasBit(protocolFeatures, PROTOCOL_FEATURE.REPLY_ACK);
  }
  const queueNum = hasBit(protocolFeatures, PROTOCOL_FEATURE.MQ) ? await getCount(REQUEST.GET_QUEUE_NUM, RING_LIMIT) : 1;
  const slots = hasBit(protocolFeatures, PROTOCOL_FEATURE.CONFIGURE_MEM_SLOTS);
  const maxMemSlots = slots ? await getCount(REQUEST.GET_MAX_MEM_SLOTS, 2 ** 31) : MEM_TABLE_LIMIT;
  let channel: BackEndChannel | undefined;
  if (hasBit(protocolFeatures, PROTOCOL_FEATURE.BACKEND_REQ)) {
    channel = openChannel();
    await requester.command(REQUEST.SET_BACKEND_REQ_FD, undefined, { fds: [channel.remote!.fd], timeoutMs });
    channel.remote!.close();
  }
  await requester.command(REQUEST.SET_OWNER, undefined, { timeoutMs });
  const info: BackendInfo = {
    kind: "vhost-user",
    address: options.address ?? "vhost-user",
    queueNum,
    maxMemSlots,
    protocolFeatures,
    offeredProtocolFeatures,
    // libvhost-user, DPDK and SPDK offer it, whatever they do with it; rust-vmm's crates do not know it.
    kickExchange: hasBit(offeredProtocolFeatures, PROTOCOL_FEATURE.HOST_NOTIFIER),
    canSuspend: false,
    hasConfig: hasBit(protocolFeatures, PROTOCOL_FEATURE.CONFIG),
  };
  return { info, requester, channel, hasProtocolFeatures };
}
