import assert from "node:assert/strict";
import { createEventfd, createMemfd, listenUnix, unixPair } from "../../src/ffi/mod.ts";
import type { MemoryRegion } from "../../src/memory/region.ts";
import { bit, bitsOf } from "../../src/uapi/bits.ts";
import { decodeVringAddr, encodeU64, encodeVringState } from "../../src/uapi/vhost.ts";
import { FLAG, PROTOCOL_FEATURE, REQUEST, requestName } from "../../src/uapi/vhost_user.ts";
import { type FrontEndOptions, VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { decodeMemTable, encodeConfig } from "../../src/vhost_user/message.ts";
import { countFds } from "../support/fds.ts";
import { RawPeer, type SeenMessage } from "../support/peer.ts";
import { waitUntil } from "../support/wait.ts";

const PF = PROTOCOL_FEATURE;
const GET_FEATURES = REQUEST.GET_FEATURES;

type Answers = Partial<Record<number, (message: SeenMessage) => Uint8Array<ArrayBuffer> | undefined>>;

/** A device that answers as a test wants; all requests are remembered. */
class ScriptedDevice {
  readonly seen: SeenMessage[] = [];
  readonly done: Promise<void>;

  constructor(readonly peer: RawPeer, features: bigint, protocolFeatures: bigint, readonly answers: Answers = {}) {
    this.answers = {
      [GET_FEATURES]: () => encodeU64(features),
      [REQUEST.GET_PROTOCOL_FEATURES]: () => encodeU64(protocolFeatures),
      [REQUEST.GET_QUEUE_NUM]: () => encodeU64(2n),
      [REQUEST.GET_MAX_MEM_SLOTS]: () => encodeU64(3n),
      ...answers,
    };
    this.done = this.#run();
  }

  async #run(): Promise<void> {
    try {
      for (;;) {
        const message = await this.peer.tryRead();
        if (message === undefined) return;
        this.seen.push(message);
        const answer = this.answers[message.request]?.(message);
        if (answer !== undefined) await this.peer.reply(message.request, answer);
        else if ((message.flags & FLAG.NEED_REPLY) !== 0) await this.peer.reply(message.request, 0n);
      }
    } catch { /* closed by the test */ }
  }

  /** Names of the requests since the last call. */
  take(): string[] {
    return this.seen.splice(0).map(({ request, flags }) =>
      requestName("front-end", request) + ((flags & FLAG.NEED_REPLY) !== 0 ? "*" : "")
    );
  }
}

async function connect(
  features: bigint,
  protocolFeatures: bigint,
  answers: Answers = {},
  options: FrontEndOptions = {},
): Promise<{ device: ScriptedDevice; frontEnd: VhostUserFrontEnd }> {
  const [a, b] = unixPair();
  const device = new ScriptedDevice(new RawPeer(a), features, protocolFeatures, answers);
  const frontEnd = await VhostUserFrontEnd.fromStream(b, { timeoutMs: 5000, ...options });
  return { device, frontEnd };
}

async function end({ device, frontEnd }: { device: ScriptedDevice; frontEnd: VhostUserFrontEnd }): Promise<void> {
  await frontEnd.close();
  await device.done;
  device.peer.stream.close();
}

const WITH_PF = bit(30) | bit(32);
const ALL = bitsOf(Object.values(PF));

Deno.test("the handshake goes in QEMU's order and takes only what this front-end can use", async () => {
  const pair = await connect(WITH_PF | bit(29), ALL);
  assert.deepEqual(pair.device.take(), [
    "GET_FEATURES",
    "GET_PROTOCOL_FEATURES",
    "SET_PROTOCOL_FEATURES",
    "GET_QUEUE_NUM",
    "GET_MAX_MEM_SLOTS",
    "SET_BACKEND_REQ_FD*",
    "SET_OWNER*",
  ]);
  const { info } = pair.frontEnd;
  assert.equal(
    info.protocolFeatures,
    bitsOf([
      PF.MQ,
      PF.LOG_SHMFD,
      PF.RARP,
      PF.REPLY_ACK,
      PF.MTU,
      PF.BACKEND_REQ,
      PF.CONFIG,
      PF.RESET_DEVICE,
      PF.CONFIGURE_MEM_SLOTS,
      PF.STATUS,
      PF.DEVICE_STATE,
    ]),
  );
  assert.deepEqual([info.queueNum, info.maxMemSlots, info.hasConfig, info.kind], [2, 3, true, "vhost-user"]);
  assert.equal(await pair.frontEnd.getFeatures(), bit(29) | bit(32));
  await end(pair);
});

Deno.test("a device without protocol features works: no bit 30, no enable message, barriers instead of acks", async () => {
  const pair = await connect(bit(32), 0n);
  const { device, frontEnd } = pair;
  assert.equal(await frontEnd.getFeatures(), bit(32));
  assert.deepEqual(device.take(), ["GET_FEATURES", "SET_OWNER", "GET_FEATURES"]);
  assert.deepEqual([frontEnd.info.queueNum, frontEnd.info.maxMemSlots, frontEnd.info.hasConfig], [1, 8, false]);
  await frontEnd.setFeatures(bit(32));
  assert.deepEqual(device.seen[0]?.payload, encodeU64(bit(32)));
  await frontEnd.setVringEnable(0, true);
  await frontEnd.setMemTable([]);
  assert.deepEqual(device.take(), ["SET_FEATURES", "GET_FEATURES", "SET_MEM_TABLE", "GET_FEATURES"]);
  await frontEnd.setStatus(15);
  assert.equal(await frontEnd.getStatus(), 15);
  assert.deepEqual([frontEnd.sendRarp, frontEnd.setMtu], [undefined, undefined]);
  await assert.rejects(frontEnd.getConfig(0, 8), { code: "UNSUPPORTED" });
  await assert.rejects(frontEnd.suspend(), { code: "UNSUPPORTED" });
  await end(pair);
});

Deno.test("features go out with bit 30 where the device has it, so that rings are not enabled by surprise", async () => {
  const pair = await connect(WITH_PF, bitsOf([PF.REPLY_ACK]));
  pair.device.take();
  await pair.frontEnd.setFeatures(bit(32));
  assert.deepEqual(pair.device.seen[0]?.payload, encodeU64(bit(32) | bit(30)));
  await end(pair);
});

Deno.test("answers to SET_LOG_BASE of 0, 8 and 16 bytes are accepted, whatever is in them; other sizes are not", async () => {
  using log = createMemfd("log", 4096);
  for (const [answer, outcome] of [[0, "ok"], [8, "ok"], [16, "ok"], [4, "VHOST_USER_PROTOCOL"]] as const) {
    const pair = await connect(WITH_PF, bitsOf([PF.LOG_SHMFD]), {
      [REQUEST.SET_LOG_BASE]: () => new Uint8Array(answer).fill(0x20),
    });
    const set = pair.frontEnd.setLogBase({ fd: log.fd, offset: 0, size: 4096 }).then(() => "ok", (error) => error.code);
    assert.equal(await set, outcome, `answer of ${answer} bytes`);
    assert.equal(pair.device.seen.at(-1)?.fdCount, 1);
    await end(pair);
  }
});

Deno.test("a device that refuses an acknowledged request is an error, and the connection goes on", async () => {
  const pair = await connect(WITH_PF, bitsOf([PF.REPLY_ACK]), { [REQUEST.SET_VRING_BASE]: () => encodeU64(5n) });
  await assert.rejects(pair.frontEnd.setVringBase(1, 7), { code: "DEVICE_REFUSED", message: /SET_VRING_BASE, ring 1: .* error 5/ });
  await pair.frontEnd.setVringNum(1, 128);
  await end(pair);
});

Deno.test("a lost connection rejects all pending calls, later ones too, and is told once", async () => {
  const silent = { [REQUEST.GET_VRING_BASE]: () => undefined, [REQUEST.GET_STATUS]: () => undefined };
  const { device, frontEnd } = await connect(WITH_PF, bitsOf([PF.REPLY_ACK, PF.STATUS]), silent);
  const failures: Error[] = [];
  frontEnd.onFailure = (error) => failures.push(error);
  const calls = [frontEnd.getVringBase(3), frontEnd.getStatus()];
  const outcomes = Promise.allSettled(calls);
  await waitUntil("both requests", () => device.seen.at(-1)?.request === REQUEST.GET_STATUS);
  device.peer.stream.close();
  for (const outcome of await outcomes) {
    assert.equal(outcome.status, "rejected");
    assert.equal(outcome.reason.code, "VHOST_USER_DISCONNECTED");
  }
  await assert.rejects(frontEnd.getFeatures(), { code: "VHOST_USER_DISCONNECTED" });
  assert.equal(failures.length, 1);
  await frontEnd.close();
  assert.equal(failures.length, 1);
});

Deno.test("a failure before the owner listens is told when it does", async () => {
  const { device, frontEnd } = await connect(WITH_PF, bitsOf([PF.REPLY_ACK]));
  device.peer.stream.close();
  await assert.rejects(frontEnd.getFeatures());
  await new Promise<void>((resolve) => frontEnd.onFailure = () => resolve());
  await frontEnd.close();
});

Deno.test("closing rejects what is pending and tells nobody", async () => {
  const { device, frontEnd } = await connect(WITH_PF, 0n, { [REQUEST.GET_VRING_BASE]: () => undefined });
  frontEnd.onFailure = () => assert.fail("close is no failure");
  const pending = assert.rejects(frontEnd.getVringBase(0), { code: "CLOSED" });
  await frontEnd.close();
  await pending;
  await device.done;
  device.peer.stream.close();
});

Deno.test("an answer that is late, unasked or to another request ends the connection", async () => {
  {
    const { device, frontEnd } = await connect(WITH_PF, 0n, { [REQUEST.GET_VRING_BASE]: () => undefined }, { vringBaseTimeoutMs: 20 });
    await assert.rejects(frontEnd.getVringBase(0), { code: "VHOST_USER_TIMEOUT", message: /GET_VRING_BASE, ring 0: .* 20 ms/ });
    await device.done;
    device.peer.stream.close();
    await frontEnd.close();
  }
  for (const request of [REQUEST.GET_STATUS, 99]) {
    const { device, frontEnd } = await connect(WITH_PF, 0n);
    const failed = new Promise<Error>((resolve) => frontEnd.onFailure = resolve);
    await device.peer.reply(request, 0n);
    assert.match((await failed).message, /Unasked answer/);
    device.peer.stream.close();
    await frontEnd.close();
  }
  const { device, frontEnd } = await connect(WITH_PF, 0n, {
    [REQUEST.GET_VRING_BASE]: () => {
      device.peer.reply(REQUEST.GET_FEATURES, 0n);
      return undefined;
    },
  });
  await assert.rejects(frontEnd.getVringBase(0), { code: "VHOST_USER_PROTOCOL", message: /where one to GET_VRING_BASE was due/ });
  device.peer.stream.close();
  await frontEnd.close();
});

Deno.test("the answer to GET_VRING_BASE must be about the ring that was asked for", async () => {
  const pair = await connect(WITH_PF, 0n, { [REQUEST.GET_VRING_BASE]: () => encodeVringState({ index: 1, num: 9 }) });
  assert.equal(await pair.frontEnd.getVringBase(1), 9);
  await assert.rejects(pair.frontEnd.getVringBase(0), { code: "VHOST_USER_PROTOCOL" });
  await end(pair);
});

Deno.test("configuration is read from its first byte, since some devices ignore the offset", async () => {
  const config = Uint8Array.from({ length: 60 }, (_, i) => i);
  const pair = await connect(WITH_PF, bitsOf([PF.CONFIG]), {
    [REQUEST.GET_CONFIG]: ({ payload }) => {
      const size = payload.length - 12;
      return size > 60 ? new Uint8Array(0) : encodeConfig({ offset: 0, flags: 0, bytes: config.slice(0, size) });
    },
  });
  assert.deepEqual(await pair.frontEnd.getConfig(20, 4), config.slice(20, 24));
  await assert.rejects(pair.frontEnd.getConfig(0, 61), { code: "DEVICE_REFUSED" });
  await assert.rejects(pair.frontEnd.getConfig(0, 257), { code: "OUT_OF_RANGE" });
  await end(pair);
});

function region(fd: number, page: number, pages = 1): MemoryRegion {
  return { gpa: page * 4096, size: pages * 4096, uaddr: 0x7f0000000000 + page * 4096, fd, fdOffset: page * 4096 };
}

Deno.test("with slots, a new table costs messages only for what differs", async () => {
  using memory = createMemfd("m", 16 * 4096);
  const pair = await connect(WITH_PF, bitsOf([PF.REPLY_ACK, PF.CONFIGURE_MEM_SLOTS]));
  const { device, frontEnd } = pair;
  device.take();
  await frontEnd.setMemTable([region(memory.fd, 0), region(memory.fd, 2)]);
  assert.deepEqual(device.take(), ["ADD_MEM_REG*", "ADD_MEM_REG*"]);
  await frontEnd.setMemTable([region(memory.fd, 2), region(memory.fd, 4)]);
  assert.deepEqual(device.seen.map(({ fdCount }) => fdCount), [0, 1]);
  assert.deepEqual(device.take(), ["REM_MEM_REG*", "ADD_MEM_REG*"]);
  await frontEnd.addMemRegion(region(memory.fd, 6));
  await assert.rejects(frontEnd.addMemRegion(region(memory.fd, 8)), { code: "TOO_MANY_REGIONS" });
  await assert.rejects(frontEnd.addMemRegion(region(memory.fd, 6, 2)), { code: "REGION_OVERLAP" });
  await frontEnd.removeMemRegion(region(memory.fd, 4));
  await assert.rejects(frontEnd.removeMemRegion(region(memory.fd, 4)), { code: "NO_SUCH_REGION" });
  assert.deepEqual(device.take(), ["ADD_MEM_REG*", "REM_MEM_REG*"]);
  await end(pair);
});

Deno.test("without slots the whole table is sent, from descriptors of its own, and neighbours in one file are merged above 8", async () => {
  const before = countFds();
  {
    using memory = createMemfd("m", 64 * 4096);
    const pair = await connect(WITH_PF, bitsOf([PF.REPLY_ACK]));
    const { device, frontEnd } = pair;
    const table = () => decodeMemTable(device.seen.at(-1)!.payload);
    {
      using borrowed = memory.dup();
      await frontEnd.addMemRegion(region(borrowed.fd, 0));
    }
    // Odd pages first: neighbours need not come in order.
    for (const page of [2, 4, 6, 8, 10, 12, 14]) await frontEnd.addMemRegion(region(memory.fd, page));
    assert.equal(table().length, 8);
    assert.equal(device.seen.at(-1)?.fdCount, 8);
    // Some devices refuse a table that is not in the order of addresses.
    await frontEnd.removeMemRegion(region(memory.fd, 4));
    await frontEnd.addMemRegion(region(memory.fd, 4));
    assert.deepEqual(table().map(({ gpa }) => gpa / 4096), [0, 2, 4, 6, 8, 10, 12, 14]);
    await frontEnd.addMemRegion(region(memory.fd, 1));
    assert.deepEqual(table().map(({ gpa, size }) => [gpa / 4096, size / 4096]), [[0, 3], [4, 1], [6, 1], [8, 1], [10, 1], [12, 1], [
      14,
      1,
    ]]);
    // A ring may span what was given as two regions only if it lies in one of them: the caller's table counts.
    await frontEnd.removeMemRegion(region(memory.fd, 0));
    assert.equal(table().length, 8);
    await frontEnd.addMemRegion(region(memory.fd, 3));
    await frontEnd.addMemRegion(region(memory.fd, 20));
    await frontEnd.addMemRegion(region(memory.fd, 22));
    await assert.rejects(frontEnd.addMemRegion(region(memory.fd, 24)), { code: "TOO_MANY_REGIONS" });
    assert.equal(table().length, 8);
    // Neighbours in all but one respect are none: address in the front-end, place in the file, the file itself.
    const eight = [0, 2, 4, 6, 8, 10, 12, 14].map((page) => region(memory.fd, page));
    for (const odd of [{ uaddr: 0x600000000000 }, { fdOffset: 40 * 4096 }]) {
      await assert.rejects(frontEnd.setMemTable([...eight, { ...region(memory.fd, 15), ...odd }]), { code: "TOO_MANY_REGIONS" });
    }
    using other = createMemfd("other", 64 * 4096);
    await assert.rejects(frontEnd.setMemTable([...eight, region(other.fd, 15)]), { code: "TOO_MANY_REGIONS" });
    await frontEnd.setMemTable([...eight, region(memory.fd, 15)]);
    assert.equal(table().length, 8);
    await end(pair);
  }
  assert.equal(countFds(), before);
});

Deno.test("ring addresses are translated by the table and must lie in one region with their whole length", async () => {
  using memory = createMemfd("m", 16 * 4096);
  const pair = await connect(WITH_PF, bitsOf([PF.REPLY_ACK, PF.CONFIGURE_MEM_SLOTS]));
  const { device, frontEnd } = pair;
  await frontEnd.addMemRegion({ gpa: 0x10000, size: 0x4000, uaddr: 0x7f0000000000, fd: memory.fd, fdOffset: 0 });
  await frontEnd.setVringNum(0, 256);
  await frontEnd.setVringAddresses(0, { desc: 0x10000, avail: 0x11000, used: 0x12000, logGpa: 0x12000 });
  assert.deepEqual(decodeVringAddr(device.seen.at(-1)!.payload), {
    index: 0,
    flags: 1,
    desc: 0x7f0000000000,
    avail: 0x7f0000001000,
    used: 0x7f0000002000,
    logGuestAddr: 0x12000,
  });
  // The used ring of 256 has 2054 bytes.
  const at = { desc: 0x10000, avail: 0x11000 };
  await frontEnd.setVringAddresses(0, { ...at, used: 0x14000 - 2054 });
  await assert.rejects(frontEnd.setVringAddresses(0, { ...at, used: 0x14000 - 2053 }), {
    code: "RING_OUTSIDE_MEMORY",
    message: /Used ring/,
  });
  await frontEnd.setFeatures(bit(34));
  await frontEnd.setVringAddresses(0, { ...at, used: 0x14000 - 4 });
  await end(pair);
});

Deno.test("a reset without RESET_DEVICE disables and stops every ring that was started", async () => {
  using kick = createEventfd();
  const stop = { [REQUEST.GET_VRING_BASE]: (message: SeenMessage) => message.payload };
  const pair = await connect(WITH_PF, bitsOf([PF.REPLY_ACK, PF.STATUS]), stop);
  await pair.frontEnd.setVringKick(1, kick.fd);
  pair.device.take();
  await pair.frontEnd.reset();
  assert.deepEqual(pair.device.take(), ["SET_VRING_ENABLE*", "GET_VRING_BASE", "SET_STATUS*"]);
  await end(pair);
  const other = await connect(WITH_PF, bitsOf([PF.REPLY_ACK, PF.RESET_DEVICE]));
  other.device.take();
  await other.frontEnd.reset();
  assert.deepEqual(other.device.take(), ["RESET_DEVICE*"]);
  await end(other);
});

Deno.test("a device that breaks off or talks nonsense during the handshake is an error without leaks", async () => {
  const before = countFds();
  for (
    const answers of [
      { [REQUEST.GET_FEATURES]: () => new Uint8Array(4) },
      { [REQUEST.GET_PROTOCOL_FEATURES]: () => new Uint8Array(0) },
      { [REQUEST.SET_OWNER]: () => encodeU64(1n) },
    ]
  ) {
    const [a, b] = unixPair();
    const device = new ScriptedDevice(new RawPeer(a), WITH_PF, bitsOf([PF.REPLY_ACK, PF.BACKEND_REQ]), answers);
    await assert.rejects(VhostUserFrontEnd.fromStream(b), { name: "SvqError" });
    await device.done;
    a.close();
  }
  assert.equal(countFds(), before);
});

Deno.test("a probe sends GET messages only, and says what it could not find out", async () => {
  const path = `${await Deno.makeTempDir()}/s`;
  using listener = listenUnix(path);
  const probing = VhostUserFrontEnd.probe(path, 2000);
  const config = encodeConfig({ offset: 0, flags: 0, bytes: new Uint8Array(24).fill(7) });
  const device = new ScriptedDevice(new RawPeer(await listener.accept()), WITH_PF, ALL, {
    [REQUEST.GET_CONFIG]: ({ payload }) => payload.length === 36 ? config : new Uint8Array(0),
  });
  const probe = await probing;
  assert.deepEqual([probe.features, probe.protocolFeatures, probe.queueNum, probe.maxMemSlots], [WITH_PF, ALL, 2, 3]);
  assert.deepEqual(probe.config, new Uint8Array(24).fill(7));
  assert.deepEqual(probe.notes, []);
  await device.done;
  assert.ok(device.take().every((name) => name.startsWith("GET_")));
  device.peer.stream.close();

  const strict = VhostUserFrontEnd.probe(path, 2000);
  const stream = await listener.accept();
  const closing = new ScriptedDevice(new RawPeer(stream), WITH_PF, bitsOf([PF.MQ, PF.CONFIG]), {
    [REQUEST.GET_QUEUE_NUM]: () => {
      stream.shutdown();
      return undefined;
    },
  });
  const partial = await strict;
  assert.deepEqual([partial.queueNum, partial.config], [undefined, undefined]);
  assert.match(partial.notes[0]!, /^Queues not known: GET_QUEUE_NUM: .*may need SET_PROTOCOL_FEATURES/);
  assert.equal(partial.notes.length, 2);
  await closing.done;
  stream.close();

  // Connected to the queue of a listener that never accepts: as if another front-end had it.
  await assert.rejects(VhostUserFrontEnd.probe(path, 30), { code: "DEVICE_IN_USE" });
  listener.tryAccept()?.close();
  await assert.rejects(VhostUserFrontEnd.probe(`${path}-missing`, 30), { code: "ENOENT", exitCode: 3 });
});
