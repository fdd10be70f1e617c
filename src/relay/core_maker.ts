/**
 * Chooses and makes relay cores for one thread.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import type { TranslatedRegion } from "../iova/translation.ts";
import type { MappedRange } from "../memory/region.ts";
import type { CoreChoice, DataPath, RelayCore } from "./core.ts";
import { FastCore, isFast } from "./fast_core.ts";
import { JsCore } from "./js_core.ts";
import type { QueueStart } from "./messages.ts";
import { WasmCore } from "./wasm_core.ts";
import { type WasmBuild, WasmHost } from "./wasm_host.ts";

/** What the WebAssembly core has not, of what a queue needs; undefined when it has all. */
function notInWasm({ iommu, capture }: QueueStart): string | undefined {
  if (capture !== undefined) return "its frames are captured in JavaScript";
  if (iommu === true) return "a guest with an IOMMU is relayed in JavaScript";
  return undefined;
}

/** Makes the cores of one thread's queues. */
export class CoreMaker {
  /** Why the last core is not WebAssembly; undefined when it is, or was not wanted. */
  reason: string | undefined;
  readonly #path: DataPath;
  readonly #choice: CoreChoice;
  readonly #build: WasmBuild | undefined;
  #host: WasmHost | undefined;
  /** Why there is no host. */
  #unusable: string | undefined;
  #ranges: readonly MappedRange[] = [];
  #moved: readonly TranslatedRegion[] | undefined;
  #log = { address: 0, size: 0 };

  /** @param choice what is asked for @param path shared by all queues of the thread @param build another module, for tests */
  constructor(choice: CoreChoice, path: DataPath, build?: WasmBuild) {
    this.#build = build;
    this.#choice = choice;
    this.#path = path;
  }

  /** Guest memory has changed: `path` has it already. @param moved where the device finds it, when not everywhere IOVA = GPA */
  setMemory(ranges: readonly MappedRange[], moved?: readonly TranslatedRegion[]): void {
    this.#ranges = ranges;
    this.#moved = moved;
    this.#host?.setMemory(ranges, moved);
  }

  /** The dirty log is elsewhere: `path` has it already. @param size bytes; 0: none */
  setLog(address: number, size: number): void {
    this.#log = { address, size };
    this.#host?.setLog(address, size);
  }

  // Made for the first queue: a relay in passthrough needs none.
  #ensureHost(): WasmHost | undefined {
    if (this.#choice === "js" || this.#unusable !== undefined) return undefined;
    if (this.#host !== undefined) return this.#host;
    try {
      const host = new WasmHost(this.#path, this.#build);
      host.setMemory(this.#ranges, this.#moved);
      host.setLog(this.#log.address, this.#log.size);
      return this.#host = host;
    } catch (error) {
      // Too little address space, no shared WebAssembly memory, a kernel or a memory that opens no windows.
      this.#unusable = error instanceof Error ? error.message : String(error);
      return undefined;
    }
  }

  /**
   * A core for `start`: JavaScript where WebAssembly cannot run this queue; {@linkcode CoreMaker.reason} says why.
   *
   * @throws VringError, SvqError when the guest's ring cannot be used
   */
  make(start: QueueStart, counters: Float64Array): RelayCore {
    const missing = notInWasm(start);
    const host = missing === undefined ? this.#ensureHost() : undefined;
    this.reason = this.#choice === "js" ? undefined : missing ?? this.#unusable;
    if (host !== undefined) {
      try {
        return new WasmCore(start, host, this.#path, counters);
      } catch (error) {
        if (!(error instanceof SvqError) || (error.code !== "WASM_UNUSABLE" && error.code !== "WASM_MEMORY_FULL")) throw error;
        this.reason = error.message;
      }
    }
    return isFast(start) ? new FastCore(start, this.#path, counters) : new JsCore(start, this.#path, counters);
  }
}
