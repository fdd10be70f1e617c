/**
 * What a copied ring says of itself: positions, and which chains are outstanding. Nothing here is trusted and nothing throws:
 * a broken ring is looked at as far as it goes.
 *
 * A split ring does not say which chains are in flight once some were used out of order; it says how many. The chains are
 * told from what the avail ring and the used ring still hold of the past, and those that are sure are marked as such.
 *
 * @module
 */
import { walkChain } from "./chain_walk.ts";
import {
  DESC_BYTES,
  packedLayout,
  type RingLayout,
  splitLayout,
  VRING_NUM_MAX,
  VRING_PACKED_DESC_F_AVAIL,
  VRING_PACKED_DESC_F_USED,
} from "./layout.ts";
import { IndirectReader } from "./indirect.ts";
import { packedDistance, packedPosition } from "./packed_event.ts";
import type { RingMemory } from "./queue.ts";
import type { RingSnapshot, TableCopy } from "./snapshot.ts";

const BOTH = VRING_PACKED_DESC_F_AVAIL | VRING_PACKED_DESC_F_USED;

/** A chain that the driver has made available and the device has not returned, as far as the ring tells. */
export interface Outstanding {
  /** Split: avail position, 16 bits. Packed: slot | wrap<<15. */
  position: number;
  /** Split: head; packed: buffer id as it is in the chain's last descriptor. */
  head: number;
  /** First descriptor of the ring. */
  start: number;
  /** False: another reading of the ring is possible. */
  certain: boolean;
  /** How much of the past that the ring holds speaks for it, 0 to 1. */
  likelihood: number;
  /** The device has taken it; null when its position is not known. */
  taken: boolean | null;
}

/** Outstanding chains in the order in which they were made available. */
export interface OutstandingChains {
  /** Those that the ring still shows. */
  chains: Outstanding[];
  /** How many there are; null when the ring does not tell. */
  count: number | null;
  /** Heads that were made available again before they were used, with their positions. */
  repeated: { head: number; position: number }[];
}

/** Is `num` a size that a ring of this format may have? */
export function isRingSize(layout: "split" | "packed", num: number): boolean {
  const inRange = Number.isInteger(num) && num >= 1 && num <= VRING_NUM_MAX;
  return inRange && (layout === "packed" || (num & (num - 1)) === 0);
}

function padded(bytes: Uint8Array<ArrayBuffer>, size: number): ArrayBuffer {
  if (bytes.byteOffset === 0 && bytes.length >= size && bytes.buffer.byteLength % 4 === 0) return bytes.buffer;
  const whole = new Uint8Array(Math.ceil(size / 4) * 4);
  whole.set(bytes.subarray(0, Math.min(size, bytes.length)));
  return whole.buffer;
}

/** Views over a snapshot. Parts that are too short read as zeroes behind their end. */
export class RingView {
  /** Format of the ring. */
  readonly layout: "split" | "packed";
  /** Queue size in descriptors. */
  readonly num: number;
  /** Sizes of the parts. */
  readonly parts: RingLayout;
  /** Descriptors, four words each. */
  readonly words: Uint32Array<ArrayBuffer>;
  /** Descriptors, eight half words each. */
  readonly halves: Uint16Array<ArrayBuffer>;
  /** Avail ring: flags, index, entries, used_event; packed: the driver's event area. */
  readonly avail: Uint16Array<ArrayBuffer>;
  /** Used ring as half words: flags, index, then elements, avail_event; packed: the device's event area. */
  readonly used: Uint16Array<ArrayBuffer>;
  /** Used ring as words: elements of two words start at word 1. */
  readonly usedWords: Uint32Array<ArrayBuffer>;
  /** Longest chain that the device takes, in segments. */
  readonly maxChain: number;

  /** Views over a snapshot. @param snapshot of a legal size: see {@linkcode isRingSize} */
  constructor(readonly snapshot: RingSnapshot) {
    this.layout = snapshot.layout;
    this.num = snapshot.num;
    this.parts = snapshot.layout === "packed" ? packedLayout(snapshot.num) : splitLayout(snapshot.num);
    const desc = padded(snapshot.desc, this.parts.desc.size);
    this.words = new Uint32Array(desc, 0, this.num * 4);
    this.halves = new Uint16Array(desc, 0, this.num * 8);
    this.avail = new Uint16Array(padded(snapshot.avail, this.parts.avail.size), 0, this.parts.avail.size >> 1);
    const used = padded(snapshot.used, this.parts.used.size);
    this.used = new Uint16Array(used, 0, this.parts.used.size >> 1);
    this.usedWords = new Uint32Array(used, 0, this.parts.used.size >> 2);
    this.maxChain = snapshot.maxChain ?? Math.max(this.num, 1024);
  }

  /** Split: the avail index. */
  get availIdx(): number {
    return this.avail[1]!;
  }

  /** Split: the used index. */
  get usedIdx(): number {
    return this.used[1]!;
  }

  /** Split: chains made available and not used, modulo 2^16; more than `num` means a broken index. */
  get outstanding(): number {
    return (this.availIdx - this.usedIdx) & 0xffff;
  }

  /** Split: the head in the avail ring at a position. */
  availAt(position: number): number {
    return this.avail[2 + (position & (this.num - 1))]!;
  }

  /** Split: the id in the used ring at a position. */
  usedAt(position: number): number {
    return this.usedWords[1 + ((position & (this.num - 1)) << 1)]!;
  }

  /** Split: the length in the used ring at a position. */
  usedLengthAt(position: number): number {
    return this.usedWords[2 + ((position & (this.num - 1)) << 1)]!;
  }

  /** Packed: the flags of a slot. */
  flagsOf(slot: number): number {
    return this.halves[(slot << 3) + 7]!;
  }

  /** Packed: the buffer id in a slot. */
  idOf(slot: number): number {
    return this.halves[(slot << 3) + 6]!;
  }

  /** Packed: is the slot available in the lap with this wrap counter? */
  isAvailable(slot: number, wrap: number): boolean {
    return (this.flagsOf(slot) & BOTH) === (wrap === 1 ? VRING_PACKED_DESC_F_AVAIL : VRING_PACKED_DESC_F_USED);
  }

  /** Packed: is the slot used in the lap with this wrap counter? */
  isUsed(slot: number, wrap: number): boolean {
    return (this.flagsOf(slot) & BOTH) === (wrap === 1 ? BOTH : 0);
  }

  /**
   * Packed: where the driver has published up to, as slot | wrap<<15. Both sides leave the wrap counter of the lap in the
   * AVAIL bit of every slot that was filled, so it changes where the next descriptor goes. A driver in the middle of a batch
   * has filled the slots behind that one, too, and leaves out the first until all others are there.
   *
   * @returns with `regular` false when the bits fit neither
   */
  nextAvail(): { position: number; regular: boolean } {
    const { num } = this;
    const bit = (slot: number) => this.flagsOf(slot) >> 7 & 1;
    // Slots at which the bit differs from the slot before.
    const changes: number[] = [];
    for (let slot = 1; slot < num && changes.length < 4; slot++) if (bit(slot) !== bit(slot - 1)) changes.push(slot);
    if (changes.length === 0) return { position: packedPosition(0, bit(0) ^ 1), regular: true };
    if (changes.length === 1) return { position: packedPosition(changes[0]!, bit(0)), regular: true };
    // The slot that was left out stands alone; with it there is one change again, or none.
    const lone = [0, ...changes].filter((slot, i) => (changes[i] ?? num) - slot === 1);
    const slot = changes.length > 3 ? undefined : lone.find((candidate) => {
      const inner = candidate > 0 && candidate < num - 1 ? 2 : 1;
      return changes.length - inner <= 1;
    });
    if (slot === undefined) return { position: packedPosition(changes[0]!, bit(0)), regular: false };
    return { position: packedPosition(slot, bit(slot) ^ 1), regular: true };
  }
}

/** The device's position, when it is known and fits the indices; otherwise -1. */
export function knownLastAvail(view: RingView): number {
  const { lastAvail } = view.snapshot.positions;
  if (lastAvail === null) return -1;
  if (view.layout === "split") return ((view.availIdx - lastAvail) & 0xffff) <= view.outstanding ? lastAvail : -1;
  const { used } = view.snapshot.positions;
  if ((lastAvail & 0x7fff) >= view.num) return -1;
  return used === null || packedDistance(used, lastAvail, view.num) >= 0 ? lastAvail : -1;
}

/**
 * Packed: where the driver has published up to, as slot | wrap<<15. From where the device stands that can be read off the
 * slots; otherwise it is {@linkcode RingView.nextAvail}, which is right as long as the driver is not in the middle of a batch.
 */
export function packedEnd(view: RingView): { position: number; regular: boolean } {
  const lastAvail = knownLastAvail(view);
  if (lastAvail < 0) return view.nextAvail();
  const { used } = view.snapshot.positions;
  let room = view.num - (used === null ? 0 : packedDistance(used, lastAvail, view.num));
  let position = lastAvail;
  for (; room > 0 && view.isAvailable(position & 0x7fff, position >>> 15); room--) position = packedAdvance(position, 1, view.num);
  return { position, regular: true };
}

/** Which chains are outstanding. */
export function outstandingChains(view: RingView): OutstandingChains {
  return view.layout === "split" ? splitOutstanding(view) : packedOutstanding(view);
}

interface Candidate {
  head: number;
  /** Relative to the avail index: -1 is the entry added last. */
  position: number;
  certain: boolean;
  likelihood: number;
}

/** What the past must say for a chain before it is called outstanding. */
const LIKELY = 0.7;

// Positions are counted back from the avail index.
//
// Sure: used position u can only be about avail positions below u + num, since no more than num chains are ever
// outstanding, and about none that was made available later than it.
//
// Likely: suppose that at some moment of the past nothing was out of order: then whatever was made available since and not
// used since is outstanding. The rings remember num such moments, and the answer of most of them is taken. A chain that is
// out for longer than the ring remembers is in no answer, and is counted only.
function splitOutstanding(view: RingView): OutstandingChains {
  const { num, availIdx } = view;
  const count = view.outstanding;
  if (count > num) return { chains: [], count: null, repeated: [] };
  const lastAvail = knownLastAvail(view);
  const untaken = lastAvail < 0 ? 0 : (availIdx - lastAvail) & 0xffff;
  const made = new Map<number, number[]>();
  for (let position = -num; position < 0; position++) append(made, view.availAt(availIdx + position), position);
  const done = new Map<number, number[]>();
  for (let position = -count - num; position < -count; position++) append(done, view.usedAt(availIdx + position), position);
  const moments = num - count + 1;
  const sum = (positions: readonly number[]) =>
    positions.reduce((total, position) => total + Math.min(Math.max(position + num + 1, 0), moments), 0);
  const candidates: Candidate[] = [];
  const repeated: { head: number; position: number }[] = [];
  for (const [head, positions] of made) {
    const position = positions.at(-1)!;
    const uses = done.get(head) ?? [];
    const again = { head, position: (availIdx + position) & 0xffff };
    if (position >= -untaken) {
      candidates.push({ head, position, certain: true, likelihood: 1 });
      if (positions.filter((other) => other >= -untaken).length > 1) repeated.push(again);
      continue;
    }
    if (position <= (uses.at(-1) ?? -Infinity)) continue;
    const recent = positions.filter((other) => other >= -count);
    const answered = recent.length === 0 ? 0 : uses.filter((use) => use >= recent[0]! - num + 1).length;
    if (answered < recent.length) {
      candidates.push({ head, position, certain: true, likelihood: 1 });
      if (answered < recent.length - 1) repeated.push(again);
      continue;
    }
    const likelihood = Math.min(1, (sum(positions) - sum(uses)) / moments);
    if (likelihood >= LIKELY) candidates.push({ head, position, certain: false, likelihood });
  }
  candidates.sort((a, b) => Number(b.certain) - Number(a.certain) || b.likelihood - a.likelihood || b.position - a.position);
  const sure = candidates.filter(({ certain }) => certain).length;
  const chains = candidates.slice(0, Math.max(count, sure)).sort((a, b) => a.position - b.position).map((candidate): Outstanding => ({
    position: (availIdx + candidate.position) & 0xffff,
    head: candidate.head,
    start: candidate.head,
    certain: candidate.certain,
    likelihood: candidate.likelihood,
    taken: lastAvail < 0 ? null : candidate.position < -untaken,
  }));
  return { chains, count, repeated };
}

function append(map: Map<number, number[]>, key: number, value: number): void {
  const list = map.get(key);
  if (list === undefined) map.set(key, [value]);
  else list.push(value);
}

/** Packed: slot and wrap counter of a position that lies `steps` further. */
export function packedAdvance(position: number, steps: number, num: number): number {
  const slot = (position & 0x7fff) + steps;
  return slot >= num ? packedPosition(slot - num, position >>> 15 ^ 1) : packedPosition(slot, position >>> 15);
}

function packedRetreat(position: number, steps: number, num: number): number {
  const slot = (position & 0x7fff) - steps;
  return slot < 0 ? packedPosition(slot + num, position >>> 15 ^ 1) : packedPosition(slot, position >>> 15);
}

/** How many slots directly before `end` are available in their lap. */
function availableBefore(view: RingView, end: number): number {
  let slots = 0;
  while (slots < view.num) {
    const position = packedRetreat(end, slots + 1, view.num);
    if (!view.isAvailable(position & 0x7fff, position >>> 15)) break;
    slots++;
  }
  return slots;
}

function packedOutstanding(view: RingView): OutstandingChains {
  const { num } = view;
  const { position: end, regular } = packedEnd(view);
  if (!regular) return { chains: [], count: null, repeated: [] };
  const lastAvail = knownLastAvail(view);
  const { used } = view.snapshot.positions;
  const window = used === null ? -1 : packedDistance(used, end, num);
  const untaken = lastAvail < 0 ? 0 : packedDistance(lastAvail, end, num);
  // What the device has taken may have been overwritten by what it has used: only the part behind the last used
  // descriptor shows chains as the driver wrote them.
  const shown = Math.max(untaken, Math.min(availableBefore(view, end), window < 0 ? num : window));
  const chains: Outstanding[] = [];
  for (let left = shown; left > 0;) {
    const taken = lastAvail < 0 ? null : left > untaken;
    const position = packedRetreat(end, left, num);
    const limit = taken === true ? left - untaken : left;
    const walked = walkChain(view, position & 0x7fff, { wrap: position >>> 15, room: limit });
    chains.push({
      position,
      head: walked.id,
      start: position & 0x7fff,
      certain: taken === false,
      likelihood: taken === false ? 1 : LIKELY,
      taken,
    });
    left -= Math.max(1, walked.descriptors.length);
  }
  return { chains, count: window === 0 ? 0 : null, repeated: [] };
}

/** Copies the indirect tables of chains that may be outstanding. */
export function indirectTables(view: RingView, memory: RingMemory): TableCopy[] {
  const reader = new IndirectReader(memory, view.maxChain);
  const tables: TableCopy[] = [];
  for (const { start, position } of outstandingChains(view).chains) {
    if (start >= view.num) continue;
    const { indirect } = walkChain(view, start, { wrap: position >>> 15, room: view.num });
    if (indirect === null) continue;
    try {
      const count = reader.read(start, indirect.address, indirect.length, view.maxChain);
      const bytes = new Uint8Array(count * DESC_BYTES);
      bytes.set(new Uint8Array(reader.words.buffer as ArrayBuffer, 0, bytes.length));
      tables.push({ address: indirect.address, bytes });
    } catch { /* a table that cannot be read is an anomaly of the chain: the walk names it */ }
  }
  return tables;
}
