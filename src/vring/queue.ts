/**
 * What both ring formats have in common: the driver's side and the device's side of a virtqueue, and the chain between
 * them. Implementations: split.ts and packed.ts. No I/O here: who kicks and calls is the caller's business.
 *
 * @module
 */
import { SvqError } from "../errors.ts";

/** The two formats of a virtqueue. */
export type RingFormat = "split" | "packed";

/**
 * One descriptor chain as the device's side reads it: segments in order, readable ones first. A reusable record: `pop`
 * overwrites it. The values are private copies, checked once; a ring is never read twice.
 */
export class Chain {
  /** Split: the head's index. Packed: the buffer id. What `push` wants back. */
  id: number = 0;
  /** Segments in use. */
  count: number = 0;
  /** How many of them, from the front, the device may only read. */
  readableCount: number = 0;
  /** Bytes in the readable segments. */
  readableBytes: number = 0;
  /** Bytes in the writable segments. */
  writableBytes: number = 0;
  /** Descriptors that the chain takes in the ring itself; an indirect table counts as one. */
  slots: number = 0;
  /** Address of the indirect table that the chain ends in, bytes; -1 without one. */
  indirectAddress: number = -1;
  /** Length of that table, bytes. */
  indirectLength: number = 0;
  /** Addresses as the ring names them (GPA or IOVA), bytes. */
  readonly addresses: Float64Array;
  /** Lengths in bytes. */
  readonly lengths: Uint32Array;

  /**
   * An empty record.
   *
   * @param capacity segments it can hold: the queue size, or more where indirect tables are longer
   */
  constructor(readonly capacity: number) {
    this.addresses = new Float64Array(capacity);
    this.lengths = new Uint32Array(capacity);
  }

  /** Empties the record, for a driver that fills it with `read` and `write`. */
  clear(): void {
    this.count = 0;
    this.readableCount = 0;
    this.readableBytes = 0;
    this.writableBytes = 0;
    this.slots = 0;
    this.indirectAddress = -1;
    this.indirectLength = 0;
  }

  /** Appends a segment that the device reads; all of them before the first writable one. */
  addReadable(address: number, length: number): void {
    this.#append(address, length);
    this.readableCount = this.count;
    this.readableBytes += length;
  }

  /** Appends a segment that the device writes. */
  addWritable(address: number, length: number): void {
    this.#append(address, length);
    this.writableBytes += length;
  }

  #append(address: number, length: number): void {
    if (this.count >= this.capacity) {
      throw new SvqError("CHAIN_TOO_LONG", `A chain has more than the ${this.capacity} segments that its record holds`);
    }
    this.addresses[this.count] = address;
    this.lengths[this.count] = length;
    this.count++;
  }
}

/**
 * Memory that a ring's addresses name: where bounds are checked and indirect tables are read. `RangeTable` of src/memory
 * is one.
 */
export interface RingMemory {
  /** Does all of `[address, address + length)` lie in memory? */
  contains(address: number, length: number): boolean;
  /** A buffer over `[address, address + length)`. @throws SvqError when that is not one piece of memory */
  buffer(address: number, length: number): ArrayBuffer | SharedArrayBuffer;
  /**
   * Copies `count` little-endian 32-bit words at `address` into `target`, without allocating: where it is there, it is used
   * instead of `buffer` for indirect tables. @returns false when they are not all in memory
   */
  readWords?(address: number, target: Uint32Array, count: number): boolean;
}

/** The device's side: takes chains, gives them back used. */
export interface DeviceQueue {
  /** Format of the ring. */
  readonly layout: RingFormat;
  /** Queue size in descriptors. */
  readonly num: number;
  /**
   * Takes the next available chain into `chain`.
   *
   * @returns false when there is none
   * @throws VringError when the ring breaks a rule: the queue must not be used any further
   */
  pop(chain: Chain): boolean;
  /** Puts the last popped chain back, as if it had not been popped. Only directly after a `pop` that returned true. */
  unpop(): void;
  /**
   * Records `id` as used with `written` bytes; the driver sees it at the next `flush`. With IN_ORDER a chain that comes back
   * early is held until those before it have come back.
   *
   * @throws SvqError VRING_MISUSE when `id` is not in flight
   */
  push(id: number, written: number): void;
  /** Publishes what was pushed. @returns whether the driver wants a call */
  flush(): boolean;
  /** Tells the driver that kicks are not needed (a hint). */
  disableKicks(): void;
  /** Asks for kicks again. @returns whether chains arrived meanwhile: then go on instead of sleeping */
  enableKicks(): boolean;
  /** The state for SET_VRING_BASE and GET_VRING_BASE: split 16-bit avail index; packed avail | wrap<<15 | used<<16 | wrap<<31. */
  readonly base: number;
  /** Chains taken and not yet flushed back. */
  readonly inflight: number;
  /**
   * Makes all chains in flight available again, which is possible only when they are exactly the last ones that were made
   * available: then `base` is where another device can start without losing or repeating one.
   *
   * @returns false, and nothing is changed, when chains were used out of order and there is a gap
   */
  rewind(): boolean;
  /** The state as plain data. @throws SvqError VRING_MISUSE when something was pushed and not flushed */
  save(): DeviceQueueState;
  /**
   * Takes over a state that `save` gave, over the same ring contents. The first flush afterwards asks for a call.
   *
   * @throws VringError STATE_INVALID when it does not fit this ring; nothing is changed then
   */
  restore(state: unknown): void;
}

/** A chain in flight, as the device's side records it. */
export interface InflightRecord {
  /** Split: head; packed: buffer id. */
  id: number;
  /** Split: chains taken since, itself included; packed: ring descriptors taken since, its own included. */
  age: number;
  /** Descriptors that it takes in the ring. */
  slots: number;
  /** Bytes written, when it is done and waits for its turn (IN_ORDER only). */
  written?: number;
}

/** Saved state of a {@linkcode DeviceQueue}: plain data, checked when it is loaded. */
export interface DeviceQueueState {
  /** Format of the ring. */
  layout: RingFormat;
  /** Whose state it is. */
  side: "device";
  /** Queue size in descriptors. */
  num: number;
  /** As in {@linkcode DeviceQueue.base}. */
  base: number;
  /** Split: used index; packed: next used slot | wrap<<15. */
  used: number;
  /** In the order in which they were taken. */
  inflight: InflightRecord[];
}

/** One segment that a driver offers. */
export interface Segment {
  /** GPA or IOVA, bytes. */
  address: number;
  /** Bytes, at least 1. */
  length: number;
}

/** The driver's side: offers chains, takes them back. It keeps its own chain links: the device cannot mislead it. */
export interface DriverQueue {
  /** Format of the ring. */
  readonly layout: RingFormat;
  /** Queue size in descriptors. */
  readonly num: number;
  /** Free descriptors. */
  readonly numFree: number;
  /**
   * Adds a chain; the device sees it at the next `publish`.
   *
   * @returns its id (below `num`), or -1 when there are too few free descriptors
   * @throws VringError CHAIN_TOO_LONG when even the empty ring could not hold it
   */
  add(readable: readonly Segment[], writable: readonly Segment[]): number;
  /** The same, of a record: allocates nothing. */
  addChain(chain: Chain): number;
  /** Makes added chains available. @returns whether the device wants a kick */
  publish(): boolean;
  /**
   * Takes the next used chain; {@linkcode usedLength} holds the device's length afterwards.
   *
   * @returns its id, or -1 when there is none
   * @throws VringError when the device returns an id that it does not hold
   */
  take(): number;
  /** Bytes written as the device says for the chain last taken, clamped to the chain's writable bytes. */
  readonly usedLength: number;
  /** Tells the device that calls are not needed (a hint). */
  disableCalls(): void;
  /** Asks for calls again. @returns whether used chains arrived meanwhile: then go on instead of sleeping */
  enableCalls(): boolean;
  /** Chains that the device holds, or that wait for `publish`. */
  readonly inflight: number;
  /** The state as plain data. @throws SvqError VRING_MISUSE when something was added and not published */
  save(): DriverQueueState;
  /**
   * Takes over a state that `save` gave, over the same ring contents. The first publish afterwards asks for a kick.
   *
   * @throws VringError STATE_INVALID when it does not fit this ring; nothing is changed then
   */
  restore(state: unknown): void;
}

/** A chain that the device holds, as the driver's side records it. */
export interface OutstandingRecord {
  /** Split: head; packed: buffer id. */
  id: number;
  /** Its descriptors in the ring, in order (packed: consecutive slots). */
  descriptors: number[];
  /** Bytes that the device may write. */
  writable_bytes: number;
}

/** Saved state of a {@linkcode DriverQueue}: plain data, checked when it is loaded. */
export interface DriverQueueState {
  /** Format of the ring. */
  layout: RingFormat;
  /** Whose state it is. */
  side: "driver";
  /** Queue size in descriptors. */
  num: number;
  /** Split: avail index; packed: next free slot | wrap<<15. */
  avail: number;
  /** Split: index of the next used element; packed: slot | wrap<<15. */
  used: number;
  /** In the order in which they were added. */
  inflight: OutstandingRecord[];
}
