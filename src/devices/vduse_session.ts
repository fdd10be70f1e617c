/**
 * The kernel's messages to a VDUSE device, obeyed by an embedded device: status, rings, positions, memory. What needs the
 * kernel in turn goes through {@linkcode VduseKernel}, so that this can be tested without one.
 *
 * @module
 */
import { type ErrorRecord, SvqError, toErrorRecord } from "../errors.ts";
import { createEventfd, type OwnedFd } from "../ffi/mod.ts";
import { bit, hasBit } from "../uapi/bits.ts";
import { encodeVduseResponse, VDUSE_REQUEST, type VduseRequest, type VduseVqInfo } from "../uapi/vduse.ts";
import { VIRTIO_FEATURE_BITS, VIRTIO_STATUS } from "../uapi/virtio.ts";
import type { SimDevice } from "./sim_device.ts";

/** The bit that the kernel demands, and that an embedded device does not know. */
export const ACCESS_PLATFORM: bigint = bit(VIRTIO_FEATURE_BITS.ACCESS_PLATFORM);

/** What the session asks the kernel. All throw SysError. */
export interface VduseKernel {
  /** Features that the driver took. */
  features(): bigint;
  /** A queue as its driver set it up. */
  vqInfo(index: number, packed: boolean): VduseVqInfo;
  /** The eventfd that the driver's kicks go to; a kick that came before is signalled at once. @param fd -1: none */
  setKick(index: number, fd: number): void;
}

/** What of an embedded device the session uses. */
export type SessionDevice = Pick<
  SimDevice,
  | "info"
  | "setFeatures"
  | "setVringNum"
  | "setVringBase"
  | "setVringAddresses"
  | "setVringKick"
  | "setVringEnable"
  | "getVringBase"
  | "vringPosition"
  | "iotlbChanged"
  | "reset"
>;

/** What a session tells. */
export interface SessionEvents {
  /** A driver came or left. */
  info: (message: string) => void;
  /** Something could not be done. */
  warn: (what: string, error: ErrorRecord) => void;
}

/** A device's life between the kernel's messages. */
export class VduseSession {
  readonly #device: SessionDevice;
  readonly #kernel: VduseKernel;
  readonly #events: SessionEvents;
  /** Kicks of the queues that run. */
  readonly #kicks = new Map<number, OwnedFd>();
  #features = 0n;
  #status = 0;
  #suspended = false;

  /** No driver is there. */
  constructor(device: SessionDevice, kernel: VduseKernel, events: SessionEvents) {
    this.#device = device;
    this.#kernel = kernel;
    this.#events = events;
  }

  /** Queues that run, in order. */
  get running(): number[] {
    return [...this.#kicks.keys()].sort((a, b) => a - b);
  }

  get #packed(): boolean {
    return hasBit(this.#features, VIRTIO_FEATURE_BITS.RING_PACKED);
  }

  /** Obeys one message; the answer to it, which says whether that went well. */
  async answer(request: VduseRequest): Promise<Uint8Array<ArrayBuffer>> {
    const { id } = request;
    try {
      if (request.type === VDUSE_REQUEST.GET_VQ_STATE) {
        const { index } = request;
        return encodeVduseResponse(id, true, { index, base: await this.#device.vringPosition(index), packed: this.#packed });
      }
      await this.#obey(request);
      return encodeVduseResponse(id, true);
    } catch (error) {
      this.#events.warn("a message of the kernel could not be obeyed", toErrorRecord(error));
      return encodeVduseResponse(id, false);
    }
  }

  async #obey(request: VduseRequest): Promise<void> {
    switch (request.type) {
      case VDUSE_REQUEST.SET_STATUS:
        return await this.#setStatus(request.status);
      case VDUSE_REQUEST.UPDATE_IOTLB:
        return await this.#device.iotlbChanged();
      case VDUSE_REQUEST.SET_VQ_GROUP_ASID:
        // It has been made with one of each.
        if (request.group === 0 && request.asid === 0) return;
        throw new SvqError("BAD_ASID", `There is no group ${request.group} with address space ${request.asid}: both have number 0 only`);
      case VDUSE_REQUEST.SET_VQ_READY:
        return await this.#setReady(request.index, request.ready);
      case VDUSE_REQUEST.SUSPEND:
        return await this.#suspend();
      default:
        throw new SvqError("UNKNOWN_MESSAGE", `Type ${"number" in request ? request.number : request.type} is not known`);
    }
  }

  get #started(): boolean {
    return (this.#status & VIRTIO_STATUS.DRIVER_OK) !== 0;
  }

  async #setStatus(status: number): Promise<void> {
    const started = this.#started;
    // Rings would run on while a later DRIVER_OK starts them anew.
    if (status !== 0 && (this.#status & ~status) !== 0) {
      const [before, after] = [this.#status, status].map((word) => `0x${word.toString(16)}`);
      throw new SvqError("STATUS_WITHDRAWN", `The status went from ${before} to ${after}: only 0 takes bits away`);
    }
    if (status === 0) {
      await this.stop();
      if (started) this.#events.info("the driver left");
    } else if ((status & VIRTIO_STATUS.DRIVER_OK) !== 0 && !started) {
      try {
        await this.#start();
      } catch (error) {
        await this.stop();
        throw error;
      }
      this.#events.info(`a driver came, ${this.#kicks.size === 1 ? "1 queue" : `${this.#kicks.size} queues`}`);
    }
    this.#status = status;
  }

  async #start(): Promise<void> {
    this.#features = this.#kernel.features();
    await this.#device.iotlbChanged();
    await this.#device.setFeatures(this.#features & ~ACCESS_PLATFORM);
    for (let index = 0; index < this.#device.info.queueNum; index++) {
      const info = this.#kernel.vqInfo(index, this.#packed);
      if (info.ready) await this.#startQueue(index, info);
    }
  }

  async #startQueue(index: number, { num, base, addresses }: VduseVqInfo): Promise<void> {
    const device = this.#device;
    const kick = createEventfd();
    this.#kicks.set(index, kick);
    await device.setVringNum(index, num);
    await device.setVringBase(index, base);
    await device.setVringAddresses(index, addresses);
    await device.setVringEnable(index, true);
    // The kernel signals at once a kick that came before.
    this.#kernel.setKick(index, kick.fd);
    await device.setVringKick(index, kick.fd);
  }

  // Before DRIVER_OK the queue's record will say it.
  async #setReady(index: number, ready: boolean): Promise<void> {
    if (index >= this.#device.info.queueNum) throw new SvqError("NO_SUCH_QUEUE", `There is no queue ${index}`);
    if (!this.#started || this.#suspended || this.#kicks.has(index) === ready) return;
    if (!ready) return await this.#stopQueue(index);
    const info = this.#kernel.vqInfo(index, this.#packed);
    try {
      await this.#startQueue(index, info);
    } catch (error) {
      await this.#stopQueue(index);
      throw error;
    }
  }

  // What is in flight comes back first; then the position is where the ring goes on.
  async #stopQueue(index: number): Promise<void> {
    const kick = this.#kicks.get(index);
    if (kick === undefined) return;
    try {
      await this.#device.getVringBase(index);
      this.#kernel.setKick(index, -1);
    } finally {
      this.#kicks.delete(index);
      kick.close();
    }
  }

  async #suspend(): Promise<void> {
    this.#suspended = true;
    for (const index of this.running) await this.#stopQueue(index);
  }

  /** Stops at once, as for status 0: when it resolves neither memory nor disk is touched any more. */
  async stop(): Promise<void> {
    await this.#device.reset();
    for (const kick of this.#kicks.values()) kick.close();
    this.#kicks.clear();
    this.#features = 0n;
    this.#suspended = false;
  }
}
