/**
 * Small repeatable random numbers: xorshift32. For workloads, not for secrets.
 *
 * @module
 */

/** A generator whose whole state is one 32-bit word. */
export class Random {
  /** The state, never 0: store it to go on elsewhere. */
  state: number;

  /** Starts from any number. */
  constructor(seed: number) {
    this.state = mix(seed, 0x5eed) | 1;
  }

  /** 32 random bits, not negative. */
  next(): number {
    let x = this.state;
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    this.state = x | 0;
    return x >>> 0;
  }

  /** A whole number from 0 up to, and without, `limit`. */
  below(limit: number): number {
    return Math.floor(this.next() / 2 ** 32 * limit);
  }
}

/** Two words mixed into 32 bits that look random, as an int32. */
export function mix(a: number, b: number): number {
  let x = Math.imul(a ^ 0x9e3779b9, 0x85ebca6b) ^ Math.imul(b ^ 0x7f4a7c15, 0xc2b2ae35);
  x ^= x >>> 15;
  x = Math.imul(x, 0x2c1b3c6d);
  x ^= x >>> 12;
  return x | 0;
}
