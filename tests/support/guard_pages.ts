/**
 * Pages that nobody may touch around every mapping of this process, and around every window of a WebAssembly memory: whoever
 * writes or reads past an end dies at once (SIGSEGV; in the relay core a trap) instead of meeting other memory. Import it before
 * anything calls libc.
 *
 * @module
 */
import { type Libc, LIBC_HOOK, pointer } from "../../src/ffi/libc.ts";
import { MAP, PAGE_SIZE } from "../../src/ffi/mapping.ts";
import { WindowMemory } from "../../src/ffi/window.ts";
import { hookWorkers } from "./libc_hook.ts";

const WASM_PAGE = 65536;
const RESERVE = MAP.PRIVATE | MAP.ANONYMOUS | MAP.NORESERVE;
let plain: Libc;

const number = (at: Deno.PointerValue): number => Number(Deno.UnsafePointer.value(at));

function guarded(functions: Libc): Libc {
  plain = functions;
  const sizes = new Map<number, number>();
  return {
    ...functions,
    mmap: (at, length, prot, flags, fd, offset) => {
      if ((flags & MAP.FIXED) !== 0) return functions.mmap(at, length, prot, flags, fd, offset);
      const size = Math.ceil(Number(length) / PAGE_SIZE) * PAGE_SIZE;
      const whole = functions.mmap(null, BigInt(size + 2 * PAGE_SIZE), 0, RESERVE, -1, 0n);
      const base = number(whole);
      if (base === -1 || base > 2 ** 52) return whole;
      const inner = functions.mmap(pointer(base + PAGE_SIZE), length, prot, flags | MAP.FIXED, fd, offset);
      if (number(inner) !== base + PAGE_SIZE) {
        functions.munmap(whole, BigInt(size + 2 * PAGE_SIZE));
        return inner;
      }
      sizes.set(base + PAGE_SIZE, size + 2 * PAGE_SIZE);
      return inner;
    },
    munmap: (at, length) => {
      const size = sizes.get(number(at));
      if (size === undefined) return functions.munmap(at, length);
      sizes.delete(number(at));
      return functions.munmap(pointer(number(at) - PAGE_SIZE), BigInt(size));
    },
  };
}

(globalThis as Record<symbol, unknown>)[LIBC_HOOK] = guarded;
hookWorkers(import.meta.url);

function guardWindows(): void {
  const { map, release } = WindowMemory.prototype;
  const guards = new Map<string, number[]>();
  const key = (start: number, size: number) => `${start}+${size}`;
  const guard = (memory: WindowMemory): number => {
    const start = memory.alloc(WASM_PAGE);
    const at = Number(Deno.UnsafePointer.value(Deno.UnsafePointer.of(memory.bytes(start, 1))));
    plain.mmap(pointer(at), BigInt(WASM_PAGE), 0, RESERVE | MAP.FIXED, -1, 0n);
    return start;
  };
  WindowMemory.prototype.map = function (address, length) {
    const low = guard(this);
    const start = map.call(this, address, length);
    if (start === undefined) release.call(this, low, WASM_PAGE);
    else guards.set(key(start, length), [low, guard(this)]);
    return start;
  };
  WindowMemory.prototype.release = function (start, size) {
    release.call(this, start, size);
    for (const at of guards.get(key(start, size)) ?? []) release.call(this, at, WASM_PAGE);
    guards.delete(key(start, size));
  };
}

guardWindows();
