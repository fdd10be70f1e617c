import assert from "node:assert/strict";
import fc from "fast-check";
import { SvqError } from "../../src/errors.ts";
import { decodeNetCommand, encodeNetCommand, NET_RX_MODES, type NetCommand } from "../../src/net/command.ts";
import { acceptsFrame } from "../../src/net/filter.ts";
import { NetState } from "../../src/net/state.ts";

const u16 = fc.nat(0xffff);
const u32 = fc.nat(0xffff_ffff);
const hexBytes = (max: number) =>
  fc.uint8Array({ maxLength: max }).map((bytes) => [...bytes].map((b) => b.toString(16).padStart(2, "0")).join(""));
const mac = fc.uint8Array({ minLength: 6, maxLength: 6 }).map((bytes) => [...bytes].map((b) => b.toString(16).padStart(2, "0")).join(":"));
const macs = fc.array(mac, { maxLength: 4 });
const coalescing = fc.record({ max_packets: u32, max_usecs: u32 });
const rss = fc.record({
  hash_types: u32,
  unclassified_queue: u16,
  indirection: fc.nat(4).chain((power) => fc.array(u16, { minLength: 1 << power, maxLength: 1 << power })),
  max_tx_vq: u16,
  key: hexBytes(40),
});
const known: fc.Arbitrary<NetCommand> = fc.oneof(
  fc.record({ name: fc.constant("RX" as const), mode: fc.constantFrom(...NET_RX_MODES), on: fc.boolean() }),
  fc.record({ name: fc.constant("MAC_TABLE_SET" as const), unicast: macs, multicast: macs }),
  fc.record({ name: fc.constant("MAC_ADDR_SET" as const), mac }),
  fc.record({ name: fc.constantFrom("VLAN_ADD" as const, "VLAN_DEL" as const), vlan: fc.nat(9) }),
  fc.record({ name: fc.constant("ANNOUNCE_ACK" as const) }),
  fc.record({ name: fc.constant("VQ_PAIRS_SET" as const), pairs: fc.integer({ min: 1, max: 64 }) }),
  fc.record({ name: fc.constant("RSS_CONFIG" as const), rss }),
  fc.record({ name: fc.constant("HASH_CONFIG" as const), hash: fc.record({ hash_types: u32, key: hexBytes(40) }) }),
  fc.record({ name: fc.constant("GUEST_OFFLOADS_SET" as const), offloads: fc.bigInt({ min: 0n, max: (1n << 64n) - 1n }) }),
  fc.record({ name: fc.constantFrom("NOTF_COAL_TX_SET" as const, "NOTF_COAL_RX_SET" as const), coalescing }),
  fc.record({ name: fc.constant("NOTF_COAL_VQ_SET" as const), queue: fc.nat(7), coalescing }),
  fc.record({ name: fc.constant("NOTF_COAL_VQ_GET" as const), queue: fc.nat(7) }),
);
const unknown: fc.Arbitrary<NetCommand> = fc.oneof(
  fc.record({ name: fc.constant("STATS" as const), command: fc.nat(1), data: hexBytes(12) }),
  fc.record({ name: fc.constant("UNKNOWN" as const), class: fc.integer({ min: 9, max: 255 }), command: fc.nat(255), data: hexBytes(12) }),
);

/** What a device would do with commands, written down without any regard to how svq keeps it: one effect after the other. */
function deviceAfter(commands: readonly NetCommand[]): unknown {
  const device = {
    mac: "",
    rx: {} as Record<string, boolean>,
    table: [[], []] as string[][],
    vlan: new Array(10).fill(false),
    spread: "one queue",
    hash: "none",
    offloads: -1n,
    coalescing: Array.from({ length: 8 }, () => "default"),
  };
  for (const command of commands) {
    switch (command.name) {
      case "RX":
        device.rx[command.mode] = command.on;
        break;
      case "MAC_TABLE_SET":
        device.table = [command.unicast, command.multicast];
        break;
      case "MAC_ADDR_SET":
        device.mac = command.mac;
        break;
      case "VLAN_ADD":
      case "VLAN_DEL":
        device.vlan[command.vlan] = command.name === "VLAN_ADD";
        break;
      case "VQ_PAIRS_SET":
        // Turns RSS off, and the report of its hash.
        if (device.spread.startsWith("{") && device.hash === "of RSS") device.hash = "none";
        device.spread = `${command.pairs} pairs`;
        break;
      case "RSS_CONFIG":
        device.spread = JSON.stringify(command.rss);
        device.hash = "of RSS";
        break;
      case "HASH_CONFIG":
        device.hash = `${command.hash.hash_types} ${command.hash.key}`;
        break;
      case "GUEST_OFFLOADS_SET":
        device.offloads = command.offloads;
        break;
      case "NOTF_COAL_TX_SET":
      case "NOTF_COAL_RX_SET":
        for (let queue = command.name === "NOTF_COAL_TX_SET" ? 1 : 0; queue < 8; queue += 2) {
          device.coalescing[queue] = JSON.stringify(command.coalescing);
        }
        break;
      case "NOTF_COAL_VQ_SET":
        device.coalescing[command.queue] = JSON.stringify(command.coalescing);
        break;
    }
  }
  return device;
}

function stateAfter(commands: readonly NetCommand[]): NetState {
  const state = new NetState();
  for (const command of commands) state.apply(command);
  return state;
}

Deno.test("Every command survives encoding and decoding", () => {
  fc.assert(
    fc.property(fc.oneof(known, unknown), (command) => {
      assert.deepEqual(decodeNetCommand(encodeNetCommand(command)), structuredClone(command));
    }),
    { numRuns: 300, seed: 20261122 },
  );
});

Deno.test("Commands have the bytes that the specification gives them", () => {
  const bytes = (command: NetCommand) => [...encodeNetCommand(command)];
  assert.deepEqual(bytes({ name: "RX", mode: "allmulti", on: true }), [0, 1, 1]);
  assert.deepEqual(bytes({ name: "MAC_ADDR_SET", mac: "52:54:00:12:34:56" }), [1, 1, 0x52, 0x54, 0, 0x12, 0x34, 0x56]);
  assert.deepEqual(
    bytes({ name: "MAC_TABLE_SET", unicast: [], multicast: ["01:00:5e:00:00:01"] }),
    [1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0x5e, 0, 0, 1],
  );
  assert.deepEqual(bytes({ name: "VLAN_ADD", vlan: 0x123 }), [2, 0, 0x23, 1]);
  assert.deepEqual(bytes({ name: "VQ_PAIRS_SET", pairs: 2 }), [4, 0, 2, 0]);
  assert.deepEqual(
    bytes({ name: "RSS_CONFIG", rss: { hash_types: 0x3f, unclassified_queue: 1, indirection: [0, 1], max_tx_vq: 2, key: "abcd" } }),
    [4, 1, 0x3f, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 2, 0, 2, 0xab, 0xcd],
  );
  assert.deepEqual(bytes({ name: "HASH_CONFIG", hash: { hash_types: 1, key: "ff" } }), [4, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff]);
  assert.deepEqual(bytes({ name: "NOTF_COAL_VQ_SET", queue: 3, coalescing: { max_packets: 4, max_usecs: 5 } }), [
    ...[6, 2, 3, 0, 0, 0],
    ...[4, 0, 0, 0, 5, 0, 0, 0],
  ]);
});

Deno.test("Bytes from a guest either decode to something that encodes to the same bytes or are refused", () => {
  const header = fc.tuple(fc.nat(10), fc.nat(6), fc.uint8Array({ maxLength: 40 }));
  fc.assert(
    fc.property(header, ([cls, command, data]) => {
      const bytes = Uint8Array.of(cls, command, ...data);
      let decoded: NetCommand;
      try {
        decoded = decodeNetCommand(bytes);
      } catch (error) {
        assert.ok(error instanceof SvqError && error.code === "BAD_NET_COMMAND", String(error));
        return;
      }
      // Reserved fields are not kept.
      if (["HASH_CONFIG", "NOTF_COAL_VQ_SET", "NOTF_COAL_VQ_GET"].includes(decoded.name)) return;
      assert.deepEqual(encodeNetCommand(decoded), bytes);
    }),
    { numRuns: 500, seed: 20261122 },
  );
});

Deno.test("The replayed commands bring a fresh device to where all commands brought the old one", () => {
  fc.assert(
    fc.property(fc.array(known, { maxLength: 30 }), (commands) => {
      const state = stateAfter(commands);
      assert.deepEqual(deviceAfter(state.replay()), deviceAfter(commands));
      assert.deepEqual(stateAfter(state.replay()).save(), state.save());
    }),
    { numRuns: 300, seed: 20261122 },
  );
});

Deno.test("A state saved as JSON and loaded replays the same commands", () => {
  fc.assert(
    fc.property(fc.array(fc.oneof(known, unknown), { maxLength: 20 }), (commands) => {
      const state = stateAfter(commands);
      const loaded = NetState.load(JSON.parse(JSON.stringify(state.save())));
      assert.deepEqual(loaded.save(), state.save());
      assert.deepEqual(loaded.replay(), state.replay());
    }),
    { numRuns: 200, seed: 20261122 },
  );
});

Deno.test("Unknown commands are named as not migratable, and are not replayed", () => {
  const state = stateAfter([{ name: "UNKNOWN", class: 77, command: 3, data: "00ff" }, { name: "VLAN_ADD", vlan: 7 }]);
  assert.deepEqual(state.notMigratable, ["class 77 command 3"]);
  assert.deepEqual(state.replay(), [{ name: "VLAN_ADD", vlan: 7 }]);
  state.reset();
  assert.deepEqual(state.save(), new NetState().save());
});

Deno.test("A damaged state is refused with BAD_NET_STATE", () => {
  const good = stateAfter([{ name: "VQ_PAIRS_SET", pairs: 2 }, { name: "MAC_ADDR_SET", mac: "52:54:00:00:00:01" }]).save();
  const damaged: unknown[] = [
    null,
    { ...good, schema: "svq.net-state/2" },
    { ...good, mac: "52:54" },
    { ...good, rx: { promiscuous: true } },
    { ...good, vlans: [4096] },
    { ...good, steering: [{ pairs: 0 }] },
    { ...good, steering: [{ rss: { hash_types: 1, unclassified_queue: 0, indirection: [0, 1, 2], max_tx_vq: 1, key: "" } }] },
    { ...good, guest_offloads: "-1" },
    { ...good, coalescing: { queues: [{ queue: 1 }] } },
    { ...good, coalescing: undefined },
  ];
  for (const document of damaged) {
    assert.throws(() => NetState.load(document), (error) => error instanceof SvqError && error.code === "BAD_NET_STATE");
  }
});

Deno.test("A frame is received by its address, its kind and its VLAN", () => {
  const own = "52:54:00:00:00:01";
  const frame = (target: string, vlan?: number) =>
    Uint8Array.from([
      ...target.split(":").map((part) => parseInt(part, 16)),
      2,
      0,
      0,
      0,
      0,
      9,
      ...(vlan === undefined ? [8, 0, 0, 0] : [0x81, 0, vlan >> 8, vlan & 255, 8, 0]),
    ]);
  const on = { rx: true, vlan: true };
  const state = new NetState();
  assert.equal(acceptsFrame(state, frame("52:54:00:00:00:02"), own, on), true, "promiscuous until the driver says otherwise");
  assert.equal(acceptsFrame(state, frame(own, 5), own, on), false, "no VLAN was added");
  assert.equal(acceptsFrame(state, frame(own, 5), own, { rx: true, vlan: false }), true);
  state.apply({ name: "RX", mode: "promisc", on: false });
  state.apply({ name: "VLAN_ADD", vlan: 5 });
  state.apply({ name: "MAC_TABLE_SET", unicast: ["52:54:00:00:00:03"], multicast: ["01:00:5e:00:00:01"] });
  const cases: [string, boolean][] = [
    [own, true],
    ["52:54:00:00:00:02", false],
    ["52:54:00:00:00:03", true],
    ["ff:ff:ff:ff:ff:ff", true],
    ["01:00:5e:00:00:01", true],
    ["01:00:5e:00:00:02", false],
  ];
  for (const [target, expected] of cases) assert.equal(acceptsFrame(state, frame(target), own, on), expected, target);
  assert.equal(acceptsFrame(state, frame(own, 5), own, on), true);
  assert.equal(acceptsFrame(state, frame(own, 6), own, on), false);
  state.apply({ name: "MAC_ADDR_SET", mac: "52:54:00:00:00:02" });
  assert.equal(acceptsFrame(state, frame(own), own, on), false, "the driver has given it another address");
  state.apply({ name: "RX", mode: "nobcast", on: true });
  assert.equal(acceptsFrame(state, frame("ff:ff:ff:ff:ff:ff"), own, on), false);
});
