import assert from "node:assert/strict";
import { MessageLog } from "../../src/relay/message_log.ts";
import { encodeU64 } from "../../src/uapi/vhost.ts";
import { FLAG, REQUEST } from "../../src/uapi/vhost_user.ts";

Deno.test("the newest messages are kept, with who sent them, and read on from a number", () => {
  const log = new MessageLog();
  const [front, device] = [log.hook("front"), log.hook("device")];
  front("in", REQUEST.SET_FEATURES, FLAG.VERSION | FLAG.NEED_REPLY, encodeU64(5n), 0, "front-end");
  device("out", REQUEST.SET_FEATURES, FLAG.VERSION, encodeU64(5n), 0, "front-end");
  device("in", REQUEST.SET_FEATURES, FLAG.VERSION | FLAG.REPLY, encodeU64(0n), 0, "front-end");
  front("out", REQUEST.SET_FEATURES, FLAG.VERSION | FLAG.REPLY, encodeU64(0n), 0, "front-end");
  assert.deepEqual(
    log.since(0).map(({ seq, side, from, reply, need_reply }) => [seq, side, from, reply, need_reply]),
    [[1, "front", "vmm", false, true], [2, "device", "relay", false, false], [3, "device", "device", true, false], [
      4,
      "front",
      "relay",
      true,
      false,
    ]],
  );
  assert.deepEqual(log.since(3).map(({ fields }) => fields), [{ ack: 0 }]);
  for (let i = 0; i < 9000; i++) front("in", REQUEST.GET_FEATURES, FLAG.VERSION, new Uint8Array(0), 0, "front-end");
  const kept = log.since(0);
  assert.deepEqual([kept.length, kept[0]!.seq, kept.at(-1)!.seq, log.last], [8192, 813, 9004, 9004]);
});

Deno.test("who waits for a message is woken by it, or by the time", async () => {
  const log = new MessageLog();
  await log.wait(0, 5);
  const waiting = log.wait(0, 60_000);
  log.hook("front")("in", REQUEST.GET_FEATURES, FLAG.VERSION, new Uint8Array(0), 0, "front-end");
  await waiting;
  await log.wait(0, 60_000);
});
