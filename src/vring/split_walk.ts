/**
 * Reads one descriptor chain of a split ring (virtio 1.3, 2.7.5), each value once, and checks it: what {@linkcode SplitDevice}
 * and the relay's fast path have in common.
 *
 * @module
 */
import { appendBuffer, beginChain, bufferAddress, endChain } from "./chain_builder.ts";
import { IndirectReader } from "./indirect.ts";
import { DESC_BYTES, type RingPart, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, words32 } from "./layout.ts";
import type { Chain, RingMemory } from "./queue.ts";
import { VringError, type VringRule } from "./rules.ts";

/** What a {@linkcode SplitWalker} reads. */
export interface SplitWalkerOptions {
  /** Queue size, a power of two. */
  num: number;
  /** Descriptor table, 16 * num bytes, aligned to 4 at least in its buffer. */
  desc: RingPart;
  /** INDIRECT_DESC was negotiated. */
  indirect: boolean;
  /** Guest memory: bounds of every buffer, and indirect tables. Without it no bounds are checked and no tables are read. */
  memory?: RingMemory;
  /** Longest chain taken, in segments; default the larger of num and 1024. A `Chain` of less capacity lowers it. */
  maxChain?: number;
}

/** The descriptor table of a split ring, as its device reads it. */
export class SplitWalker {
  readonly #num: number;
  readonly #desc: Uint32Array;
  readonly #indirect: boolean;
  readonly #memory: RingMemory | undefined;
  readonly #tables: IndirectReader;
  readonly #maxChain: number;

  /** @throws VringError RING_ALIGNMENT */
  constructor(options: SplitWalkerOptions) {
    this.#num = options.num;
    this.#desc = words32("descriptor table", options.desc, DESC_BYTES * options.num, 4);
    this.#indirect = options.indirect;
    this.#memory = options.memory;
    this.#maxChain = options.maxChain ?? Math.max(options.num, 1024);
    this.#tables = new IndirectReader(options.memory, this.#maxChain);
  }

  /** Reads the chain at `head`, a descriptor of the table, into `chain`; its `id` is left alone. @throws VringError */
  walk(head: number, chain: Chain): void {
    const limit = Math.min(this.#maxChain, chain.capacity);
    let table = this.#desc;
    let size = this.#num;
    let index = head;
    let steps = 0;
    let slots = 0;
    beginChain(chain);
    for (;;) {
      const word = index << 2;
      const length = table[word + 2]!;
      const last = table[word + 3]!;
      if (++steps > size) fail("CHAIN_LOOP", head, `The chain at ${head} has more descriptors than its table`);
      const address = bufferAddress(head, index, table[word]!, table[word + 1]!, length);
      if ((last & VRING_DESC_F_INDIRECT) !== 0) {
        if (!this.#indirect) fail("INDIRECT_NOT_NEGOTIATED", index, `Descriptor ${index} of chain ${head} is indirect`);
        if (chain.indirectAddress >= 0) fail("INDIRECT_NESTED", index, `Entry ${index} in the table of chain ${head} is indirect`);
        if ((last & VRING_DESC_F_NEXT) !== 0) fail("INDIRECT_WITH_NEXT", index, `Indirect descriptor ${index} of chain ${head} goes on`);
        size = this.#tables.read(head, address, length, limit);
        table = this.#tables.words;
        chain.indirectAddress = address;
        chain.indirectLength = length;
        slots = steps;
        steps = 0;
        index = 0;
        continue;
      }
      appendBuffer(chain, this.#memory, limit, head, index, address, length, last);
      if ((last & VRING_DESC_F_NEXT) === 0) break;
      index = last >>> 16;
      if (index >= size) fail("NEXT_OUT_OF_RANGE", index, `The chain at ${head} goes on at ${index} in a table of ${size}`);
    }
    endChain(chain, head);
    chain.slots = chain.indirectAddress < 0 ? steps : slots;
  }
}

/** An avail entry names no descriptor. @throws VringError HEAD_OUT_OF_RANGE */
export function headOutOfRange(position: number, head: number, num: number): never {
  fail("HEAD_OUT_OF_RANGE", position, `Avail entry ${position} holds ${head} in a queue of ${num}`);
}

/** An avail entry names a chain that was not given back. @throws VringError HEAD_IN_FLIGHT */
export function headInFlight(position: number, head: number): never {
  fail("HEAD_IN_FLIGHT", head, `Avail entry ${position} holds descriptor ${head}, which is in flight`);
}

/** The avail index is further ahead than the queue is long. @throws VringError AVAIL_INDEX_JUMP */
export function availIndexJump(idx: number, reached: number, num: number): never {
  fail("AVAIL_INDEX_JUMP", idx, `The avail index is ${idx} where ${reached} was reached, with a queue of ${num}`);
}

function fail(rule: VringRule, index: number, detail: string): never {
  throw new VringError(rule, index, detail);
}
