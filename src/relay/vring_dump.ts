/**
 * Copies of a relay's rings for `svq vring`. The data path is not touched: ring memory is read from the main thread, and
 * positions come from the counters that the Workers keep anyway.
 *
 * @module
 */
import { EXIT, SvqError, toErrorRecord } from "../errors.ts";
import { outstandingChains, RingView } from "../vring/inspect.ts";
import { encodeImage, type ImageQueue, type RingSide, type SeenChain } from "../vring/image.ts";
import { packedLayout, splitLayout } from "../vring/layout.ts";
import type { RingMemory } from "../vring/queue.ts";
import { NO_POSITIONS, type RingPositions, type RingSnapshot, type RingSource, snapshotRing } from "../vring/snapshot.ts";
import { COUNTER } from "./counters.ts";
import type { Relay } from "./relay.ts";
import { pause } from "./ring_rest.ts";
import { isRelayed } from "./queue_steps.ts";
import type { RelayQueue } from "./relay_queue.ts";

const INDIRECT_DESC = 1n << 28n;
const EVENT_IDX = 1n << 29n;
const RING_PACKED = 1n << 34n;
const IN_ORDER = 1n << 35n;

/** Copies made in a row; then other work of the main thread gets its turn before the next ones. */
const ATTEMPTS = 16;
const ROUNDS = 4;

/** When outstanding chains were first seen, by ring, then by position and head. */
const firstSeen = new WeakMap<Relay, Map<string, Map<string, number>>>();

function shapeOf(features: bigint): { eventIdx: boolean; indirect: boolean; inOrder: boolean } {
  const has = (bit: bigint) => (features & bit) !== 0n;
  return { eventIdx: has(EVENT_IDX), indirect: has(INDIRECT_DESC), inOrder: has(IN_ORDER) };
}

function guestPositions(relay: Relay, queue: RelayQueue, packed: boolean): RingPositions {
  const { mode } = queue;
  if (mode !== undefined && !isRelayed(mode)) return NO_POSITIONS;
  if (mode !== undefined) {
    const counters = relay.counters.of(queue.index);
    return { lastAvail: counters[COUNTER.availIdx]!, used: counters[COUNTER.usedIdx]!, lastUsed: null };
  }
  // Stopped: whoever comes next goes on at the base. A split ring's base is its avail half only.
  return { lastAvail: queue.base & 0xffff, used: packed ? queue.base >>> 16 : queue.base & 0xffff, lastUsed: null };
}

function guestSource(relay: Relay, queue: RelayQueue): RingSource {
  const packed = (relay.features & RING_PACKED) !== 0n;
  const { desc, avail, used } = queue.iovas ?? queue.addresses!;
  const parts = packed ? packedLayout(queue.num) : splitLayout(queue.num);
  const { window } = queue;
  const part = (name: "desc" | "avail" | "used") => ({
    buffer: window?.buffer(name) ?? relay.memory.buffer(queue.addresses![name], parts[name].size),
  });
  return {
    ...shapeOf(relay.features),
    layout: packed ? "packed" : "split",
    num: queue.num,
    addresses: { desc, avail, used },
    memory: window === undefined
      ? relay.memory.regions.map(({ gpa, size }) => ({ address: gpa, size }))
      : relay.iommu!.table.entries.map(({ iova, size }) => ({ address: iova, size })),
    desc: part("desc"),
    avail: part("avail"),
    used: part("used"),
    tableMemory: window === undefined ? relay.memory : relay.iommu!.memory(relay.memory),
    positions: () => guestPositions(relay, queue, packed),
  };
}

/** The slot of one queue in the arena, under the addresses that the device uses, and guest memory around it. */
function slotMemory(relay: Relay, slot: ArrayBuffer, first: number): RingMemory {
  const inSlot = (address: number, length: number) => address >= first && address + length <= first + slot.byteLength;
  return {
    contains: (address, length) => inSlot(address, length) || relay.memory.contains(address, length),
    buffer: (address, length) =>
      inSlot(address, length) ? slot.slice(address - first, address - first + length) : relay.memory.buffer(address, length),
  };
}

function shadowSource(relay: Relay, queue: RelayQueue): RingSource {
  const arena = relay.arena!;
  const packed = relay.devicePacked;
  const num = relay.deviceNum(queue);
  const own = arena.peek(queue.index, num);
  const first = arena.iova + queue.index * arena.slotSize;
  const slot = arena.slot(queue.index);
  const part = (iova: number) => ({ buffer: slot, byteOffset: iova - first });
  // Mode used: the device reads the guest's own descriptor table.
  const table = queue.mode === "used" ? queue.addresses!.desc : undefined;
  return {
    ...shapeOf(relay.deviceFeatures),
    layout: packed ? "packed" : "split",
    num,
    addresses: { ...own, desc: table ?? own.desc },
    memory: [
      ...relay.plan.regions.map(({ iova, size }) => ({ address: iova, size })),
      { address: first, size: slot.byteLength },
    ].sort((a, b) => a.address - b.address),
    desc: table === undefined ? part(own.desc) : { buffer: relay.memory.buffer(table, 16 * num) },
    avail: part(own.avail),
    used: part(own.used),
    tableMemory: slotMemory(relay, slot, first),
  };
}

function hasShadow(relay: Relay, queue: RelayQueue): boolean {
  return queue.mode !== undefined && isRelayed(queue.mode) && relay.arena !== undefined;
}

// Looked up anew for each round: memory may be unplugged between two of them.
async function copyRing(relay: Relay, queue: RelayQueue, side: RingSide): Promise<RingSnapshot> {
  for (let round = 1;; round++) {
    const source = side === "guest" ? guestSource(relay, queue) : shadowSource(relay, queue);
    const snapshot = snapshotRing(source, ATTEMPTS);
    if (snapshot.consistent || round === ROUNDS) return snapshot;
    await pause(1);
    if (side === "shadow" && !hasShadow(relay, queue)) return snapshot;
  }
}

function note(relay: Relay, queue: RelayQueue, side: RingSide, snapshot: RingSnapshot): SeenChain[] {
  let rings = firstSeen.get(relay);
  if (rings === undefined) firstSeen.set(relay, rings = new Map());
  const key = `${queue.index} ${side} ${snapshot.layout}`;
  const before = rings.get(key);
  if (!snapshot.consistent) return [];
  const now = performance.now();
  const next = new Map<string, number>();
  const seen = outstandingChains(new RingView(snapshot)).chains.map(({ head, position }): SeenChain => {
    const chain = `${position} ${head}`;
    const since = before?.get(chain);
    next.set(chain, since ?? now);
    return { head, position, ms: since === undefined ? null : Math.round(now - since) };
  });
  rings.set(key, next);
  return seen;
}

async function imageOf(relay: Relay, queue: RelayQueue, side: RingSide): Promise<ImageQueue> {
  const { index, state: mode } = queue;
  try {
    const ring = await copyRing(relay, queue, side);
    return { index, side, mode, ring, seen: note(relay, queue, side, ring) };
  } catch (error) {
    const { code, message } = toErrorRecord(error);
    return { index, side, mode, error: { code, message }, seen: [] };
  }
}

function wantedSides(params: Record<string, unknown>): readonly RingSide[] {
  const side = params.side ?? "both";
  if (side === "both") return ["guest", "shadow"];
  if (side === "guest" || side === "shadow") return [side];
  throw new SvqError("BAD_PARAMETER", `"${side}" is no side: guest, shadow or both`, { exitCode: EXIT.usage });
}

function wantedQueues(relay: Relay, params: Record<string, unknown>): readonly RelayQueue[] {
  const { queues } = params;
  const set = relay.queues.filter(({ num, addresses }) => num > 0 && addresses !== undefined);
  if (queues === undefined) return set;
  if (!Array.isArray(queues)) throw new SvqError("BAD_PARAMETER", "queues is a list of numbers", { exitCode: EXIT.usage });
  return queues.map((index) => {
    const queue = set.find((candidate) => candidate.index === index);
    if (queue !== undefined) return queue;
    const there = set.map((candidate) => candidate.index).join(", ") || "none";
    throw new SvqError("NO_SUCH_QUEUE", `Queue ${index} is not set up; these are: ${there}`, { exitCode: EXIT.noDevice });
  });
}

/**
 * The control method `vrings`: copies of the rings that the front-end has set up, as an image (see src/vring/image.ts). A
 * queue that cannot be read has an error in the place of its ring.
 *
 * @param name of the relay
 * @param params `queues` (list of indices), `side` (`guest`, `shadow` or `both`; only the modes
 * `shadow` and `used` have a shadow side)
 * @throws SvqError BAD_PARAMETER, NO_SUCH_QUEUE
 */
export async function relayVrings(name: string, relay: Relay, params: Record<string, unknown>): Promise<Record<string, unknown>> {
  const sides = wantedSides(params);
  const queues: ImageQueue[] = [];
  for (const queue of wantedQueues(relay, params)) {
    for (const side of sides) {
      if (side === "shadow" && !hasShadow(relay, queue)) continue;
      // A control queue that the relay drives by itself has no ring of a guest's.
      if (side === "guest" && queue.alone) continue;
      queues.push(await imageOf(relay, queue, side));
    }
  }
  return encodeImage({ created: new Date().toISOString(), relay: name, queues });
}
