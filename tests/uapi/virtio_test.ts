import assert from "node:assert/strict";
import fc from "fast-check";
import { deviceName, featureBit, featureNames, parseFeatures, statusNames, VIRTIO_ID } from "../../src/uapi/virtio.ts";
import {
  decodeBlkConfig,
  decodeBlkRanges,
  decodeBlkRequest,
  encodeBlkConfig,
  encodeBlkRanges,
  encodeBlkRequest,
} from "../../src/uapi/virtio_blk.ts";
import { decodeNetConfig, decodeNetHeader, encodeNetConfig, encodeNetHeader, netControlQueueIndex } from "../../src/uapi/virtio_net.ts";

const hex = (bytes: Uint8Array) => [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");

Deno.test("Feature bits have the kernel's names, those of the device first, and unknown ones a number", () => {
  const bits = 1n << 5n | 1n << 15n | 1n << 26n | 1n << 30n | 1n << 32n | 1n << 34n | 1n << 49n | 1n << 65n;
  assert.deepEqual(featureNames(VIRTIO_ID.net, bits), [
    "MAC",
    "MRG_RXBUF",
    "LOG_ALL",
    "PROTOCOL_FEATURES",
    "VERSION_1",
    "RING_PACKED",
    "bit_49",
    "GUEST_UDP_TUNNEL_GSO",
  ]);
  assert.deepEqual(featureNames(VIRTIO_ID.blk, 1n << 5n | 1n << 14n), ["RO", "WRITE_ZEROES"]);
  assert.deepEqual(featureNames(0, 1n << 5n), ["bit_5"]);
  assert.deepEqual(featureNames(0, 0n), []);
});

Deno.test("Features are parsed by any usual spelling of their names", () => {
  assert.equal(featureBit(VIRTIO_ID.net, "VIRTIO_NET_F_MRG_RXBUF"), 15);
  assert.equal(featureBit(VIRTIO_ID.blk, "ro"), 5);
  assert.equal(featureBit(0, "VIRTIO_F_RING_PACKED"), 34);
  assert.equal(featureBit(0, "VIRTIO_RING_F_EVENT_IDX"), 29);
  assert.equal(featureBit(0, "VHOST_F_LOG_ALL"), 26);
  assert.equal(featureBit(0, "VHOST_USER_F_PROTOCOL_FEATURES"), 30);
  assert.equal(featureBit(0, "bit_47"), 47);
  for (const name of ["NOPE", "bit_999", "constructor", "bit_", ""]) {
    assert.throws(() => featureBit(VIRTIO_ID.net, name), { code: "UNKNOWN_FEATURE" });
  }
  fc.assert(
    fc.property(fc.constantFrom(0, 1, 2, 26), fc.bigInt({ min: 0n, max: (1n << 70n) - 1n }), (id, bits) => {
      assert.equal(parseFeatures(id, featureNames(id, bits)), bits);
    }),
    { seed: 1 },
  );
});

Deno.test("Status bits and device ids have names", () => {
  assert.deepEqual(statusNames(0x0f), ["ACKNOWLEDGE", "DRIVER", "DRIVER_OK", "FEATURES_OK"]);
  assert.deepEqual(statusNames(0xe0), ["bit_5", "NEEDS_RESET", "FAILED"]);
  assert.deepEqual([deviceName(1), deviceName(9), deviceName(777)], ["net", "9p", "device_777"]);
});

Deno.test("The network configuration lies as the specification says and survives a round trip", () => {
  const config = {
    mac: Uint8Array.of(0x52, 0x54, 0, 1, 2, 3),
    status: 1,
    maxVirtqueuePairs: 2,
    mtu: 1500,
    speed: 25000,
    duplex: 1,
    rssMaxKeySize: 40,
    rssMaxIndirectionTableLength: 128,
    supportedHashTypes: 0x1ff,
  };
  const bytes = encodeNetConfig(config);
  assert.equal(hex(bytes), "525400010203" + "0100" + "0200" + "dc05" + "a8610000" + "01" + "28" + "8000" + "ff010000");
  assert.deepEqual(decodeNetConfig(bytes), config);
  assert.equal(decodeNetConfig(bytes.subarray(0, 12)).speed, 0, "a short configuration reads as zeros");
  assert.throws(() => decodeNetConfig(new Uint8Array(5000)), { code: "BAD_RECORD" });
  assert.equal(netControlQueueIndex(1n << 22n, 4), 8);
  assert.equal(netControlQueueIndex(1n << 60n, 4), 8);
  assert.equal(netControlQueueIndex(0n, 4), 2);
});

Deno.test("The network header lies as the specification says", () => {
  const header = { flags: 1, gsoType: 4, hdrLen: 54, gsoSize: 1448, csumStart: 34, csumOffset: 16, numBuffers: 3 };
  const bytes = encodeNetHeader(header);
  assert.equal(hex(bytes), "0104" + "3600" + "a805" + "2200" + "1000" + "0300");
  assert.deepEqual(decodeNetHeader(bytes), header);
  assert.equal(decodeNetHeader(bytes.subarray(0, 10)).numBuffers, 0);
  assert.throws(() => decodeNetHeader(bytes.subarray(0, 9)), { code: "BAD_RECORD" });
});

Deno.test("The block configuration lies as the specification says and survives a round trip", () => {
  const bytes = encodeBlkConfig({ capacity: 2 ** 40 + 1, segMax: 126, blkSize: 512, numQueues: 4, writeZeroesMayUnmap: 1 });
  assert.equal(bytes.length, 96);
  assert.equal(hex(bytes.subarray(0, 8)), "0100000000010000");
  assert.equal(bytes[12], 126);
  assert.equal(hex(bytes.subarray(20, 24)), "00020000");
  assert.equal(bytes[34], 4);
  assert.equal(bytes[56], 1);
  const config = decodeBlkConfig(bytes);
  assert.equal(config.capacity, 2 ** 40 + 1);
  assert.deepEqual(encodeBlkConfig(config), bytes);
});

Deno.test("Block requests and ranges lie as the specification says", () => {
  const request = { type: 1, sector: 0x1_2345_6789 };
  assert.equal(hex(encodeBlkRequest(request)), "01000000" + "00000000" + "8967452301000000");
  assert.deepEqual(decodeBlkRequest(encodeBlkRequest(request)), request);
  assert.throws(() => decodeBlkRequest(new Uint8Array(15)), { code: "BAD_RECORD" });
  const ranges = [{ sector: 8, numSectors: 16, flags: 1 }, { sector: 2 ** 33, numSectors: 1, flags: 0 }];
  assert.deepEqual(decodeBlkRanges(encodeBlkRanges(ranges)), ranges);
  assert.equal(hex(encodeBlkRanges(ranges).subarray(0, 16)), "0800000000000000" + "10000000" + "01000000");
});
