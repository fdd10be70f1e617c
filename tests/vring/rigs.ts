/**
 * Both sides of random rings over one memory, for the model's schedules.
 *
 * @module
 */
import fc from "fast-check";
import { packedBase, PackedDevice, type PackedDeviceOptions, PackedDriver, type PackedDriverOptions } from "../../src/vring/packed.ts";
import type { RingMemory } from "../../src/vring/queue.ts";
import { SplitDevice, type SplitDeviceOptions, SplitDriver, type SplitDriverOptions } from "../../src/vring/split.ts";
import { FlatMemory, packedPlace, type RingPlace, splitPlace } from "../support/ring_memory.ts";
import type { Rig } from "./model.ts";

/** A rig, and where its ring lies. */
export interface RingRig extends Rig {
  memory: RingMemory;
  place: RingPlace;
}

/** What a split ring is made of. */
export interface SplitShape {
  num: number;
  eventIdx: boolean;
  indirect: boolean;
  inOrder: boolean;
  base: number;
  skew: number;
}

/** Random ones. */
export const splitShapes: fc.Arbitrary<SplitShape> = fc.record({
  num: fc.constantFrom(1, 2, 4, 8, 16),
  eventIdx: fc.boolean(),
  indirect: fc.boolean(),
  inOrder: fc.boolean(),
  base: fc.constantFrom(0, 1, 0x7fff, 0xfff0, 0xffff),
  skew: fc.constantFrom(0, 2),
});

/** Entries of an indirect table. */
export const TABLE = 6;

/** Both sides of a fresh split ring. */
export function splitRig(shape: SplitShape): RingRig & { driver: SplitDriver; device: SplitDevice } {
  const { num, eventIdx, inOrder, base } = shape;
  const memory = new FlatMemory(1 << 20, 0x1_0000_0000);
  const place = splitPlace(memory, num, shape.skew);
  const area = memory.alloc(num * TABLE * 16);
  memory.view.setUint16(place.avail.byteOffset + 2, base, true);
  memory.view.setUint16(place.used.byteOffset + 2, base, true);
  const common = { ...place, eventIdx, inOrder, base };
  const driverOptions: SplitDriverOptions = shape.indirect
    ? { ...common, indirect: { buffer: memory.bytes.buffer, byteOffset: area, address: memory.base + area, entries: TABLE } }
    : common;
  // Bounds are for other tests: here every address is memory.
  const all = { contains: () => true, buffer: (address: number, length: number) => memory.buffer(address, length) };
  const deviceOptions: SplitDeviceOptions = { ...common, indirect: shape.indirect, memory: all };
  const remake = (side: "driver" | "device") => {
    if (side === "driver") return new SplitDriver(driverOptions);
    return new SplitDevice({ ...deviceOptions, base: memory.view.getUint16(place.used.byteOffset + 2, true) });
  };
  return {
    driver: new SplitDriver(driverOptions),
    device: new SplitDevice(deviceOptions),
    remake,
    inOrder,
    memory: all,
    place,
    longest: shape.indirect ? Math.max(num, TABLE) : num,
  };
}

/** What a packed ring is made of. */
export interface PackedShape {
  num: number;
  eventIdx: boolean;
  indirect: boolean;
  inOrder: boolean;
  base: number;
}

/** Random ones. */
export const packedShapes: fc.Arbitrary<PackedShape> = fc.record({
  num: fc.constantFrom(1, 2, 3, 5, 7, 8, 13),
  eventIdx: fc.boolean(),
  indirect: fc.boolean(),
  inOrder: fc.boolean(),
  base: fc.constantFrom(0x8000, 0x0000),
});

/** Both sides of a fresh packed ring. */
export function packedRig(shape: PackedShape): RingRig & { driver: PackedDriver; device: PackedDevice } {
  const { num, eventIdx, inOrder, base } = shape;
  const memory = new FlatMemory(1 << 20, 0x1_0000_0000);
  const place = packedPlace(memory, num);
  const area = memory.alloc(num * TABLE * 16);
  // A ring that was used before, all of it in the lap before this one.
  const stale = base === 0 ? 0x8080 : 0;
  for (let slot = 0; slot < num; slot++) memory.packedDesc(place.desc.byteOffset, slot, 0, 0, 0, stale);
  const common = { ...place, eventIdx, inOrder, base: packedBase(base, base) };
  const driverOptions: PackedDriverOptions = shape.indirect
    ? { ...common, indirect: { buffer: memory.bytes.buffer, byteOffset: area, address: memory.base + area, entries: TABLE } }
    : common;
  // Bounds are for other tests: here every address is memory.
  const all = { contains: () => true, buffer: (address: number, length: number) => memory.buffer(address, length) };
  const deviceOptions: PackedDeviceOptions = { ...common, indirect: shape.indirect, memory: all };
  const remake = (side: "driver" | "device") => {
    if (side === "driver") return new PackedDriver(driverOptions);
    return new PackedDevice(deviceOptions);
  };
  return {
    driver: new PackedDriver(driverOptions),
    device: new PackedDevice(deviceOptions),
    remake,
    inOrder,
    memory: all,
    place,
    longest: shape.indirect ? Math.max(num, TABLE) : num,
  };
}
