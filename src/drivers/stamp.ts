/**
 * What a checked workload writes: every piece of data says where it belongs, when it was written and that it is whole.
 *
 * A stamped piece is, in 32-bit words: place (the sector, or the slot), sequence number, checksum of those and the run's
 * seed, and a filler that follows from the checksum. So a reader knows each word that must be there.
 *
 * @module
 */
import { mix } from "./random.ts";

/** Words of the head before the filler. */
const HEAD = 3;

/** Writes a stamp into `count` words from `at` on. */
export function writeStamp(words: Int32Array, at: number, count: number, place: number, sequence: number, seed: number): void {
  const check = mix(mix(place, sequence), seed);
  words[at] = place;
  words[at + 1] = sequence;
  words[at + 2] = check;
  let x = check;
  for (let i = HEAD; i < count; i++) {
    x = Math.imul(x, 1664525) + 1013904223 | 0;
    words[at + i] = x;
  }
}

/** Is exactly this stamp there? */
export function hasStamp(words: Int32Array, at: number, count: number, place: number, sequence: number, seed: number): boolean {
  const check = mix(mix(place, sequence), seed);
  if (words[at] !== (place | 0) || words[at + 1] !== (sequence | 0) || words[at + 2] !== check) return false;
  let x = check;
  for (let i = HEAD; i < count; i++) {
    x = Math.imul(x, 1664525) + 1013904223 | 0;
    if (words[at + i] !== x) return false;
  }
  return true;
}

/** Are `count` words from `at` on all 0? */
export function isZero(words: Int32Array, at: number, count: number): boolean {
  for (let i = 0; i < count; i++) if (words[at + i] !== 0) return false;
  return true;
}

/** What is there instead, for a message. */
export function describeFound(words: Int32Array, at: number, count: number, seed: number): string {
  const place = words[at]! >>> 0;
  const sequence = words[at + 1]! >>> 0;
  if (hasStamp(words, at, count, place, sequence, seed)) return `what write ${sequence} put at ${place}`;
  if (isZero(words, at, count)) return "zeros";
  if (words[at + 2] === mix(mix(place, sequence), seed)) return `a torn copy of what write ${sequence} put at ${place}`;
  return "something that this run never wrote";
}
