/**
 * A model of a virtqueue for property tests: a random schedule of both sides, checked against lists.
 *
 * @module
 */
import assert from "node:assert/strict";
import fc from "fast-check";
import { Chain, type DeviceQueue, type DriverQueue, type Segment } from "../../src/vring/queue.ts";

/** One step of a schedule; numbers are reduced to what is possible at that point. */
export type Step =
  | { op: "add"; readable: Segment[]; writable: Segment[] }
  | { op: "publish" }
  | { op: "pop"; count: number }
  | { op: "unpop" }
  | { op: "push"; pick: number; written: number }
  | { op: "flush" }
  | { op: "take"; count: number }
  | { op: "suppress"; side: "driver" | "device"; on: boolean }
  | { op: "migrate"; side: "driver" | "device" };

function segments(space: number): fc.Arbitrary<Segment> {
  return fc.record({ address: fc.integer({ min: 1, max: space - 70000 }), length: fc.integer({ min: 1, max: 60000 }) });
}

/** Random steps; chains of at most `longest` segments whose addresses lie below `space`. */
export function steps(longest: number, space: number): fc.Arbitrary<Step[]> {
  const add = fc.record({
    op: fc.constant("add" as const),
    readable: fc.array(segments(space), { maxLength: longest }),
    writable: fc.array(segments(space), { maxLength: longest }),
  }).map((step) => {
    const writable = step.writable.slice(0, longest - step.readable.length);
    const readable = step.readable.length + writable.length === 0 ? [{ address: 64, length: 1 }] : step.readable;
    return { ...step, readable, writable };
  });
  const step: fc.Arbitrary<Step> = fc.oneof(
    { weight: 6, arbitrary: add },
    { weight: 3, arbitrary: fc.constant({ op: "publish" as const }) },
    { weight: 4, arbitrary: fc.record({ op: fc.constant("pop" as const), count: fc.integer({ min: 1, max: 5 }) }) },
    { weight: 1, arbitrary: fc.constant({ op: "unpop" as const }) },
    {
      weight: 6,
      arbitrary: fc.record({ op: fc.constant("push" as const), pick: fc.nat({ max: 100 }), written: fc.nat({ max: 200000 }) }),
    },
    { weight: 3, arbitrary: fc.constant({ op: "flush" as const }) },
    { weight: 4, arbitrary: fc.record({ op: fc.constant("take" as const), count: fc.integer({ min: 1, max: 5 }) }) },
    {
      weight: 2,
      arbitrary: fc.record({
        op: fc.constant("suppress" as const),
        side: fc.constantFrom("driver" as const, "device" as const),
        on: fc.boolean(),
      }),
    },
    {
      weight: 1,
      arbitrary: fc.record({ op: fc.constant("migrate" as const), side: fc.constantFrom("driver" as const, "device" as const) }),
    },
  );
  return fc.array(step, { minLength: 40, maxLength: 250, size: "max" });
}

interface Sent {
  id: number;
  readable: Segment[];
  writable: Segment[];
  written: number;
}

/** Both sides of a ring, and how to make each anew over the same memory (for save and restore). */
export interface Rig {
  driver: DriverQueue;
  device: DeviceQueue;
  remake(side: "driver" | "device"): DriverQueue | DeviceQueue;
  inOrder: boolean;
  /** Segments that a chain may have. */
  longest: number;
  /** Called after each step. */
  observe?: (moment: Moment) => void;
}

/** Where a schedule stands. */
export interface Moment {
  driver: DriverQueue;
  device: DeviceQueue;
  /** Ids that were published and have not been returned. */
  outstanding: number[];
  /** Ids among them that the device has taken. */
  taken: number[];
  /** Neither side has written anything that it has not published. */
  settled: boolean;
}

/** Runs a schedule, then drains. Fails on any lost, repeated, altered or wrongly ordered chain, and on a missed wake-up. */
export function run(rig: Rig, schedule: readonly Step[]): { done: number } {
  const added: Sent[] = [];
  const visible: Sent[] = [];
  const held: Sent[] = [];
  const pushed: Sent[] = [];
  const returned: Sent[] = [];
  const chain = new Chain(rig.longest);
  const total = (list: readonly Segment[]) => list.reduce((sum, { length }) => sum + length, 0);
  let { driver, device } = rig;
  let canUnpop = false;
  let done = 0;
  // A side that has asked for notifications and found nothing sleeps: then the other one must wake it.
  const asleep = { driver: false, device: false };
  const publish = () => {
    const kick = driver.publish();
    if (asleep.device && added.length > 0) assert.ok(kick, "the device sleeps and was not kicked");
    if (kick) asleep.device = false;
    visible.push(...added.splice(0));
  };
  const flush = () => {
    const before = returned.length;
    const call = device.flush();
    release();
    if (asleep.driver && returned.length > before) assert.ok(call, "the driver sleeps and was not called");
    if (call) asleep.driver = false;
  };
  const release = () => {
    if (!rig.inOrder) return void returned.push(...pushed.splice(0));
    while (held.length > 0 && pushed.includes(held[0]!)) {
      const sent = held.shift()!;
      pushed.splice(pushed.indexOf(sent), 1);
      returned.push(sent);
    }
  };
  const pop = () => {
    const got = device.pop(chain);
    assert.equal(got, visible.length > 0, "pop finds a chain exactly when one is visible");
    if (!got) return false;
    const sent = visible.shift()!;
    canUnpop = true;
    assert.equal(chain.id, sent.id);
    const expected = [...sent.readable, ...sent.writable];
    assert.equal(chain.count, expected.length);
    assert.equal(chain.readableCount, sent.readable.length);
    assert.equal(chain.readableBytes, total(sent.readable));
    assert.equal(chain.writableBytes, total(sent.writable));
    for (const [i, { address, length }] of expected.entries()) {
      assert.equal(chain.addresses[i], address);
      assert.equal(chain.lengths[i], length);
    }
    held.push(sent);
    return true;
  };
  const push = (pick: number, written: number) => {
    const open = held.filter((sent) => !pushed.includes(sent));
    const sent = open[pick % open.length];
    if (sent === undefined) return;
    canUnpop = false;
    sent.written = Math.min(written, total(sent.writable));
    device.push(sent.id, sent.written);
    pushed.push(sent);
    if (!rig.inOrder) held.splice(held.indexOf(sent), 1);
  };
  const take = () => {
    const id = driver.take();
    const sent = returned.shift();
    if (sent === undefined) {
      assert.equal(id, -1, "take finds nothing where nothing was returned");
      return false;
    }
    assert.equal(id, sent.id, "take finds the chains in the order in which they were used");
    if (sent.writable.length > 0) assert.equal(driver.usedLength, sent.written);
    done++;
    return true;
  };
  const step = (step: Step) => {
    switch (step.op) {
      case "add": {
        const free = driver.numFree;
        const id = driver.add(step.readable, step.writable);
        if (id < 0) return void assert.ok(free < step.readable.length + step.writable.length);
        assert.ok(id < driver.num && driver.numFree < free);
        for (const list of [added, visible, held, returned, pushed]) assert.ok(list.every((sent) => sent.id !== id), "an id is out twice");
        added.push({ id, readable: step.readable, writable: step.writable, written: 0 });
        return;
      }
      case "publish":
        return publish();
      case "pop":
        for (let i = 0; i < step.count && pop(); i++);
        return;
      case "unpop":
        if (!canUnpop) return;
        canUnpop = false;
        device.unpop();
        visible.unshift(held.pop()!);
        return;
      case "push":
        return push(step.pick, step.written);
      case "flush":
        return flush();
      case "take":
        for (let i = 0; i < step.count && take(); i++);
        return;
      case "suppress":
        if (step.side === "device") {
          asleep.device = false;
          if (!step.on) return device.disableKicks();
          const more = device.enableKicks();
          assert.equal(more, visible.length > 0, "enableKicks reports what arrived");
          asleep.device = !more;
        } else {
          asleep.driver = false;
          if (!step.on) return driver.disableCalls();
          const more = driver.enableCalls();
          assert.equal(more, returned.length > 0, "enableCalls reports what arrived");
          asleep.driver = !more;
        }
        return;
      case "migrate":
        if (step.side === "device") {
          flush();
          const state = JSON.parse(JSON.stringify(device.save()));
          device = rig.remake("device") as DeviceQueue;
          device.restore(state);
          assert.deepEqual(device.save(), state);
          canUnpop = false;
        } else {
          publish();
          while (take());
          const state = JSON.parse(JSON.stringify(driver.save()));
          driver = rig.remake("driver") as DriverQueue;
          driver.restore(state);
          assert.deepEqual(driver.save(), state);
        }
    }
  };
  const ids = (list: readonly Sent[]) => list.map(({ id }) => id);
  for (const next of schedule) {
    step(next);
    // With IN_ORDER `held` keeps what is done and waits for its turn.
    const taken = rig.inOrder ? ids(held) : ids([...held, ...pushed]);
    rig.observe?.({
      driver,
      device,
      outstanding: [...ids(visible), ...taken],
      taken,
      settled: added.length === 0 && pushed.every((sent) => held.includes(sent)) && !(rig.inOrder && pushed.includes(held[0]!)),
    });
  }
  publish();
  while (pop());
  while (held.some((sent) => !pushed.includes(sent))) push(0, 7);
  flush();
  while (take());
  assert.equal(device.inflight, 0);
  assert.equal(driver.numFree, driver.num, "every descriptor came back");
  assert.equal(driver.inflight, 0);
  return { done };
}
