import assert from "node:assert/strict";
import fc from "fast-check";
import { SvqError } from "../../src/errors.ts";
import { createEventfd, createMemfd, type OwnedFd } from "../../src/ffi/mod.ts";
import { bitsOf } from "../../src/uapi/bits.ts";
import { encodeU64, encodeVringAddr, encodeVringState } from "../../src/uapi/vhost.ts";
import { FLAG, PROTOCOL_FEATURE, REQUEST } from "../../src/uapi/vhost_user.ts";
import { encodeConfig, encodeLog, encodeMemTable, encodeMessage, encodeRegion, encodeVringFd } from "../../src/vhost_user/message.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";
import { SERVER_PROTOCOL_FEATURES } from "../../src/vhost_user/server_rules.ts";
import { FakeBackend } from "../support/fake_backend.ts";
import { countFds } from "../support/fds.ts";
import { rawPair } from "../support/peer.ts";
import { within } from "../support/test_guest.ts";

const MAIN = SERVER_PROTOCOL_FEATURES & ~bitsOf([PROTOCOL_FEATURE.RARP, PROTOCOL_FEATURE.MTU]);
const region = { gpa: 0, size: 4096, uaddr: 0, mmapOffset: 0 };

function header(request: number, flags: number, size: number): Uint8Array<ArrayBuffer> {
  return new Uint8Array(Uint32Array.of(request, flags, size).buffer);
}

function patched(bytes: Uint8Array<ArrayBuffer>, at: number, ...values: number[]): Uint8Array<ArrayBuffer> {
  bytes.set(values, at);
  return bytes;
}

const message = (request: number, payload: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> =>
  encodeMessage(request, FLAG.VERSION, payload);

/** Every way to break the protocol: bytes, descriptors, what the error must say. */
const BROKEN: Record<string, [bytes: Uint8Array<ArrayBuffer>, fds: number, pattern: RegExp]> = {
  "another version": [header(REQUEST.GET_FEATURES, 2, 0), 0, /GET_FEATURES: version 2/],
  "a reserved flag": [header(REQUEST.GET_FEATURES, 0x21, 0), 0, /reserved flags 0x21/],
  "a reply": [message(REQUEST.GET_FEATURES, new Uint8Array(0)).fill(5, 4, 5), 0, /a reply where a request/],
  "a size of 4 GiB": [header(REQUEST.SET_FEATURES, 1, 0xffffffff), 0, /4294967295 bytes of payload instead of 8/],
  "a size of 4 GiB for an unknown request": [header(1234, 1, 0xffffffff), 0, /request 1234: 4294967295 bytes/],
  "a payload where none is due": [message(REQUEST.GET_FEATURES, new Uint8Array(8)), 0, /8 bytes of payload instead of 0/],
  "a payload that is too short": [message(REQUEST.SET_VRING_ADDR, new Uint8Array(39)), 0, /39 bytes of payload instead of 40/],
  "descriptors where none are due": [message(REQUEST.SET_FEATURES, encodeU64(0n)), 3, /3 file descriptors instead of 0/],
  "descriptors with an unknown request": [message(1234, new Uint8Array(0)), 1, /1 file descriptors instead of 0/],
  "nine descriptors": [message(REQUEST.SET_MEM_TABLE, encodeMemTable([])), 9, /9 file descriptors/],
  "a flood of descriptors": [message(REQUEST.SET_MEM_TABLE, encodeMemTable([])), 253, /253 file descriptors/],
  "a table with fewer descriptors than regions": [
    message(REQUEST.SET_MEM_TABLE, encodeMemTable([region, { ...region, gpa: 8192 }])),
    1,
    /2 regions with 1 file/,
  ],
  "a table with more descriptors than regions": [message(REQUEST.SET_MEM_TABLE, encodeMemTable([region])), 2, /1 regions with 2 file/],
  "a table that lies about its count": [
    message(REQUEST.SET_MEM_TABLE, patched(encodeMemTable([region]), 0, 200)),
    1,
    /says it has 200 regions/,
  ],
  "a region without a descriptor": [message(REQUEST.ADD_MEM_REG, encodeRegion(region)), 0, /0 file descriptors instead of 1/],
  "a region of 0 bytes": [message(REQUEST.ADD_MEM_REG, encodeRegion({ ...region, size: 0 })), 1, /0 bytes/],
  "a region above 2^52": [message(REQUEST.ADD_MEM_REG, patched(encodeRegion(region), 14, 0x10)), 1, /at or above 2\^52/],
  "a region that wraps": [
    message(REQUEST.ADD_MEM_REG, patched(encodeRegion(region), 16, 0, 0, 0, 0, 0, 0, 0xff, 0xff)),
    1,
    /at or above 2\^52/,
  ],
  "a kick with a descriptor that it denies": [
    message(REQUEST.SET_VRING_KICK, encodeVringFd({ index: 0, hasFd: false })),
    1,
    /Ring 0: 1 file/,
  ],
  "a kick without the descriptor it promises": [
    message(REQUEST.SET_VRING_KICK, encodeVringFd({ index: 0, hasFd: true })),
    0,
    /Ring 0: 0 file/,
  ],
  "a kick with two descriptors": [message(REQUEST.SET_VRING_KICK, encodeVringFd({ index: 0, hasFd: true })), 2, /2 file descriptors/],
  "a call with reserved bits": [message(REQUEST.SET_VRING_CALL, encodeU64(0x1_0000_0100n)), 0, /reserved bits/],
  "a ring that cannot exist": [message(REQUEST.SET_VRING_BASE, encodeVringState({ index: 256, num: 0 })), 0, /no ring 256/],
  "a ring size of 0": [message(REQUEST.SET_VRING_NUM, encodeVringState({ index: 0, num: 0 })), 0, /SET_VRING_NUM of ring 0 with 0/],
  "a ring size above 32768": [message(REQUEST.SET_VRING_NUM, encodeVringState({ index: 0, num: 32769 })), 0, /with 32769/],
  "unknown ring flags": [
    message(REQUEST.SET_VRING_ADDR, encodeVringAddr({ index: 0, flags: 2, desc: 0, used: 0, avail: 0, logGuestAddr: 0 })),
    0,
    /unknown flags 0x2/,
  ],
  "an enable that is neither 0 nor 1": [message(REQUEST.SET_VRING_ENABLE, encodeVringState({ index: 0, num: 2 })), 0, /with 2/],
  "a log without a descriptor": [message(REQUEST.SET_LOG_BASE, encodeLog({ size: 4096, offset: 0 })), 0, /without a file descriptor/],
  "a log of 8 bytes with LOG_SHMFD": [message(REQUEST.SET_LOG_BASE, new Uint8Array(8)), 1, /8 bytes instead of 16/],
  "an empty log": [message(REQUEST.SET_LOG_BASE, new Uint8Array(16)), 1, /Dirty log of 0 bytes/],
  "a configuration that lies about its size": [
    message(REQUEST.GET_CONFIG, patched(encodeConfig({ offset: 0, flags: 0, bytes: new Uint8Array(8) }), 4, 200)),
    0,
    /says it carries 200/,
  ],
  "a configuration outside of it": [
    message(REQUEST.SET_CONFIG, encodeConfig({ offset: 4090, flags: 0, bytes: new Uint8Array(8) })),
    0,
    /4090\+8 lie outside/,
  ],
  "protocol features that were not offered": [message(REQUEST.SET_PROTOCOL_FEATURES, encodeU64(1n << 8n)), 0, /not offered/],
  "an MTU above 65535": [message(REQUEST.NET_SET_MTU, encodeU64(65536n)), 0, /NET_SET_MTU with 65536/],
  "a back-end channel that is no socket": [message(REQUEST.SET_BACKEND_REQ_FD, new Uint8Array(0)), 1, /without a socket/],
};

async function attack(
  bytes: Uint8Array<ArrayBuffer>,
  fds: number,
  memory: OwnedFd,
): Promise<{ error: Error | undefined; backend: FakeBackend }> {
  const [peer, stream] = rawPair();
  using _peer = peer;
  const backend = new FakeBackend({ net: true });
  const ended = new BackendServer(stream, backend).run();
  await peer.send(REQUEST.SET_PROTOCOL_FEATURES, encodeU64(MAIN));
  await peer.stream.send(bytes, Array.from({ length: fds }, () => memory.fd));
  const error = await within(ended, 5000, "the end of the connection");
  assert.equal(await peer.tryRead(), undefined, "no answer");
  return { error, backend };
}

for (const [name, [bytes, fds, pattern]] of Object.entries(BROKEN)) {
  Deno.test(`${name} ends the connection with an error that says so, reaches no device and leaks no descriptor`, async () => {
    using memory = createMemfd("m", 1 << 20);
    const before = countFds();
    const { error, backend } = await attack(bytes, fds, memory);
    assert.ok(error instanceof SvqError, String(error));
    assert.match(error.message, pattern);
    assert.deepEqual(backend.calls, []);
    assert.equal(countFds(), before);
  });
}

Deno.test("random bytes with random descriptors never do more than end the connection", async () => {
  using memory = createMemfd("m", 1 << 20);
  using event = createEventfd();
  const before = countFds();
  const requests = fc.integer({ min: 0, max: 46 });
  const flags = fc.constantFrom(1, 1, 1, 9, 9, 5, 0);
  const garbage = fc.record({
    request: requests,
    flags,
    size: fc.option(fc.nat(300)),
    payload: fc.uint8Array({ maxLength: 300 }),
    fds: fc.nat(3),
  });
  await fc.assert(
    fc.asyncProperty(fc.array(garbage, { maxLength: 12 }), async (messages) => {
      const [peer, stream] = rawPair();
      const ended = new BackendServer(stream, new FakeBackend({ net: true }), { offerLog: true }).run();
      await peer.send(REQUEST.SET_PROTOCOL_FEATURES, encodeU64(MAIN));
      for (const { request, flags, size, payload, fds } of messages) {
        const bytes = encodeMessage(request, flags, new Uint8Array(payload));
        if (size !== null) new DataView(bytes.buffer).setUint32(8, size, true);
        try {
          await peer.stream.send(bytes, [memory.fd, event.fd, memory.fd].slice(0, fds));
        } catch {
          break;
        }
      }
      peer.stream.close();
      const error = await ended;
      assert.ok(error === undefined || (error instanceof SvqError && error.code !== "INTERNAL"), String(error));
    }),
    { numRuns: 150, seed: 5 },
  );
  assert.equal(countFds(), before);
});
