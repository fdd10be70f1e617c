/**
 * Counters of the data path, in memory that main thread and Workers share: reading them costs the data path nothing.
 *
 * @module
 */

/** Slots of one queue. Each is a 64-bit float that only the queue's Worker writes. */
export const COUNTER = {
  /** Kicks from the guest. */
  kicks: 0,
  /** Calls to the guest. */
  calls: 1,
  /** Chains given back to the guest. */
  chains: 2,
  /** Bytes in the chains given back, both directions, as the descriptors say. */
  bytes: 3,
  /** Pages marked dirty, each time anew. */
  dirtyPages: 4,
  /** Errors that stopped the queue. */
  errors: 5,
  /** Chains at the device. */
  inflight: 6,
  /** Guest avail position: 16-bit index (split), or slot with wrap (packed). */
  availIdx: 7,
  /** Guest used position. */
  usedIdx: 8,
  /** Kicks to the device. */
  deviceKicks: 9,
  /** Calls from the device. */
  deviceCalls: 10,
  /** Times that the device's ring was full. */
  full: 11,
  /** Which core runs it: 0 none, 1 js, 2 wasm. */
  core: 12,
  /** Times that chains were given to the device: one or more together are a batch. */
  batches: 13,
  /** Frames that a capture had no room for. */
  uncaptured: 14,
} as const;

/** Name of a counter. */
export type CounterName = keyof typeof COUNTER;

/** Cores by the number in {@linkcode COUNTER}. */
export const CORES = [null, "js", "wasm"] as const;

/** Slots of one Worker, written by it alone. */
export const WORKER_COUNTER = {
  /** Calls of epoll_wait. */
  waits: 0,
  /** Those of them that could sleep. */
  sleeps: 1,
  /** Rounds of polling. */
  polls: 2,
  /** Times that polling found work. */
  pollHits: 3,
  /** Time spent in looks that found nothing, microseconds. */
  pollIdleUs: 4,
  /** How long it polls at present, microseconds. */
  pollUs: 5,
  /** Times that self-tuned polling stopped for a while because it did not pay. */
  pollHeldOff: 6,
} as const;

/** Slots reserved per queue and per Worker. */
const SLOTS = 16;
/** Workers of a relay, at most. */
export const MAX_WORKERS = 64;

/** Counters of all queues and Workers of a relay. */
export class Counters {
  /** The shared memory, to be posted to Workers. */
  readonly shared: SharedArrayBuffer;

  /** New counters, or a view of those of another thread. */
  constructor(queues: number | SharedArrayBuffer) {
    this.shared = typeof queues === "number" ? new SharedArrayBuffer((MAX_WORKERS + queues) * SLOTS * 8) : queues;
  }

  /** The slots of one queue, indexed by {@linkcode COUNTER}. */
  of(index: number): Float64Array<SharedArrayBuffer> {
    return new Float64Array(this.shared, (MAX_WORKERS + index) * SLOTS * 8, SLOTS);
  }

  /** The slots of one Worker, indexed by {@linkcode WORKER_COUNTER}. */
  ofWorker(index: number): Float64Array<SharedArrayBuffer> {
    return new Float64Array(this.shared, index * SLOTS * 8, SLOTS);
  }
}
