import assert from "node:assert/strict";
import { createEventfd, createMemfd, drainEventfd, listenUnix, openFd, type OwnedFd, unixPair } from "../../src/ffi/mod.ts";
import { connectUnix } from "../../src/ffi/unix_socket.ts";
import { bit, bitsOf } from "../../src/uapi/bits.ts";
import { decodeU64, decodeVringState, encodeU64, encodeVringAddr, encodeVringState } from "../../src/uapi/vhost.ts";
import { BACKEND_REQUEST, FLAG, PROTOCOL_FEATURE, REQUEST } from "../../src/uapi/vhost_user.ts";
import {
  decodeInflight,
  encodeConfig,
  encodeInflight,
  encodeLog,
  encodeMemTable,
  encodeRegion,
  encodeVringFd,
  type WireRegion,
} from "../../src/vhost_user/message.ts";
import { serve } from "../../src/vhost_user/serve.ts";
import { BackendServer, type ServerOptions } from "../../src/vhost_user/server.ts";
import { SERVER_PROTOCOL_FEATURES } from "../../src/vhost_user/server_rules.ts";
import { FAKE_FEATURES, FakeBackend } from "../support/fake_backend.ts";
import { countFds } from "../support/fds.ts";
import { rawPair, RawPeer } from "../support/peer.ts";
import { waitUntil } from "../support/wait.ts";

const PF = PROTOCOL_FEATURE;
const NEED_REPLY = FLAG.VERSION | FLAG.NEED_REPLY;
const NONE = new Uint8Array(0);
const UADDR = 0x7f0000000000;

interface Session {
  peer: RawPeer;
  backend: FakeBackend;
  errors: string[];
  /** Sends with NEED_REPLY and gives the u64 that comes back. */
  ack(request: number, payload?: Uint8Array<ArrayBuffer>, fds?: number[]): Promise<bigint>;
  /** Closes the peer; why the server stopped. */
  end(): Promise<Error | undefined>;
  ended: Promise<Error | undefined>;
}

async function session(
  { backend = new FakeBackend(), options = {}, protocolFeatures = bitsOf([PF.REPLY_ACK]) }: {
    backend?: FakeBackend;
    options?: ServerOptions;
    protocolFeatures?: bigint;
  } = {},
): Promise<Session> {
  const [peer, stream] = rawPair();
  const errors: string[] = [];
  const server = new BackendServer(stream, backend, { onError: (error) => errors.push(error.message), ...options });
  const ended = server.run();
  if (protocolFeatures !== 0n) await peer.send(REQUEST.SET_PROTOCOL_FEATURES, encodeU64(protocolFeatures));
  return {
    peer,
    backend,
    errors,
    ended,
    ack: async (request, payload, fds) => {
      const answer = await peer.ask(request, payload, fds, NEED_REPLY);
      assert.deepEqual([answer.request, answer.flags], [request, 5]);
      return decodeU64(answer.payload);
    },
    end: () => {
      peer.stream.close();
      return ended;
    },
  };
}

function wire(page: number, pages: number): WireRegion {
  return { gpa: page * 4096, size: pages * 4096, uaddr: UADDR + page * 4096, mmapOffset: page * 4096 };
}

function ring(index: number, page: number, flags = 0): Uint8Array<ArrayBuffer> {
  const at = UADDR + page * 4096;
  return encodeVringAddr({ index, flags, desc: at, avail: at + 4096, used: at + 8192, logGuestAddr: flags === 0 ? 0 : (page + 2) * 4096 });
}

Deno.test("what is offered follows the options and what the backend can do", async () => {
  const offered = async (backend: FakeBackend, options: ServerOptions = {}) => {
    const { peer, end } = await session({ backend, options, protocolFeatures: 0n });
    const features = decodeU64((await peer.ask(REQUEST.GET_FEATURES)).payload);
    const protocolFeatures = decodeU64((await peer.ask(REQUEST.GET_PROTOCOL_FEATURES)).payload);
    assert.equal(await end(), undefined);
    return [features, protocolFeatures];
  };
  const netOnly = bitsOf([PF.RARP, PF.MTU]);
  assert.deepEqual(await offered(new FakeBackend()), [FAKE_FEATURES | bit(30), SERVER_PROTOCOL_FEATURES & ~netOnly]);
  assert.deepEqual(await offered(new FakeBackend({ net: true, hasConfig: false }), { offerLog: true }), [
    FAKE_FEATURES | bit(30) | bit(26),
    SERVER_PROTOCOL_FEATURES & ~bit(PF.CONFIG),
  ]);
  const logging = new FakeBackend();
  logging.features |= bit(26);
  assert.deepEqual(await offered(logging, { protocolFeatures: bitsOf([PF.MQ]) }), [FAKE_FEATURES | bit(30), bit(PF.MQ)]);
});

Deno.test("a VMM's start of a ring reaches the backend as method calls with guest addresses", async () => {
  const before = countFds();
  {
    using memory = createMemfd("m", 64 * 4096);
    using event = createEventfd();
    const s = await session({ protocolFeatures: bitsOf([PF.REPLY_ACK, PF.CONFIGURE_MEM_SLOTS]) });
    assert.equal(decodeU64((await s.peer.ask(REQUEST.GET_QUEUE_NUM)).payload), 4n);
    assert.equal(decodeU64((await s.peer.ask(REQUEST.GET_MAX_MEM_SLOTS)).payload), 8n);
    await s.peer.send(REQUEST.SET_OWNER);
    assert.equal(await s.ack(REQUEST.SET_FEATURES, encodeU64(FAKE_FEATURES | bit(30))), 0n);
    assert.equal(await s.ack(REQUEST.ADD_MEM_REG, encodeRegion(wire(0, 64)), [memory.fd]), 0n);
    await s.peer.send(REQUEST.SET_VRING_CALL, encodeVringFd({ index: 1, hasFd: true }), [event.fd]);
    await s.peer.send(REQUEST.SET_VRING_ERR, encodeVringFd({ index: 1, hasFd: true }), [event.fd]);
    await s.peer.send(REQUEST.SET_VRING_NUM, encodeVringState({ index: 1, num: 128 }));
    await s.peer.send(REQUEST.SET_VRING_BASE, encodeVringState({ index: 1, num: 77 }));
    await s.peer.send(REQUEST.SET_VRING_ADDR, ring(1, 2, 1));
    await s.peer.send(REQUEST.SET_VRING_KICK, encodeVringFd({ index: 1, hasFd: false }));
    assert.equal(await s.ack(REQUEST.SET_VRING_ENABLE, encodeVringState({ index: 1, num: 1 })), 0n);
    const base = await s.peer.ask(REQUEST.GET_VRING_BASE, encodeVringState({ index: 1, num: 0 }));
    assert.deepEqual([base.flags, decodeVringState(base.payload)], [5, { index: 1, num: 77 }]);
    assert.equal(await s.ack(REQUEST.REM_MEM_REG, encodeRegion({ ...wire(0, 64), mmapOffset: 0x5000 })), 0n);
    assert.deepEqual(s.backend.calls, [
      ["setFeatures", FAKE_FEATURES],
      ["addMemRegion", { gpa: 0, size: 64 * 4096, uaddr: UADDR, fd: "fd", fdOffset: 0 }],
      ["setVringCall", 1, "fd"],
      ["setVringErr", 1, "fd"],
      ["setVringNum", 1, 128],
      ["setVringBase", 1, 77],
      ["setVringAddresses", 1, { desc: 0x2000, avail: 0x3000, used: 0x4000, logGpa: 0x4000 }],
      ["setVringKick", 1, null],
      ["setVringEnable", 1, true],
      ["getVringBase", 1],
      ["removeMemRegion", { gpa: 0, size: 64 * 4096, uaddr: UADDR }],
    ]);
    assert.deepEqual(s.errors, []);
    assert.equal(await s.end(), undefined);
  }
  assert.equal(countFds(), before);
});

Deno.test("requests are handled one after the other, however long one takes", async () => {
  const backend = new FakeBackend();
  const gate = Promise.withResolvers<void>();
  backend.delays.set("getVringBase", gate.promise);
  const s = await session({ backend });
  await s.peer.send(REQUEST.GET_VRING_BASE, encodeVringState({ index: 0, num: 0 }));
  await s.peer.send(REQUEST.SET_VRING_NUM, encodeVringState({ index: 0, num: 8 }));
  const answer = s.peer.read();
  await new Promise((resolve) => setTimeout(resolve, 5));
  assert.deepEqual(backend.names, []);
  gate.resolve();
  await answer;
  assert.equal(await s.ack(REQUEST.SET_OWNER), 0n);
  assert.deepEqual(backend.names, ["getVringBase", "setVringNum"]);
  await s.end();
});

Deno.test("features without bit 30 enable all rings, with bit 30 they change nothing", async () => {
  const s = await session({ options: { offerLog: true } });
  const kick = (index: number) => s.ack(REQUEST.SET_VRING_KICK, encodeVringFd({ index, hasFd: false }));
  await kick(0);
  await s.ack(REQUEST.SET_FEATURES, encodeU64(FAKE_FEATURES | bit(30)));
  await s.ack(REQUEST.SET_FEATURES, encodeU64(FAKE_FEATURES | bit(30) | bit(26)));
  assert.deepEqual(s.backend.names, ["setVringKick", "setFeatures", "setFeatures"]);
  assert.deepEqual(s.backend.calls.at(-1), ["setFeatures", FAKE_FEATURES | bit(26)]);
  await s.ack(REQUEST.SET_FEATURES, encodeU64(FAKE_FEATURES));
  assert.deepEqual(s.backend.calls.at(-1), ["setVringEnable", 0, true]);
  await kick(1);
  assert.deepEqual(s.backend.calls.at(-1), ["setVringEnable", 1, true]);
  await s.end();
});

Deno.test("feature bits that were not offered are refused and not passed on", async () => {
  const s = await session();
  assert.equal(await s.ack(REQUEST.SET_FEATURES, encodeU64(FAKE_FEATURES | bit(26))), 1n);
  assert.deepEqual(s.backend.names, []);
  assert.match(s.errors[0]!, /0x4000000, which it was not offered/);
  await s.end();
});

Deno.test("SET_LOG_BASE with LOG_SHMFD is answered with its own 16 bytes", async () => {
  using log = createMemfd("log", 8192);
  const s = await session({ protocolFeatures: bitsOf([PF.REPLY_ACK, PF.LOG_SHMFD]) });
  const payload = encodeLog({ size: 4096, offset: 4096 });
  const answer = await s.peer.ask(REQUEST.SET_LOG_BASE, payload, [log.fd]);
  assert.deepEqual([answer.request, answer.flags, answer.payload], [REQUEST.SET_LOG_BASE, 5, payload]);
  assert.deepEqual(s.backend.calls, [["setLogBase", { fd: "fd", offset: 4096, size: 4096 }]]);
  assert.equal(await s.ack(REQUEST.SET_LOG_FD, NONE, [log.fd]), 0n);
  // A log that its file does not hold cannot be answered with a failure: going on would lose dirty pages.
  await s.peer.send(REQUEST.SET_LOG_BASE, encodeLog({ size: 4097, offset: 4096 }), [log.fd]);
  const error = await s.ended as Error & { code: string };
  assert.equal(error.code, "VHOST_USER_UNANSWERABLE");
  assert.match(error.message, /SET_LOG_BASE cannot be answered: .*outside its file of 8192 bytes/);
  s.peer.stream.close();
});

Deno.test("SET_LOG_BASE without LOG_SHMFD is taken with 8 or 16 bytes and not answered", async () => {
  const s = await session({ protocolFeatures: 0n });
  for (const size of [8, 16]) await s.peer.send(REQUEST.SET_LOG_BASE, new Uint8Array(size));
  const next = await s.peer.ask(REQUEST.GET_QUEUE_NUM);
  assert.equal(next.request, REQUEST.GET_QUEUE_NUM);
  assert.deepEqual(s.backend.calls, []);
  await s.end();
});

Deno.test("configuration is read and written; a refused read is answered with nothing", async () => {
  const s = await session({ protocolFeatures: bitsOf([PF.REPLY_ACK, PF.CONFIG]) });
  const read = (offset: number, size: number) =>
    s.peer.ask(REQUEST.GET_CONFIG, encodeConfig({ offset, flags: 0, bytes: new Uint8Array(size) }));
  assert.deepEqual((await read(4, 8)).payload, encodeConfig({ offset: 4, flags: 0, bytes: s.backend.config.slice(4, 12) }));
  assert.equal((await read(56, 8)).payload.length, 0);
  assert.match(s.errors[0]!, /beyond the configuration/);
  assert.equal(await s.ack(REQUEST.SET_CONFIG, encodeConfig({ offset: 32, flags: 0, bytes: Uint8Array.of(9) })), 0n);
  assert.equal(s.backend.config[32], 9);
  await s.end();
});

Deno.test("status, reset, RARP and MTU reach the backend", async () => {
  const s = await session({ backend: new FakeBackend({ net: true }) });
  await s.ack(REQUEST.SET_STATUS, encodeU64(15n));
  assert.equal(decodeU64((await s.peer.ask(REQUEST.GET_STATUS)).payload), 15n);
  assert.equal(await s.ack(REQUEST.SEND_RARP, Uint8Array.of(2, 0, 0, 0, 0, 1, 0, 0)), 0n);
  assert.equal(await s.ack(REQUEST.NET_SET_MTU, encodeU64(9000n)), 0n);
  assert.equal(await s.ack(REQUEST.RESET_DEVICE), 0n);
  assert.deepEqual(s.backend.calls, [["setStatus", 15], ["sendRarp", [2, 0, 0, 0, 0, 1]], ["setMtu", 9000], ["reset"]]);
  await s.end();
});

Deno.test("what the backend rejects is acknowledged with 1, or signalled on the ring's err eventfd, and the connection goes on", async () => {
  using err = createEventfd();
  const backend = new FakeBackend();
  const s = await session({ backend });
  await s.ack(REQUEST.SET_VRING_ERR, encodeVringFd({ index: 3, hasFd: true }), [err.fd]);
  backend.failing.set("setVringBase", 2);
  assert.equal(await s.ack(REQUEST.SET_VRING_BASE, encodeVringState({ index: 3, num: 1 })), 1n);
  assert.equal(drainEventfd(err.fd), 0);
  await s.peer.send(REQUEST.SET_VRING_BASE, encodeVringState({ index: 3, num: 1 }));
  assert.equal(await s.ack(REQUEST.SET_VRING_ADDR, ring(0, 0)), 1n);
  assert.equal(drainEventfd(err.fd), 1);
  assert.equal(s.errors.length, 3);
  assert.match(s.errors[2]!, /Descriptors of ring 0: .* lie in no memory region/);
  await s.end();
});

Deno.test("a request that must be answered and cannot be ends the connection", async () => {
  const backend = new FakeBackend();
  backend.failing.set("getVringBase", 1);
  const s = await session({ backend });
  await s.peer.send(REQUEST.GET_VRING_BASE, encodeVringState({ index: 0, num: 0 }));
  const error = await s.ended;
  assert.match(error!.message, /GET_VRING_BASE cannot be answered: getVringBase fails as told/);
  assert.equal(await s.peer.tryRead(), undefined);
  s.peer.stream.close();
});

Deno.test("messages without a meaning here are refused where an answer is wanted and ignored where not", async () => {
  const s = await session();
  assert.equal(await s.ack(77), 1n);
  await s.peer.send(77, new Uint8Array(100));
  await s.peer.send(REQUEST.SET_VRING_ENDIAN, encodeVringState({ index: 0, num: 0 }));
  await s.peer.send(REQUEST.POSTCOPY_LISTEN);
  assert.equal(decodeU64((await s.peer.ask(REQUEST.CHECK_DEVICE_STATE)).payload), 1n);
  using pipe = createEventfd();
  assert.equal(decodeU64((await s.peer.ask(REQUEST.SET_DEVICE_STATE_FD, new Uint8Array(8), [pipe.fd])).payload), 0x101n);
  assert.equal(decodeU64((await s.peer.ask(REQUEST.IOTLB_MSG, new Uint8Array(32))).payload), 1n);
  assert.equal(await s.ack(REQUEST.RESET_OWNER), 0n);
  await s.peer.send(REQUEST.POSTCOPY_ADVISE);
  assert.match((await s.ended)!.message, /POSTCOPY_ADVISE cannot be answered: .* not offered/);
  s.peer.stream.close();
});

Deno.test("an in-flight region is handed out and taken back; one that does not fit its file reaches no device", async () => {
  const s = await session({ protocolFeatures: bitsOf([PF.REPLY_ACK, PF.INFLIGHT_SHMFD]) });
  const answer = await s.peer.ask(REQUEST.GET_INFLIGHT_FD, encodeInflight({ size: 0, offset: 0, queues: 2, num: 64 }));
  assert.deepEqual(decodeInflight(answer.payload), { size: 4096, offset: 0, queues: 2, num: 64 });
  assert.equal(answer.fdCount, 1);
  using file = createMemfd("in-flight", 4096);
  assert.equal(await s.ack(REQUEST.SET_INFLIGHT_FD, answer.payload, [file.fd]), 0n);
  assert.equal(await s.ack(REQUEST.SET_INFLIGHT_FD, encodeInflight({ size: 4096, offset: 4096, queues: 2, num: 64 }), [file.fd]), 1n);
  const place = { offset: 0, size: 4096, queues: 2, num: 64 };
  assert.deepEqual(s.backend.calls, [["createInflight", 2, 64], ["setInflight", "fd", place]]);
  s.backend.failing.set("createInflight", 1);
  const refused = await s.peer.ask(REQUEST.GET_INFLIGHT_FD, encodeInflight({ size: 0, offset: 0, queues: 2, num: 64 }));
  assert.deepEqual([refused.payload, refused.fdCount], [new Uint8Array(24), 0]);
  await s.end();
});

Deno.test("with requireSealed, memory that its owner could shorten reaches no device", async () => {
  const s = await session({ options: { requireSealed: true }, protocolFeatures: bitsOf([PF.REPLY_ACK, PF.CONFIGURE_MEM_SLOTS]) });
  using sealed = createMemfd("sealed", 4 * 4096);
  const path = await Deno.makeTempFile();
  await Deno.truncate(path, 4 * 4096);
  using file = openFd(path, 2);
  await Deno.remove(path);
  assert.equal(await s.ack(REQUEST.ADD_MEM_REG, encodeRegion(wire(0, 4)), [file.fd]), 1n);
  assert.match(s.errors[0]!, /F_SEAL_SHRINK is missing/);
  assert.equal(await s.ack(REQUEST.ADD_MEM_REG, encodeRegion(wire(0, 4)), [sealed.fd]), 0n);
  assert.deepEqual(s.backend.names, ["addMemRegion"]);
  await s.end();
});

Deno.test("NEED_REPLY without REPLY_ACK is not answered", async () => {
  const s = await session({ protocolFeatures: 0n });
  await s.peer.send(REQUEST.SET_OWNER, NONE, [], NEED_REPLY);
  assert.equal((await s.peer.ask(REQUEST.GET_QUEUE_NUM)).request, REQUEST.GET_QUEUE_NUM);
  await s.end();
});

Deno.test("a memory table replaces the one before, and its descriptors live as long as it does", async () => {
  using memory = createMemfd("m", 64 * 4096);
  const s = await session();
  const start = countFds();
  const table = (...regions: WireRegion[]) => s.ack(REQUEST.SET_MEM_TABLE, encodeMemTable(regions), regions.map(() => memory.fd));
  assert.equal(await table(wire(0, 8), wire(8, 8), wire(16, 8)), 0n);
  assert.equal(countFds(), start + 3);
  assert.equal(await table(wire(0, 64)), 0n);
  assert.equal(countFds(), start + 1);
  s.backend.failing.set("setMemTable", 1);
  assert.equal(await table(wire(0, 8), wire(8, 8)), 1n);
  assert.equal(await table(wire(0, 8), wire(7, 8)), 1n);
  assert.equal(await table(wire(60, 8)), 1n);
  assert.equal(countFds(), start + 1);
  assert.match(s.errors[1]!, /overlaps/);
  assert.match(s.errors[2]!, /outside its file of 262144 bytes/);
  // The table that was accepted still translates.
  await s.ack(REQUEST.SET_VRING_NUM, encodeVringState({ index: 0, num: 8 }));
  assert.equal(await s.ack(REQUEST.SET_VRING_ADDR, ring(0, 40)), 0n);
  await s.end();
});

Deno.test("regions beyond the slots, overlapping, unknown or of no file are refused one by one", async () => {
  using memory = createMemfd("m", 64 * 4096);
  using event = createEventfd();
  const [socket, other] = unixPair();
  const s = await session({ backend: new FakeBackend({ maxMemSlots: 2 }) });
  const add = (region: WireRegion, fd: OwnedFd | number = memory) =>
    s.ack(REQUEST.ADD_MEM_REG, encodeRegion(region), [typeof fd === "number" ? fd : fd.fd]);
  assert.equal(await add(wire(0, 1)), 0n);
  assert.equal(await add(wire(0, 1)), 1n);
  assert.equal(await add(wire(1, 1), event), 1n);
  assert.equal(await add(wire(1, 1), socket.fd), 1n);
  assert.equal(await add(wire(1, 1)), 0n);
  assert.equal(await add(wire(2, 1)), 1n);
  assert.equal(await s.ack(REQUEST.REM_MEM_REG, encodeRegion({ ...wire(1, 1), uaddr: 0 })), 1n);
  // A stray descriptor is closed.
  assert.equal(await s.ack(REQUEST.REM_MEM_REG, encodeRegion(wire(1, 1)), [memory.fd]), 0n);
  assert.deepEqual(s.backend.names, ["addMemRegion", "addMemRegion", "removeMemRegion"]);
  assert.equal(s.errors.length, 5);
  await s.end();
  socket.close();
  other.close();
});

Deno.test("a configuration change is told on the back-end's channel and its answer is read", async () => {
  const [local, remote] = unixPair();
  const channel = new RawPeer(local);
  const protocolFeatures = bitsOf([PF.BACKEND_REQ, PF.CONFIG, PF.REPLY_ACK]);
  const s = await session({ protocolFeatures });
  s.backend.onConfigChange!();
  assert.equal(await s.ack(REQUEST.SET_BACKEND_REQ_FD, NONE, [remote.fd]), 0n);
  remote.close();
  for (const answer of [0n, 1n]) {
    s.backend.onConfigChange!();
    const { request, flags, payload } = await channel.read();
    assert.deepEqual([request, flags, payload.length], [BACKEND_REQUEST.CONFIG_CHANGE_MSG, NEED_REPLY, 0]);
    await channel.reply(request, answer);
  }
  await waitUntil("the error", () => s.errors.length > 0);
  assert.match(s.errors[0]!, /CONFIG_CHANGE_MSG: the other side answered with error 1/);
  // The channel's end does not end the device.
  channel.stream.close();
  assert.equal(await s.ack(REQUEST.SET_OWNER), 0n);
  await s.end();
  assert.equal(s.backend.onConfigChange, undefined);
});

Deno.test("front-ends are served one after the other, and each end is told", async () => {
  const path = `${await Deno.makeTempDir()}/s`;
  const listener = listenUnix(path);
  const ends: (Error | undefined)[] = [];
  let refused = 0;
  const running = serve(listener, () => {
    if (ends.length === 1 && refused === 0) throw new Error("not now");
    return { backend: new FakeBackend(), options: { onDisconnect: (error) => void ends.push(error) } };
  }, () => refused++);
  const first = new RawPeer(connectUnix(path));
  const waiting = new RawPeer(connectUnix(path));
  assert.equal((await first.ask(REQUEST.GET_QUEUE_NUM)).payload[0], 4);
  first.stream.close();
  assert.equal(await waiting.tryRead(), undefined);
  waiting.stream.close();
  const third = new RawPeer(connectUnix(path));
  assert.equal((await third.ask(REQUEST.GET_QUEUE_NUM)).payload[0], 4);
  await third.send(REQUEST.GET_FEATURES, NONE, [], 0);
  assert.equal(await third.tryRead(), undefined);
  third.stream.close();
  const fourth = new RawPeer(connectUnix(path));
  assert.equal((await fourth.ask(REQUEST.GET_QUEUE_NUM)).payload[0], 4);
  fourth.stream.close();
  await waitUntil("three ends", () => ends.length >= 3);
  listener.close();
  await running;
  assert.deepEqual([ends[0], ends[2], refused], [undefined, undefined, 1]);
  assert.match(ends[1]!.message, /version 0/);
});
