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
  /**
   * Asked for memory that the table does not have: may replace the table by one with more in it, and says whether it did.
   * The ranges of the old table must stay where they are.
   */
  fault: ((address: number, length: number) => boolean) | undefined;

  /** Starts with `table`, which the owner may replace. */
  constructor(public table: RangeTable) {}

  /** See {@linkcode RangeTable.contains}. */
  contains(address: number, length: number): boolean {
    if (this.table.contains(address, length)) return true;
    return this.fault !== undefined && this.fault(address, length) && this.table.contains(address, length);
  }

  /** See {@linkcode RangeTable.buffer}. @throws SvqError OUTSIDE_MEMORY */
  buffer(address: number, length: number): ArrayBuffer {
    this.contains(address, length);
    return this.table.buffer(address, length);
  }

  /** See {@linkcode RangeTable.readWords}. */
  readWords(address: number, target: Uint32Array, count: number): boolean {
    if (this.table.readWords(address, target, count)) return true;
    return this.contains(address, count * 4) && this.table.readWords(address, target, count);
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
export function locateRing(place: RingPlace, memory: CurrentMemory): number[] {
  const { desc, avail, used } = layoutOf(place);
  const { addresses } = place;
  const parts = [[addresses.desc, desc.size], [addresses.avail, avail.size], [addresses.used, used.size]] as const;
  return parts.map(([address, size]) => {
    memory.contains(address, size);
    return memory.table.addressOf(address, size);
  });
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
