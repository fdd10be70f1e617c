// Front-ends as they were before protocol features, byte by byte, in front of a relay and a real data path.
import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { DEFAULT_RELAY_CONFIG, Relay } from "../../src/relay/relay.ts";
import { decodeU64, decodeVringState, encodeU64, encodeVringAddr, encodeVringState } from "../../src/uapi/vhost.ts";
import { REQUEST } from "../../src/uapi/vhost_user.ts";
import { encodeMemTable, encodeVringFd } from "../../src/vhost_user/message.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";
import { HandMemory, HandRing } from "../support/hand_ring.ts";
import { rawPair, type RawPeer } from "../support/peer.ts";
import { waitUntil } from "../support/wait.ts";

const VERSION_1 = 1n << 32n;
const LOG_ALL = 1n << 26n;

interface Legacy {
  peer: RawPeer;
  relay: Relay;
  memory: HandMemory;
  ring: HandRing;
}

/** GET_FEATURES, SET_OWNER and nothing of what came later: no bit 30, whole memory tables, no enable, no answers. */
async function withLegacy(mode: "passthrough" | "notify" | "used" | "shadow", body: (world: Legacy) => Promise<void>): Promise<void> {
  const errors: string[] = [];
  await using sim = await SimDevice.open({ kind: "loopback" });
  await using relay = new Relay(sim, { ...DEFAULT_RELAY_CONFIG, mode }, { log: () => {}, error: ({ message }) => errors.push(message) });
  const [peer, stream] = rawPair();
  const ended = new BackendServer(stream, relay, { offerLog: true, onError: ({ message }) => errors.push(message) }).run();
  using memory = new HandMemory();
  using ring = new HandRing(memory, 0, 0);
  assert.ok((decodeU64((await peer.ask(REQUEST.GET_FEATURES)).payload) & VERSION_1) !== 0n);
  await peer.send(REQUEST.SET_OWNER);
  await body({ peer, relay, memory, ring });
  peer.stream.close();
  assert.equal(await ended, undefined);
  assert.deepEqual(errors, []);
}

async function start({ peer, memory, ring }: Legacy, base: number, options: { kick: boolean } = { kick: true }): Promise<void> {
  const { index, num, addresses, kick, call } = ring.start(base);
  await peer.send(REQUEST.SET_FEATURES, encodeU64(VERSION_1));
  await peer.send(REQUEST.SET_MEM_TABLE, encodeMemTable([{ gpa: 0, size: memory.size, uaddr: 0, mmapOffset: 0 }]), [memory.fd.fd]);
  await peer.send(REQUEST.SET_VRING_NUM, encodeVringState({ index, num }));
  await peer.send(REQUEST.SET_VRING_BASE, encodeVringState({ index, num: base }));
  await peer.send(REQUEST.SET_VRING_ADDR, encodeVringAddr({ index, flags: 0, ...addresses, logGuestAddr: 0 }));
  await peer.send(REQUEST.SET_VRING_KICK, encodeVringFd({ index, hasFd: options.kick }), options.kick ? [kick!] : []);
  await peer.send(REQUEST.SET_VRING_CALL, encodeVringFd({ index, hasFd: true }), [call!]);
  // An answer behind it all: the relay has got so far.
  await peer.ask(REQUEST.GET_FEATURES);
}

let stamp = 0;

/** One chain through the loopback device. */
async function roundTrip({ memory, ring }: Legacy): Promise<void> {
  const byte = ++stamp & 0xff;
  memory.bytes.fill(byte, 0x8000, 0x8040);
  memory.bytes.fill(0, 0x9000, 0x9040);
  ring.offer([0x8000, 64, false], [0x9000, 64, true]);
  await ring.taken();
  assert.deepEqual([memory.bytes[0x9000], memory.bytes[0x903f]], [byte, byte]);
}

async function stop({ peer }: Legacy): Promise<number> {
  return decodeVringState((await peer.ask(REQUEST.GET_VRING_BASE, encodeVringState({ index: 0, num: 0 }))).payload).num;
}

for (const mode of ["passthrough", "notify", "used", "shadow"] as const) {
  Deno.test(`a front-end without protocol features starts rings by their kick, stops them and starts them again: ${mode}`, async () => {
    await withLegacy(mode, async (world) => {
      const { peer, relay } = world;
      await start(world, 0);
      assert.deepEqual(relay.queues.map((queue) => queue.mode), [mode]);
      for (let i = 0; i < 3; i++) await roundTrip(world);
      assert.equal(await stop(world), 3);
      // A guest's reboot, as old VMMs told of it: the deprecated request means nothing, the ring starts anew.
      await peer.send(REQUEST.RESET_OWNER);
      await peer.send(REQUEST.SET_OWNER);
      await start(world, 0);
      for (let i = 0; i < 2; i++) await roundTrip(world);
      assert.equal(await stop(world), 2);
      await start(world, 7);
      await roundTrip(world);
      assert.equal(await stop(world), 8);
    });
  });

  Deno.test(`the log of a front-end without LOG_SHMFD is an address that nobody can use: the ring goes on: ${mode}`, async () => {
    await withLegacy(mode, async (world) => {
      const { peer, relay } = world;
      await start(world, 0);
      await roundTrip(world);
      await peer.send(REQUEST.SET_LOG_BASE, encodeU64(0x7f00_0000_0000n));
      await peer.send(REQUEST.SET_FEATURES, encodeU64(VERSION_1 | LOG_ALL));
      await peer.ask(REQUEST.GET_FEATURES);
      assert.deepEqual([relay.logging, relay.dirty.hasVmmLog, relay.queues[0]!.mode], [true, false, mode === "shadow" ? "shadow" : "used"]);
      await roundTrip(world);
      await peer.send(REQUEST.SET_FEATURES, encodeU64(VERSION_1));
      await peer.ask(REQUEST.GET_FEATURES);
      await waitUntil("the mode before", () => relay.queues[0]!.mode === mode);
      await roundTrip(world);
      assert.equal(await stop(world), 3);
    });
  });

  Deno.test(`a ring whose kick has no descriptor is looked at without being kicked, also after a change of mode: ${mode}`, async () => {
    await withLegacy(mode, async (world) => {
      const { peer, relay } = world;
      await start(world, 0, { kick: false });
      for (let i = 0; i < 3; i++) await roundTrip(world);
      await peer.send(REQUEST.SET_FEATURES, encodeU64(VERSION_1 | LOG_ALL));
      await peer.ask(REQUEST.GET_FEATURES);
      assert.equal(relay.queues[0]!.mode, mode === "shadow" ? "shadow" : "used");
      for (let i = 0; i < 3; i++) await roundTrip(world);
      assert.equal(await stop(world), 6);
    });
  });
}
