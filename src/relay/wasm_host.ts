/**
 * What the WebAssembly relay cores of one thread share: the module's instance over a memory with windows, guest memory as the
 * module sees it, and the dirty log.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { boundsChecked, createMemfd, mapFd, WindowMemory } from "../ffi/mod.ts";
import type { TranslatedRegion } from "../iova/translation.ts";
import type { MappedRange } from "../memory/region.ts";
import { VRING_NUM_MAX } from "../vring/layout.ts";
import { RELAY_CORE } from "../wasm/relay_core.ts";
import type { DataPath } from "./core.ts";
import { ENTRY_BYTES, ENV, ENV_BYTES, type RelayExports } from "./wasm_layout.ts";

/** So much guest memory is shown by windows at most, bytes: beyond it, only rings are, and indirect tables are read by the host. */
const WINDOW_BUDGET = 3 * 2 ** 30;
const MAX_REGIONS = 1024;
const SCRATCH_BYTES = VRING_NUM_MAX * ENTRY_BYTES;
const TABLE_BYTES = VRING_NUM_MAX * 16;

interface RegionWindow extends MappedRange {
  /** Offset in the memory; 0: no window. */
  offset: number;
}

/** Another build of the module than the one that is carried, and what it imports besides. */
export interface WasmBuild {
  /** The module. */
  module: WebAssembly.Module;
  /** Its own imports. */
  imports: Readonly<Record<string, WebAssembly.ModuleImports>>;
}

let compiled: WebAssembly.Module | undefined;

/** One instance and its memory; for one thread. */
export class WasmHost {
  /** The module's functions. */
  readonly exports: RelayExports;
  /** Its memory. */
  readonly windows: WindowMemory;
  /** Where the environment lies. */
  readonly env: number;
  readonly #path: DataPath;
  readonly #words: Int32Array;
  readonly #wide: BigUint64Array;
  readonly #regionsAt: number;
  readonly #spansAt: number;
  #regions: RegionWindow[] = [];
  #log: { address: number; size: number; offset: number } | undefined;
  readonly #table: Uint32Array;

  /**
   * Instantiates, and tries whether windows work here.
   *
   * @throws SvqError WASM_UNUSABLE
   */
  constructor(path: DataPath, build?: WasmBuild) {
    this.#path = path;
    this.windows = new WindowMemory();
    if (!this.windows.guarded && !boundsChecked()) {
      throw new SvqError("WASM_UNUSABLE", "V8 does not check bounds, and behind its memory is no room for a guard page");
    }
    // The module's own data, of which there is next to none, lies in the first page.
    const bytes = ENV_BYTES + 2 * MAX_REGIONS * ENTRY_BYTES + 2 * SCRATCH_BYTES + TABLE_BYTES;
    this.env = this.windows.alloc(bytes);
    this.#regionsAt = this.env + ENV_BYTES;
    this.#spansAt = this.#regionsAt + MAX_REGIONS * ENTRY_BYTES;
    const scratch = this.#spansAt + MAX_REGIONS * ENTRY_BYTES;
    const { memory } = this.windows;
    this.#words = new Int32Array(memory.buffer, this.env, bytes / 4);
    this.#wide = new BigUint64Array(memory.buffer, this.env, bytes / 8);
    this.#table = new Uint32Array(memory.buffer, scratch + 2 * SCRATCH_BYTES, TABLE_BYTES / 4);
    this.#words[ENV.regions] = this.#regionsAt;
    this.#words[ENV.spans] = this.#spansAt;
    this.#words[ENV.identity] = 1;
    this.#words[ENV.scratch] = scratch;
    this.#words[ENV.moved] = scratch + SCRATCH_BYTES;
    this.#words[ENV.table] = scratch + 2 * SCRATCH_BYTES;
    const host = {
      readTable: (address: number, size: number) => this.#path.memory.readWords(address, this.#table, size >>> 2) ? 1 : 0,
      mark: (address: number, length: number) => this.#path.dirty?.markRange(address, length >>> 0) === false ? 0 : 1,
    };
    const module = build?.module ?? (compiled ??= new WebAssembly.Module(Uint8Array.fromBase64(RELAY_CORE)));
    const imports = { ...build?.imports, env: { memory }, host };
    this.exports = new WebAssembly.Instance(module, imports).exports as unknown as RelayExports;
    this.#test();
  }

  // Writes through one mapping, reads through the other, both ways.
  #test(): void {
    using fd = createMemfd("svq-self-test", 4096);
    using mapping = mapFd(fd.fd, { length: 4096 });
    const offset = this.windows.map(mapping.address, mapping.length);
    if (offset === undefined) throw new SvqError("WASM_UNUSABLE", "the kernel opens no window into shared memory");
    const words = new Int32Array(mapping.buffer());
    this.exports.poke(offset + 4, 0x5a5a_0001);
    Atomics.store(words, 2, 0x2a5a_0002);
    const works = Atomics.load(words, 1) === 0x5a5a_0001 && this.exports.peek(offset + 8) === 0x2a5a_0002;
    this.windows.release(offset, mapping.length);
    if (!works) throw new SvqError("WASM_UNUSABLE", "what is written through a window does not appear behind it");
    if (this.exports.peek(offset + 8) !== 0) throw new SvqError("WASM_UNUSABLE", "a window does not close");
  }

  /** Guest memory has changed: windows open on new regions, and close on those that are gone. */
  setMemory(ranges: readonly MappedRange[], moved?: readonly TranslatedRegion[]): void {
    const sorted = [...ranges].sort((a, b) => a.gpa - b.gpa);
    if (sorted.length > MAX_REGIONS || (moved?.length ?? 0) > MAX_REGIONS) {
      throw new SvqError("WASM_MEMORY_FULL", `The WebAssembly core takes at most ${MAX_REGIONS} memory regions`);
    }
    const same = (a: MappedRange, b: MappedRange) => a.gpa === b.gpa && a.size === b.size && a.address === b.address;
    for (const old of this.#regions) {
      if (old.offset !== 0 && !sorted.some((range) => same(old, range))) this.windows.release(old.offset, old.size);
    }
    const kept = this.#regions.filter((old) => sorted.some((range) => same(old, range)));
    let budget = kept.reduce((left, region) => region.offset === 0 ? left : left - region.size, WINDOW_BUDGET);
    this.#regions = sorted.map((range) => {
      const old = kept.find((region) => same(region, range));
      if (old !== undefined && (old.offset !== 0 || range.size > budget)) return old;
      const offset = range.size > budget ? 0 : this.windows.map(range.address, range.size) ?? 0;
      if (offset !== 0) budget -= range.size;
      return { ...range, offset };
    });
    this.#regions.forEach(({ gpa, size, offset }, index) => {
      const word = (this.#regionsAt - this.env + index * ENTRY_BYTES) / 8;
      this.#wide[word] = BigInt(gpa);
      this.#wide[word + 1] = BigInt(gpa + size);
      this.#wide[word + 2] = BigInt(offset);
    });
    this.#words[ENV.regionCount] = this.#regions.length;
    for (const field of [ENV.lastFirst, ENV.lastEnd, ENV.otherFirst, ENV.otherEnd]) this.#wide[field / 2] = 0n;
    this.#words[ENV.identity] = moved === undefined ? 1 : 0;
    this.#words[ENV.spanCount] = this.#writeSpans(moved ?? []);
  }

  // Neighbours that stay neighbours are one span: a segment across them stays one piece.
  #writeSpans(moved: readonly TranslatedRegion[]): number {
    const spans: { gpa: number; iova: number; size: number }[] = [];
    for (const { gpa, iova, size } of moved.toSorted((a, b) => a.gpa - b.gpa)) {
      const last = spans.at(-1);
      if (last !== undefined && last.gpa + last.size === gpa && last.iova + last.size === iova) last.size += size;
      else spans.push({ gpa, iova, size });
    }
    spans.forEach(({ gpa, iova, size }, index) => {
      const word = (this.#spansAt - this.env + index * ENTRY_BYTES) / 8;
      this.#wide[word] = BigInt(gpa);
      this.#wide[word + 1] = BigInt(gpa + size);
      this.#wide[word + 2] = BigInt.asUintN(64, BigInt(iova - gpa));
    });
    return spans.length;
  }

  /** The dirty log is elsewhere. @param size bytes; 0: none */
  setLog(address: number, size: number): void {
    const offset = size === 0 || address % 4 !== 0 ? 0 : this.windows.map(address, size) ?? 0;
    if (this.#log !== undefined && this.#log.offset !== 0) this.windows.release(this.#log.offset, this.#log.size);
    this.#log = size === 0 ? undefined : { address, size, offset };
    this.#words[ENV.log] = offset;
    this.#words[ENV.logMode] = size === 0 ? 0 : offset === 0 ? 2 : 1;
    this.#wide[ENV.logPages / 2] = BigInt(Math.floor(size / 4) * 32);
  }

  /** Where guest memory is shown: an offset in the memory, or undefined where no window holds all of it. */
  find(gpa: number, length: number): number | undefined {
    const region = this.#regions.find((one) => gpa >= one.gpa && gpa + length <= one.gpa + one.size);
    return region === undefined || region.offset === 0 ? undefined : region.offset + (gpa - region.gpa);
  }
}
