/**
 * What a migration looked like from the guest's side: latencies of its requests over time, on both sides of the gap.
 *
 * @module
 */
import type { EmbeddedDriver } from "../drivers/embedded_driver.ts";
import { Histogram } from "../drivers/report.ts";
import { violation } from "./protocol.ts";
import type { MigrationEvent, Phase } from "./source_types.ts";

/** Requests that were completed within a short time. */
export interface Sample {
  /** End of the interval, milliseconds since the clock began. */
  atMs: number;
  /** How long the interval was, milliseconds. */
  ms: number;
  /** Requests completed in it. */
  completed: number;
  /** Half of them took no longer, microseconds. */
  p50: number;
  /** 99 of 100, microseconds. */
  p99: number;
  /** The slowest one, microseconds. */
  max: number;
}

/** Samples kept: an hour of them. */
const MAX_SAMPLES = 36_000;
/** Samples in a frame at most. */
const MAX_SAMPLES_IN_REPORT = 1000;

/** Milliseconds between samples. */
export const SAMPLE_MS = 100;

/** Asks a driver for its latencies again and again. Where the guest stands still there is no sample. */
export class Sampler implements Disposable {
  readonly #driver: EmbeddedDriver;
  readonly #origin: number;
  readonly #onSample: (sample: Sample) => void;
  readonly #timer: ReturnType<typeof setInterval>;
  #last: { counts: number[]; max: number; at: number } | undefined;
  #asking = false;
  #closed = false;

  /** Begins at once. @param origin when the clock of the samples begins, as performance.now() */
  constructor(driver: EmbeddedDriver, origin: number, onSample: (sample: Sample) => void) {
    this.#driver = driver;
    this.#origin = origin;
    this.#onSample = onSample;
    this.#timer = setInterval(() => this.#ask(), SAMPLE_MS);
    this.#ask();
  }

  async #ask(): Promise<void> {
    if (this.#asking) return;
    this.#asking = true;
    try {
      const { counts, max } = await this.#driver.latencies();
      const at = performance.now();
      const last = this.#last;
      this.#last = { counts, max, at };
      if (last === undefined || this.#closed) return;
      const completed = counts.map((count, bucket) => count - (last.counts[bucket] ?? 0));
      const total = completed.reduce((sum, count) => sum + count, 0);
      if (total === 0) return;
      const histogram = new Histogram({ counts: completed, max });
      const [p50, p99, slowest] = [0.5, 0.99, 1].map((share) => histogram.percentile(share)) as [number, number, number];
      this.#onSample({ atMs: at - this.#origin, ms: at - last.at, completed: total, p50, p99, max: slowest });
    } catch {
      // The driver is closed: this was all.
      this[Symbol.dispose]();
    } finally {
      this.#asking = false;
    }
  }

  /** No further samples. */
  [Symbol.dispose](): void {
    this.#closed = true;
    clearInterval(this.#timer);
  }
}

const FIELDS = ["atMs", "ms", "completed", "p50", "p99", "max"] as const;

/** Samples as they travel in a REPORT: lists of numbers. */
export function encodeSamples(samples: readonly Sample[]): number[][] {
  return samples.slice(-MAX_SAMPLES_IN_REPORT).map((sample) => FIELDS.map((field) => Math.round(sample[field] * 10) / 10));
}

/** The inverse; nothing where the peer sends none. @throws SvqError MIGRATION_PROTOCOL */
export function decodeSamples(value: unknown): Sample[] {
  if (value === undefined) return [];
  if (!Array.isArray(value) || value.length > MAX_SAMPLES_IN_REPORT) throw violation("its samples are no list");
  return value.map((one) => {
    const good = Array.isArray(one) && one.length >= FIELDS.length &&
      one.every((number) => typeof number === "number" && number >= 0 && number < 1e12);
    if (!good) throw violation("one of its samples is none");
    return Object.fromEntries(FIELDS.map((field, i) => [field, one[i]])) as unknown as Sample;
  });
}

/** When a round was done. */
export interface RoundTime {
  /** When it ended, milliseconds. */
  atMs: number;
  /** Pages that had got dirty by then. */
  dirtyPages: number;
  /** See {@linkcode MigrationEvent}. */
  throttlePercent: number;
}

/** Everything about a migration that happens at a time; the clock begins with it. */
export class Timeline implements Disposable {
  /** When the clock began, as performance.now(). */
  readonly origin: number = performance.now();
  /** At the source. */
  readonly source: Sample[] = [];
  /** At the destination, by the clock of the source. */
  readonly destination: Sample[] = [];
  /** When each phase began, milliseconds. */
  readonly phases: { phase: Phase; atMs: number }[] = [];
  /** The ends of the rounds while the guest ran. */
  readonly rounds: RoundTime[] = [];
  readonly #sampler: Sampler;

  /** Watches the guest at the source. */
  constructor(driver: EmbeddedDriver) {
    this.#sampler = new Sampler(driver, this.origin, (sample) => keep(this.source, sample));
  }

  /** Takes what a migration reports. */
  event(event: MigrationEvent): void {
    const atMs = performance.now() - this.origin;
    if (event.kind === "phase") this.phases.push({ phase: event.phase, atMs });
    else if (event.kind === "round") {
      this.rounds.push({ atMs, dirtyPages: event.dirtyPages, throttlePercent: event.throttlePercent });
    }
  }

  /** When a phase began, milliseconds; undefined where it did not. */
  begin(phase: Phase): number | undefined {
    return this.phases.find((one) => one.phase === phase)?.atMs;
  }

  /** Takes what the destination reports. Its clock begins when it says that it runs, which is when `completed` began here. */
  there(samples: readonly Sample[]): void {
    const offset = this.begin("completed") ?? 0;
    for (const sample of samples) keep(this.destination, { ...sample, atMs: sample.atMs + offset });
  }

  /** Ends the sampling. */
  [Symbol.dispose](): void {
    this.#sampler[Symbol.dispose]();
  }
}

function keep(samples: Sample[], sample: Sample): void {
  if (samples.length < MAX_SAMPLES) samples.push(sample);
}
