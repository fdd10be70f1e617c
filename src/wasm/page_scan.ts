/**
 * The checksum of a migration's pages with 128-bit operations, as a WebAssembly module that is put together here, instruction by
 * instruction. src/migration/digest.ts says what it computes.
 *
 * @module
 */

const I32 = 0x7f;
const V128 = 0x7b;
const SIMD = 0xfd;
const PRIME = 0x01000193;

/** Lanes of a digest. */
export const DIGEST_LANES = 16;
const LANE_BYTES = DIGEST_LANES * 4;

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

// digest(state, from, to): state has 16 lanes of 32 bits in four vectors; to - from is a positive multiple of 64.
function digestBody(): number[] {
  const [state, from, to, prime] = [0, 1, 2, 7];
  const vectors = [3, 4, 5, 6];
  const step = vectors.flatMap((vector, i) => [
    ...get(vector),
    ...get(from),
    ...load(16 * i),
    ...xor,
    ...get(prime),
    ...multiply,
    ...tee(vector),
    ...get(vector),
    ...constant(15),
    ...shiftRight,
    ...xor,
    ...set(vector),
  ]);
  const code = [
    ...constant(PRIME),
    ...splat,
    ...set(prime),
    ...vectors.flatMap((vector, i) => [...get(state), ...load(16 * i), ...set(vector)]),
    ...[0x03, 0x40], // loop
    ...step,
    ...get(from),
    ...constant(LANE_BYTES),
    0x6a, // i32.add
    ...tee(from),
    ...get(to),
    0x49, // i32.lt_u
    ...[0x0d, 0x00], // br_if to the loop
    0x0b, // end
    ...vectors.flatMap((vector, i) => [...get(state), ...get(vector), ...store(16 * i)]),
    0x0b,
  ];
  const body = [...list([[5, V128]]), ...code];
  return [...unsigned(body.length), ...body];
}

function moduleBytes(): Uint8Array<ArrayBuffer> {
  return new Uint8Array([
    ...[0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00],
    ...section(1, list([[0x60, ...list([[I32], [I32], [I32]]), 0x00]])),
    ...section(2, list([[...text("svq"), ...text("memory"), 0x02, 0x00, 0x01]])),
    ...section(3, list([[0x00]])),
    ...section(7, list([[...text("digest"), 0x00, 0x00]])),
    ...section(10, list([digestBody()])),
  ]);
}

const WASM_PAGE = 65536;
let compiled: WebAssembly.Module | undefined;

/** Memory to put pages into, and their checksum. */
export class PageScan {
  /** The memory; pages begin at {@linkcode pagesOffset}. It never moves. */
  readonly buffer: ArrayBuffer;
  /** Where pages begin, bytes. */
  readonly pagesOffset: number = WASM_PAGE;
  readonly #state: Int32Array;
  readonly #digest: (state: number, from: number, to: number) => void;

  /** Makes the room. @param bytes for pages */
  constructor(bytes: number) {
    const memory = new WebAssembly.Memory({ initial: 1 + Math.ceil(bytes / WASM_PAGE) });
    compiled ??= new WebAssembly.Module(moduleBytes());
    const { exports } = new WebAssembly.Instance(compiled, { svq: { memory } });
    this.buffer = memory.buffer as ArrayBuffer;
    this.#state = new Int32Array(this.buffer, 0, DIGEST_LANES);
    this.#digest = exports.digest as (state: number, from: number, to: number) => void;
  }

  /** Adds `bytes` (a positive multiple of 64) from `offset` behind {@linkcode pagesOffset} to a digest of 16 lanes. */
  add(digest: Int32Array, offset: number, bytes: number): void {
    const from = this.pagesOffset + offset;
    if (!(bytes > 0 && bytes % LANE_BYTES === 0 && offset >= 0 && from + bytes <= this.buffer.byteLength)) {
      throw new RangeError(`No digest of ${bytes} bytes at ${offset}`);
    }
    this.#state.set(digest);
    this.#digest(0, from, from + bytes);
    digest.set(this.#state);
  }
}
