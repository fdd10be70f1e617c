/**
 * What a guest's split ring tells about requests that a lost device had in hand, when nobody recorded them.
 *
 * The rings name the chains that were offered and those that came back, in two orders, and forget both after `num` entries.
 * A successor may start at the used index only if what is outstanding is exactly the newest entries of the avail ring. With a
 * device that works strictly in order that is always so; after out-of-order completion it need not be, and then
 * starting there loses a request and does another one twice.
 *
 * @module
 */

/** The parts of a split ring, as 16-bit words (avail) and 32-bit words (used), from their first byte. */
export interface RingWords {
  /** Avail ring: flags, idx, entries. */
  avail: Uint16Array;
  /** Used ring as 32-bit words, from the first byte: word 0 is flags and idx, then id and length of each entry. */
  used: Uint32Array;
  /** Queue size. */
  num: number;
}

/** Fewest completions that must agree where they are not in the very order of the avail ring. */
const MIN_AGREEING = 16;

/**
 * The used index, if the rings show that everything offered before it has come back; otherwise nothing.
 *
 * Sure where nothing or everything is outstanding. Else it is taken as shown when, as far as both rings still remember,
 * chains came back in the order in which they were offered, or (neighbours overtake each other) when the last completions,
 * at least 16 and twice as many as are outstanding, are the same chains as those offered in their places.
 */
export function resumableUsedIndex({ avail, used, num }: RingWords): number | undefined {
  const offered = Atomics.load(avail, 1);
  const returned = Atomics.load(used, 0) >>> 16;
  const outstanding = (offered - returned) & 0xffff;
  if (outstanding > num) return undefined;
  if (outstanding === 0 || outstanding === num) return returned;
  const mask = num - 1;
  const offeredAt = (index: number) => avail[2 + (index & mask)]!;
  const returnedAt = (index: number) => used[1 + 2 * (index & mask)]! & 0xffff;
  // Backwards from the newest completion, as far as the avail ring has not been overwritten.
  const visible = num - outstanding;
  const wanted = Math.max(MIN_AGREEING, 2 * outstanding);
  const balance = new Map<number, number>();
  const add = (id: number, by: number) => {
    const sum = (balance.get(id) ?? 0) + by;
    if (sum === 0) balance.delete(id);
    else balance.set(id, sum);
  };
  let inOrder = true;
  for (let back = 1; back <= visible; back++) {
    const [a, b] = [offeredAt(returned - back), returnedAt(returned - back)];
    if (a !== b) inOrder = false;
    add(a, 1);
    add(b, -1);
    if (!inOrder && balance.size === 0 && back >= wanted) return returned;
  }
  return inOrder ? returned : undefined;
}
