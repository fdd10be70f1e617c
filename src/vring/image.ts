/**
 * Images of rings: JSON that describes itself, made by a relay's dump and kept by `svq vring dump --save`.
 *
 * An image is one object with `schema` = `svq.vring-image/1`, `created` (ISO 8601), `relay` and `device` where known, and
 * `queues`. Each of these has `index`, `side` (`guest`: the guest's ring; `shadow`: the relay's ring at the device), `mode`,
 * and either `error` (code, message) or `ring`:
 *
 * - `layout`, `num`, `event_idx`, `indirect`, `in_order`, `max_chain` (optional): what was negotiated;
 * - `consistent`, `attempts`: whether the copy is torn, and how many were made;
 * - `addresses` {desc, avail, used}, optional: where the parts lay, `0x…`;
 * - `positions` {last_avail, used, last_used}: indices (packed: slot | wrap<<15), null where not known;
 * - `memory` [{address, size}], optional: the memory in which buffers must lie;
 * - `desc`, `avail`, `used`: the memory of the parts, base64;
 * - `tables` [{address, data}]: indirect tables of outstanding chains, base64.
 *
 * `seen` [{head, position, ms}] tells for how long outstanding chains have been seen, at least.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import type { MemoryRange, RingPositions, RingSnapshot } from "./snapshot.ts";

/** Name and version of the format. Keys are only added within a version. */
export const IMAGE_SCHEMA = "svq.vring-image/1";

/** Whose ring it is: the guest's, or the relay's own at the device. */
export type RingSide = "guest" | "shadow";

/** How long an outstanding chain has been seen. */
export interface SeenChain {
  /** Split: head; packed: buffer id. */
  head: number;
  /** Split: avail position; packed: slot | wrap<<15. */
  position: number;
  /** Since it was first seen; null: this is the first time. */
  ms: number | null;
}

/** One ring of an image. */
export interface ImageQueue {
  /** Which queue. */
  index: number;
  /** Whose ring. */
  side: RingSide;
  /** Relay mode of the queue. */
  mode: string;
  /** The copy; absent where there is an error. */
  ring?: RingSnapshot;
  /** Why it could not be copied. */
  error?: { code: string; message: string };
  /** Ages of outstanding chains. */
  seen: SeenChain[];
}

/** Rings of one relay or device at one time. */
export interface VringImage {
  /** ISO 8601. */
  created: string;
  /** Name of the relay. */
  relay?: string;
  /** The device's address. */
  device?: string;
  /** By index, guest side first. */
  queues: ImageQueue[];
}

function hex(value: number): string {
  return `0x${value.toString(16)}`;
}

function encodeRing(ring: RingSnapshot): Record<string, unknown> {
  const { addresses, memory } = ring;
  return {
    layout: ring.layout,
    num: ring.num,
    event_idx: ring.eventIdx,
    indirect: ring.indirect,
    in_order: ring.inOrder,
    ...(ring.maxChain === undefined ? {} : { max_chain: ring.maxChain }),
    consistent: ring.consistent,
    attempts: ring.attempts,
    ...(addresses === undefined
      ? {}
      : { addresses: { desc: hex(addresses.desc), avail: hex(addresses.avail), used: hex(addresses.used) } }),
    positions: { last_avail: ring.positions.lastAvail, used: ring.positions.used, last_used: ring.positions.lastUsed },
    ...(memory === undefined ? {} : { memory: memory.map(({ address, size }) => ({ address: hex(address), size: hex(size) })) }),
    desc: ring.desc.toBase64(),
    avail: ring.avail.toBase64(),
    used: ring.used.toBase64(),
    tables: ring.tables.map(({ address, bytes }) => ({ address: hex(address), data: bytes.toBase64() })),
  };
}

/** The image as plain data for JSON. */
export function encodeImage(image: VringImage): Record<string, unknown> {
  return {
    schema: IMAGE_SCHEMA,
    created: image.created,
    ...(image.relay === undefined ? {} : { relay: image.relay }),
    ...(image.device === undefined ? {} : { device: image.device }),
    queues: image.queues.map(({ index, side, mode, ring, error, seen }) => ({
      index,
      side,
      mode,
      ...(error === undefined ? {} : { error }),
      ...(ring === undefined ? {} : { ring: encodeRing(ring) }),
      seen,
    })),
  };
}

/** Checks what comes from a file or a socket; every message says where. */
class Reader {
  constructor(readonly source: string) {}

  fail(path: string, what: string): never {
    throw new SvqError("BAD_IMAGE", `${this.source} is no ring image: ${path} ${what}`, {
      hint: "images are written by svq vring dump --save",
    });
  }

  object(value: unknown, path: string): Record<string, unknown> {
    if (typeof value !== "object" || value === null || Array.isArray(value)) this.fail(path, "is no object");
    return value as Record<string, unknown>;
  }

  list(value: unknown, path: string): unknown[] {
    if (!Array.isArray(value)) this.fail(path, "is no list");
    return value;
  }

  text(value: unknown, path: string): string {
    if (typeof value !== "string") this.fail(path, "is no text");
    return value;
  }

  choice<T extends string>(value: unknown, values: readonly T[], path: string): T {
    if (!values.includes(value as T)) this.fail(path, `is not one of ${values.join(", ")}`);
    return value as T;
  }

  flag(value: unknown, path: string): boolean {
    if (typeof value !== "boolean") this.fail(path, "is neither true nor false");
    return value;
  }

  integer(value: unknown, max: number, path: string): number {
    if (!(typeof value === "number" && Number.isInteger(value) && value >= 0 && value <= max)) {
      this.fail(path, `is no integer from 0 to ${max}`);
    }
    return value;
  }

  address(value: unknown, path: string): number {
    const text = this.text(value, path);
    const number = /^0x[0-9a-fA-F]{1,16}$/.test(text) ? Number(text) : NaN;
    if (!Number.isFinite(number)) this.fail(path, "is no address 0x…");
    return number;
  }

  bytes(value: unknown, path: string): Uint8Array<ArrayBuffer> {
    try {
      return Uint8Array.fromBase64(this.text(value, path));
    } catch (error) {
      if (error instanceof SvqError) throw error;
      this.fail(path, "is no base64");
    }
  }
}

function decodeRing(read: Reader, value: unknown, at: string): RingSnapshot {
  const ring = read.object(value, at);
  const positions = read.object(ring.positions, `${at}.positions`);
  const position = (name: string) => {
    const given = positions[name] ?? null;
    return given === null ? null : read.integer(given, 0xffff, `${at}.positions.${name}`);
  };
  const known: RingPositions = { lastAvail: position("last_avail"), used: position("used"), lastUsed: position("last_used") };
  const places = ring.addresses === undefined ? undefined : read.object(ring.addresses, `${at}.addresses`);
  const place = (name: string) => read.address(places![name], `${at}.addresses.${name}`);
  const memory = ring.memory === undefined ? undefined : read.list(ring.memory, `${at}.memory`).map((entry, i): MemoryRange => {
    const path = `${at}.memory[${i}]`;
    const range = read.object(entry, path);
    return { address: read.address(range.address, `${path}.address`), size: read.address(range.size, `${path}.size`) };
  });
  return {
    layout: read.choice(ring.layout, ["split", "packed"], `${at}.layout`),
    num: read.integer(ring.num, 2 ** 32, `${at}.num`),
    eventIdx: read.flag(ring.event_idx, `${at}.event_idx`),
    indirect: read.flag(ring.indirect, `${at}.indirect`),
    inOrder: read.flag(ring.in_order, `${at}.in_order`),
    ...(ring.max_chain === undefined ? {} : { maxChain: read.integer(ring.max_chain, 2 ** 32, `${at}.max_chain`) }),
    consistent: read.flag(ring.consistent, `${at}.consistent`),
    attempts: read.integer(ring.attempts, 2 ** 32, `${at}.attempts`),
    ...(places === undefined ? {} : { addresses: { desc: place("desc"), avail: place("avail"), used: place("used") } }),
    positions: known,
    ...(memory === undefined ? {} : { memory: memory.sort((a, b) => a.address - b.address) }),
    desc: read.bytes(ring.desc, `${at}.desc`),
    avail: read.bytes(ring.avail, `${at}.avail`),
    used: read.bytes(ring.used, `${at}.used`),
    tables: read.list(ring.tables, `${at}.tables`).map((entry, i) => {
      const path = `${at}.tables[${i}]`;
      const table = read.object(entry, path);
      return { address: read.address(table.address, `${path}.address`), bytes: read.bytes(table.data, `${path}.data`) };
    }),
  };
}

function decodeQueue(read: Reader, value: unknown, at: string): ImageQueue {
  const queue = read.object(value, at);
  const seen = read.list(queue.seen ?? [], `${at}.seen`).map((entry, i): SeenChain => {
    const path = `${at}.seen[${i}]`;
    const chain = read.object(entry, path);
    const ms = chain.ms ?? null;
    return {
      head: read.integer(chain.head, 0xffff, `${path}.head`),
      position: read.integer(chain.position, 0xffff, `${path}.position`),
      ms: ms === null ? null : read.integer(ms, 2 ** 52, `${path}.ms`),
    };
  });
  const error = queue.error === undefined ? undefined : read.object(queue.error, `${at}.error`);
  if (error === undefined && queue.ring === undefined) read.fail(at, "has neither a ring nor an error");
  return {
    index: read.integer(queue.index, 0xffff, `${at}.index`),
    side: read.choice(queue.side, ["guest", "shadow"], `${at}.side`),
    mode: read.text(queue.mode, `${at}.mode`),
    ...(error === undefined
      ? { ring: decodeRing(read, queue.ring, `${at}.ring`) }
      : { error: { code: read.text(error.code, `${at}.error.code`), message: read.text(error.message, `${at}.error.message`) } }),
    seen,
  };
}

/**
 * Checks and decodes an image.
 *
 * @param value parsed JSON
 * @param source file or relay, for messages
 * @throws SvqError BAD_IMAGE with the place
 */
export function decodeImage(value: unknown, source: string): VringImage {
  const read = new Reader(source);
  const image = read.object(value, "$");
  if (image.schema !== IMAGE_SCHEMA) {
    const schema = typeof image.schema === "string" ? `is "${image.schema}"` : "is missing";
    read.fail("$.schema", `${schema}, not "${IMAGE_SCHEMA}"`);
  }
  return {
    created: read.text(image.created, "$.created"),
    ...(image.relay === undefined ? {} : { relay: read.text(image.relay, "$.relay") }),
    ...(image.device === undefined ? {} : { device: read.text(image.device, "$.device") }),
    queues: read.list(image.queues, "$.queues").map((queue, i) => decodeQueue(read, queue, `$.queues[${i}]`)),
  };
}
