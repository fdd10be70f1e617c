/**
 * A copied ring in words: what `svq vring dump` prints. The keys are those of the document `svq.vring/1`.
 *
 * @module
 */
import { walkChain, type WalkedChain } from "./chain_walk.ts";
import { knownLastAvail, outstandingChains, packedAdvance, packedEnd, RingView } from "./inspect.ts";
import {
  eventPassed,
  VRING_DESC_F_INDIRECT,
  VRING_DESC_F_NEXT,
  VRING_DESC_F_WRITE,
  VRING_PACKED_DESC_F_AVAIL,
  VRING_PACKED_DESC_F_USED,
  VRING_PACKED_EVENT_FLAG_DESC,
  VRING_PACKED_EVENT_FLAG_DISABLE,
} from "./layout.ts";
import { packedDistance } from "./packed_event.ts";
import type { RingFormat } from "./queue.ts";
import type { RingSnapshot } from "./snapshot.ts";
import { verifyShape } from "./verify.ts";

/** One descriptor. */
export interface DescriptorDump {
  /** Its index in the table, or slot in the packed ring. */
  index: number;
  /** `0x…`. */
  address: string;
  /** Bytes. */
  length: number;
  /** Names of the set bits: `next`, `write`, `indirect`; packed also `avail` and `used`; unknown ones `bit_N`. */
  flags: string[];
  /** Split, with `next`. */
  next?: number;
  /** Packed: buffer id. */
  id?: number;
}

/** One chain. */
export interface ChainDump {
  /** Split: head; packed: buffer id. */
  head: number;
  /** Split: avail index at which it was made available; packed: slot. */
  position: number;
  /** Buffers, those of an indirect table included. */
  length: number;
  /** Bytes that the device may read. */
  readable_bytes: number;
  /** Bytes that the device may write. */
  writable_bytes: number;
  /** `read`, `write`, both, or neither where the chain cannot be followed: what the device may do. */
  direction: "read" | "write" | "read+write" | "none";
  /** Its descriptors in the ring. */
  descriptors: number[];
  /** Its indirect table. */
  indirect: { address: string; bytes: number; entries: number } | null;
  /** The device has not returned it; null: the ring does not tell. */
  in_flight: boolean | null;
  /** False: it is the likely reading of the ring, not the only one. */
  certain: boolean;
  /** How much of the past that the ring holds speaks for it, 0 to 1. */
  likelihood: number;
  /** The device has taken it from the avail ring; null: not known. */
  taken: boolean | null;
  /** At least so long, from when it was first seen; null when it was never seen before. */
  in_flight_ms: number | null;
}

/** One entry of a window. */
export interface WindowEntry {
  /** Index, 16 bits (split), or slot (packed). */
  position: number;
  /** Split avail ring: head. Used ring and packed: buffer id. */
  id: number;
  /** Used ring: bytes written. */
  length?: number;
  /** Packed: as the flags say, `available` or `used`, with the wrap counter. */
  state?: string;
  /** The index or position points here: the next one to be written. */
  next?: true;
}

/** One side of a ring's notifications. */
export interface SuppressionDump {
  /** Does it want to be notified? `at_event`: when the event index is passed. */
  wanted: "always" | "never" | "at_event";
  /** The event index (split: 16 bits; packed: slot), where it counts. */
  event: number | null;
  /** Packed: the event's wrap counter. */
  event_wrap: number | null;
  /** Would the next entry cause a notification? null when that is not known. */
  next_notifies: boolean | null;
}

/** A ring in words. */
export interface RingDump {
  /** Format. */
  layout: RingFormat;
  /** Queue size in descriptors. */
  num: number;
  /** Not torn. */
  consistent: boolean;
  /** Split: avail index; packed: the driver's next slot. Null where it cannot be told. */
  avail_idx: number | null;
  /** Split: used index; packed: the device's next used slot. */
  used_idx: number | null;
  /** Next entry or slot that the device takes. */
  last_avail_idx: number | null;
  /** Chains (packed: null unless none) between avail and used. */
  in_flight: number | null;
  /** Raw flags of both rings (packed: of both event areas). */
  flags: { avail: number; used: number };
  /** Packed: wrap counters beside the positions. */
  wrap_counters: { avail: number | null; used: number | null; last_avail: number | null } | null;
  /** `kicks`: what the device wants; `calls`: what the driver wants. */
  suppression: { kicks: SuppressionDump; calls: SuppressionDump };
  /** What was negotiated. */
  features: { event_idx: boolean; indirect: boolean; in_order: boolean };
  /** Where the parts lie, `0x…`. */
  addresses: { desc: string; avail: string; used: string } | null;
  /** Descriptors of the chains below, or all. */
  descriptors: DescriptorDump[];
  /** Outstanding chains; with `all` also those that were returned, as far as the ring holds them. */
  chains: ChainDump[];
  /** Entries around each index. */
  window: { avail: WindowEntry[]; used: WindowEntry[] };
}

/** How {@linkcode dumpRing} looks. */
export interface DumpOptions {
  /** All descriptors, and chains that have come back. */
  all?: boolean;
  /** Entries shown on either side of an index; default 4. */
  around?: number;
}

const FLAG_NAMES: Readonly<Record<number, string>> = {
  [VRING_DESC_F_NEXT]: "next",
  [VRING_DESC_F_WRITE]: "write",
  [VRING_DESC_F_INDIRECT]: "indirect",
};
const PACKED_NAMES: Readonly<Record<number, string>> = {
  ...FLAG_NAMES,
  [VRING_PACKED_DESC_F_AVAIL]: "avail",
  [VRING_PACKED_DESC_F_USED]: "used",
};

function hex(value: number | bigint): string {
  return `0x${value.toString(16)}`;
}

function flagNames(flags: number, names: Readonly<Record<number, string>>): string[] {
  const found: string[] = [];
  for (let bit = 0; bit < 16; bit++) if ((flags >> bit & 1) === 1) found.push(names[1 << bit] ?? `bit_${bit}`);
  return found;
}

function describe(view: RingView, index: number): DescriptorDump {
  const [low, high, length, last] = view.words.subarray(index * 4, index * 4 + 4) as unknown as [number, number, number, number];
  const address = hex(BigInt(high) << 32n | BigInt(low));
  if (view.layout === "packed") return { index, address, length, flags: flagNames(last >>> 16, PACKED_NAMES), id: last & 0xffff };
  const flags = flagNames(last & 0xffff, FLAG_NAMES);
  return { index, address, length, flags, ...((last & VRING_DESC_F_NEXT) === 0 ? {} : { next: last >>> 16 }) };
}

type ChainState = Pick<ChainDump, "head" | "position" | "in_flight" | "certain" | "likelihood" | "taken">;

function chainDump(walked: WalkedChain, state: ChainState): ChainDump {
  const { indirect, readableBytes, writableBytes } = walked;
  const directions = [...(readableBytes > 0 ? ["read"] : []), ...(writableBytes > 0 ? ["write"] : [])].join("+");
  return {
    head: state.head,
    position: state.position,
    length: walked.segments.length,
    readable_bytes: readableBytes,
    writable_bytes: writableBytes,
    direction: (directions || "none") as ChainDump["direction"],
    descriptors: walked.descriptors,
    indirect: indirect === null ? null : { address: hex(indirect.address), bytes: indirect.length, entries: indirect.entries },
    in_flight: state.in_flight,
    certain: state.certain,
    likelihood: Math.round(state.likelihood * 100) / 100,
    taken: state.taken,
    in_flight_ms: null,
  };
}

/** The ring in words; undefined when its size or its parts make no ring (see verifyShape). */
export function dumpRing(snapshot: RingSnapshot, options: DumpOptions = {}): RingDump | undefined {
  if (verifyShape(snapshot).some(({ detail, rule }) => rule === "RING_SIZE" || detail.includes("bytes and needs"))) return undefined;
  const view = new RingView(snapshot);
  const { addresses } = snapshot;
  const chains = view.layout === "split" ? splitChains(view, options.all ?? false) : packedChains(view);
  const shown = options.all === true
    ? Array.from({ length: view.num }, (_, index) => index)
    : [...new Set(chains.flatMap(({ descriptors }) => descriptors))].sort((a, b) => a - b);
  return {
    layout: view.layout,
    num: view.num,
    consistent: snapshot.consistent,
    ...(view.layout === "split" ? splitState(view, options.around ?? 4) : packedState(view, options.around ?? 4)),
    features: { event_idx: snapshot.eventIdx, indirect: snapshot.indirect, in_order: snapshot.inOrder },
    addresses: addresses === undefined ? null : { desc: hex(addresses.desc), avail: hex(addresses.avail), used: hex(addresses.used) },
    descriptors: shown.map((index) => describe(view, index)),
    chains,
  };
}

type State = Pick<
  RingDump,
  "avail_idx" | "used_idx" | "last_avail_idx" | "in_flight" | "flags" | "wrap_counters" | "suppression" | "window"
>;

function splitChains(view: RingView, all: boolean): ChainDump[] {
  const { chains } = outstandingChains(view);
  const found = chains.filter(({ head }) => head < view.num).map((chain) =>
    chainDump(walkChain(view, chain.head), { ...chain, in_flight: true })
  );
  if (!all) return found;
  const seen = new Set(chains.map(({ head }) => head));
  const returned: ChainDump[] = [];
  // The newest time that each other head was made available; entries of a ring's first lap that were never written look
  // like head 0, which a walk cannot tell.
  for (let back = 1; back <= view.num; back++) {
    const position = (view.availIdx - back) & 0xffff;
    const head = view.availAt(position);
    if (seen.has(head) || head >= view.num) continue;
    seen.add(head);
    const walked = walkChain(view, head);
    // Its descriptors or its table may be something else by now.
    if (walked.problems.length === 0) {
      returned.unshift(chainDump(walked, { head, position, in_flight: false, certain: false, likelihood: 0, taken: true }));
    }
  }
  return [...returned, ...found];
}

function packedChains(view: RingView): ChainDump[] {
  const end = packedEnd(view).position;
  return outstandingChains(view).chains.map((chain) => {
    const slot = chain.position & 0x7fff;
    const walked = walkChain(view, slot, { wrap: chain.position >>> 15, room: packedDistance(chain.position, end, view.num) });
    return chainDump(walked, { ...chain, position: slot, in_flight: chain.taken === false ? true : null });
  });
}

function splitState(view: RingView, around: number): State {
  const { availIdx, usedIdx, num, snapshot: { eventIdx, positions } } = view;
  const side = (flags: number, event: number, index: number): SuppressionDump => {
    if (eventIdx) {
      return { wanted: "at_event", event, event_wrap: null, next_notifies: eventPassed(event, (index + 1) & 0xffff, index) };
    }
    const wanted = (flags & 1) === 0;
    return { wanted: wanted ? "always" : "never", event: null, event_wrap: null, next_notifies: wanted };
  };
  const window = <T>(index: number, entry: (position: number) => T) =>
    Array.from({ length: Math.min(2 * around + 1, num) }, (_, i) => {
      const position = (index + i - Math.min(around, num - 1)) & 0xffff;
      return { position, ...entry(position), ...(position === index ? { next: true as const } : {}) };
    });
  return {
    avail_idx: availIdx,
    used_idx: usedIdx,
    last_avail_idx: knownLastAvail(view) < 0 ? positions.lastAvail : knownLastAvail(view),
    in_flight: view.outstanding <= num ? view.outstanding : null,
    flags: { avail: view.avail[0]!, used: view.used[0]! },
    wrap_counters: null,
    suppression: {
      kicks: side(view.used[0]!, view.used[2 + 4 * num] ?? 0, availIdx),
      calls: side(view.avail[0]!, view.avail[2 + num] ?? 0, usedIdx),
    },
    window: {
      avail: window(availIdx, (position) => ({ id: view.availAt(position) })),
      used: window(usedIdx, (position) => ({ id: view.usedAt(position), length: view.usedLengthAt(position) })),
    },
  };
}

function packedState(view: RingView, around: number): State {
  const { num, snapshot: { positions } } = view;
  const { position, regular } = packedEnd(view);
  const avail = regular ? position : null;
  const slotOf = (at: number | null) => at === null ? null : at & 0x7fff;
  const wrapOf = (at: number | null) => at === null ? null : at >>> 15;
  const side = (words: Uint16Array, next: number | null): SuppressionDump => {
    const flags = words[1]! & 3;
    if (flags === VRING_PACKED_EVENT_FLAG_DISABLE) return { wanted: "never", event: null, event_wrap: null, next_notifies: false };
    if (flags !== VRING_PACKED_EVENT_FLAG_DESC) return { wanted: "always", event: null, event_wrap: null, next_notifies: true };
    const event = words[0]!;
    return { wanted: "at_event", event: event & 0x7fff, event_wrap: event >>> 15, next_notifies: next === null ? null : event === next };
  };
  const window = (at: number | null): WindowEntry[] =>
    at === null ? [] : Array.from({ length: Math.min(2 * around + 1, num) }, (_, i) => {
      const shift = i - Math.min(around, num - 1);
      const slot = packedAdvance(at, (shift + num) % num, num) & 0x7fff;
      const flags = view.flagsOf(slot);
      const wrap = flags >> 7 & 1;
      const state = `${wrap === (flags >> 15 & 1) ? "used" : "available"}/${wrap}`;
      return { position: slot, id: view.idOf(slot), state, ...(shift === 0 ? { next: true as const } : {}) };
    });
  return {
    avail_idx: slotOf(avail),
    used_idx: slotOf(positions.used),
    last_avail_idx: slotOf(positions.lastAvail),
    in_flight: outstandingChains(view).count,
    flags: { avail: view.avail[1]!, used: view.used[1]! },
    wrap_counters: { avail: wrapOf(avail), used: wrapOf(positions.used), last_avail: wrapOf(positions.lastAvail) },
    suppression: { kicks: side(view.used, avail), calls: side(view.avail, positions.used) },
    window: { avail: window(avail), used: window(positions.used) },
  };
}
