import assert from "node:assert/strict";
import fc from "fast-check";
import { encodeU64, encodeVringAddr, encodeVringState } from "../../src/uapi/vhost.ts";
import { FLAG, REQUEST } from "../../src/uapi/vhost_user.ts";
import { describeMessage, fieldsText } from "../../src/vhost_user/describe.ts";
import { encodeConfig, encodeDeviceState, encodeMemTable } from "../../src/vhost_user/message.ts";

const ASK = FLAG.VERSION as number;
const ANSWER = FLAG.VERSION | FLAG.REPLY;

Deno.test("messages are put into words, requests and answers apart", () => {
  const words = (request: number, flags: number, payload: Uint8Array<ArrayBuffer>) => {
    const { name, fields } = describeMessage("front-end", request, flags, payload);
    return `${name} ${fieldsText(fields)}`.trim();
  };
  assert.equal(words(REQUEST.GET_FEATURES, ASK, new Uint8Array(0)), "GET_FEATURES");
  assert.equal(words(REQUEST.GET_FEATURES, ANSWER, encodeU64(0x140000000n)), "GET_FEATURES value=0x140000000");
  assert.equal(words(REQUEST.GET_VRING_BASE, ASK, encodeVringState({ index: 3, num: 0 })), "GET_VRING_BASE ring=3");
  assert.equal(words(REQUEST.GET_VRING_BASE, ANSWER, encodeVringState({ index: 3, num: 7 })), "GET_VRING_BASE ring=3 value=7");
  assert.equal(words(REQUEST.SET_VRING_KICK, ASK, encodeU64(0x102n)), "SET_VRING_KICK ring=2 polled=true");
  assert.equal(words(REQUEST.SET_VRING_ENABLE, ANSWER, encodeU64(0n)), "SET_VRING_ENABLE ack=0");
  assert.equal(
    words(
      REQUEST.SET_VRING_ADDR,
      ASK,
      encodeVringAddr({ index: 1, flags: 1, desc: 0x1000, used: 0x3000, avail: 0x2000, logGuestAddr: 0x30 }),
    ),
    "SET_VRING_ADDR ring=1 flags=1 desc=0x1000 used=0x3000 avail=0x2000 log=0x30",
  );
  assert.equal(
    words(REQUEST.SET_MEM_TABLE, ASK, encodeMemTable([{ gpa: 0, size: 4096, uaddr: 0x7000, mmapOffset: 0 }])),
    "SET_MEM_TABLE regions=[{gpa=0x0 size=0x1000 uaddr=0x7000 offset=0x0}]",
  );
  const config = { offset: 32, flags: 0, bytes: Uint8Array.of(1) };
  assert.equal(words(REQUEST.SET_CONFIG, ASK, encodeConfig(config)), "SET_CONFIG offset=32 size=1 flags=0 bytes=01");
  assert.equal(words(REQUEST.GET_CONFIG, ANSWER, new Uint8Array(0)), "GET_CONFIG refused=true");
  assert.equal(
    words(REQUEST.SET_DEVICE_STATE_FD, ASK, encodeDeviceState({ direction: "load", phase: 0 })),
    "SET_DEVICE_STATE_FD direction=load phase=0",
  );
});

Deno.test("whatever the bytes are, a message is shown", () => {
  fc.assert(
    fc.property(fc.nat(50), fc.nat(15), fc.uint8Array({ maxLength: 400 }), fc.boolean(), (request, flags, bytes, back) => {
      const { fields } = describeMessage(back ? "back-end" : "front-end", request, flags, new Uint8Array(bytes));
      assert.equal(typeof fieldsText(fields), "string");
      JSON.stringify(fields);
    }),
    { numRuns: 300 },
  );
});
