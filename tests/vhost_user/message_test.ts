import assert from "node:assert/strict";
import fc from "fast-check";
import { SvqError } from "../../src/errors.ts";
import { FLAG, REQUEST, requestShape } from "../../src/uapi/vhost_user.ts";
import * as message from "../../src/vhost_user/message.ts";

const PARAMETERS = { numRuns: 200, seed: 2 };
const address = fc.integer({ min: 0, max: 2 ** 50 });
const region = fc.record({ gpa: address, size: fc.integer({ min: 1, max: 2 ** 50 }), uaddr: address, mmapOffset: address }, {
  noNullPrototype: true,
});

Deno.test("payloads survive encoding and decoding", () => {
  fc.assert(
    fc.property(fc.array(region, { maxLength: 8 }), region, fc.integer({ min: 0, max: 255 }), fc.boolean(), (table, one, index, hasFd) => {
      assert.deepEqual(message.decodeMemTable(message.encodeMemTable(table)), table);
      assert.deepEqual(message.decodeRegion(message.encodeRegion(one)), one);
      const log = { size: one.size, offset: one.gpa };
      assert.deepEqual(message.decodeLog(message.encodeLog(log)), log);
      assert.deepEqual(message.decodeVringFd(message.encodeVringFd({ index, hasFd }), hasFd ? 1 : 0), { index, hasFd });
    }),
    PARAMETERS,
  );
  fc.assert(
    fc.property(fc.integer({ min: 0, max: 1000 }), fc.uint8Array({ maxLength: 256 }), (offset, bytes) => {
      const config = { offset, flags: 0, bytes: new Uint8Array(bytes) };
      assert.deepEqual(message.decodeConfig(message.encodeConfig(config)), config);
    }),
    PARAMETERS,
  );
});

Deno.test("a message header has request, flags and size in this order", () => {
  const bytes = message.encodeMessage(REQUEST.GET_VRING_BASE, 9, new Uint8Array(8));
  assert.deepEqual([...new Uint32Array(bytes.buffer.slice(0, 12))], [11, 9, 8]);
  assert.deepEqual(message.decodeHeader(bytes.subarray(0, 12)), { request: 11, flags: 9, size: 8 });
});

Deno.test("random and truncated payloads give a value or an SvqError", () => {
  const decoders = [
    message.decodeHeader,
    message.decodeMemTable,
    message.decodeRegion,
    message.decodeLog,
    (bytes: Uint8Array<ArrayBuffer>) => message.decodeVringFd(bytes, 0),
    message.decodeConfig,
    message.decodeMac,
  ];
  const sound = [
    message.encodeMemTable([{ gpa: 0, size: 4096, uaddr: 0, mmapOffset: 0 }]),
    message.encodeRegion({ gpa: 0, size: 4096, uaddr: 0, mmapOffset: 0 }),
    message.encodeLog({ size: 4096, offset: 0 }),
    message.encodeConfig({ offset: 0, flags: 0, bytes: new Uint8Array(24) }),
  ];
  const payload = fc.oneof(
    fc.uint8Array({ maxLength: 300 }).map((bytes) => new Uint8Array(bytes)),
    fc.tuple(fc.constantFrom(...sound), fc.nat(50)).map(([bytes, cut]) => bytes.slice(0, Math.max(0, bytes.length - cut))),
    // One byte changed.
    fc.tuple(fc.constantFrom(...sound), fc.nat(), fc.integer({ min: 0, max: 255 })).map(([bytes, at, value]) => {
      const changed = bytes.slice();
      changed[at % changed.length] = value;
      return changed;
    }),
  );
  fc.assert(
    fc.property(payload, (bytes) => {
      for (const decode of decoders) {
        try {
          decode(bytes);
        } catch (error) {
          assert.ok(error instanceof SvqError, String(error));
        }
      }
    }),
    { numRuns: 300, seed: 3 },
  );
});

Deno.test("regions that are empty or end above 2^52 are refused", () => {
  const sound = { gpa: 0, size: 4096, uaddr: 0, mmapOffset: 0 };
  for (
    const [broken, pattern] of [
      [{ ...sound, size: 0 }, /0 bytes/],
      [{ ...sound, gpa: 2 ** 52 - 4095 }, /guest address/],
      [{ ...sound, uaddr: 2 ** 52 - 4095 }, /user address/],
      [{ ...sound, mmapOffset: 2 ** 52 - 4095 }, /file offset/],
    ] as const
  ) {
    assert.throws(() => message.decodeRegion(message.encodeRegion(broken)), { code: "VHOST_USER_PROTOCOL", message: pattern });
  }
  assert.equal(message.decodeRegion(message.encodeRegion({ ...sound, gpa: 2 ** 52 - 4096 })).gpa, 2 ** 52 - 4096);
});

Deno.test("a memory table whose count and size disagree is refused", () => {
  const bytes = message.encodeMemTable([{ gpa: 0, size: 4096, uaddr: 0, mmapOffset: 0 }]);
  bytes[0] = 2;
  assert.throws(() => message.decodeMemTable(bytes), { code: "VHOST_USER_PROTOCOL" });
  assert.throws(() => message.encodeMemTable(Array.from({ length: 9 }, () => ({ gpa: 0, size: 1, uaddr: 0, mmapOffset: 0 }))), {
    code: "TOO_MANY_REGIONS",
  });
});

Deno.test("a ring word whose descriptor flag and descriptors disagree is refused", () => {
  const withFd = message.encodeVringFd({ index: 3, hasFd: true });
  const without = message.encodeVringFd({ index: 3, hasFd: false });
  assert.throws(() => message.decodeVringFd(withFd, 0), { code: "VHOST_USER_PROTOCOL" });
  assert.throws(() => message.decodeVringFd(without, 1), { code: "VHOST_USER_PROTOCOL" });
  without[2] = 1;
  assert.throws(() => message.decodeVringFd(without, 0), { message: /reserved bits/ });
  assert.throws(() => message.encodeVringFd({ index: 256, hasFd: true }), { code: "BAD_INDEX" });
});

Deno.test("headers are checked for version, direction, reserved flags, size and descriptors", () => {
  const header = { request: REQUEST.SET_VRING_NUM as number, flags: FLAG.VERSION as number, size: 8 };
  const check = (changed: Partial<typeof header>, fds = 0, expect: "requests" | "replies" = "requests") => () =>
    message.checkHeader({ ...header, ...changed }, fds, "front-end", expect);
  assert.doesNotThrow(check({}));
  assert.doesNotThrow(check({ flags: FLAG.VERSION | FLAG.NEED_REPLY }));
  const broken: [() => void, RegExp][] = [
    [check({ flags: 0 }), /version 0/],
    [check({ flags: 2 }), /version 2/],
    [check({ flags: 0x11 }), /reserved flags 0x11/],
    [check({ flags: 0x80000001 }), /reserved flags 0x80000001/],
    [check({ flags: 5 }), /a reply where a request/],
    [check({}, 0, "replies"), /lacks the reply flag/],
    [check({ flags: 0xd }, 0, "replies"), /flags 0xd instead of 0x5/],
    [check({ size: 7 }), /7 bytes of payload instead of 8/],
    [check({ size: 0xffffffff }), /4294967295 bytes/],
    [check({}, 1), /1 file descriptors instead of 0/],
    [check({ request: REQUEST.ADD_MEM_REG, size: 40 }, 0), /0 file descriptors instead of 1/],
    [check({ request: REQUEST.SET_MEM_TABLE, size: 40 }, 9), /9 file descriptors instead of 0 to 8/],
    [check({ request: 999, size: 5000 }), /request 999: 5000 bytes/],
  ];
  for (const [call, pattern] of broken) assert.throws(call, { code: "VHOST_USER_PROTOCOL", message: pattern });
});

Deno.test("every request's shape is bounded", () => {
  for (let request = 0; request < 60; request++) {
    const shape = requestShape("front-end", request);
    assert.ok(shape.minSize <= shape.maxSize && shape.maxSize <= 4108 && shape.minFds <= shape.maxFds && shape.maxFds <= 8);
  }
});
