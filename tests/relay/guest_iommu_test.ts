import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { DirtyBitmap } from "../../src/dirty/bitmap.ts";
import { createEventfd, createMemfd, mapFd, mapPieces, signalEventfd } from "../../src/ffi/mod.ts";
import { COUNTER } from "../../src/relay/counters.ts";
import { DEFAULT_RELAY_CONFIG, Relay } from "../../src/relay/relay.ts";
import { packedLayout, splitLayout } from "../../src/vring/layout.ts";
import { PACKED_BASE_START } from "../../src/vring/packed_event.ts";
import { PackedDriver } from "../../src/vring/packed.ts";
import { SplitDriver } from "../../src/vring/split.ts";
import { waitUntil } from "../support/wait.ts";

const NUM = 512;
const PAGE = 4096;
const PAGES = 64;
const GPA = 0x10_0000;
const IOVA = 0x4000_0000;
const DATA_PAGE = 8;
const VERSION_1 = 1n << 32n;
const ACCESS_PLATFORM = 1n << 33n;
const RING_PACKED = 1n << 34n;
const LOG_ALL = 1n << 26n;
// Pages are turned round: what is contiguous for the driver is not in guest memory.
const frameOf = (page: number) => PAGES - 1 - page;

class IommuGuest implements AsyncDisposable {
  readonly ram = createMemfd("iommu-guest", PAGES * PAGE);
  readonly mapping = mapFd(this.ram.fd, { length: PAGES * PAGE });
  readonly bytes = new Uint8Array(this.mapping.buffer());
  readonly fds = { kick: createEventfd(), call: createEventfd() };
  readonly errors: string[] = [];
  /** What the driver has mapped: page -> permission. */
  readonly mapped = new Map<number, number>();
  asked = 0;
  /** Runs after a mapping was told and before the question for it is answered, once. */
  beforeAnswer: (() => Promise<void>) | undefined;
  /** Pages of the ring are mapped to the frames of the pages so far behind them. */
  ringShift = 0;
  /** All of it as the driver sees it. */
  view = this.#look();
  packed = false;
  device!: SimDevice;
  relay!: Relay;
  driver!: SplitDriver | PackedDriver;

  static async start(options: { packed?: boolean; latencyUs?: number } = {}): Promise<IommuGuest> {
    const guest = new IommuGuest();
    guest.packed = options.packed === true;
    const { packed = false, latencyUs = 0 } = options;
    guest.device = await SimDevice.open({ kind: "loopback", packed, latencyUs });
    guest.relay = new Relay(guest.device, { ...DEFAULT_RELAY_CONFIG, guestIommu: true }, {
      log: () => {},
      error: (error) => guest.errors.push(`${error.code} ${error.message}`),
    });
    const { relay } = guest;
    for (const page of [0, 1, 2, 3, 4, 5]) guest.mapped.set(page, 3);
    relay.onIotlbMiss = (iova, perm) => guest.miss(iova, perm);
    assert.equal(await relay.getFeatures() & ACCESS_PLATFORM, ACCESS_PLATFORM);
    await relay.setFeatures(VERSION_1 | ACCESS_PLATFORM | (packed ? RING_PACKED : 0n));
    await relay.setMemTable([{ gpa: GPA, size: PAGES * PAGE, uaddr: 0x7000_0000, fd: guest.ram.fd, fdOffset: 0 }]);
    await guest.startRing();
    return guest;
  }

  #frame(page: number): number {
    return frameOf(page < DATA_PAGE ? page + this.ringShift : page);
  }

  #look() {
    const pieces = Array.from({ length: PAGES }, (_, page) => ({ fd: this.ram.fd, offset: this.#frame(page) * PAGE, length: PAGE }));
    return mapPieces(pieces, "driver");
  }

  /** The driver starts with its ring in other memory, at the same IOVAs. */
  async restart(shift: number): Promise<void> {
    this.ringShift = shift;
    this.view.close();
    this.view = this.#look();
    await this.startRing();
  }

  async startRing(): Promise<void> {
    const { relay, packed } = this;
    const layout = (packed ? packedLayout : splitLayout)(NUM);
    const part = (byteOffset: number) => ({ buffer: this.view.buffer(), byteOffset });
    const at = { desc: 0, avail: layout.avail.offset, used: 4 * PAGE - 64 };
    const parts = { num: NUM, desc: part(at.desc), avail: part(at.avail), used: part(at.used), eventIdx: false };
    this.driver = packed ? new PackedDriver(parts) : new SplitDriver(parts);
    await relay.setVringNum(0, NUM);
    await relay.setVringBase(0, packed ? PACKED_BASE_START : 0);
    await relay.setVringAddresses(0, { desc: IOVA + at.desc, avail: IOVA + at.avail, used: IOVA + at.used });
    await relay.setVringCall(0, this.fds.call.fd);
    await relay.setVringEnable(0, true);
    await relay.setVringKick(0, this.fds.kick.fd);
    await waitUntil("the ring to run", () => relay.queues[0]!.running);
  }

  async miss(iova: number, perm: number): Promise<void> {
    this.asked++;
    const page = Math.floor((iova - IOVA) / PAGE);
    const has = this.mapped.get(page);
    if (has === undefined || (has & perm) !== perm) throw new Error("nothing is mapped there");
    await this.relay.iotlb({ type: "update", iova: IOVA + page * PAGE, size: PAGE, gpa: GPA + this.#frame(page) * PAGE, perm: has });
    const late = this.beforeAnswer;
    if (late === undefined || page < DATA_PAGE) return;
    this.beforeAnswer = undefined;
    await late();
  }

  put(page: number, offset: number, bytes: Uint8Array): void {
    for (const [i, byte] of bytes.entries()) {
      const at = offset + i;
      this.bytes[frameOf(page + Math.floor(at / PAGE)) * PAGE + at % PAGE] = byte;
    }
  }

  get(page: number, offset: number, length: number): Uint8Array {
    return Uint8Array.from({ length }, (_, i) => this.bytes[frameOf(page + Math.floor((offset + i) / PAGE)) * PAGE + (offset + i) % PAGE]!);
  }

  /** Buffers of two pages each that begin in the middle of a page. */
  offer(page: number, length: number): number {
    const address = IOVA + page * PAGE + 100;
    const id = this.driver.add([{ address, length }], [{ address: address + 4 * PAGE, length }]);
    this.driver.publish();
    signalEventfd(this.fds.kick.fd);
    return id;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.relay.close();
    await this.device.close();
    for (const fd of Object.values(this.fds)) fd.close();
    this.mapping.close();
    this.view.close();
    this.ram.close();
  }
}

const pattern = (seed: number, length: number) => Uint8Array.from({ length }, (_, i) => (i * 31 + seed * 7) & 0xff);

for (const packed of [false, true]) {
  Deno.test(`a guest with an IOMMU: buffers over several pages that lie elsewhere in memory come back whole, and the log is by GPA (${packed ? "packed" : "split"})`, async () => {
    await using guest = await IommuGuest.start({ packed });
    const { relay } = guest;
    assert.equal(relay.queues[0]!.mode, "shadow");
    using log = createMemfd("log", PAGE);
    using mapping = mapFd(log.fd, { length: PAGE });
    const bitmap = new DirtyBitmap(mapping.buffer());
    await relay.setLogBase({ fd: log.fd, offset: 0, size: PAGE });
    await relay.setFeatures(relay.features | LOG_ALL);
    const length = 3 * PAGE;
    for (let round = 0; round < 40; round++) {
      bitmap.clear();
      const page = DATA_PAGE + (round % 5) * 8;
      for (let i = 0; i < 4; i++) guest.mapped.set(page + i, 1).set(page + 4 + i, 2);
      guest.put(page, 100, pattern(round, length));
      guest.offer(page, length);
      await waitUntil("the echo", () => guest.driver.take() >= 0);
      assert.deepEqual(guest.get(page + 4, 100, length), pattern(round, length));
      for (let i = 0; i < 4; i++) {
        assert.equal(bitmap.has(GPA / PAGE + frameOf(page + 4 + i)), true, `page ${i} of the buffer`);
        assert.equal(bitmap.has(GPA / PAGE + frameOf(page + i)), false, "what the device reads");
      }
      // The driver unmaps its buffers, as it does in strict mode.
      for (let i = 0; i < 8; i++) {
        guest.mapped.delete(page + i);
        await relay.iotlb({ type: "invalidate", iova: IOVA + (page + i) * PAGE, size: PAGE });
      }
    }
    assert.ok(guest.asked >= 40 * 8, `${guest.asked} questions`);
    assert.deepEqual(guest.errors, []);
  });
}

Deno.test("an invalidation waits for a buffer that the device holds; one of everything does not", async () => {
  await using guest = await IommuGuest.start({ latencyUs: 300_000 });
  const { relay } = guest;
  for (let i = 0; i < 8; i++) guest.mapped.set(DATA_PAGE + i, 3);
  guest.offer(DATA_PAGE, 100);
  await waitUntil("the device to hold it", () => relay.counters.of(0)[COUNTER.inflight] === 1);
  const begun = performance.now();
  await relay.iotlb({ type: "invalidate", iova: 0, size: 2 ** 52 - 1 });
  assert.ok(performance.now() - begun < 200, "a flush waits for nothing");
  assert.equal(guest.driver.take(), -1);
  await relay.iotlb({ type: "invalidate", iova: IOVA + (DATA_PAGE + 4) * PAGE, size: PAGE });
  assert.notEqual(guest.driver.take(), -1, "it came back before the invalidation was done");
  assert.deepEqual(guest.errors, []);
});

Deno.test("an address that was told, used, unmapped and mapped again before the answer to the first question is read is asked for again", async () => {
  for (const refused of [false, true]) {
    await using guest = await IommuGuest.start();
    const { relay } = guest;
    for (let i = 0; i < 8; i++) guest.mapped.set(DATA_PAGE + i, 3);
    guest.beforeAnswer = async () => {
      await waitUntil("the first echo", () => guest.driver.take() >= 0);
      await relay.iotlb({ type: "invalidate", iova: IOVA + DATA_PAGE * PAGE, size: 8 * PAGE });
      guest.offer(DATA_PAGE, 100);
      await waitUntil("the second echo", () => guest.driver.take() >= 0, 5_000);
      // The VMM may even have looked after the mapping's end.
      if (refused) throw new Error("nothing is mapped there");
    };
    guest.offer(DATA_PAGE, 100);
    await waitUntil("the late answer", () => guest.beforeAnswer === undefined);
    for (let i = 0; i < 3; i++) {
      await relay.iotlb({ type: "invalidate", iova: IOVA + DATA_PAGE * PAGE, size: 8 * PAGE });
      await waitUntil("room", () => relay.counters.of(0)[COUNTER.inflight] === 0);
      guest.offer(DATA_PAGE, 100);
      await waitUntil("an echo", () => guest.driver.take() >= 0, 5_000);
    }
    assert.deepEqual(guest.errors, []);
    assert.ok(relay.queues[0]!.running);
  }
});

Deno.test("an address that the guest's IOMMU does not map stops the queue with a name, and so does one that is mapped for another use", async () => {
  for (const perm of [undefined, 1] as const) {
    await using guest = await IommuGuest.start();
    for (let i = 0; i < 4; i++) guest.mapped.set(DATA_PAGE + i, 1);
    if (perm !== undefined) guest.mapped.set(DATA_PAGE + 4, perm);
    guest.offer(DATA_PAGE, 100);
    await waitUntil("the queue to fail", () => guest.relay.queues[0]!.state === "failed");
    assert.equal(guest.relay.queues[0]!.error!.code, "IOTLB_FAULT");
    assert.match(guest.relay.queues[0]!.error!.message, /maps nothing at 0x4000c064 for writing/);
  }
});

Deno.test("a ring that is unmapped while it runs stops, and starts again where it is mapped next", async () => {
  await using guest = await IommuGuest.start();
  for (let i = 0; i < 8; i++) guest.mapped.set(DATA_PAGE + i, 3);
  guest.mapped.delete(4);
  await guest.relay.iotlb({ type: "invalidate", iova: IOVA + 4 * PAGE, size: PAGE });
  await waitUntil("the queue to fail", () => guest.relay.queues[0]!.state === "failed" || guest.errors.length > 0);
  assert.match(guest.errors.join(), /IOTLB_FAULT/);
  guest.mapped.set(4, 3);
  await guest.relay.iotlb({ type: "update", iova: IOVA + 4 * PAGE, size: PAGE, gpa: GPA + frameOf(4) * PAGE, perm: 3 });
  await waitUntil("the ring to run", () => guest.relay.queues[0]!.running);
  guest.offer(DATA_PAGE, 100);
  await waitUntil("the echo", () => guest.driver.take() >= 0);
});

Deno.test("a driver that starts anew with other memory behind the same IOVAs is found there", async () => {
  await using guest = await IommuGuest.start();
  const { relay } = guest;
  for (let i = 0; i < 8; i++) guest.mapped.set(DATA_PAGE + i, 3);
  const ends = {
    "page by page": async () => {
      for (let page = 0; page < 6; page++) await relay.iotlb({ type: "invalidate", iova: IOVA + page * PAGE, size: PAGE });
    },
    "by a flush": () => relay.iotlb({ type: "invalidate", iova: 0, size: 2 ** 52 - 1 }),
    // A VMM does not listen to the guest's IOMMU for a device that is stopped.
    "without a word": () => Promise.resolve(),
  };
  let shift = 32;
  for (const [how, end] of Object.entries(ends)) {
    guest.offer(DATA_PAGE, 100);
    await waitUntil("an echo", () => guest.driver.take() >= 0);
    await relay.getVringBase(0);
    await end();
    await guest.restart(shift);
    guest.offer(DATA_PAGE, 100);
    await waitUntil(`an echo in the new ring, ended ${how}`, () => guest.driver.take() >= 0, 5_000);
    shift += 12;
  }
  assert.deepEqual(guest.errors, []);
});

Deno.test("without --guest-iommu the bit is not offered, and mappings are refused with the flag's name", async () => {
  await using device = await SimDevice.open({ kind: "loopback" });
  await using relay = new Relay(device, DEFAULT_RELAY_CONFIG, { log: () => {}, error: () => {} });
  assert.equal(await relay.getFeatures() & ACCESS_PLATFORM, 0n);
  await assert.rejects(relay.iotlb({ type: "update", iova: 0, size: 4096, gpa: 0, perm: 3 }), /--guest-iommu/);
});
