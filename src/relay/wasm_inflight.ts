/**
 * The record of what is in flight for the WebAssembly core: begun and ended here, kept by src/wasm/assembly/inflight.ts through
 * a window.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import type { WindowMemory } from "../ffi/mod.ts";
import type { InflightLog } from "../vring/inflight.ts";
import type { WasmQueue } from "./wasm_queue.ts";

/** @throws SvqError WASM_UNUSABLE when no window opens on the region at `address` */
export function openInflightWindow(windows: WindowMemory, { address, size }: { address: number; size: number }): number {
  const offset = windows.map(address, size);
  if (offset === undefined) throw new SvqError("WASM_UNUSABLE", "no window opens on the in-flight region");
  if (offset % 8 === 0) return offset;
  windows.release(offset, size);
  throw new SvqError("WASM_UNUSABLE", "the in-flight region lies at an odd place of its file");
}

/** Goes on with `log`'s record in the module. @param window the region in the memory */
export function takeOverInflight(queue: WasmQueue, log: InflightLog, window: number): void {
  const { counter, used, entries } = log.stand();
  queue.inflightCounter = counter;
  queue.set("inflightAt", window);
  queue.set("inflightUsed", used);
  queue.set("inflightNext", used);
  if (entries === undefined) return;
  queue.halves("entryOf").set(entries.entryOf);
  queue.halves("entryNext").set(entries.nextOf);
  queue.halves("entryCount").set(entries.countOf);
  queue.halves("entryFree").set(entries.free);
  queue.set("entryFreeCount", entries.freeCount);
}
