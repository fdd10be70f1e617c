import assert from "node:assert/strict";
import fc from "fast-check";
import { createEventfd, createMemfd, dupFd, unixPair } from "../../src/ffi/mod.ts";
import { bit } from "../../src/uapi/bits.ts";
import { PROTOCOL_FEATURE } from "../../src/uapi/vhost_user.ts";
import { type FrontEndOptions, VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { BackendServer, type ServerOptions } from "../../src/vhost_user/server.ts";
import { FAKE_FEATURES, FakeBackend } from "../support/fake_backend.ts";
import { countFds } from "../support/fds.ts";

interface Pair {
  frontEnd: VhostUserFrontEnd;
  backend: FakeBackend;
  server: BackendServer;
  ended: Promise<Error | undefined>;
}

async function pair(backend = new FakeBackend(), server: ServerOptions = {}, frontEnd: FrontEndOptions = {}): Promise<Pair> {
  const [a, b] = unixPair();
  const back = new BackendServer(a, backend, server);
  const ended = back.run();
  return { frontEnd: await VhostUserFrontEnd.fromStream(b, { timeoutMs: 5000, ...frontEnd }), backend, server: back, ended };
}

async function end({ frontEnd, ended }: Pair): Promise<void> {
  await frontEnd.close();
  assert.equal(await ended, undefined);
}

Deno.test("whatever is done to the front-end arrives at the backend behind the server, argument for argument", async () => {
  const before = countFds();
  {
    using memory = createMemfd("m", 64 * 4096);
    using event = createEventfd();
    const p = await pair(new FakeBackend({ net: true, maxMemSlots: 12 }), { offerLog: true });
    const { frontEnd, backend } = p;
    assert.deepEqual([frontEnd.info.queueNum, frontEnd.info.maxMemSlots, frontEnd.info.hasConfig], [4, 12, true]);
    assert.equal(await frontEnd.getFeatures(), FAKE_FEATURES | bit(26));
    await frontEnd.setFeatures(FAKE_FEATURES);
    await frontEnd.setMemTable([{ gpa: 0x100000, size: 0x10000, uaddr: 0x500000, fd: memory.fd, fdOffset: 0x1000 }]);
    await frontEnd.addMemRegion({ gpa: 0x200000, size: 0x10000, uaddr: 0x600000, fd: memory.fd, fdOffset: 0x20000 });
    await frontEnd.removeMemRegion({ gpa: 0x200000, size: 0x10000, uaddr: 0x600000 });
    await frontEnd.setVringNum(3, 256);
    await frontEnd.setVringAddresses(3, { desc: 0x101000, avail: 0x102000, used: 0x103000 });
    await frontEnd.setVringBase(3, 0x8001ffff);
    await frontEnd.setVringCall(3, event.fd);
    await frontEnd.setVringErr(3, null);
    await frontEnd.setVringKick(3, event.fd);
    await frontEnd.setVringEnable(3, true);
    await frontEnd.setLogBase({ fd: memory.fd, offset: 4096, size: 8192 });
    await frontEnd.setFeatures(FAKE_FEATURES | bit(26));
    await frontEnd.setVringAddresses(3, { desc: 0x101000, avail: 0x102000, used: 0x103000, logGpa: 0x103000 });
    await frontEnd.setStatus(15);
    assert.equal(await frontEnd.getStatus(), 15);
    assert.deepEqual(await frontEnd.getConfig(8, 4), backend.config.slice(8, 12));
    await frontEnd.setConfig(32, Uint8Array.of(1));
    await frontEnd.sendRarp!(Uint8Array.of(1, 2, 3, 4, 5, 6));
    await frontEnd.setMtu!(1500);
    assert.equal(await frontEnd.getVringBase(3), 0x8001ffff);
    await frontEnd.reset();
    assert.deepEqual(backend.calls, [
      ["setFeatures", FAKE_FEATURES],
      ["addMemRegion", { gpa: 0x100000, size: 0x10000, uaddr: 0x500000, fd: "fd", fdOffset: 0x1000 }],
      ["addMemRegion", { gpa: 0x200000, size: 0x10000, uaddr: 0x600000, fd: "fd", fdOffset: 0x20000 }],
      ["removeMemRegion", { gpa: 0x200000, size: 0x10000, uaddr: 0x600000 }],
      ["setVringNum", 3, 256],
      ["setVringAddresses", 3, { desc: 0x101000, avail: 0x102000, used: 0x103000, logGpa: undefined }],
      ["setVringBase", 3, 0x8001ffff],
      ["setVringCall", 3, "fd"],
      ["setVringErr", 3, null],
      ["setVringKick", 3, "fd"],
      ["setVringEnable", 3, true],
      ["setLogBase", { fd: "fd", offset: 4096, size: 8192 }],
      ["setFeatures", FAKE_FEATURES | bit(26)],
      ["setVringAddresses", 3, { desc: 0x101000, avail: 0x102000, used: 0x103000, logGpa: 0x103000 }],
      ["setStatus", 15],
      ["getConfig", 0, 12],
      ["setConfig", 32, [1]],
      ["sendRarp", [1, 2, 3, 4, 5, 6]],
      ["setMtu", 1500],
      ["getVringBase", 3],
      ["reset"],
    ]);
    await end(p);
  }
  assert.equal(countFds(), before);
});

Deno.test("front-end and server agree under every set of protocol features", async () => {
  using memory = createMemfd("m", 64 * 4096);
  const optional = ["MQ", "LOG_SHMFD", "REPLY_ACK", "BACKEND_REQ", "CONFIG", "CONFIGURE_MEM_SLOTS", "STATUS", "RESET_DEVICE"] as const;
  await fc.assert(
    fc.asyncProperty(fc.subarray([...optional]), async (names) => {
      const protocolFeatures = names.reduce((word, name) => word | bit(PROTOCOL_FEATURE[name]), 0n);
      const p = await pair(new FakeBackend(), { protocolFeatures });
      assert.equal(p.frontEnd.info.protocolFeatures, protocolFeatures);
      const region = { gpa: 0, size: 0x10000, uaddr: 0x500000, fd: memory.fd, fdOffset: 0 };
      await p.frontEnd.setFeatures(FAKE_FEATURES);
      await p.frontEnd.setMemTable([region]);
      await p.frontEnd.addMemRegion({ ...region, gpa: 0x20000, uaddr: 0x700000 });
      await p.frontEnd.removeMemRegion(region);
      await p.frontEnd.setVringNum(0, 8);
      await p.frontEnd.setVringAddresses(0, { desc: 0x20000, avail: 0x21000, used: 0x22000 });
      await p.frontEnd.setVringKick(0, null);
      await p.frontEnd.setVringEnable(0, true);
      assert.deepEqual(p.backend.calls.slice(-4), [
        ["setVringNum", 0, 8],
        ["setVringAddresses", 0, { desc: 0x20000, avail: 0x21000, used: 0x22000, logGpa: undefined }],
        ["setVringKick", 0, null],
        ["setVringEnable", 0, true],
      ]);
      if (names.includes("LOG_SHMFD")) await p.frontEnd.setLogBase({ fd: memory.fd, offset: 0, size: 4096 });
      await p.frontEnd.reset();
      assert.equal(
        p.backend.names.at(-1),
        names.includes("RESET_DEVICE") ? "reset" : names.includes("STATUS") ? "setStatus" : "getVringBase",
      );
      await end(p);
    }),
    { numRuns: 60, seed: 4 },
  );
});

Deno.test("a configuration change crosses both ends", async () => {
  const p = await pair();
  const changes = new Promise<void>((resolve) => {
    let count = 0;
    p.frontEnd.onConfigChange = () => {
      if (++count === 3) resolve();
    };
  });
  for (let i = 0; i < 3; i++) p.backend.onConfigChange!();
  await changes;
  await end(p);
});

Deno.test("what the device refuses arrives at the caller as an error, and the connection goes on", async () => {
  const errors: Error[] = [];
  const p = await pair(new FakeBackend(), { onError: (error) => errors.push(error) });
  p.backend.failing.set("setVringEnable", 1);
  await assert.rejects(p.frontEnd.setVringEnable(0, true), { code: "DEVICE_REFUSED" });
  await p.frontEnd.setVringEnable(0, true);
  await assert.rejects(p.frontEnd.getConfig(56, 8), { code: "DEVICE_REFUSED" });
  assert.deepEqual(errors.map(({ message }) => message), ["setVringEnable fails as told", "beyond the configuration"]);
  await end(p);
});

Deno.test("a server that closes is a lost device for the front-end", async () => {
  const p = await pair();
  const failed = new Promise<Error>((resolve) => p.frontEnd.onFailure = resolve);
  p.server.close();
  assert.equal(await p.ended, undefined);
  assert.match((await failed).message, /closed the vhost-user connection/);
  await p.frontEnd.close();
});

Deno.test("a front-end can be made from a bare descriptor", async () => {
  const [a, b] = unixPair();
  const ended = new BackendServer(a, new FakeBackend()).run();
  const frontEnd = await VhostUserFrontEnd.fromFd(dupFd(b.fd));
  b.close();
  assert.match(frontEnd.info.address, /^fd:\d+$/);
  assert.equal(await frontEnd.getFeatures(), FAKE_FEATURES);
  await frontEnd.close();
  await ended;
});
