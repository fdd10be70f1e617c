/**
 * What the back-end server offers and how it says no.
 *
 * @module
 */
import { bitsOf } from "../uapi/bits.ts";
import { decodeVringState, encodeU64, type VringState } from "../uapi/vhost.ts";
import { PROTOCOL_FEATURE, REQUEST } from "../uapi/vhost_user.ts";
import { protocolError, requireRing } from "./message.ts";

const NO_BYTES = new Uint8Array(0);

/** What a back-end server offers by default; CONFIG, INFLIGHT_SHMFD, RARP, MTU and DEVICE_STATE only where the backend can do them. */
export const SERVER_PROTOCOL_FEATURES: bigint = bitsOf([
  PROTOCOL_FEATURE.MQ,
  PROTOCOL_FEATURE.LOG_SHMFD,
  PROTOCOL_FEATURE.RARP,
  PROTOCOL_FEATURE.REPLY_ACK,
  PROTOCOL_FEATURE.MTU,
  PROTOCOL_FEATURE.BACKEND_REQ,
  PROTOCOL_FEATURE.CONFIG,
  PROTOCOL_FEATURE.INFLIGHT_SHMFD,
  PROTOCOL_FEATURE.RESET_DEVICE,
  PROTOCOL_FEATURE.CONFIGURE_MEM_SLOTS,
  PROTOCOL_FEATURE.STATUS,
  PROTOCOL_FEATURE.DEVICE_STATE,
]);

/** Answers that say "failed" to requests that have an answer of their own; all others of those cannot say it. */
export const FAILED_ANSWERS: Readonly<Record<number, () => Uint8Array<ArrayBuffer>>> = {
  [REQUEST.GET_CONFIG]: () => NO_BYTES,
  // A region of no bytes is none.
  [REQUEST.GET_INFLIGHT_FD]: () => new Uint8Array(24),
  [REQUEST.IOTLB_MSG]: () => encodeU64(1n),
  [REQUEST.POSTCOPY_END]: () => encodeU64(1n),
  [REQUEST.CHECK_DEVICE_STATE]: () => encodeU64(1n),
  // Bits 0 to 7 are the error, bit 8 says that no descriptor comes back.
  [REQUEST.SET_DEVICE_STATE_FD]: () => encodeU64(0x101n),
};

/** Requests whose payload begins with a ring's number. */
export const RING_REQUESTS: ReadonlySet<number> = new Set<number>([
  REQUEST.SET_VRING_NUM,
  REQUEST.SET_VRING_ADDR,
  REQUEST.SET_VRING_BASE,
  REQUEST.SET_VRING_KICK,
  REQUEST.SET_VRING_CALL,
  REQUEST.SET_VRING_ERR,
  REQUEST.SET_VRING_ENABLE,
]);

/** Returns the number of a ring that a peer named. @throws SvqError VHOST_USER_PROTOCOL above 255 */
export function requireWireRing(index: number): number {
  try {
    return requireRing(index);
  } catch (error) {
    throw protocolError(error instanceof Error ? error.message : String(error));
  }
}

/** Decodes a vring state of a ring that can exist. @throws SvqError VHOST_USER_PROTOCOL, BAD_RECORD */
export function ringState(payload: Uint8Array<ArrayBuffer>): VringState {
  const state = decodeVringState(payload);
  requireWireRing(state.index);
  return state;
}
