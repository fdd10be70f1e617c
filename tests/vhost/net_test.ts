import assert from "node:assert/strict";
import type { SvqError } from "../../src/errors.ts";
import { createEventfd, createMemfd, type Mapping } from "../../src/ffi/mod.ts";
import { VHOST, viewOf } from "../../src/uapi/vhost.ts";
import type { KernelDevice } from "../../src/vhost/kernel_device.ts";
import { VhostNet } from "../../src/vhost/net.ts";

const MIB = 1 << 20;
const NAMES = new Map<number, string>(Object.entries(VHOST).map(([name, number]) => [number, name]));

/** Answers as vhost-net does, and writes down what it was asked. */
class FakeVhostNet implements KernelDevice {
  readonly path = "/dev/vhost-net";
  readonly fd = -1;
  readonly log: string[] = [];
  features = 0n;
  regions: { gpa: bigint; size: bigint }[] = [];
  addresses = new Map<number, { flags: number; log: bigint }>();
  base = 0;
  closed = false;

  ioctl(request: number, argument: Uint8Array<ArrayBuffer> | null, _name: string): number {
    const view = argument === null ? new DataView(new ArrayBuffer(8)) : viewOf(argument);
    const index = view.byteLength >= 4 ? view.getUint32(0, true) : 0;
    if (request === VHOST.GET_FEATURES) view.setBigUint64(0, 0x1033d008000n, true);
    else if (request === VHOST.SET_FEATURES) this.features = view.getBigUint64(0, true);
    else if (request === VHOST.SET_MEM_TABLE) {
      this.regions = Array.from({ length: index }, (_, i) => ({
        gpa: view.getBigUint64(8 + 32 * i, true),
        size: view.getBigUint64(16 + 32 * i, true),
      }));
    } else if (request === VHOST.SET_VRING_ADDR) {
      this.addresses.set(index, { flags: view.getUint32(4, true), log: view.getBigUint64(32, true) });
    } else if (request === VHOST.GET_VRING_BASE) view.setUint32(4, this.base, true);
    const isBackend = request === VHOST.NET_SET_BACKEND;
    this.log.push(`${NAMES.get(request)} ${index}${isBackend ? (view.getInt32(4, true) < 0 ? " off" : " on") : ""}`);
    return 0;
  }

  write(): void {}
  mapPage(): Mapping {
    throw new Error("no doorbells");
  }
  close(): void {
    this.closed = true;
  }
  [Symbol.dispose](): void {
    this.close();
  }
}

function setUp() {
  const kernel = new FakeVhostNet();
  const tap = {
    fd: 99,
    header: 0,
    offloads: -1,
    closed: false,
    setHeaderSize: (bytes: number) => void (tap.header = bytes),
    setOffloads: (bits: number) => void (tap.offloads = bits),
    close: () => void (tap.closed = true),
  };
  const device = new VhostNet(kernel, tap);
  const ram = createMemfd("ram", 4 * MIB);
  const kick = createEventfd();
  return {
    ...{ kernel, tap, device },
    region: { gpa: 0x100000, size: 2 * MIB, uaddr: 0, fd: ram.fd, fdOffset: 0 },
    async start(index: number, logGpa?: number) {
      await device.setVringNum(index, 256);
      await device.setVringBase(index, 7);
      const at = 0x100000 + index * 0x10000;
      await device.setVringAddresses(index, { desc: at, avail: at + 0x2000, used: at + 0x4000, logGpa });
      await device.setVringKick(index, kick.fd);
      await device.setVringEnable(index, true);
    },
    async [Symbol.asyncDispose]() {
      await device.close();
      ram.close();
      kick.close();
    },
  };
}

Deno.test("a ring runs from NET_SET_BACKEND with the tap to -1, and its base is read after that", async () => {
  await using t = setUp();
  await t.device.setMemTable([t.region]);
  await t.device.setFeatures(1n << 32n);
  t.kernel.log.length = 0;
  await t.start(1);
  assert.deepEqual(t.kernel.log, [
    ...["SET_VRING_NUM 1", "SET_VRING_BASE 1", "SET_VRING_ADDR 1", "SET_VRING_ERR 1", "SET_VRING_CALL 1", "SET_VRING_KICK 1"],
    "NET_SET_BACKEND 1 on",
  ]);
  t.kernel.base = 0x0009_0009;
  t.kernel.log.length = 0;
  assert.equal(await t.device.getVringBase(1), 9);
  assert.deepEqual(t.kernel.log, ["NET_SET_BACKEND 1 off", "GET_VRING_BASE 1"]);
});

Deno.test("the tap does the packet features, the kernel the ring features, and the header is as long as the guest thinks", async () => {
  await using t = setUp();
  const offered = await t.device.getFeatures();
  assert.equal(offered & (1n << 26n), 1n << 26n, "LOG_ALL");
  assert.equal(offered & (1n << 33n | 1n << 27n), 0n, "neither ACCESS_PLATFORM nor the header bit");
  await t.device.setFeatures(1n << 32n | 0b1000_0011n);
  assert.equal(t.kernel.features, 1n << 32n);
  assert.equal(t.tap.header, 12);
  assert.equal(t.tap.offloads, 3, "checksums and TSO4");
  await t.device.setFeatures(0n);
  assert.equal(t.tap.header, 10);
  await assert.rejects(t.device.setFeatures(1n << 17n), { code: "FEATURES_NOT_OFFERED" });
});

Deno.test("the log flag of a running ring changes without stopping it", async () => {
  await using t = setUp();
  await t.device.setMemTable([t.region]);
  await t.start(0);
  assert.deepEqual(t.kernel.addresses.get(0), { flags: 0, log: 0n });
  await t.device.setVringAddresses(0, { desc: 0x100000, avail: 0x102000, used: 0x104000, logGpa: 0x104000 });
  assert.deepEqual(t.kernel.addresses.get(0), { flags: 1, log: 0x104000n });
  assert.ok(!t.kernel.log.includes("NET_SET_BACKEND 0 off"));
});

Deno.test("regions come and go while rings run", async () => {
  await using t = setUp();
  await t.device.setMemTable([t.region]);
  await t.start(0);
  const more = { ...t.region, gpa: 0x800000, fdOffset: 2 * MIB };
  await t.device.addMemRegion(more);
  assert.deepEqual(t.kernel.regions.map(({ gpa }) => gpa), [0x100000n, 0x800000n]);
  await t.device.removeMemRegion(more);
  assert.deepEqual(t.kernel.regions.map(({ gpa }) => gpa), [0x100000n]);
});

Deno.test("a ring outside guest memory, a third queue and a missing kick are refused", async () => {
  await using t = setUp();
  const withCode = (code: string) => (error: SvqError) => error.code === code;
  await assert.rejects(t.start(0), withCode("OUTSIDE_MEMORY"));
  await assert.rejects(t.device.setVringNum(2, 256), withCode("NO_SUCH_QUEUE"));
  await assert.rejects(t.device.setVringKick(0, null), withCode("KICK_NEEDED"));
});
