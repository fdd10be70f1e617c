/**
 * The kernel's vhost interface: ioctl numbers, records and feature bits (linux/vhost.h, linux/vhost_types.h). The records
 * that vhost-user shares are used by both.
 *
 * Numbers are those of the generic ioctl encoding (x86-64, arm64): direction << 30 | size << 16 | type << 8 | number.
 *
 * @module
 */
import { SvqError } from "../errors.ts";

// The same as memory/region.ts, which lies above this room.
const ADDRESS_LIMIT = 2 ** 52;

/** ioctl requests of all vhost devices, by their name in linux/vhost.h without `VHOST_`. */
export const VHOST = {
  GET_FEATURES: 0x8008af00,
  SET_FEATURES: 0x4008af00,
  SET_OWNER: 0x0000af01,
  RESET_OWNER: 0x0000af02,
  SET_MEM_TABLE: 0x4008af03,
  SET_LOG_BASE: 0x4008af04,
  SET_LOG_FD: 0x4004af07,
  NEW_WORKER: 0x8004af08,
  FREE_WORKER: 0x4004af09,
  SET_VRING_NUM: 0x4008af10,
  SET_VRING_ADDR: 0x4028af11,
  SET_VRING_BASE: 0x4008af12,
  GET_VRING_BASE: 0xc008af12,
  SET_VRING_ENDIAN: 0x4008af13,
  GET_VRING_ENDIAN: 0x4008af14,
  ATTACH_VRING_WORKER: 0x4008af15,
  GET_VRING_WORKER: 0xc008af16,
  SET_VRING_KICK: 0x4008af20,
  SET_VRING_CALL: 0x4008af21,
  SET_VRING_ERR: 0x4008af22,
  SET_VRING_BUSYLOOP_TIMEOUT: 0x4008af23,
  GET_VRING_BUSYLOOP_TIMEOUT: 0x4008af24,
  SET_BACKEND_FEATURES: 0x4008af25,
  GET_BACKEND_FEATURES: 0x8008af26,
  NET_SET_BACKEND: 0x4008af30,
  GET_FEATURES_ARRAY: 0x8008af83,
  SET_FEATURES_ARRAY: 0x4008af83,
  SET_FORK_FROM_OWNER: 0x4001af84,
  GET_FORK_FROM_OWNER: 0x8001af85,
} as const;

/** ioctl requests of vhost-vdpa, by their name in linux/vhost.h without `VHOST_VDPA_` or `VHOST_`. */
export const VHOST_VDPA = {
  GET_DEVICE_ID: 0x8004af70,
  GET_STATUS: 0x8001af71,
  SET_STATUS: 0x4001af72,
  GET_CONFIG: 0x8008af73,
  SET_CONFIG: 0x4008af74,
  SET_VRING_ENABLE: 0x4008af75,
  GET_VRING_NUM: 0x8002af76,
  SET_CONFIG_CALL: 0x4004af77,
  GET_IOVA_RANGE: 0x8010af78,
  GET_CONFIG_SIZE: 0x8004af79,
  GET_AS_NUM: 0x8004af7a,
  GET_VRING_GROUP: 0xc008af7b,
  SET_GROUP_ASID: 0x4008af7c,
  SUSPEND: 0x0000af7d,
  RESUME: 0x0000af7e,
  GET_VRING_DESC_GROUP: 0xc008af7f,
  GET_VQS_COUNT: 0x8004af80,
  GET_GROUP_NUM: 0x8004af81,
  GET_VRING_SIZE: 0xc008af82,
} as const;

/** Bits of VHOST_GET_BACKEND_FEATURES (`VHOST_BACKEND_F_…`). */
export const BACKEND_FEATURE = {
  IOTLB_MSG_V2: 1,
  IOTLB_BATCH: 2,
  IOTLB_ASID: 3,
  SUSPEND: 4,
  RESUME: 5,
  ENABLE_AFTER_DRIVER_OK: 6,
  DESC_ASID: 7,
  IOTLB_PERSIST: 8,
} as const;

/** Feature bits that belong to vhost and not to virtio. */
export const VHOST_F = {
  /** The device logs what it writes. */
  LOG_ALL: 26,
  /** vhost-net: the device takes the virtio-net header off. */
  NET_VIRTIO_NET_HDR: 27,
} as const;

/** Flag of vhost_vring_addr: used-ring writes are logged at `log_guest_addr`. */
export const VHOST_VRING_F_LOG = 1;

/** Largest ring that virtio allows, in descriptors. */
export const VRING_NUM_LIMIT = 32768;

/** Message types of the IOTLB (`VHOST_IOTLB_…`). */
export const IOTLB = { MISS: 1, UPDATE: 2, INVALIDATE: 3, ACCESS_FAIL: 4, BATCH_BEGIN: 5, BATCH_END: 6 } as const;

/** Permissions of an IOTLB entry (`VHOST_ACCESS_…`). */
export const ACCESS = { RO: 1, WO: 2, RW: 3 } as const;

/** Bytes of the records below. */
export const SIZE = {
  u64: 8,
  vringState: 8,
  vringFile: 8,
  vringAddr: 40,
  memoryHead: 8,
  memoryRegion: 32,
  iotlb: 32,
  msgV2: 72,
} as const;

const VHOST_IOTLB_MSG_V2 = 2;

/** A DataView over `bytes`. */
export function viewOf(bytes: Uint8Array<ArrayBuffer>): DataView<ArrayBuffer> {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** A DataView over a record of a fixed size. @throws SvqError BAD_RECORD unless `bytes` has exactly `size` bytes */
export function requireSize(bytes: Uint8Array<ArrayBuffer>, size: number, what: string): DataView<ArrayBuffer> {
  if (bytes.length !== size) throw new SvqError("BAD_RECORD", `${what} has ${bytes.length} bytes instead of ${size}`);
  return viewOf(bytes);
}

/** A number below 2^52 read from a u64. @throws SvqError ADDRESS_TOO_LARGE */
export function getAddress(view: DataView<ArrayBuffer>, offset: number, what: string): number {
  const high = view.getUint32(offset + 4, true);
  if (high >= 2 ** 20) {
    const value = view.getBigUint64(offset, true);
    throw new SvqError("ADDRESS_TOO_LARGE", `${what} 0x${value.toString(16)} lies at or above 2^52`);
  }
  return high * 2 ** 32 + view.getUint32(offset, true);
}

/** Writes a number below 2^52 as u64. @throws SvqError ADDRESS_TOO_LARGE for others, negative and fractional ones too */
export function putAddress(view: DataView<ArrayBuffer>, offset: number, value: number, what: string): void {
  if (!(Number.isInteger(value) && value >= 0 && value < ADDRESS_LIMIT)) {
    throw new SvqError("ADDRESS_TOO_LARGE", `${what} ${value} is no address below 2^52`);
  }
  view.setUint32(offset, value % 2 ** 32, true);
  view.setUint32(offset + 4, Math.floor(value / 2 ** 32), true);
}

/** The 8 bytes of a u64. */
export function encodeU64(value: bigint): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(SIZE.u64);
  viewOf(bytes).setBigUint64(0, value, true);
  return bytes;
}

/** The u64 in 8 bytes. @throws SvqError BAD_RECORD unless there are 8 */
export function decodeU64(bytes: Uint8Array<ArrayBuffer>, what = "u64"): bigint {
  return requireSize(bytes, SIZE.u64, what).getBigUint64(0, true);
}

/** struct vhost_vring_state: a ring's number and a 32-bit value. */
export interface VringState {
  /** Ring. */
  index: number;
  /** Size, base, enable flag, group or ASID, as the request says. */
  num: number;
}

/** Encodes struct vhost_vring_state, 8 bytes. */
export function encodeVringState(state: VringState): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(SIZE.vringState);
  const view = viewOf(bytes);
  view.setUint32(0, state.index, true);
  view.setUint32(4, state.num, true);
  return bytes;
}

/** Decodes struct vhost_vring_state. @throws SvqError BAD_RECORD unless there are 8 bytes */
export function decodeVringState(bytes: Uint8Array<ArrayBuffer>): VringState {
  const view = requireSize(bytes, SIZE.vringState, "vring state");
  return { index: view.getUint32(0, true), num: view.getUint32(4, true) };
}

/** Encodes struct vhost_vring_file, 8 bytes. @param fd -1 unbinds */
export function encodeVringFile(index: number, fd: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(SIZE.vringFile);
  const view = viewOf(bytes);
  view.setUint32(0, index, true);
  view.setInt32(4, fd, true);
  return bytes;
}

/** struct vhost_vring_addr. The address space is the transport's: uaddr, IOVA or own addresses. */
export interface VringAddrRecord {
  /** Ring. */
  index: number;
  /** {@linkcode VHOST_VRING_F_LOG} or 0. */
  flags: number;
  /** Descriptor table. */
  desc: number;
  /** Used ring. */
  used: number;
  /** Avail ring. */
  avail: number;
  /** Where used-ring writes are logged. */
  logGuestAddr: number;
}

/** Encodes struct vhost_vring_addr, 40 bytes. @throws SvqError ADDRESS_TOO_LARGE */
export function encodeVringAddr(record: VringAddrRecord): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(SIZE.vringAddr);
  const view = viewOf(bytes);
  view.setUint32(0, record.index, true);
  view.setUint32(4, record.flags, true);
  putAddress(view, 8, record.desc, "descriptor table address");
  putAddress(view, 16, record.used, "used ring address");
  putAddress(view, 24, record.avail, "avail ring address");
  putAddress(view, 32, record.logGuestAddr, "log address");
  return bytes;
}

/** Decodes struct vhost_vring_addr. @throws SvqError BAD_RECORD for a wrong size or unknown flags, ADDRESS_TOO_LARGE */
export function decodeVringAddr(bytes: Uint8Array<ArrayBuffer>): VringAddrRecord {
  const view = requireSize(bytes, SIZE.vringAddr, "vring addresses");
  const flags = view.getUint32(4, true);
  if ((flags & ~VHOST_VRING_F_LOG) !== 0) throw new SvqError("BAD_RECORD", `vring addresses carry unknown flags 0x${flags.toString(16)}`);
  return {
    index: view.getUint32(0, true),
    flags,
    desc: getAddress(view, 8, "descriptor table address"),
    used: getAddress(view, 16, "used ring address"),
    avail: getAddress(view, 24, "avail ring address"),
    // Meaningless without the flag: a peer may leave anything in it.
    logGuestAddr: flags === 0 ? 0 : getAddress(view, 32, "log address"),
  };
}

/** struct vhost_memory_region as the kernel takes it. */
export interface KernelRegion {
  /** guest_phys_addr. */
  gpa: number;
  /** memory_size, bytes. */
  size: number;
  /** userspace_addr: an address of this process. */
  address: number;
}

/** Encodes struct vhost_memory with its regions, 8 + 32 n bytes. @throws SvqError ADDRESS_TOO_LARGE */
export function encodeKernelMemory(regions: readonly KernelRegion[]): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(SIZE.memoryHead + regions.length * SIZE.memoryRegion);
  const view = viewOf(bytes);
  view.setUint32(0, regions.length, true);
  regions.forEach((region, i) => {
    const at = SIZE.memoryHead + i * SIZE.memoryRegion;
    putAddress(view, at, region.gpa, "region address");
    putAddress(view, at + 8, region.size, "region size");
    putAddress(view, at + 16, region.address, "region's user address");
  });
  return bytes;
}

/** Encodes struct vhost_vdpa_config with its bytes: 8 + length. */
export function encodeVdpaConfig(offset: number, config: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(8 + config.length);
  const view = viewOf(bytes);
  view.setUint32(0, offset, true);
  view.setUint32(4, config.length, true);
  bytes.set(config, 8);
  return bytes;
}

/** struct vhost_iotlb_msg. */
export interface IotlbMessage {
  /** Start, bytes. */
  iova: number;
  /** Bytes. */
  size: number;
  /** What it is mapped to: an address of the front-end (vhost-user) or of this process (kernel). */
  uaddr: number;
  /** One of {@linkcode ACCESS}; 0 where the type has none. */
  perm: number;
  /** One of {@linkcode IOTLB}. */
  type: number;
}

function putIotlb(view: DataView<ArrayBuffer>, at: number, message: IotlbMessage): void {
  putAddress(view, at, message.iova, "IOVA");
  putAddress(view, at + 8, message.size, "IOTLB size");
  putAddress(view, at + 16, message.uaddr, "IOTLB user address");
  view.setUint8(at + 24, message.perm);
  view.setUint8(at + 25, message.type);
}

/** Encodes struct vhost_iotlb_msg, 32 bytes (vhost-user's IOTLB_MSG). @throws SvqError ADDRESS_TOO_LARGE */
export function encodeIotlb(message: IotlbMessage): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(SIZE.iotlb);
  putIotlb(viewOf(bytes), 0, message);
  return bytes;
}

/**
 * Decodes struct vhost_iotlb_msg. An INVALIDATE may name the whole 64-bit space: it is cut at 2^52, above which svq maps
 * nothing.
 *
 * @throws SvqError BAD_RECORD for a wrong size, type or permission, ADDRESS_TOO_LARGE
 */
export function decodeIotlb(bytes: Uint8Array<ArrayBuffer>): IotlbMessage {
  const view = requireSize(bytes, SIZE.iotlb, "IOTLB message");
  const perm = view.getUint8(24);
  const type = view.getUint8(25);
  if (type < IOTLB.MISS || type > IOTLB.BATCH_END) throw new SvqError("BAD_RECORD", `IOTLB message of unknown type ${type}`);
  if (perm > ACCESS.RW || (type === IOTLB.UPDATE && perm === 0)) throw new SvqError("BAD_RECORD", `IOTLB message with permission ${perm}`);
  if (type === IOTLB.INVALIDATE) {
    const start = view.getBigUint64(0, true);
    const limit = BigInt(ADDRESS_LIMIT);
    const iova = start < limit ? Number(start) : ADDRESS_LIMIT - 1;
    const size = view.getBigUint64(8, true);
    const room = ADDRESS_LIMIT - 1 - iova;
    return { iova, size: size < BigInt(room) ? Number(size) : room, uaddr: 0, perm, type };
  }
  const message = {
    iova: getAddress(view, 0, "IOVA"),
    size: getAddress(view, 8, "IOTLB size"),
    uaddr: getAddress(view, 16, "IOTLB user address"),
    perm,
    type,
  };
  if (message.iova + message.size > ADDRESS_LIMIT) throw new SvqError("ADDRESS_TOO_LARGE", "IOTLB range ends above 2^52");
  return message;
}

/** Encodes struct vhost_msg_v2 for write(2) to a vhost device, 72 bytes. @param asid 0 unless IOTLB_ASID is set */
export function encodeIotlbV2(message: IotlbMessage, asid: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(SIZE.msgV2);
  const view = viewOf(bytes);
  view.setUint32(0, VHOST_IOTLB_MSG_V2, true);
  view.setUint32(4, asid, true);
  putIotlb(view, 8, message);
  return bytes;
}

/** Decodes struct vhost_msg_v2 as read(2) gives it. @throws SvqError BAD_RECORD */
export function decodeIotlbV2(bytes: Uint8Array<ArrayBuffer>): { asid: number; message: IotlbMessage } {
  const view = requireSize(bytes, SIZE.msgV2, "vhost message");
  const selector = view.getUint32(0, true);
  if (selector !== VHOST_IOTLB_MSG_V2) throw new SvqError("BAD_RECORD", `vhost message of unknown kind ${selector}`);
  return { asid: view.getUint32(4, true), message: decodeIotlb(bytes.subarray(8, 8 + SIZE.iotlb)) };
}
