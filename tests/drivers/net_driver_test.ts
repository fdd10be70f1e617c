import assert from "node:assert/strict";
import fc from "fast-check";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { openDevice } from "../../src/devices/open.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { NetStreams } from "../../src/drivers/net_streams.ts";
import { NetWorkload } from "../../src/drivers/net_workload.ts";
import { newCounters } from "../../src/drivers/report.ts";
import { RamLayout } from "../../src/drivers/layout.ts";
import { copyFile, type OwnedFd } from "../support/net_ram.ts";
import { Chain } from "../../src/vring/queue.ts";

Deno.test("Every frame sent into a loop comes back once, in order and unharmed", async () => {
  await using device = await openDevice("sim:net,cable=loop");
  await using driver = await EmbeddedDriver.open(device, { depth: 16, num: 64 });
  const report = await driver.run({ requests: 3000 });
  assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.outOfOrder, report.missedCalls], [0, 0, 0, 0, 0]);
  assert.deepEqual([report.net!.sent, report.net!.received, report.net!.missing], [3000, 3000, 0]);
  assert.equal(report.completed, 3000);
});

Deno.test("Several queue pairs are set by the control queue, and packed rings carry frames too", async () => {
  await using device = await SimDevice.open({ kind: "net", queues: 9, cable: "loop", packed: true });
  await using driver = await EmbeddedDriver.open(device, { queues: 2, depth: 16, num: 64, packed: true });
  assert.deepEqual((await device.netState()).steering, [{ pairs: 2 }]);
  const report = await driver.run({ requests: 500 });
  assert.deepEqual([report.lost, report.duplicated, report.corrupted], [0, 0, 0]);
  assert.ok(await driver.control({ name: "VLAN_ADD", vlan: 3 }));
  assert.ok(!await driver.control({ name: "VQ_PAIRS_SET", pairs: 5 }));
});

Deno.test("A probe stream keeps its rate and tells the longest gap", async () => {
  await using device = await SimDevice.open({ kind: "net", cable: "loop" });
  await using driver = await EmbeddedDriver.open(device, { rate: 200 });
  const running = driver.run({ durationMs: 1500 });
  await waitFor(async () => (await driver.report()).net!.received >= 20);
  // The receive ring stands still for a while: nothing is lost, and the gap shows.
  const base = await device.getVringBase(0);
  const stopped = performance.now();
  await waitFor(async () => performance.now() - stopped > 150 && (await driver.report()).net!.sent >= 40);
  const gap = performance.now() - stopped;
  await device.setVringBase(0, base);
  await device.setVringKick(0, null);
  const { net, lost, outOfOrder } = await running;
  assert.equal(lost + outOfOrder, 0);
  assert.ok(net!.longestGapMs >= 140 && net!.longestGapMs < gap + 1000, `a gap of ${net!.longestGapMs} ms instead of about ${gap}`);
  assert.ok(net!.sent <= 320, `${net!.sent} frames in 1.5 s at 200 per second`);
});

async function waitFor(condition: () => Promise<boolean>): Promise<void> {
  const end = performance.now() + 10_000;
  while (!await condition()) assert.ok(performance.now() < end, "waited too long");
}

Deno.test("Two drivers at the ends of a cable hear each other's streams", async () => {
  await using a = await SimDevice.open({ kind: "net", cable: "two drivers" });
  await using b = await SimDevice.open({ kind: "net", cable: "two drivers" });
  await using sender = await EmbeddedDriver.open(a, { echo: false, seed: 7 });
  await using hearer = await EmbeddedDriver.open(b, { echo: false, seed: 8 });
  await hearer.unpause();
  const report = await sender.run({ requests: 400 });
  assert.deepEqual([report.net!.sent, report.net!.received], [400, 0]);
  await waitFor(async () => (await hearer.report()).net!.received === 400);
  assert.equal((await hearer.report()).net!.missing, 0);
});

Deno.test("A driver goes on at another device with its frames counted on", async () => {
  await using a = await SimDevice.open({ kind: "net", cable: "loop" });
  const first = await EmbeddedDriver.open(a, { rate: 500 });
  const run = first.run({ requests: 200 });
  run.catch(() => {});
  await waitFor(async () => (await first.report()).net!.received >= 50);
  await first.pause();
  // What is on the cable would be lost with it: wait until the device has delivered it.
  await waitFor(async () => {
    const counts = await a.netCounters();
    return counts[0]!.frames === counts[1]!.frames;
  });
  const state = await first.exportState();
  const ram: OwnedFd = copyFile(first.ram, first.layout.options.ramSize);
  await first.close();
  await using b = await SimDevice.open({ kind: "net", cable: "loop" });
  await using second = await EmbeddedDriver.resume(b, ram, state);
  const { net, lost, duplicated, corrupted } = await second.finished();
  assert.deepEqual([lost, duplicated, corrupted], [0, 0, 0]);
  assert.deepEqual([net!.sent, net!.received], [200, 200]);
});

Deno.test("Lost, repeated and overtaken frames are told apart, whatever their order", () => {
  fc.assert(
    fc.property(fc.array(fc.nat(60), { maxLength: 80 }), (sequences) => {
      const streams = new NetStreams();
      const seen = new Set<number>();
      let highest = -1;
      for (const sequence of sequences) {
        const expected = seen.has(sequence) ? "duplicate" : sequence > highest ? "new" : "late";
        assert.equal(streams.arrive(5, sequence, 0), expected);
        seen.add(sequence);
        highest = Math.max(highest, sequence);
      }
      assert.equal(streams.missing, highest + 1 - seen.size);
      const other = new NetStreams();
      other.restore(streams.save());
      assert.equal(other.missing, streams.missing);
      for (let i = 0; i <= 60; i++) assert.equal(other.arrive(5, i, 0), streams.arrive(5, i, 0));
    }),
    { numRuns: 200, seed: 20261122 },
  );
});

Deno.test("A frame with one wrong bit is corrupted, whichever bit it is", () => {
  const options = { ramSize: 1 << 22, queues: 2, num: 16, depth: 4, packed: false };
  const layout = new RamLayout(options);
  const buffer = new ArrayBuffer(options.ramSize);
  const bytes = new Uint8Array(buffer);
  const counters = newCounters();
  const workload = new NetWorkload(
    { layout, bytes, words: new Int32Array(buffer), log: undefined },
    { stream: 1, size: 128, rate: 0, echo: true, pairs: 1, control: false, controlIndex: 2, mac: "52:54:00:00:00:01" },
    { counters, fault: () => {} },
  );
  const chain = new Chain(8);
  const frame = layout.blockOffset(4) + 2;
  const receive = (flip?: number) => {
    assert.ok(workload.prepare(0, chain));
    bytes.copyWithin(layout.blockOffset(0) + 2, frame, frame + 12 + 126);
    if (flip !== undefined) bytes[layout.blockOffset(0) + 2 + 12 + 14 + (flip >> 3)]! ^= 1 << (flip & 7);
    workload.finish(0, 12 + 126);
  };
  assert.ok(workload.prepare(4, chain));
  for (let bit = 0; bit < 112 * 8; bit += 13) receive(bit);
  assert.equal(counters.corrupted, Math.ceil(112 * 8 / 13));
  assert.equal(counters.verified, 0);
  receive();
  receive();
  assert.deepEqual([counters.verified, counters.duplicated, workload.lost], [2, 1, 0]);
});
