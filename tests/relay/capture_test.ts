import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import type { CapturedFrame } from "../../src/net/pcapng.ts";
import { CaptureBuffer } from "../../src/relay/capture.ts";
import { DEFAULT_RELAY_CONFIG, Relay } from "../../src/relay/relay.ts";
import { waitUntil } from "../support/wait.ts";

Deno.test("A buffer gives back what was written, in order, and says how much it had no room for", () => {
  const writer = new CaptureBuffer(1 << 12);
  const reader = new CaptureBuffer(writer.shared);
  let sent = 0;
  let next = 0;
  let missed = 0;
  let dropped = 0;
  for (let round = 0; round < 200; round++) {
    for (let i = 0; i < round % 7; i++) {
      const length = 60 + (sent * 37) % 900;
      const frame = new Uint8Array(length).fill(sent & 0xff);
      if (writer.write(sent % 4, 1000.5 + sent, length + 4, frame, missed)) missed = 0;
      else missed++;
      sent++;
    }
    for (const frame of reader.read(round % 3 === 0 ? 500 : undefined)) {
      dropped += frame.dropped;
      next += frame.dropped;
      assert.deepEqual([frame.queue, frame.length, frame.bytes.length], [next % 4, 64 + (next * 37) % 900, 60 + (next * 37) % 900]);
      assert.ok(frame.bytes.every((byte) => byte === (next & 0xff)));
      assert.equal(frame.timeNs, BigInt(1000_500_000 + next * 1_000_000));
      next++;
    }
  }
  for (const frame of reader.read()) {
    dropped += frame.dropped;
    next += 1 + frame.dropped;
  }
  assert.equal(next + missed, sent);
  assert.ok(dropped > 0 && next > 100, `${dropped} dropped of ${sent}`);
});

// What a workload's frame says of itself: its number.
function sequenceOf({ bytes }: CapturedFrame): number {
  const at = 14 + (bytes.length - 14) % 4;
  return new DataView(bytes.buffer, bytes.byteOffset).getUint32(at + 8, true);
}

for (const mode of ["passthrough", "shadow"] as const) {
  Deno.test(`Frames are captured in both directions without loss to anybody, and the queues go back to ${mode} afterwards`, async () => {
    await using sim = await SimDevice.open({ kind: "net", cable: "loop", queues: 3 });
    const errors: string[] = [];
    await using relay = new Relay(sim, { ...DEFAULT_RELAY_CONFIG, mode }, { log: () => {}, error: (error) => errors.push(error.message) });
    await using driver = await EmbeddedDriver.open(relay, { queues: 1, depth: 8, num: 32, ramSize: 8 << 20, rate: 2000 });
    const run = driver.run({ drainMs: 5000 });
    run.catch(() => {});
    const modes = () => relay.queues.filter(({ index }) => index < 2).map((queue) => queue.mode);
    await relay.capture.open("me");
    assert.deepEqual(modes(), mode === "shadow" ? ["shadow", "shadow"] : ["used", "used"]);
    await assert.rejects(relay.capture.open("another"), /captured already/);
    const frames: CapturedFrame[] = [];
    await waitUntil("frames", () => {
      frames.push(...relay.capture.read("me"));
      return frames.length > 400;
    });
    await relay.capture.close("another");
    assert.ok(relay.capture.on);
    await relay.capture.close("me");
    assert.deepEqual(modes(), [mode, mode]);
    const report = await driver.stop(5000);
    assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.missedCalls, errors.length], [0, 0, 0, 0, 0]);
    for (const direction of ["in", "out"] as const) {
      const numbers = frames.filter((frame) => frame.direction === direction).map(sequenceOf);
      assert.ok(numbers.length > 100, direction);
      // None is missing between the first and the last one.
      assert.deepEqual(numbers, numbers.map((_, i) => numbers[0]! + i));
    }
    assert.ok(frames.every(({ length, bytes, dropped }) => length === 510 && bytes.length === 510 && dropped === 0));
    assert.ok(frames.every(({ queue, direction }) => queue === (direction === "in" ? 0 : 1)));
  });
}

Deno.test("A reader that does not read costs frames of the capture, which are counted, and none of the guest's", async () => {
  await using sim = await SimDevice.open({ kind: "net", cable: "loop", queues: 3 });
  await using relay = new Relay(sim, { ...DEFAULT_RELAY_CONFIG }, { log: () => {}, error: () => {} });
  await using driver = await EmbeddedDriver.open(relay, { queues: 1, depth: 8, num: 32, ramSize: 8 << 20 });
  await relay.capture.open("me", 64, 4096);
  const run = driver.run({ requests: 500, drainMs: 5000 });
  const report = await run;
  assert.equal(report.lost, 0);
  const frames = relay.capture.read("me");
  assert.ok(frames.length > 10 && frames.every(({ bytes, length }) => bytes.length === 64 && length === 510));
  await waitUntil("all is counted", () => frames.length + relay.capture.dropped === 1000);
});
