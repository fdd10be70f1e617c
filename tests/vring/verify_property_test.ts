import assert from "node:assert/strict";
import fc from "fast-check";
import { outstandingChains, RingView } from "../../src/vring/inspect.ts";
import { dumpRing } from "../../src/vring/dump.ts";
import type { DeviceQueue, DriverQueue } from "../../src/vring/queue.ts";
import { NO_POSITIONS, type RingPositions, type RingSnapshot, snapshotRing } from "../../src/vring/snapshot.ts";
import { verifyRing } from "../../src/vring/verify.ts";
import { type Moment, run, steps } from "./model.ts";
import { packedRig, packedShapes, type RingRig, splitRig, splitShapes, TABLE } from "./rigs.ts";

interface Shape {
  num: number;
  eventIdx: boolean;
  indirect: boolean;
  inOrder: boolean;
}

function positions(driver: DriverQueue, device: DeviceQueue): RingPositions {
  let lastUsed: number | null = null;
  try {
    lastUsed = driver.save().used;
  } catch { /* in the middle of a batch */ }
  if (device.layout === "split") return { lastAvail: device.base, used: null, lastUsed };
  return { lastAvail: device.base & 0xffff, used: device.base >>> 16, lastUsed };
}

function snapshot(shape: Shape, rig: RingRig, known: () => RingPositions): RingSnapshot {
  return snapshotRing({
    ...rig.place,
    layout: rig.driver.layout,
    eventIdx: shape.eventIdx,
    indirect: shape.indirect,
    inOrder: shape.inOrder,
    tableMemory: rig.memory,
    positions: known,
  });
}

/** Looks at the ring after each step, knowing the positions and not knowing them. */
function watch(shape: Shape, rig: RingRig, count: { listed: number; right: number; outstanding: number }) {
  return ({ driver, device, outstanding, taken, settled }: Moment) => {
    for (const known of [() => positions(driver, device), () => NO_POSITIONS]) {
      const copy = snapshot(shape, rig, known);
      assert.ok(copy.consistent);
      assert.deepEqual(verifyRing(copy, { history: settled }), [], settled ? "settled" : "in the middle of a batch");
      if (!settled) continue;
      assert.ok(dumpRing(copy, { all: true }) !== undefined);
      const { chains, count: told } = outstandingChains(new RingView(copy));
      if (told !== null) assert.equal(told, outstanding.length);
      for (const chain of chains) {
        if (chain.certain) assert.ok(outstanding.includes(chain.head), `chain ${chain.head} is out for sure, and is not`);
        if (chain.taken === false) assert.ok(!taken.includes(chain.head), `chain ${chain.head} was taken`);
      }
      if (device.layout === "split") {
        count.outstanding += outstanding.length;
        count.listed += chains.length;
        count.right += chains.filter(({ head }) => outstanding.includes(head)).length;
      }
    }
  };
}

Deno.test("Well-formed split rings break no rule at any moment, and what is outstanding is found", () => {
  const count = { listed: 0, right: 0, outstanding: 0 };
  fc.assert(
    fc.property(
      splitShapes.chain((shape) =>
        fc.tuple(fc.constant(shape), steps(shape.indirect ? Math.max(shape.num, TABLE) : Math.min(shape.num, 5), 2 ** 48))
      ),
      ([shape, schedule]) => {
        const rig = splitRig(shape);
        run({ ...rig, observe: watch(shape, rig, count) }, schedule);
      },
    ),
    { numRuns: 60, seed: 2 },
  );
  assert.ok(count.outstanding > 3000, `only ${count.outstanding} chains were looked at`);
  assert.ok(count.right >= 0.9 * count.outstanding, `${count.right} of ${count.outstanding} chains were found`);
  assert.ok(count.right >= 0.95 * count.listed, `${count.listed - count.right} of ${count.listed} chains were not outstanding`);
});

Deno.test("Well-formed packed rings break no rule at any moment", () => {
  const count = { listed: 0, right: 0, outstanding: 0 };
  fc.assert(
    fc.property(
      packedShapes.chain((shape) =>
        fc.tuple(fc.constant(shape), steps(shape.indirect ? Math.max(shape.num, TABLE) : Math.min(shape.num, 5), 2 ** 48))
      ),
      ([shape, schedule]) => {
        const rig = packedRig(shape);
        run({ ...rig, observe: watch(shape, rig, count) }, schedule);
      },
    ),
    { numRuns: 60, seed: 3 },
  );
});
