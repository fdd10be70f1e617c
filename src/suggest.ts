/**
 * "Did you mean": the nearest of a set of words.
 *
 * @module
 */

/** Edits (insert, delete, replace, swap of neighbours) that turn `a` into `b`. */
export function editDistance(a: string, b: string): number {
  let beforeLast: number[] = [];
  let last = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    for (let j = 1; j <= b.length; j++) {
      const replace = last[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1);
      let cost = Math.min(replace, last[j]! + 1, row[j - 1]! + 1);
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) cost = Math.min(cost, beforeLast[j - 2]! + 1);
      row.push(cost);
    }
    beforeLast = last;
    last = row;
  }
  return last[b.length]!;
}

/** The words of `known` that a typing error may have turned into `input`, nearest first, at most three. */
export function suggest(input: string, known: readonly string[]): string[] {
  const limit = Math.max(1, Math.floor(input.length / 3));
  return known
    .map((word) => ({ word, distance: word.startsWith(input) && input.length >= 2 ? 0 : editDistance(input, word) }))
    .filter(({ distance }) => distance <= limit)
    .sort((a, b) => a.distance - b.distance)
    .slice(0, 3)
    .map(({ word }) => word);
}

/** A hint: "did you mean x?", or the list of what is known where nothing is near. */
export function suggestionHint(input: string, known: readonly string[], what: string): string {
  const near = suggest(input, known);
  if (near.length > 0) return `did you mean ${near.join(" or ")}?`;
  return `${what}: ${known.join(", ")}`;
}
