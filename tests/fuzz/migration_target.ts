/**
 * A hostile source of a migration: frames to the parts that read them, and now and then, up to the loading of a driver's
 * state, to a whole destination with a device.
 *
 * @module
 */
import { DirtyBitmap } from "../../src/dirty/bitmap.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { RamLayout } from "../../src/drivers/layout.ts";
import { checkDriverState, decodeDriverState, encodeDriverState } from "../../src/drivers/state.ts";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { SvqError } from "../../src/errors.ts";
import { connectUnix, createMemfd, mapFd, unixPair, type UnixStream } from "../../src/ffi/mod.ts";
import { Channel } from "../../src/migration/channel.ts";
import { checksumBytes, digestText, foldDigest, newDigest } from "../../src/migration/digest.ts";
import { hexText, welcome } from "../../src/migration/handshake.ts";
import { decodeOffer, encodeOffer, type Offer } from "../../src/migration/offer.ts";
import { PageMap, PageReceiver } from "../../src/migration/pages.ts";
import {
  decodeRound,
  encodeHello,
  encodeRange,
  encodeRound,
  FRAME,
  FRAME_HEADER_BYTES,
  MAX_JSON,
  PAGE_BYTES,
  SESSION_BYTES,
  violation,
} from "../../src/migration/protocol.ts";
import { Hosts } from "../support/migration.ts";
import type { Random } from "./random.ts";
import { type FuzzSession, type FuzzTarget, type Outcome, refuseFaults, signOf, toBytes, toText } from "./target.ts";

const RAM = { ramSize: 1 << 20, queues: 1, num: 16, depth: 4, packed: false };
const FRAMES = Object.values(FRAME);
const EMPTY = foldDigest(newDigest());
const SESSION = "5e5510";

interface Frame {
  type: number;
  payload: string;
  /** Instead of what would be right. */
  number?: number;
  length?: number;
  checksum?: number;
}

interface Input {
  /** To a destination with a device. */
  whole: boolean;
  frames: Frame[];
}

const encoder = new TextEncoder();
const frame = (type: number, payload: Uint8Array<ArrayBuffer> = new Uint8Array(0)): Frame => ({ type, payload: toText(payload) });
const json = (type: number, value: unknown) => frame(type, encoder.encode(JSON.stringify(value)));
const round = (number: number, pages: number, frozen: boolean, disk = false, checksum = EMPTY) =>
  encodeRound({ round: number, frozen, disk, pages, checksum });

function offer(): Record<string, unknown> {
  const document: Offer = {
    session: SESSION,
    features: 1n << 32n,
    ram: RAM,
    regions: new RamLayout(RAM).regions(-1).map(({ gpa, size }) => ({ gpa, size })),
    workload: { kind: "loopback", options: { seed: 1 } },
    disk: null,
    verify: true,
    follow: false,
    dryRun: false,
  };
  return structuredClone(encodeOffer(document));
}

const VALUES = [null, true, 0, -1, 1, 1.5, 2 ** 31, 2 ** 32, 2 ** 40, 2 ** 53, 1e308, "", "0x", "0xffffffffffffffffffff", [], {}, [[]], [
  null,
], "x"];

/** Replaces, removes or adds something somewhere in a JSON value. */
function spoil(random: Random, value: unknown): unknown {
  if (typeof value !== "object" || value === null || random.once(6)) {
    return random.once(3) && typeof value === "number" ? value + random.pick([1, -1, 256, 2 ** 16]) : random.pick(VALUES);
  }
  const keys = Object.keys(value);
  if (keys.length === 0) return Array.isArray(value) ? [random.pick(VALUES)] : { x: random.pick(VALUES) };
  const target = value as Record<string, unknown>;
  const key = random.pick(keys);
  if (random.once(8)) {
    if (Array.isArray(value)) value.splice(Number(key), random.below(2), random.pick(VALUES));
    else delete target[key];
  } else {
    target[key] = spoil(random, target[key]);
  }
  return value;
}

function range(page: number, count: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(16);
  encodeRange(new DataView(bytes.buffer), 0, { page, count });
  return bytes;
}

function pages(random: Random): Frame {
  const count = 1 + random.below(3);
  const content = random.bytes(16);
  const bytes = new Uint8Array(16 + count * PAGE_BYTES);
  bytes.set(range(random.once(4) ? Number(random.u64() >> 20n) : 256 + random.below(130), count));
  bytes.set(content, 16);
  const made = frame(FRAME.PAGES, random.once(10) ? random.mangle(bytes) : bytes);
  // Of the pages alone, without the run's head.
  const digest = newDigest();
  return { ...made, checksum: random.once(4) ? random.u32() | 0 : foldDigest(digest) };
}

function any(random: Random): Frame {
  switch (random.below(7)) {
    case 0:
      return pages(random);
    case 1:
      return frame(
        FRAME.ZERO,
        random.once(3)
          ? random.bytes(random.below(64))
          : range(random.once(3) ? random.u32() : 256 + random.below(128), random.once(3) ? random.u32() : 1),
      );
    case 2:
      return frame(
        FRAME.ROUND,
        round(1 + random.below(3), random.once(3) ? random.u32() : random.below(256), random.once(2), random.once(8)),
      );
    case 3:
      return frame(FRAME.ROUND_END, round(1 + random.below(3), random.below(4), random.once(2)));
    case 4:
      return json(FRAME.ERROR, spoil(random, { code: "X", message: "y", hint: "z" }));
    default:
      return frame(random.once(8) ? random.u32() : random.pick(FRAMES), random.bytes(random.below(48)));
  }
}

class Session implements FuzzSession<Input> {
  readonly #hosts: Hosts;
  readonly #state: { text: string; table: string };

  constructor(hosts: Hosts, state: { text: string; table: string }) {
    this.#hosts = hosts;
    this.#state = state;
  }

  generate = (random: Random, pool: readonly Input[]): Input => {
    // A whole destination costs a tenth of a second.
    if (random.once(400)) return { whole: true, frames: this.#conversation(random, true) };
    if (pool.length > 0 && random.once(3)) return this.#vary(random, structuredClone(random.pick(pool)));
    return this.#vary(random, { whole: false, frames: this.#conversation(random, random.once(4)) });
  };

  #conversation(random: Random, spoilt: boolean): Frame[] {
    const document = offer();
    const state = JSON.parse(this.#state.text);
    const changed = spoilt && random.once(3) ? spoil(random, document) : document;
    for (let times = spoilt ? 1 + random.below(3) : 0; times > 0; times--) spoil(random, state);
    const text = encoder.encode(JSON.stringify(state));
    const bytes = new Uint8Array([...new Uint8Array(Uint32Array.of(text.length).buffer), ...text, ...toBytes(this.#state.table)]);
    return [
      frame(FRAME.HELLO, encodeHello({ version: 1, versionMin: 1, session: new Uint8Array(SESSION_BYTES) })),
      json(FRAME.OFFER, changed),
      frame(FRAME.ROUND, round(1, 0, true)),
      frame(FRAME.ROUND_END, round(1, 0, true)),
      frame(FRAME.STATE, bytes),
      frame(FRAME.COMMIT, new Uint8Array(SESSION_BYTES)),
    ];
  }

  #vary(random: Random, input: Input): Input {
    const { frames } = input;
    for (let times = random.below(5); times > 0; times--) {
      const at = random.below(frames.length + 1);
      const victim = frames[at];
      switch (random.below(6)) {
        case 0:
          frames.splice(at, random.below(2));
          break;
        case 1:
          if (victim !== undefined) victim.payload = toText(random.mangle(toBytes(victim.payload)));
          break;
        case 2:
          if (victim !== undefined) Object.assign(victim, { [random.pick(["number", "length", "checksum", "type"])]: random.u32() });
          break;
        default:
          frames.splice(Math.max(1, at), 0, any(random));
      }
    }
    return { ...input, frames: frames.slice(0, 40) };
  }

  async run({ whole, frames }: Input): Promise<Outcome> {
    const signs = new Set<string>();
    if (whole) await this.#whole(frames, signs);
    else await this.#parts(frames, signs);
    refuseFaults(signs);
    return { count: frames.length, signs: [...signs] };
  }

  async #parts(frames: readonly Frame[], signs: Set<string>): Promise<void> {
    const [ours, theirs] = unixPair();
    const served = serve(theirs, signs);
    try {
      await speak(ours, frames, signs);
    } finally {
      ours.close();
      await served;
    }
  }

  async #whole(frames: readonly Frame[], signs: Set<string>): Promise<void> {
    const { destination, path } = this.#hosts.destination();
    try {
      using stream = connectUnix(path);
      await speak(stream, frames, signs);
    } finally {
      const arrived = destination.arrived().catch(() => undefined);
      await destination.close();
      await (await arrived)?.close();
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#hosts[Symbol.asyncDispose]();
  }
}

/** Says `frames`, with the session that the other side made up, and reads what comes until it ends. */
async function speak(stream: UnixStream, frames: readonly Frame[], signs: Set<string>): Promise<void> {
  let session = "";
  const received: number[] = [];
  const listen = async () => {
    const parts: number[] = [];
    const bytes = new Uint8Array(65536);
    try {
      for (;;) {
        const { bytes: count } = await stream.receive(bytes);
        if (count === 0) return;
        for (const byte of bytes.subarray(0, count)) parts.push(byte);
        while (parts.length >= FRAME_HEADER_BYTES) {
          const view = new DataView(Uint8Array.from(parts.slice(0, FRAME_HEADER_BYTES)).buffer);
          const length = view.getUint32(8, true);
          if (parts.length < FRAME_HEADER_BYTES + length) break;
          const [type, payload] = [
            view.getUint32(0, true),
            Uint8Array.from(parts.splice(0, FRAME_HEADER_BYTES + length)).slice(FRAME_HEADER_BYTES),
          ];
          received.push(type);
          if (type === FRAME.HELLO) session = hexText(payload.slice(payload.length - SESSION_BYTES));
          if (type === FRAME.ERROR) {
            const { code, message } = JSON.parse(new TextDecoder().decode(payload));
            signs.add(signOf({ name: "refused", code, message }));
          }
        }
      }
    } catch {
      // Closed.
    }
  };
  const listening = listen();
  let sent = 0;
  try {
    for (const { type, payload, number, length, checksum } of frames) {
      // What follows HELLO names the session of the answer.
      for (let waited = 0; sent === 1 && session === "" && waited < 50 && !stream.closed; waited++) {
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
      let bytes = toBytes(payload);
      if (type === FRAME.OFFER) bytes = encoder.encode(new TextDecoder().decode(bytes).replace(SESSION, session));
      if (type === FRAME.COMMIT && bytes.every((byte) => byte === 0)) {
        bytes = Uint8Array.fromHex(session || "00") as Uint8Array<ArrayBuffer>;
      }
      const head = new Uint8Array(FRAME_HEADER_BYTES);
      const view = new DataView(head.buffer);
      view.setUint32(0, type, true);
      view.setUint32(4, number ?? sent, true);
      view.setUint32(8, length ?? bytes.length, true);
      view.setInt32(12, checksum ?? (type === FRAME.PAGES ? pageChecksum(bytes) : checksumBytes(bytes)), true);
      sent++;
      await stream.send(new Uint8Array([...head, ...bytes]));
    }
    stream.shutdownWriting();
  } catch {
    // It has hung up.
  }
  await listening;
  signs.add(`answers ${received.join(" ")}`);
}

function pageChecksum(bytes: Uint8Array): number {
  return checksumBytes(bytes.subarray(16));
}

/** What a destination does with a stream, without a device. */
async function serve(stream: UnixStream, signs: Set<string>): Promise<void> {
  using channel = new Channel(stream, 5000);
  try {
    const session = await welcome(channel);
    const offer = decodeOffer(await channel.readJson(await channel.receiveHead([FRAME.OFFER])), session);
    if (offer.ram.ramSize > RAM.ramSize) throw new SvqError("NO_MEMORY", "The guest is too large");
    const regions = new RamLayout(offer.ram).regions(-1);
    using fd = createMemfd("fuzz-ram", offer.ram.ramSize);
    using memory = mapFd(fd.fd, { length: offer.ram.ramSize });
    const map = new PageMap(regions.map(({ gpa, size, uaddr, fdOffset }) => ({ gpa, size, uaddr, address: memory.address + fdOffset })));
    const touched = DirtyBitmap.covering(map.endGpa);
    const receiver = new PageReceiver(channel, map, touched);
    await channel.sendJson(FRAME.ACCEPT, {});
    for (;;) {
      const head = await channel.receiveHead([FRAME.ROUND, FRAME.STATE]);
      if (head.type === FRAME.ROUND) {
        const mark = decodeRound(await channel.readPayload(head, 24));
        if (mark.disk) throw violation("a round of the disk comes that was not agreed on");
        await receiver.receive(mark);
        continue;
      }
      if (!receiver.frozen) throw violation("STATE came before the last round");
      checkDriverState(decodeDriverState(await channel.readPayload(head, MAX_JSON)));
      digestText(await map.digest(touched));
      break;
    }
    await channel.receive(FRAME.COMMIT, SESSION_BYTES);
    await channel.send(FRAME.RUNNING);
    signs.add("runs");
  } catch (error) {
    signs.add(signOf(error));
    if (!(error instanceof SvqError) || error.code === "INTERNAL") throw error;
    await channel.farewell(error);
  }
}

/** The state of a driver with requests in flight, as it travels. */
async function sampleState(): Promise<{ text: string; table: string }> {
  await using device = await SimDevice.open({ kind: "loopback", queues: 1 });
  await using driver = await EmbeddedDriver.open(device, { workload: "loopback", ...RAM });
  driver.run({}).catch(() => {});
  await driver.pause();
  await driver.stopRings();
  const bytes = encodeDriverState(await driver.exportState());
  const length = new DataView(bytes.buffer).getUint32(0, true);
  return { text: new TextDecoder().decode(bytes.subarray(4, 4 + length)), table: toText(bytes.slice(4 + length)) };
}

/** Frames of a source. */
export const MIGRATION: FuzzTarget = {
  unit: "messages",
  full: 1_000_000,
  quick: 600,
  open: async () => {
    const openDestination = () => SimDevice.open({ kind: "loopback", queues: 1 });
    return new Session(new Hosts({ openDestination, destination: { timeoutMs: 2000 } }), await sampleState());
  },
};
