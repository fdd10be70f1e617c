/**
 * A disk behind any {@linkcode VhostBackend}, driven from this thread for its own sake: reads and writes with a few requests in
 * flight, on the first queue. It copies disks of guests that stand still or are not there yet.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import {
  cancelWaits,
  createEventfd,
  createMemfd,
  drainEventfd,
  mapFd,
  type Mapping,
  type OwnedFd,
  readable,
  signalEventfd,
} from "../ffi/mod.ts";
import { bitsOf, hasBit } from "../uapi/bits.ts";
import { VIRTIO_FEATURE_BITS, VIRTIO_STATUS } from "../uapi/virtio.ts";
import {
  decodeBlkConfig,
  VIRTIO_BLK_FEATURE_BITS,
  VIRTIO_BLK_RANGE_BYTES,
  VIRTIO_BLK_REQUEST_BYTES,
  VIRTIO_BLK_S,
  VIRTIO_BLK_SECTOR_BYTES,
  VIRTIO_BLK_T,
  VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
  type VirtioBlkConfig,
} from "../uapi/virtio_blk.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import { packedLayout, splitLayout } from "../vring/layout.ts";
import { PACKED_BASE_START, PackedDriver } from "../vring/packed.ts";
import { Chain, type DriverQueue } from "../vring/queue.ts";
import { SplitDriver } from "../vring/split.ts";
import { diskIoError } from "./disk_reader.ts";
import { BLOCK_BYTES } from "./layout.ts";

const NUM = 64;
// A request takes three descriptors.
const MAX_BUFFERS = 16;
const SLOT_BYTES = 64;
const RANGE_AT = 16;
const STATUS_AT = SLOT_BYTES - 1;
const HEADS_AT = 32768;
const GPA = 0x10_0000;
const ZEROES_SECTORS = 1 << 15;
const STATUS_UP = VIRTIO_STATUS.ACKNOWLEDGE | VIRTIO_STATUS.DRIVER;

/** Memory for a ring, heads and buffers: pieces of BLOCK_BYTES each; the first one holds ring and heads. */
export interface DiskRoom {
  /** All of them lie in it. */
  buffer: ArrayBuffer;
  /** Where it lies in this process, bytes. */
  address: number;
  /** Offsets of the pieces in it. */
  offsets: readonly number[];
  /** Address of an offset, as the device names it. */
  gpa: (offset: number) => number;
}

interface Waiting {
  resolve: () => void;
  reject: (error: unknown) => void;
  describe: [type: number, sector: number, count: number];
  head: number;
}

/** How long requests may take, and what was agreed with the device. */
export interface DiskAccessOptions {
  /** Negotiated features. */
  features: bigint;
  /** Longest time without any answer, milliseconds. */
  timeoutMs: number;
}

/** The disk's configuration as {@linkcode DiskAccess} needs it. @throws what the device fails with */
export async function readBlkConfig(backend: VhostBackend): Promise<VirtioBlkConfig> {
  return decodeBlkConfig(await backend.getConfig(0, 60));
}

/** A disk, and buffers to move its sectors. */
export class DiskAccess {
  /** Sectors of 512 bytes. */
  readonly capacity: number;
  /** Buffers, BLOCK_BYTES each. */
  readonly buffers: number;
  readonly #backend: VhostBackend;
  readonly #room: DiskRoom;
  readonly #options: DiskAccessOptions;
  readonly #config: VirtioBlkConfig;
  readonly #ring: DriverQueue;
  readonly #kick = createEventfd();
  readonly #call = createEventfd();
  readonly #bytes: Uint8Array;
  readonly #view: DataView;
  readonly #chain = new Chain(4);
  readonly #free: number[];
  readonly #waiters: ((buffer: number) => void)[] = [];
  readonly #waiting = new Map<number, Waiting>();
  #own: { memory: OwnedFd; mapping: Mapping } | undefined;
  #failure: unknown;
  #loop: Promise<void> | undefined;
  #stopped = false;

  private constructor(backend: VhostBackend, room: DiskRoom, config: VirtioBlkConfig, options: DiskAccessOptions) {
    this.#backend = backend;
    this.#room = room;
    this.#options = options;
    this.#config = config;
    this.capacity = config.capacity;
    this.buffers = Math.min(MAX_BUFFERS, room.offsets.length - 1);
    this.#bytes = new Uint8Array(room.buffer);
    this.#view = new DataView(room.buffer);
    this.#free = Array.from({ length: this.buffers }, (_, i) => i);
    const [meta] = room.offsets as [number];
    this.#bytes.fill(0, meta, meta + BLOCK_BYTES);
    const { desc, avail, used } = this.#packed ? packedLayout(NUM) : splitLayout(NUM);
    const part = (offset: number) => ({ buffer: room.buffer, byteOffset: meta + offset });
    const ring = {
      num: NUM,
      desc: part(desc.offset),
      avail: part(avail.offset),
      used: part(used.offset),
      eventIdx: hasBit(options.features, VIRTIO_FEATURE_BITS.EVENT_IDX),
      inOrder: hasBit(options.features, VIRTIO_FEATURE_BITS.IN_ORDER),
    };
    this.#ring = this.#packed ? new PackedDriver(ring) : new SplitDriver(ring);
  }

  get #packed(): boolean {
    return hasBit(this.#options.features, VIRTIO_FEATURE_BITS.RING_PACKED);
  }

  /**
   * Has a device that nobody drives, with memory of its own. {@linkcode close} resets the device.
   *
   * @param wanted features to take besides VERSION_1, where they are offered
   * @throws SvqError and what the device fails with
   */
  static async open(backend: VhostBackend, timeoutMs: number): Promise<DiskAccess> {
    const { VERSION_1, ACCESS_PLATFORM } = VIRTIO_FEATURE_BITS;
    const { FLUSH, WRITE_ZEROES, BLK_SIZE } = VIRTIO_BLK_FEATURE_BITS;
    const features = await backend.getFeatures() & bitsOf([VERSION_1, ACCESS_PLATFORM, FLUSH, WRITE_ZEROES, BLK_SIZE]);
    const size = BLOCK_BYTES * (1 + MAX_BUFFERS);
    const memory = createMemfd("svq-disk", size);
    let mapping: Mapping | undefined;
    try {
      mapping = mapFd(memory.fd, { length: size, what: "disk buffers" });
      await backend.setStatus(STATUS_UP);
      await backend.setFeatures(features);
      await backend.setStatus(STATUS_UP | VIRTIO_STATUS.FEATURES_OK);
      await backend.setMemTable([{ gpa: GPA, size, uaddr: GPA, fd: memory.fd, fdOffset: 0 }]);
      const offsets = Array.from({ length: 1 + MAX_BUFFERS }, (_, i) => i * BLOCK_BYTES);
      const room = { buffer: mapping.buffer(), address: mapping.address, offsets, gpa: (offset: number) => GPA + offset };
      const access = await DiskAccess.start(backend, room, { features, timeoutMs });
      access.#own = { memory, mapping };
      await backend.setStatus(STATUS_UP | VIRTIO_STATUS.FEATURES_OK | VIRTIO_STATUS.DRIVER_OK);
      return access;
    } catch (error) {
      await backend.reset().catch(() => {});
      mapping?.close();
      memory.close();
      throw error;
    }
  }

  /**
   * Has a device that knows features and memory, on its first queue, which is stopped. {@linkcode stop} gives it back.
   *
   * @param room in memory that the device knows; overwritten
   */
  static async start(backend: VhostBackend, room: DiskRoom, options: DiskAccessOptions): Promise<DiskAccess> {
    const access = new DiskAccess(backend, room, await readBlkConfig(backend), options);
    try {
      await access.#start();
      return access;
    } catch (error) {
      access.#closeEvents();
      throw error;
    }
  }

  async #start(): Promise<void> {
    const backend = this.#backend;
    const { desc, avail, used } = this.#packed ? packedLayout(NUM) : splitLayout(NUM);
    const gpa = (offset: number) => this.#room.gpa(this.#room.offsets[0]! + offset);
    await backend.setVringNum(0, NUM);
    await backend.setVringBase(0, this.#packed ? PACKED_BASE_START : 0);
    await backend.setVringAddresses(0, { desc: gpa(desc.offset), avail: gpa(avail.offset), used: gpa(used.offset) });
    await backend.setVringCall(0, this.#call.fd);
    await backend.setVringErr(0, null);
    await backend.setVringKick(0, this.#kick.fd);
    await backend.setVringEnable(0, true);
  }

  /** Where a buffer lies in this process, bytes. */
  address(buffer: number): number {
    return this.#room.address + this.#room.offsets[buffer + 1]!;
  }

  /** A buffer's first `length` bytes. */
  bytes(buffer: number, length: number = BLOCK_BYTES): Uint8Array {
    const at = this.#room.offsets[buffer + 1]!;
    return this.#bytes.subarray(at, at + length);
  }

  /** Waits for a free buffer, which is the caller's until {@linkcode put}. @throws what a request failed with meanwhile */
  async take(): Promise<number> {
    this.#check();
    const buffer = this.#free.pop() ?? await new Promise<number>((resolve) => this.#waiters.push(resolve));
    if (this.#failure !== undefined) {
      this.put(buffer);
      this.#check();
    }
    return buffer;
  }

  /** Gives a buffer back. */
  put(buffer: number): void {
    const waiter = this.#waiters.shift();
    if (waiter === undefined) this.#free.push(buffer);
    else waiter(buffer);
  }

  /** Reads sectors into a buffer. @throws SvqError DISK_IO, DISK_TIMEOUT */
  read(sector: number, count: number, buffer: number): Promise<void> {
    return this.#request(VIRTIO_BLK_T.IN, sector, count, buffer);
  }

  /** Writes sectors from a buffer. @throws SvqError DISK_IO, DISK_TIMEOUT */
  write(sector: number, count: number, buffer: number): Promise<void> {
    return this.#request(VIRTIO_BLK_T.OUT, sector, count, buffer);
  }

  /** Writes sectors from a buffer, which is given back then; what goes wrong is thrown later, by {@linkcode take} or {@linkcode settle}. */
  writeBehind(sector: number, count: number, buffer: number): void {
    this.#behind(VIRTIO_BLK_T.OUT, sector, count, buffer);
  }

  /** Fills sectors with zeros, any number of them; what goes wrong is thrown later. */
  async zeroBehind(sector: number, count: number): Promise<void> {
    const able = hasBit(this.#options.features, VIRTIO_BLK_FEATURE_BITS.WRITE_ZEROES);
    const most = able ? Math.max(1, Math.min(ZEROES_SECTORS, this.#config.maxWriteZeroesSectors)) : BLOCK_BYTES / VIRTIO_BLK_SECTOR_BYTES;
    for (let at = sector; at < sector + count; at += most) {
      const length = Math.min(most, sector + count - at);
      const buffer = await this.take();
      if (!able) this.bytes(buffer).fill(0);
      this.#behind(able ? VIRTIO_BLK_T.WRITE_ZEROES : VIRTIO_BLK_T.OUT, at, length, buffer);
    }
  }

  #behind(type: number, sector: number, count: number, buffer: number): void {
    this.#request(type, sector, count, buffer).catch((error) => this.#failure ??= error).finally(() => this.put(buffer));
  }

  /** Resolves when nothing is in flight any more, and what was written is on the medium. @throws what a request failed with */
  async settle(): Promise<void> {
    await this.#idle();
    if (hasBit(this.#options.features, VIRTIO_BLK_FEATURE_BITS.FLUSH)) {
      const buffer = await this.take();
      try {
        await this.#request(VIRTIO_BLK_T.FLUSH, 0, 0, buffer);
      } finally {
        this.put(buffer);
      }
    }
    this.#check();
  }

  async #idle(): Promise<void> {
    while (this.#waiting.size > 0 && this.#loop !== undefined) await this.#loop;
    this.#check();
  }

  #check(): void {
    if (this.#failure !== undefined) throw this.#failure;
  }

  #request(type: number, sector: number, count: number, buffer: number): Promise<void> {
    this.#check();
    const head = this.#room.offsets[0]! + HEADS_AT + buffer * SLOT_BYTES;
    const gpa = this.#room.gpa(head);
    const ranged = type === VIRTIO_BLK_T.WRITE_ZEROES;
    this.#view.setUint32(head, type, true);
    this.#view.setUint32(head + 4, 0, true);
    this.#view.setBigUint64(head + 8, ranged ? 0n : BigInt(sector), true);
    this.#bytes[head + STATUS_AT] = 0xff;
    const chain = this.#chain;
    chain.clear();
    chain.addReadable(gpa, VIRTIO_BLK_REQUEST_BYTES);
    if (ranged) {
      this.#view.setBigUint64(head + RANGE_AT, BigInt(sector), true);
      this.#view.setUint32(head + RANGE_AT + 8, count, true);
      this.#view.setUint32(head + RANGE_AT + 12, this.#config.writeZeroesMayUnmap === 1 ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0, true);
      chain.addReadable(gpa + RANGE_AT, VIRTIO_BLK_RANGE_BYTES);
    } else if (count > 0) {
      const data = this.#room.gpa(this.#room.offsets[buffer + 1]!);
      if (type === VIRTIO_BLK_T.IN) chain.addWritable(data, count * VIRTIO_BLK_SECTOR_BYTES);
      else chain.addReadable(data, count * VIRTIO_BLK_SECTOR_BYTES);
    }
    chain.addWritable(gpa + STATUS_AT, 1);
    const id = this.#ring.addChain(chain);
    if (id < 0) throw new RangeError("The ring has no room");
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    this.#waiting.set(id, { resolve, reject, describe: [type, sector, count], head });
    if (this.#ring.publish()) signalEventfd(this.#kick.fd);
    this.#loop ??= this.#await();
    return promise;
  }

  async #await(): Promise<void> {
    // Whoever asked has kept the promise by then.
    await Promise.resolve();
    try {
      while (this.#waiting.size > 0) {
        if (this.#takeAll() || this.#ring.enableCalls()) continue;
        await this.#called();
        drainEventfd(this.#call.fd);
      }
    } catch (error) {
      this.#fail(error);
    } finally {
      // In the same turn as the last look: a request that comes next starts another loop.
      this.#loop = undefined;
    }
  }

  #takeAll(): boolean {
    let any = false;
    for (let id = this.#ring.take(); id >= 0; id = this.#ring.take()) {
      any = true;
      const one = this.#waiting.get(id)!;
      this.#waiting.delete(id);
      const status = this.#bytes[one.head + STATUS_AT]!;
      if (status === VIRTIO_BLK_S.OK) one.resolve();
      else one.reject(diskIoError(...one.describe, status));
    }
    return any;
  }

  async #called(): Promise<void> {
    const { timeoutMs } = this.#options;
    let late = false;
    const timer = setTimeout(() => {
      late = true;
      cancelWaits(this.#call.fd);
    }, timeoutMs);
    try {
      await readable(this.#call.fd);
    } catch (error) {
      if (!late) throw error;
      throw new SvqError("DISK_TIMEOUT", `${this.#backend.info.address} has answered no request of the copy for ${timeoutMs} ms`, {
        exitCode: EXIT.migrationAborted,
        hint: "the disk hangs; a longer --drain-timeout waits for longer",
      });
    } finally {
      clearTimeout(timer);
    }
  }

  #fail(error: unknown): void {
    this.#failure ??= error;
    for (const one of this.#waiting.values()) one.reject(error);
    this.#waiting.clear();
    for (const waiter of this.#waiters.splice(0)) waiter(this.#free.pop() ?? 0);
  }

  /** Takes the queue from the device: resolves when it has left the ring. After {@linkcode start}. */
  async stop(): Promise<void> {
    if (this.#stopped) return;
    this.#stopped = true;
    this.#fail(new SvqError("CLOSED", "The disk is not used any more"));
    try {
      await this.#backend.getVringBase(0);
    } finally {
      this.#closeEvents();
    }
  }

  /** Resets the device, and lets go of the memory. After {@linkcode open}. */
  async close(): Promise<void> {
    if (this.#stopped) return;
    this.#stopped = true;
    this.#fail(new SvqError("CLOSED", "The disk is not used any more"));
    try {
      await this.#backend.reset();
    } finally {
      this.#closeEvents();
      this.#own?.mapping.close();
      this.#own?.memory.close();
    }
  }

  #closeEvents(): void {
    cancelWaits(this.#call.fd);
    this.#kick.close();
    this.#call.close();
  }
}
