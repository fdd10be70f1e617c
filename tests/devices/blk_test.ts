import assert from "node:assert/strict";
import { SvqError } from "../../src/errors.ts";
import { createMemfd, drainEventfd, mapFd, signalEventfd } from "../../src/ffi/mod.ts";
import { BlkModel } from "../../src/devices/blk.ts";
import { RangeTable } from "../../src/memory/range_table.ts";
import { SimDevice } from "../../src/devices/sim_device.ts";
import type { SimOptions } from "../../src/devices/options.ts";
import { decodeBlkConfig, VIRTIO_BLK_FEATURE_BITS, VIRTIO_BLK_S, VIRTIO_BLK_T } from "../../src/uapi/virtio_blk.ts";
import { VIRTIO_FEATURE_BITS } from "../../src/uapi/virtio.ts";
import { bitsOf, hasBit } from "../../src/uapi/bits.ts";
import { Chain, type Segment } from "../../src/vring/queue.ts";
import { blkHeader, blkRange, pattern, TestGuest } from "../support/test_guest.ts";
import { waitUntil } from "../support/wait.ts";

async function openGuest(options: Partial<SimOptions> = {}, queues = 1): Promise<TestGuest> {
  const device = await SimDevice.open({ kind: "blk", size: 4 << 20, queues, ...options });
  const guest = new TestGuest(device, queues);
  await guest.start(await device.getFeatures());
  return guest;
}

/** One request; the status, the bytes written and the data read. */
async function request(guest: TestGuest, header: Uint8Array, out: Uint8Array[] = [], into: number[] = [], queue = 0) {
  const status = guest.buffer(Uint8Array.of(0xee));
  const segments = into.map((length) => guest.buffer(length));
  const q = guest.queues[queue]!;
  q.add([guest.buffer(header), ...out.map((bytes) => guest.buffer(bytes))], [...segments, status]);
  q.publish();
  await q.take(1);
  return { status: guest.read(status)[0], written: q.driver.usedLength, data: segments.map((segment: Segment) => guest.read(segment)) };
}

Deno.test("What was written is read back, through odd segments and indirect tables", async () => {
  await using guest = await openGuest();
  const bytes = pattern(8 * 512, 3);
  const out = [bytes.subarray(0, 5), bytes.subarray(5, 700), bytes.subarray(700, 701), bytes.subarray(701, 4000), bytes.subarray(4000)];
  assert.deepEqual(await request(guest, blkHeader(VIRTIO_BLK_T.OUT, 8), out), { status: VIRTIO_BLK_S.OK, written: 1, data: [] });
  const read = await request(guest, blkHeader(VIRTIO_BLK_T.IN, 8), [], [1000, 96, 3000]);
  assert.equal(read.status, VIRTIO_BLK_S.OK);
  assert.equal(read.written, 4097);
  assert.deepEqual(Uint8Array.from(read.data.flatMap((part) => [...part])), bytes);
  const short = await request(guest, blkHeader(VIRTIO_BLK_T.IN, 9), [], [512]);
  assert.deepEqual(short.data[0], bytes.slice(512, 1024));
});

Deno.test("The header may be split and may share its segment with the data", async () => {
  await using guest = await openGuest();
  const bytes = pattern(512, 9);
  const header = blkHeader(VIRTIO_BLK_T.OUT, 1);
  const joined = new Uint8Array([...header.subarray(7), ...bytes]);
  assert.equal((await request(guest, header.subarray(0, 7), [joined])).status, VIRTIO_BLK_S.OK);
  const q = guest.queues[0]!;
  const into = guest.buffer(513);
  q.add([guest.buffer(blkHeader(VIRTIO_BLK_T.IN, 1))], [into]);
  q.publish();
  await q.take(1);
  assert.deepEqual(guest.read(into), new Uint8Array([...bytes, VIRTIO_BLK_S.OK]));
});

Deno.test("Requests beyond the disk, of odd length or unknown type fail with the status that the specification names", async () => {
  await using guest = await openGuest();
  const last = (4 << 20) / 512;
  assert.equal((await request(guest, blkHeader(VIRTIO_BLK_T.IN, last - 1), [], [1024])).status, VIRTIO_BLK_S.IOERR);
  assert.equal((await request(guest, blkHeader(VIRTIO_BLK_T.IN, 2 ** 52), [], [512])).status, VIRTIO_BLK_S.IOERR);
  assert.equal((await request(guest, blkHeader(VIRTIO_BLK_T.OUT, last), [pattern(512, 1)])).status, VIRTIO_BLK_S.IOERR);
  assert.equal((await request(guest, blkHeader(VIRTIO_BLK_T.OUT, 0), [pattern(511, 1)])).status, VIRTIO_BLK_S.IOERR);
  assert.equal((await request(guest, blkHeader(VIRTIO_BLK_T.SECURE_ERASE), [blkRange(0, 1)])).status, VIRTIO_BLK_S.UNSUPP);
  assert.equal((await request(guest, blkHeader(77))).status, VIRTIO_BLK_S.UNSUPP);
  assert.equal((await request(guest, blkHeader(VIRTIO_BLK_T.FLUSH))).status, VIRTIO_BLK_S.OK);
  assert.equal((await request(guest, blkHeader(VIRTIO_BLK_T.IN, last - 1), [], [512])).status, VIRTIO_BLK_S.OK);
});

Deno.test("A request of more segments than one system call takes is whole", async () => {
  await using guest = await openGuest();
  using disk = createMemfd("disk", 1 << 20);
  const model = new BlkModel({ fd: disk.fd, capacity: 2048, readOnly: false, volatile: true, id: "" });
  const memory = new RangeTable(guest.memory.ranges());
  const bytes = pattern(1020 * 512, 4);
  const chain = new Chain(1024);
  for (const type of [VIRTIO_BLK_T.OUT, VIRTIO_BLK_T.IN]) {
    const header = guest.buffer(blkHeader(type, 1));
    const data = guest.buffer(type === VIRTIO_BLK_T.OUT ? bytes : bytes.length);
    const status = guest.buffer(1);
    chain.clear();
    chain.addReadable(header.address, 16);
    for (let at = 0; at < bytes.length; at += 512) {
      if (type === VIRTIO_BLK_T.OUT) chain.addReadable(data.address + at, 512);
      else chain.addWritable(data.address + at, 512);
    }
    chain.addWritable(status.address, 1);
    model.execute(chain, memory);
    assert.equal(guest.read(status)[0], VIRTIO_BLK_S.OK);
    assert.ok(guest.read(data).every((byte, i) => byte === bytes[i]));
  }
  using map = mapFd(disk.fd, { length: 1 << 20 });
  assert.ok(new Uint8Array(map.buffer(512, bytes.length)).every((byte, i) => byte === bytes[i]));
});

Deno.test("The id is NUL padded and cut to the room there is", async () => {
  await using guest = await openGuest({ id: "disk-7" });
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  const full = await request(guest, blkHeader(VIRTIO_BLK_T.GET_ID), [], [20]);
  assert.equal(text(full.data[0]!), "disk-7".padEnd(20, "\0"));
  assert.equal(full.written, 21);
  assert.equal(text((await request(guest, blkHeader(VIRTIO_BLK_T.GET_ID), [], [4])).data[0]!), "disk");
});

Deno.test("Write-zeroes and discard keep their limits and reject unknown flags before touching anything", async () => {
  await using guest = await openGuest({ size: 48 << 20 });
  const bytes = pattern(16 * 512, 5);
  await request(guest, blkHeader(VIRTIO_BLK_T.OUT, 0), [bytes]);
  const zero = (...ranges: Uint8Array[]) => request(guest, blkHeader(VIRTIO_BLK_T.WRITE_ZEROES), ranges);
  const discard = (...ranges: Uint8Array[]) => request(guest, blkHeader(VIRTIO_BLK_T.DISCARD), ranges);
  assert.equal((await zero(blkRange(0, 1), blkRange(1, 1, 2))).status, VIRTIO_BLK_S.UNSUPP);
  assert.equal((await discard(blkRange(0, 1, 1))).status, VIRTIO_BLK_S.UNSUPP);
  assert.equal((await discard(blkRange(0, 1, 4))).status, VIRTIO_BLK_S.UNSUPP);
  assert.equal((await zero(blkRange(0, 65537))).status, VIRTIO_BLK_S.IOERR);
  assert.equal((await zero(blkRange(0, 1), blkRange(98304, 1))).status, VIRTIO_BLK_S.IOERR);
  assert.equal((await zero(blkRange(0, 1).subarray(0, 15))).status, VIRTIO_BLK_S.IOERR);
  assert.equal((await zero()).status, VIRTIO_BLK_S.IOERR);
  assert.deepEqual((await request(guest, blkHeader(VIRTIO_BLK_T.IN, 0), [], [16 * 512])).data[0], bytes);
  assert.equal((await zero(blkRange(1, 1), blkRange(3, 2, 1), blkRange(20, 4096))).status, VIRTIO_BLK_S.OK);
  assert.equal((await discard(blkRange(8, 8))).status, VIRTIO_BLK_S.OK);
  const expected = bytes.slice(0, 8 * 512);
  for (const sector of [1, 3, 4]) expected.fill(0, sector * 512, sector * 512 + 512);
  assert.deepEqual((await request(guest, blkHeader(VIRTIO_BLK_T.IN, 0), [], [8 * 512])).data[0], expected);
});

Deno.test("A read-only disk offers RO and refuses writes", async () => {
  const path = await Deno.makeTempFile();
  try {
    await Deno.writeFile(path, pattern(4096, 1));
    await using guest = await openGuest({ file: path, readOnly: true });
    const features = await guest.device.getFeatures();
    assert.ok(hasBit(features, VIRTIO_BLK_FEATURE_BITS.RO) && !hasBit(features, VIRTIO_BLK_FEATURE_BITS.DISCARD));
    assert.equal((await request(guest, blkHeader(VIRTIO_BLK_T.OUT, 0), [pattern(512, 2)])).status, VIRTIO_BLK_S.IOERR);
    assert.equal((await request(guest, blkHeader(VIRTIO_BLK_T.WRITE_ZEROES), [blkRange(0, 1)])).status, VIRTIO_BLK_S.UNSUPP);
    assert.deepEqual((await request(guest, blkHeader(VIRTIO_BLK_T.IN, 1), [], [512])).data[0], pattern(4096, 1).slice(512, 1024));
  } finally {
    await Deno.remove(path);
  }
});

Deno.test("A file becomes as long as asked for, and keeps what was written and flushed", async () => {
  const dir = await Deno.makeTempDir();
  const file = `${dir}/disk`;
  try {
    {
      await using guest = await openGuest({ file, size: 1 << 20 });
      await request(guest, blkHeader(VIRTIO_BLK_T.OUT, 5), [pattern(1024, 6)]);
      assert.equal((await request(guest, blkHeader(VIRTIO_BLK_T.FLUSH))).status, VIRTIO_BLK_S.OK);
    }
    const bytes = await Deno.readFile(file);
    assert.equal(bytes.length, 1 << 20);
    assert.deepEqual(bytes.slice(5 * 512, 7 * 512), pattern(1024, 6));
    await assert.rejects(
      SimDevice.open({ kind: "blk", file: `${dir}/none` }),
      (error) => error instanceof SvqError && error.exitCode === 3,
    );
    await Deno.writeFile(file, new Uint8Array(100));
    await assert.rejects(SimDevice.open({ kind: "blk", file }), { code: "BAD_SIZE" });
  } finally {
    await Deno.remove(dir, { recursive: true });
  }
});

Deno.test("Features and configuration tell what the device is; it cannot log", async () => {
  await using device = await SimDevice.open({ kind: "blk", size: 1 << 20, queues: 3 });
  const features = await device.getFeatures();
  for (
    const bit of [
      VIRTIO_BLK_FEATURE_BITS.SEG_MAX,
      VIRTIO_BLK_FEATURE_BITS.BLK_SIZE,
      VIRTIO_BLK_FEATURE_BITS.FLUSH,
      VIRTIO_BLK_FEATURE_BITS.MQ,
      VIRTIO_BLK_FEATURE_BITS.DISCARD,
      VIRTIO_FEATURE_BITS.VERSION_1,
    ]
  ) {
    assert.ok(hasBit(features, bit));
  }
  for (const bit of [26, VIRTIO_BLK_FEATURE_BITS.RO, VIRTIO_FEATURE_BITS.RING_PACKED]) assert.ok(!hasBit(features, bit));
  const config = decodeBlkConfig(await device.getConfig(0, 96));
  assert.equal(config.capacity, 2048);
  assert.equal(config.numQueues, 3);
  await assert.rejects(device.setFeatures(features | bitsOf([26])), { code: "FEATURES_NOT_OFFERED" });
  await assert.rejects(device.setLogBase({ fd: 0, offset: 0, size: 1 }), { code: "NO_DIRTY_LOG" });
  await assert.rejects(device.setVringNum(3, 64), { code: "NO_SUCH_QUEUE" });
  await assert.rejects(device.setVringNum(0, 4096), { code: "BAD_RING_SIZE" });
  await assert.rejects(SimDevice.open({ kind: "blk", id: "x".repeat(21) }), { code: "BAD_DEVICE_OPTION", exitCode: 2 });
});

Deno.test("With a latency many requests are in flight, and stopping the ring waits for them", async () => {
  await using guest = await openGuest({ latencyUs: 200_000 });
  const q = guest.queues[0]!;
  const start = performance.now();
  const statuses: Segment[] = [];
  for (let i = 0; i < 20; i++) {
    const status = guest.buffer(Uint8Array.of(0xee));
    statuses.push(status);
    q.add([guest.buffer(blkHeader(VIRTIO_BLK_T.OUT, i)), guest.buffer(pattern(512, i))], [status]);
  }
  q.publish();
  const device = guest.device as SimDevice;
  await waitUntil("the device to take all", async () => (await device.counters())[0]!.taken >= 20);
  assert.equal(await device.getVringBase(0), 20);
  assert.ok(performance.now() - start >= 199, "the requests took their time");
  assert.deepEqual(statuses.map((status) => guest.read(status)[0]), Array(20).fill(VIRTIO_BLK_S.OK));
  assert.equal((await q.take(20)).length, 20);
  // What is added while the ring is stopped waits, and is served after a new start at the base.
  const status = guest.buffer(Uint8Array.of(0xee));
  q.add([guest.buffer(blkHeader(VIRTIO_BLK_T.FLUSH))], [status]);
  q.publish();
  await q.start(20);
  await q.take(1);
  assert.equal(guest.read(status)[0], VIRTIO_BLK_S.OK);
});

Deno.test("A jitter lets requests overtake each other", async () => {
  await using guest = await openGuest({ latencyUs: 1000, jitterUs: 20_000 });
  const q = guest.queues[0]!;
  const ids = Array.from({ length: 20 }, () => q.add([guest.buffer(blkHeader(VIRTIO_BLK_T.FLUSH))], [guest.buffer(1)]));
  q.publish();
  const taken = await q.take(20);
  assert.notDeepEqual(taken, ids);
  assert.deepEqual(taken.sort((a, b) => a - b), ids.sort((a, b) => a - b));
});

Deno.test("A reset drops what is in flight: nothing is touched after it", async () => {
  await using guest = await openGuest({ latencyUs: 100_000 });
  const q = guest.queues[0]!;
  const status = guest.buffer(Uint8Array.of(0xee));
  q.add([guest.buffer(blkHeader(VIRTIO_BLK_T.OUT, 0)), guest.buffer(pattern(512, 1))], [status]);
  q.publish();
  await guest.device.setVringEnable(0, true);
  await guest.device.reset();
  await guest.start(await guest.device.getFeatures());
  const read = await request(guest, blkHeader(VIRTIO_BLK_T.IN, 0), [], [512]);
  assert.deepEqual(read.data[0], new Uint8Array(512));
  assert.equal(guest.read(status)[0], 0xee);
});

Deno.test("A malformed request or ring stops its queue with an error; the other queue goes on", async () => {
  const breakers: [string, (guest: TestGuest) => void][] = [
    ["MALFORMED_REQUEST", (guest) => guest.queues[0]!.add([guest.buffer(15)], [guest.buffer(1)])],
    ["MALFORMED_REQUEST", (guest) => guest.queues[0]!.add([guest.buffer(blkHeader(VIRTIO_BLK_T.FLUSH))], [])],
    ["HEAD_OUT_OF_RANGE", (guest) => {
      const { avail } = guest.queues[0]!.addresses;
      new Uint16Array(guest.memory.buffer(avail, 6))[2] = 64;
      new Uint16Array(guest.memory.buffer(avail, 6))[1] = 1;
      signalEventfd(guest.queues[0]!.kick.fd);
    }],
    ["OUTSIDE_MEMORY", (guest) => guest.queues[0]!.add([{ address: 0x1000, length: 16 }], [guest.buffer(1)])],
  ];
  for (const [code, add] of breakers) {
    await using guest = await openGuest({}, 2);
    const device = guest.device as SimDevice;
    const told = new Promise<void>((resolve) => device.onConfigChange = resolve);
    add(guest);
    guest.queues[0]!.publish();
    await told;
    assert.equal(device.errors[0]?.code, code);
    assert.equal(await device.getStatus() & 64, 64);
    assert.equal(drainEventfd(guest.queues[0]!.err.fd), 1);
    assert.equal((await request(guest, blkHeader(VIRTIO_BLK_T.FLUSH), [], [], 1)).status, VIRTIO_BLK_S.OK);
    await device.getVringBase(0);
  }
});

Deno.test("A ring outside of memory does not start, and says so", async () => {
  await using device = await SimDevice.open({ kind: "loopback" });
  await using guest = new TestGuest(device);
  const q = guest.queues[0]!;
  await device.setVringNum(0, 64);
  await device.setVringAddresses(0, q.addresses);
  await device.setVringErr(0, q.err.fd);
  await device.setVringKick(0, q.kick.fd);
  await assert.rejects(device.setVringEnable(0, true), { code: "OUTSIDE_MEMORY" });
});

Deno.test("Memory can be exchanged under a running ring", async () => {
  await using guest = await openGuest({ latencyUs: 2000 });
  const { device, region } = guest;
  const half = region.size / 2;
  const parts = [{ ...region, size: half }, { ...region, gpa: region.gpa + half, uaddr: region.uaddr + half, fdOffset: half, size: half }];
  for (const table of [parts, [region], parts]) {
    const pending = request(guest, blkHeader(VIRTIO_BLK_T.OUT, 3), [pattern(512, 8)]);
    await device.setMemTable(table);
    assert.equal((await pending).status, VIRTIO_BLK_S.OK);
  }
  await device.removeMemRegion(parts[1]!);
  await device.addMemRegion(parts[1]!);
  assert.deepEqual((await request(guest, blkHeader(VIRTIO_BLK_T.IN, 3), [], [512])).data[0], pattern(512, 8));
});

Deno.test("A queue without a kick is polled, and a disabled one waits", async () => {
  await using guest = await openGuest();
  const q = guest.queues[0]!;
  await guest.device.setVringKick(0, null);
  q.add([guest.buffer(blkHeader(VIRTIO_BLK_T.FLUSH))], [guest.buffer(1)]);
  q.driver.publish();
  await q.take(1);
  await guest.device.setVringKick(0, q.kick.fd);
  await guest.device.setVringEnable(0, false);
  q.add([guest.buffer(blkHeader(VIRTIO_BLK_T.FLUSH))], [guest.buffer(1)]);
  q.driver.publish();
  signalEventfd(q.kick.fd);
  assert.equal((await (guest.device as SimDevice).counters())[0]!.taken, 1);
  await guest.device.setVringEnable(0, true);
  await q.take(1);
});
