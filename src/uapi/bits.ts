/**
 * Feature words and the names of their bits.
 *
 * @module
 */

/** The word with only bit `number` set. */
export function bit(number: number): bigint {
  return 1n << BigInt(number);
}

/** Is bit `number` set in `word`? */
export function hasBit(word: bigint, number: number): boolean {
  return ((word >> BigInt(number)) & 1n) === 1n;
}

/** The word with the bits of `numbers` set. */
export function bitsOf(numbers: Iterable<number>): bigint {
  let word = 0n;
  for (const number of numbers) word |= bit(number);
  return word;
}

/**
 * The names of the bits set in `word`, lowest first; `bit_47` for one without a name.
 *
 * @param names name to bit number
 */
export function bitNames(word: bigint, names: Readonly<Record<string, number>>): string[] {
  const byNumber = new Map(Object.entries(names).map(([name, number]) => [number, name]));
  const found: string[] = [];
  for (let number = 0; word >> BigInt(number) !== 0n; number++) {
    if (hasBit(word, number)) found.push(byNumber.get(number) ?? `bit_${number}`);
  }
  return found;
}
