/**
 * The relay on the kernel's real devices, in the lab VM: driver -> Relay -> device.
 */
import assert from "node:assert/strict";
import { openDevice } from "../../../src/devices/open.ts";
import { EmbeddedDriver } from "../../../src/drivers/embedded_driver.ts";
import { mapFd, type Mapping, PROT, unixPair } from "../../../src/ffi/mod.ts";
import { COUNTER } from "../../../src/relay/counters.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayConfig, type RelayMode } from "../../../src/relay/relay.ts";
import type { Doorbell, VhostBackend } from "../../../src/vhost/backend.ts";
import { VhostUserFrontEnd } from "../../../src/vhost_user/front_end.ts";
import { BackendServer } from "../../../src/vhost_user/server.ts";
import { Gate } from "../../support/gate.ts";
import { HandMemory, HandRing } from "../../support/hand_ring.ts";
import { labMachines } from "../../support/lab_machines.ts";
import { BAD_UPGRADE_IN_VM, vmTest } from "../../support/lab_vm.ts";
import { RelayProcess } from "../../support/relay_process.ts";
import { TempDir } from "../../support/temp.ts";
import { waitUntil } from "../../support/wait.ts";

const { plain, behindIommu } = labMachines(import.meta.url);

const MIB = 1 << 20;
const NUM = 64;
const DEPTH = 8;
const PATIENCE_MS = 60_000;
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
  try {
    const state = () => ({
      kickHeld: gate.kickHeld,
      guest: (word(guestAvail) - word(guestUsed)) & 0xffff,
      relay: relay.counters.of(0)[COUNTER.inflight],
      device: (deviceAvail() - deviceUsed()) & 0xffff,
    });
    const all = () => Object.values(state()).every((value) => value === true || value === DEPTH);
    await waitUntil("all requests to wait at the device", all, PATIENCE_MS).catch((error) => {
      throw new Error(`${error.message}: ${JSON.stringify(state())}`);
    });
    gate.holdCalls();
    const before = new Uint8Array(guestUsed).toHex();
    gate.releaseKicks();
    await waitUntil("the device to do them", () => deviceUsed() === deviceAvail(), PATIENCE_MS);
    assert.equal(new Uint8Array(guestUsed).toHex(), before, "the guest's used ring");
  } finally {
    // Held back, nothing could ever be drained: a failure would not be seen.
    gate.releaseKicks();
    gate.releaseCalls();
  }
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

vmTest("modes change under load on vdpa_sim_blk, and the device leaves the guest's used ring alone after each switch", plain, async () => {
  await using device = await openDevice("vdpa:blk0");
  let mode: RelayMode = "passthrough";
  await using gate = new Gate(device, () => mode === "shadow" || mode === "used");
  const { relay, config, errors } = relayOver(gate.device, mode);
  await using _ = { [Symbol.asyncDispose]: () => relay.close() };
  await using driver = await EmbeddedDriver.open(relay, SHAPE);
  const run = driver.run();
  // What ended the test is to be seen, not that this ended with it.
  run.catch(() => {});
  await progress(driver, "passthrough");
  for (const next of ["shadow", "passthrough", "used", "notify", "shadow", "used", "passthrough"] as const) {
    config.mode = mode = next;
    await relay.applyMode();
    assert.equal(relay.queues[0]!.mode, mode);
    await progress(driver, mode);
    if (mode === "shadow" || mode === "used") await deviceWritesNothingOfTheGuests(relay, gate);
  }
  assert.equal(relay.queues[0]!.times.count, 7);
  await finish(driver, run, errors);
});

vmTest("a relay on vdpa_sim_blk is upgraded under load: the new version opens the device anew, and nothing is lost", plain, async () => {
  using folder = new TempDir();
  await using relay = await RelayProcess.start({ folder: folder.path, device: "vdpa:blk0", args: ["--mode", "shadow"] });
  await using front = await VhostUserFrontEnd.connect(relay.front, { timeoutMs: PATIENCE_MS });
  await using driver = await EmbeddedDriver.open(front, SHAPE);
  const run = driver.run();
  // What ended the test is to be seen, not that this ended with it.
  run.catch(() => {});
  await progress(driver, "the old version");
  const { pid } = await relay.upgrade();
  await progress(driver, "the new version");
  assert.equal((await relay.status()).pid, pid);
  // The device is held by the old one, which opens it again.
  const bad = [Deno.execPath(), ...BAD_UPGRADE_IN_VM.slice(1)];
  await assert.rejects(relay.upgrade([...bad, "fails with its rings running"]), { code: "UPGRADE_FAILED", exitCode: 7 });
  await progress(driver, "the version that goes on");
  assert.equal((await relay.status()).pid, pid);
  await finish(driver, run, []);
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
    // What ended the test is to be seen, not that this ended with it.
    run.catch(() => {});
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

vmTest(
  "vp_vdpa runs on the relay's own used ring from the start, changes to shadow, and stops drained",
  behindIommu,
  () => atRest("vpblk"),
);

/** Asks the disk for its name: one chain. */
async function askForId(ring: HandRing, kick: () => void): Promise<void> {
  const { memory } = ring;
  const at = 0x40000;
  memory.bytes.fill(0, at, at + 64);
  memory.view.setUint32(at, 8, true);
  memory.bytes[at + 60] = 0xff;
  ring.offer([at, 16, false], [at + 32, 20, true], [at + 60, 1, true]);
  kick();
  await ring.taken("the disk's name");
  assert.equal(memory.bytes[at + 60], 0, "status OK");
}

vmTest("in passthrough a VMM kicks vp_vdpa by its doorbell, and gives it back before the relay takes the kicks", behindIommu, async () => {
  await using device = await openDevice("vdpa:vpblk");
  const { relay, config, errors } = relayOver(device, "passthrough");
  await using _ = { [Symbol.asyncDispose]: () => relay.close() };
  assert.equal(relay.canLog, false, "a guest on this device's own rings cannot be migrated");
  const [a, b] = unixPair();
  const ended = new BackendServer(a, relay, { offerLog: relay.canLog }).run();
  let page: Mapping | undefined;
  let returnedIn: string | undefined;
  const onDoorbell = (_index: number, doorbell: Doorbell | undefined) => {
    page?.close();
    page = undefined;
    if (doorbell === undefined) returnedIn = relay.queues[0]!.mode;
    else page = mapFd(doorbell.fd, { offset: doorbell.offset, length: doorbell.size, prot: PROT.WRITE });
    return true;
  };
  await using front = await VhostUserFrontEnd.fromStream(b, { timeoutMs: PATIENCE_MS, onDoorbell });
  using memory = new HandMemory();
  using ring = new HandRing(memory, 0, 0x10000);
  await front.setFeatures(1n << 32n);
  await front.setMemTable([memory.region]);
  const start = ring.start();
  await front.setVringNum(0, start.num);
  await front.setVringBase(0, 0);
  await front.setVringAddresses(0, start.addresses);
  await front.setVringCall(0, start.call);
  await front.setVringKick(0, start.kick!);
  await front.setVringEnable(0, true);
  const kicks = () => relay.counters.of(0)[COUNTER.kicks]!;
  for (let round = 0; round < 2; round++) {
    await waitUntil("the doorbell", () => page !== undefined, PATIENCE_MS);
    assert.deepEqual(relay.doorbells, [0]);
    // Nobody signals an eventfd: the store alone reaches the device.
    ring.silent = true;
    const before = kicks();
    for (let i = 0; i < 20; i++) await askForId(ring, () => new Uint16Array(page!.buffer(0, 2))[0] = 0);
    assert.equal(kicks(), before, "past the relay");
    ring.silent = false;
    returnedIn = undefined;
    config.mode = "notify";
    await relay.applyMode();
    assert.equal(returnedIn, "passthrough", "given back while the kicks were still the device's");
    assert.equal(page, undefined);
    assert.deepEqual(relay.doorbells, []);
    for (let i = 0; i < 20; i++) await askForId(ring, () => {});
    assert.ok(kicks() > before, "through the relay");
    config.mode = "passthrough";
    await relay.applyMode();
  }
  config.mode = "shadow";
  await assert.rejects(relay.applyMode(), { code: "CANNOT_LEAVE_MODE" });
  assert.equal(await front.getVringBase(0), 80, "at rest the ring can be stopped");
  await waitUntil("the doorbell to be given back", () => page === undefined, PATIENCE_MS);
  await front.close();
  assert.equal(await ended, undefined);
  assert.deepEqual(errors, []);
});

/** An ARP request of 192.0.2.2 for 192.0.2.1, padded to 60 bytes. */
function arpRequest(): Uint8Array {
  const mac = [0x02, 0, 0, 0, 0, 2];
  const frame = new Uint8Array(60);
  frame.set([...Array(6).fill(0xff), ...mac, 0x08, 0x06]);
  frame.set([0, 1, 8, 0, 6, 4, 0, 1, ...mac, 192, 0, 2, 2, 0, 0, 0, 0, 0, 0, 192, 0, 2, 1], 14);
  return frame;
}

vmTest("frames go through the relay and vhost-net to a tap, and answers come back, in every mode", plain, async () => {
  await using device = await openDevice("/dev/vhost-net,tap=svqtap0");
  for (const args of ["addr add 192.0.2.1/24 dev svqtap0", "link set svqtap0 up"]) {
    assert.equal((await new Deno.Command("ip", { args: args.split(" ") }).output()).code, 0, args);
  }
  const { relay, config, errors } = relayOver(device, "passthrough");
  await using _ = { [Symbol.asyncDispose]: () => relay.close() };
  using memory = new HandMemory();
  using rx = new HandRing(memory, 0, 0x10000);
  using tx = new HandRing(memory, 1, 0x20000);
  await relay.setFeatures(1n << 32n);
  await relay.setMemTable([memory.region]);
  for (const ring of [rx, tx]) {
    const start = ring.start();
    await relay.setVringNum(start.index, start.num);
    await relay.setVringBase(start.index, 0);
    await relay.setVringAddresses(start.index, start.addresses);
    await relay.setVringCall(start.index, start.call);
    await relay.setVringKick(start.index, start.kick!);
    await relay.setVringEnable(start.index, true);
  }
  memory.bytes.fill(0, 0x50000, 0x50000 + 128);
  memory.bytes.set(arpRequest(), 0x50000 + 12);
  const answers: string[] = [];
  rx.offer([0x40000, 2048, true]);
  for (const mode of ["passthrough", "shadow", "used", "notify", "passthrough", "shadow"] as const) {
    config.mode = mode;
    await relay.applyMode();
    assert.deepEqual(relay.queues.map((queue) => queue.mode), [mode, mode]);
    tx.offer([0x50000, 12 + 60, false]);
    await tx.taken("the request to leave");
    // Other frames (IPv6 neighbour discovery) may come first.
    for (let answered = false; !answered;) {
      await rx.taken("an answer");
      const frame = memory.bytes.slice(0x40000 + 12, 0x40000 + 12 + 42);
      answered = frame[12] === 8 && frame[13] === 6 && frame[21] === 2;
      if (answered) answers.push(frame.slice(28, 32).join("."));
      rx.offer([0x40000, 2048, true]);
    }
  }
  assert.deepEqual(answers, Array(6).fill("192.0.2.1"));
  assert.deepEqual(errors, []);
});
