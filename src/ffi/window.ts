/**
 * A WebAssembly memory, pages of which can be exchanged for shared memory of this process: what one side writes the other
 * reads, without copies and without calls.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { guardMemory, unguardMemory } from "./bus_guard.ts";
import { bufferAt, libc, pointer } from "./libc.ts";
import { MAP, PAGE_SIZE, PROT } from "./mapping.ts";

const WASM_PAGE = 65536;
const MAX_PAGES = 65536;
const HUGE = 2 ** 21;
const MREMAP_MAYMOVE = 1;
const MREMAP_FIXED = 2;
const MADV_POPULATE_READ = 22;
const MEMORY_BYTES = MAX_PAGES * WASM_PAGE;
const FIXED_NOREPLACE = 0x10_0000;
const EMPTY = MAP.PRIVATE | MAP.ANONYMOUS | MAP.NORESERVE;
const ATTEMPTS = 4;

/** Bytes behind the 4 GiB of a memory that no module's access gets past: more than the largest static offset and the widest access. */
export const GUARD_BYTES = WASM_PAGE;

/** A range of the memory, bytes. */
interface Extent {
  start: number;
  size: number;
}

function alignUp(value: number, align: number): number {
  return Math.ceil(value / align) * align;
}

function baseOf(memory: WebAssembly.Memory): number {
  return Number(Deno.UnsafePointer.value(Deno.UnsafePointer.of(new Uint8Array(memory.buffer))));
}

function unmap(address: number, size: number): void {
  if (size > 0) libc().munmap(pointer(address), BigInt(size));
}

// Inaccessible pages at `address`. @returns false when something else lies there
function putGuard(address: number): boolean {
  const result = Number(Deno.UnsafePointer.value(
    libc().mmap(pointer(address), BigInt(GUARD_BYTES), PROT.NONE, EMPTY | FIXED_NOREPLACE, -1, 0n),
  ));
  // Kernels before 4.17 take the address as a wish.
  if (result !== address && result > 0 && result < 2 ** 52) unmap(result, GUARD_BYTES);
  return result === address;
}

// The kernel puts mappings right below one another: so a place for memory and guard is reserved, and the memory's part given back.
function guardAbove(): number | undefined {
  const size = MEMORY_BYTES + 2 * WASM_PAGE + GUARD_BYTES;
  const start = Number(Deno.UnsafePointer.value(libc().mmap(null, BigInt(size), PROT.NONE, EMPTY, -1, 0n)));
  if (!(start > 0 && start < 2 ** 52)) return undefined;
  const guard = Math.floor((start + size - GUARD_BYTES) / WASM_PAGE) * WASM_PAGE;
  unmap(start, guard - start);
  unmap(guard + GUARD_BYTES, start + size - guard - GUARD_BYTES);
  return guard;
}

const unused = new FinalizationRegistry((guard: number) => unmap(guard, GUARD_BYTES));

function guardedMemory(): { memory: WebAssembly.Memory; base: number; guarded: boolean } {
  // Those that got a place without room behind it keep it until the search is over.
  const misplaced: WebAssembly.Memory[] = [];
  for (;;) {
    const guard = guardAbove();
    const memory = new WebAssembly.Memory({ initial: 1, maximum: MAX_PAGES, shared: true });
    // Growing never moves a shared memory: the address space of its maximum is reserved.
    const base = baseOf(memory);
    const end = base + MEMORY_BYTES;
    let guarded = guard === end;
    if (!guarded) {
      if (guard !== undefined) unmap(guard, GUARD_BYTES);
      guarded = putGuard(end);
    }
    if (guarded) unused.register(memory, end);
    if (guarded || misplaced.push(memory) === ATTEMPTS) return { memory, base, guarded };
  }
}

/** (module (import "" "" (memory 1 2 shared)) (func (export "l") (param i32) (result i32) (i32.load (local.get 0)))) */
const LOAD = "AGFzbQEAAAABBgFgAX8BfwIHAQAAAgMBAgMCAQAHBQEBbAAACgkBBwAgACgCAAs=";
let checked: boolean | undefined;

/**
 * Does V8 compare every address of WebAssembly with the memory's size? Not when it was started with --no-wasm-bounds-checks. Found
 * out by a read behind the end of a memory, where a page was put for it.
 */
export function boundsChecked(): boolean {
  if (checked !== undefined) return checked;
  const memory = new WebAssembly.Memory({ initial: 1, maximum: 2, shared: true });
  const second = baseOf(memory) + WASM_PAGE;
  const put = (protection: number) => libc().mmap(pointer(second), BigInt(WASM_PAGE), protection, EMPTY | MAP.FIXED, -1, 0n);
  const { exports } = new WebAssembly.Instance(new WebAssembly.Module(Uint8Array.fromBase64(LOAD)), { "": { "": memory } });
  put(PROT.READ);
  try {
    (exports.l as (at: number) => number)(WASM_PAGE);
    checked = false;
  } catch {
    checked = true;
  }
  put(PROT.NONE);
  return checked;
}

/** The memory of one thread's WebAssembly instance, with an allocator of whole WebAssembly pages. */
export class WindowMemory {
  /** What the instance imports. */
  readonly memory: WebAssembly.Memory;
  /** Nothing lies behind it, as far as an access can get: what V8 does not check ends the process and touches nothing. */
  readonly guarded: boolean;
  readonly #base: number;
  #free: Extent[] = [];

  /** @throws RangeError when there is no address space for it */
  constructor() {
    const { memory, base, guarded } = guardedMemory();
    this.memory = memory;
    this.guarded = guarded;
    this.#base = base;
  }

  /** Bytes of the memory now. */
  get size(): number {
    return this.memory.buffer.byteLength;
  }

  /** Takes `size` bytes, zeroed, at an offset that is a multiple of 65536. @throws SvqError WASM_MEMORY_FULL */
  alloc(size: number): number {
    const start = this.#take(alignUp(size, WASM_PAGE), (candidate) => candidate);
    if (start < 0) throw new SvqError("WASM_MEMORY_FULL", `The WebAssembly memory has no room for ${size} bytes`);
    return start;
  }

  // First fit; otherwise the memory grows.
  #take(size: number, place: (start: number) => number): number {
    for (const [index, extent] of this.#free.entries()) {
      const start = place(extent.start);
      if (start + size > extent.start + extent.size) continue;
      const rest = { start: start + size, size: extent.start + extent.size - start - size };
      this.#free.splice(
        index,
        1,
        ...[{ start: extent.start, size: start - extent.start }, rest].filter((part) => part.size > 0),
      );
      return start;
    }
    const end = this.size;
    const start = place(end);
    const grow = start + size - end;
    if (end + grow > MAX_PAGES * WASM_PAGE) return -1;
    try {
      this.memory.grow(grow / WASM_PAGE);
    } catch {
      return -1;
    }
    if (start > end) this.#free.push({ start: end, size: start - end });
    return start;
  }

  /** Gives back what `alloc` or `map` gave: the pages are the memory's own again, and zero. */
  release(start: number, size: number): void {
    const extent = { start: Math.floor(start / WASM_PAGE) * WASM_PAGE, size: 0 };
    extent.size = alignUp(start + size, WASM_PAGE) - extent.start;
    unguardMemory(this.#base + extent.start);
    this.#own(extent);
    this.#free.push(extent);
    this.#free.sort((a, b) => a.start - b.start);
    for (let i = 1; i < this.#free.length;) {
      const [low, high] = [this.#free[i - 1]!, this.#free[i]!];
      if (low.start + low.size !== high.start) {
        i++;
        continue;
      }
      low.size += high.size;
      this.#free.splice(i, 1);
    }
  }

  #own({ start, size }: Extent): void {
    const flags = MAP.PRIVATE | MAP.ANONYMOUS | MAP.NORESERVE | MAP.FIXED;
    const result = libc().mmap(pointer(this.#base + start), BigInt(size), PROT.READ | PROT.WRITE, flags, -1, 0n);
    if (Deno.UnsafePointer.value(result) !== BigInt(this.#base + start)) {
      throw new SvqError("WASM_MEMORY_FULL", "A window could not be closed");
    }
  }

  /**
   * Opens a window on `[address, address + length)` of this process, which must be mapped shared: the pages appear in the
   * memory as well. They stay, even when the first mapping goes, until `release` is called with the same arguments as the
   * result and the length.
   *
   * @returns the offset of the first byte; undefined where the kernel or the address space says no
   */
  map(address: number, length: number): number | undefined {
    const slack = address % PAGE_SIZE;
    const from = address - slack;
    const size = alignUp(slack + length, PAGE_SIZE);
    // Huge pages of hugetlbfs can be mapped at places alike modulo their size only.
    const huge = size >= HUGE && from % HUGE === 0 && size % HUGE === 0;
    const place = (start: number) => huge ? alignUp(this.#base + start, HUGE) - this.#base : start;
    const start = this.#base % WASM_PAGE === 0 || !huge ? this.#take(alignUp(size, WASM_PAGE), place) : -1;
    if (start < 0) return undefined;
    // An old size of 0 leaves the first mapping where it is, and makes a second one of the same pages.
    const result = libc().mremap(pointer(from), 0n, BigInt(size), MREMAP_MAYMOVE | MREMAP_FIXED, pointer(this.#base + start));
    if (Deno.UnsafePointer.value(result) !== BigInt(this.#base + start)) {
      this.release(start, size);
      return undefined;
    }
    guardMemory(this.#base + start, size);
    return start + slack;
  }

  /** Has the kernel fill in the page tables of a window at once, which is cheaper than a fault for each few pages. A hint. */
  populate(start: number, length: number): void {
    const slack = start % PAGE_SIZE;
    libc().madvise(pointer(this.#base + start - slack), BigInt(slack + length), MADV_POPULATE_READ);
  }

  /** Where an offset of the memory lies in this process, bytes. */
  address(start: number): number {
    return this.#base + start;
  }

  /** The address in this process of an offset of the memory, for the self-test. */
  bytes(start: number, length: number): Uint8Array<ArrayBuffer> {
    return new Uint8Array(bufferAt(this.#base + start, length));
  }
}
