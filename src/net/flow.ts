/**
 * Which receive queue a frame goes to: the Toeplitz hash of receive side scaling (virtio 1.3, 5.1.6.4.3), and a plain hash
 * where the driver has not asked for it.
 *
 * @module
 */
import type { NetRss } from "./command.ts";

/** Bits of `hash_types` (VIRTIO_NET_RSS_HASH_TYPE_…). */
export const NET_HASH_TYPES = { IPv4: 1, TCPv4: 2, UDPv4: 4, IPv6: 8, TCPv6: 16, UDPv6: 32 } as const;
/** All of {@linkcode NET_HASH_TYPES}. */
export const NET_HASH_TYPES_ALL = 63;

const ETHERTYPE_IPV4 = 0x0800;
const ETHERTYPE_IPV6 = 0x86dd;
const ETHERTYPE_VLAN = 0x8100;
const TCP = 6;
const UDP = 17;

/** Toeplitz hash of `[from, from + length)` of `bytes`. @param key at least `length + 4` bytes; what lacks counts as 0 */
function toeplitz(bytes: Uint8Array, from: number, length: number, key: Uint8Array, keyAt: number, hash: number): number {
  for (let i = 0; i < length; i++) {
    for (let bit = 0; bit < 8; bit++) {
      if ((bytes[from + i]! >> (7 - bit) & 1) === 0) continue;
      const at = keyAt + i;
      const word = (key[at] ?? 0) * 2 ** 24 + ((key[at + 1] ?? 0) << 16) + ((key[at + 2] ?? 0) << 8) + (key[at + 3] ?? 0);
      hash ^= bit === 0 ? word : (word << bit) | ((key[at + 4] ?? 0) >> (8 - bit));
    }
  }
  return hash;
}

interface Flow {
  // Where the two addresses lie, and their bytes together.
  addresses: number;
  addressBytes: number;
  // Where the two ports lie; -1 without ports, or in a fragment.
  ports: number;
  type: number;
  portType: number;
}

function flowOf(frame: Uint8Array): Flow | undefined {
  let at = 12;
  let type = (frame[at] ?? 0) << 8 | (frame[at + 1] ?? 0);
  if (type === ETHERTYPE_VLAN) {
    at += 4;
    type = (frame[at] ?? 0) << 8 | (frame[at + 1] ?? 0);
  }
  at += 2;
  const T = NET_HASH_TYPES;
  if (type === ETHERTYPE_IPV4 && frame.length >= at + 20) {
    const header = (frame[at]! & 15) * 4;
    const protocol = frame[at + 9]!;
    const fragment = (frame[at + 6]! & 0x3f) !== 0 || frame[at + 7]! !== 0;
    const ports = at + header;
    const has = !fragment && header >= 20 && frame.length >= ports + 4;
    const portType = protocol === TCP ? T.TCPv4 : protocol === UDP ? T.UDPv4 : 0;
    return { addresses: at + 12, addressBytes: 8, ports: has && portType !== 0 ? ports : -1, type: T.IPv4, portType };
  }
  if (type === ETHERTYPE_IPV6 && frame.length >= at + 40) {
    const protocol = frame[at + 6]!;
    const ports = at + 40;
    const portType = protocol === TCP ? T.TCPv6 : protocol === UDP ? T.UDPv6 : 0;
    return { addresses: at + 8, addressBytes: 32, ports: portType !== 0 && frame.length >= ports + 4 ? ports : -1, type: T.IPv6, portType };
  }
  return undefined;
}

/**
 * The hash of a frame.
 *
 * @param types which fields may be hashed, bits of {@linkcode NET_HASH_TYPES}
 * @returns 32 bits, or undefined where no type fits
 */
export function flowHash(frame: Uint8Array, types: number, key: Uint8Array): number | undefined {
  const flow = flowOf(frame);
  if (flow === undefined) return undefined;
  const withPorts = flow.ports >= 0 && (types & flow.portType) !== 0;
  if (!withPorts && (types & flow.type) === 0) return undefined;
  const hash = toeplitz(frame, flow.addresses, flow.addressBytes, key, 0, 0);
  return (withPorts ? toeplitz(frame, flow.ports, 4, key, flow.addressBytes, hash) : hash) >>> 0;
}

// Any key with many bits set spreads well enough where the driver gave none.
const PLAIN_KEY = Uint8Array.from({ length: 44 }, (_, i) => (i * 0x9d + 0x6b) & 0xff);

/** A receive pair for a frame among `pairs`, the same for all frames of one flow. */
export function plainPair(frame: Uint8Array, pairs: number): number {
  return pairs < 2 ? 0 : (flowHash(frame, NET_HASH_TYPES_ALL, PLAIN_KEY) ?? 0) % pairs;
}

/** Receive side scaling as a driver has configured it; the key is unpacked once. */
export class RssSpreader {
  readonly #key: Uint8Array;

  /** For one configuration. */
  constructor(readonly rss: NetRss) {
    this.#key = Uint8Array.from(rss.key.match(/../g) ?? [], (part) => parseInt(part, 16));
  }

  /** The receive pair for a frame, as the configuration names it. */
  pair(frame: Uint8Array): number {
    const hash = flowHash(frame, this.rss.hash_types, this.#key);
    if (hash === undefined) return this.rss.unclassified_queue;
    return this.rss.indirection[hash & (this.rss.indirection.length - 1)]!;
  }
}
