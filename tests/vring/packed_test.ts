import assert from "node:assert/strict";
import fc from "fast-check";
import { packedBase, PackedDevice, type PackedDeviceOptions, PackedDriver, type PackedDriverOptions } from "../../src/vring/packed.ts";
import { FlatMemory, packedPlace } from "../support/ring_memory.ts";
import { type Rig, run, steps } from "./model.ts";

interface Shape {
  num: number;
  eventIdx: boolean;
  indirect: boolean;
  inOrder: boolean;
  base: number;
}

const shapes: fc.Arbitrary<Shape> = fc.record({
  num: fc.constantFrom(1, 2, 3, 5, 7, 8, 13),
  eventIdx: fc.boolean(),
  indirect: fc.boolean(),
  inOrder: fc.boolean(),
  base: fc.constantFrom(0x8000, 0x0000),
});

const TABLE = 6;

/** Both sides of a fresh split ring. */
function rig(shape: Shape): Rig & { driver: PackedDriver; device: PackedDevice } {
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
    longest: shape.indirect ? Math.max(num, TABLE) : num,
  };
}

Deno.test("A packed ring loses, repeats and alters no chain and misses no wake-up, whatever both sides do", () => {
  let done = 0;
  fc.assert(
    fc.property(
      shapes.chain((shape) =>
        fc.tuple(fc.constant(shape), steps(shape.indirect ? Math.max(shape.num, TABLE) : Math.min(shape.num, 5), 2 ** 48))
      ),
      ([shape, schedule]) => void (done += run(rig(shape), schedule).done),
    ),
    { numRuns: 300, seed: 1 },
  );
  assert.ok(done > 1500, `only ${done} chains went through`);
});
