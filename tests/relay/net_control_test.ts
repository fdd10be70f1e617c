import assert from "node:assert/strict";
import fc from "fast-check";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { SvqError } from "../../src/errors.ts";
import { NET_RX_MODES, type NetCommand } from "../../src/net/command.ts";
import { NetState, type NetStateDocument } from "../../src/net/state.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayConfig } from "../../src/relay/relay.ts";
import { unixPair } from "../../src/ffi/mod.ts";
import type { VhostBackend } from "../../src/vhost/backend.ts";
import { VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";
import { Hosts, migrationTo, progress } from "../support/migration.ts";
import { waitUntil } from "../support/wait.ts";

const PAIRS = 2;
const options = (packed = false) => ({ queues: PAIRS, depth: 8, num: 32, packed, ramSize: 8 << 20 });

function relayOf(device: VhostBackend, config: Partial<RelayConfig> = {}, log: string[] = []): Relay {
  return new Relay(device, { ...DEFAULT_RELAY_CONFIG, ...config }, {
    log: (message) => log.push(message),
    error: (error) => log.push(`error: ${error.message}`),
  });
}

const mac = fc.uint8Array({ minLength: 6, maxLength: 6 }).map((bytes) => [...bytes].map((b) => b.toString(16).padStart(2, "0")).join(":"));
const u32 = fc.nat(0xffff_ffff);
const coalescing = fc.record({ max_packets: u32, max_usecs: u32 });
// Some of them are more than the device can: those are refused, and must leave no trace.
const pair = fc.nat(PAIRS);
const commands: fc.Arbitrary<NetCommand> = fc.oneof(
  fc.record({ name: fc.constant("RX" as const), mode: fc.constantFrom(...NET_RX_MODES), on: fc.boolean() }),
  fc.record({
    name: fc.constant("MAC_TABLE_SET" as const),
    unicast: fc.array(mac, { maxLength: 20 }),
    multicast: fc.array(mac, { maxLength: 3 }),
  }),
  fc.record({ name: fc.constant("MAC_ADDR_SET" as const), mac }),
  fc.record({ name: fc.constantFrom("VLAN_ADD" as const, "VLAN_DEL" as const), vlan: fc.nat(9) }),
  fc.record({ name: fc.constant("VQ_PAIRS_SET" as const), pairs: fc.integer({ min: 1, max: PAIRS + 1 }) }),
  fc.record({
    name: fc.constant("RSS_CONFIG" as const),
    rss: fc.record({
      hash_types: fc.nat(0x3f),
      unclassified_queue: pair,
      indirection: fc.nat(3).chain((power) => fc.array(fc.nat(PAIRS - 1), { minLength: 1 << power, maxLength: 1 << power })),
      max_tx_vq: fc.integer({ min: 1, max: PAIRS }),
      key: fc.constantFrom("", "00112233", "ff".repeat(40)),
    }),
  }),
  fc.record({ name: fc.constant("GUEST_OFFLOADS_SET" as const), offloads: fc.constantFrom(0n, 2n, 4n) }),
  fc.record({ name: fc.constantFrom("NOTF_COAL_TX_SET" as const, "NOTF_COAL_RX_SET" as const), coalescing }),
  fc.record({ name: fc.constant("NOTF_COAL_VQ_SET" as const), queue: fc.nat(5), coalescing }),
  fc.record({
    name: fc.constant("UNKNOWN" as const),
    class: fc.integer({ min: 9, max: 255 }),
    command: fc.nat(255),
    data: fc.constant("00ff"),
  }),
);

for (const packed of [false, true]) {
  const rings = packed ? "packed" : "split";
  Deno.test(`Whatever a driver sets is on record, and a relay brings another device to it before a data queue starts: ${rings} rings`, async () => {
    await using first = await SimDevice.open({ kind: "net", cable: "loop", queues: PAIRS * 2 + 1, packed });
    await using relay = relayOf(first);
    await using driver = await EmbeddedDriver.open(relay, options(packed));
    assert.equal(relay.net.source, "guest");
    let saved: NetStateDocument | undefined;
    await fc.assert(
      fc.asyncProperty(fc.array(commands, { maxLength: 12 }), async (list) => {
        for (const command of list) await driver.control(command);
        saved = relay.net.document!;
        // The device keeps its own account of what it took.
        assert.deepEqual(saved, await first.netState());
      }),
      { numRuns: Deno.env.has("SVQ_SOAK") ? 500 : 25, seed: 20261123 },
    );
    assert.equal(relay.queues.find(({ index }) => index === relay.net.index)!.mode, "shadow");

    await using second = await SimDevice.open({ kind: "net", cable: "loop", queues: PAIRS * 2 + 1, packed });
    const found: NetStateDocument[] = [];
    const watched = new Proxy(second, {
      get(target, name) {
        if (name === "setVringKick") {
          return async (index: number, fd: number | null) => {
            if (index < PAIRS * 2) found.push(await second.netState());
            await target.setVringKick(index, fd);
          };
        }
        const value = Reflect.get(target, name, target);
        return typeof value === "function" ? value.bind(target) : value;
      },
      set: (target, name, value) => Reflect.set(target, name, value, target),
    });
    await using other = relayOf(watched);
    await other.net.load(JSON.parse(JSON.stringify(saved)));
    await using successor = await EmbeddedDriver.open(other, options(packed));
    // A driver that starts sets the number of pairs; all before that is the state.
    assert.equal(found.length, PAIRS * 2);
    for (const state of found) assert.deepEqual(state, saved);
    await successor.control({ name: "VLAN_ADD", vlan: 100 });
    assert.deepEqual(await second.netState(), other.net.document);
  });
}

Deno.test("A command that is damaged or was not negotiated is answered with an error, and never reaches the device", async () => {
  await using sim = await SimDevice.open({ kind: "net", cable: "loop", queues: 3 });
  const log: string[] = [];
  await using relay = relayOf(sim, {}, log);
  await using driver = await EmbeddedDriver.open(relay, { queues: 1, depth: 8, num: 32, ramSize: 8 << 20 });
  const before = (await sim.counters())[2]!;
  assert.equal(await driver.control({ name: "UNKNOWN", class: 1, command: 1, data: "5254" }), false, "an address of two bytes");
  assert.equal(await driver.control({ name: "UNKNOWN", class: 2, command: 0, data: "ffff" }), false, "a VLAN that does not exist");
  assert.equal(await driver.control({ name: "VQ_PAIRS_SET", pairs: 1 }), false, "MQ was not negotiated");
  assert.deepEqual((await sim.counters())[2], before);
  assert.equal(relay.net.refusals.length, 3);
  assert.match(log.join("\n"), /VQ_PAIRS_SET was not negotiated/);
  assert.ok(await driver.control({ name: "RX", mode: "allmulti", on: true }), "the queue goes on");
});

Deno.test("A state with what cannot be set here is refused by name, and the guest does not start without it", async () => {
  await using sim = await SimDevice.open({ kind: "net", cable: "loop", queues: 3 });
  await using relay = relayOf(sim);
  const state = new NetState();
  state.apply({ name: "VQ_PAIRS_SET", pairs: 4 });
  await relay.net.load(state.save());
  await assert.rejects(
    EmbeddedDriver.open(relay, { queues: 1, depth: 8, num: 32, ramSize: 8 << 20 }),
    (error) => error instanceof SvqError && error.code === "NET_REPLAY_REFUSED" && /VQ_PAIRS_SET/.test(error.message),
  );
});

Deno.test("A state that is loaded into a running device replaces what was set", async () => {
  await using sim = await SimDevice.open({ kind: "net", cable: "loop", queues: 3 });
  await using relay = relayOf(sim);
  await using driver = await EmbeddedDriver.open(relay, { queues: 1, depth: 8, num: 32, ramSize: 8 << 20 });
  await driver.control({ name: "VLAN_ADD", vlan: 7 });
  await driver.control({ name: "RX", mode: "allmulti", on: true });
  const state = new NetState();
  state.apply({ name: "VLAN_ADD", vlan: 8 });
  state.apply({ name: "MAC_ADDR_SET", mac: "52:54:00:00:00:08" });
  await relay.net.load(state.save());
  const now = await sim.netState();
  assert.deepEqual([now.vlans, now.mac, now.rx.allmulti], [[8], "52:54:00:00:00:08", false]);
  assert.deepEqual(relay.net.document, now);
});

Deno.test("Where the VMM keeps the control queue to itself, the relay drives it: address, modes and queue pairs", async () => {
  for (const address of [undefined, "52:54:00:12:34:56"]) {
    await using sim = await SimDevice.open({ kind: "net", cable: "loop", queues: PAIRS * 2 + 1 });
    await using relay = relayOf(sim, address === undefined ? {} : { mac: address });
    // As QEMU's vhost-user-net does: no CTRL_VQ, and MQ all the same.
    const CTRL = 1n << 17n | 1n << 18n | 1n << 19n | 1n << 20n | 1n << 23n | 1n << 2n | 3n << 52n | 1n << 60n;
    const vmm = new Proxy(relay as VhostBackend, {
      get(target, name) {
        if (name === "getFeatures") return async () => (await target.getFeatures()) & ~CTRL;
        const value = Reflect.get(target, name, target);
        return typeof value === "function" ? value.bind(target) : value;
      },
      set: (target, name, value) => Reflect.set(target, name, value, target),
    });
    await using driver = await EmbeddedDriver.open(vmm, options());
    assert.equal(relay.net.source, "relay");
    const state = await sim.netState();
    assert.equal(state.mac, address);
    assert.deepEqual(state.rx, address === undefined ? { promisc: true } : { allmulti: true });
    assert.deepEqual(state.steering, [{ pairs: 2 }]);
    await relay.setVringEnable(2, false);
    assert.deepEqual((await sim.netState()).steering, [{ pairs: 1 }]);
    await relay.setVringEnable(2, true);
    assert.deepEqual((await sim.netState()).steering, [{ pairs: 2 }]);
    const report = await driver.run({ requests: 200, drainMs: 5000 });
    assert.equal(report.lost, 0);
    // The guest's reset ends it, and the next driver finds the same.
    await relay.setStatus(0);
    assert.deepEqual((await sim.netState()).rx, {});
  }
});

Deno.test("A guest moves to another device with all that it has set", async () => {
  const devices: SimDevice[] = [];
  const open = async () => {
    devices.push(await SimDevice.open({ kind: "net", cable: "loop", queues: devices.length === 2 ? 4 : PAIRS * 2 + 1 }));
    return devices.at(-1)!;
  };
  await using hosts = new Hosts({ openSource: open, openDestination: open, queues: PAIRS });
  const guest = await hosts.guest();
  assert.ok(await guest.driver.control({ name: "VLAN_ADD", vlan: 5 }));
  assert.ok(await guest.driver.control({ name: "MAC_TABLE_SET", unicast: ["52:54:00:00:00:77"], multicast: [] }));
  const state = await devices[0]!.netState();
  const { destination, path } = hosts.destination();
  const { source, migration } = migrationTo(path, guest);
  using _source = source;
  using _migration = migration;
  const result = await migration.run();
  assert.equal(result.outcome, "completed", result.error?.message);
  assert.deepEqual(await devices[1]!.netState(), state);
  const arrived = hosts.own(await destination.arrived());
  assert.deepEqual(arrived.relay.net.document, state);
  await progress(arrived);
  await guest.close();
});

Deno.test("The successor of a lost device is brought to the state before its data queues start", async () => {
  await using sim = await SimDevice.open({ kind: "net", cable: "loop", queues: 5 });
  let server: BackendServer | undefined;
  const connect = async () => {
    const [a, b] = unixPair();
    server = new BackendServer(a, sim);
    server.run();
    return await VhostUserFrontEnd.fromStream(b, { timeoutMs: 10_000 });
  };
  const first = await connect();
  let lost = 0;
  const errors: string[] = [];
  await using relay = new Relay(first, { ...DEFAULT_RELAY_CONFIG, mode: "used" }, {
    log: () => {},
    error: (error) => errors.push(error.message),
    deviceLost: () => lost++,
  });
  await using driver = await EmbeddedDriver.open(relay, options());
  await driver.control({ name: "VLAN_ADD", vlan: 6 });
  const state = await sim.netState();
  const run = driver.run({ drainMs: 200 });
  run.catch(() => {});
  for (let round = 1; round <= 2; round++) {
    server!.close();
    await waitUntil("the relay to notice", () => lost === round);
    await sim.reset();
    await sim.setMemTable([]);
    await relay.attach(await connect());
    assert.deepEqual(await sim.netState(), state);
    const before = (await driver.report()).net!.received;
    await waitUntil("frames", async () => (await driver.report()).net!.received > before + 50);
  }
  assert.ok(await driver.control({ name: "VLAN_ADD", vlan: 7 }));
  assert.deepEqual(errors, []);
});

Deno.test("A guest is announced through its own send queue where the device cannot do it, and loses nothing by that", async () => {
  for (const mode of ["passthrough", "used", "shadow"] as const) {
    await using sim = await SimDevice.open({ kind: "net", cable: "loop", queues: 3 });
    const bare = new Proxy(sim, {
      get(target, name) {
        if (name === "sendRarp" || name === "setMtu") return undefined;
        const value = Reflect.get(target, name, target);
        return typeof value === "function" ? value.bind(target) : value;
      },
      set: (target, name, value) => Reflect.set(target, name, value, target),
    });
    const log: string[] = [];
    await using relay = relayOf(bare, { mode }, log);
    await using driver = await EmbeddedDriver.open(relay, { queues: 1, depth: 8, num: 32, ramSize: 8 << 20 });
    const frames = async () => (await sim.netCounters())[1]!;
    assert.equal((await driver.run({ requests: 20 })).lost, 0);
    const before = await frames();
    await relay.sendRarp!(Uint8Array.of(0x52, 0x54, 0, 1, 2, 3));
    const after = await frames();
    assert.deepEqual([after.frames - before.frames, after.bytes - before.bytes], [1, 60]);
    const running = driver.run({ requests: 300, drainMs: 5000 });
    await relay.sendRarp!(Uint8Array.of(0x52, 0x54, 0, 1, 2, 3));
    const report = await running;
    assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.missedCalls], [0, 0, 0, 0]);
    assert.equal(relay.queues.find(({ index }) => index === 1)!.mode, mode);
    await relay.setMtu!(1500);
    await assert.rejects(relay.setMtu!(9000), (error) => error instanceof SvqError && error.code === "MTU_TOO_LARGE");
    assert.deepEqual(log.filter((line) => /announced|error/.test(line)), []);
  }
});
