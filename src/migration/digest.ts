/**
 * Checksums of pages: thirty-two lanes of 32 bits, each step of which can be undone, so that one changed word always shows. They
 * find mistakes and damage, not forgery. src/wasm/page_scan.ts computes the same, faster.
 *
 * @module
 */

const PRIME = 0x01000193;
const LANES = 32;
const SEED = 0x2545f491;

/** A running digest. */
export type Digest = Int32Array<ArrayBuffer>;

/** A digest of nothing. */
export function newDigest(): Digest {
  return Int32Array.from({ length: LANES }, (_, lane) => Math.imul(SEED, 2 * lane + 1));
}

/** Adds `count` words (a multiple of 32) from index `at`. */
export function addWords(digest: Digest, words: Int32Array, at: number, count: number): void {
  const end = at + count;
  // Four lanes at a time: as many as there are registers for.
  for (let first = 0; first < LANES; first += 4) {
    let [a, b, c, d] = [digest[first]!, digest[first + 1]!, digest[first + 2]!, digest[first + 3]!];
    for (let i = at + first; i < end; i += LANES) {
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
    digest[first] = a;
    digest[first + 1] = b;
    digest[first + 2] = c;
    digest[first + 3] = d;
  }
}

/** Adds one number. */
export function addNumber(digest: Digest, value: number): void {
  const lane = value & (LANES - 1);
  digest[lane] = Math.imul(digest[lane]! ^ value, PRIME);
  digest[lane ^ 1] = Math.imul(digest[lane ^ 1]! ^ digest[lane]!, PRIME);
}

/** Adds number and length of runs of pages. */
export function addRuns(digest: Digest, runs: readonly { page: number; count: number }[]): void {
  for (const { page, count } of runs) {
    addNumber(digest, page | 0);
    addNumber(digest, count);
  }
}

/** The digest in 32 bits. */
export function foldDigest(digest: Digest): number {
  let x = digest[0]! ^ 0;
  for (let lane = 1; lane < LANES; lane++) x = Math.imul(x ^ (x >>> 16), PRIME) ^ digest[lane]!;
  return x | 0;
}

/** The digest as hexadecimal digits, 8 for each lane. */
export function digestText(digest: Digest): string {
  return [...digest].map((lane) => (lane >>> 0).toString(16).padStart(8, "0")).join("");
}

/** Checksum of bytes of any length: a control frame's payload. */
export function checksumBytes(bytes: Uint8Array): number {
  const digest = newDigest();
  const whole = new Uint8Array(Math.ceil(bytes.length / 128) * 128);
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
