import assert from "node:assert/strict";
import { createEventfd, createMemfd, mapFd } from "../../src/ffi/mod.ts";
import type { SvqError } from "../../src/errors.ts";
import { VhostVdpa } from "../../src/vhost/vdpa.ts";
import type { VringStart } from "../../src/vhost/backend.ts";
import { type FakeOptions, FakeVdpa } from "./fake_vdpa.ts";

const MIB = 1 << 20;
const FEATURES = 1n << 9n;

function withCode(code: string): (error: SvqError) => true {
  return (error) => {
    assert.equal(error.code, code, error.stack);
    return true;
  };
}

interface Bench extends AsyncDisposable {
  fake: FakeVdpa;
  device: VhostVdpa;
  memory: Uint16Array;
  /** The front-end's settings of one ring, at `at` MiB. */
  setUp(index: number, at?: number, base?: number): Promise<void>;
  start(index: number, at?: number, base?: number): VringStart;
  /** Makes ring `at` look as if `avail` were offered and `used` came back. */
  indices(at: number, avail: number, used: number): void;
}

function bench(options: FakeOptions & { sysfsDriver?: string } = {}): Bench {
  const { sysfsDriver, ...fakeOptions } = options;
  const fake = new FakeVdpa(fakeOptions);
  const driver = sysfsDriver ?? (options.driver === "vp" ? "vp-vdpa" : options.driver === "other" ? "other" : "vdpasim_blk");
  const device = new VhostVdpa(fake, { driver, pins: false, restTimeoutMs: 20 });
  const fd = createMemfd("guest", 16 * MIB);
  const mapping = mapFd(fd.fd, { length: 16 * MIB });
  const memory = new Uint16Array(mapping.buffer());
  const kick = createEventfd();
  const call = createEventfd();
  const addresses = (at: number) => ({ desc: at * MIB, avail: at * MIB + 0x2000, used: at * MIB + 0x4000 });
  return {
    fake,
    device,
    memory,
    async setUp(index, at = index + 1, base = 0) {
      await device.setVringNum(index, 128);
      await device.setVringBase(index, base);
      await device.setVringAddresses(index, addresses(at));
      await device.setVringCall(index, call.fd);
      await device.setVringKick(index, kick.fd);
    },
    start: (index, at = index + 1, base = 0) => ({
      index,
      num: 128,
      base,
      addresses: addresses(at),
      kick: kick.fd,
      call: call.fd,
      err: null,
      enabled: true,
    }),
    indices(at, avail, used) {
      memory[(at * MIB + 0x2000) / 2 + 1] = avail;
      memory[(at * MIB + 0x4000) / 2 + 1] = used;
    },
    async [Symbol.asyncDispose]() {
      await device.close();
      mapping.close();
      fd.close();
      kick.close();
      call.close();
    },
  };
}

async function withMemory(b: Bench): Promise<void> {
  using fd = createMemfd("ram", 16 * MIB);
  await b.device.setMemTable([{ gpa: 0, size: 16 * MIB, uaddr: 0, fd: fd.fd, fdOffset: 0 }]);
}

// The bench's own memory, so that the back-end sees the indices that the test writes.
async function running(options: FakeOptions & { sysfsDriver?: string }, rings: number): Promise<Bench> {
  const b = bench(options);
  using fd = createMemfd("ram", 16 * MIB);
  const mapping = mapFd(fd.fd, { length: 16 * MIB });
  b.memory = new Uint16Array(mapping.buffer());
  b.indices = (at, avail, used) => {
    b.memory[(at * MIB + 0x2000) / 2 + 1] = avail;
    b.memory[(at * MIB + 0x4000) / 2 + 1] = used;
  };
  await b.device.setMemTable([{ gpa: 0, size: 16 * MIB, uaddr: 0, fd: fd.fd, fdOffset: 0 }]);
  await b.device.setFeatures(FEATURES);
  await b.device.startVrings(Array.from({ length: rings }, (_, index) => b.start(index)));
  const close = b[Symbol.asyncDispose].bind(b);
  b[Symbol.asyncDispose] = async () => {
    await close();
    mapping.close();
  };
  return b;
}

Deno.test("opening takes ownership, agrees on every known backend feature and asks for configuration interrupts", async () => {
  await using b = bench({ backendFeatures: 0xff0017en });
  assert.equal(b.fake.owned, true);
  assert.equal(b.fake.ackedBackend, 0x17en);
  assert.notEqual(b.fake.configCall, -1);
  assert.equal(b.device.info.queueNum, 2);
  assert.equal(b.device.info.ringStop, "each");
});

Deno.test("ACCESS_PLATFORM and VERSION_1 are acknowledged whatever the guest took", async () => {
  await using b = bench();
  await b.device.setFeatures(FEATURES);
  assert.equal(b.fake.acked, FEATURES | 3n << 32n);
  assert.equal(b.fake.status, 0xb);
});

Deno.test("a front-end without STATUS gets DRIVER_OK when its first ring is complete and no other is half done", async () => {
  await using b = bench();
  await withMemory(b);
  await b.device.setFeatures(FEATURES);
  await b.setUp(0);
  await b.device.setVringNum(1, 128);
  await b.device.setVringEnable(0, true);
  assert.equal(b.fake.status, 0xb, "ring 1 is half done");
  await b.setUp(1);
  assert.equal(b.fake.status, 0xf);
  assert.deepEqual(b.fake.active, { 0: MIB });
  await b.device.setVringEnable(1, true);
  assert.deepEqual(b.fake.active, { 0: MIB, 1: 2 * MIB });
  assert.ok(!b.fake.log.includes("SUSPEND"), "a prepared ring needs only VRING_ENABLE");
});

Deno.test("a front-end that asks for the status writes DRIVER_OK itself, and all rings reach the device before it", async () => {
  await using b = bench();
  await withMemory(b);
  await b.device.setFeatures(FEATURES);
  assert.equal(await b.device.getStatus(), 0xb);
  for (const index of [0, 1]) {
    await b.setUp(index);
    await b.device.setVringEnable(index, true);
  }
  assert.ok(!b.fake.log.some((entry) => entry.startsWith("SET_VRING_ADDR")));
  await b.device.setStatus(0xf);
  assert.deepEqual(b.fake.active, { 0: MIB, 1: 2 * MIB });
  assert.equal(b.fake.log.at(-1), "STATUS 15");
  // The next start, after a reset: features are known still.
  await b.device.setStatus(0);
  assert.deepEqual(b.fake.active, {});
  await b.setUp(0);
  await b.device.setVringEnable(0, true);
  await b.device.setStatus(0xf);
  assert.deepEqual(b.fake.active, { 0: MIB });
  assert.equal(b.fake.acked, FEATURES | 3n << 32n);
});

Deno.test("a ring of a driver on the tested list stops and gets new addresses while the other goes on", async () => {
  await using b = await running({ driver: "sim" }, 2);
  b.fake.rings[0]!.base = 77;
  b.fake.log.length = 0;
  assert.equal(await b.device.getVringBase(0), 77);
  assert.deepEqual(b.fake.active, { 1: 2 * MIB });
  assert.deepEqual(b.fake.log.filter((entry) => !entry.startsWith("GET_VRING_BASE")), ["SUSPEND", "SET_VRING_ENABLE 0 0", "RESUME"]);
  await b.setUp(0, 5, 77);
  assert.deepEqual(b.fake.active, { 0: 5 * MIB, 1: 2 * MIB });
  assert.equal(b.fake.rings[0]!.base, 77);
  assert.ok(!b.fake.log.some((entry) => entry.startsWith("STATUS")), "without a reset");
});

Deno.test("with its last ring stopped a device stays suspended until the next start", async () => {
  await using b = await running({ driver: "sim" }, 1);
  await b.device.getVringBase(0);
  assert.equal(b.fake.suspended, true);
  await b.device.startVrings([b.start(0, 7, 3)]);
  assert.equal(b.fake.suspended, false);
  assert.deepEqual(b.fake.active, { 0: 7 * MIB });
});

Deno.test("a driver that is not on the list is reset and set up again, and never trusted with new addresses under SUSPEND", async () => {
  await using b = await running({ driver: "other" }, 2);
  b.fake.rings[0]!.base = 11;
  b.fake.rings[1]!.base = 22;
  b.fake.log.length = 0;
  const bases = await b.device.stopVrings([{ index: 0 }, { index: 1 }]);
  assert.deepEqual(bases, [11, 22]);
  assert.equal(b.fake.status, 0);
  await b.device.startVrings([b.start(0, 5, 11), b.start(1, 6, 22)]);
  assert.deepEqual(b.fake.active, { 0: 5 * MIB, 1: 6 * MIB });
  assert.deepEqual(b.fake.rings.map((ring) => ring.base), [11, 22]);
  assert.equal(b.fake.log.filter((entry) => entry === "STATUS 0").length, 1, "one rebuild for both");
});

Deno.test("stopping one ring of such a device brings the other back where it was", async () => {
  await using b = await running({ driver: "other" }, 2);
  b.fake.rings[1]!.base = 22;
  await b.device.getVringBase(0);
  assert.deepEqual(b.fake.active, { 1: 2 * MIB });
  assert.equal(b.fake.rings[1]!.base, 22);
  b.fake.rings[1]!.base = 30;
  await b.setUp(0, 4, 9);
  assert.deepEqual(b.fake.active, { 0: 4 * MIB, 1: 2 * MIB });
  assert.equal(b.fake.rings[1]!.base, 30);
});

Deno.test("a device without SUSPEND stops a ring only when everything came back", async () => {
  await using b = await running({ driver: "vp" }, 2);
  assert.equal(b.device.info.ringStop, "at-rest");
  b.indices(1, 9, 7);
  await assert.rejects(b.device.getVringBase(0), withCode("RING_NOT_AT_REST"));
  b.indices(1, 9, 9);
  assert.equal(await b.device.getVringBase(0), 9);
  assert.equal(b.fake.status, 0xf, "the other ring runs, so there is no reset");
  await assert.rejects(b.device.startVrings([b.start(0, 5)]), withCode("RING_NOT_AT_REST"));
  await b.device.startVrings([b.start(0, 1, 9)]);
  assert.deepEqual(b.fake.active, { 0: MIB, 1: 2 * MIB });
  b.indices(2, 4, 4);
  assert.deepEqual(await b.device.stopVrings([{ index: 0 }, { index: 1 }]), [9, 4]);
  assert.equal(b.fake.status, 0, "with its last ring it is reset");
  await assert.rejects(b.device.startVrings([b.start(0, 1, 9)]), withCode("BASE_NOT_SUPPORTED"));
  await b.device.startVrings([b.start(0, 5), b.start(1, 6)]);
  assert.deepEqual(b.fake.active, { 0: 5 * MIB, 1: 6 * MIB });
});

Deno.test("a caller that has recorded what is in flight may cut such a device off by a reset", async () => {
  await using b = await running({ driver: "vp" }, 1);
  b.indices(1, 12, 8);
  assert.deepEqual(await b.device.stopVrings([{ index: 0, recorded: true }]), [8]);
  assert.equal(b.fake.status, 0);
});

Deno.test("receive buffers of a net device are given back by a reset without waiting for them", async () => {
  await using b = await running({ driver: "vp", deviceId: 1, vqs: 3 }, 2);
  assert.equal(b.device.info.queueNum, 1);
  b.indices(1, 128, 5);
  b.indices(2, 6, 6);
  assert.deepEqual(await b.device.stopVrings([{ index: 0 }, { index: 1 }]), [5, 6]);
});

Deno.test("maps survive a reset where IOTLB_PERSIST is agreed on, and are made again where not", async () => {
  for (const persist of [true, false]) {
    const backendFeatures = persist ? 0x17en : 0x7en;
    await using b = await running({ driver: "sim", backendFeatures }, 1);
    await b.device.setStatus(0);
    assert.equal(b.fake.driverTable.size, persist ? 1 : 0);
    await b.device.startVrings([b.start(0)]);
    await b.device.setStatus(0xf);
    assert.equal(b.fake.driverTable.size, 1);
    assert.equal(b.device.maps.counters.remapped, persist ? 0 : 1);
  }
});

Deno.test("rings that were stopped start again without a new DRIVER_OK, also where stopping them took a reset", async () => {
  for (const driver of ["sim", "other", "vp"] as const) {
    await using b = await running({ driver }, 2);
    await b.device.getStatus();
    for (const index of [0, 1]) await b.device.getVringBase(index);
    assert.deepEqual(b.fake.active, {});
    assert.equal(await b.device.getStatus(), 0xf, "nothing of this is the front-end's business");
    await b.setUp(0, 5);
    await b.setUp(1, 6);
    assert.deepEqual(b.fake.active, { 0: 5 * MIB, 1: 6 * MIB }, driver);
  }
});

Deno.test("suspend holds all rings, also those that start meanwhile, until resume", async () => {
  await using b = await running({ driver: "sim" }, 1);
  await b.device.suspend();
  await b.device.startVrings([b.start(1)]);
  assert.deepEqual(b.fake.active, {});
  await b.device.resume();
  assert.deepEqual(b.fake.active, { 0: MIB, 1: 2 * MIB });
});

Deno.test("without RESUME the device is resumed by setting it up again", async () => {
  await using b = await running({ driver: "other", backendFeatures: 0x1en }, 1);
  await b.device.suspend();
  b.fake.rings[0]!.base = 50;
  await b.device.resume();
  assert.deepEqual(b.fake.active, { 0: MIB });
  assert.equal(b.fake.rings[0]!.base, 50);
});

Deno.test("a device without SUSPEND refuses to suspend with a reason", async () => {
  await using b = await running({ driver: "vp" }, 1);
  await assert.rejects(b.device.suspend(), withCode("CANNOT_SUSPEND"));
});

Deno.test("ring sizes that the device does not take are refused before the kernel sees them", async () => {
  await using b = bench({ numMax: 256 });
  await assert.rejects(b.device.setVringNum(0, 512), withCode("BAD_RING_SIZE"));
  await assert.rejects(b.device.setVringNum(0, 100), withCode("BAD_RING_SIZE"));
  await assert.rejects(b.device.setVringNum(5, 64), withCode("NO_SUCH_QUEUE"));
});

Deno.test("what lies behind the configuration space reads as zero", async () => {
  await using b = bench();
  const bytes = await b.device.getConfig(90, 10);
  assert.deepEqual([...bytes], [90, 91, 92, 93, 94, 95, 0, 0, 0, 0]);
});

Deno.test("a device that no longer answers is closed without its maps or eventfds being left behind", async () => {
  const b = await running({}, 1);
  await b[Symbol.asyncDispose]();
  assert.equal(b.fake.closed, true);
  assert.deepEqual(b.device.maps.maps, []);
  await assert.rejects(b.device.getFeatures(), withCode("CLOSED"));
});
