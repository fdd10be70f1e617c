/**
 * What is marked dirty when a guest's ring is written.
 *
 * @module
 */
import type { RingPlace } from "./messages.ts";

/**
 * Address and length, pair after pair. A packed ring is logged by its own addresses.
 *
 * @param gpa of the used ring where the VMM wants it logged; -1: nothing is
 */
export function loggedRanges(gpa: number, ring: RingPlace): readonly number[] {
  if (gpa < 0) return [];
  if (ring.written !== undefined) return ring.written;
  return ring.packed ? [ring.desc, 16 * ring.num, ring.used, 4] : [gpa, 6 + 8 * ring.num];
}
