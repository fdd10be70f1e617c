/**
 * The JavaScript core's long way between split rings: one chain at a time through a record, for tables, translated memory and
 * whatever the loop of fast_forward.ts leaves.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { bufferAt } from "../ffi/mod.ts";
import { NO_ROOM, type Translation } from "../iova/translation.ts";
import { DESC_BYTES, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, words32 } from "../vring/layout.ts";
import { Chain } from "../vring/queue.ts";
import { VringError } from "../vring/rules.ts";
import { type FastQueue, LINK_FLAGS, LINK_INDEX, RECORD_FIRST, RECORD_ORDER, RECORD_SLOTS } from "./fast_state.ts";
import type { RingPlace } from "./messages.ts";

/** Room for the device's indirect tables. */
interface Tables {
  readonly words: Uint32Array;
  readonly iova: number;
  readonly entries: number;
}

/** Puts chains into the device's ring of a {@linkcode FastQueue}. */
export class Placer {
  readonly #q: FastQueue;
  readonly #tables: Tables | undefined;
  readonly #passTables: boolean;
  readonly #moved: Chain;

  /** @param device the ring that `q` has open @param maxChain longest chain, in segments */
  constructor(q: FastQueue, device: RingPlace, maxChain: number) {
    const { num, indirect, passTables, tables } = device;
    this.#q = q;
    this.#passTables = indirect && passTables === true;
    this.#moved = new Chain(maxChain);
    if (!q.heads && indirect && tables !== undefined && tables.entries > 1) {
      const size = num * tables.entries * DESC_BYTES;
      const words = words32("indirect area", { buffer: bufferAt(tables.address, size) }, size, 4);
      this.#tables = { words, iova: tables.iova, entries: tables.entries };
    }
  }

  /** Chains of several descriptors are put into tables, where they fit. */
  get hasTables(): boolean {
    return this.#tables !== undefined;
  }

  /**
   * Adds a checked chain; the device sees it at the next publish.
   *
   * @param order when it was taken
   * @returns false when there is no room
   * @throws VringError CHAIN_TOO_LONG, SvqError OUTSIDE_MEMORY
   */
  place(chain: Chain, translation: Translation | undefined, order: number): boolean {
    const q = this.#q;
    let id = chain.id;
    let slots = 1;
    if (q.heads) {
      if (q.inflightCount === q.deviceNum) return false;
    } else {
      const out = translation === undefined ? chain : this.#translate(chain, translation);
      const tables = this.#tables;
      const { count } = out;
      // A translated chain's own table has addresses that the device does not know.
      const pass = this.#passTables && translation === undefined && chain.indirectAddress >= 0 && chain.slots === 1;
      const table = !pass && tables !== undefined && count > 1 && count <= tables.entries;
      slots = pass || table ? 1 : count;
      if (slots > q.deviceNum) {
        const most = Math.max(q.deviceNum, tables?.entries ?? 0);
        throw new VringError("CHAIN_TOO_LONG", -1, `A chain of ${count} segments does not fit a ring that takes ${most}`);
      }
      if (slots > q.numFree) return false;
      id = q.freeHead;
      if (pass) this.#link(q.freeHead, chain.indirectAddress, chain.indirectLength, VRING_DESC_F_INDIRECT);
      else if (table) this.#fillTable(tables, id, out);
      else this.#fillRing(out);
      q.freeHead = this.#after(id, slots);
      q.numFree -= slots;
    }
    const record = id << 2;
    q.records[record] = chain.id;
    q.records[record + RECORD_FIRST] = pool(q, chain);
    q.records[record + RECORD_ORDER] = order;
    q.records[record + RECORD_SLOTS] = slots;
    q.deviceAvail[2 + (q.deviceNext & (q.deviceNum - 1))] = id;
    q.deviceNext = (q.deviceNext + 1) & 0xffff;
    return true;
  }

  // A segment that spans two regions may become several.
  #translate(chain: Chain, translation: Translation): Chain {
    const out = this.#moved;
    out.clear();
    for (let i = 0; i < chain.count; i++) {
      const count = translation.splitToIova(chain.addresses[i]!, chain.lengths[i]!, out, out.count);
      if (count === NO_ROOM) {
        throw new SvqError("CHAIN_TOO_LONG", `Chain ${chain.id} has more than ${out.capacity} segments for the device`);
      }
      if (count < 0) throw new SvqError("OUTSIDE_MEMORY", `A segment of chain ${chain.id} has no place in the device's address space`);
      out.count += count;
      if (i < chain.readableCount) out.readableCount = out.count;
    }
    return out;
  }

  #after(index: number, slots: number): number {
    let next = index;
    for (let i = 0; i < slots; i++) next = this.#q.segments[(next << 2) + 3]! & LINK_INDEX;
    return next;
  }

  #link(index: number, address: number, length: number, flagsAndNext: number): void {
    putDescriptor(this.#q.deviceDesc, index << 2, address, length, flagsAndNext);
  }

  #fillRing(chain: Chain): void {
    let index = this.#q.freeHead;
    for (let i = 0; i < chain.count; i++) {
      const next = this.#after(index, 1);
      const flags = (i < chain.readableCount ? 0 : VRING_DESC_F_WRITE) | (i + 1 < chain.count ? VRING_DESC_F_NEXT | next << 16 : 0);
      this.#link(index, chain.addresses[i]!, chain.lengths[i]!, flags);
      index = next;
    }
  }

  #fillTable(tables: Tables, id: number, chain: Chain): void {
    const start = id * tables.entries;
    for (let i = 0; i < chain.count; i++) {
      const flags = (i < chain.readableCount ? 0 : VRING_DESC_F_WRITE) | (i + 1 < chain.count ? VRING_DESC_F_NEXT | (i + 1) << 16 : 0);
      putDescriptor(tables.words, (start + i) << 2, chain.addresses[i]!, chain.lengths[i]!, flags);
    }
    this.#link(id, tables.iova + start * DESC_BYTES, chain.count * DESC_BYTES, VRING_DESC_F_INDIRECT);
  }
}

// Copies a chain's segments, by the guest's addresses. @returns the first one
function pool(q: FastQueue, chain: Chain): number {
  const { count, readableCount } = chain;
  if (q.poolFree < count) q.growPool(count);
  const { segments } = q;
  const first = q.poolHead;
  let index = first;
  for (let i = 0; i < count; i++) {
    const at = index << 2;
    const next = segments[at + 3]! & LINK_INDEX;
    const flags = (i < readableCount ? 0 : VRING_DESC_F_WRITE) | (i + 1 < count ? VRING_DESC_F_NEXT : 0);
    putDescriptor(segments, at, chain.addresses[i]!, chain.lengths[i]!, next | flags << LINK_FLAGS);
    index = next;
  }
  q.poolHead = index;
  q.poolFree -= count;
  return first;
}

function putDescriptor(words: Int32Array | Uint32Array, at: number, address: number, length: number, last: number): void {
  const high = Math.floor(address / 0x1_0000_0000);
  words[at] = address - high * 0x1_0000_0000;
  words[at + 1] = high;
  words[at + 2] = length;
  words[at + 3] = last;
}
