/**
 * A meeting point of asynchronous steps.
 *
 * @module
 */

/** Holds those who arrive until everybody has come, or has said that they will not. */
export class Gate {
  #missing: number;
  readonly #open = Promise.withResolvers<void>();

  /** A gate that is shut. @param count how many will {@linkcode Gate.pass} or {@linkcode Gate.skip}, each exactly one of them once */
  constructor(count: number) {
    this.#missing = count;
    if (count === 0) this.#open.resolve();
  }

  /** Arrives, and resolves when all have. */
  async pass(): Promise<void> {
    this.skip();
    await this.opened;
  }

  /** Resolves when all have come: for those who are not counted. */
  get opened(): Promise<void> {
    return this.#open.promise;
  }

  /** Is not coming: the others wait no longer for this one. */
  skip(): void {
    if (--this.#missing === 0) this.#open.resolve();
  }
}
