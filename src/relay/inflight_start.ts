/**
 * What both relay cores do to begin with a record of what is in flight, and to take up what a relay before them had taken.
 *
 * @module
 */
import { bufferAt } from "../ffi/mod.ts";
import { type InflightChains, type InflightLog, PackedInflight, SplitInflight } from "../vring/inflight.ts";
import { DESC_BYTES } from "../vring/layout.ts";
import { completePackedBase } from "../vring/packed.ts";
import type { DataPath } from "./core.ts";
import type { QueueStart } from "./messages.ts";

/** The record of a queue, begun; undefined where the front-end has given no region. */
export function openInflight(start: QueueStart, path: DataPath): InflightLog | undefined {
  if (start.inflight === undefined) return undefined;
  const { num, packed } = start.guest;
  const part = { buffer: bufferAt(start.inflight.address, start.inflight.size) };
  const chains = start.resume ?? { ids: [], used: usedPosition(start, path), entries: [] };
  return packed ? new PackedInflight(part, num, chains) : new SplitInflight(part, num, chains);
}

// Where the guest's used ring goes on.
function usedPosition({ guest: { packed, num, desc, used }, guestBase }: QueueStart, path: DataPath): number {
  if (packed) return completePackedBase(guestBase, num, new Uint16Array(path.memory.buffer(desc, DESC_BYTES * num))) >>> 16;
  return Atomics.load(new Uint16Array(path.memory.buffer(used, 4)), 1);
}

/** An avail ring of `num` that offers what was in flight in a split ring. */
export function availRingOf({ ids }: InflightChains, num: number): Uint16Array<ArrayBuffer> {
  const ring = new Uint16Array(2 + num);
  ring[1] = ids.length;
  ring.set(ids, 2);
  return ring;
}

/** A packed ring of `num` in its first lap that offers what was in flight. */
export function packedRingOf({ ids, entries, descriptors }: InflightChains, num: number): Uint8Array<ArrayBuffer> {
  const ring = new Uint8Array(num * DESC_BYTES);
  const view = new DataView(ring.buffer);
  let slot = 0;
  entries.forEach((chain, i) =>
    chain.forEach(() => {
      const [address, length, flags] = descriptors[slot]!;
      const at = DESC_BYTES * slot++;
      view.setBigUint64(at, BigInt(address), true);
      view.setUint32(at + 8, length, true);
      view.setUint16(at + 12, ids[i]!, true);
      view.setUint16(at + 14, (flags & ~(1 << 7 | 1 << 15)) | 1 << 7, true);
    })
  );
  return ring;
}
