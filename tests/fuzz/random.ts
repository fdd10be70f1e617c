/**
 * Random numbers that a seed and the number of a round determine.
 *
 * @module
 */

/** One round's source of random numbers (32-bit words of splitmix). */
export class Random {
  #state: number;

  constructor(seed: number, round = 0) {
    this.#state = Math.imul(seed, 0x9e3779b1) ^ Math.imul(round + 1, 0x85ebca77);
    this.word();
    this.word();
  }

  /** 32 random bits, unsigned. */
  word(): number {
    this.#state = (this.#state + 0x9e3779b9) | 0;
    let z = this.#state;
    z = Math.imul(z ^ (z >>> 16), 0x21f0aaad);
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
    return (z ^ (z >>> 15)) >>> 0;
  }

  /** A whole number below `limit`. */
  below(limit: number): number {
    return Math.floor(this.word() / 2 ** 32 * limit);
  }

  /** True once in `n` times. */
  once(n: number): boolean {
    return this.below(n) === 0;
  }

  /** One of `items`. */
  pick<T>(items: readonly T[]): T {
    return items[this.below(items.length)]!;
  }

  /** 64 bits that programs find hard: small ones, edges, powers of two, and anything. */
  u64(): bigint {
    switch (this.below(6)) {
      case 0:
        return BigInt(this.below(64));
      case 1:
        return 2n ** BigInt(this.below(64));
      case 2:
        return (2n ** BigInt(1 + this.below(63)) - BigInt(1 + this.below(4096))) & 0xffff_ffff_ffff_ffffn;
      case 3:
        return 0xffff_ffff_ffff_ffffn - BigInt(this.below(8192));
      case 4:
        return BigInt(this.word());
      default:
        return BigInt(this.word()) << 32n | BigInt(this.word());
    }
  }

  /** The same in 32 bits. */
  u32(): number {
    return Number(this.u64() & 0xffff_ffffn);
  }

  /** Bytes. */
  bytes(length: number): Uint8Array<ArrayBuffer> {
    return Uint8Array.from({ length }, () => this.word());
  }

  /** `bytes` with a few of them changed: flipped bits, edges, copied pieces, cut off or drawn out. */
  mangle(bytes: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> {
    let result = bytes.slice();
    for (let times = 1 + this.below(4); times > 0; times--) {
      if (result.length === 0) result = this.bytes(1 + this.below(16));
      const at = this.below(result.length);
      switch (this.below(6)) {
        case 0:
          result[at]! ^= 1 << this.below(8);
          break;
        case 1:
          result[at] = this.pick([0, 1, 0x7f, 0x80, 0xff, this.word()]);
          break;
        case 2: {
          const value = new Uint8Array(BigUint64Array.of(this.u64()).buffer).subarray(0, this.pick([2, 4, 8]));
          result.set(value.subarray(0, result.length - at), at);
          break;
        }
        case 3:
          result = result.slice(0, at);
          break;
        case 4:
          result = new Uint8Array([...result.subarray(0, at), ...this.bytes(1 + this.below(16)), ...result.subarray(at)]);
          break;
        default:
          result.copyWithin(at, this.below(result.length), this.below(result.length));
      }
    }
    return result;
  }
}
