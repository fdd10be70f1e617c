/**
 * The record of what is in flight for the WebAssembly core: begun and ended here, kept by src/wasm/assembly/inflight.ts through
 * a window.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import type { WindowMemory } from "../ffi/mod.ts";
import type { InflightLog } from "../vring/inflight.ts";

/** Bytes of private memory that a queue of `num` needs for it. */
export function inflightBytes(num: number): number {
  return 5 * 2 * num;
}

/** Fields of a queue that {@linkcode openInflightWindow} sets. */
export type InflightField =
  | "inflightAt"
  | "inflightBatch"
  | "inflightUsed"
  | "inflightNext"
  | "entryOf"
  | "entryNext"
  | "entryCount"
  | "entryFree"
  | "entryFreeCount";

/** @throws SvqError WASM_UNUSABLE when no window opens on the region at `address` */
export function openInflightWindow(windows: WindowMemory, { address, size }: { address: number; size: number }): number {
  const offset = windows.map(address, size);
  if (offset === undefined) throw new SvqError("WASM_UNUSABLE", "no window opens on the in-flight region");
  if (offset % 8 === 0) return offset;
  windows.release(offset, size);
  throw new SvqError("WASM_UNUSABLE", "the in-flight region lies at an odd place of its file");
}

/**
 * Goes on with `log`'s record in the module.
 *
 * @param window the region in the memory @param at {@linkcode inflightBytes} of the memory, for the module
 * @param set sets a field of the queue @returns the number of the next chain
 */
export function takeOverInflight(
  { memory }: WindowMemory,
  log: InflightLog,
  place: { window: number; at: number; num: number },
  set: (field: InflightField, value: number) => void,
): number {
  const { window, at, num } = place;
  const { counter, used, entries } = log.stand();
  const array = (index: number) => at + index * 2 * num;
  set("inflightAt", window);
  set("inflightUsed", used);
  set("inflightNext", used);
  set("inflightBatch", array(0));
  if (entries === undefined) return counter;
  const { free, freeCount, entryOf, nextOf, countOf } = entries;
  const arrays = [["entryOf", entryOf], ["entryNext", nextOf], ["entryCount", countOf], ["entryFree", free]] as const;
  arrays.forEach(([field, values], index) => {
    new Uint16Array(memory.buffer, array(index + 1), num).set(values);
    set(field, array(index + 1));
  });
  set("entryFreeCount", freeCount);
  return counter;
}
