/**
 * What moved between two copies of a ring.
 *
 * @module
 */
import { type ChainDump, dumpRing, type RingDump } from "./dump.ts";
import type { ImageQueue, RingSide, VringImage } from "./image.ts";

/** A chain by name. */
export interface ChainName {
  /** Split: head; packed: buffer id. */
  head: number;
  /** Split: avail index; packed: slot. */
  position: number;
}

/** A fact that changed. */
export interface FieldChange {
  /** Its name, e.g. `flags.avail` or `suppression.kicks.event`. */
  field: string;
  /** Before; null where it was not known. */
  from: unknown;
  /** After. */
  to: unknown;
}

/** What moved in one ring. */
export interface RingDiff {
  /** Which queue. */
  index: number;
  /** Whose ring. */
  side: RingSide;
  /** The copy in which it is, when it is in one only or could be read in one only. */
  only_in: "a" | "b" | null;
  /** Nothing differs. */
  identical: boolean;
  /** One of the two copies is torn. */
  torn: boolean;
  /** What `avail_moved` and `used_moved` count. */
  unit: "chains" | "slots";
  /** Made available between the copies, modulo 2^16 (packed: modulo two laps); null when it is not known. */
  avail_moved: number | null;
  /** Used between the copies. */
  used_moved: number | null;
  /** In flight before, not any more. */
  returned: ChainName[];
  /** In flight now, not before. */
  added: ChainName[];
  /** In flight in both, the same ones. */
  stayed: ChainName[];
  /** Indices of descriptors that hold something else. */
  descriptors_changed: number[];
  /** Everything else. */
  changes: FieldChange[];
}

/** Compares all rings of two images. */
export function diffImages(a: VringImage, b: VringImage): RingDiff[] {
  const same = (x: ImageQueue) => (y: ImageQueue) => x.index === y.index && x.side === y.side;
  const diffs = a.queues.map((queue) => diffQueue(queue, b.queues.find(same(queue))));
  for (const queue of b.queues) if (!a.queues.some(same(queue))) diffs.push(diffQueue(undefined, queue));
  return diffs.sort((x, y) => x.index - y.index || x.side.localeCompare(y.side));
}

function diffQueue(a: ImageQueue | undefined, b: ImageQueue | undefined): RingDiff {
  const { index, side } = (a ?? b)!;
  const before = a?.ring && dumpRing(a.ring, { all: true });
  const after = b?.ring && dumpRing(b.ring, { all: true });
  const diff: RingDiff = {
    index,
    side,
    only_in: before === undefined ? (after === undefined ? null : "b") : after === undefined ? "a" : null,
    identical: false,
    torn: before?.consistent === false || after?.consistent === false,
    unit: (after ?? before)?.layout === "packed" ? "slots" : "chains",
    avail_moved: null,
    used_moved: null,
    returned: [],
    added: [],
    stayed: [],
    descriptors_changed: [],
    changes: a?.mode === b?.mode || a === undefined || b === undefined ? [] : [{ field: "mode", from: a.mode, to: b.mode }],
  };
  if (before !== undefined && after !== undefined) compare(diff, before, after);
  diff.identical = diff.only_in === null && !diff.avail_moved && !diff.used_moved && diff.descriptors_changed.length === 0 &&
    diff.returned.length === 0 && diff.added.length === 0 && diff.changes.length === 0;
  return diff;
}

function compare(diff: RingDiff, before: RingDump, after: RingDump): void {
  facts(diff, before, after, ["layout", "num", "last_avail_idx", "flags", "wrap_counters", "suppression", "features", "addresses"]);
  if (before.layout !== after.layout || before.num !== after.num) return;
  diff.avail_moved = distance(before, after, "avail");
  diff.used_moved = distance(before, after, "used");
  const flying = (dump: RingDump) => dump.chains.filter((chain) => chain.in_flight !== false);
  const is = (x: ChainDump) => (y: ChainDump) => x.head === y.head && x.position === y.position;
  const name = ({ head, position }: ChainDump): ChainName => ({ head, position });
  const [old, now] = [flying(before), flying(after)];
  diff.returned = old.filter((chain) => !now.some(is(chain))).map(name);
  diff.added = now.filter((chain) => !old.some(is(chain))).map(name);
  diff.stayed = now.filter((chain) => old.some(is(chain))).map(name);
  diff.descriptors_changed = after.descriptors.filter((descriptor, i) =>
    JSON.stringify(descriptor) !== JSON.stringify(before.descriptors[i])
  )
    .map(({ index }) => index);
}

function distance(before: RingDump, after: RingDump, which: "avail" | "used"): number | null {
  const [from, to] = [before[`${which}_idx`], after[`${which}_idx`]];
  if (from === null || to === null) return null;
  if (before.layout === "split") return (to - from) & 0xffff;
  const laps = before.wrap_counters?.[which] === after.wrap_counters?.[which] ? 0 : before.num;
  return (to - from + laps + 2 * before.num) % (2 * before.num);
}

function facts(diff: RingDiff, before: RingDump, after: RingDump, fields: readonly (keyof RingDump)[]): void {
  const walk = (field: string, from: unknown, to: unknown) => {
    if (isRecord(from) && isRecord(to)) {
      for (const key of new Set([...Object.keys(from), ...Object.keys(to)])) walk(`${field}.${key}`, from[key] ?? null, to[key] ?? null);
    } else if (JSON.stringify(from) !== JSON.stringify(to)) {
      diff.changes.push({ field, from, to });
    }
  };
  for (const field of fields) walk(field, before[field], after[field]);
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
