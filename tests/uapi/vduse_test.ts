import assert from "node:assert/strict";
import {
  decodeIotlbEntry,
  decodeVduseRequest,
  decodeVqInfo,
  encodeVduseConfig,
  encodeVduseResponse,
  encodeVqConfig,
  encodeVqKick,
  newIotlbEntry,
  newVqInfo,
} from "../../src/uapi/vduse.ts";

function record(size: number, ...fields: [number, number, number | bigint][]): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(size);
  const view = new DataView(bytes.buffer);
  for (const [offset, width, value] of fields) {
    if (width === 8) view.setBigUint64(offset, BigInt(value), true);
    else if (width === 4) view.setUint32(offset, Number(value), true);
    else if (width === 2) view.setUint16(offset, Number(value), true);
    else view.setUint8(offset, Number(value));
  }
  return bytes;
}

// Offsets are those of struct vduse_dev_config, vduse_vq_info, … in linux/vduse.h, compiled on x86-64.
Deno.test("a device is described as the kernel's record has it", () => {
  const bytes = encodeVduseConfig({
    ...{ name: "disk", vendorId: 7, deviceId: 2, features: 1n << 33n, vqNum: 3, vqAlign: 4096 },
    config: Uint8Array.of(1, 2, 3),
  });
  const expected = record(339, [256, 4, 7], [260, 4, 2], [264, 8, 1n << 33n], [272, 4, 3], [276, 4, 4096], [332, 4, 3]);
  expected.set(new TextEncoder().encode("disk"));
  expected.set([1, 2, 3], 336);
  assert.deepEqual(bytes, expected);
});

Deno.test("queues are described as the kernel's records have them", () => {
  assert.deepEqual(encodeVqConfig(5, 256), record(32, [0, 4, 5], [4, 2, 256]));
  assert.deepEqual(encodeVqKick(5, 9), record(8, [0, 4, 5], [4, 4, 9]));
  assert.deepEqual(encodeVqKick(5, -1), record(8, [0, 4, 5], [4, 4, 0xffffffff]));
  assert.deepEqual(newVqInfo(6), record(48, [0, 4, 6]));
});

Deno.test("a queue's state is understood for both ring formats", () => {
  const fields: [number, number, number][] = [[0, 4, 1], [4, 4, 128], [8, 8, 0x1000], [16, 8, 0x2000], [24, 8, 0x3000], [40, 1, 1]];
  const addresses = { desc: 0x1000, avail: 0x2000, used: 0x3000 };
  assert.deepEqual(decodeVqInfo(record(48, ...fields, [32, 2, 77]), false), { num: 128, addresses, base: 77, ready: true });
  // Avail: wrap 1, slot 5; used: wrap 0, slot 3.
  const packed = record(48, ...fields, [32, 2, 1], [34, 2, 5], [36, 2, 0], [38, 2, 3]);
  assert.equal(decodeVqInfo(packed, true).base, 0x0003_8005);
});

Deno.test("what the state of a packed ring was read from is what is answered", () => {
  for (const base of [0x8000_8000, 0x0003_8005, 0x8007_0001, 0]) {
    const answer = encodeVduseResponse(1, true, { index: 2, base, packed: true });
    const info = new Uint8Array(48);
    info.set(answer.subarray(28, 36), 32);
    assert.equal(decodeVqInfo(info, true).base, base);
  }
});

Deno.test("answers carry the message's number, the result and the ring's position", () => {
  assert.deepEqual(encodeVduseResponse(3, true, { index: 2, base: 500, packed: false }), record(152, [0, 4, 3], [24, 4, 2], [28, 2, 500]));
  assert.deepEqual(encodeVduseResponse(4, false), record(152, [0, 4, 4], [4, 4, 1]));
});

Deno.test("messages are told apart, those of newer kernels too", () => {
  assert.deepEqual(decodeVduseRequest(record(152, [0, 4, 0], [4, 4, 8], [24, 4, 1])), { id: 8, type: 0, index: 1 });
  assert.deepEqual(decodeVduseRequest(record(152, [0, 4, 1], [4, 4, 9], [24, 1, 15])), { id: 9, type: 1, status: 15 });
  assert.deepEqual(decodeVduseRequest(record(152, [0, 4, 2], [4, 4, 10], [32, 8, 2n ** 64n - 1n])), { id: 10, type: 2 });
  assert.deepEqual(decodeVduseRequest(record(152, [0, 4, 5], [4, 4, 11])), { id: 11, type: 5 });
  assert.deepEqual(decodeVduseRequest(record(152, [0, 4, 3], [4, 4, 12], [24, 4, 1], [28, 4, 2])), { id: 12, type: 3, group: 1, asid: 2 });
  assert.deepEqual(decodeVduseRequest(record(152, [0, 4, 4], [4, 4, 13], [24, 4, 1], [28, 4, 1])), {
    id: 13,
    type: 4,
    index: 1,
    ready: true,
  });
  assert.deepEqual(decodeVduseRequest(record(152, [0, 4, 6], [4, 4, 14])), { id: 14, type: "unknown", number: 6 });
  assert.throws(() => decodeVduseRequest(new Uint8Array(24)), { code: "BAD_RECORD" });
});

Deno.test("the IOTLB is asked upwards, and ranges that cannot be are refused", () => {
  assert.deepEqual(newIotlbEntry(0x5000), record(32, [8, 8, 0x5000], [16, 8, 2n ** 64n - 1n]));
  const entry = decodeIotlbEntry(record(32, [0, 8, 0x100], [8, 8, 0x5000], [16, 8, 0x5fff], [24, 1, 3]));
  assert.deepEqual(entry, { offset: 0x100, start: 0x5000, size: 0x1000, perm: 3 });
  assert.throws(() => decodeIotlbEntry(record(32, [8, 8, 0x5000], [16, 8, 0x4fff])), { code: "BAD_RECORD" });
  assert.throws(() => decodeIotlbEntry(record(32, [8, 8, 0x5000], [16, 8, 2n ** 64n - 1n])), { code: "ADDRESS_TOO_LARGE" });
});
