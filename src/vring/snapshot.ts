/**
 * Read-only snapshots of rings that others work on. The memory is copied once, and what tells a movement (split: the
 * indices; packed: the whole ring) is read again behind the copy: a snapshot is consistent, or says that it is torn.
 *
 * @module
 */
import { indirectTables, RingView } from "./inspect.ts";
import { packedLayout, type RingPart, splitLayout } from "./layout.ts";
import type { RingFormat, RingMemory } from "./queue.ts";

/** Where a side stands, as far as it is known from outside of the ring. Split: 16-bit index; packed: slot | wrap<<15. */
export interface RingPositions {
  /** Next avail entry that the device takes. */
  lastAvail: number | null;
  /** Next used entry that the device writes (split: the used index). */
  used: number | null;
  /** Next used entry that the driver takes. */
  lastUsed: number | null;
}

/** A copied indirect table. */
export interface TableCopy {
  /** As the descriptor names it, bytes. */
  address: number;
  /** Four little-endian words per descriptor, as far as the table could be read. */
  bytes: Uint8Array<ArrayBuffer>;
}

/** A piece of memory that buffers may lie in. */
export interface MemoryRange {
  /** As descriptors name it, bytes. */
  address: number;
  /** Bytes. */
  size: number;
}

/** What was negotiated for a ring, and where it lies. */
export interface RingShape {
  /** Format of the ring. */
  layout: RingFormat;
  /** Queue size in descriptors. */
  num: number;
  /** EVENT_IDX was negotiated. */
  eventIdx: boolean;
  /** INDIRECT_DESC was negotiated. */
  indirect: boolean;
  /** IN_ORDER was negotiated. */
  inOrder: boolean;
  /** Longest chain that the device takes, in segments; default the larger of num and 1024. */
  maxChain?: number;
  /** Addresses of descriptor table (ring), avail ring (driver event area) and used ring (device event area), bytes. */
  addresses?: { desc: number; avail: number; used: number };
  /** Memory in which buffers must lie; without it no bounds are checked. */
  memory?: readonly MemoryRange[];
}

/** A copy of a ring: plain data, nothing in it is trusted. */
export interface RingSnapshot extends RingShape {
  /** The ring did not move while it was copied. */
  consistent: boolean;
  /** Copies made until one was consistent, or patience ran out. */
  attempts: number;
  /** Descriptor table or ring. */
  desc: Uint8Array<ArrayBuffer>;
  /** Avail ring; packed: driver event area. */
  avail: Uint8Array<ArrayBuffer>;
  /** Used ring; packed: device event area. */
  used: Uint8Array<ArrayBuffer>;
  /** Where the sides stood, as far as known. */
  positions: RingPositions;
  /** Indirect tables of the chains that may be outstanding. */
  tables: TableCopy[];
}

/** A ring in memory that is to be copied. */
export interface RingSource extends RingShape {
  /** Descriptor table or ring. */
  desc: RingPart;
  /** Avail ring; packed: driver event area. */
  avail: RingPart;
  /** Used ring; packed: device event area. */
  used: RingPart;
  /** Where indirect tables are read. Without it none are copied. */
  tableMemory?: RingMemory;
  /** Reads what is known of the sides' positions; called before and after each copy. */
  positions?: () => RingPositions;
}

/** Nothing is known from outside. */
export const NO_POSITIONS: RingPositions = { lastAvail: null, used: null, lastUsed: null };

function copy(part: RingPart, size: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(size);
  bytes.set(new Uint8Array(part.buffer, part.byteOffset ?? 0, size));
  return bytes;
}

function samePositions(a: RingPositions, b: RingPositions): boolean {
  return a.lastAvail === b.lastAvail && a.used === b.used && a.lastUsed === b.lastUsed;
}

/**
 * Positions from counters trail behind the ring. As long as the ring's used position is the one that they were counted at,
 * nothing has come back since, and what they call outstanding is outstanding; otherwise they say nothing.
 */
function coherent(view: RingView, positions: RingPositions): boolean {
  if (positions.used === null) return true;
  if (view.layout === "split") return positions.used === view.usedIdx;
  const slot = positions.used & 0x7fff;
  return slot < view.num && !view.isUsed(slot, positions.used >>> 15);
}

/**
 * Copies a ring without writing anything.
 *
 * @param source the ring, mapped; it must stay mapped during the call
 * @param attempts most copies made when the ring moves meanwhile
 * @throws RangeError when a part is shorter than its layout
 */
export function snapshotRing(source: RingSource, attempts = 16): RingSnapshot {
  const { desc, avail, used, tableMemory, positions: readPositions, ...shape } = source;
  const layout = shape.layout === "packed" ? packedLayout(shape.num) : splitLayout(shape.num);
  let best: RingSnapshot | undefined;
  for (let attempt = 1; attempt <= attempts; attempt++) {
    const before = readPositions?.() ?? NO_POSITIONS;
    const mark = moving(source);
    const snapshot: RingSnapshot = {
      ...shape,
      consistent: false,
      attempts: attempt,
      desc: copy(desc, layout.desc.size),
      avail: copy(avail, layout.avail.size),
      used: copy(used, layout.used.size),
      positions: before,
      tables: [],
    };
    const view = new RingView(snapshot);
    if (tableMemory !== undefined && shape.indirect) snapshot.tables = indirectTables(view, tableMemory);
    snapshot.consistent = still(source, snapshot, mark);
    const known = coherent(view, before) && samePositions(before, readPositions?.() ?? NO_POSITIONS);
    if (!known) snapshot.positions = NO_POSITIONS;
    if (snapshot.consistent && known) return snapshot;
    // A consistent ring with unknown positions is better than a torn one.
    if (snapshot.consistent || best?.consistent !== true) best = snapshot;
  }
  return best!;
}

/** The two indices of a split ring, read in an order in which a movement between them shows. */
function moving(source: RingSource): number {
  if (source.layout === "packed") return 0;
  const index = (part: RingPart) => Atomics.load(new Uint16Array(part.buffer, part.byteOffset ?? 0, 2), 1);
  return index(source.used) * 0x1_0000 + index(source.avail);
}

function still(source: RingSource, snapshot: RingSnapshot, mark: number): boolean {
  if (source.layout === "split") {
    const idx = (bytes: Uint8Array<ArrayBuffer>) => new Uint16Array(bytes.buffer, 0, 2)[1]!;
    return idx(snapshot.used) * 0x1_0000 + idx(snapshot.avail) === mark && moving(source) === mark;
  }
  // A packed ring has no index: every word that either side writes must be the same as in the copy.
  for (const part of ["desc", "avail", "used"] as const) {
    const bytes = snapshot[part];
    const words = new Uint32Array(bytes.buffer, 0, bytes.length >> 2);
    const live = new Uint32Array(source[part].buffer, source[part].byteOffset ?? 0, words.length);
    for (let i = words.length - 1; i >= 0; i--) if (Atomics.load(live, i) !== words[i]) return false;
  }
  return true;
}
