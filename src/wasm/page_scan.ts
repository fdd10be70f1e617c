/**
 * What a migration does to each page, with 128-bit operations, as a WebAssembly module that is put together here, instruction by
 * instruction: tell zero pages from others, copy the others, add them to a checksum. src/migration/digest.ts says what that is.
 *
 * @module
 */

const I32 = 0x7f;
const V128 = 0x7b;
const SIMD = 0xfd;
const PRIME = 0x01000193;

/** Lanes of a digest. */
export const DIGEST_LANES = 32;
const LANE_BYTES = DIGEST_LANES * 4;
const VECTORS = LANE_BYTES / 16;
const PAGE_BYTES = 4096;

function unsigned(value: number): number[] {
  const bytes: number[] = [];
  do {
    bytes.push((value & 0x7f) | (value > 0x7f ? 0x80 : 0));
    value >>>= 7;
  } while (value > 0);
  return bytes;
}

function signed(value: number): number[] {
  const bytes: number[] = [];
  for (;;) {
    const low = value & 0x7f;
    value >>= 7;
    const done = (value === 0 && (low & 0x40) === 0) || (value === -1 && (low & 0x40) !== 0);
    bytes.push(done ? low : low | 0x80);
    if (done) return bytes;
  }
}

const list = (items: readonly number[][]) => [...unsigned(items.length), ...items.flat()];
const section = (id: number, body: readonly number[]) => [id, ...unsigned(body.length), ...body];
const text = (value: string) => list([...new TextEncoder().encode(value)].map((byte) => [byte]));

const get = (local: number) => [0x20, local];
const set = (local: number) => [0x21, local];
const tee = (local: number) => [0x22, local];
const constant = (value: number) => [0x41, ...signed(value)];
const simd = (operation: number, ...rest: number[]) => [SIMD, ...unsigned(operation), ...rest];
const load = (offset: number) => simd(0, 4, ...unsigned(offset));
const store = (offset: number) => simd(11, 4, ...unsigned(offset));
const splat = simd(17);
const xor = simd(81);
const shiftRight = simd(173);
const multiply = simd(181);
const or = simd(80);
const anyTrue = simd(83);
const [loop, block, end] = [[0x03, 0x40], [0x02, 0x40], [0x0b]];
const branch = (depth: number) => [0x0c, depth];
const branchIf = (depth: number) => [0x0d, depth];
const add = [0x6a];
const below = [0x49];
const indices = [...Array(VECTORS).keys()];

const bump = (local: number, by: number) => [...get(local), ...constant(by), ...add, ...tee(local)];
const broadcastPrime = (prime: number) => [...constant(PRIME), ...splat, ...set(prime)];
const loadState = (state: number, vectors: readonly number[]) =>
  vectors.flatMap((vector, i) => [...get(state), ...load(16 * i), ...set(vector)]);
const storeState = (state: number, vectors: readonly number[]) =>
  vectors.flatMap((vector, i) => [...get(state), ...get(vector), ...store(16 * i)]);
// One step of a lane; the words are on the stack.
const step = (vector: number, prime: number) => [
  ...[...get(vector), ...xor, ...get(prime), ...multiply, ...tee(vector)],
  ...[...get(vector), ...constant(15), ...shiftRight, ...xor, ...set(vector)],
];
const sized = (locals: readonly number[][], code: readonly number[]) => {
  const body = [...list(locals), ...code, ...end];
  return [...unsigned(body.length), ...body];
};

// digest(state, from, to): to - from is a positive multiple of the lanes' bytes.
function digestBody(): number[] {
  const [state, from, to, prime] = [0, 1, 2, 3];
  const vectors = indices.map((i) => 4 + i);
  return sized([[1 + VECTORS, V128]], [
    ...broadcastPrime(prime),
    ...loadState(state, vectors),
    ...loop,
    ...vectors.flatMap((vector, i) => [...get(from), ...load(16 * i), ...step(vector, prime)]),
    ...[...bump(from, LANE_BYTES), ...get(to), ...below, ...branchIf(0)],
    ...end,
    ...storeState(state, vectors),
  ]);
}

// pack(state, from, to, out, list): looks at the pages from `from` to `to`; those that are not zero are copied to `out`, one behind
// the other, and added to the digest, and their indices go to `list`. Returns how many.
function packBody(): number[] {
  const [state, from, to, out, list, count, index, at, stop, word, prime] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
  const vectors = indices.map((i) => 11 + i);
  const zeroTest = [
    ...loop,
    ...indices.flatMap((i) => [...get(at), ...load(16 * i), ...(i === 0 ? [] : or)]),
    ...anyTrue,
    // Out of the loop and of the block behind which pages are copied.
    ...branchIf(1),
    ...[...bump(at, LANE_BYTES), ...get(stop), ...below, ...branchIf(0)],
    ...end,
  ];
  const copy = [
    ...[...get(from), ...set(at)],
    ...loop,
    ...vectors.flatMap((vector, i) => [
      ...[...get(at), ...load(16 * i), ...set(word)],
      ...[...get(out), ...get(word), ...store(16 * i)],
      ...[...get(word), ...step(vector, prime)],
    ]),
    ...[...get(out), ...constant(LANE_BYTES), ...add, ...set(out)],
    ...[...bump(at, LANE_BYTES), ...get(stop), ...below, ...branchIf(0)],
    ...end,
    ...[...get(list), ...get(count), ...constant(2), 0x74, ...add, ...get(index), 0x36, 2, 0],
    ...[...get(count), ...constant(1), ...add, ...set(count)],
  ];
  return sized([[4, I32], [2 + VECTORS, V128]], [
    ...broadcastPrime(prime),
    ...loadState(state, vectors),
    ...loop,
    ...[...get(from), ...tee(at), ...constant(PAGE_BYTES), ...add, ...set(stop)],
    ...block,
    ...block,
    ...zeroTest,
    ...branch(1),
    ...end,
    ...copy,
    ...end,
    ...[...get(index), ...constant(1), ...add, ...set(index)],
    ...[...get(stop), ...tee(from), ...get(to), ...below, ...branchIf(0)],
    ...end,
    ...storeState(state, vectors),
    ...get(count),
  ]);
}

const MAX_PAGES = 65536;

function moduleBytes(): Uint8Array<ArrayBuffer> {
  const i32s = (count: number) => list(Array.from({ length: count }, () => [I32]));
  return new Uint8Array([
    ...[0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00],
    ...section(1, list([[0x60, ...i32s(3), 0x00], [0x60, ...i32s(5), ...i32s(1)]])),
    // Shared memory, whose pages can be exchanged for windows.
    ...section(2, list([[...text("svq"), ...text("memory"), 0x02, 0x03, 0x01, ...unsigned(MAX_PAGES)]])),
    ...section(3, list([[0x00], [0x01]])),
    ...section(7, list([[...text("digest"), 0x00, 0x00], [...text("pack"), 0x00, 0x01]])),
    ...section(10, list([digestBody(), packBody()])),
  ]);
}

let compiled: WebAssembly.Module | undefined;

/** Most pages that {@linkcode PageScan.pack} takes at a time. */
export const MAX_PACK_PAGES = 256;
/** Bytes that a {@linkcode PageScan} needs for itself. */
export const SCAN_BYTES: number = LANE_BYTES + MAX_PACK_PAGES * 4;

/** Looks at pages in a memory. Everything is an offset in it, bytes. */
export class PageScan {
  /** Which pages {@linkcode pack} found not to be zero, by their place in what it looked at. */
  readonly found: Int32Array;
  readonly #memory: WebAssembly.Memory;
  readonly #at: number;
  readonly #state: Int32Array;
  readonly #digest: (state: number, from: number, to: number) => void;
  readonly #pack: (state: number, from: number, to: number, out: number, list: number) => number;

  /** @param memory shared, of at most 65536 pages @param at where SCAN_BYTES are its own, a multiple of 16 */
  constructor(memory: WebAssembly.Memory, at: number) {
    this.#memory = memory;
    this.#at = at;
    compiled ??= new WebAssembly.Module(moduleBytes());
    const { exports } = new WebAssembly.Instance(compiled, { svq: { memory } });
    this.#state = new Int32Array(memory.buffer, at, DIGEST_LANES);
    this.found = new Int32Array(memory.buffer, at + LANE_BYTES, MAX_PACK_PAGES);
    this.#digest = exports.digest as (state: number, from: number, to: number) => void;
    this.#pack = exports.pack as (state: number, from: number, to: number, out: number, list: number) => number;
  }

  #check(from: number, bytes: number, unit: number): void {
    if (!(bytes > 0 && bytes % unit === 0 && from >= 0 && from + bytes <= this.#memory.buffer.byteLength)) {
      throw new RangeError(`No digest of ${bytes} bytes at ${from}`);
    }
  }

  /** Adds `bytes` (a positive multiple of 128) to a digest of 32 lanes. */
  add(digest: Int32Array, from: number, bytes: number): void {
    this.#check(from, bytes, LANE_BYTES);
    this.#state.set(digest);
    this.#digest(this.#at, from, from + bytes);
    digest.set(this.#state);
  }

  /**
   * Copies those of `pages` pages at `from` that are not zero to `out`, one behind the other, and adds them to a digest: the
   * checksum is that of the copy, whoever writes the pages meanwhile.
   *
   * @param pages at most 256
   * @returns how many; {@linkcode found} says which
   */
  pack(digest: Int32Array, from: number, pages: number, out: number): number {
    this.#check(from, pages * PAGE_BYTES, PAGE_BYTES);
    this.#check(out, pages * PAGE_BYTES, PAGE_BYTES);
    if (pages > MAX_PACK_PAGES) throw new RangeError(`More than ${MAX_PACK_PAGES} pages at a time`);
    this.#state.set(digest);
    const count = this.#pack(this.#at, from, from + pages * PAGE_BYTES, out, this.#at + LANE_BYTES);
    digest.set(this.#state);
    return count;
  }
}
