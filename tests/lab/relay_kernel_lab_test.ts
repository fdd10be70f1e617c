/**
 * The relay on the kernel's real devices, in the lab VM: driver -> Relay -> device.
 */
import assert from "node:assert/strict";
import { openDevice } from "../../src/devices/open.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { COUNTER } from "../../src/relay/counters.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayConfig, type RelayMode } from "../../src/relay/relay.ts";
import type { VhostBackend } from "../../src/vhost/backend.ts";
import { Gate } from "../support/gate.ts";
import { vmTest, type VmTestOptions } from "../support/lab_vm.ts";
import { waitUntil } from "../support/wait.ts";

const MIB = 1 << 20;
const NUM = 64;
const DEPTH = 8;
const PATIENCE_MS = 120_000;
const SHAPE = { ramSize: 4 * MIB, depth: DEPTH, num: NUM, regionSize: 4 * MIB };

function relayOver(device: VhostBackend, mode: RelayMode): { relay: Relay; config: RelayConfig; errors: string[] } {
  const config: RelayConfig = { ...DEFAULT_RELAY_CONFIG, mode };
  const errors: string[] = [];
  return { relay: new Relay(device, config, { log: () => {}, error: ({ message }) => errors.push(message) }), config, errors };
}

function word(buffer: ArrayBuffer, offset = 2): number {
  return new Uint16Array(buffer, offset, 1)[0]!;
}

/**
 * With requests in flight, lets the device do its part alone: all of them, while the relay is not told. Whatever changes in
 * the guest's used ring meanwhile, the device has written.
 */
async function deviceWritesNothingOfTheGuests(relay: Relay, gate: Gate): Promise<void> {
  const [queue] = relay.queues;
  const { avail, used } = queue!.addresses!;
  const guestAvail = relay.memory.buffer(avail, 4);
  const guestUsed = relay.memory.buffer(used, 6 + 8 * NUM);
  const arena = relay.arena!.slot(0);
  const place = (iova: number) => iova - relay.arena!.iova;
  const own = gate.addresses!;
  assert.ok(place(own.used) >= 0 && place(own.used) < arena.byteLength, "the device's used ring lies in the arena");
  const deviceAvail = () => word(arena, place(own.avail) + 2);
  const deviceUsed = () => word(arena, place(own.used) + 2);
  gate.holdKicks();
  const all = () =>
    gate.kickHeld && ((word(guestAvail) - word(guestUsed)) & 0xffff) === DEPTH && relay.counters.of(0)[COUNTER.inflight] === DEPTH &&
    ((deviceAvail() - deviceUsed()) & 0xffff) === DEPTH;
  await waitUntil("all requests to wait at the device", all, PATIENCE_MS);
  gate.holdCalls();
  const before = new Uint8Array(guestUsed).toHex();
  gate.releaseKicks();
  await waitUntil("the device to do them", () => deviceUsed() === deviceAvail(), PATIENCE_MS);
  assert.equal(new Uint8Array(guestUsed).toHex(), before, "the guest's used ring");
  gate.releaseCalls();
}

async function progress(driver: EmbeddedDriver, what: string): Promise<void> {
  const before = (await driver.report()).completed;
  await waitUntil(`requests in ${what}`, async () => (await driver.report()).completed > before + 2 * DEPTH, PATIENCE_MS);
}

async function finish(driver: EmbeddedDriver, run: ReturnType<EmbeddedDriver["run"]>, errors: string[]): Promise<void> {
  await driver.stop();
  const report = await run;
  assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.faults], [0, 0, 0, []]);
  assert.deepEqual(errors, []);
}

const plain: VmTestOptions = {
  file: import.meta.url,
  modules: ["vhost_vdpa", "vduse", "vdpa_sim_blk"],
  setup: ["vdpa dev add name blk0 mgmtdev vdpasim_blk", "truncate -s 16M /tmp/disk", "lab-vduse user0 /tmp/disk"],
  timeoutMs: 900_000,
};

vmTest("modes change under load on vdpa_sim_blk, and the device leaves the guest's used ring alone after each switch", plain, async () => {
  await using device = await openDevice("vdpa:blk0");
  await using gate = new Gate(device);
  const { relay, config, errors } = relayOver(gate.device, "passthrough");
  await using _ = { [Symbol.asyncDispose]: () => relay.close() };
  await using driver = await EmbeddedDriver.open(relay, SHAPE);
  const run = driver.run();
  await progress(driver, "passthrough");
  for (const mode of ["shadow", "passthrough", "used", "notify", "shadow", "used", "passthrough"] as const) {
    config.mode = mode;
    await relay.applyMode();
    assert.equal(relay.queues[0]!.mode, mode);
    await progress(driver, mode);
    if (mode === "shadow" || mode === "used") await deviceWritesNothingOfTheGuests(relay, gate);
  }
  assert.equal(relay.queues[0]!.times.count, 7);
  await finish(driver, run, errors);
});

async function atRest(name: string): Promise<void> {
  await using device = await openDevice(`vdpa:${name}`);
  await using gate = new Gate(device);
  const { relay, errors, config } = relayOver(gate.device, "auto");
  await using _ = { [Symbol.asyncDispose]: () => relay.close() };
  await using driver = await EmbeddedDriver.open(relay, SHAPE);
  assert.equal(relay.queues[0]!.mode, "used", "from the start");
  for (let part = 0; part < 2; part++) {
    const run = driver.run();
    await progress(driver, relay.queues[0]!.mode!);
    await deviceWritesNothingOfTheGuests(relay, gate);
    await finish(driver, run, errors);
    // A rebuild by the relay: shadow instead of used, and the driver does not notice.
    if (part === 0) {
      config.mode = "shadow";
      await relay.applyMode();
      assert.equal(relay.queues[0]!.mode, "shadow");
    }
  }
  // Drained: what GET_VRING_BASE answers is where the guest's rings stand.
  const base = await relay.getVringBase(0);
  const { avail, used } = relay.queues[0]!.addresses!;
  assert.equal(base, word(relay.memory.buffer(avail, 4)));
  assert.equal(base, word(relay.memory.buffer(used, 4)));
}

vmTest(
  "a VDUSE device runs on the relay's own used ring from the start, changes to shadow, and stops drained",
  plain,
  () => atRest("user0"),
);

const behindIommu: VmTestOptions = {
  file: import.meta.url,
  modules: ["vhost_vdpa"],
  setup: ["lab-vp 05 vpblk"],
  vp: { blk: true },
  timeoutMs: 900_000,
};

vmTest(
  "vp_vdpa runs on the relay's own used ring from the start, changes to shadow, and stops drained",
  behindIommu,
  () => atRest("vpblk"),
);
