/**
 * vhost-user messages in words: what a recorder shows and tests compare. Nothing here is trusted or acted upon, so a
 * payload that does not have the right shape is shown as bytes.
 *
 * @module
 */
import { decodeIotlb, decodeVringAddr, decodeVringState, viewOf } from "../uapi/vhost.ts";
import { BACKEND_REQUEST, type Channel, FLAG, REQUEST, requestName, VRING_NO_FD } from "../uapi/vhost_user.ts";
import { decodeConfig, decodeLog, decodeMemTable, decodeRegion, type WireRegion } from "./message.ts";

/** What a message says: names of its fields and their values; u64 words and addresses as `0x…`. */
export type MessageFields = Record<string, unknown>;

/** A message in words. */
export interface DescribedMessage {
  /** `SET_VRING_ADDR`. */
  name: string;
  /** Is it an answer? */
  reply: boolean;
  /** Does the sender want an answer to a request that has none of its own? */
  needReply: boolean;
  /** What it says. */
  fields: MessageFields;
}

type Decoder = (payload: Uint8Array<ArrayBuffer>) => MessageFields;

const hex = (value: number | bigint): string => `0x${value.toString(16)}`;
const bytesText = (bytes: Uint8Array): string => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
const word = (payload: Uint8Array<ArrayBuffer>): bigint => viewOf(payload).getBigUint64(0, true);

const none: Decoder = () => ({});
const hexWord: Decoder = (payload) => ({ value: hex(word(payload)) });
const count: Decoder = (payload) => ({ value: Number(word(payload)) });
const state: Decoder = (payload) => {
  const { index, num } = decodeVringState(payload);
  return { ring: index, value: num };
};
const ringFd: Decoder = (payload) => {
  const value = Number(word(payload));
  return { ring: value & 0xff, polled: (value & VRING_NO_FD) !== 0 };
};
const oneRegion = (region: WireRegion): MessageFields => ({
  gpa: hex(region.gpa),
  size: hex(region.size),
  uaddr: hex(region.uaddr),
  offset: hex(region.mmapOffset),
});
const config: Decoder = (payload) => {
  if (payload.length === 0) return { refused: true };
  const { offset, flags, bytes } = decodeConfig(payload);
  return { offset, size: bytes.length, flags, bytes: bytesText(bytes) };
};

const REQUEST_DECODERS: Readonly<Record<number, Decoder>> = {
  [REQUEST.SET_FEATURES]: hexWord,
  [REQUEST.SET_PROTOCOL_FEATURES]: hexWord,
  [REQUEST.SET_MEM_TABLE]: (payload) => ({ regions: decodeMemTable(payload).map(oneRegion) }),
  [REQUEST.ADD_MEM_REG]: (payload) => oneRegion(decodeRegion(payload)),
  [REQUEST.REM_MEM_REG]: (payload) => oneRegion(decodeRegion(payload)),
  [REQUEST.SET_LOG_BASE]: (payload) => payload.length === 16 ? { ...decodeLog(payload) } : hexWord(payload),
  [REQUEST.SET_VRING_NUM]: state,
  [REQUEST.SET_VRING_BASE]: state,
  [REQUEST.GET_VRING_BASE]: (payload) => ({ ring: decodeVringState(payload).index }),
  [REQUEST.SET_VRING_ENABLE]: state,
  [REQUEST.SET_VRING_ADDR]: (payload) => {
    const { index, flags, desc, used, avail, logGuestAddr } = decodeVringAddr(payload);
    return { ring: index, flags, desc: hex(desc), used: hex(used), avail: hex(avail), log: hex(logGuestAddr) };
  },
  [REQUEST.SET_VRING_KICK]: ringFd,
  [REQUEST.SET_VRING_CALL]: ringFd,
  [REQUEST.SET_VRING_ERR]: ringFd,
  [REQUEST.GET_CONFIG]: (payload) => {
    const { offset, size, flags } = config(payload);
    return { offset, size, flags };
  },
  [REQUEST.SET_CONFIG]: config,
  [REQUEST.SEND_RARP]: (payload) => ({ mac: bytesText(payload.subarray(0, 6)) }),
  [REQUEST.NET_SET_MTU]: count,
  [REQUEST.SET_STATUS]: hexWord,
  [REQUEST.SET_DEVICE_STATE_FD]: (payload) => {
    const view = viewOf(payload);
    return { direction: view.getUint32(0, true) === 0 ? "save" : "load", phase: view.getUint32(4, true) };
  },
  [REQUEST.IOTLB_MSG]: (payload) => ({ ...decodeIotlb(payload) }),
};

const REPLY_DECODERS: Readonly<Record<number, Decoder>> = {
  [REQUEST.GET_FEATURES]: hexWord,
  [REQUEST.GET_PROTOCOL_FEATURES]: hexWord,
  [REQUEST.GET_QUEUE_NUM]: count,
  [REQUEST.GET_MAX_MEM_SLOTS]: count,
  [REQUEST.GET_VRING_BASE]: state,
  [REQUEST.GET_CONFIG]: config,
  [REQUEST.GET_STATUS]: hexWord,
  [REQUEST.SET_DEVICE_STATE_FD]: hexWord,
  [REQUEST.CHECK_DEVICE_STATE]: hexWord,
  [REQUEST.SET_LOG_BASE]: none,
};

const BACK_END_DECODERS: Readonly<Record<number, Decoder>> = {
  [BACKEND_REQUEST.IOTLB_MSG]: (payload) => ({ ...decodeIotlb(payload) }),
};

function decoderOf(channel: Channel, request: number, reply: boolean): Decoder {
  if (reply) return (channel === "front-end" ? REPLY_DECODERS[request] : undefined) ?? ((payload) => ({ ack: Number(word(payload)) }));
  const decoders = channel === "front-end" ? REQUEST_DECODERS : BACK_END_DECODERS;
  return decoders[request] ?? ((payload) => payload.length === 0 ? {} : { bytes: bytesText(payload) });
}

/** Puts a message into words. Never throws. @param channel whose requests travel where it was seen */
export function describeMessage(channel: Channel, request: number, flags: number, payload: Uint8Array<ArrayBuffer>): DescribedMessage {
  const reply = (flags & FLAG.REPLY) !== 0;
  let fields: MessageFields;
  try {
    fields = decoderOf(channel, request, reply)(payload);
  } catch {
    fields = { bytes: bytesText(payload) };
  }
  return { name: requestName(channel, request), reply, needReply: (flags & FLAG.NEED_REPLY) !== 0, fields };
}

/** Fields on one line: `ring=0 value=256`. */
export function fieldsText(fields: MessageFields): string {
  const text = (value: unknown): string => {
    if (Array.isArray(value)) return `[${value.map((item) => `{${text(item)}}`).join(" ")}]`;
    return typeof value === "object" && value !== null ? fieldsText(value as MessageFields) : String(value);
  };
  return Object.entries(fields).filter(([, value]) => value !== undefined && value !== false).map(([name, value]) =>
    `${name}=${text(value)}`
  )
    .join(" ");
}
