/**
 * Holds a loop that waits for input: between two inputs, with nothing taken and nothing lost, so that another process can go
 * on with the same socket, or the loop itself later.
 *
 * @module
 */
import { ReactorCancelled } from "../ffi/reactor.ts";

const AGAIN_MS = 10;

/** One loop, or several of which one waits at a time. */
export class Hold {
  #release: PromiseWithResolvers<void> | undefined;
  #parked = Promise.withResolvers<void>();
  #interrupt: (() => void) | undefined;

  /** Is it to be held? */
  get wanted(): boolean {
    return this.#release !== undefined;
  }

  /** Resolves when the loop has stopped between two inputs. */
  hold(): Promise<void> {
    if (this.#release === undefined) {
      this.#release = Promise.withResolvers();
      this.#interrupt?.();
      // Where the wait had just ended with nothing, it has begun anew.
      const timer = setInterval(() => this.#interrupt?.(), AGAIN_MS);
      const end = () => clearInterval(timer);
      Promise.race([this.#parked.promise, this.#release.promise]).then(end, end);
    }
    return this.#parked.promise;
  }

  /** The loop goes on. */
  release(): void {
    const release = this.#release;
    if (release === undefined) return;
    this.#release = undefined;
    this.#parked = Promise.withResolvers();
    release.resolve();
  }

  /**
   * Waits for the next input, unless the loop is held.
   *
   * @param next waits, and takes nothing if it rejects with ReactorCancelled
   * @param interrupt ends the wait of `next`, if it waits between two inputs
   */
  async wait<T>(next: () => Promise<T>, interrupt: () => void): Promise<T> {
    for (;;) {
      if (this.#release !== undefined) {
        const { promise } = this.#release;
        this.#parked.resolve();
        await promise;
        continue;
      }
      this.#interrupt = interrupt;
      try {
        return await next();
      } catch (error) {
        if (!(this.wanted && error instanceof ReactorCancelled)) throw error;
      } finally {
        this.#interrupt = undefined;
      }
    }
  }
}
