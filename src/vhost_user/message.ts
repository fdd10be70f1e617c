/**
 * vhost-user messages as bytes: the header, and the payloads that are not records of the kernel's vhost interface
 * (those are in uapi/vhost.ts). Everything that is decoded comes from a peer and is checked here before anybody uses it.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { ADDRESS_LIMIT } from "../memory/region.ts";
import { decodeU64, encodeU64, getAddress, putAddress, requireSize, viewOf } from "../uapi/vhost.ts";
import {
  type Channel,
  CONFIG_SIZE_LIMIT,
  FLAG,
  HEADER_SIZE,
  MEM_TABLE_LIMIT,
  replyShape,
  requestName,
  requestShape,
  RING_LIMIT,
  VRING_NO_FD,
} from "../uapi/vhost_user.ts";

const CONFIG_HEAD_SIZE = 12;
const REGION_SIZE = 32;
const LOG_SIZE = 16;
const KNOWN_CONFIG_FLAGS = 3;

/** What the peer did wrong on the wire: the connection cannot go on. */
export function protocolError(message: string, cause?: unknown): SvqError {
  return new SvqError("VHOST_USER_PROTOCOL", message, cause === undefined ? {} : { cause });
}

/** A message header. */
export interface Header {
  /** Request id; an answer repeats it. */
  request: number;
  /** Bits of {@linkcode FLAG}. */
  flags: number;
  /** Payload bytes. */
  size: number;
}

/** Encodes a header, 12 bytes, and the payload behind it. */
export function encodeMessage(request: number, flags: number, payload: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(HEADER_SIZE + payload.length);
  const view = viewOf(bytes);
  view.setUint32(0, request, true);
  view.setUint32(4, flags, true);
  view.setUint32(8, payload.length, true);
  bytes.set(payload, HEADER_SIZE);
  return bytes;
}

/** Decodes a header; what it says is checked by {@linkcode checkHeader}. @throws SvqError BAD_RECORD unless there are 12 bytes */
export function decodeHeader(bytes: Uint8Array<ArrayBuffer>): Header {
  const view = requireSize(bytes, HEADER_SIZE, "vhost-user header");
  return { request: view.getUint32(0, true), flags: view.getUint32(4, true), size: view.getUint32(8, true) };
}

/**
 * Checks a header and the number of descriptors that came with it, before a payload is read.
 *
 * @param channel whose requests this connection carries
 * @param expect what the peer sends here: requests, or answers to ours
 * @throws SvqError VHOST_USER_PROTOCOL for a wrong version, direction, reserved flags, size or number of descriptors
 */
export function checkHeader(header: Header, fdCount: number, channel: Channel, expect: "requests" | "replies"): void {
  const name = requestName(channel, header.request);
  const what = expect === "requests" ? name : `answer to ${name}`;
  if ((header.flags & FLAG.VERSION_MASK) !== FLAG.VERSION) {
    throw protocolError(`${what}: version ${header.flags & FLAG.VERSION_MASK} in the header instead of 1`);
  }
  if ((header.flags & ~FLAG.KNOWN) !== 0) throw protocolError(`${what}: reserved flags 0x${(header.flags >>> 0).toString(16)}`);
  if (((header.flags & FLAG.REPLY) !== 0) !== (expect === "replies")) {
    throw protocolError(expect === "replies" ? `${what}: it lacks the reply flag` : `${what}: a reply where a request was due`);
  }
  if (expect === "replies" && header.flags !== (FLAG.VERSION | FLAG.REPLY)) {
    throw protocolError(`${what}: flags 0x${header.flags.toString(16)} instead of 0x5`);
  }
  const shape = expect === "requests" ? requestShape(channel, header.request) : replyShape(channel, header.request);
  if (header.size < shape.minSize || header.size > shape.maxSize) {
    const range = shape.minSize === shape.maxSize ? `${shape.minSize}` : `${shape.minSize} to ${shape.maxSize}`;
    throw protocolError(`${what}: ${header.size} bytes of payload instead of ${range}`);
  }
  if (fdCount < shape.minFds || fdCount > shape.maxFds) {
    const range = shape.minFds === shape.maxFds ? `${shape.minFds}` : `${shape.minFds} to ${shape.maxFds}`;
    throw protocolError(`${what}: ${fdCount} file descriptors instead of ${range}`);
  }
}

/** A memory region on the wire; its descriptor rides with the message. */
export interface WireRegion {
  /** Guest address, bytes. */
  gpa: number;
  /** Bytes. */
  size: number;
  /** Address in the front-end, bytes. */
  uaddr: number;
  /** Where it starts in the file, bytes. */
  mmapOffset: number;
}

function putRegion(view: DataView<ArrayBuffer>, at: number, region: WireRegion): void {
  putAddress(view, at, region.gpa, "region address");
  putAddress(view, at + 8, region.size, "region size");
  putAddress(view, at + 16, region.uaddr, "region's user address");
  putAddress(view, at + 24, region.mmapOffset, "region's file offset");
}

function getRegion(view: DataView<ArrayBuffer>, at: number): WireRegion {
  const region = {
    gpa: getAddress(view, at, "region address"),
    size: getAddress(view, at + 8, "region size"),
    uaddr: getAddress(view, at + 16, "region's user address"),
    mmapOffset: getAddress(view, at + 24, "region's file offset"),
  };
  if (region.size === 0) throw protocolError("Memory region of 0 bytes");
  if (region.gpa + region.size > ADDRESS_LIMIT) throw protocolError("Memory region ends above guest address 2^52");
  if (region.uaddr + region.size > ADDRESS_LIMIT) throw protocolError("Memory region ends above user address 2^52");
  if (region.mmapOffset + region.size > ADDRESS_LIMIT) throw protocolError("Memory region ends above file offset 2^52");
  return region;
}

/** Encodes SET_MEM_TABLE: 8 + 32 n bytes. @throws SvqError TOO_MANY_REGIONS above 8 */
export function encodeMemTable(regions: readonly WireRegion[]): Uint8Array<ArrayBuffer> {
  if (regions.length > MEM_TABLE_LIMIT) {
    throw new SvqError("TOO_MANY_REGIONS", `${regions.length} memory regions in a table that holds ${MEM_TABLE_LIMIT}`);
  }
  const bytes = new Uint8Array(8 + REGION_SIZE * regions.length);
  const view = viewOf(bytes);
  view.setUint32(0, regions.length, true);
  regions.forEach((region, i) => putRegion(view, 8 + REGION_SIZE * i, region));
  return bytes;
}

/** Decodes SET_MEM_TABLE. @throws SvqError VHOST_USER_PROTOCOL unless count and size agree and each region is sound, ADDRESS_TOO_LARGE */
export function decodeMemTable(bytes: Uint8Array<ArrayBuffer>): WireRegion[] {
  if (bytes.length < 8) throw protocolError(`Memory table of ${bytes.length} bytes`);
  const view = viewOf(bytes);
  const count = view.getUint32(0, true);
  if (count > MEM_TABLE_LIMIT || bytes.length !== 8 + REGION_SIZE * count) {
    throw protocolError(`Memory table of ${bytes.length} bytes that says it has ${count} regions`);
  }
  return Array.from({ length: count }, (_, i) => getRegion(view, 8 + REGION_SIZE * i));
}

/** Encodes ADD_MEM_REG and REM_MEM_REG: 8 bytes of padding, then the region. */
export function encodeRegion(region: WireRegion): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(8 + REGION_SIZE);
  putRegion(viewOf(bytes), 8, region);
  return bytes;
}

/** Decodes ADD_MEM_REG and REM_MEM_REG. @throws SvqError BAD_RECORD, VHOST_USER_PROTOCOL or ADDRESS_TOO_LARGE */
export function decodeRegion(bytes: Uint8Array<ArrayBuffer>): WireRegion {
  return getRegion(requireSize(bytes, 8 + REGION_SIZE, "memory region message"), 8);
}

/** Where a dirty log lies in the file that comes along. */
export interface WireLog {
  /** Bytes. */
  size: number;
  /** Bytes. */
  offset: number;
}

/** Encodes SET_LOG_BASE with LOG_SHMFD, and its answer: 16 bytes. */
export function encodeLog(log: WireLog): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(LOG_SIZE);
  const view = viewOf(bytes);
  putAddress(view, 0, log.size, "log size");
  putAddress(view, 8, log.offset, "log offset");
  return bytes;
}

/** Decodes SET_LOG_BASE with LOG_SHMFD. @throws SvqError BAD_RECORD, VHOST_USER_PROTOCOL for an empty log, ADDRESS_TOO_LARGE */
export function decodeLog(bytes: Uint8Array<ArrayBuffer>): WireLog {
  const view = requireSize(bytes, LOG_SIZE, "log message");
  const log = { size: getAddress(view, 0, "log size"), offset: getAddress(view, 8, "log offset") };
  if (log.size === 0) throw protocolError("Dirty log of 0 bytes");
  if (log.size + log.offset > ADDRESS_LIMIT) throw protocolError("Dirty log ends above 2^52");
  return log;
}

/** The payload of SET_VRING_KICK, CALL and ERR. */
export interface VringFd {
  /** Ring, below 256. */
  index: number;
  /** Does an eventfd come along? */
  hasFd: boolean;
}

/** Encodes SET_VRING_KICK, CALL and ERR. @throws SvqError BAD_INDEX for rings above 255 */
export function encodeVringFd(vring: VringFd): Uint8Array<ArrayBuffer> {
  requireRing(vring.index);
  return encodeU64(BigInt(vring.index | (vring.hasFd ? 0 : VRING_NO_FD)));
}

/** Decodes SET_VRING_KICK, CALL and ERR. @throws SvqError VHOST_USER_PROTOCOL for reserved bits and where bit 8 and the descriptor disagree */
export function decodeVringFd(bytes: Uint8Array<ArrayBuffer>, fdCount: number): VringFd {
  const word = decodeU64(bytes, "ring and descriptor flag");
  if (word >> 9n !== 0n) throw protocolError(`Ring word 0x${word.toString(16)} has reserved bits`);
  const hasFd = (Number(word) & VRING_NO_FD) === 0;
  if (fdCount !== (hasFd ? 1 : 0)) {
    throw protocolError(`Ring ${Number(word) & 0xff}: ${fdCount} file descriptors, but the message says ${hasFd ? "1" : "none"}`);
  }
  return { index: Number(word) & 0xff, hasFd };
}

/** Returns `index`. @throws SvqError BAD_INDEX unless vhost-user can name the ring */
export function requireRing(index: number): number {
  if (Number.isInteger(index) && index >= 0 && index < RING_LIMIT) return index;
  throw new SvqError("BAD_INDEX", `There is no ring ${index}`);
}

/** The payload of GET_CONFIG and SET_CONFIG. */
export interface ConfigMessage {
  /** Where in the configuration space, bytes. */
  offset: number;
  /** 0 for the driver's writes, 1 for a migration's. */
  flags: number;
  /** The bytes; zeros in a GET_CONFIG request. */
  bytes: Uint8Array<ArrayBuffer>;
}

/** Encodes GET_CONFIG and SET_CONFIG: 12 bytes and the configuration. */
export function encodeConfig(config: ConfigMessage): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(CONFIG_HEAD_SIZE + config.bytes.length);
  const view = viewOf(bytes);
  view.setUint32(0, config.offset, true);
  view.setUint32(4, config.bytes.length, true);
  view.setUint32(8, config.flags, true);
  bytes.set(config.bytes, CONFIG_HEAD_SIZE);
  return bytes;
}

/** Decodes GET_CONFIG and SET_CONFIG. @throws SvqError VHOST_USER_PROTOCOL unless the sizes agree and lie inside 4096 bytes */
export function decodeConfig(bytes: Uint8Array<ArrayBuffer>): ConfigMessage {
  if (bytes.length < CONFIG_HEAD_SIZE) throw protocolError(`Configuration message of ${bytes.length} bytes`);
  const view = viewOf(bytes);
  const offset = view.getUint32(0, true);
  const size = view.getUint32(4, true);
  const flags = view.getUint32(8, true);
  if (bytes.length !== CONFIG_HEAD_SIZE + size) {
    throw protocolError(`Configuration message of ${bytes.length} bytes that says it carries ${size}`);
  }
  if (offset + size > CONFIG_SIZE_LIMIT) throw protocolError(`Configuration bytes ${offset}+${size} lie outside ${CONFIG_SIZE_LIMIT}`);
  if ((flags & ~KNOWN_CONFIG_FLAGS) !== 0) throw protocolError(`Configuration message with unknown flags 0x${flags.toString(16)}`);
  return { offset, flags, bytes: bytes.slice(CONFIG_HEAD_SIZE) };
}

/** The payload of GET_INFLIGHT_FD, of its answer, and of SET_INFLIGHT_FD. */
export interface WireInflight {
  /** Bytes of the region. */
  size: number;
  /** Where it begins in the file, bytes. */
  offset: number;
  /** Queues. */
  queues: number;
  /** Descriptors per queue. */
  num: number;
}

const INFLIGHT_SIZE = 24;

/** Encodes GET_INFLIGHT_FD, its answer and SET_INFLIGHT_FD: 24 bytes. */
export function encodeInflight(inflight: WireInflight): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(INFLIGHT_SIZE);
  const view = viewOf(bytes);
  putAddress(view, 0, inflight.size, "in-flight region size");
  putAddress(view, 8, inflight.offset, "in-flight region offset");
  view.setUint16(16, inflight.queues, true);
  view.setUint16(18, inflight.num, true);
  return bytes;
}

/** Decodes the same. @throws SvqError BAD_RECORD, VHOST_USER_PROTOCOL above 2^52, ADDRESS_TOO_LARGE */
export function decodeInflight(bytes: Uint8Array<ArrayBuffer>): WireInflight {
  const view = requireSize(bytes, INFLIGHT_SIZE, "in-flight message");
  const size = getAddress(view, 0, "in-flight region size");
  const offset = getAddress(view, 8, "in-flight region offset");
  if (size + offset > ADDRESS_LIMIT) throw protocolError("In-flight region ends above 2^52");
  return { size, offset, queues: view.getUint16(16, true), num: view.getUint16(18, true) };
}

/** Encodes SEND_RARP: 6 bytes of MAC address in a u64. */
export function encodeMac(mac: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> {
  if (mac.length !== 6) throw new SvqError("BAD_RECORD", `A MAC address of ${mac.length} bytes`);
  const bytes = new Uint8Array(8);
  bytes.set(mac);
  return bytes;
}

/** Decodes SEND_RARP. @throws SvqError BAD_RECORD unless there are 8 bytes */
export function decodeMac(bytes: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> {
  requireSize(bytes, 8, "MAC address message");
  return bytes.slice(0, 6);
}

/** Bit 8 of the answer to SET_DEVICE_STATE_FD: no descriptor comes back, the one that was sent is used. Bits 0 to 7: error. */
export const DEVICE_STATE_NO_FD = 0x100n;

/** The payload of SET_DEVICE_STATE_FD. */
export interface DeviceStateRequest {
  /** 0 on the wire: the device writes its state (save); 1: it reads it (load). */
  direction: "save" | "load";
  /** 0: stopped, the only one there is. */
  phase: number;
}

/** Encodes SET_DEVICE_STATE_FD: 8 bytes. */
export function encodeDeviceState({ direction, phase }: DeviceStateRequest): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(8);
  const view = viewOf(bytes);
  view.setUint32(0, direction === "save" ? 0 : 1, true);
  view.setUint32(4, phase, true);
  return bytes;
}

/** Decodes SET_DEVICE_STATE_FD. @throws SvqError BAD_RECORD, VHOST_USER_PROTOCOL for a direction that there is not */
export function decodeDeviceState(bytes: Uint8Array<ArrayBuffer>): DeviceStateRequest {
  const view = requireSize(bytes, 8, "device state message");
  const direction = view.getUint32(0, true);
  if (direction > 1) throw protocolError(`Device state in direction ${direction}`);
  return { direction: direction === 0 ? "save" : "load", phase: view.getUint32(4, true) };
}

/** Where a ring's doorbell lies in the file that comes with the message (VRING_HOST_NOTIFIER_MSG). */
export interface VringArea {
  /** Ring. */
  index: number;
  /** A file comes along; otherwise the doorbell must not be used any more. */
  hasFd: boolean;
  /** Bytes. */
  size: number;
  /** Bytes. */
  offset: number;
}

const AREA_NO_FD = 0x100;

/** Encodes a vring area: u64 ring and flag, u64 size, u64 offset. */
export function encodeVringArea({ index, hasFd, size, offset }: VringArea): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(24);
  const view = viewOf(bytes);
  view.setBigUint64(0, BigInt(requireRing(index) | (hasFd ? 0 : AREA_NO_FD)), true);
  view.setBigUint64(8, BigInt(size), true);
  view.setBigUint64(16, BigInt(offset), true);
  return bytes;
}

/** Decodes a vring area. @throws SvqError VHOST_USER_PROTOCOL, BAD_RECORD, ADDRESS_TOO_LARGE */
export function decodeVringArea(bytes: Uint8Array<ArrayBuffer>, fdCount: number): VringArea {
  const view = requireSize(bytes, 24, "vring area");
  const word = view.getBigUint64(0, true);
  const hasFd = (word & BigInt(AREA_NO_FD)) === 0n;
  if (hasFd !== (fdCount === 1)) throw protocolError(`Doorbell of ring ${word & 0xffn} with ${fdCount} file descriptors`);
  return {
    index: Number(word & 0xffn),
    hasFd,
    size: getAddress(view, 8, "doorbell size"),
    offset: getAddress(view, 16, "doorbell offset"),
  };
}
