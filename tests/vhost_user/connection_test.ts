import assert from "node:assert/strict";
import { createEventfd, isOpenFd, unixPair } from "../../src/ffi/mod.ts";
import { REQUEST } from "../../src/uapi/vhost_user.ts";
import { VhostUserConnection } from "../../src/vhost_user/connection.ts";
import { encodeMessage, encodeVringFd } from "../../src/vhost_user/message.ts";
import { encodeU64 } from "../../src/uapi/vhost.ts";
import { countFds } from "../support/fds.ts";
import { rawPair } from "../support/peer.ts";

Deno.test("a message that comes byte by byte is received whole, with its descriptor", async () => {
  const [peer, stream] = rawPair();
  using connection = new VhostUserConnection(stream, { expect: "requests" });
  using _peer = peer;
  using kick = createEventfd();
  const bytes = encodeMessage(REQUEST.SET_VRING_KICK, 1, encodeVringFd({ index: 2, hasFd: true }));
  const received = connection.receive();
  for (let i = 0; i < bytes.length; i++) {
    await peer.stream.send(bytes.subarray(i, i + 1), i === 0 ? [kick.fd] : []);
    await new Promise((resolve) => setTimeout(resolve, 0));
  }
  const message = await received;
  assert.equal(message?.request, REQUEST.SET_VRING_KICK);
  assert.equal(message.payload[0], 2);
  assert.equal(message.fds.length, 1);
  assert.ok(isOpenFd(message.fds[0]!.fd));
  message.fds[0]!.close();
});

Deno.test("messages sent at once arrive whole and in order", async () => {
  const [a, b] = unixPair();
  using sender = new VhostUserConnection(a, { expect: "replies" });
  using receiver = new VhostUserConnection(b, { expect: "requests" });
  using kick = createEventfd();
  const sent = [];
  for (let i = 0; i < 200; i++) {
    sent.push(sender.send(REQUEST.SET_FEATURES, 1, encodeU64(BigInt(i))));
    sent.push(sender.send(REQUEST.SET_VRING_KICK, 1, encodeVringFd({ index: i, hasFd: true }), [kick.fd]));
  }
  for (let i = 0; i < 200; i++) {
    assert.deepEqual((await receiver.receive())?.payload, encodeU64(BigInt(i)));
    const message = await receiver.receive();
    assert.deepEqual([message?.payload[0], message?.fds.length], [i, 1]);
    message!.fds[0]!.close();
  }
  await Promise.all(sent);
});

Deno.test("the hook sees each message once in each direction", async () => {
  const seen: unknown[] = [];
  const [a, b] = unixPair();
  using left = new VhostUserConnection(a, { expect: "replies", onMessage: (...args) => seen.push(["left", ...args]) });
  using right = new VhostUserConnection(b, { expect: "requests", onMessage: (...args) => seen.push(["right", ...args]) });
  await left.send(REQUEST.GET_FEATURES, 1);
  await right.receive();
  await right.reply(REQUEST.GET_FEATURES, encodeU64(7n));
  await left.receive();
  const none = new Uint8Array(0);
  assert.deepEqual(seen, [
    ["left", "out", 1, 1, none, 0, "front-end"],
    ["right", "in", 1, 1, none, 0, "front-end"],
    ["right", "out", 1, 5, encodeU64(7n), 0, "front-end"],
    ["left", "in", 1, 5, encodeU64(7n), 0, "front-end"],
  ]);
});

Deno.test("an end between messages is an end, within one an error", async () => {
  {
    const [peer, stream] = rawPair();
    using connection = new VhostUserConnection(stream, { expect: "requests" });
    peer.stream.close();
    assert.equal(await connection.receive(), undefined);
  }
  for (const [cut, pattern] of [[5, /within a message header/], [15, /SET_FEATURES: .* within its payload/]] as const) {
    const [peer, stream] = rawPair();
    using connection = new VhostUserConnection(stream, { expect: "requests" });
    await peer.stream.send(encodeMessage(REQUEST.SET_FEATURES, 1, encodeU64(1n)).subarray(0, cut));
    peer.stream.close();
    await assert.rejects(connection.receive(), { code: "VHOST_USER_PROTOCOL", message: pattern });
  }
});

Deno.test("descriptors in the middle of a message, and more than 8 or even 253 of them, are closed and an error", async () => {
  const before = countFds();
  {
    using kick = createEventfd();
    const bytes = encodeMessage(REQUEST.SET_FEATURES, 1, encodeU64(1n));
    for (const [count, at] of [[1, 12], [9, 0], [253, 0]] as const) {
      const [peer, stream] = rawPair();
      using connection = new VhostUserConnection(stream, { expect: "requests" });
      using _peer = peer;
      if (at > 0) await peer.stream.send(bytes.subarray(0, at));
      const received = connection.receive();
      received.catch(() => {});
      // The header is taken before the rest is sent.
      await new Promise((resolve) => setTimeout(resolve, 5));
      await peer.stream.send(bytes.subarray(at), Array.from({ length: count }, () => kick.fd));
      await assert.rejects(received, { code: "VHOST_USER_PROTOCOL", message: /file descriptors/i });
    }
  }
  assert.equal(countFds(), before);
});

Deno.test("closing a connection ends a receive that waits", async () => {
  const [peer, stream] = rawPair();
  using _peer = peer;
  const connection = new VhostUserConnection(stream, { expect: "requests" });
  const received = connection.receive();
  connection.close();
  await assert.rejects(received, { code: "CLOSED" });
});

Deno.test("sending to a peer that is gone is reported as a lost connection", async () => {
  const [peer, stream] = rawPair();
  using connection = new VhostUserConnection(stream, { expect: "requests" });
  peer.stream.close();
  await assert.rejects(connection.reply(REQUEST.GET_FEATURES, encodeU64(0n)), { code: "VHOST_USER_DISCONNECTED" });
});
