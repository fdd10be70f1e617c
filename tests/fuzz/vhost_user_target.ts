/**
 * vhost-user messages of a hostile front-end, with descriptors of wrong kinds and counts: to the server with a device that does
 * nothing, and to the server in front of a relay with a real one, whose Worker runs on the rings that the messages set up.
 *
 * @module
 */
import { SimDevice } from "../../src/devices/sim_device.ts";
import { SvqError } from "../../src/errors.ts";
import { createEventfd, createMemfd, O, openFd, type OwnedFd, unixPair } from "../../src/ffi/mod.ts";
import { DEFAULT_RELAY_CONFIG, Relay } from "../../src/relay/relay.ts";
import { bitsOf } from "../../src/uapi/bits.ts";
import { FLAG, HEADER_SIZE, REQUEST, requestShape, VHOST_USER_F_PROTOCOL_FEATURES } from "../../src/uapi/vhost_user.ts";
import { closeFds } from "../../src/vhost_user/connection.ts";
import { encodeMessage } from "../../src/vhost_user/message.ts";
import { BackendServer } from "../../src/vhost_user/server.ts";
import type { VhostBackend } from "../../src/vhost/backend.ts";
import { splitLayout } from "../../src/vring/layout.ts";
import { FakeBackend } from "../support/fake_backend.ts";
import type { Random } from "./random.ts";
import { type FuzzSession, type FuzzTarget, type Outcome, refuseFaults, signOf, toBytes, toText } from "./target.ts";

const RAM = 1 << 20;
const GPA = 0x10_0000;
const UADDR = 0x7f00_0000_0000;
const ROUND = 40;
const REQUESTS = Object.values(REQUEST);

interface HostileMessage {
  /** Header and payload. */
  bytes: string;
  /** Numbers of descriptors in {@linkcode Descriptors}. */
  fds: number[];
}

/** Descriptors to send: what belongs there, and what does not. */
class Descriptors implements Disposable {
  readonly #owned: OwnedFd[] = [];
  readonly #stack = new DisposableStack();

  constructor() {
    const add = (fd: OwnedFd) => void this.#owned.push(this.#stack.use(fd));
    add(createMemfd("ram", RAM));
    add(createEventfd());
    add(createMemfd("log", 65536));
    add(createMemfd("short", 4096));
    add(openFd(`/proc/self/fd/${this.#owned[0]!.fd}`, O.RDONLY));
    add(openFd("/dev/null", O.RDWR));
    add(openFd("/proc/self", O.RDONLY));
    add(openFd("/dev/zero", O.RDWR));
    const [a, b] = unixPair();
    this.#stack.use(a);
    this.#stack.use(b);
    add(openFd("/proc/self/status", O.RDONLY));
    this.socket = a.fd;
    add(createMemfd("empty", 0));
  }

  readonly socket: number;

  /** Numbers to choose from: those of the list, then a socket. */
  get count(): number {
    return this.#owned.length + 1;
  }

  fd(kind: number): number {
    return this.#owned[kind % this.count]?.fd ?? this.socket;
  }

  [Symbol.dispose](): void {
    this.#stack.dispose();
  }
}

const KIND = { ram: 0, event: 1, log: 2, short: 3 };

function words(...values: (number | bigint)[]): Uint8Array<ArrayBuffer> {
  return new Uint8Array(BigUint64Array.from(values, (value) => BigInt.asUintN(64, BigInt(value))).buffer);
}

function halves(...values: number[]): Uint8Array<ArrayBuffer> {
  return new Uint8Array(Uint32Array.from(values).buffer);
}

const message = (
  request: number,
  payload: Uint8Array<ArrayBuffer> = new Uint8Array(0),
  fds: number[] = [],
  flags: number = FLAG.VERSION,
) => ({
  bytes: toText(encodeMessage(request, flags, payload)),
  fds,
});

/** Features that make the data path interesting: VERSION_1, INDIRECT_DESC, EVENT_IDX, RING_PACKED, LOG_ALL, protocol features. */
function features(random: Random): bigint {
  const bits = [28, 29, 34, 26, 33].filter(() => random.once(2));
  return bitsOf([32, ...bits]) | 1n << BigInt(VHOST_USER_F_PROTOCOL_FEATURES) | (random.once(8) ? random.u64() : 0n);
}

/** A conversation as it should be: what the rest is made of. */
function setUp(random: Random): HostileMessage[] {
  const num = random.pick([4, 16, 64, 256]);
  const list = [
    message(REQUEST.GET_FEATURES),
    message(REQUEST.GET_PROTOCOL_FEATURES),
    message(REQUEST.SET_PROTOCOL_FEATURES, words(random.once(4) ? random.u64() : bitsOf([0, 1, 3, 5, 9, 12, 13, 15, 16]))),
    message(REQUEST.SET_OWNER),
    message(REQUEST.SET_FEATURES, words(features(random))),
    message(REQUEST.SET_MEM_TABLE, new Uint8Array([...halves(1, 0), ...words(GPA, RAM, UADDR, 0)]), [KIND.ram]),
  ];
  for (let ring = 0; ring < 2; ring++) list.push(...startRing(random, ring, num));
  if (random.once(2)) list.push(message(REQUEST.SET_LOG_BASE, words(65536, 0), [KIND.log]));
  if (random.once(3)) list.push(message(REQUEST.GET_VRING_BASE, halves(random.below(2), 0)));
  return list;
}

function startRing(random: Random, ring: number, num: number): HostileMessage[] {
  const layout = splitLayout(num);
  const at = UADDR + ring * 0x1_0000;
  const flagged = random.once(6) ? 1 : 0;
  return [
    message(REQUEST.SET_VRING_NUM, halves(ring, num)),
    message(REQUEST.SET_VRING_BASE, halves(ring, random.once(3) ? random.u32() : 0)),
    message(
      REQUEST.SET_VRING_ADDR,
      new Uint8Array([...halves(ring, flagged), ...words(at, at + layout.used.offset, at + layout.avail.offset, GPA + layout.used.offset)]),
    ),
    message(REQUEST.SET_VRING_CALL, words(ring), [KIND.event]),
    message(REQUEST.SET_VRING_KICK, words(ring), [KIND.event]),
    message(REQUEST.SET_VRING_ENABLE, halves(ring, 1)),
  ];
}

/** One request with arguments that look right, more or less. */
function single(random: Random): HostileMessage {
  const request = random.once(12) ? random.below(60) : random.pick(REQUESTS);
  const shape = requestShape("front-end", request);
  const size = shape.minSize + random.below(Math.min(64, shape.maxSize - shape.minSize) + 1);
  let payload = random.once(3) ? random.bytes(size) : new Uint8Array(size);
  const view = new DataView(payload.buffer);
  for (let at = 0; at + 8 <= size; at += 8) {
    const kind = random.below(4);
    if (kind < 2) view.setBigUint64(at, kind === 0 ? BigInt(random.below(4)) : random.u64(), true);
    else if (kind === 2) view.setBigUint64(at, BigInt(random.pick([GPA, UADDR]) + random.below(RAM)), true);
  }
  if (random.once(5)) payload = random.mangle(payload);
  const fds = shape.minFds + random.below(shape.maxFds - shape.minFds + 1) + (random.once(10) ? random.below(10) : 0);
  const flags = random.once(10) ? random.below(32) : random.pick([FLAG.VERSION, FLAG.VERSION, FLAG.VERSION | FLAG.NEED_REPLY]);
  const made = message(request, payload, Array.from({ length: fds }, () => random.below(12)), flags);
  if (!random.once(25)) return made;
  return { ...made, bytes: toText(random.mangle(toBytes(made.bytes))) };
}

function generate(random: Random, pool: readonly HostileMessage[][]): HostileMessage[] {
  const list = pool.length > 0 && random.once(2) ? structuredClone(random.pick(pool)) : setUp(random);
  if (random.once(3)) list.push(...startRing(random, random.below(4), random.pick([1, 8, 32, 1024])));
  const at = () => random.below(list.length + 1);
  // Most of a conversation is right, so that it lives long; every message is attacked in some round.
  for (let times = random.below(24); times > 0 && list.length < ROUND; times--) {
    switch (random.below(8)) {
      case 0:
        list.splice(at(), random.below(3));
        break;
      case 1: {
        const victim = list[at()];
        if (victim !== undefined) victim.fds = random.once(2) ? victim.fds.map(() => random.below(12)) : [...victim.fds, random.below(12)];
        break;
      }
      case 2: {
        const victim = list[at()];
        if (victim !== undefined) {
          const bytes = toBytes(victim.bytes);
          victim.bytes = toText(new Uint8Array([...bytes.subarray(0, HEADER_SIZE), ...random.mangle(bytes.slice(HEADER_SIZE))]));
        }
        break;
      }
      case 3: {
        const copy = list[at()];
        if (copy !== undefined) list.splice(at(), 0, copy);
        break;
      }
      default:
        list.splice(random.once(3) ? at() : list.length, 0, single(random));
    }
  }
  // A payload whose length changed would only be seen as a short one; mostly the header says what is there.
  if (!random.once(4)) {
    for (const item of list) {
      const bytes = toBytes(item.bytes);
      if (bytes.length < HEADER_SIZE) continue;
      new DataView(bytes.buffer).setUint32(8, bytes.length - HEADER_SIZE, true);
      item.bytes = toText(bytes);
    }
  }
  return list;
}

/** Sends `input` to a server in front of `backend`. */
async function converse(input: HostileMessage[], descriptors: Descriptors, backend: VhostBackend): Promise<string[]> {
  const [peer, stream] = unixPair();
  using _peer = peer;
  const signs = new Set<string>();
  const server = new BackendServer(stream, backend, { offerLog: true, onError: (error) => signs.add(signOf(error)) });
  const ended = server.run();
  const drained = drain(peer);
  let handled = 0;
  try {
    for (const { bytes, fds } of input) {
      await peer.send(toBytes(bytes), fds.map((kind) => descriptors.fd(kind)));
      handled++;
    }
    peer.shutdownWriting();
  } catch {
    // It has hung up.
  }
  const error = await ended;
  await drained;
  if (error !== undefined) {
    if (!(error instanceof SvqError) || error.code === "INTERNAL") throw error;
    signs.add(signOf(error));
  }
  refuseFaults(signs);
  return [...signs, `after ${Math.floor(Math.log2(handled + 1))}`];
}

async function drain(peer: ReturnType<typeof unixPair>[0]): Promise<void> {
  const bytes = new Uint8Array(65536);
  try {
    for (;;) {
      const received = await peer.receive(bytes);
      closeFds(received.fds);
      if (received.bytes === 0) return;
    }
  } catch {
    // Closed.
  }
}

class ServerSession implements FuzzSession<HostileMessage[]> {
  readonly #descriptors = new Descriptors();
  generate = generate;

  async run(input: HostileMessage[]): Promise<Outcome> {
    const backend = new FakeBackend({ net: true });
    const signs = await converse(input, this.#descriptors, backend);
    const reached = new Set(backend.names.map((name) => `reached ${name}`));
    return { count: input.length, signs: [...signs, ...reached] };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#descriptors[Symbol.dispose]();
  }
}

class RelaySession implements FuzzSession<HostileMessage[]> {
  readonly #descriptors = new Descriptors();
  readonly #device: SimDevice;
  #rounds = 0;

  constructor(device: SimDevice) {
    this.#device = device;
  }

  generate = generate;

  async run(input: HostileMessage[]): Promise<Outcome> {
    const signs = new Set<string>();
    const mode = (["shadow", "used", "auto", "passthrough", "notify"] as const)[this.#rounds % 5]!;
    const core = this.#rounds++ % 2 === 0 ? "wasm" : "js";
    const relay = new Relay(this.#device, { ...DEFAULT_RELAY_CONFIG, mode, core, switchTimeoutMs: 50 }, {
      log: () => {},
      error: (error) => signs.add(signOf({ name: "queue", ...error })),
    });
    try {
      for (const sign of await converse(input, this.#descriptors, relay)) signs.add(sign);
    } finally {
      await relay.close();
      await this.#device.reset();
      await this.#device.setMemTable([]);
    }
    if (relay.deviceError !== undefined) throw relay.deviceError;
    refuseFaults(signs);
    return { count: input.length, signs: [...signs] };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#device.close();
    this.#descriptors[Symbol.dispose]();
  }
}

/** The server alone. */
export const VHOST_USER: FuzzTarget = {
  unit: "messages",
  full: 1_000_000,
  quick: 2000,
  open: () => Promise.resolve(new ServerSession()),
};

/** A relay behind it. */
export const VHOST_USER_RELAY: FuzzTarget = {
  unit: "messages",
  full: 1_000_000,
  quick: 400,
  open: async () => new RelaySession(await SimDevice.open({ kind: "loopback", queues: 2, packed: true })),
};
