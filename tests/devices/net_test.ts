import assert from "node:assert/strict";
import { SvqError } from "../../src/errors.ts";
import type { SimOptions } from "../../src/devices/options.ts";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { encodeNetCommand, type NetCommand } from "../../src/net/command.ts";
import { flowHash, NET_HASH_TYPES } from "../../src/net/flow.ts";
import { completeChecksum } from "../../src/net/checksum.ts";
import { NetState } from "../../src/net/state.ts";
import { bitsOf } from "../../src/uapi/bits.ts";
import { VIRTIO_FEATURE_BITS } from "../../src/uapi/virtio.ts";
import { decodeNetConfig, decodeNetHeader, encodeNetHeader, VIRTIO_NET_FEATURE_BITS as F } from "../../src/uapi/virtio_net.ts";
import type { Segment } from "../../src/vring/queue.ts";
import { pattern, TestGuest } from "../support/test_guest.ts";
import { waitUntil } from "../support/wait.ts";

const RING = bitsOf([VIRTIO_FEATURE_BITS.VERSION_1, VIRTIO_FEATURE_BITS.EVENT_IDX, VIRTIO_FEATURE_BITS.INDIRECT_DESC]);
const OWN = "52:54:00:00:00:0a";
const OTHER = "52:54:00:00:00:0b";
let cables = 0;

async function open(options: Partial<SimOptions>, features?: bigint): Promise<TestGuest> {
  const device = await SimDevice.open({ kind: "net", mac: OWN, ...options });
  const guest = new TestGuest(device, device.info.queueNum);
  await guest.start(features ?? await device.getFeatures());
  return guest;
}

/** Two guests at the ends of one cable. */
async function pair(a: Partial<SimOptions> = {}, b: Partial<SimOptions> = {}, features?: bigint): Promise<[TestGuest, TestGuest]> {
  const cable = `test ${cables++}`;
  return [await open({ cable, ...a }, features), await open({ cable, mac: OTHER, ...b }, features)];
}

function macBytes(mac: string): number[] {
  return mac.split(":").map((part) => parseInt(part, 16));
}

function frame(length: number, seed: number, to = OTHER, type: number[] = [0x88, 0xb5]): Uint8Array {
  return new Uint8Array([...macBytes(to), ...macBytes(OWN), ...type, ...pattern(length - 12 - type.length, seed)]);
}

function send(guest: TestGuest, bytes: Uint8Array, queue = 1, header = encodeNetHeader({})): void {
  guest.queues[queue]!.add([guest.buffer(header), guest.buffer(bytes.subarray(0, 20)), guest.buffer(bytes.subarray(20))], []);
  guest.queues[queue]!.publish();
}

/** Offers buffers; what comes is read from them by `received`. */
function offer(guest: TestGuest, count: number, size: number, queue = 0): Map<number, Segment> {
  const buffers = new Map<number, Segment>();
  for (let i = 0; i < count; i++) {
    const segment = guest.buffer(size);
    buffers.set(guest.queues[queue]!.add([], [segment]), segment);
  }
  guest.queues[queue]!.publish();
  return buffers;
}

async function received(
  guest: TestGuest,
  buffers: Map<number, Segment>,
  queue = 0,
): Promise<{ header: ReturnType<typeof decodeNetHeader>; bytes: Uint8Array }> {
  const q = guest.queues[queue]!;
  const take = async () => {
    const [id] = await q.take(1);
    return guest.read(buffers.get(id!)!).subarray(0, q.driver.usedLength);
  };
  const first = await take();
  const header = decodeNetHeader(first);
  const parts = [first.subarray(12)];
  for (let i = 1; i < header.numBuffers; i++) parts.push(await take());
  return { header, bytes: new Uint8Array(parts.flatMap((part) => [...part])) };
}

async function control(guest: TestGuest, command: NetCommand | Uint8Array<ArrayBuffer>): Promise<boolean> {
  const bytes = command instanceof Uint8Array ? command : encodeNetCommand(command);
  const q = guest.queues.at(-1)!;
  const ack = guest.buffer(Uint8Array.of(0xee));
  q.add([guest.buffer(bytes.subarray(0, 2)), guest.buffer(bytes.subarray(2))].filter(({ length }) => length > 0), [ack]);
  q.publish();
  await q.take(1);
  return guest.read(ack)[0] === 0;
}

Deno.test("Frames cross a cable in order, also when the receiver offers buffers late", async () => {
  const [a, b] = await pair();
  await using _a = a;
  await using _b = b;
  for (let i = 0; i < 20; i++) send(a, frame(100 + i, i));
  await a.queues[1]!.take(20);
  const buffers = offer(b, 30, 2048);
  for (let i = 0; i < 20; i++) {
    const { header, bytes } = await received(b, buffers);
    assert.equal(header.numBuffers, 1);
    assert.deepEqual(bytes, frame(100 + i, i));
  }
  const counts = await (b.device as SimDevice).netCounters();
  assert.deepEqual(counts[0], { frames: 20, bytes: 20 * 100 + 190, drops: 0 });
});

Deno.test("A driver that only sends goes on where its frames come back, and receives again once it offers buffers", async () => {
  await using guest = await open({ cable: "loop" });
  // Far more than the cable holds: without room there, sending stops.
  const rounds = 40;
  for (let round = 0; round < rounds; round++) {
    for (let i = 0; i < 32; i++) send(guest, frame(1400, i, OWN));
    await guest.queues[1]!.take(32);
  }
  const device = guest.device as SimDevice;
  const drops = () => device.netCounters().then(([received]) => received!.drops);
  await waitUntil("the cable to be empty", async () => await drops() === rounds * 32);
  const buffers = offer(guest, 1, 2048);
  send(guest, frame(300, 7, OWN));
  assert.deepEqual((await received(guest, buffers)).bytes, frame(300, 7, OWN));
  // It is forgiven: the next frame waits for its buffer again.
  send(guest, frame(310, 8, OWN));
  await guest.queues[1]!.take(1);
  assert.deepEqual((await received(guest, offer(guest, 1, 2048))).bytes, frame(310, 8, OWN));
  assert.equal(await drops(), rounds * 32);
});

Deno.test("A frame longer than a buffer takes several, and says how many", async () => {
  const [a, b] = await pair({ mtu: 9000 }, { mtu: 9000 });
  await using _a = a;
  await using _b = b;
  const some = offer(b, 3, 1500);
  send(a, frame(6000, 1));
  await a.queues[1]!.take(1);
  // Three are too few: they stay in the ring until there are enough.
  const rest = offer(b, 3, 1500);
  const { header, bytes } = await received(b, new Map([...some, ...rest]));
  assert.equal(header.numBuffers, 5);
  assert.deepEqual(bytes, frame(6000, 1));
});

Deno.test("Without mergeable buffers a frame that does not fit is dropped, and the next one comes", async () => {
  const [a, b] = await pair({}, {}, RING);
  await using _a = a;
  await using _b = b;
  const buffers = offer(b, 2, 200);
  send(a, frame(400, 1));
  send(a, frame(150, 2));
  assert.deepEqual((await received(b, buffers)).bytes, frame(150, 2));
  assert.equal((await (b.device as SimDevice).netCounters())[0]!.drops, 1);
});

Deno.test("A driver without VERSION_1 has a shorter header, and gets the same frames", async () => {
  const legacy = bitsOf([VIRTIO_FEATURE_BITS.EVENT_IDX, VIRTIO_FEATURE_BITS.INDIRECT_DESC]);
  const cable = `test ${cables++}`;
  await using a = await open({ cable }, legacy);
  await using b = await open({ cable, mac: OTHER });
  const buffers = offer(b, 1, 2048);
  send(a, frame(200, 3), 1, encodeNetHeader({}).slice(0, 10));
  assert.deepEqual((await received(b, buffers)).bytes, frame(200, 3));
  const back = offer(a, 1, 2048);
  send(b, frame(220, 4));
  const [id] = await a.queues[0]!.take(1);
  assert.equal(a.queues[0]!.driver.usedLength, 230);
  assert.deepEqual(a.read(back.get(id!)!).slice(10, 230), frame(220, 4));
});

Deno.test("Frames longer than the MTU are dropped, unless somebody will segment them", async () => {
  const [a, b] = await pair();
  await using _a = a;
  await using _b = b;
  const buffers = offer(b, 4, 16384);
  send(a, frame(1515, 1));
  const header = encodeNetHeader({ gsoType: 1, gsoSize: 1400, hdrLen: 54, flags: 1, csumStart: 34, csumOffset: 16 });
  send(a, frame(9000, 2), 1, header);
  const big = await received(b, buffers);
  assert.deepEqual([big.header.gsoType, big.header.gsoSize, big.header.flags], [1, 1400, 1]);
  assert.deepEqual(big.bytes, frame(9000, 2));
  assert.equal((await (a.device as SimDevice).netCounters())[1]!.drops, 1);
});

Deno.test("A checksum that the sender left to others is completed for a receiver that does not take it so", async () => {
  const cable = `test ${cables++}`;
  await using a = await open({ cable });
  await using b = await open({ cable, mac: OTHER }, RING | bitsOf([F.MRG_RXBUF]));
  const buffers = offer(b, 2, 2048);
  const bytes = frame(120, 5);
  bytes[40] = bytes[41] = 0;
  send(a, bytes, 1, encodeNetHeader({ flags: 1, csumStart: 34, csumOffset: 6 }));
  const { header, bytes: got } = await received(b, buffers);
  assert.equal(header.flags, 0);
  assert.ok(completeChecksum(bytes, 34, 6));
  assert.deepEqual(got, bytes);
  let sum = 0;
  for (let i = 34; i < 120; i += 2) sum += got[i]! << 8 | got[i + 1]!;
  assert.equal((sum & 0xffff) + (sum >> 16), 0xffff);
});

Deno.test("Pulling the other end out takes the link down, and plugging it in brings it up", async () => {
  const cable = `test ${cables++}`;
  await using a = await open({ cable });
  const status = async () => decodeNetConfig(await a.device.getConfig(0, 24)).status;
  assert.equal(await status(), 0);
  let changes = 0;
  a.device.onConfigChange = () => changes++;
  {
    await using _b = await open({ cable, mac: OTHER });
    assert.equal(await status(), 1);
    await assert.rejects(SimDevice.open({ kind: "net", cable }), (error) => error instanceof SvqError && error.code === "CABLE_IN_USE");
  }
  assert.equal(await status(), 0);
  assert.ok(changes >= 2);
  send(a, frame(100, 1));
  await a.queues[1]!.take(1);
  assert.equal((await (a.device as SimDevice).netCounters())[1]!.drops, 1);
});

Deno.test("The configuration names address, queue pairs and MTU", async () => {
  await using device = await SimDevice.open({ kind: "net", mac: OWN, queues: 9, mtu: 4000 });
  const config = decodeNetConfig(await device.getConfig(0, 24));
  assert.deepEqual([...config.mac], macBytes(OWN));
  assert.deepEqual([config.maxVirtqueuePairs, config.mtu, config.status], [4, 4000, 0]);
  await assert.rejects(SimDevice.open({ kind: "net", tap: "x", cable: "y" }), { code: "BAD_DEVICE_OPTION" });
  await assert.rejects(SimDevice.open({ kind: "net", queues: 1 }), { code: "BAD_DEVICE_OPTION" });
});

Deno.test("The driver's filter decides what is received", async () => {
  const [a, b] = await pair();
  await using _a = a;
  await using _b = b;
  assert.ok(await control(b, { name: "RX", mode: "promisc", on: false }));
  assert.ok(await control(b, { name: "VLAN_ADD", vlan: 5 }));
  const buffers = offer(b, 4, 2048);
  send(a, frame(100, 1, "52:54:00:00:00:99"));
  send(a, frame(100, 2, OTHER, [0x81, 0, 0, 6, 8, 0]));
  send(a, frame(100, 3, OTHER, [0x81, 0, 0, 5, 8, 0]));
  send(a, frame(100, 4));
  assert.deepEqual((await received(b, buffers)).bytes, frame(100, 3, OTHER, [0x81, 0, 0, 5, 8, 0]));
  assert.deepEqual((await received(b, buffers)).bytes, frame(100, 4));
});

Deno.test("RSS sends each flow to the queue that its hash names", async () => {
  const cable = `test ${cables++}`;
  await using a = await open({ cable });
  await using b = await open({ cable, mac: OTHER, queues: 5 });
  const key = "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa";
  const rss = { hash_types: NET_HASH_TYPES.TCPv4, unclassified_queue: 0, indirection: [1, 0], max_tx_vq: 2, key };
  assert.ok(await control(b, { name: "RSS_CONFIG", rss }));
  const zero = offer(b, 4, 2048, 0);
  const one = offer(b, 4, 2048, 2);
  for (const port of [1000, 1001, 1002, 1003]) {
    const bytes = tcp([66, 9, 149, 187], [161, 142, 100, 80], port, 1766);
    const hash = flowHash(bytes, NET_HASH_TYPES.TCPv4, Uint8Array.from(macBytes(key.match(/../g)!.join(":"))))!;
    send(a, bytes);
    const queue = hash % 2 === 0 ? 2 : 0;
    assert.deepEqual((await received(b, queue === 0 ? zero : one, queue)).bytes, bytes);
  }
  assert.ok(!await control(b, { name: "RSS_CONFIG", rss: { ...rss, indirection: [2, 0] } }), "there are two pairs");
});

function tcp(from: number[], to: number[], sourcePort: number, port: number): Uint8Array {
  const ip = [0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, ...from, ...to];
  const ports = [sourcePort >> 8, sourcePort & 255, port >> 8, port & 255];
  return new Uint8Array([...macBytes(OTHER), ...macBytes(OWN), 8, 0, ...ip, ...ports, ...pattern(60, 1)]);
}

Deno.test("The hash is the one that the verification suite of receive side scaling gives", () => {
  const key = Uint8Array.from(
    macBytes("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa".match(/../g)!.join(":")),
  );
  const bytes = tcp([66, 9, 149, 187], [161, 142, 100, 80], 2794, 1766);
  assert.equal(flowHash(bytes, NET_HASH_TYPES.TCPv4, key), 0x51ccc178);
  assert.equal(flowHash(bytes, NET_HASH_TYPES.IPv4, key), 0x323e8fc2);
  assert.equal(flowHash(bytes, NET_HASH_TYPES.UDPv4, key), undefined);
});

Deno.test("A device tells what was set in it, and the replay brings another device to the same", async () => {
  const commands: NetCommand[] = [
    { name: "MAC_ADDR_SET", mac: "52:54:00:00:00:77" },
    { name: "RX", mode: "promisc", on: false },
    { name: "RX", mode: "allmulti", on: true },
    { name: "MAC_TABLE_SET", unicast: ["52:54:00:00:00:78"], multicast: ["01:00:5e:00:00:01"] },
    { name: "VLAN_ADD", vlan: 7 },
    { name: "VLAN_ADD", vlan: 8 },
    { name: "VLAN_DEL", vlan: 7 },
    { name: "VQ_PAIRS_SET", pairs: 2 },
    { name: "RSS_CONFIG", rss: { hash_types: 3, unclassified_queue: 1, indirection: [0, 1], max_tx_vq: 2, key: "00".repeat(40) } },
    { name: "GUEST_OFFLOADS_SET", offloads: bitsOf([F.GUEST_CSUM]) },
    { name: "NOTF_COAL_TX_SET", coalescing: { max_packets: 3, max_usecs: 4 } },
    { name: "NOTF_COAL_VQ_SET", queue: 1, coalescing: { max_packets: 5, max_usecs: 6 } },
    { name: "ANNOUNCE_ACK" },
  ];
  await using a = await open({ queues: 5 });
  for (const command of commands) assert.ok(await control(a, command), command.name);
  const saved = await (a.device as SimDevice).netState();
  await using b = await open({ queues: 5 });
  for (const command of NetState.load(JSON.parse(JSON.stringify(saved))).replay()) assert.ok(await control(b, command), command.name);
  assert.deepEqual(await (b.device as SimDevice).netState(), saved);
  await a.device.reset();
  assert.deepEqual(await (a.device as SimDevice).netState(), new NetState().save());
});

Deno.test("Commands that were not negotiated, are damaged or unknown are answered with an error and change nothing", async () => {
  await using guest = await open({ queues: 5 }, RING | bitsOf([F.CTRL_VQ, F.CTRL_RX, F.MQ]));
  const bad: (NetCommand | Uint8Array<ArrayBuffer>)[] = [
    { name: "VLAN_ADD", vlan: 7 },
    { name: "VQ_PAIRS_SET", pairs: 3 },
    { name: "UNKNOWN", class: 99, command: 1, data: "00" },
    Uint8Array.of(0),
    Uint8Array.of(4, 0, 1),
    Uint8Array.of(1, 0, 255, 255, 255, 255),
  ];
  for (const command of bad) assert.ok(!await control(guest, command));
  assert.deepEqual(await (guest.device as SimDevice).netState(), new NetState().save());
  assert.ok(await control(guest, { name: "RX", mode: "promisc", on: false }));
});

Deno.test("A stopped receive queue loses nothing: frames wait and come when it runs again", async () => {
  const [a, b] = await pair();
  await using _a = a;
  await using _b = b;
  const buffers = offer(b, 8, 2048);
  send(a, frame(100, 1));
  assert.deepEqual((await received(b, buffers)).bytes, frame(100, 1));
  const base = await b.device.getVringBase(0);
  assert.equal(base, 1, "buffers without a frame are not in flight");
  send(a, frame(100, 2));
  send(a, frame(100, 3));
  await a.queues[1]!.take(2);
  await b.queues[0]!.start(base);
  assert.deepEqual((await received(b, buffers)).bytes, frame(100, 2));
  assert.deepEqual((await received(b, buffers)).bytes, frame(100, 3));
});

Deno.test("A guest is announced to the other end", async () => {
  const [a, b] = await pair();
  await using _a = a;
  await using _b = b;
  const buffers = offer(b, 1, 2048);
  await a.device.sendRarp!(Uint8Array.from(macBytes(OWN)));
  const { bytes } = await received(b, buffers);
  assert.deepEqual([...bytes.subarray(0, 14)], [255, 255, 255, 255, 255, 255, ...macBytes(OWN), 0x80, 0x35]);
});
