/**
 * What both ring formats have in common: the driver's side and the device's side of a virtqueue, and the chain between
 * them. Implementations: split.ts and packed.ts. No I/O here: who kicks and calls is the caller's business.
 *
 * @module
 */

/**
 * One descriptor chain as the device's side reads it: segments in order, readable ones first. A reusable record: `pop`
 * overwrites it. The values are private copies, checked once; a ring is never read twice.
 */
export class Chain {
  /** Split: the head's index. Packed: the buffer id. What `push` wants back. */
  id = 0;
  /** Segments in use. */
  count = 0;
  /** How many of them, from the front, the device may only read. */
  readableCount = 0;
  /** Bytes in the readable segments. */
  readableBytes = 0;
  /** Bytes in the writable segments. */
  writableBytes = 0;
  /** Addresses as the ring names them (GPA or IOVA), bytes. */
  readonly addresses: Float64Array;
  /** Lengths in bytes. */
  readonly lengths: Uint32Array;

  /** An empty chain. @param capacity segments it can hold: the queue size, or more where indirect tables are longer */
  constructor(readonly capacity: number) {
    this.addresses = new Float64Array(capacity);
    this.lengths = new Uint32Array(capacity);
  }
}

/** The device's side: takes chains, gives them back used. */
export interface DeviceQueue {
  /** Queue size in descriptors. */
  readonly num: number;
  /**
   * Takes the next available chain into `chain`.
   *
   * @returns false when there is none
   * @throws VringError when the ring breaks a rule: the queue must not be used any further
   */
  pop(chain: Chain): boolean;
  /** Puts the last popped chain back, as if it had not been popped. */
  unpop(): void;
  /** Records `id` as used with `written` bytes; the driver sees it at the next `flush`. */
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
  /** Queue size in descriptors. */
  readonly num: number;
  /** Free descriptors. */
  readonly numFree: number;
  /**
   * Adds a chain; the device sees it at the next `publish`.
   *
   * @returns its id (below `num`), or -1 when there are too few free descriptors
   */
  add(readable: readonly Segment[], writable: readonly Segment[]): number;
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
}
