import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { createMemfd, unixPair } from "../../src/ffi/mod.ts";
import { Doorbells } from "../../src/relay/doorbells.ts";
import { Relay } from "../../src/relay/relay.ts";
import { DEFAULT_RELAY_CONFIG, type RelayConfig, type RelayMode } from "../../src/relay/relay_config.ts";
import { hasBit } from "../../src/uapi/bits.ts";
import { PROTOCOL_FEATURE } from "../../src/uapi/vhost_user.ts";
import type { Doorbell } from "../../src/vhost/backend.ts";
import { VhostVdpa } from "../../src/vhost/vdpa.ts";
import { VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { decodeVringArea, encodeVringArea } from "../../src/vhost_user/message.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";
import { HandMemory, HandRing } from "../support/hand_ring.ts";
import { waitUntil } from "../support/wait.ts";
import { FakeVdpa } from "../vhost/fake_vdpa.ts";

const VERSION_1 = 1n << 32n;
const LOG_ALL = 1n << 26n;

/** What a VMM does when it is told of a doorbell. */
type Answer = (index: number, doorbell: Doorbell | undefined) => boolean;

/** A VMM with a relay over a disk that has doorbells. */
async function setUp(mode: RelayMode, answer?: Answer) {
  await using stack = new AsyncDisposableStack();
  const pages = stack.use(createMemfd("doorbells", 8192));
  const sim = stack.use(await SimDevice.open({ kind: "blk", size: 1 << 20 }));
  const device = Object.assign(sim, { doorbell: (index: number) => ({ fd: pages.fd, offset: 4096 * index, size: 4096 }) });
  const config: RelayConfig = { ...DEFAULT_RELAY_CONFIG, mode };
  const log: string[] = [];
  const relay = stack.use(new Relay(device, config, { log: (line) => log.push(line), error: ({ message }) => log.push(message) }));
  const [a, b] = unixPair();
  const ended = new BackendServer(a, relay, { offerLog: relay.canLog }).run();
  stack.defer(async () => void await ended);
  const front = stack.use(
    await VhostUserFrontEnd.fromStream(b, { timeoutMs: 20_000, ...(answer === undefined ? {} : { onDoorbell: answer }) }),
  );
  const moved = stack.move();
  return { relay, config, log, front, [Symbol.asyncDispose]: () => moved.disposeAsync() };
}

const DISK = { ramSize: 4 << 20, depth: 4, num: 64 };

Deno.test("in passthrough the VMM is given the doorbell, and gives it back before the relay takes the kicks", async () => {
  const told: string[] = [];
  let mode: () => string | undefined = () => undefined;
  await using set = await setUp("passthrough", (index, doorbell) => {
    told.push(doorbell === undefined ? `back ${index} in ${mode()}` : `${index} at ${doorbell.offset}+${doorbell.size}`);
    return true;
  });
  const { relay, config, front } = set;
  mode = () => relay.queues[0]?.mode;
  assert.ok(hasBit(front.info.protocolFeatures, PROTOCOL_FEATURE.HOST_NOTIFIER));
  await using driver = await EmbeddedDriver.open(front, DISK);
  await waitUntil("the doorbell to be taken", () => relay.doorbells.length === 1);
  assert.deepEqual(told.splice(0), ["0 at 0+4096"]);
  const run = driver.run();
  run.catch(() => {});
  for (const next of ["notify", "passthrough", "shadow", "passthrough"] as const) {
    config.mode = next;
    await relay.applyMode();
    assert.equal(relay.queues[0]!.mode, next);
    if (next === "passthrough") await waitUntil("the doorbell", () => told.at(-1)?.startsWith("0") === true);
    else assert.deepEqual(relay.doorbells, []);
  }
  assert.deepEqual(told, ["back 0 in passthrough", "0 at 0+4096", "back 0 in passthrough", "0 at 0+4096"]);
  await driver.stop();
  const report = await run;
  assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.faults], [0, 0, 0, []]);
});

Deno.test("turning the dirty log on takes the doorbell back, and turning it off gives it out again", async () => {
  const told: boolean[] = [];
  await using set = await setUp("auto", (_index, doorbell) => told.push(doorbell !== undefined) > 0);
  const { relay, front } = set;
  await using driver = await EmbeddedDriver.open(front, DISK);
  await waitUntil("the doorbell", () => relay.doorbells.length === 1);
  await relay.setFeatures(driver.features | LOG_ALL);
  // On a busy machine the answer comes before the switch is done.
  await waitUntil("the switch", () => relay.queues[0]!.mode === "used");
  assert.deepEqual(relay.doorbells, []);
  await relay.setFeatures(driver.features);
  // The VMM is told later: nobody waits for its answer.
  await waitUntil("the doorbell again", () => relay.doorbells.length === 1 && told.length === 3);
  assert.deepEqual(told, [true, false, true]);
});

Deno.test("a VMM that keeps the doorbell keeps its mode: kicks by it would pass the relay by", async () => {
  await using set = await setUp("passthrough", (_index, doorbell) => doorbell !== undefined);
  const { relay, config, front } = set;
  await using driver = await EmbeddedDriver.open(front, DISK);
  await waitUntil("the doorbell", () => relay.doorbells.length === 1);
  config.mode = "notify";
  await assert.rejects(relay.applyMode(), { code: "DOORBELL_KEPT" });
  assert.equal(relay.queues[0]!.mode, "passthrough");
  const report = await driver.run({ requests: 20 });
  assert.deepEqual([report.lost, report.faults], [0, []]);
});

Deno.test("a VMM that cannot map it goes on with events, and one that does not know doorbells is not told of any", async () => {
  for (const answer of [() => false, undefined]) {
    await using set = await setUp("passthrough", answer);
    const { relay, config, front } = set;
    assert.equal(hasBit(front.info.protocolFeatures, PROTOCOL_FEATURE.HOST_NOTIFIER), answer !== undefined);
    await using driver = await EmbeddedDriver.open(front, DISK);
    const report = await driver.run({ requests: 20 });
    assert.deepEqual([report.lost, report.faults, relay.doorbells], [0, [], []]);
    config.mode = "shadow";
    await relay.applyMode();
    assert.equal(relay.queues[0]!.mode, "shadow");
  }
});

Deno.test("in other modes nobody is given a doorbell, and a VMM that stops its ring loses it", async () => {
  const told: boolean[] = [];
  await using set = await setUp("shadow", (_index, doorbell) => told.push(doorbell !== undefined) > 0);
  const { relay, config, front } = set;
  await using driver = await EmbeddedDriver.open(front, DISK);
  assert.deepEqual(told, []);
  config.mode = "passthrough";
  await relay.applyMode();
  await waitUntil("the doorbell", () => relay.doorbells.length === 1);
  await driver.pause();
  await driver.stopRings();
  await waitUntil("it to be given back", () => relay.doorbells.length === 0);
  assert.deepEqual(told, [true, false]);
});

Deno.test("a doorbell whose return is not answered in time is not given up, and one that the VMM took with it is", async () => {
  const answers: ((taken: boolean) => void)[] = [];
  let kicks = 0;
  let gone = false;
  const doorbells = new Doorbells({
    device: () => ({ doorbell: () => ({ fd: 0, offset: 0, size: 4096 }) }) as unknown as SimDevice,
    sender: () => gone ? undefined : () => new Promise((resolve) => answers.push(resolve)),
    log: () => {},
    returnMs: 30,
  });
  await doorbells.withdraw(0, () => kicks++);
  doorbells.offer(0);
  await waitUntil("the offer", () => answers.length === 1);
  // The offer itself is not answered: the VMM may have it all the same.
  await assert.rejects(doorbells.withdraw(0, () => kicks++), { code: "DOORBELL_KEPT" });
  answers.shift()!(true);
  await waitUntil("the withdrawal", () => answers.length === 1);
  assert.deepEqual([doorbells.given, kicks], [[0], 0]);
  answers.shift()!(true);
  await waitUntil("the late answer to count", () => doorbells.given.length === 0);
  assert.equal(kicks, 1);
  doorbells.offer(0);
  await waitUntil("the offer", () => answers.length === 1);
  answers.shift()!(true);
  gone = true;
  await doorbells.withdraw(0, () => kicks++);
  assert.deepEqual([doorbells.given, kicks], [[], 2]);
});

/** A relay over a device without SUSPEND, started in `mode`. */
async function overVp(mode: RelayMode, onDoorbell?: Relay["onDoorbell"]) {
  const fake = new FakeVdpa({ driver: "vp" });
  const device = new VhostVdpa(fake, {});
  if (onDoorbell !== undefined) device.doorbell = () => ({ fd: 0, offset: 0, size: 4096 });
  const config: RelayConfig = { ...DEFAULT_RELAY_CONFIG, mode };
  const relay = new Relay(device, config, { log: () => {}, error: () => {} });
  relay.onDoorbell = onDoorbell;
  const memory = new HandMemory();
  const ring = new HandRing(memory, 0, 0x10000);
  await relay.setFeatures(VERSION_1);
  await relay.setMemTable([memory.region]);
  const { index, num, base, addresses, kick, call } = ring.start();
  await relay.setVringNum(index, num);
  await relay.setVringBase(index, base);
  await relay.setVringAddresses(index, addresses);
  await relay.setVringCall(index, call);
  await relay.setVringKick(index, kick);
  await relay.setVringEnable(index, true);
  return {
    relay,
    config,
    fake,
    ring,
    addresses,
    [Symbol.asyncDispose]: async () => {
      await relay.close();
      await device.close();
      ring[Symbol.dispose]();
      memory[Symbol.dispose]();
    },
  };
}

Deno.test("a device without SUSPEND is on the guest's rings to the end where the relay was started so, and cannot be migrated then", async () => {
  for (const first of ["passthrough", "notify"] as const) {
    const second = first === "passthrough" ? "notify" : "passthrough";
    await using set = await overVp(first);
    const { relay, config, fake, addresses } = set;
    assert.equal(relay.canLog, false);
    assert.equal(relay.queues[0]!.mode, first);
    assert.equal(fake.rings[0]!.inForce![0], addresses.desc);
    const resets = fake.log.filter((line) => line.startsWith("SET_STATUS")).length;
    for (const mode of [second, first] as const) {
      const kick = fake.rings[0]!.kick;
      config.mode = mode;
      await relay.applyMode();
      assert.equal(relay.queues[0]!.mode, mode);
      assert.notEqual(fake.rings[0]!.kick, kick, "the kick has changed hands");
    }
    assert.equal(fake.log.filter((line) => line.startsWith("SET_STATUS")).length, resets, "and the device has noticed nothing else");
    config.mode = "shadow";
    await assert.rejects(relay.applyMode(), { code: "CANNOT_LEAVE_MODE" });
    assert.equal(relay.queues[0]!.mode, first);
    assert.equal(await relay.getVringBase(0), 0, "at rest it can be stopped");
  }
});

Deno.test("such a device's doorbell is given back before its kick changes hands, and not at all where the VMM keeps it", async () => {
  let keeps = false;
  let kickThen: number | undefined;
  await using set = await overVp("passthrough", async (_index, doorbell) => {
    if (doorbell !== undefined) return true;
    kickThen = set.fake.rings[0]!.kick;
    return !keeps;
  });
  const { relay, config, fake } = set;
  await waitUntil("the doorbell", () => relay.doorbells.length === 1);
  const kick = fake.rings[0]!.kick;
  config.mode = "notify";
  keeps = true;
  await assert.rejects(relay.applyMode(), { code: "DOORBELL_KEPT" });
  assert.deepEqual([relay.queues[0]!.mode, fake.rings[0]!.kick], ["passthrough", kick]);
  keeps = false;
  await relay.applyMode();
  assert.equal(kickThen, kick, "the kick was still the guest's own");
  assert.notEqual(fake.rings[0]!.kick, kick);
  assert.deepEqual([relay.queues[0]!.mode, relay.doorbells], ["notify", []]);
});

Deno.test("a device without SUSPEND is on rings of the relay's own in every other case, and can be migrated", async () => {
  await using set = await overVp("auto");
  const { relay, config, fake, addresses } = set;
  assert.deepEqual([relay.canLog, relay.queues[0]!.mode], [true, "used"]);
  assert.notEqual(fake.rings[0]!.inForce![2], addresses.avail);
  // Not on the way: a VMM has been offered the dirty log.
  config.mode = "passthrough";
  await relay.applyMode();
  assert.equal(relay.queues[0]!.mode, "used");
});

Deno.test("a doorbell's place survives encoding, and one with a file and without must say so", () => {
  const area = { index: 3, hasFd: true, size: 4096, offset: 12288 };
  assert.deepEqual(decodeVringArea(encodeVringArea(area), 1), area);
  const none = { index: 3, hasFd: false, size: 0, offset: 0 };
  assert.deepEqual([...encodeVringArea(none).slice(0, 8)], [3, 1, 0, 0, 0, 0, 0, 0]);
  assert.deepEqual(decodeVringArea(encodeVringArea(none), 0), none);
  for (const [bytes, fds] of [[encodeVringArea(area), 0], [encodeVringArea(none), 1], [new Uint8Array(16), 1]] as const) {
    assert.throws(() => decodeVringArea(bytes, fds));
  }
});
