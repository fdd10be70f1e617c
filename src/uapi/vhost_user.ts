/**
 * vhost-user: message ids, header flags, protocol feature bits and the shape that each message must have (the vhost-user
 * protocol text of QEMU, docs/interop/vhost-user).
 *
 * @module
 */

/** Bytes of the message header: request u32, flags u32, size u32. */
export const HEADER_SIZE = 12;

/** Header flags. */
export const FLAG = {
  /** The only version there is. */
  VERSION: 1,
  /** Bits 0 and 1. */
  VERSION_MASK: 3,
  /** This is an answer. */
  REPLY: 4,
  /** The sender wants an answer to a request that has none of its own (REPLY_ACK). */
  NEED_REPLY: 8,
  /** All bits that have a meaning. */
  KNOWN: 0xf,
} as const;

/** Virtio feature bit by which a back-end says that it has protocol features. */
export const VHOST_USER_F_PROTOCOL_FEATURES = 30;

/** Descriptors that a SET_MEM_TABLE may carry, and regions that it may name. */
export const MEM_TABLE_LIMIT = 8;

/** Largest device configuration space that one message carries here, bytes (QEMU stops at 256). */
export const CONFIG_SIZE_LIMIT = 4096;

/** Rings have 8-bit numbers in SET_VRING_KICK, CALL and ERR. */
export const RING_LIMIT = 256;

/** Bit 8 of SET_VRING_KICK, CALL and ERR: no descriptor comes along. */
export const VRING_NO_FD = 0x100;

/** Requests of the front-end. */
export const REQUEST = {
  GET_FEATURES: 1,
  SET_FEATURES: 2,
  SET_OWNER: 3,
  RESET_OWNER: 4,
  SET_MEM_TABLE: 5,
  SET_LOG_BASE: 6,
  SET_LOG_FD: 7,
  SET_VRING_NUM: 8,
  SET_VRING_ADDR: 9,
  SET_VRING_BASE: 10,
  GET_VRING_BASE: 11,
  SET_VRING_KICK: 12,
  SET_VRING_CALL: 13,
  SET_VRING_ERR: 14,
  GET_PROTOCOL_FEATURES: 15,
  SET_PROTOCOL_FEATURES: 16,
  GET_QUEUE_NUM: 17,
  SET_VRING_ENABLE: 18,
  SEND_RARP: 19,
  NET_SET_MTU: 20,
  SET_BACKEND_REQ_FD: 21,
  IOTLB_MSG: 22,
  SET_VRING_ENDIAN: 23,
  GET_CONFIG: 24,
  SET_CONFIG: 25,
  CREATE_CRYPTO_SESSION: 26,
  CLOSE_CRYPTO_SESSION: 27,
  POSTCOPY_ADVISE: 28,
  POSTCOPY_LISTEN: 29,
  POSTCOPY_END: 30,
  GET_INFLIGHT_FD: 31,
  SET_INFLIGHT_FD: 32,
  GPU_SET_SOCKET: 33,
  RESET_DEVICE: 34,
  VRING_KICK: 35,
  GET_MAX_MEM_SLOTS: 36,
  ADD_MEM_REG: 37,
  REM_MEM_REG: 38,
  SET_STATUS: 39,
  GET_STATUS: 40,
  GET_SHARED_OBJECT: 41,
  SET_DEVICE_STATE_FD: 42,
  CHECK_DEVICE_STATE: 43,
} as const;

/** Requests of the back-end, on its own channel (BACKEND_REQ). */
export const BACKEND_REQUEST = {
  IOTLB_MSG: 1,
  CONFIG_CHANGE_MSG: 2,
  VRING_HOST_NOTIFIER_MSG: 3,
  VRING_CALL: 4,
  VRING_ERR: 5,
  SHARED_OBJECT_ADD: 6,
  SHARED_OBJECT_REMOVE: 7,
  SHARED_OBJECT_LOOKUP: 8,
  SHMEM_MAP: 9,
  SHMEM_UNMAP: 10,
} as const;

/** Protocol feature bits (`VHOST_USER_PROTOCOL_F_…`). */
export const PROTOCOL_FEATURE = {
  MQ: 0,
  LOG_SHMFD: 1,
  RARP: 2,
  REPLY_ACK: 3,
  MTU: 4,
  BACKEND_REQ: 5,
  CROSS_ENDIAN: 6,
  CRYPTO_SESSION: 7,
  PAGEFAULT: 8,
  CONFIG: 9,
  BACKEND_SEND_FD: 10,
  HOST_NOTIFIER: 11,
  INFLIGHT_SHMFD: 12,
  RESET_DEVICE: 13,
  INBAND_NOTIFICATIONS: 14,
  CONFIGURE_MEM_SLOTS: 15,
  STATUS: 16,
  XEN_MMAP: 17,
  SHARED_OBJECT: 18,
  DEVICE_STATE: 19,
  GET_VRING_BASE_INFLIGHT: 20,
  SHMEM: 21,
} as const;

/** Which way a message goes: who asks whom. */
export type Channel = "front-end" | "back-end";

/** What a message must look like. */
export interface MessageShape {
  /** Smallest payload, bytes. */
  minSize: number;
  /** Largest payload, bytes. */
  maxSize: number;
  /** Fewest descriptors. */
  minFds: number;
  /** Most descriptors. */
  maxFds: number;
  /** It has an answer of its own, so NEED_REPLY asks for nothing more. */
  replies: boolean;
}

function shape(minSize: number, options: { maxSize?: number; minFds?: number; maxFds?: number; replies?: boolean } = {}): MessageShape {
  const minFds = options.minFds ?? 0;
  return {
    minSize,
    maxSize: options.maxSize ?? minSize,
    minFds,
    maxFds: options.maxFds ?? minFds,
    replies: options.replies ?? false,
  };
}

const ANSWERED = { replies: true };
const CONFIG = { maxSize: 12 + CONFIG_SIZE_LIMIT };
const INFLIGHT_SIZE = 24;
const REGION_MESSAGE_SIZE = 40;

const FRONT_END_SHAPES: Readonly<Record<number, MessageShape>> = {
  [REQUEST.GET_FEATURES]: shape(0, ANSWERED),
  [REQUEST.SET_FEATURES]: shape(8),
  [REQUEST.SET_OWNER]: shape(0),
  [REQUEST.RESET_OWNER]: shape(0),
  [REQUEST.SET_MEM_TABLE]: shape(8, { maxSize: 8 + 32 * MEM_TABLE_LIMIT, maxFds: MEM_TABLE_LIMIT }),
  // Whether it is answered hangs on LOG_SHMFD; so does its size.
  [REQUEST.SET_LOG_BASE]: shape(8, { maxSize: 16, maxFds: 1, replies: true }),
  [REQUEST.SET_LOG_FD]: shape(0, { maxSize: 8, minFds: 1 }),
  [REQUEST.SET_VRING_NUM]: shape(8),
  [REQUEST.SET_VRING_ADDR]: shape(40),
  [REQUEST.SET_VRING_BASE]: shape(8),
  [REQUEST.GET_VRING_BASE]: shape(8, ANSWERED),
  [REQUEST.SET_VRING_KICK]: shape(8, { maxFds: 1 }),
  [REQUEST.SET_VRING_CALL]: shape(8, { maxFds: 1 }),
  [REQUEST.SET_VRING_ERR]: shape(8, { maxFds: 1 }),
  [REQUEST.GET_PROTOCOL_FEATURES]: shape(0, ANSWERED),
  [REQUEST.SET_PROTOCOL_FEATURES]: shape(8),
  [REQUEST.GET_QUEUE_NUM]: shape(0, ANSWERED),
  [REQUEST.SET_VRING_ENABLE]: shape(8),
  [REQUEST.SEND_RARP]: shape(8),
  [REQUEST.NET_SET_MTU]: shape(8),
  [REQUEST.SET_BACKEND_REQ_FD]: shape(0, { maxSize: 8, minFds: 1 }),
  [REQUEST.IOTLB_MSG]: shape(32, ANSWERED),
  [REQUEST.SET_VRING_ENDIAN]: shape(8),
  [REQUEST.GET_CONFIG]: shape(12, { ...CONFIG, replies: true }),
  [REQUEST.SET_CONFIG]: shape(12, CONFIG),
  [REQUEST.CREATE_CRYPTO_SESSION]: shape(0, { maxSize: 4096, replies: true }),
  [REQUEST.CLOSE_CRYPTO_SESSION]: shape(8),
  [REQUEST.POSTCOPY_ADVISE]: shape(0, ANSWERED),
  [REQUEST.POSTCOPY_LISTEN]: shape(0),
  [REQUEST.POSTCOPY_END]: shape(0, ANSWERED),
  [REQUEST.GET_INFLIGHT_FD]: shape(INFLIGHT_SIZE, ANSWERED),
  [REQUEST.SET_INFLIGHT_FD]: shape(INFLIGHT_SIZE, { minFds: 1 }),
  [REQUEST.GPU_SET_SOCKET]: shape(0, { maxSize: 8, minFds: 1 }),
  [REQUEST.RESET_DEVICE]: shape(0),
  [REQUEST.VRING_KICK]: shape(8),
  [REQUEST.GET_MAX_MEM_SLOTS]: shape(0, ANSWERED),
  [REQUEST.ADD_MEM_REG]: shape(REGION_MESSAGE_SIZE, { minFds: 1 }),
  // An fd here is a mistake that some front-ends make; it is closed.
  [REQUEST.REM_MEM_REG]: shape(REGION_MESSAGE_SIZE, { maxFds: 1 }),
  [REQUEST.SET_STATUS]: shape(8),
  [REQUEST.GET_STATUS]: shape(0, ANSWERED),
  [REQUEST.GET_SHARED_OBJECT]: shape(16, ANSWERED),
  [REQUEST.SET_DEVICE_STATE_FD]: shape(8, { minFds: 1, replies: true }),
  [REQUEST.CHECK_DEVICE_STATE]: shape(0, ANSWERED),
};

const BACK_END_SHAPES: Readonly<Record<number, MessageShape>> = {
  [BACKEND_REQUEST.IOTLB_MSG]: shape(32),
  [BACKEND_REQUEST.CONFIG_CHANGE_MSG]: shape(0),
  [BACKEND_REQUEST.VRING_HOST_NOTIFIER_MSG]: shape(24, { maxFds: 1 }),
  [BACKEND_REQUEST.VRING_CALL]: shape(8),
  [BACKEND_REQUEST.VRING_ERR]: shape(8),
  [BACKEND_REQUEST.SHARED_OBJECT_ADD]: shape(16),
  [BACKEND_REQUEST.SHARED_OBJECT_REMOVE]: shape(16),
  [BACKEND_REQUEST.SHARED_OBJECT_LOOKUP]: shape(16),
  [BACKEND_REQUEST.SHMEM_MAP]: shape(0, { maxSize: 256, maxFds: 1 }),
  [BACKEND_REQUEST.SHMEM_UNMAP]: shape(0, { maxSize: 256 }),
};

// Ids that came after this was written: bounded, and never with descriptors, so that they can be skipped or refused.
const UNKNOWN_SHAPE = shape(0, { maxSize: 4096 });

// An answer may be empty (an error, or SET_LOG_BASE's) up to a configuration space; GET_INFLIGHT_FD and a few others bring one fd.
const REPLY_SHAPES: Readonly<Record<number, MessageShape>> = {
  [REQUEST.GET_CONFIG]: shape(0, CONFIG),
  [REQUEST.SET_LOG_BASE]: shape(0, { maxSize: 16 }),
  [REQUEST.GET_INFLIGHT_FD]: shape(INFLIGHT_SIZE, { maxFds: 1 }),
  [REQUEST.SET_DEVICE_STATE_FD]: shape(8, { maxFds: 1 }),
};
const REPLY_SHAPE = shape(8);

/** The shape of a request, on the channel whose asker is `channel`; a bounded, fd-less one for ids without a meaning here. */
export function requestShape(channel: Channel, request: number): MessageShape {
  return (channel === "front-end" ? FRONT_END_SHAPES : BACK_END_SHAPES)[request] ?? UNKNOWN_SHAPE;
}

/** Is this a request id with a meaning here? */
export function isKnownRequest(channel: Channel, request: number): boolean {
  return (channel === "front-end" ? FRONT_END_SHAPES : BACK_END_SHAPES)[request] !== undefined;
}

/** The shape of the answer to a request. Answers without an entry of their own are a u64 or a vring state. */
export function replyShape(channel: Channel, request: number): MessageShape {
  return channel === "front-end" ? REPLY_SHAPES[request] ?? REPLY_SHAPE : REPLY_SHAPE;
}

const FRONT_END_NAMES = new Map<number, string>(Object.entries(REQUEST).map(([name, id]) => [id, name]));
const BACK_END_NAMES = new Map<number, string>(Object.entries(BACKEND_REQUEST).map(([name, id]) => [id, name]));

/** `SET_VRING_ADDR`; `request 77` for one without a name here. */
export function requestName(channel: Channel, request: number): string {
  return (channel === "front-end" ? FRONT_END_NAMES : BACK_END_NAMES).get(request) ?? `request ${request}`;
}
