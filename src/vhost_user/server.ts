/**
 * The vhost-user back-end server: a VMM's connection on one side, any {@linkcode VhostBackend} on the other.
 *
 * Requests are handled strictly in order, each to its end before the next is read. What the backend rejects is told to the
 * front-end where the protocol has a way to say it; a request whose answer cannot be given, and a broken protocol, end the
 * connection; everything else signals the ring's err eventfd and goes on.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { signalEventfd } from "../ffi/eventfd.ts";
import { dupFd, type OwnedFd } from "../ffi/fd.ts";
import { UnixStream } from "../ffi/unix_socket.ts";
import { bit, hasBit } from "../uapi/bits.ts";
import {
  decodeIotlb,
  decodeU64,
  decodeVringAddr,
  encodeIotlb,
  encodeU64,
  encodeVringState,
  IOTLB,
  VHOST_F,
  VRING_NUM_LIMIT,
} from "../uapi/vhost.ts";
import type { VringState } from "../uapi/vhost.ts";
import {
  BACKEND_REQUEST,
  FLAG,
  isKnownRequest,
  PROTOCOL_FEATURE,
  REQUEST,
  requestName,
  requestShape,
  VHOST_USER_F_PROTOCOL_FEATURES,
} from "../uapi/vhost_user.ts";
import type { MemoryRegion } from "../memory/region.ts";
import type { Doorbell, VhostBackend } from "../vhost/backend.ts";
import { closeFds, type Message, type MessageHook, VhostUserConnection } from "./connection.ts";
import {
  decodeConfig,
  decodeDeviceState,
  decodeInflight,
  decodeLog,
  decodeMac,
  decodeMemTable,
  decodeRegion,
  decodeVringFd,
  DEVICE_STATE_NO_FD,
  encodeConfig,
  encodeInflight,
  encodeLog,
  encodeVringArea,
  protocolError,
} from "./message.ts";
import { Hold } from "./hold.ts";
import { Requester } from "./requester.ts";
import { FAILED_ANSWERS, requireWireRing, RING_REQUESTS, ringState, SERVER_PROTOCOL_FEATURES } from "./server_rules.ts";
import { requireFileRange, ServerMemory } from "./server_memory.ts";
import { ShrinkWatch } from "./shrink_watch.ts";

const ACCESS_PLATFORM = 33;
const RING_PACKED = 34;

/** What a {@linkcode BackendServer} is told besides its backend. */
export interface ServerOptions {
  /** Protocol features to offer (default {@linkcode SERVER_PROTOCOL_FEATURES}); CONFIG, RARP, MTU, DEVICE_STATE need the backend too. */
  protocolFeatures?: bigint;
  /** Offer LOG_ALL (bit 26), whatever the backend says (default false: not offered). */
  offerLog?: boolean;
  /** Refuse memory and logs whose files could be shortened by their owner later (default false). */
  requireSealed?: boolean;
  /** Sees every message. */
  onMessage?: MessageHook | undefined;
  /** Holds the server between two requests; {@linkcode BackendServer.state} then says what another one needs. */
  hold?: Hold | undefined;
  /** Goes on where a server in another process was held. */
  resume?: ServerState | undefined;
  /** A request that was not carried out. The connection may go on. */
  onError?: ((error: Error) => void) | undefined;
  /**
   * The connection has ended and its descriptors are closed; the backend is as the front-end left it.
   *
   * @param error why, unless the front-end closed it in an orderly way or `close` was called
   */
  onDisconnect?: ((error: Error | undefined) => void | Promise<void>) | undefined;
}

/** What a front-end and a server have agreed on, for a server in another process. Descriptors are borrowed. */
export interface ServerState {
  /** Protocol features that the front-end took. */
  protocolFeatures: bigint;
  /** Features that it took. */
  features: bigint;
  /** Features that it was offered; undefined before it has asked. */
  offered: bigint | undefined;
  /** It runs its rings without enabling them. */
  alwaysEnabled: boolean;
  /** Ring sizes. */
  nums: [index: number, num: number][];
  /** Rings that it has started. */
  started: number[];
  /** Error eventfds. */
  errors: { index: number; fd: number }[];
  /** Memory table. */
  memory: MemoryRegion[];
  /** The channel for the back-end's requests. */
  channel: number | undefined;
}

/** The answer to a request: its payload, or nothing for requests without one of their own. */
type Answer = Uint8Array<ArrayBuffer> | undefined;
type Handler = (message: Message) => Promise<Answer> | Answer;

/** Serves one front-end connection. */
export class BackendServer implements Disposable {
  readonly #connection: VhostUserConnection;
  readonly #backend: VhostBackend;
  readonly #options: ServerOptions;
  readonly #memory: ServerMemory;
  #shrinkage: ShrinkWatch | undefined;
  readonly #errFds = new Map<number, OwnedFd>();
  readonly #nums = new Map<number, number>();
  readonly #started = new Set<number>();
  /** Descriptors that go out with the next answer. */
  readonly #replyFds: OwnedFd[] = [];
  readonly #hold: Hold;
  #channel: Requester | undefined;
  #protocolFeatures = 0n;
  #features = 0n;
  #offered: bigint | undefined;
  // SET_FEATURES without bit 30 enables all rings, also those that start later.
  #alwaysEnabled = false;

  /** Takes ownership of `stream`; borrows `backend`. */
  constructor(stream: UnixStream, backend: VhostBackend, options: ServerOptions = {}) {
    this.#connection = new VhostUserConnection(stream, { expect: "requests", onMessage: options.onMessage });
    this.#backend = backend;
    this.#options = options;
    this.#memory = new ServerMemory(backend, options.requireSealed === true);
    this.#hold = options.hold ?? new Hold();
    if (options.resume !== undefined) this.#resume(options.resume);
  }

  #resume(state: ServerState): void {
    this.#memory.adopt(state.memory);
    this.#protocolFeatures = state.protocolFeatures;
    this.#features = state.features;
    this.#offered = state.offered;
    this.#alwaysEnabled = state.alwaysEnabled;
    for (const [index, num] of state.nums) this.#nums.set(index, num);
    for (const index of state.started) this.#started.add(index);
    for (const { index, fd } of state.errors) this.#errFds.set(index, dupFd(fd));
    if (state.channel !== undefined) this.#openChannel(new UnixStream(dupFd(state.channel)));
  }

  /** What a server in another process needs to go on. This one must be held, and reads its channel no more until {@linkcode releaseChannel}. */
  async state(): Promise<ServerState> {
    return {
      protocolFeatures: this.#protocolFeatures,
      features: this.#features,
      offered: this.#offered,
      alwaysEnabled: this.#alwaysEnabled,
      nums: [...this.#nums],
      started: [...this.#started],
      errors: [...this.#errFds].map(([index, { fd }]) => ({ index, fd })),
      memory: this.#memory.regions.map(({ gpa, size, uaddr, fd, fdOffset }) => ({ gpa, size, uaddr, fd, fdOffset })),
      channel: this.#channel?.failure === undefined ? await this.#channel?.hold() : undefined,
    };
  }

  /** Goes on after {@linkcode BackendServer.state}. */
  releaseChannel(): void {
    this.#channel?.release();
  }

  /** The socket of the front-end. */
  get fd(): number {
    return this.#connection.fd;
  }

  /** The protocol features that the front-end is offered. */
  get offeredProtocolFeatures(): bigint {
    const { info, sendRarp, setMtu, setDeviceStateFd, setInflight } = this.#backend;
    let offered = this.#options.protocolFeatures ?? SERVER_PROTOCOL_FEATURES;
    if (!info.hasConfig) offered &= ~bit(PROTOCOL_FEATURE.CONFIG);
    if (setInflight === undefined) offered &= ~bit(PROTOCOL_FEATURE.INFLIGHT_SHMFD);
    if (sendRarp === undefined) offered &= ~bit(PROTOCOL_FEATURE.RARP);
    if (setMtu === undefined) offered &= ~bit(PROTOCOL_FEATURE.MTU);
    if (setDeviceStateFd === undefined) offered &= ~bit(PROTOCOL_FEATURE.DEVICE_STATE);
    if (info.doorbells === true) offered |= bit(PROTOCOL_FEATURE.HOST_NOTIFIER) | bit(PROTOCOL_FEATURE.BACKEND_SEND_FD);
    return offered;
  }

  /**
   * Serves until the connection ends, releases its descriptors and calls `onDisconnect`. Takes over the backend's
   * `onConfigChange` for that time.
   *
   * @returns why it ended; nothing for an orderly end
   */
  async run(): Promise<Error | undefined> {
    const before = this.#backend.onConfigChange;
    this.#backend.onConfigChange = () => this.#tellConfigChange();
    this.#backend.onIotlbMiss = (iova, perm) => this.#askIotlb(iova, perm);
    if (this.#backend.info.doorbells === true) this.#backend.onDoorbell = (index, doorbell) => this.#tellDoorbell(index, doorbell);
    this.#shrinkage = new ShrinkWatch(this.#memory, () => this.close());
    const ended = await this.#serve();
    const error = this.#shrinkage.error ?? ended;
    this.#shrinkage[Symbol.dispose]();
    this.#backend.onConfigChange = before;
    this.#backend.onIotlbMiss = undefined;
    this.#backend.onDoorbell = undefined;
    this.close();
    this.#channel?.close();
    this.#memory[Symbol.dispose]();
    for (const fd of this.#errFds.values()) fd.close();
    this.#errFds.clear();
    await this.#options.onDisconnect?.(error);
    return error;
  }

  async #serve(): Promise<Error | undefined> {
    try {
      for (;;) {
        const message = await this.#hold.wait(() => this.#connection.receive(), () => this.#connection.interrupt());
        if (message === undefined) return undefined;
        try {
          await this.#handle(message);
        } finally {
          // What the handler wanted to keep it has taken out.
          closeFds(message.fds);
        }
      }
    } catch (error) {
      // Closed at this end: not a fault.
      if (this.#connection.closed) return undefined;
      return error instanceof Error ? error : new SvqError("INTERNAL", String(error));
    }
  }

  async #handle(message: Message): Promise<void> {
    const { request } = message;
    const handler = this.#handlers[request];
    let answer: Answer;
    let failed = false;
    try {
      if (handler === undefined) throw this.#refusal(request);
      answer = await handler(message);
    } catch (error) {
      answer = this.#afterFailure(message, error);
      failed = true;
    }
    if (answer !== undefined) return await this.#reply(request, answer);
    if (this.#wantsAck(message)) return await this.#connection.reply(request, encodeU64(failed ? 1n : 0n));
    if (failed) this.#signalError(message);
  }

  async #reply(request: number, answer: Uint8Array<ArrayBuffer>): Promise<void> {
    const fds = this.#replyFds.splice(0);
    try {
      await this.#connection.reply(request, answer, fds.map(({ fd }) => fd));
    } finally {
      closeFds(fds);
    }
  }

  #wantsAck(message: Message): boolean {
    return (message.flags & FLAG.NEED_REPLY) !== 0 && this.#negotiated(PROTOCOL_FEATURE.REPLY_ACK);
  }

  #refusal(request: number): SvqError {
    const name = requestName("front-end", request);
    return new SvqError("VHOST_USER_UNSUPPORTED", `The front-end sent ${name}, which it was not offered`);
  }

  // Reports the failure; gives the answer that says "failed" where the request has one.
  #afterFailure(message: Message, error: unknown): Answer {
    const { request } = message;
    const breaksProtocol = error instanceof SvqError && ["VHOST_USER_PROTOCOL", "BAD_RECORD", "ADDRESS_TOO_LARGE"].includes(error.code);
    if (breaksProtocol) throw error;
    const failure = FAILED_ANSWERS[request]?.();
    if (failure === undefined && requestShape("front-end", request).replies && isKnownRequest("front-end", request)) {
      const cause = error instanceof Error ? error.message : String(error);
      throw new SvqError("VHOST_USER_UNANSWERABLE", `${requestName("front-end", request)} cannot be answered: ${cause}`, { cause: error });
    }
    this.#options.onError?.(error instanceof Error ? error : new SvqError("INTERNAL", String(error)));
    return failure;
  }

  // Requests about a ring begin with its number.
  #signalError(message: Message): void {
    if (!RING_REQUESTS.has(message.request)) return;
    const err = this.#errFds.get(message.payload[0]!);
    if (err !== undefined) signalEventfd(err.fd);
  }

  #negotiated(feature: number): boolean {
    return hasBit(this.#protocolFeatures, feature);
  }

  readonly #handlers: Readonly<Record<number, Handler>> = {
    [REQUEST.GET_FEATURES]: async () => encodeU64(await this.#offer()),
    [REQUEST.SET_FEATURES]: ({ payload }) => this.#setFeatures(decodeU64(payload)),
    [REQUEST.GET_PROTOCOL_FEATURES]: () => encodeU64(this.offeredProtocolFeatures),
    [REQUEST.SET_PROTOCOL_FEATURES]: ({ payload }) => this.#setProtocolFeatures(decodeU64(payload)),
    [REQUEST.SET_OWNER]: () => undefined,
    // Deprecated, and sent by front-ends that mean RESET_DEVICE or nothing at all.
    [REQUEST.RESET_OWNER]: () => undefined,
    [REQUEST.GET_QUEUE_NUM]: () => encodeU64(BigInt(this.#backend.info.queueNum)),
    [REQUEST.GET_MAX_MEM_SLOTS]: () => encodeU64(BigInt(this.#backend.info.maxMemSlots)),
    [REQUEST.SET_MEM_TABLE]: ({ payload, fds }) => this.#done(this.#memory.set(decodeMemTable(payload), fds)),
    [REQUEST.ADD_MEM_REG]: ({ payload, fds }) => this.#done(this.#memory.add(decodeRegion(payload), fds)),
    [REQUEST.REM_MEM_REG]: ({ payload }) => this.#done(this.#memory.remove(decodeRegion(payload))),
    [REQUEST.SET_LOG_BASE]: (message) => this.#setLogBase(message),
    // Whoever reads the log looks at it whenever it wants to; nobody here signals that it changed.
    [REQUEST.SET_LOG_FD]: () => undefined,
    [REQUEST.SET_VRING_NUM]: ({ payload }) => this.#setVringNum(ringState(payload)),
    [REQUEST.SET_VRING_ADDR]: ({ payload }) => this.#setVringAddr(payload),
    [REQUEST.SET_VRING_BASE]: ({ payload }) => {
      const { index, num } = ringState(payload);
      return this.#done(this.#backend.setVringBase(index, num));
    },
    [REQUEST.GET_VRING_BASE]: ({ payload }) => this.#getVringBase(ringState(payload).index),
    [REQUEST.SET_VRING_KICK]: (message) => this.#setVringKick(message),
    [REQUEST.SET_VRING_CALL]: (message) => this.#setVringFd(message, (index, fd) => this.#backend.setVringCall(index, fd)),
    [REQUEST.SET_VRING_ERR]: (message) => this.#setVringErr(message),
    [REQUEST.SET_VRING_ENABLE]: ({ payload }) => {
      const { index, num } = ringState(payload);
      if (num > 1) throw protocolError(`SET_VRING_ENABLE of ring ${index} with ${num}`);
      return this.#done(this.#backend.setVringEnable(index, num === 1));
    },
    [REQUEST.SEND_RARP]: ({ payload }) => {
      if (this.#backend.sendRarp === undefined) throw this.#refusal(REQUEST.SEND_RARP);
      return this.#done(this.#backend.sendRarp(decodeMac(payload)));
    },
    [REQUEST.NET_SET_MTU]: ({ payload }) => {
      if (this.#backend.setMtu === undefined) throw this.#refusal(REQUEST.NET_SET_MTU);
      const mtu = decodeU64(payload);
      if (mtu > 65535n) throw protocolError(`NET_SET_MTU with ${mtu}`);
      return this.#done(this.#backend.setMtu(Number(mtu)));
    },
    [REQUEST.SET_BACKEND_REQ_FD]: ({ fds }) => this.#setChannel(fds),
    [REQUEST.GET_CONFIG]: ({ payload }) => this.#getConfig(payload),
    [REQUEST.SET_CONFIG]: ({ payload }) => {
      const { offset, bytes } = decodeConfig(payload);
      return this.#done(this.#backend.setConfig(offset, bytes));
    },
    [REQUEST.IOTLB_MSG]: ({ payload }) => this.#iotlb(payload),
    [REQUEST.GET_STATUS]: async () => encodeU64(BigInt(await this.#backend.getStatus())),
    [REQUEST.SET_STATUS]: ({ payload }) => this.#done(this.#backend.setStatus(Number(decodeU64(payload) & 0xffn))),
    [REQUEST.RESET_DEVICE]: () => this.#reset(),
    [REQUEST.GET_INFLIGHT_FD]: ({ payload }) => this.#getInflight(payload),
    [REQUEST.SET_INFLIGHT_FD]: (message) => this.#setInflight(message),
    [REQUEST.SET_DEVICE_STATE_FD]: (message) => this.#setDeviceStateFd(message),
    [REQUEST.CHECK_DEVICE_STATE]: async () => {
      if (!this.#hasDeviceState) throw this.#refusal(REQUEST.CHECK_DEVICE_STATE);
      await this.#backend.checkDeviceState!();
      return encodeU64(0n);
    },
  };

  async #getInflight(payload: Uint8Array<ArrayBuffer>): Promise<Answer> {
    if (!this.#negotiated(PROTOCOL_FEATURE.INFLIGHT_SHMFD)) throw this.#refusal(REQUEST.GET_INFLIGHT_FD);
    const { queues, num } = decodeInflight(payload);
    const { file, place } = await this.#backend.createInflight!(queues, num);
    this.#replyFds.push(file);
    return encodeInflight(place);
  }

  async #setInflight({ payload, fds }: Message): Promise<undefined> {
    if (!this.#negotiated(PROTOCOL_FEATURE.INFLIGHT_SHMFD)) throw this.#refusal(REQUEST.SET_INFLIGHT_FD);
    const wire = decodeInflight(payload);
    requireFileRange(fds[0]!.fd, wire.offset, wire.size, "In-flight region", true);
    await this.#backend.setInflight!({ fd: fds[0]!.fd, ...wire });
  }

  get #hasDeviceState(): boolean {
    return this.#negotiated(PROTOCOL_FEATURE.DEVICE_STATE);
  }

  async #setDeviceStateFd(message: Message): Promise<Answer> {
    if (!this.#hasDeviceState) throw this.#refusal(REQUEST.SET_DEVICE_STATE_FD);
    const { direction, phase } = decodeDeviceState(message.payload);
    const other = await this.#backend.setDeviceStateFd!(direction, phase, message.fds[0]!.fd);
    if (other === undefined) return encodeU64(DEVICE_STATE_NO_FD);
    // Goes out with the answer.
    this.#replyFds.push(other);
    return encodeU64(0n);
  }

  async #done(work: Promise<void>): Promise<undefined> {
    await work;
    return undefined;
  }

  async #offer(): Promise<bigint> {
    const log = bit(VHOST_F.LOG_ALL);
    const features = (await this.#backend.getFeatures() & ~log) | bit(VHOST_USER_F_PROTOCOL_FEATURES);
    return this.#offered = this.#options.offerLog === true ? features | log : features;
  }

  async #setFeatures(word: bigint): Promise<undefined> {
    const unknown = word & ~(this.#offered ?? await this.#offer());
    if (unknown !== 0n) {
      throw new SvqError("FEATURES_NOT_OFFERED", `The front-end took feature bits 0x${unknown.toString(16)}, which it was not offered`);
    }
    const features = word & ~bit(VHOST_USER_F_PROTOCOL_FEATURES);
    await this.#backend.setFeatures(features);
    this.#features = features;
    // With bit 30 nothing is disabled either: LOG_ALL is turned on and off this way while rings run.
    this.#alwaysEnabled = features === word;
    if (this.#alwaysEnabled) { for (const index of this.#started) await this.#backend.setVringEnable(index, true); }
    return undefined;
  }

  #setProtocolFeatures(word: bigint): undefined {
    const unknown = word & ~this.offeredProtocolFeatures;
    if (unknown !== 0n) throw protocolError(`The front-end took protocol features 0x${unknown.toString(16)}, which it was not offered`);
    this.#protocolFeatures = word;
    if (this.#channel !== undefined) this.#channel.replyAck = this.#negotiated(PROTOCOL_FEATURE.REPLY_ACK);
    return undefined;
  }

  async #setLogBase({ payload, fds }: Message): Promise<Answer> {
    if (!this.#negotiated(PROTOCOL_FEATURE.LOG_SHMFD)) {
      if (fds.length > 0) throw protocolError("SET_LOG_BASE with a file descriptor, without LOG_SHMFD");
      // An address of the front-end's process: of no use here, and no answer is due.
      return undefined;
    }
    if (fds.length !== 1) throw protocolError("SET_LOG_BASE without a file descriptor");
    const log = decodeLog(payload);
    requireFileRange(fds[0]!.fd, log.offset, log.size, "Dirty log", this.#options.requireSealed === true);
    const region = { fd: fds[0]!.fd, offset: log.offset, size: log.size };
    await this.#backend.setLogBase(region);
    this.#shrinkage?.setLog(region);
    return encodeLog(log);
  }

  #setVringNum({ index, num }: VringState): Promise<undefined> {
    if (num < 1 || num > VRING_NUM_LIMIT) throw protocolError(`SET_VRING_NUM of ring ${index} with ${num}`);
    this.#nums.set(index, num);
    return this.#done(this.#backend.setVringNum(index, num));
  }

  #setVringAddr(payload: Uint8Array<ArrayBuffer>): Promise<undefined> {
    const record = decodeVringAddr(payload);
    requireWireRing(record.index);
    if (hasBit(this.#features, ACCESS_PLATFORM)) {
      // Addresses of the guest's IOMMU: whoever has its table knows where they lie.
      const { index, desc, avail, used, flags, logGuestAddr } = record;
      const logGpa = flags === 0 ? undefined : logGuestAddr;
      return this.#done(this.#backend.setVringAddresses(index, { desc, avail, used, logGpa }));
    }
    const addresses = this.#memory.ringAddresses(record, this.#nums.get(record.index) ?? 1, hasBit(this.#features, RING_PACKED));
    return this.#done(this.#backend.setVringAddresses(record.index, addresses));
  }

  async #getVringBase(index: number): Promise<Answer> {
    const base = await this.#backend.getVringBase(index);
    this.#started.delete(index);
    return encodeVringState({ index, num: base });
  }

  async #setVringFd({ payload, fds }: Message, set: (index: number, fd: number | null) => Promise<void>): Promise<undefined> {
    const { index } = decodeVringFd(payload, fds.length);
    await set(index, fds[0]?.fd ?? null);
    return undefined;
  }

  async #setVringKick(message: Message): Promise<undefined> {
    const { index } = decodeVringFd(message.payload, message.fds.length);
    await this.#backend.setVringKick(index, message.fds[0]?.fd ?? null);
    this.#started.add(index);
    if (this.#alwaysEnabled) await this.#backend.setVringEnable(index, true);
    return undefined;
  }

  async #setVringErr(message: Message): Promise<undefined> {
    const { index } = decodeVringFd(message.payload, message.fds.length);
    this.#errFds.get(index)?.close();
    this.#errFds.delete(index);
    const own = message.fds.shift();
    if (own !== undefined) this.#errFds.set(index, own);
    await this.#backend.setVringErr(index, own?.fd ?? null);
    return undefined;
  }

  async #getConfig(payload: Uint8Array<ArrayBuffer>): Promise<Answer> {
    const { offset, flags, bytes } = decodeConfig(payload);
    const config = await this.#backend.getConfig(offset, bytes.length);
    if (config.length !== bytes.length) {
      throw new SvqError("SHORT_CONFIG", `The device gave ${config.length} bytes of configuration instead of ${bytes.length}`);
    }
    return encodeConfig({ offset, flags, bytes: config });
  }

  async #reset(): Promise<undefined> {
    await this.#backend.reset();
    this.#started.clear();
    this.#nums.clear();
    this.#features = 0n;
    this.#alwaysEnabled = false;
    return undefined;
  }

  async #iotlb(payload: Uint8Array<ArrayBuffer>): Promise<Answer> {
    if (this.#backend.iotlb === undefined || !hasBit(this.#features, ACCESS_PLATFORM)) throw this.#refusal(REQUEST.IOTLB_MSG);
    const { type, iova, size, uaddr, perm } = decodeIotlb(payload);
    if (type === IOTLB.INVALIDATE) await this.#backend.iotlb({ type: "invalidate", iova, size });
    else if (type !== IOTLB.UPDATE) throw protocolError(`IOTLB_MSG of type ${type}`);
    else await this.#backend.iotlb({ type: "update", iova, size, gpa: this.#memory.toGpa(uaddr, size, "An IOTLB entry"), perm });
    return encodeU64(0n);
  }

  async #askIotlb(iova: number, perm: number): Promise<void> {
    const channel = this.#channel;
    if (channel === undefined) throw new SvqError("VHOST_USER_UNSUPPORTED", "The front-end has no channel for the device's requests");
    const message = { iova, size: 0, uaddr: 0, perm, type: IOTLB.MISS };
    await channel.command(BACKEND_REQUEST.IOTLB_MSG, encodeIotlb(message), { what: `IOVA 0x${iova.toString(16)}` });
  }

  #setChannel(fds: OwnedFd[]): undefined {
    if (!this.#negotiated(PROTOCOL_FEATURE.BACKEND_REQ)) throw this.#refusal(REQUEST.SET_BACKEND_REQ_FD);
    const stream = new UnixStream(fds.shift()!);
    try {
      stream.peerCredentials();
    } catch (cause) {
      stream.close();
      throw protocolError("SET_BACKEND_REQ_FD without a socket", cause);
    }
    this.#openChannel(stream);
    return undefined;
  }

  #openChannel(stream: UnixStream): void {
    this.#channel?.close();
    const channel = new Requester(stream, {
      channel: "back-end",
      onMessage: this.#options.onMessage,
      // Losing it alone is no loss of the device: the front-end just hears nothing more of changes.
      onLost: (error) => error.code === "VHOST_USER_DISCONNECTED" ? undefined : this.#options.onError?.(error),
    });
    channel.replyAck = this.#negotiated(PROTOCOL_FEATURE.REPLY_ACK);
    this.#channel = channel;
  }

  #tellConfigChange(): void {
    const channel = this.#channel;
    if (channel === undefined || channel.failure !== undefined || !this.#negotiated(PROTOCOL_FEATURE.CONFIG)) return;
    channel.command(BACKEND_REQUEST.CONFIG_CHANGE_MSG).catch((error) => {
      if (!["CLOSED", "VHOST_USER_DISCONNECTED"].includes(error.code)) this.#options.onError?.(error);
    });
  }

  // Without REPLY_ACK nobody would know when the front-end has stopped using one: then it gets none.
  async #tellDoorbell(index: number, doorbell: Doorbell | undefined): Promise<boolean> {
    const channel = this.#channel;
    const { HOST_NOTIFIER, BACKEND_SEND_FD, REPLY_ACK } = PROTOCOL_FEATURE;
    const able = [HOST_NOTIFIER, BACKEND_SEND_FD, REPLY_ACK].every((feature) => this.#negotiated(feature));
    if (!able || channel === undefined || channel.failure !== undefined) return false;
    const { fd, size, offset } = doorbell ?? { fd: -1, size: 0, offset: 0 };
    const hasFd = doorbell !== undefined;
    try {
      const area = encodeVringArea({ index, hasFd, size, offset });
      await channel.command(BACKEND_REQUEST.VRING_HOST_NOTIFIER_MSG, area, { fds: hasFd ? [fd] : [], what: `ring ${index}` });
      return true;
    } catch (error) {
      if (error instanceof SvqError && error.code === "DEVICE_REFUSED") return false;
      throw error;
    }
  }

  /** Ends the connection; {@linkcode run} then releases everything and resolves. */
  close(): void {
    this.#connection.close();
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}
