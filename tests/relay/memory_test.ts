import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { DirtyBitmap } from "../../src/dirty/bitmap.ts";
import { createMemfd, mapFd, signalEventfd, unixPair } from "../../src/ffi/mod.ts";
import type { MemoryRegion } from "../../src/memory/region.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayConfig } from "../../src/relay/relay.ts";
import { bit } from "../../src/uapi/bits.ts";
import { PROTOCOL_FEATURE } from "../../src/uapi/vhost_user.ts";
import { FRONT_END_PROTOCOL_FEATURES, VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";
import { HandMemory, HandRing } from "../support/hand_ring.ts";
import { waitUntil } from "../support/wait.ts";

const LOG_ALL = 1n << 26n;
const VERSION_1 = 1n << 32n;
const QUIET = { log: () => {}, error: (error: { message: string }) => assert.fail(error.message) };

/** A relay over a device behind a vhost-user socket, with the protocol features that are asked for. */
async function overSocket(sim: SimDevice, protocolFeatures = FRONT_END_PROTOCOL_FEATURES): Promise<AsyncDisposable & { relay: Relay }> {
  const [a, b] = unixPair();
  const ended = new BackendServer(a, sim).run();
  const device = await VhostUserFrontEnd.fromStream(b, { timeoutMs: 10_000, protocolFeatures });
  const relay = new Relay(device, { ...DEFAULT_RELAY_CONFIG }, QUIET);
  return {
    relay,
    [Symbol.asyncDispose]: async () => {
      await relay.close();
      await device.close();
      await ended;
    },
  };
}

async function startRing(relay: Relay, ring: HandRing): Promise<void> {
  const { index, num, base, addresses, kick, call } = ring.start();
  await relay.setVringNum(index, num);
  await relay.setVringBase(index, base);
  await relay.setVringAddresses(index, addresses);
  await relay.setVringCall(index, call);
  await relay.setVringKick(index, kick);
  await relay.setVringEnable(index, true);
}

for (const mode of ["shadow", "used"] as const) {
  Deno.test(`memory that is plugged in under a running ring can be used, and taken out when no chain needs it: ${mode}`, async () => {
    await using sim = await SimDevice.open({ kind: "loopback", latencyUs: 300_000 });
    await using relay = new Relay(sim, { ...DEFAULT_RELAY_CONFIG, mode }, QUIET);
    using low = new HandMemory(1 << 20, 0);
    using high = new HandMemory(1 << 20, 0x1_0000_0000);
    using ring = new HandRing(low, 0, 0);
    await relay.setFeatures(VERSION_1);
    await relay.addMemRegion(low.region);
    await startRing(relay, ring);
    await relay.addMemRegion(high.region);
    high.bytes.fill(7, 0, 64);
    ring.offer([high.gpa, 64, false], [high.gpa + 4096, 64, true]);
    signalEventfd(ring.kick.fd);
    await waitUntil("the chain at the device", () => relay.counters.of(0)[6] === 1);
    assert.equal(ring.usedIdx, 0);
    await relay.removeMemRegion(high.region);
    assert.equal(ring.usedIdx, 1, "the chain came back first");
    assert.equal(high.bytes[4096], 7);
    assert.equal(relay.memory.regions.length, 1);
    // And the ring still works.
    low.bytes.fill(9, 0x8000, 0x8040);
    ring.offer([0x8000, 64, false], [0x9000, 64, true]);
    signalEventfd(ring.kick.fd);
    await waitUntil("the answer", () => ring.usedIdx === 2);
    assert.equal(low.bytes[0x9000], 9);
  });
}

/** Regions of 64 KiB of one file; `gap` pages of nothing between them. */
function regionsOf(fd: number, count: number, gap: number): MemoryRegion[] {
  const size = 0x10000;
  return Array.from({ length: count }, (_, i) => {
    const gpa = i * (size + gap * 4096);
    return { gpa, size, uaddr: 0x7000_0000_0000 + gpa, fd, fdOffset: i * size };
  });
}

Deno.test("a device with slots takes 508 regions and the shadow rings, and the VMM is offered one slot less", async () => {
  await using sim = await SimDevice.open({ kind: "loopback" });
  await using world = await overSocket(sim);
  const { relay } = world;
  assert.equal(relay.info.maxMemSlots, 508);
  using file = createMemfd("ram", 512 * 0x10000);
  const regions = regionsOf(file.fd, 509, 1);
  await relay.setFeatures(VERSION_1);
  for (const region of regions.slice(0, 508)) await relay.addMemRegion(region);
  await assert.rejects(relay.addMemRegion(regions[508]!), { code: "TOO_MANY_REGIONS" });
  assert.equal(relay.memory.regions.length, 508, "what was refused is not kept");
  await relay.removeMemRegion(regions[3]!);
  await relay.addMemRegion(regions[508]!);
  await relay.setMemTable(regions.slice(0, 2));
  assert.equal(relay.memory.regions.length, 2);
});

Deno.test("for a device of 8 regions neighbours in one file are joined, and what is too much is refused", async () => {
  await using sim = await SimDevice.open({ kind: "loopback" });
  await using world = await overSocket(sim, FRONT_END_PROTOCOL_FEATURES & ~bit(PROTOCOL_FEATURE.CONFIGURE_MEM_SLOTS));
  const { relay } = world;
  assert.equal(relay.info.maxMemSlots, 7);
  using file = createMemfd("ram", 64 * 0x10000);
  await relay.setFeatures(VERSION_1);
  await relay.setMemTable(regionsOf(file.fd, 40, 0));
  for (const region of regionsOf(file.fd, 48, 0).slice(40)) await relay.addMemRegion(region);
  assert.equal(relay.memory.regions.length, 48);
  const apart = regionsOf(file.fd, 8, 1);
  await assert.rejects(relay.setMemTable(apart), { code: "TOO_MANY_REGIONS" });
  await relay.setMemTable(apart.slice(0, 7));
});

Deno.test("when a log has been replaced under load, nobody writes to the old one any more", async () => {
  await using sim = await SimDevice.open({ kind: "blk", size: 32 << 20, queues: 2 });
  const config: RelayConfig = { ...DEFAULT_RELAY_CONFIG, workers: 2 };
  await using relay = new Relay(sim, config, QUIET);
  await using driver = await EmbeddedDriver.open(relay, { queues: 2, depth: 16, num: 64, ramSize: 16 << 20, regionSize: 16 << 20 });
  const run = driver.run({ durationMs: 60_000 });
  const size = 1 << 18;
  const logs = Array.from({ length: 8 }, () => {
    const fd = createMemfd("log", size);
    return { fd, mapping: mapFd(fd.fd, { length: size }) };
  });
  const use = (i: number) => relay.setLogBase({ fd: logs[i]!.fd.fd, offset: 0, size });
  const bitmap = (i: number) => new DirtyBitmap(logs[i]!.mapping.buffer());
  await use(0);
  await relay.setFeatures(relay.features | LOG_ALL);
  for (let i = 1; i < logs.length; i++) {
    await waitUntil("dirty pages", () => bitmap(i - 1).count() > 0);
    await use(i);
    bitmap(i - 1).clear();
    await waitUntil("dirty pages in the new log", () => bitmap(i).count() > 0);
    assert.equal(bitmap(i - 1).count(), 0, `log ${i - 1} was left`);
  }
  await relay.setFeatures(relay.features);
  await driver.stop();
  const { lost, duplicated, corrupted } = await run;
  assert.deepEqual([lost, duplicated, corrupted], [0, 0, 0]);
  await relay.close();
  for (const { fd, mapping } of logs) {
    mapping.close();
    fd.close();
  }
});

Deno.test("a log that does not cover memory that was plugged in later is refused, and a larger one taken", async () => {
  await using sim = await SimDevice.open({ kind: "loopback" });
  await using relay = new Relay(sim, { ...DEFAULT_RELAY_CONFIG }, QUIET);
  using low = new HandMemory(1 << 20, 0);
  using high = new HandMemory(1 << 20, 0x1_0000_0000);
  using ring = new HandRing(low, 0, 0);
  await relay.setFeatures(VERSION_1);
  await relay.addMemRegion(low.region);
  await startRing(relay, ring);
  await relay.addMemRegion(high.region);
  using small = createMemfd("log", 4096);
  await assert.rejects(relay.setLogBase({ fd: small.fd, offset: 0, size: 4096 }), { code: "LOG_TOO_SMALL" });
  const size = 0x1_0010_0000 / 4096 / 8;
  using log = createMemfd("log", size);
  using mapping = mapFd(log.fd, { length: size });
  await relay.setLogBase({ fd: log.fd, offset: 0, size });
  await relay.setFeatures(VERSION_1 | LOG_ALL);
  ring.offer([0x8000, 64, false], [high.gpa + 0x5000, 64, true]);
  signalEventfd(ring.kick.fd);
  await waitUntil("the answer", () => ring.usedIdx === 1);
  assert.equal(new DirtyBitmap(mapping.buffer()).count(), 1);
  assert.equal(new Uint8Array(mapping.buffer())[0x1_0000_5000 / 4096 / 8 | 0], 1 << (0x1_0000_5000 / 4096 % 8));
});
