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

/** Bits of a segment's last word: index of the next one. Above it lie the descriptor flags NEXT and WRITE. */
export const LINK_INDEX = 0x3fff_ffff;
/** The flag NEXT there. */
export const LINK_MORE = 1 << 30;
/** How far up the flags lie. */
export const LINK_FLAGS = 30;
/** Word of a record: first segment. */
export const RECORD_FIRST = 1;
/** Word of a record: when it was taken. */
export const RECORD_ORDER = 2;
/** Word of a record: descriptors in the device's ring. */
export const RECORD_SLOTS = 3;

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
  /** The guest's descriptor table, in words. */
  readonly guestDesc: Int32Array;
  /** The guest's avail ring. */
  readonly guestAvail: Uint16Array;
  /** The guest's used ring, for its index and event words. */
  readonly guestUsedIdx: Uint16Array;
  /** The guest's used ring, for its elements. */
  readonly guestUsed: Int32Array;
  /** EVENT_IDX with the guest. */
  readonly guestEventIdx: boolean;
  /** Next avail index to take. */
  guestNext: number;
  /** The avail index as last read. */
  guestSeen: number;
  /** Next used index to write. */
  guestUsedNext: number;
  /** The used index that the guest sees. */
  guestFlushed: number;
  /** Chains taken and not flushed back. */
  open = 0;
  /** Chains taken ever, modulo 2^32. */
  order = 0;
  /** By head: 1 for a chain that was taken. */
  readonly taken: Uint8Array;
  /** The record outside this process, if any. */
  readonly inflight: SplitInflight | undefined;

  /** Descriptors of the device's ring. */
  deviceNum = 0;
  /** The device's descriptor table; none in mode `used`. */
  deviceDesc: Int32Array = new Int32Array(0);
  /** The device's avail ring. */
  deviceAvail: Uint16Array = new Uint16Array(0);
  /** The device's used ring, for its index and event words. */
  deviceUsedIdx: Uint16Array = new Uint16Array(0);
  /** The device's used ring, for its elements. */
  deviceUsed: Int32Array = new Int32Array(0);
  /** EVENT_IDX with the device. */
  deviceEventIdx = false;
  /** Next avail index to write. */
  deviceNext = 0;
  /** The avail index that the device sees. */
  devicePublished = 0;
  /** Next used index to take. */
  deviceUsedNext = 0;
  /** The device's used index as last read. */
  deviceUsedSeen = 0;
  /** Chains that came back since the device's ring started. */
  returned = 0;

  /** Segments, as above. */
  segments: Int32Array = new Int32Array(0);
  /** Records, as above. */
  records: Int32Array = new Int32Array(0);
  /** First segment of the pool. */
  poolBase = 0;
  /** First free descriptor. */
  freeHead = 0;
  /** Free descriptors. */
  numFree = 0;
  /** First free segment of the pool. */
  poolHead = 0;
  /** Free segments of the pool. */
  poolFree = 0;

  /** First whole page of the range of guest memory that was hit last. */
  firstPage = 0;
  /** The end of its whole pages. */
  endPage = 0;
  #memory: RangeTable;

  /** Takes up both rings. @throws VringError, SvqError OUTSIDE_MEMORY when the guest's ring cannot be used */
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

  /**
   * Does something seem to be there? A plain look, a tenth of an atomic one's time. What it misses is not lost: before anybody sleeps,
   * {@linkcode FastQueue.enableKicks} looks again behind a sequentially consistent store. What it finds is read behind an atomic load.
   */
  get availMoved(): boolean {
    return this.guestAvail[1] !== this.guestNext;
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
