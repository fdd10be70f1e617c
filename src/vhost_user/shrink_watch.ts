/**
 * Notices that a front-end has cut off memory that it had given: src/ffi/bus_guard.ts keeps the process alive with pages of zeros,
 * and here the connection whose files they were is found and ended.
 *
 * @module
 */
import type { SvqError } from "../errors.ts";
import { dupFd, onBusFault, type OwnedFd } from "../ffi/mod.ts";
import type { LogRegion } from "../vhost/backend.ts";
import { requireStillThere, type ServerMemory } from "./server_memory.ts";

/** Watches one connection's memory and dirty log. */
export class ShrinkWatch implements Disposable {
  readonly #memory: ServerMemory;
  readonly #faults: Disposable;
  #log: { file: OwnedFd; offset: number; size: number } | undefined;
  /** What was cut off. */
  error: SvqError | undefined;

  /** @param end ends the connection; `error` says why */
  constructor(memory: ServerMemory, end: () => void) {
    this.#memory = memory;
    this.#faults = onBusFault(() => {
      if (this.error === undefined && this.#look()) end();
    });
  }

  #look(): boolean {
    try {
      this.#memory.requireWhole();
      if (this.#log !== undefined) requireStillThere(this.#log.file.fd, this.#log.offset, this.#log.size, "Dirty log");
      return false;
    } catch (error) {
      this.error = error as SvqError;
      return true;
    }
  }

  /** The dirty log in use from now on. */
  setLog({ fd, offset, size }: LogRegion): void {
    const file = dupFd(fd);
    this.#log?.file.close();
    this.#log = { file, offset, size };
  }

  /** Watches no longer. */
  [Symbol.dispose](): void {
    this.#faults[Symbol.dispose]();
    this.#log?.file.close();
    this.#log = undefined;
  }
}
