import assert from "node:assert/strict";
import fc from "fast-check";
import { parseIpv4, PING_HEADER_BYTES, PingFrames } from "../../src/drivers/ping_frames.ts";

const OURS = { mac: "52:54:00:00:00:09", address: "10.77.0.9", target: "10.77.0.2" };
const GUEST_MAC = [0x52, 0x54, 0, 0, 0, 1];

function sum(bytes: Uint8Array): number {
  let total = 0;
  for (let i = 0; i < bytes.length; i += 2) total += bytes[i]! << 8 | (bytes[i + 1] ?? 0);
  while (total > 0xffff) total = (total & 0xffff) + (total >>> 16);
  return total;
}

/** What a guest makes of a request: both pairs of addresses change places, and the type. */
function answerOf(request: Uint8Array): Uint8Array {
  const answer = request.slice();
  answer.set(request.subarray(6, 12), 0);
  answer.set(GUEST_MAC, 6);
  answer.set(request.subarray(26, 30), 30);
  answer.set(request.subarray(30, 34), 26);
  answer[34] = 0;
  return answer;
}

Deno.test("an echo request has the lengths and the checksums that RFC 791 and 792 want, whatever it carries", () => {
  fc.assert(
    fc.property(fc.uint8Array({ minLength: 24, maxLength: 1400 }), fc.nat(), fc.nat(), (payload, stream, sequence) => {
      const frame = new Uint8Array(3 + PING_HEADER_BYTES + payload.length).fill(0xaa);
      frame.set(payload, 3 + PING_HEADER_BYTES);
      new PingFrames(OURS).write(frame, 3, payload.length, stream, sequence);
      const sent = frame.subarray(3);
      assert.equal(sent.subarray(12, 14).toHex(), "0800");
      assert.equal(sent[16]! << 8 | sent[17]!, sent.length - 14);
      assert.equal(sum(sent.subarray(14, 34)), 0xffff);
      assert.equal(sum(sent.subarray(34)), 0xffff);
      assert.deepEqual([...sent.subarray(26, 34)], [10, 77, 0, 9, 10, 77, 0, 2]);
      assert.deepEqual([...sent.subarray(PING_HEADER_BYTES)], [...payload]);
    }),
    { numRuns: 100, seed: 20261123 },
  );
});

Deno.test("only the target's answers count, and from the first one on frames go to its address", () => {
  const ping = new PingFrames(OURS);
  const request = new Uint8Array(100);
  ping.write(request, 0, 58, 1, 1);
  assert.equal(request.subarray(0, 6).toHex(), "ffffffffffff");
  assert.equal(ping.receive(request, 0, 100), false, "its own request");
  const answer = answerOf(request);
  const stranger = answer.slice();
  stranger[29] = 77;
  assert.equal(ping.receive(stranger, 0, 100), false, "another one's answer");
  assert.equal(ping.receive(answer, 0, PING_HEADER_BYTES - 1), false, "a piece of one");
  assert.equal(ping.receive(answer, 0, 100), true);
  ping.write(request, 0, 58, 1, 2);
  assert.deepEqual([...request.subarray(0, 6)], GUEST_MAC);
});

Deno.test("who asks for the driver's ethernet address is answered, and nobody else", () => {
  const ping = new PingFrames(OURS);
  const request = new Uint8Array(60);
  request.fill(0xff, 0, 6);
  request.set(GUEST_MAC, 6);
  request.set([0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1, ...GUEST_MAC, 10, 77, 0, 2, 0, 0, 0, 0, 0, 0, 10, 77, 0, 9], 12);
  const other = request.slice();
  other[41] = 8;
  ping.receive(other, 0, 60);
  assert.equal(ping.answer(), undefined);
  for (let i = 0; i < 20; i++) assert.equal(ping.receive(request, 0, 60), false);
  const answer = ping.answer()!;
  assert.equal(answer.subarray(0, 12).toHex(), "525400000001" + "525400000009");
  assert.equal(answer.subarray(20, 42).toHex(), "0002" + "525400000009" + "0a4d0009" + "525400000001" + "0a4d0002");
  let more = 0;
  while (ping.answer() !== undefined) more++;
  assert.ok(more < 20, "a flood of questions is not kept");
});

Deno.test("what is no IPv4 address is refused", () => {
  assert.deepEqual([...parseIpv4("10.0.0.255")], [10, 0, 0, 255]);
  for (const wrong of ["", "10.0.0", "10.0.0.256", "10.0.0.1.2", "a.b.c.d", "10.0.0.-1"]) {
    assert.throws(() => parseIpv4(wrong), { code: "BAD_ADDRESS" }, wrong);
  }
});
