// Conversations recorded between real QEMUs and real storage daemons (tests/lab/record_golden.ts).
import assert from "node:assert/strict";
import { createEventfd, createMemfd, unixPair } from "../../src/ffi/mod.ts";
import { bit } from "../../src/uapi/bits.ts";
import { decodeU64, decodeVringAddr, decodeVringState, encodeVringAddr } from "../../src/uapi/vhost.ts";
import { FLAG, REQUEST, requestName } from "../../src/uapi/vhost_user.ts";
import type { BackendInfo } from "../../src/vhost/backend.ts";
import { VhostUserFrontEnd } from "../../src/vhost_user/front_end.ts";
import { checkHeader, decodeConfig, encodeLog, encodeMessage } from "../../src/vhost_user/message.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";
import { FakeBackend } from "../support/fake_backend.ts";
import { type GoldenMessage, readGolden, toHex } from "../support/golden.ts";
import { rawPair, type RawPeer } from "../support/peer.ts";

const GUEST_MEMORY = 256 << 20;
const MEMORY_MESSAGES = new Set<number>([REQUEST.ADD_MEM_REG, REQUEST.SET_LOG_BASE]);

function answers(golden: readonly GoldenMessage[], request: number): Uint8Array<ArrayBuffer>[] {
  return golden.filter((message) => message.from === "backend" && message.request === request).map(({ payload }) => payload);
}

function number(golden: readonly GoldenMessage[], request: number): bigint {
  return decodeU64(answers(golden, request)[0]!);
}

class RecordedBackend extends FakeBackend {
  readonly #recorded: number[];

  constructor(golden: readonly GoldenMessage[], info: Partial<BackendInfo>) {
    super(info);
    this.#recorded = answers(golden, REQUEST.GET_VRING_BASE).map((payload) => decodeVringState(payload).num);
  }

  override getVringBase(): Promise<number> {
    return Promise.resolve(this.#recorded.shift()!);
  }
}

/** What the storage daemon was, as far as its answers tell. */
function recordedBackend(golden: readonly GoldenMessage[]): FakeBackend {
  const backend = new RecordedBackend(golden, {
    queueNum: Number(number(golden, REQUEST.GET_QUEUE_NUM)),
    maxMemSlots: Number(number(golden, REQUEST.GET_MAX_MEM_SLOTS)),
  });
  backend.features = number(golden, REQUEST.GET_FEATURES) & ~bit(30);
  backend.config = decodeConfig(answers(golden, REQUEST.GET_CONFIG)[0]!).bytes;
  return backend;
}

/** Sends what QEMU sent, and waits for an answer wherever the storage daemon gave one. */
async function replay(
  peer: RawPeer,
  golden: readonly GoldenMessage[],
  onAnswer: (answer: { request: number; flags: number; payload: Uint8Array<ArrayBuffer> }, recorded: GoldenMessage) => void,
): Promise<void> {
  using memory = createMemfd("guest", GUEST_MEMORY);
  using event = createEventfd();
  const [channel, remote] = unixPair();
  for (const message of golden) {
    if (message.from === "backend") {
      onAnswer(await peer.read(), message);
      continue;
    }
    const fd = MEMORY_MESSAGES.has(message.request) ? memory.fd : message.request === REQUEST.SET_BACKEND_REQ_FD ? remote.fd : event.fd;
    await peer.send(message.request, message.payload, Array.from({ length: message.fds }, () => fd), message.flags);
  }
  channel.close();
  remote.close();
}

for (const name of ["qemu_7.2_blk", "qemu_10_blk"]) {
  const golden = readGolden(name);
  for (const side of ["source", "destination"] as const) {
    const messages = golden[side];

    Deno.test(`every message of ${name} at the ${side} passes the checks`, () => {
      for (const { from, request, flags, payload, fds } of messages) {
        checkHeader({ request, flags, size: payload.length }, fds, "front-end", from === "frontend" ? "requests" : "replies");
      }
    });

    Deno.test(`the server answers ${name} at the ${side} byte for byte as the storage daemon did`, async () => {
      const backend = recordedBackend(messages);
      const [peer, stream] = rawPair();
      const errors: Error[] = [];
      const server = new BackendServer(stream, backend, {
        protocolFeatures: number(messages, REQUEST.GET_PROTOCOL_FEATURES),
        offerLog: true,
        onError: (error) => errors.push(error),
      });
      const ended = server.run();
      let log = new Uint8Array(0);
      for (const { request, payload } of messages) if (request === REQUEST.SET_LOG_BASE && payload.length === 16) log = payload;
      await replay(peer, messages, ({ request, flags, payload }, recorded) => {
        // The daemon answers the log with 8 bytes, svq with the request's 16, which all front-ends accept.
        const expected = request === REQUEST.SET_LOG_BASE ? log : recorded.payload;
        assert.equal(
          toHex(encodeMessage(request, flags, payload)),
          toHex(encodeMessage(recorded.request, recorded.flags, expected)),
          requestName("front-end", recorded.request),
        );
      });
      peer.stream.close();
      assert.equal(await ended, undefined);
      assert.deepEqual(errors, []);
    });

    Deno.test(`server and front-end together pass ${name} at the ${side} on to the device unchanged`, async () => {
      const [devicePeer, deviceStream] = rawPair();
      const seen: [string, string][] = [];
      const stock = new Map<number, Uint8Array<ArrayBuffer>[]>();
      const device = (async () => {
        for (let message = await devicePeer.tryRead(); message !== undefined; message = await devicePeer.tryRead()) {
          const { request, payload, flags } = message;
          seen.push([requestName("front-end", request), toHex(payload)]);
          if (!stock.has(request)) stock.set(request, answers(messages, request));
          const left = stock.get(request)!;
          const own = left.length > 1 ? left.shift() : left[0];
          // Acks are asked for more often than QEMU did; recorded answers to such requests are all 0.
          if ((flags & FLAG.NEED_REPLY) !== 0) await devicePeer.reply(request, 0n);
          else if (own !== undefined) await devicePeer.reply(request, own);
        }
      })();
      const frontEnd = await VhostUserFrontEnd.fromStream(deviceStream, { timeoutMs: 5000 });
      const handshake = seen.length;
      const [peer, stream] = rawPair();
      const ended = new BackendServer(stream, frontEnd, {
        protocolFeatures: number(messages, REQUEST.GET_PROTOCOL_FEATURES),
        offerLog: true,
      }).run();
      await replay(peer, messages, ({ request }, recorded) => assert.equal(request, recorded.request));
      peer.stream.close();
      assert.equal(await ended, undefined);
      await frontEnd.close();
      await device;
      devicePeer.stream.close();
      // The server answers these by itself.
      const own = new Set(["GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES", "GET_QUEUE_NUM", "GET_MAX_MEM_SLOTS"]);
      for (const name of ["SET_BACKEND_REQ_FD", "SET_OWNER"]) own.add(name);
      const expected = messages.filter(({ from }) => from === "frontend").map(({ request, payload }) => {
        // Without the log flag its address means nothing and is not passed on.
        const bytes = request === REQUEST.SET_VRING_ADDR ? encodeVringAddr(decodeVringAddr(payload)) : payload;
        return [requestName("front-end", request), toHex(bytes)];
      }).filter(([name]) => !own.has(name!));
      assert.deepEqual(seen.slice(handshake), expected);
    });
  }
}

Deno.test("the recordings hold a migration", () => {
  const { source } = readGolden("qemu_10_blk");
  const log = source.find(({ request }) => request === REQUEST.SET_LOG_BASE);
  assert.deepEqual(log?.payload, encodeLog({ size: GUEST_MEMORY / 4096 / 8, offset: 0 }));
});
