/**
 * VDUSE, vDPA devices served by a process: requests, records and messages of /dev/vduse/control and /dev/vduse/NAME
 * (linux/vduse.h, API versions 0 and 1, and the features QUEUE_READY and SUSPEND of the newest kernels). Data, no I/O.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { getAddress, requireSize, viewOf } from "./vhost.ts";

/** ioctl numbers (`VDUSE_…`). */
export const VDUSE = {
  GET_API_VERSION: 0x80088100,
  SET_API_VERSION: 0x40088101,
  CREATE_DEV: 0x41508102,
  DESTROY_DEV: 0x41008103,
  GET_FEATURES: 0x80088104,
  SET_FEATURES: 0x40088105,
  IOTLB_GET_FD: 0xc0208110,
  DEV_GET_FEATURES: 0x80088111,
  DEV_SET_CONFIG: 0x40088112,
  DEV_INJECT_CONFIG_IRQ: 0x00008113,
  VQ_SETUP: 0x40208114,
  VQ_GET_INFO: 0xc0308115,
  VQ_SETUP_KICKFD: 0x40088116,
  VQ_INJECT_IRQ: 0x40048117,
} as const;

/**
 * Kinds of messages that the kernel sends (`enum vduse_req_type`): SET_VQ_GROUP_ASID with API 1 only, SET_VQ_READY and SUSPEND
 * only where the feature was agreed on.
 */
export const VDUSE_REQUEST = {
  GET_VQ_STATE: 0,
  SET_STATUS: 1,
  UPDATE_IOTLB: 2,
  SET_VQ_GROUP_ASID: 3,
  SET_VQ_READY: 4,
  SUSPEND: 5,
} as const;

/** Bits of GET_FEATURES and SET_FEATURES (`VDUSE_F_…`). */
export const VDUSE_FEATURE = { QUEUE_READY: 0, SUSPEND: 1 } as const;

/** Bytes of struct vduse_dev_request and of struct vduse_dev_response. */
export const VDUSE_MESSAGE_BYTES = 152;

const NAME_BYTES = 256;
const CONFIG_HEAD_BYTES = 336;
const PAYLOAD = 24;
const encoder = new TextEncoder();

/** What CREATE_DEV is told (struct vduse_dev_config). */
export interface VduseDeviceConfig {
  /** Name in /dev/vduse and on the vdpa bus; at most 255 bytes. */
  name: string;
  /** Vendor id. */
  vendorId: number;
  /** Virtio device id. */
  deviceId: number;
  /** Features offered; the kernel demands ACCESS_PLATFORM. */
  features: bigint;
  /** Queues. */
  vqNum: number;
  /** Alignment of rings in bytes, a power of two from 4 to 4096. */
  vqAlign: number;
  /** Configuration space. */
  config: Uint8Array;
  /** API 1: groups of queues, at least 1. API 0: left out. */
  groups?: number;
  /** API 1: address spaces, at least 1. API 0: left out. */
  addressSpaces?: number;
}

/** Encodes a name as DESTROY_DEV takes it. @throws SvqError BAD_NAME for what cannot be a file's name of at most 255 bytes */
export function encodeVduseName(name: string): Uint8Array<ArrayBuffer> {
  const text = encoder.encode(name);
  if (text.length === 0 || text.length >= NAME_BYTES || /[/\0]/.test(name) || name === "." || name === ".." || name === "control") {
    throw new SvqError("BAD_NAME", `${JSON.stringify(name)} cannot be the name of a VDUSE device`, {
      exitCode: 2,
      hint: 'A name has 1 to 255 bytes, no slash, and is not "control"',
    });
  }
  const bytes = new Uint8Array(NAME_BYTES);
  bytes.set(text);
  return bytes;
}

/** Encodes struct vduse_dev_config with the configuration space behind it. @throws SvqError BAD_NAME */
export function encodeVduseConfig(config: VduseDeviceConfig): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(CONFIG_HEAD_BYTES + config.config.length);
  const view = viewOf(bytes);
  bytes.set(encodeVduseName(config.name));
  view.setUint32(256, config.vendorId, true);
  view.setUint32(260, config.deviceId, true);
  view.setBigUint64(264, config.features, true);
  view.setUint32(272, config.vqNum, true);
  view.setUint32(276, config.vqAlign, true);
  view.setUint32(280, config.groups ?? 0, true);
  view.setUint32(284, config.addressSpaces ?? 0, true);
  view.setUint32(332, config.config.length, true);
  bytes.set(config.config, CONFIG_HEAD_BYTES);
  return bytes;
}

/** Encodes struct vduse_vq_config, 32 bytes. @param maxSize largest ring, descriptors */
export function encodeVqConfig(index: number, maxSize: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(32);
  const view = viewOf(bytes);
  view.setUint32(0, index, true);
  view.setUint16(4, maxSize, true);
  return bytes;
}

/** Encodes struct vduse_vq_eventfd, 8 bytes. @param fd the kick, -1 to take it away */
export function encodeVqKick(index: number, fd: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(8);
  const view = viewOf(bytes);
  view.setUint32(0, index, true);
  view.setInt32(4, fd, true);
  return bytes;
}

/** A queue as its driver set it up (struct vduse_vq_info). */
export interface VduseVqInfo {
  /** Size in descriptors; 0 when it was never set. */
  num: number;
  /** Where its parts lie, IOVA. */
  addresses: { desc: number; avail: number; used: number };
  /** Where it starts, as SET_VRING_BASE has it. */
  base: number;
  /** Is it to run? */
  ready: boolean;
}

/** An empty struct vduse_vq_info for VQ_GET_INFO, 48 bytes. */
export function newVqInfo(index: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(48);
  viewOf(bytes).setUint32(0, index, true);
  return bytes;
}

/** Decodes struct vduse_vq_info. @param packed the ring is packed @throws SvqError BAD_RECORD, ADDRESS_TOO_LARGE */
export function decodeVqInfo(bytes: Uint8Array<ArrayBuffer>, packed: boolean): VduseVqInfo {
  const view = requireSize(bytes, 48, "vduse_vq_info");
  return {
    num: view.getUint32(4, true),
    addresses: {
      desc: getAddress(view, 8, "descriptor ring"),
      avail: getAddress(view, 16, "driver area"),
      used: getAddress(view, 24, "device area"),
    },
    base: packed ? getPackedBase(view, 32) : view.getUint16(32, true),
    ready: view.getUint8(40) !== 0,
  };
}

// Four u16: counter and index of avail, counter and index of used.
function getPackedBase(view: DataView<ArrayBuffer>, at: number): number {
  const half = (offset: number) => (view.getUint16(offset, true) & 1) << 15 | (view.getUint16(offset + 2, true) & 0x7fff);
  return (half(at) | half(at + 4) << 16) >>> 0;
}

/** A range of the IOTLB (struct vduse_iotlb_entry). */
export interface VduseIotlbEntry {
  /** Where it starts in the file that came with it, bytes. */
  offset: number;
  /** First IOVA. */
  start: number;
  /** Bytes. */
  size: number;
  /** What the device may do with it: a value of ACCESS. */
  perm: number;
}

const ALL_ONES = 0xffff_ffff_ffff_ffffn;

/** The question for IOTLB_GET_FD, 32 bytes: the lowest range at `start` or above it. */
export function newIotlbEntry(start: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(32);
  const view = viewOf(bytes);
  view.setBigUint64(8, BigInt(start), true);
  view.setBigUint64(16, ALL_ONES, true);
  return bytes;
}

/** Decodes struct vduse_iotlb_entry. @throws SvqError BAD_RECORD, ADDRESS_TOO_LARGE */
export function decodeIotlbEntry(bytes: Uint8Array<ArrayBuffer>): VduseIotlbEntry {
  const view = requireSize(bytes, 32, "vduse_iotlb_entry");
  const start = getAddress(view, 8, "IOVA");
  const last = getAddress(view, 16, "IOVA");
  if (last < start) throw new SvqError("BAD_RECORD", "An IOTLB range ends before it starts");
  return { offset: getAddress(view, 0, "file offset"), start, size: last - start + 1, perm: view.getUint8(24) };
}

/** A message of the kernel (struct vduse_dev_request). */
export type VduseRequest =
  & {
    /** Comes back in the answer. */
    id: number;
  }
  & (
    | { type: typeof VDUSE_REQUEST.GET_VQ_STATE; index: number }
    | { type: typeof VDUSE_REQUEST.SET_STATUS; status: number }
    | { type: typeof VDUSE_REQUEST.UPDATE_IOTLB }
    | { type: typeof VDUSE_REQUEST.SET_VQ_GROUP_ASID; group: number; asid: number }
    | { type: typeof VDUSE_REQUEST.SET_VQ_READY; index: number; ready: boolean }
    | { type: typeof VDUSE_REQUEST.SUSPEND }
    | { type: "unknown"; number: number }
  );

/** Decodes a message. @throws SvqError BAD_RECORD for a wrong size */
export function decodeVduseRequest(bytes: Uint8Array<ArrayBuffer>): VduseRequest {
  const view = requireSize(bytes, VDUSE_MESSAGE_BYTES, "vduse_dev_request");
  const type = view.getUint32(0, true);
  const id = view.getUint32(4, true);
  switch (type) {
    case VDUSE_REQUEST.GET_VQ_STATE:
      return { id, type, index: view.getUint32(PAYLOAD, true) };
    case VDUSE_REQUEST.SET_STATUS:
      return { id, type, status: view.getUint8(PAYLOAD) };
    case VDUSE_REQUEST.UPDATE_IOTLB:
    case VDUSE_REQUEST.SUSPEND:
      return { id, type };
    case VDUSE_REQUEST.SET_VQ_GROUP_ASID:
      return { id, type, group: view.getUint32(PAYLOAD, true), asid: view.getUint32(PAYLOAD + 4, true) };
    case VDUSE_REQUEST.SET_VQ_READY:
      return { id, type, index: view.getUint32(PAYLOAD, true), ready: view.getUint32(PAYLOAD + 4, true) !== 0 };
    default:
      return { id, type: "unknown", number: type };
  }
}

/** Where a queue stands, for the answer to GET_VQ_STATE. */
export interface VduseVqState {
  /** Queue. */
  index: number;
  /** As GET_VRING_BASE answers it. */
  base: number;
  /** The ring is packed. */
  packed: boolean;
}

/** Encodes an answer (struct vduse_dev_response). */
export function encodeVduseResponse(id: number, ok: boolean, state?: VduseVqState): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(VDUSE_MESSAGE_BYTES);
  const view = viewOf(bytes);
  view.setUint32(0, id, true);
  view.setUint32(4, ok ? 0 : 1, true);
  if (state !== undefined) {
    const { index, base, packed } = state;
    view.setUint32(PAYLOAD, index, true);
    if (packed) {
      view.setUint16(PAYLOAD + 4, base >>> 15 & 1, true);
      view.setUint16(PAYLOAD + 6, base & 0x7fff, true);
      view.setUint16(PAYLOAD + 8, base >>> 31, true);
      view.setUint16(PAYLOAD + 10, base >>> 16 & 0x7fff, true);
    } else {
      view.setUint16(PAYLOAD + 4, base, true);
    }
  }
  return bytes;
}
