import assert from "node:assert/strict";
import fc from "fast-check";
import { resumableUsedIndex } from "../../src/relay/ring_evidence.ts";

/** A split ring with a driver that reuses descriptors at once, and a device that takes one of the `reach` oldest each time. */
class Ring {
  readonly avail: Uint16Array;
  readonly used: Uint32Array;
  readonly outstanding: number[] = [];
  #free: number[];
  #offered = 0;
  #returned = 0;
  /** Heads in the order in which they were offered, all of them. */
  readonly history: number[] = [];
  readonly done: number[] = [];

  constructor(readonly num: number) {
    this.avail = new Uint16Array(2 + num);
    this.used = new Uint32Array(1 + 2 * num);
    this.#free = Array.from({ length: num }, (_, i) => i);
  }

  offer(): void {
    const head = this.#free.pop();
    if (head === undefined) return;
    this.avail[2 + this.#offered % this.num] = head;
    this.history.push(this.#offered);
    this.outstanding.push(this.#offered);
    this.#headOf.set(this.#offered++, head);
    this.avail[1] = this.#offered;
  }

  readonly #headOf = new Map<number, number>();

  complete(place: number): void {
    const [position] = this.outstanding.splice(place % this.outstanding.length, 1);
    if (position === undefined) return;
    const head = this.#headOf.get(position)!;
    this.used[1 + 2 * (this.#returned % this.num)] = head;
    this.#returned++;
    this.used[0] = (this.#returned & 0xffff) << 16;
    this.#free.push(head);
  }

  get resumable(): number | undefined {
    return resumableUsedIndex({ avail: this.avail, used: this.used, num: this.num });
  }

  /** Is what is outstanding exactly the newest of what was offered? */
  get isTail(): boolean {
    return this.outstanding.every((position, i) => position === this.#returned + i);
  }

  get returned(): number {
    return this.#returned & 0xffff;
  }
}

function run(num: number, depth: number, reach: number, steps: readonly number[]): Ring {
  const ring = new Ring(num);
  for (const step of steps) {
    while (ring.outstanding.length < depth) ring.offer();
    ring.complete(step % reach);
  }
  return ring;
}

const STEPS = fc.array(fc.nat(1000), { minLength: 1, maxLength: 400 });

Deno.test("a device that works in order can be followed from the used index, however much is outstanding", () => {
  fc.assert(
    fc.property(fc.constantFrom(16, 64, 256), fc.integer({ min: 1, max: 256 }), STEPS, (num, depth, steps) => {
      const ring = run(num, Math.min(depth, num), 1, steps);
      assert.equal(ring.resumable, ring.returned);
    }),
    { numRuns: 150 },
  );
});

Deno.test("where the used index is given although the device works out of order, what is outstanding is what was offered last", () => {
  let given = 0;
  fc.assert(
    fc.property(fc.integer({ min: 2, max: 32 }), fc.integer({ min: 2, max: 8 }), STEPS, (depth, reach, steps) => {
      const ring = run(128, depth, reach, steps);
      const index = ring.resumable;
      if (index === undefined) return;
      if (ring.outstanding.length > 0) given++;
      assert.equal(index, ring.returned);
      assert.equal(ring.isTail, true);
    }),
    { numRuns: 300, seed: 5 },
  );
  assert.ok(given > 0, "the property was put to the test");
});

Deno.test("after a request was overtaken and is still outstanding nothing is given", () => {
  const ring = new Ring(64);
  for (let i = 0; i < 40; i++) {
    ring.offer();
    ring.complete(0);
  }
  ring.offer();
  ring.offer();
  ring.complete(1);
  assert.equal(ring.isTail, false);
  assert.equal(ring.resumable, undefined);
});

Deno.test("an index that jumped by more than the ring holds is no evidence", () => {
  const avail = new Uint16Array(2 + 16);
  avail[1] = 40;
  assert.equal(resumableUsedIndex({ avail, used: new Uint32Array(33), num: 16 }), undefined);
});
