/**
 * Checksums of pages: four lanes of 32 bits, each step of which can be undone, so that one changed word always shows. They
 * find mistakes and damage, not forgery.
 *
 * @module
 */

const PRIME = 0x01000193;
const SEEDS = [0x2545f491, 0x6c078965, 0x1b873593, 0x5bd1e995] as const;

/** A running digest. */
export type Digest = Int32Array<ArrayBuffer>;

/** A digest of nothing. */
export function newDigest(): Digest {
  return Int32Array.from(SEEDS);
}

/** Adds `count` words (a multiple of 4) from index `at`. */
export function addWords(digest: Digest, words: Int32Array, at: number, count: number): void {
  let [a, b, c, d] = [digest[0]!, digest[1]!, digest[2]!, digest[3]!];
  for (let i = at, end = at + count; i < end; i += 4) {
    a = Math.imul(a ^ words[i]!, PRIME);
    b = Math.imul(b ^ words[i + 1]!, PRIME);
    c = Math.imul(c ^ words[i + 2]!, PRIME);
    d = Math.imul(d ^ words[i + 3]!, PRIME);
    // Without this the high bits of a word would never reach the low ones of the lane.
    a ^= a >>> 15;
    b ^= b >>> 15;
    c ^= c >>> 15;
    d ^= d >>> 15;
  }
  digest[0] = a;
  digest[1] = b;
  digest[2] = c;
  digest[3] = d;
}

/** Adds one number. */
export function addNumber(digest: Digest, value: number): void {
  const lane = value & 3;
  digest[lane] = Math.imul(digest[lane]! ^ value, PRIME);
  digest[lane ^ 1] = Math.imul(digest[lane ^ 1]! ^ digest[lane]!, PRIME);
}

/** The digest in 32 bits. */
export function foldDigest(digest: Digest): number {
  let x = digest[0]! ^ 0;
  for (let lane = 1; lane < 4; lane++) x = Math.imul(x ^ (x >>> 16), PRIME) ^ digest[lane]!;
  return x | 0;
}

/** The digest as 32 hexadecimal digits. */
export function digestText(digest: Digest): string {
  return [...digest].map((lane) => (lane >>> 0).toString(16).padStart(8, "0")).join("");
}

/** Checksum of bytes of any length: a control frame's payload. */
export function checksumBytes(bytes: Uint8Array): number {
  const digest = newDigest();
  const whole = new Uint8Array(Math.ceil(bytes.length / 16) * 16);
  whole.set(bytes);
  addWords(digest, new Int32Array(whole.buffer), 0, whole.length / 4);
  addNumber(digest, bytes.length);
  return foldDigest(digest);
}

/** Are all words of the page at index `at` zero? */
export function isZeroPage(words: Int32Array, at: number): boolean {
  // Most pages that are not zero show it at once.
  if (words[at] !== 0) return false;
  for (let i = at, end = at + 1024; i < end; i += 8) {
    const any = words[i]! | words[i + 1]! | words[i + 2]! | words[i + 3]! | words[i + 4]! | words[i + 5]! | words[i + 6]! | words[i + 7]!;
    if (any !== 0) return false;
  }
  return true;
}
