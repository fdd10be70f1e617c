/**
 * How long a migration is going to take: arithmetic, no I/O.
 *
 * @module
 */
import { PAGE_BYTES } from "./protocol.ts";
import { ASSUMED_BANDWIDTH, type Estimate } from "./source_types.ts";

/** What stopping, state and resuming take besides pages, milliseconds. */
export const FIXED_MS = 5;

/** What {@linkcode estimateMigration} goes by. */
export interface EstimateInput {
  /** Pages of guest memory. */
  pages: number;
  /** Pages that got dirty within `ms`. */
  dirtyPages: number;
  /** How long was measured, milliseconds. */
  ms: number;
  /** Bytes per second; infinite for no limit. */
  maxBandwidth: number;
  /** See SourceOptions. */
  downtimeLimitMs: number;
  /** See SourceOptions. */
  maxIterations: number;
}

/**
 * Plays the rounds through. The rate at which pages get dirty is taken as constant, which is too high for long rounds: a page
 * that is written twice counts once.
 */
export function estimateMigration(input: EstimateInput): Estimate {
  const { pages, dirtyPages, ms, maxBandwidth, downtimeLimitMs, maxIterations } = input;
  const bandwidth = Number.isFinite(maxBandwidth) ? maxBandwidth : ASSUMED_BANDWIDTH;
  const pagesPerMs = bandwidth / PAGE_BYTES / 1000;
  const dirtyPerMs = dirtyPages / ms;
  let left = pages;
  for (let round = 1;; round++) {
    left = Math.min(pages, dirtyPerMs * left / pagesPerMs);
    const downtimeMs = FIXED_MS + left / pagesPerMs;
    const converges = downtimeMs <= downtimeLimitMs;
    if (converges || round >= maxIterations) {
      return { dirtyBytesPerS: Math.round(dirtyPerMs * PAGE_BYTES * 1000), bandwidth, rounds: round, converges, downtimeMs };
    }
  }
}
