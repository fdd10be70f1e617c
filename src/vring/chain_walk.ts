/**
 * Follows one descriptor chain through a copied ring, noting what is wrong with it instead of stopping at the first fault.
 *
 * @module
 */
import { DESC_BYTES, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE } from "./layout.ts";
import type { RingView } from "./inspect.ts";
import { type Anomaly, anomaly, type VringRule } from "./rules.ts";
import type { MemoryRange } from "./snapshot.ts";

/** One buffer of a chain. */
export interface WalkedSegment {
  /** As the descriptor names it, bytes; exact below 2^53. */
  address: number;
  /** Bytes. */
  length: number;
  /** The device writes it. */
  writable: boolean;
}

/** A chain as far as it could be followed. */
export interface WalkedChain {
  /** Split: the head; packed: the buffer id of its last descriptor. */
  id: number;
  /** Its descriptors in the ring, in order. */
  descriptors: number[];
  /** Its buffers, those of an indirect table included. */
  segments: WalkedSegment[];
  /** Bytes that the device may read. */
  readableBytes: number;
  /** Bytes that the device may write. */
  writableBytes: number;
  /** Its indirect table, if it has one; `entries` is 0 when the table was not copied. */
  indirect: { address: number; length: number; entries: number } | null;
  /** What is wrong. */
  problems: Anomaly[];
}

/** How {@linkcode walkChain} walks a packed list. */
export interface WalkOptions {
  /** Packed: wrap counter of the lap in which the list starts. */
  wrap: number;
  /** Packed: most slots that the list can have. */
  room: number;
}

const LIMIT = 2 ** 52;
const SPLIT_FLAGS = VRING_DESC_F_NEXT | VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT;
const PACKED_FLAGS = SPLIT_FLAGS | 0x8080;

/** Do the ranges, sorted by address, hold all of `[address, address + length)`? */
export function rangesContain(ranges: readonly MemoryRange[], address: number, length: number): boolean {
  let at = address;
  for (const range of ranges) {
    if (at < range.address) return false;
    if (at >= range.address + range.size) continue;
    at = range.address + range.size;
    if (address + length <= at) return true;
  }
  return false;
}

class Walk {
  readonly chain: WalkedChain;
  #faults = new Set<VringRule>();

  constructor(readonly view: RingView, readonly start: number, readonly name: string) {
    this.chain = { id: start, descriptors: [], segments: [], readableBytes: 0, writableBytes: 0, indirect: null, problems: [] };
  }

  /** Notes each rule once per chain. */
  note(rule: VringRule, index: number, detail: string): void {
    if (this.#faults.has(rule)) return;
    this.#faults.add(rule);
    this.chain.problems.push(anomaly(rule, index, detail));
  }

  /** One buffer. @param index of the descriptor in its table */
  buffer(index: number, address: number, length: number, flags: number): void {
    const { chain, view, name } = this;
    const writable = (flags & VRING_DESC_F_WRITE) !== 0;
    if (length === 0) this.note("DESCRIPTOR_EMPTY", index, `Descriptor ${index} of ${name} has no bytes`);
    this.place(index, address, length, `Descriptor ${index}`);
    if (!writable && chain.writableBytes > 0) {
      this.note("READABLE_AFTER_WRITABLE", index, `Descriptor ${index} of ${name} is readable behind a writable one`);
    }
    chain.segments.push({ address, length, writable });
    if (writable) chain.writableBytes += length;
    else chain.readableBytes += length;
    if (chain.segments.length === view.maxChain + 1) {
      this.note("CHAIN_TOO_LONG", this.start, `${name} has more than ${view.maxChain} segments`);
    }
  }

  /** Checks where a buffer or table lies. @returns whether it is all right */
  place(index: number, address: number, length: number, what: string): boolean {
    const { memory } = this.view.snapshot;
    if (address + length > LIMIT) {
      this.note("ADDRESS_LIMIT", index, `${what} of ${this.name} ends above 2^52`);
      return false;
    }
    if (memory !== undefined && length > 0 && !rangesContain(memory, address, length)) {
      this.note("OUTSIDE_MEMORY", index, `${what} of ${this.name}, 0x${address.toString(16)}+${length}, is not in memory`);
      return false;
    }
    return true;
  }

  /** An indirect table; its words, or undefined when it cannot be followed. */
  table(index: number, address: number, length: number, more: boolean): Uint32Array<ArrayBuffer> | undefined {
    const { view, name, chain } = this;
    if (!view.snapshot.indirect) this.note("INDIRECT_NOT_NEGOTIATED", index, `Descriptor ${index} of ${name} is indirect`);
    if (more) this.note("INDIRECT_WITH_NEXT", index, `Indirect descriptor ${index} of ${name} has a next one`);
    chain.indirect = { address, length, entries: 0 };
    if (length === 0 || length % DESC_BYTES !== 0) {
      this.note("INDIRECT_SIZE", index, `The indirect table of ${name} has ${length} bytes`);
      return undefined;
    }
    if (length / DESC_BYTES > view.maxChain) {
      this.note("INDIRECT_TOO_LONG", index, `The indirect table of ${name} has ${length / DESC_BYTES} descriptors`);
      return undefined;
    }
    if (!this.place(index, address, length, "The indirect table")) return undefined;
    const copy = view.snapshot.tables.find((table) => table.address === address && table.bytes.length >= length);
    if (copy === undefined) return undefined;
    chain.indirect.entries = length / DESC_BYTES;
    return new Uint32Array(copy.bytes.slice(0, length).buffer);
  }

  finish(): WalkedChain {
    const { chain } = this;
    const bytes = chain.readableBytes + chain.writableBytes;
    if (bytes > 2 ** 32) this.note("CHAIN_BYTES", this.start, `${this.name} has ${bytes} bytes`);
    return chain;
  }
}

/**
 * Follows the chain that starts at descriptor `start`.
 *
 * @param start below the queue size
 * @param options needed for packed rings only
 */
export function walkChain(view: RingView, start: number, options: WalkOptions = { wrap: 1, room: 0 }): WalkedChain {
  return view.layout === "split" ? walkSplit(view, start) : walkPacked(view, start, options);
}

function walkSplit(view: RingView, head: number): WalkedChain {
  const walk = new Walk(view, head, `chain ${head}`);
  let words: Uint32Array<ArrayBuffer> = view.words;
  let size = view.num;
  let index = head;
  for (let steps = 0;; steps++) {
    if (steps === size) {
      walk.note("CHAIN_LOOP", head, `Chain ${head} has more descriptors than its table`);
      break;
    }
    const inTable = walk.chain.indirect !== null;
    const address = words[index * 4 + 1]! * 2 ** 32 + words[index * 4]!;
    const length = words[index * 4 + 2]!;
    const flags = words[index * 4 + 3]! & 0xffff;
    const next = words[index * 4 + 3]! >>> 16;
    if (!inTable) walk.chain.descriptors.push(index);
    if ((flags & ~SPLIT_FLAGS) !== 0) {
      walk.note("DESCRIPTOR_FLAGS", index, `Descriptor ${index} of chain ${head} has flags 0x${flags.toString(16)}`);
    }
    const more = (flags & VRING_DESC_F_NEXT) !== 0;
    if ((flags & VRING_DESC_F_INDIRECT) !== 0 && inTable) {
      walk.note("INDIRECT_NESTED", index, `Entry ${index} in the table of chain ${head} is indirect`);
      break;
    }
    if ((flags & VRING_DESC_F_INDIRECT) !== 0) {
      const table = walk.table(index, address, length, more);
      if (table === undefined) break;
      words = table;
      size = table.length / 4;
      index = 0;
      steps = -1;
      continue;
    }
    walk.buffer(index, address, length, flags);
    if (!more) break;
    if (next >= size) {
      walk.note("NEXT_OUT_OF_RANGE", index, `Descriptor ${index} of chain ${head} goes on at ${next} in a table of ${size}`);
      break;
    }
    if (view.snapshot.inOrder && !inTable && next !== (index + 1) % view.num) {
      walk.note("IN_ORDER_NEXT", index, `Descriptor ${index} of chain ${head} goes on at ${next}`);
    }
    index = next;
  }
  return walk.finish();
}

function walkPacked(view: RingView, start: number, { wrap: firstWrap, room }: WalkOptions): WalkedChain {
  const walk = new Walk(view, start, `the chain in slot ${start}`);
  let slot = start;
  let wrap = firstWrap;
  for (let slots = 1;; slots++) {
    const flags = view.flagsOf(slot);
    if (!view.isAvailable(slot, wrap)) {
      walk.note("PACKED_LIST_BROKEN", slot, `The chain in slot ${start} needs slot ${slot}, which is not available`);
      break;
    }
    walk.chain.descriptors.push(slot);
    walk.chain.id = view.idOf(slot);
    if ((flags & ~PACKED_FLAGS) !== 0) {
      walk.note("DESCRIPTOR_FLAGS", slot, `The descriptor in slot ${slot} has flags 0x${flags.toString(16)}`);
    }
    const address = view.words[slot * 4 + 1]! * 2 ** 32 + view.words[slot * 4]!;
    const length = view.words[slot * 4 + 2]!;
    const more = (flags & VRING_DESC_F_NEXT) !== 0;
    if ((flags & VRING_DESC_F_INDIRECT) !== 0) {
      if (slots > 1) walk.note("PACKED_INDIRECT_MIXED", slot, `The chain in slot ${start} goes on in an indirect table, in slot ${slot}`);
      walkPackedTable(walk, walk.table(slot, address, length, more));
    } else {
      walk.buffer(slot, address, length, flags);
    }
    if (!more) break;
    if (slots >= room) {
      const next = (slot + 1) % view.num;
      if (slots >= view.num) walk.note("CHAIN_LOOP", start, `The chain in slot ${start} goes round the whole ring`);
      else walk.note("PACKED_LIST_BROKEN", next, `The chain in slot ${start} needs slot ${next}, which was not made available`);
      break;
    }
    if (++slot === view.num) {
      slot = 0;
      wrap ^= 1;
    }
  }
  return walk.finish();
}

function walkPackedTable(walk: Walk, words: Uint32Array<ArrayBuffer> | undefined): void {
  for (let index = 0; words !== undefined && index < words.length / 4; index++) {
    const flags = words[index * 4 + 3]! >>> 16;
    if ((flags & VRING_DESC_F_INDIRECT) !== 0) {
      walk.note("INDIRECT_NESTED", index, `Entry ${index} in the table of ${walk.name} is indirect`);
      continue;
    }
    if ((flags & ~VRING_DESC_F_WRITE) !== 0) {
      walk.note("PACKED_INDIRECT_FLAGS", index, `Entry ${index} in the table of ${walk.name} has flags 0x${flags.toString(16)}`);
    }
    walk.buffer(index, words[index * 4 + 1]! * 2 ** 32 + words[index * 4]!, words[index * 4 + 2]!, flags);
  }
}
