/**
 * What a driver counts.
 *
 * @module
 */

/** Latencies in microseconds. */
export interface LatencyReport {
  /** Half of the requests took no longer. */
  p50: number;
  /** 99 of 100. */
  p99: number;
  /** 999 of 1000. */
  p999: number;
  /** The slowest one. */
  max: number;
}

/** How a network workload went. */
export interface NetReport {
  /** Frames sent. */
  sent: number;
  /** Frames received, each once, of all streams. */
  received: number;
  /** Frames that have not come: of those sent where they are expected back, otherwise those that later ones have overtaken. */
  missing: number;
  /** Frames that came after a later one of their stream. */
  reordered: number;
  /** Frames that came more than once. */
  duplicated: number;
  /** Longest time between two frames of one stream, also over a migration, milliseconds. */
  longestGapMs: number;
}

/** How a workload went. All counts are since the workload began, also on another host. */
export interface DriverReport {
  /** Requests whose answer came and was right. */
  completed: number;
  /** Requests that never came back. Known when the driver stops; while it runs 0. */
  lost: number;
  /** Answers to a request that was not out: completed twice, or never made. */
  duplicated: number;
  /** Answers with wrong data, a wrong status or a wrong length. */
  corrupted: number;
  /** Answers that overtook others where that is forbidden (IN_ORDER). */
  outOfOrder: number;
  /** Used chains that nobody announced: a call that got lost. */
  missedCalls: number;
  /** Requests that are out now. */
  inflight: number;
  /** Requests made. */
  submitted: number;
  /** Sectors (or loopback words) whose contents were compared. */
  verified: number;
  /** Bytes that devices read or wrote as payload. */
  bytes: number;
  /** Time that the workload ran, without pauses, milliseconds. */
  durationMs: number;
  /** Completed requests per second of that. */
  iops: number;
  /** From publishing a request until its answer is taken. */
  latencyUs: LatencyReport;
  /** Longest time with requests out and none coming back, without pauses, milliseconds. */
  longestStallMs: number;
  /** The first few faults in words. */
  faults: string[];
  /** Network workloads only. */
  net?: NetReport;
}

const STEPS = 16;
const BUCKETS = STEPS * 40;

/** A histogram of microseconds, exact to one part in 16. */
export class Histogram {
  readonly #counts: Float64Array;
  #max: number;
  #total: number;

  /** Empty, or with the counts that {@linkcode save} gave. */
  constructor(saved?: { counts: number[]; max: number }) {
    this.#counts = new Float64Array(BUCKETS);
    this.#counts.set((saved?.counts ?? []).slice(0, BUCKETS));
    this.#max = saved?.max ?? 0;
    this.#total = this.#counts.reduce((sum, count) => sum + count, 0);
  }

  /** Adds a value. */
  add(us: number): void {
    const power = us < STEPS ? 0 : Math.floor(Math.log2(us / STEPS)) + 1;
    const bucket = power === 0 ? Math.floor(us) : power * STEPS + Math.floor(us / 2 ** (power - 1)) - STEPS;
    this.#counts[Math.min(BUCKETS - 1, Math.max(0, bucket))]!++;
    this.#total++;
    if (us > this.#max) this.#max = us;
  }

  /** What a share (0 to 1) of the values did not exceed, to one part in 16; 0 when it is empty. */
  percentile(share: number): number {
    const rank = share * this.#total;
    let seen = 0;
    for (let bucket = 0; bucket < BUCKETS; bucket++) {
      seen += this.#counts[bucket]!;
      if (seen < rank || seen === 0) continue;
      const power = Math.floor(bucket / STEPS);
      const upper = power === 0 ? bucket + 1 : (bucket % STEPS + STEPS + 1) * 2 ** (power - 1);
      return Math.min(upper, this.#max);
    }
    return this.#max;
  }

  /** The percentiles; 0 when it is empty. */
  report(): LatencyReport {
    const round = (us: number) => Math.round(us * 10) / 10;
    return {
      p50: round(this.percentile(0.5)),
      p99: round(this.percentile(0.99)),
      p999: round(this.percentile(0.999)),
      max: round(this.#max),
    };
  }

  /** Plain data for the constructor. */
  save(): { counts: number[]; max: number } {
    const last = this.#counts.findLastIndex((count) => count > 0);
    return { counts: [...this.#counts.subarray(0, last + 1)], max: this.#max };
  }
}

/** Counters that travel with a driver's state. */
export interface DriverCounters {
  /** See {@linkcode DriverReport}. */
  completed: number;
  /** See {@linkcode DriverReport}. */
  duplicated: number;
  /** See {@linkcode DriverReport}. */
  corrupted: number;
  /** See {@linkcode DriverReport}. */
  outOfOrder: number;
  /** See {@linkcode DriverReport}. */
  missedCalls: number;
  /** See {@linkcode DriverReport}. */
  submitted: number;
  /** See {@linkcode DriverReport}. */
  verified: number;
  /** See {@linkcode DriverReport}. */
  bytes: number;
  /** Milliseconds that the workload ran. */
  ranMs: number;
  /** See {@linkcode DriverReport}. */
  longestStallMs: number;
}

/** All counters at 0. */
export function newCounters(): DriverCounters {
  return {
    completed: 0,
    duplicated: 0,
    corrupted: 0,
    outOfOrder: 0,
    missedCalls: 0,
    submitted: 0,
    verified: 0,
    bytes: 0,
    ranMs: 0,
    longestStallMs: 0,
  };
}
