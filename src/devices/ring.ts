/**
 * Rings in guest memory, seen from the device's side.
 *
 * @module
 */
import type { RangeTable } from "../memory/range_table.ts";
import { hasBit } from "../uapi/bits.ts";
import { VIRTIO_FEATURE_BITS } from "../uapi/virtio.ts";
import { packedLayout, type RingLayout, splitLayout } from "../vring/layout.ts";
import { completePackedBase, PackedDevice } from "../vring/packed.ts";
import type { DeviceQueue, RingMemory } from "../vring/queue.ts";
import { SplitDevice } from "../vring/split.ts";
import type { VringAddresses } from "../vhost/backend.ts";

/** Guest memory whose table can be exchanged under a ring that uses it. */
export class CurrentMemory implements RingMemory {
  /** Starts with `table`, which the owner may replace. */
  constructor(public table: RangeTable) {}

  /** See {@linkcode RangeTable.contains}. */
  contains(address: number, length: number): boolean {
    return this.table.contains(address, length);
  }

  /** See {@linkcode RangeTable.buffer}. @throws SvqError OUTSIDE_MEMORY */
  buffer(address: number, length: number): ArrayBuffer {
    return this.table.buffer(address, length);
  }

  /** See {@linkcode RangeTable.readWords}. */
  readWords(address: number, target: Uint32Array, count: number): boolean {
    return this.table.readWords(address, target, count);
  }
}

/** What makes a ring: its size, place and the features that shape it. */
export interface RingPlace {
  /** Descriptors. */
  num: number;
  /** Where its parts lie in guest memory. */
  addresses: VringAddresses;
  /** Negotiated features. */
  features: bigint;
}

function layoutOf(place: RingPlace): RingLayout {
  return hasBit(place.features, VIRTIO_FEATURE_BITS.RING_PACKED) ? packedLayout(place.num) : splitLayout(place.num);
}

/** Where the three parts of a ring are in this process. @throws SvqError OUTSIDE_MEMORY */
export function locateRing(place: RingPlace, table: RangeTable): number[] {
  const { desc, avail, used } = layoutOf(place);
  const { addresses } = place;
  return [
    table.addressOf(addresses.desc, desc.size),
    table.addressOf(addresses.avail, avail.size),
    table.addressOf(addresses.used, used.size),
  ];
}

/**
 * The device's side of a ring.
 *
 * @param base as in SET_VRING_BASE
 * @throws SvqError OUTSIDE_MEMORY; VringError for sizes, alignments and indices that no ring has
 */
export function openRing(place: RingPlace, memory: CurrentMemory, base: number): DeviceQueue {
  const { num, addresses, features } = place;
  const { desc, avail, used } = layoutOf(place);
  const options = {
    num,
    memory,
    desc: { buffer: memory.buffer(addresses.desc, desc.size) },
    avail: { buffer: memory.buffer(addresses.avail, avail.size) },
    used: { buffer: memory.buffer(addresses.used, used.size) },
    eventIdx: hasBit(features, VIRTIO_FEATURE_BITS.EVENT_IDX),
    indirect: hasBit(features, VIRTIO_FEATURE_BITS.INDIRECT_DESC),
    inOrder: hasBit(features, VIRTIO_FEATURE_BITS.IN_ORDER),
  };
  if (hasBit(features, VIRTIO_FEATURE_BITS.RING_PACKED)) return new PackedDevice({ ...options, base: completePackedBase(base, num) });
  return new SplitDevice({ ...options, base });
}
