/**
 * Generic netlink and the vdpa family: message layout and numbers (linux/netlink.h, linux/genetlink.h, linux/vdpa.h). Data,
 * no I/O.
 *
 * @module
 */
import { SvqError } from "../errors.ts";

/** Message types that every family has. */
export const NLMSG = { ERROR: 2, DONE: 3, CONTROLLER: 0x10 } as const;

/** Header flags. */
export const NLM_F = { REQUEST: 1, MULTI: 2, ACK: 4, DUMP: 0x300 } as const;

/** The controller family, which gives out the ids of the others. */
export const CTRL = { CMD_GETFAMILY: 3, ATTR_FAMILY_ID: 1, ATTR_FAMILY_NAME: 2 } as const;

/** Commands of the family "vdpa"; DEV_NEW and DEV_DEL want CAP_NET_ADMIN. */
export const VDPA_CMD = { MGMTDEV_GET: 2, DEV_NEW: 3, DEV_DEL: 4, DEV_GET: 5, DEV_CONFIG_GET: 6 } as const;

/** Attributes of the family "vdpa" (`VDPA_ATTR_…`). */
export const VDPA_ATTR = {
  MGMTDEV_BUS_NAME: 1,
  MGMTDEV_DEV_NAME: 2,
  MGMTDEV_SUPPORTED_CLASSES: 3,
  DEV_NAME: 4,
  DEV_ID: 5,
  DEV_VENDOR_ID: 6,
  DEV_MAX_VQS: 7,
  DEV_MAX_VQ_SIZE: 8,
  DEV_MIN_VQ_SIZE: 9,
  DEV_NEGOTIATED_FEATURES: 14,
  DEV_MGMTDEV_MAX_VQS: 15,
  DEV_SUPPORTED_FEATURES: 16,
} as const;

const HEADER = 16;
const GENERIC_HEADER = 4;
const ATTRIBUTE_HEADER = 4;

function align(size: number): number {
  return (size + 3) & ~3;
}

/** A generic netlink request. */
export interface NetlinkRequest {
  /** Family id. */
  type: number;
  /** Bits of {@linkcode NLM_F}. */
  flags: number;
  /** Comes back in the answers. */
  sequence: number;
  /** Command of the family. */
  command: number;
  /** Attributes: number and NUL-terminated text. */
  attributes?: readonly (readonly [number, string])[];
}

/** Encodes a request, version 1 of its family. */
export function encodeNetlink(request: NetlinkRequest): Uint8Array<ArrayBuffer> {
  const attributes = (request.attributes ?? []).map(([type, text]) => ({ type, bytes: new TextEncoder().encode(text + "\0") }));
  const payload = attributes.reduce((sum, { bytes }) => sum + align(ATTRIBUTE_HEADER + bytes.length), 0);
  const message = new Uint8Array(HEADER + GENERIC_HEADER + payload);
  const view = new DataView(message.buffer);
  view.setUint32(0, message.length, true);
  view.setUint16(4, request.type, true);
  view.setUint16(6, request.flags, true);
  view.setUint32(8, request.sequence, true);
  view.setUint8(HEADER, request.command);
  view.setUint8(HEADER + 1, 1);
  let at = HEADER + GENERIC_HEADER;
  for (const { type, bytes } of attributes) {
    view.setUint16(at, ATTRIBUTE_HEADER + bytes.length, true);
    view.setUint16(at + 2, type, true);
    message.set(bytes, at + ATTRIBUTE_HEADER);
    at += align(ATTRIBUTE_HEADER + bytes.length);
  }
  return message;
}

/** One message of an answer. */
export interface NetlinkMessage {
  /** Family id, or one of {@linkcode NLMSG}. */
  type: number;
  /** Bits of {@linkcode NLM_F}. */
  flags: number;
  /** Of an ERROR (0: acknowledged) or a DONE: errno, positive. */
  errno: number;
  /** Attributes by number; of other families' messages only. */
  attributes: Map<number, Uint8Array<ArrayBuffer>>;
}

/** Decodes the messages of one datagram. @throws SvqError BAD_RECORD for lengths that do not fit */
export function decodeNetlink(datagram: Uint8Array<ArrayBuffer>): NetlinkMessage[] {
  const view = new DataView(datagram.buffer, datagram.byteOffset, datagram.length);
  const messages: NetlinkMessage[] = [];
  for (let at = 0; at < datagram.length;) {
    const length = at + HEADER <= datagram.length ? view.getUint32(at, true) : 0;
    if (length < HEADER || at + length > datagram.length) throw bad(`message of ${length} bytes`);
    const type = view.getUint16(at + 4, true);
    const flags = view.getUint16(at + 6, true);
    const body = datagram.subarray(at + HEADER, at + length);
    const message: NetlinkMessage = { type, flags, errno: 0, attributes: new Map() };
    if (type === NLMSG.ERROR || type === NLMSG.DONE) message.errno = body.length >= 4 ? -view.getInt32(at + HEADER, true) : 0;
    else if (body.length >= GENERIC_HEADER) message.attributes = decodeAttributes(body.subarray(GENERIC_HEADER));
    messages.push(message);
    at += align(length);
  }
  return messages;
}

function decodeAttributes(bytes: Uint8Array<ArrayBuffer>): Map<number, Uint8Array<ArrayBuffer>> {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const attributes = new Map<number, Uint8Array<ArrayBuffer>>();
  for (let at = 0; at + ATTRIBUTE_HEADER <= bytes.length;) {
    const length = view.getUint16(at, true);
    if (length < ATTRIBUTE_HEADER || at + length > bytes.length) throw bad(`attribute of ${length} bytes`);
    // The two top bits are flags.
    attributes.set(view.getUint16(at + 2, true) & 0x3fff, bytes.slice(at + ATTRIBUTE_HEADER, at + length));
    at += align(length);
  }
  return attributes;
}

function bad(what: string): SvqError {
  return new SvqError("BAD_RECORD", `Netlink answer holds a ${what}`);
}

/** Text of an attribute, without its NUL. */
export function attributeText(bytes: Uint8Array<ArrayBuffer> | undefined): string | undefined {
  return bytes === undefined ? undefined : new TextDecoder().decode(bytes).replace(/\0.*$/s, "");
}

/** Unsigned number of an attribute of 1, 2 or 4 bytes. */
export function attributeNumber(bytes: Uint8Array<ArrayBuffer> | undefined): number | undefined {
  if (bytes === undefined) return undefined;
  return bytes.reduceRight((value, byte) => value * 256 + byte, 0);
}
