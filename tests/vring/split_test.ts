import assert from "node:assert/strict";
import fc from "fast-check";
import { Chain } from "../../src/vring/queue.ts";
import { SplitDevice, type SplitDeviceOptions, SplitDriver, type SplitDriverOptions } from "../../src/vring/split.ts";
import { FlatMemory, splitPlace } from "../support/ring_memory.ts";
import { type Rig, run, steps } from "./model.ts";

interface Shape {
  num: number;
  eventIdx: boolean;
  indirect: boolean;
  inOrder: boolean;
  base: number;
  skew: number;
}

const shapes: fc.Arbitrary<Shape> = fc.record({
  num: fc.constantFrom(1, 2, 4, 8, 16),
  eventIdx: fc.boolean(),
  indirect: fc.boolean(),
  inOrder: fc.boolean(),
  base: fc.constantFrom(0, 1, 0x7fff, 0xfff0, 0xffff),
  skew: fc.constantFrom(0, 2),
});

const TABLE = 6;

/** Both sides of a fresh split ring. */
function rig(shape: Shape): Rig & { driver: SplitDriver; device: SplitDevice } {
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
    longest: shape.indirect ? Math.max(num, TABLE) : num,
  };
}

Deno.test("A split ring loses, repeats and alters no chain and misses no wake-up, whatever both sides do", () => {
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

Deno.test("A split ring runs through the wrap of its 16-bit indices", () => {
  for (const eventIdx of [false, true]) {
    const { driver, device } = rig({ num: 8, eventIdx, indirect: false, inOrder: false, base: 0xff00, skew: 2 });
    const chain = new Chain(8);
    for (let round = 0; round < 70000; round += 3) {
      assert.equal(device.enableKicks(), false);
      assert.equal(driver.enableCalls(), false);
      for (let i = 0; i < 3; i++) driver.add([{ address: 64 + i, length: 1 }], [{ address: 128, length: 2 }]);
      assert.ok(driver.publish());
      const ids = [];
      while (device.pop(chain)) ids.push(chain.id);
      for (const id of ids.reverse()) device.push(id, 1);
      assert.ok(device.flush());
      for (const id of ids) assert.equal(driver.take(), id);
    }
  }
});
