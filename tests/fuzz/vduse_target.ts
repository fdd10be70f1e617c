/**
 * Messages of a kernel that has gone mad, to the codec and the session of a VDUSE device.
 *
 * @module
 */
import { SimDevice } from "../../src/devices/sim_device.ts";
import { VduseSession } from "../../src/devices/vduse_session.ts";
import { SvqError } from "../../src/errors.ts";
import { createMemfd } from "../../src/ffi/mod.ts";
import { decodeVduseRequest, VDUSE_MESSAGE_BYTES, VDUSE_REQUEST } from "../../src/uapi/vduse.ts";
import { splitLayout } from "../../src/vring/layout.ts";
import type { Random } from "./random.ts";
import { type FuzzSession, type FuzzTarget, type Outcome, refuseFaults, signOf, toBytes, toText } from "./target.ts";

const REQUESTS = Object.values(VDUSE_REQUEST);
const STATUS = [0, 1, 3, 0xb, 0xf, 0x4f, 0x8f];
const RAM = 1 << 20;
const QUEUES = 4;

interface Input {
  messages: string[];
  /** What the kernel says of features and rings when it is asked, in turn. */
  features: string;
  rings: { num: number; desc: number; avail: number; used: number; base: number; ready: boolean }[];
}

function requests(random: Random): string {
  const bytes = new Uint8Array(VDUSE_MESSAGE_BYTES);
  const view = new DataView(bytes.buffer);
  const type = random.once(10) ? random.u32() : random.pick(REQUESTS);
  view.setUint32(0, type, true);
  view.setUint32(4, random.u32(), true);
  for (let at = 24; at < 56; at += 4) view.setUint32(at, random.once(4) ? random.u32() : random.below(5), true);
  if (type === VDUSE_REQUEST.SET_STATUS) view.setUint8(24, random.once(5) ? random.word() & 0xff : random.pick(STATUS));
  return toText(random.once(12) ? random.mangle(bytes) : bytes);
}

function rings(random: Random): Input["rings"] {
  return Array.from({ length: QUEUES }, (_, queue) => {
    const num = random.once(6) ? Number(random.u64() & 0x1_ffffn) : 2 ** random.below(9);
    const layout = splitLayout(256);
    const at = (offset: number) => random.once(10) ? Number(random.u64() >> 12n) : queue * 0x1_0000 + offset;
    const base = random.once(4) ? random.u32() : 0;
    return { num, desc: at(0), avail: at(layout.avail.offset), used: at(layout.used.offset), base, ready: !random.once(4) };
  });
}

function generate(random: Random, pool: readonly Input[]): Input {
  if (pool.length > 0 && random.once(2)) {
    const input = structuredClone(random.pick(pool));
    const at = random.below(input.messages.length + 1);
    input.messages.splice(at, random.below(2), requests(random));
    if (random.once(3)) input.rings = rings(random);
    return { ...input, messages: input.messages.slice(0, 40) };
  }
  const messages = Array.from({ length: 8 + random.below(24) }, () => requests(random));
  const features = random.once(3) ? random.u64() : 1n << 32n | 1n << 33n | (random.once(2) ? 1n << 34n : 0n);
  return { messages, features: features.toString(), rings: rings(random) };
}

class Session implements FuzzSession<Input> {
  readonly #device: SimDevice;
  generate = generate;

  constructor(device: SimDevice) {
    this.#device = device;
  }

  async run({ messages, features, rings }: Input): Promise<Outcome> {
    const signs = new Set<string>();
    const kernel = {
      features: () => BigInt(features),
      vqInfo: (index: number) => {
        const { num, desc, avail, used, base, ready } = rings[index] ?? rings[0]!;
        return { num, base, ready, addresses: { desc, avail, used } };
      },
      setKick: () => {},
    };
    const session = new VduseSession(this.#device, kernel, { info: () => {}, warn: (_, error) => signs.add(signOf(error)) });
    for (const text of messages) {
      try {
        const request = decodeVduseRequest(toBytes(text));
        const answer = await session.answer(request);
        if (answer.length !== VDUSE_MESSAGE_BYTES) throw new Error(`An answer of ${answer.length} bytes`);
        signs.add(`type ${request.type} ${answer[4]} with ${session.running.length}`);
      } catch (error) {
        if (!(error instanceof SvqError)) throw error;
        signs.add(signOf(error));
      }
    }
    await session.stop();
    if (session.running.length > 0) throw new Error("A queue runs after the end");
    refuseFaults(signs);
    return { count: messages.length, signs: [...signs] };
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#device.close();
  }
}

/** The session with an embedded device that has memory. */
export const VDUSE_MESSAGES: FuzzTarget = {
  unit: "messages",
  full: 1_000_000,
  quick: 1000,
  open: async () => {
    const device = await SimDevice.open({ kind: "loopback", queues: QUEUES, packed: true });
    using ram = createMemfd("vduse-ram", RAM);
    await device.setMemTable([{ gpa: 0, size: RAM, uaddr: 0, fd: ram.fd, fdOffset: 0 }]);
    // What the device has instead of the kernel's table here: it never changes.
    const session = new Proxy(device, {
      get: (target, key) => {
        if (key === "iotlbChanged") return () => Promise.resolve();
        const value = Reflect.get(target, key, target);
        return typeof value === "function" ? value.bind(target) : value;
      },
    });
    return new Session(session);
  },
};
