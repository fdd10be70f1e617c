/**
 * Summaries of repeated measurements.
 *
 * @module
 */

/** The middle one, and the spread. */
export interface Summary {
  /** The middle value; of an even number the mean of the middle two. */
  median: number;
  /** The least. */
  min: number;
  /** The greatest. */
  max: number;
}

/** Summarizes at least one value. */
export function summarize(values: readonly number[]): Summary {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  const median = sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
  return { median, min: sorted[0]!, max: sorted.at(-1)! };
}
