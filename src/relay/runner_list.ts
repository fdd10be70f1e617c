/**
 * Queues of a Worker in the order in which they came: what a Set does, but nothing is allocated when queues come and go at each
 * wake-up.
 *
 * @module
 */

/** A set of queues, known by their index, in order. */
export class RunnerList<T extends { readonly index: number }> {
  readonly #items: (T | undefined)[] = [];
  #size = 0;
  /** By index of a queue: 1 for those that are in. */
  #in = new Uint8Array(64);

  /** How many there are. */
  get size(): number {
    return this.#size;
  }

  /** The one at `place`, counted from 0. It stays there until one before it leaves. */
  at(place: number): T | undefined {
    return place < this.#size ? this.#items[place] : undefined;
  }

  /** Puts a queue at the end; one that is in stays where it is. */
  add(item: T): void {
    const { index } = item;
    if (index >= this.#in.length) {
      const wider = new Uint8Array(index * 2);
      wider.set(this.#in);
      this.#in = wider;
    }
    if (this.#in[index] === 1) return;
    this.#in[index] = 1;
    this.#items[this.#size++] = item;
  }

  /** Takes a queue out; those behind it move up. */
  delete(item: T): void {
    if (this.#in[item.index] !== 1) return;
    let place = 0;
    while (place < this.#size && this.#items[place] !== item) place++;
    // Another one of the same index is in.
    if (place === this.#size) return;
    this.#in[item.index] = 0;
    this.#size--;
    for (; place < this.#size; place++) this.#items[place] = this.#items[place + 1];
    this.#items[place] = undefined;
  }
}
