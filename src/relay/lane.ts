/**
 * A mutex for asynchronous steps.
 *
 * @module
 */

/** Runs jobs one after the other, in the order in which they were given. */
export class Lane {
  #last: Promise<unknown> = Promise.resolve();

  /** Runs `job` when all jobs before it have settled; its result or error is the caller's. */
  run<T>(job: () => Promise<T>): Promise<T> {
    const result = this.#last.then(job, job);
    this.#last = result.catch(() => {});
    return result;
  }

  /** Resolves when everything given so far has settled. */
  async idle(): Promise<void> {
    await this.#last;
  }
}
