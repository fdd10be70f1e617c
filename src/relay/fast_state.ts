/**
 * The state of one queue in the JavaScript core's fast path: numbers in typed arrays, and the places of both rings. Split rings
 * on both sides.
 *
 * @module
 */
import { bufferAt } from "../ffi/mod.ts";
import type { RangeTable } from "../memory/range_table.ts";
import type { SplitInflight } from "../vring/inflight.ts";
import {
  checkSplitNum,
  DESC_BYTES,
  eventPassed,
  splitLayout,
  VRING_AVAIL_F_NO_INTERRUPT,
  VRING_USED_F_NO_NOTIFY,
  words16,
  words32,
} from "../vring/layout.ts";
import { VringError } from "../vring/rules.ts";
import { availIndexJump } from "../vring/split_walk.ts";
import type { DataPath } from "./core.ts";
import type { QueueStart, RingPlace } from "./messages.ts";

/** Bits of a segment's last word: index of the next one, and the descriptor flags NEXT and WRITE above it. */
export const LINK_INDEX = 0x3fff_ffff, LINK_MORE = 1 << 30, LINK_FLAGS = 30;
/** Words of a record. */
export const RECORD_FIRST = 1, RECORD_ORDER = 2, RECORD_SLOTS = 3;

const PAGE = 4096;
// Page numbers that fit 31 bits: memory below 2^43. What lies above goes the long way.
const MOST_PAGES = 0x7fff_ffff;

function signed(words: Uint32Array): Int32Array {
  return new Int32Array(words.buffer, words.byteOffset, words.length);
}

/**
 * One queue. Fields are public: the loops of fast_forward.ts and fast_return.ts take them into locals and put them back.
 *
 * Segments, four words each: the address as the guest names it (low, high), length, link. In mode `shadow` segment `i` below `poolBase`
 * belongs to descriptor `i` of the device's ring, used or free: their links are the private copy of the chains in that ring, so
 * the device cannot mislead anybody. The rest are a pool, for chains in tables of the device's and for mode `used`. A record, by
 * id in the device's ring, four words: the guest's id (-1: not at the device), first segment, when it was taken, descriptors.
 */
export class FastQueue {
  /** Mode `used`: ids are heads of the guest's own table. */
  readonly heads: boolean;
  /** Descriptors of the guest's ring. */
  readonly num: number;
  readonly guestDesc: Int32Array;
  readonly guestAvail: Uint16Array;
  readonly guestUsedIdx: Uint16Array;
  readonly guestUsed: Int32Array;
  readonly guestEventIdx: boolean;
  /** Next avail index to take, and the index as last read. */
  guestNext: number;
  guestSeen: number;
  /** Next used index to write, and the one that the driver sees. */
  guestUsedNext: number;
  guestFlushed: number;
  /** Chains taken and not flushed back; how many were taken ever, modulo 2^32; by head: 1 for a chain that was taken. */
  open = 0;
  order = 0;
  readonly taken: Uint8Array;
  /** The record outside this process, if any. */
  readonly inflight: SplitInflight | undefined;

  deviceNum = 0;
  deviceDesc: Int32Array = new Int32Array(0);
  deviceAvail: Uint16Array = new Uint16Array(0);
  deviceUsedIdx: Uint16Array = new Uint16Array(0);
  deviceUsed: Int32Array = new Int32Array(0);
  deviceEventIdx = false;
  /** Next avail index to write, and the one that the device sees. */
  deviceNext = 0;
  devicePublished = 0;
  /** Next used index to take, and the index as last read. */
  deviceUsedNext = 0;
  deviceUsedSeen = 0;
  /** Chains that came back since the device's ring started. */
  returned = 0;

  segments: Int32Array = new Int32Array(0);
  records: Int32Array = new Int32Array(0);
  poolBase = 0;
  freeHead = 0;
  numFree = 0;
  poolHead = 0;
  poolFree = 0;

  /** The range of guest memory that was hit last, in whole pages: first one, and end. */
  firstPage = 0;
  endPage = 0;
  #memory: RangeTable;

  /** @throws VringError, SvqError OUTSIDE_MEMORY when the guest's ring cannot be used */
  constructor(start: QueueStart, path: DataPath, inflight: SplitInflight | undefined) {
    const { num, eventIdx, desc, avail, used } = start.guest;
    const layout = splitLayout(num);
    const part = (gpa: number, size: number) => ({ buffer: path.memory.buffer(gpa, size) });
    this.heads = start.mode === "used";
    this.num = num;
    this.inflight = inflight;
    this.guestEventIdx = eventIdx;
    this.guestDesc = signed(words32("descriptor table", part(desc, layout.desc.size), layout.desc.size, 4));
    this.guestAvail = words16("avail ring", part(avail, layout.avail.size), layout.avail.size, 2);
    this.guestUsedIdx = words16("used ring", part(used, layout.used.size), layout.used.size, 4);
    this.guestUsed = signed(words32("used ring", part(used, layout.used.size), 4 + 8 * num, 4));
    this.guestNext = this.guestSeen = start.guestBase & 0xffff;
    this.guestUsedNext = this.guestFlushed = Atomics.load(this.guestUsedIdx, 1);
    this.taken = new Uint8Array(num);
    const ahead = (this.guestNext - this.guestUsedNext) & 0xffff;
    if (ahead > num) {
      const at = `The ring base is ${this.guestNext} and the used index ${this.guestUsedNext}`;
      throw new VringError("BASE_INVALID", -1, `${at}, with a queue of ${num}`);
    }
    this.#memory = path.memory;
    this.openDevice(start.device);
  }

  /** Takes up a fresh device ring. @throws VringError RING_SIZE or RING_ALIGNMENT */
  openDevice({ num, eventIdx, desc, avail, used }: RingPlace): void {
    checkSplitNum(num);
    const layout = splitLayout(num);
    const part = (address: number, size: number) => ({ buffer: bufferAt(address, size) });
    if (!this.heads) this.deviceDesc = signed(words32("descriptor table", part(desc, layout.desc.size), DESC_BYTES * num, 4));
    this.deviceAvail = words16("avail ring", part(avail, layout.avail.size), layout.avail.size, 2);
    this.deviceUsedIdx = words16("used ring", part(used, layout.used.size), layout.used.size, 4);
    this.deviceUsed = signed(words32("used ring", part(used, layout.used.size), 4 + 8 * num, 4));
    this.deviceNum = num;
    this.deviceEventIdx = eventIdx;
    this.deviceNext =
      this.devicePublished =
      this.deviceUsedNext =
      this.deviceUsedSeen =
      this.returned =
        0;
    this.records = new Int32Array(4 * num);
    for (let id = 0; id < num; id++) this.records[id << 2] = -1;
    this.poolBase = this.heads ? 0 : num;
    this.segments = new Int32Array(4 * this.poolBase);
    for (let i = 0; i < this.poolBase; i++) this.segments[(i << 2) + 3] = (i + 1) % num;
    this.freeHead = 0;
    this.numFree = this.poolBase;
    this.poolFree = 0;
    if (this.heads) this.growPool(num);
  }

  /** Makes room for at least `count` more segments in the pool. */
  growPool(count: number): void {
    const old = this.segments.length >> 2;
    const size = old + Math.max(count, old - this.poolBase, this.deviceNum);
    const segments = new Int32Array(4 * size);
    segments.set(this.segments);
    for (let i = old; i < size; i++) segments[(i << 2) + 3] = i + 1 < size ? i + 1 : this.poolFree > 0 ? this.poolHead : 0;
    this.segments = segments;
    this.poolHead = old;
    this.poolFree += size - old;
  }

  /** Guest memory may have been exchanged: what was remembered of it holds no more. */
  useMemory(memory: RangeTable): void {
    if (this.#memory === memory) return;
    this.#memory = memory;
    this.firstPage = this.endPage = 0;
  }

  /** Does the buffer lie in guest memory? The range that it lies in is remembered. @param high below 2^11 @param length above 0 */
  locate(low: number, high: number, length: number): boolean {
    const memory = this.#memory;
    if (!memory.contains(high * 0x1_0000_0000 + (low >>> 0), length)) return false;
    this.firstPage = Math.ceil(Math.min(memory.hitStart / PAGE, MOST_PAGES));
    this.endPage = Math.floor(Math.min(memory.hitEnd / PAGE, MOST_PAGES));
    return true;
  }

  /** The guest address of a segment, bytes. */
  addressOf(segment: number): number {
    const word = segment << 2;
    return (this.segments[word + 1]! >>> 0) * 0x1_0000_0000 + (this.segments[word]! >>> 0);
  }

  /** Length of a segment, bytes. */
  lengthOf(segment: number): number {
    return this.segments[(segment << 2) + 2]! >>> 0;
  }

  /** Chains in the device's ring, or on their way there. */
  get inflightCount(): number {
    return (this.deviceNext - this.deviceUsedNext) & 0xffff;
  }

  /** Reads the guest's avail index: what was stored before the driver stored it is seen from here on. @throws VringError AVAIL_INDEX_JUMP */
  lookAvail(): boolean {
    const idx = Atomics.load(this.guestAvail, 1);
    const ahead = (idx - this.guestNext) & 0xffff;
    if (ahead > this.num) availIndexJump(idx, this.guestNext, this.num);
    this.guestSeen = idx;
    return ahead !== 0;
  }

  /** Reads the device's used index, likewise. @throws VringError USED_INDEX_JUMP */
  lookUsed(): boolean {
    const idx = Atomics.load(this.deviceUsedIdx, 1);
    const ahead = (idx - this.deviceUsedNext) & 0xffff;
    if (ahead > ((this.devicePublished - this.deviceUsedNext) & 0xffff)) {
      const reached = `where ${this.deviceUsedNext} was reached and the avail index is ${this.devicePublished}`;
      throw new VringError("USED_INDEX_JUMP", idx, `The used index is ${idx} ${reached}`);
    }
    this.deviceUsedSeen = idx;
    return ahead !== 0;
  }

  /**
   * Makes added chains visible to the device. The store is sequentially consistent: a device that reads this index sees every plain
   * store before it (descriptors, avail entries), and the load of what the device wants comes after it.
   *
   * @returns whether it wants a kick
   */
  publish(): boolean {
    const old = this.devicePublished;
    const now = this.deviceNext;
    if (now === old) return false;
    Atomics.store(this.deviceAvail, 1, now);
    this.devicePublished = now;
    return this.deviceEventIdx
      ? eventPassed(Atomics.load(this.deviceUsedIdx, 2 + 4 * this.deviceNum), now, old)
      : (Atomics.load(this.deviceUsedIdx, 0) & VRING_USED_F_NO_NOTIFY) === 0;
  }

  /** Makes used chains visible to the guest, likewise. @returns whether it wants a call */
  flush(): boolean {
    const old = this.guestFlushed;
    const now = this.guestUsedNext;
    Atomics.store(this.guestUsedIdx, 1, now);
    this.guestFlushed = now;
    this.open -= (now - old) & 0xffff;
    return this.guestEventIdx
      ? eventPassed(Atomics.load(this.guestAvail, 2 + this.num), now, old)
      : (Atomics.load(this.guestAvail, 0) & VRING_AVAIL_F_NO_INTERRUPT) === 0;
  }

  /** Tells the device that calls are not needed (a hint). */
  disableCalls(): void {
    if (this.deviceEventIdx) Atomics.store(this.deviceAvail, 2 + this.deviceNum, (this.deviceUsedNext - 1) & 0xffff);
    else Atomics.store(this.deviceAvail, 0, VRING_AVAIL_F_NO_INTERRUPT);
  }

  /**
   * Asks for calls. Sequentially consistent store, then load: a device that uses a chain after this load sees the request.
   *
   * @returns whether used chains arrived meanwhile
   * @throws VringError USED_INDEX_JUMP
   */
  enableCalls(): boolean {
    if (this.deviceEventIdx) Atomics.store(this.deviceAvail, 2 + this.deviceNum, this.deviceUsedNext);
    else Atomics.store(this.deviceAvail, 0, 0);
    return this.lookUsed();
  }

  /** Tells the guest that kicks are not needed (a hint). */
  disableKicks(): void {
    if (this.guestEventIdx) Atomics.store(this.guestUsedIdx, 2 + 4 * this.num, (this.guestNext - 1) & 0xffff);
    else Atomics.store(this.guestUsedIdx, 0, VRING_USED_F_NO_NOTIFY);
  }

  /** Asks for kicks, likewise. @returns whether chains arrived meanwhile. @throws VringError AVAIL_INDEX_JUMP */
  enableKicks(): boolean {
    if (this.guestEventIdx) Atomics.store(this.guestUsedIdx, 2 + 4 * this.num, this.guestNext);
    else Atomics.store(this.guestUsedIdx, 0, 0);
    return this.lookAvail();
  }
}
