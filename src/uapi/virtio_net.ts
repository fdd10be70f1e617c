/**
 * virtio-net: feature bits, configuration space, packet header and control queue. Source: virtio 1.3, 5.1;
 * linux/virtio_net.h.
 *
 * @module
 */
import { checkRecord, type FieldTable, getFields, putFields } from "./record.ts";

/** Feature bits of a network device by kernel name without prefix: bit numbers. */
export const VIRTIO_NET_FEATURE_BITS = {
  CSUM: 0,
  GUEST_CSUM: 1,
  CTRL_GUEST_OFFLOADS: 2,
  MTU: 3,
  MAC: 5,
  GSO: 6,
  GUEST_TSO4: 7,
  GUEST_TSO6: 8,
  GUEST_ECN: 9,
  GUEST_UFO: 10,
  HOST_TSO4: 11,
  HOST_TSO6: 12,
  HOST_ECN: 13,
  HOST_UFO: 14,
  MRG_RXBUF: 15,
  STATUS: 16,
  CTRL_VQ: 17,
  CTRL_RX: 18,
  CTRL_VLAN: 19,
  CTRL_RX_EXTRA: 20,
  GUEST_ANNOUNCE: 21,
  MQ: 22,
  CTRL_MAC_ADDR: 23,
  DEVICE_STATS: 50,
  HASH_TUNNEL: 51,
  VQ_NOTF_COAL: 52,
  NOTF_COAL: 53,
  GUEST_USO4: 54,
  GUEST_USO6: 55,
  HOST_USO: 56,
  HASH_REPORT: 57,
  GUEST_HDRLEN: 59,
  RSS: 60,
  RSC_EXT: 61,
  STANDBY: 62,
  SPEED_DUPLEX: 63,
  RSS_CONTEXT: 64,
  GUEST_UDP_TUNNEL_GSO: 65,
  GUEST_UDP_TUNNEL_GSO_CSUM: 66,
  HOST_UDP_TUNNEL_GSO: 67,
  HOST_UDP_TUNNEL_GSO_CSUM: 68,
} as const;

/** Bit of `status` in the configuration: the link is up. */
export const VIRTIO_NET_S_LINK_UP = 1;
/** Bit of `status` in the configuration: the guest should announce itself. */
export const VIRTIO_NET_S_ANNOUNCE = 2;

/** Bytes of the configuration space. */
export const VIRTIO_NET_CONFIG_BYTES = 24;
/** Bytes of the packet header of a virtio 1 device. */
export const VIRTIO_NET_HDR_BYTES = 12;
/** Bytes of the packet header of a legacy device without MRG_RXBUF. */
export const VIRTIO_NET_HDR_LEGACY_BYTES = 10;
/** Bytes of the packet header with HASH_REPORT. */
export const VIRTIO_NET_HDR_HASH_BYTES = 20;

/** The configuration space (virtio 1.3, 5.1.4). */
export interface VirtioNetConfig {
  /** MAC address, 6 bytes; needs MAC. */
  mac: Uint8Array<ArrayBuffer>;
  /** {@linkcode VIRTIO_NET_S_LINK_UP} and {@linkcode VIRTIO_NET_S_ANNOUNCE}; needs STATUS. */
  status: number;
  /** Receive and transmit queue pairs; needs MQ or RSS. */
  maxVirtqueuePairs: number;
  /** Bytes; needs MTU. */
  mtu: number;
  /** Mbit/s, 0xffffffff for unknown; needs SPEED_DUPLEX. */
  speed: number;
  /** 0 half, 1 full, 255 unknown; needs SPEED_DUPLEX. */
  duplex: number;
  /** Bytes; needs RSS or HASH_REPORT. */
  rssMaxKeySize: number;
  /** Entries; needs RSS. */
  rssMaxIndirectionTableLength: number;
  /** Bits; needs RSS or HASH_REPORT. */
  supportedHashTypes: number;
}

const CONFIG: FieldTable<Omit<VirtioNetConfig, "mac">> = [
  ["status", 6, 2],
  ["maxVirtqueuePairs", 8, 2],
  ["mtu", 10, 2],
  ["speed", 12, 4],
  ["duplex", 16, 1],
  ["rssMaxKeySize", 17, 1],
  ["rssMaxIndirectionTableLength", 18, 2],
  ["supportedHashTypes", 20, 4],
];

/** Decodes the configuration space; a short one reads as if zeros followed. @throws SvqError BAD_RECORD when longer than 4096 */
export function decodeNetConfig(bytes: Uint8Array): VirtioNetConfig {
  const view = checkRecord("virtio-net configuration", bytes, VIRTIO_NET_CONFIG_BYTES, 0);
  return { mac: new Uint8Array(view.buffer.slice(0, 6)), ...getFields(view, CONFIG) } as unknown as VirtioNetConfig;
}

/** Encodes the configuration space, {@linkcode VIRTIO_NET_CONFIG_BYTES} bytes; what is left out is 0. */
export function encodeNetConfig(config: Partial<VirtioNetConfig>): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(VIRTIO_NET_CONFIG_BYTES);
  if (config.mac !== undefined) bytes.set(config.mac.subarray(0, 6));
  putFields(new DataView(bytes.buffer), CONFIG, config);
  return bytes;
}

/** Flags of {@linkcode VirtioNetHeader}. */
export const VIRTIO_NET_HDR_F = { NEEDS_CSUM: 1, DATA_VALID: 2, RSC_INFO: 4 } as const;
/** Segmentation types of {@linkcode VirtioNetHeader}; ECN is a bit that is added to another. */
export const VIRTIO_NET_HDR_GSO = { NONE: 0, TCPV4: 1, UDP: 3, TCPV6: 4, UDP_L4: 5, ECN: 0x80 } as const;

/** The header before every packet (virtio 1.3, 5.1.6). */
export interface VirtioNetHeader {
  /** Bits of {@linkcode VIRTIO_NET_HDR_F}. */
  flags: number;
  /** One of {@linkcode VIRTIO_NET_HDR_GSO}. */
  gsoType: number;
  /** Bytes of ethernet, IP and transport headers. */
  hdrLen: number;
  /** Bytes of payload in each segment. */
  gsoSize: number;
  /** Where the checksum starts to count, bytes. */
  csumStart: number;
  /** Where it is put, bytes from `csumStart`. */
  csumOffset: number;
  /** Buffers that a received packet takes. */
  numBuffers: number;
}

const HEADER: FieldTable<VirtioNetHeader> = [
  ["flags", 0, 1],
  ["gsoType", 1, 1],
  ["hdrLen", 2, 2],
  ["gsoSize", 4, 2],
  ["csumStart", 6, 2],
  ["csumOffset", 8, 2],
  ["numBuffers", 10, 2],
];

/** Decodes a packet header; of a legacy one `numBuffers` is 0. @throws SvqError BAD_RECORD when there are fewer than 10 bytes */
export function decodeNetHeader(bytes: Uint8Array): VirtioNetHeader {
  const head = bytes.subarray(0, VIRTIO_NET_HDR_BYTES);
  const view = checkRecord("virtio-net header", head, VIRTIO_NET_HDR_BYTES, VIRTIO_NET_HDR_LEGACY_BYTES);
  return getFields(view, HEADER) as unknown as VirtioNetHeader;
}

/** Encodes a packet header, {@linkcode VIRTIO_NET_HDR_BYTES} bytes; what is left out is 0. */
export function encodeNetHeader(header: Partial<VirtioNetHeader>): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(VIRTIO_NET_HDR_BYTES);
  putFields(new DataView(bytes.buffer), HEADER, header);
  return bytes;
}

/** The index of the control queue: behind all queue pairs with MQ or RSS negotiated, otherwise 2. */
export function netControlQueueIndex(features: bigint, maxVirtqueuePairs: number): number {
  const many = 1n << BigInt(VIRTIO_NET_FEATURE_BITS.MQ) | 1n << BigInt(VIRTIO_NET_FEATURE_BITS.RSS);
  return (features & many) !== 0n ? 2 * maxVirtqueuePairs : 2;
}

/** Answers of the control queue. */
export const VIRTIO_NET_CTRL_ACK = { OK: 0, ERR: 1 } as const;

/** Classes of control commands, each with its commands (virtio 1.3, 5.1.6.5). */
export const VIRTIO_NET_CTRL = {
  RX: { class: 0, PROMISC: 0, ALLMULTI: 1, ALLUNI: 2, NOMULTI: 3, NOUNI: 4, NOBCAST: 5 },
  MAC: { class: 1, TABLE_SET: 0, ADDR_SET: 1 },
  VLAN: { class: 2, ADD: 0, DEL: 1 },
  ANNOUNCE: { class: 3, ACK: 0 },
  MQ: { class: 4, VQ_PAIRS_SET: 0, RSS_CONFIG: 1, HASH_CONFIG: 2 },
  GUEST_OFFLOADS: { class: 5, SET: 0 },
  NOTF_COAL: { class: 6, TX_SET: 0, RX_SET: 1, VQ_SET: 2, VQ_GET: 3 },
  STATS: { class: 8, QUERY: 0, GET: 1 },
} as const;
