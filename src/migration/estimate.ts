/**
 * How long a migration is going to take: arithmetic, no I/O.
 *
 * @module
 */
import { Convergence, type ConvergenceOptions } from "./convergence.ts";
import { PAGE_BYTES } from "./protocol.ts";
import { ASSUMED_BANDWIDTH, type Estimate } from "./source_types.ts";

/** What stopping, state and resuming take besides pages, milliseconds. */
export const FIXED_MS = 5;

/** What {@linkcode estimateMigration} goes by. */
export interface EstimateInput extends ConvergenceOptions {
  /** Pages of guest memory. */
  pages: number;
  /** Pages that got dirty within `ms`. */
  dirtyPages: number;
  /** How long was measured, milliseconds. */
  ms: number;
  /** Bytes per second; infinite for no limit. */
  maxBandwidth: number;
}

/**
 * Plays the rounds through. The rate at which pages get dirty is taken as constant, which is too high for long rounds: a page
 * that is written twice counts once. A guest that is held still for a share of its time is taken to write that much less.
 */
export function estimateMigration(input: EstimateInput): Estimate {
  const { pages, dirtyPages, ms, maxBandwidth, downtimeLimitMs } = input;
  const bandwidth = Number.isFinite(maxBandwidth) ? maxBandwidth : ASSUMED_BANDWIDTH;
  const pagesPerMs = bandwidth / PAGE_BYTES / 1000;
  const dirtyPerMs = dirtyPages / ms;
  const convergence = new Convergence(input);
  let left = pages;
  for (let rounds = 1;; rounds++) {
    const sent = left;
    left = Math.min(pages, dirtyPerMs * (1 - convergence.throttlePercent / 100) * left / pagesPerMs);
    const downtimeMs = FIXED_MS + left / pagesPerMs;
    if (convergence.next({ sent, dirty: left, estimateMs: downtimeMs }) === "round") continue;
    return {
      dirtyBytesPerS: Math.round(dirtyPerMs * PAGE_BYTES * 1000),
      bandwidth,
      rounds,
      converges: downtimeMs <= downtimeLimitMs,
      downtimeMs,
      throttlePercent: convergence.throttlePercent,
    };
  }
}
