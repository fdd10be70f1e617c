import assert from "node:assert/strict";
import fc from "fast-check";
import { SvqError } from "../../src/errors.ts";
import { bitNames, bitsOf, hasBit } from "../../src/uapi/bits.ts";
import * as vhost from "../../src/uapi/vhost.ts";
import { PROTOCOL_FEATURE, REQUEST, requestName } from "../../src/uapi/vhost_user.ts";

const address = fc.integer({ min: 0, max: 2 ** 51 });
const u32 = fc.integer({ min: 0, max: 2 ** 32 - 1 });
const PARAMETERS = { numRuns: 200, seed: 1 };

function ioc(direction: number, type: number, number: number, size: number): number {
  return direction * 2 ** 30 + size * 2 ** 16 + type * 2 ** 8 + number;
}

Deno.test("ioctl numbers follow the encoding of direction, size, type and number", () => {
  const [none, write, read] = [0, 1, 2];
  const expected: [number, number, number, number][] = [
    [vhost.VHOST.GET_FEATURES, read, 0x00, 8],
    [vhost.VHOST.SET_OWNER, none, 0x01, 0],
    [vhost.VHOST.SET_MEM_TABLE, write, 0x03, 8],
    [vhost.VHOST.SET_VRING_ADDR, write, 0x11, 40],
    [vhost.VHOST.GET_VRING_BASE, read | write, 0x12, 8],
    [vhost.VHOST.GET_BACKEND_FEATURES, read, 0x26, 8],
    [vhost.VHOST_VDPA.GET_STATUS, read, 0x71, 1],
    [vhost.VHOST_VDPA.GET_VRING_NUM, read, 0x76, 2],
    [vhost.VHOST_VDPA.GET_IOVA_RANGE, read, 0x78, 16],
    [vhost.VHOST_VDPA.GET_VRING_GROUP, read | write, 0x7b, 8],
    [vhost.VHOST_VDPA.RESUME, none, 0x7e, 0],
  ];
  for (const [actual, direction, number, size] of expected) assert.equal(actual, ioc(direction, 0xaf, number, size));
});

Deno.test("vring addresses put the used ring before the avail ring", () => {
  const bytes = vhost.encodeVringAddr({ index: 1, flags: 1, desc: 0x1000, used: 0x2000, avail: 0x3000, logGuestAddr: 0x4000 });
  const words = new BigUint64Array(bytes.buffer);
  assert.deepEqual([...words], [(1n << 32n) | 1n, 0x1000n, 0x2000n, 0x3000n, 0x4000n]);
});

Deno.test("an IOTLB message for vhost-vdpa has its ASID at byte 4 and its type at byte 33", () => {
  const bytes = vhost.encodeIotlbV2({ iova: 0x1000, size: 0x2000, uaddr: 0x3000, perm: vhost.ACCESS.RW, type: vhost.IOTLB.UPDATE }, 5);
  assert.equal(bytes.length, 72);
  const view = vhost.viewOf(bytes);
  assert.deepEqual([view.getUint32(0, true), view.getUint32(4, true), bytes[32], bytes[33]], [2, 5, 3, 2]);
  assert.deepEqual([8, 16, 24].map((at) => view.getBigUint64(at, true)), [0x1000n, 0x2000n, 0x3000n]);
});

Deno.test("records survive encoding and decoding", () => {
  fc.assert(
    fc.property(u32, u32, address, address, address, address, (index, num, desc, used, avail, log) => {
      assert.deepEqual(vhost.decodeVringState(vhost.encodeVringState({ index, num })), { index, num });
      const record = { index, flags: 1, desc, used, avail, logGuestAddr: log };
      assert.deepEqual(vhost.decodeVringAddr(vhost.encodeVringAddr(record)), record);
      const message = { iova: desc, size: used, uaddr: avail, perm: 3, type: vhost.IOTLB.UPDATE };
      assert.deepEqual(vhost.decodeIotlbV2(vhost.encodeIotlbV2(message, num)), { asid: num, message });
    }),
    PARAMETERS,
  );
});

Deno.test("random bytes give a record or an SvqError, and never an address above 2^52", () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 80 }), (random) => {
      const bytes = new Uint8Array(random);
      for (const decode of [vhost.decodeVringState, vhost.decodeVringAddr, vhost.decodeIotlb, vhost.decodeIotlbV2, vhost.decodeU64]) {
        try {
          const record = decode(bytes);
          if (typeof record === "object" && "desc" in record) assert.ok(record.desc < 2 ** 52 && record.used < 2 ** 52);
        } catch (error) {
          assert.ok(error instanceof SvqError, String(error));
        }
      }
    }),
    PARAMETERS,
  );
});

Deno.test("addresses from 2^52 on, and fractions, are refused both ways", () => {
  const addr = { index: 0, flags: 0, desc: 2 ** 52, used: 0, avail: 0, logGuestAddr: 0 };
  assert.throws(() => vhost.encodeVringAddr(addr), { code: "ADDRESS_TOO_LARGE" });
  assert.throws(() => vhost.encodeVringAddr({ ...addr, desc: 0.5 }), { code: "ADDRESS_TOO_LARGE" });
  const bytes = new Uint8Array(40);
  new DataView(bytes.buffer).setBigUint64(16, 1n << 52n, true);
  assert.throws(() => vhost.decodeVringAddr(bytes), { code: "ADDRESS_TOO_LARGE", message: /used ring address 0x10000000000000/ });
});

Deno.test("an IOTLB invalidation of the whole space is cut at 2^52", () => {
  const bytes = new Uint8Array(32);
  const view = new DataView(bytes.buffer);
  view.setBigUint64(8, 2n ** 64n - 1n, true);
  view.setUint8(25, vhost.IOTLB.INVALIDATE);
  assert.deepEqual(vhost.decodeIotlb(bytes), { iova: 0, size: 2 ** 52 - 1, uaddr: 0, perm: 0, type: vhost.IOTLB.INVALIDATE });
});

Deno.test("bits are named, unknown ones by number", () => {
  const word = bitsOf([PROTOCOL_FEATURE.MQ, PROTOCOL_FEATURE.CONFIG, 47]);
  assert.deepEqual(bitNames(word, PROTOCOL_FEATURE), ["MQ", "CONFIG", "bit_47"]);
  assert.deepEqual([hasBit(word, 47), hasBit(word, 46)], [true, false]);
  assert.deepEqual([requestName("front-end", REQUEST.SET_LOG_BASE), requestName("back-end", 2), requestName("front-end", 77)], [
    "SET_LOG_BASE",
    "CONFIG_CHANGE_MSG",
    "request 77",
  ]);
});
