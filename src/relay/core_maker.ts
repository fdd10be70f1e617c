/**
 * Chooses and makes relay cores for one thread.
 *
 * @module
 */
import type { MappedRange } from "../memory/region.ts";
import type { DataPath, RelayCore } from "./core.ts";
import { JsCore } from "./js_core.ts";
import type { QueueStart } from "./messages.ts";

/** What is asked for; `auto` is the fastest that runs here. */
export type CoreChoice = "auto" | "wasm" | "js";

/** Makes the cores of one thread's queues. */
export class CoreMaker implements Disposable {
  /** Why the last core is not the one that was asked for; undefined when it is. */
  reason: string | undefined;
  readonly #path: DataPath;

  /** @param choice what is asked for; @param path shared by all queues of the thread */
  constructor(choice: CoreChoice, path: DataPath) {
    this.#path = path;
    if (choice === "wasm") this.reason = "there is none";
  }

  /** Guest memory has changed. */
  setMemory(_ranges: readonly MappedRange[]): void {}

  /** The dirty log is elsewhere. @param size bytes; 0: none */
  setLog(_address: number, _size: number): void {}

  /** A core for `start`. @throws VringError, SvqError when the guest's ring cannot be used */
  make(start: QueueStart, counters: Float64Array): RelayCore {
    return new JsCore(start, this.#path, counters);
  }

  /** Gives up what is held; no core may be used any more. */
  [Symbol.dispose](): void {}
}
