/**
 * Commands of the virtio-net control queue: from bytes to records and back (virtio 1.3, 5.1.6.5). Pure; what is decoded
 * comes from a guest and is checked.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { VIRTIO_NET_CTRL, VIRTIO_NET_FEATURE_BITS } from "../uapi/virtio_net.ts";

/** Receive modes, each switched on or off by a command of its own. */
export const NET_RX_MODES = ["promisc", "allmulti", "alluni", "nomulti", "nouni", "nobcast"] as const;
/** One of {@linkcode NET_RX_MODES}. */
export type NetRxMode = typeof NET_RX_MODES[number];

/** How received packets are spread over queues by a hash. */
export interface NetRss {
  /** Bits of VIRTIO_NET_RSS_HASH_TYPE_…. */
  hash_types: number;
  /** Receive pair for packets without a hash. */
  unclassified_queue: number;
  /** Receive pairs by hash; a power of two of them. */
  indirection: number[];
  /** Transmit queues in use. */
  max_tx_vq: number;
  /** Key of the hash, hexadecimal. */
  key: string;
}

/** Which hash the device reports with a packet. */
export interface NetHash {
  /** Bits of VIRTIO_NET_RSS_HASH_TYPE_…. */
  hash_types: number;
  /** Key of the hash, hexadecimal. */
  key: string;
}

/** When the device may call late. */
export interface NetCoalescing {
  /** Packets that may be waited for. */
  max_packets: number;
  /** Microseconds that may be waited. */
  max_usecs: number;
}

/** A command. Addresses are written `xx:xx:xx:xx:xx:xx`. */
export type NetCommand =
  | { name: "RX"; mode: NetRxMode; on: boolean }
  | { name: "MAC_TABLE_SET"; unicast: string[]; multicast: string[] }
  | { name: "MAC_ADDR_SET"; mac: string }
  | { name: "VLAN_ADD"; vlan: number }
  | { name: "VLAN_DEL"; vlan: number }
  | { name: "ANNOUNCE_ACK" }
  | { name: "VQ_PAIRS_SET"; pairs: number }
  | { name: "RSS_CONFIG"; rss: NetRss }
  | { name: "HASH_CONFIG"; hash: NetHash }
  | { name: "GUEST_OFFLOADS_SET"; offloads: bigint }
  | { name: "NOTF_COAL_TX_SET"; coalescing: NetCoalescing }
  | { name: "NOTF_COAL_RX_SET"; coalescing: NetCoalescing }
  | { name: "NOTF_COAL_VQ_SET"; queue: number; coalescing: NetCoalescing }
  | { name: "NOTF_COAL_VQ_GET"; queue: number }
  | { name: "STATS"; command: number; data: string }
  | { name: "UNKNOWN"; class: number; command: number; data: string };

/** Longest command that is accepted, bytes: the largest MAC tables that anybody has fit many times. */
export const NET_COMMAND_MAX = 32768;
/** Most queue pairs (virtio 1.3, 5.1.6.5.5). */
export const NET_PAIRS_MAX = 0x8000;
const VLANS = 4096;

function bad(message: string): SvqError {
  return new SvqError("BAD_NET_COMMAND", message);
}

/** Six bytes as text. */
export function formatMac(bytes: Uint8Array): string {
  return [...bytes.subarray(0, 6)].map((byte) => byte.toString(16).padStart(2, "0")).join(":");
}

/** Text as six bytes. @throws SvqError BAD_NET_COMMAND */
export function parseMac(text: string): Uint8Array<ArrayBuffer> {
  if (!/^([0-9a-f]{2}:){5}[0-9a-f]{2}$/i.test(text)) throw bad(`${JSON.stringify(text)} is no MAC address`);
  return Uint8Array.from(text.split(":"), (part) => parseInt(part, 16));
}

function hex(bytes: Uint8Array): string {
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function unhex(text: string): Uint8Array<ArrayBuffer> {
  if (!/^([0-9a-f]{2})*$/i.test(text)) throw bad(`${JSON.stringify(text)} is not hexadecimal`);
  return Uint8Array.from(text.match(/../g) ?? [], (part) => parseInt(part, 16));
}

/** Reads fields one after the other; a command that is too short or too long is refused. */
class Reader {
  readonly #view: DataView;
  #at = 0;

  constructor(readonly what: string, readonly bytes: Uint8Array) {
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  #take(size: number): number {
    const at = this.#at;
    if (at + size > this.bytes.length) throw bad(`${this.what} has only ${this.bytes.length} bytes`);
    this.#at += size;
    return at;
  }

  u8(): number {
    return this.#view.getUint8(this.#take(1));
  }
  u16(): number {
    return this.#view.getUint16(this.#take(2), true);
  }
  u32(): number {
    return this.#view.getUint32(this.#take(4), true);
  }
  u64(): bigint {
    return this.#view.getBigUint64(this.#take(8), true);
  }
  take(size: number): Uint8Array {
    const at = this.#take(size);
    return this.bytes.slice(at, at + size);
  }
  macs(): string[] {
    const count = this.u32();
    if (count * 6 > this.bytes.length) throw bad(`${this.what} says ${count} addresses and has ${this.bytes.length} bytes`);
    return Array.from({ length: count }, () => formatMac(this.take(6)));
  }
  rest(): Uint8Array {
    return this.take(this.bytes.length - this.#at);
  }
  end(): void {
    if (this.#at !== this.bytes.length) throw bad(`${this.what} has ${this.bytes.length} bytes instead of ${this.#at}`);
  }
}

class Writer {
  readonly #bytes: number[];

  constructor(cls: number, command: number) {
    this.#bytes = [cls, command];
  }

  number(value: number | bigint, size: number): this {
    let rest = BigInt(value);
    for (let i = 0; i < size; i++, rest >>= 8n) this.#bytes.push(Number(rest & 0xffn));
    return this;
  }
  raw(bytes: Uint8Array): this {
    for (const byte of bytes) this.#bytes.push(byte);
    return this;
  }
  macs(list: readonly string[]): this {
    this.number(list.length, 4);
    for (const mac of list) this.raw(parseMac(mac));
    return this;
  }
  coalescing({ max_packets, max_usecs }: NetCoalescing): this {
    return this.number(max_packets, 4).number(max_usecs, 4);
  }
  key(text: string): this {
    const key = unhex(text);
    if (key.length > 255) throw bad(`A hash key of ${key.length} bytes is too long`);
    return this.number(key.length, 1).raw(key);
  }
  done(): Uint8Array<ArrayBuffer> {
    return Uint8Array.from(this.#bytes);
  }
}

const { RX, MAC, VLAN, ANNOUNCE, MQ, GUEST_OFFLOADS, NOTF_COAL, STATS } = VIRTIO_NET_CTRL;

// A command that is not in the table is known by nobody here: it is passed on as it is.
function nameOf(cls: number, command: number): NetCommand["name"] {
  switch (cls) {
    case RX.class:
      return command < NET_RX_MODES.length ? "RX" : "UNKNOWN";
    case MAC.class:
      return (["MAC_TABLE_SET", "MAC_ADDR_SET"] as const)[command] ?? "UNKNOWN";
    case VLAN.class:
      return (["VLAN_ADD", "VLAN_DEL"] as const)[command] ?? "UNKNOWN";
    case ANNOUNCE.class:
      return command === ANNOUNCE.ACK ? "ANNOUNCE_ACK" : "UNKNOWN";
    case MQ.class:
      return (["VQ_PAIRS_SET", "RSS_CONFIG", "HASH_CONFIG"] as const)[command] ?? "UNKNOWN";
    case GUEST_OFFLOADS.class:
      return command === GUEST_OFFLOADS.SET ? "GUEST_OFFLOADS_SET" : "UNKNOWN";
    case NOTF_COAL.class:
      return (["NOTF_COAL_TX_SET", "NOTF_COAL_RX_SET", "NOTF_COAL_VQ_SET", "NOTF_COAL_VQ_GET"] as const)[command] ?? "UNKNOWN";
    case STATS.class:
      return command <= STATS.GET ? "STATS" : "UNKNOWN";
    default:
      return "UNKNOWN";
  }
}

/**
 * Decodes a command.
 *
 * @param bytes class, command and data, without the byte for the answer
 * @throws SvqError BAD_NET_COMMAND when a known command has the wrong length or impossible values
 */
export function decodeNetCommand(bytes: Uint8Array): NetCommand {
  if (bytes.length < 2 || bytes.length > NET_COMMAND_MAX) throw bad(`A control command has ${bytes.length} bytes`);
  const cls = bytes[0]!;
  const command = bytes[1]!;
  const name = nameOf(cls, command);
  const reader = new Reader(name, bytes);
  reader.take(2);
  if (name === "UNKNOWN") return { name, class: cls, command, data: hex(reader.rest()) };
  if (name === "STATS") return { name, command, data: hex(reader.rest()) };
  const decoded = decodeKnown(name, command, reader);
  reader.end();
  return decoded;
}

function decodeKnown(name: Exclude<NetCommand["name"], "UNKNOWN" | "STATS">, command: number, reader: Reader): NetCommand {
  const coalescing = (): NetCoalescing => ({ max_packets: reader.u32(), max_usecs: reader.u32() });
  switch (name) {
    case "RX": {
      const on = reader.u8();
      if (on > 1) throw bad(`A receive mode is switched to ${on}`);
      return { name, mode: NET_RX_MODES[command]!, on: on === 1 };
    }
    case "MAC_TABLE_SET":
      return { name, unicast: reader.macs(), multicast: reader.macs() };
    case "MAC_ADDR_SET":
      return { name, mac: formatMac(reader.take(6)) };
    case "VLAN_ADD":
    case "VLAN_DEL": {
      const vlan = reader.u16();
      if (vlan >= VLANS) throw bad(`There is no VLAN ${vlan}`);
      return { name, vlan };
    }
    case "ANNOUNCE_ACK":
      return { name };
    case "VQ_PAIRS_SET": {
      const pairs = reader.u16();
      if (pairs < 1 || pairs > NET_PAIRS_MAX) throw bad(`${pairs} queue pairs cannot be set`);
      return { name, pairs };
    }
    case "RSS_CONFIG":
      return { name, rss: decodeRss(reader) };
    case "HASH_CONFIG": {
      const hashTypes = reader.u32();
      reader.take(8);
      return { name, hash: { hash_types: hashTypes, key: hex(reader.take(reader.u8())) } };
    }
    case "GUEST_OFFLOADS_SET":
      return { name, offloads: reader.u64() };
    case "NOTF_COAL_TX_SET":
    case "NOTF_COAL_RX_SET":
      return { name, coalescing: coalescing() };
    case "NOTF_COAL_VQ_SET": {
      const queue = reader.u16();
      reader.u16();
      return { name, queue, coalescing: coalescing() };
    }
    case "NOTF_COAL_VQ_GET": {
      const queue = reader.u16();
      reader.u16();
      return { name, queue };
    }
  }
}

function decodeRss(reader: Reader): NetRss {
  const hashTypes = reader.u32();
  const mask = reader.u16();
  if (((mask + 1) & mask) !== 0) throw bad(`${mask} is no mask of an indirection table`);
  const unclassified = reader.u16();
  const indirection = Array.from({ length: mask + 1 }, () => reader.u16());
  const maxTx = reader.u16();
  return { hash_types: hashTypes, unclassified_queue: unclassified, indirection, max_tx_vq: maxTx, key: hex(reader.take(reader.u8())) };
}

/** Encodes a command: class, command and data. @throws SvqError BAD_NET_COMMAND for values that no command holds */
export function encodeNetCommand(command: NetCommand): Uint8Array<ArrayBuffer> {
  switch (command.name) {
    case "RX":
      return new Writer(RX.class, NET_RX_MODES.indexOf(command.mode)).number(command.on ? 1 : 0, 1).done();
    case "MAC_TABLE_SET":
      return new Writer(MAC.class, MAC.TABLE_SET).macs(command.unicast).macs(command.multicast).done();
    case "MAC_ADDR_SET":
      return new Writer(MAC.class, MAC.ADDR_SET).raw(parseMac(command.mac)).done();
    case "VLAN_ADD":
      return new Writer(VLAN.class, VLAN.ADD).number(command.vlan, 2).done();
    case "VLAN_DEL":
      return new Writer(VLAN.class, VLAN.DEL).number(command.vlan, 2).done();
    case "ANNOUNCE_ACK":
      return new Writer(ANNOUNCE.class, ANNOUNCE.ACK).done();
    case "VQ_PAIRS_SET":
      return new Writer(MQ.class, MQ.VQ_PAIRS_SET).number(command.pairs, 2).done();
    case "RSS_CONFIG": {
      const { hash_types, unclassified_queue, indirection, max_tx_vq, key } = command.rss;
      const writer = new Writer(MQ.class, MQ.RSS_CONFIG).number(hash_types, 4).number(indirection.length - 1, 2).number(
        unclassified_queue,
        2,
      );
      for (const queue of indirection) writer.number(queue, 2);
      return writer.number(max_tx_vq, 2).key(key).done();
    }
    case "HASH_CONFIG":
      return new Writer(MQ.class, MQ.HASH_CONFIG).number(command.hash.hash_types, 4).number(0, 8).key(command.hash.key).done();
    case "GUEST_OFFLOADS_SET":
      return new Writer(GUEST_OFFLOADS.class, GUEST_OFFLOADS.SET).number(command.offloads, 8).done();
    case "NOTF_COAL_TX_SET":
      return new Writer(NOTF_COAL.class, NOTF_COAL.TX_SET).coalescing(command.coalescing).done();
    case "NOTF_COAL_RX_SET":
      return new Writer(NOTF_COAL.class, NOTF_COAL.RX_SET).coalescing(command.coalescing).done();
    case "NOTF_COAL_VQ_SET":
      return new Writer(NOTF_COAL.class, NOTF_COAL.VQ_SET).number(command.queue, 4).coalescing(command.coalescing).done();
    case "NOTF_COAL_VQ_GET":
      return new Writer(NOTF_COAL.class, NOTF_COAL.VQ_GET).number(command.queue, 4).done();
    case "STATS":
      return new Writer(STATS.class, command.command).raw(unhex(command.data)).done();
    case "UNKNOWN":
      return new Writer(command.class, command.command).raw(unhex(command.data)).done();
  }
}

const F = VIRTIO_NET_FEATURE_BITS;

/** The feature bit that a command needs besides CTRL_VQ; undefined where nobody here knows it. */
export function netCommandFeature(command: NetCommand): number | undefined {
  switch (command.name) {
    case "RX":
      return command.mode === "promisc" || command.mode === "allmulti" ? F.CTRL_RX : F.CTRL_RX_EXTRA;
    case "MAC_TABLE_SET":
      return F.CTRL_RX;
    case "MAC_ADDR_SET":
      return F.CTRL_MAC_ADDR;
    case "VLAN_ADD":
    case "VLAN_DEL":
      return F.CTRL_VLAN;
    case "ANNOUNCE_ACK":
      return F.GUEST_ANNOUNCE;
    case "VQ_PAIRS_SET":
      return F.MQ;
    case "RSS_CONFIG":
      return F.RSS;
    case "HASH_CONFIG":
      return F.HASH_REPORT;
    case "GUEST_OFFLOADS_SET":
      return F.CTRL_GUEST_OFFLOADS;
    case "NOTF_COAL_TX_SET":
    case "NOTF_COAL_RX_SET":
      return F.NOTF_COAL;
    case "NOTF_COAL_VQ_SET":
    case "NOTF_COAL_VQ_GET":
      return F.VQ_NOTF_COAL;
    case "STATS":
      return F.DEVICE_STATS;
    case "UNKNOWN":
      return undefined;
  }
}
