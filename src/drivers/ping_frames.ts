/**
 * Numbered frames as ICMP echo requests: any guest (or DPDK's testpmd in mode icmpecho) sends them back without a program of its own,
 * so what a guest's network does while it migrates can be measured from outside. IPv4 on ethernet (RFC 791, 792, 826).
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { parseMac } from "../net/command.ts";

/** Bytes of ethernet, IPv4 and ICMP in front of the payload. */
export const PING_HEADER_BYTES = 42;

const ETHERTYPE_IPV4 = 0x0800;
const ETHERTYPE_ARP = 0x0806;
const ICMP = 1;
const ECHO_REQUEST = 8;
const ECHO_REPLY = 0;
const ARP_REQUEST = 1;
const ARP_REPLY = 2;
const ARP_BYTES = 42;
const SHORTEST = 60;
/** Answers that wait to be sent, at most: whoever asks more asks again. */
const MAX_ANSWERS = 8;

/** Between whom. */
export interface PingOptions {
  /** IPv4 address of the driver. */
  address: string;
  /** IPv4 address that is asked. */
  target: string;
  /** The driver's ethernet address, `xx:xx:xx:xx:xx:xx`. */
  mac: string;
}

/** The four bytes of an IPv4 address. @throws SvqError BAD_ADDRESS */
export function parseIpv4(text: string): Uint8Array<ArrayBuffer> {
  const parts = /^\d{1,3}(\.\d{1,3}){3}$/.test(text) ? text.split(".").map(Number) : [];
  if (parts.length === 4 && parts.every((part) => part < 256)) return Uint8Array.from(parts);
  throw new SvqError("BAD_ADDRESS", `${JSON.stringify(text)} is no IPv4 address`, { exitCode: EXIT.usage, hint: "write it as 10.0.0.2" });
}

function put16(bytes: Uint8Array, at: number, value: number): void {
  bytes[at] = value >> 8;
  bytes[at + 1] = value & 0xff;
}

function get16(bytes: Uint8Array, at: number): number {
  return bytes[at]! << 8 | bytes[at + 1]!;
}

// RFC 1071.
function internetChecksum(bytes: Uint8Array, at: number, length: number): number {
  let sum = 0;
  for (let i = 0; i + 1 < length; i += 2) sum += get16(bytes, at + i);
  if (length % 2 === 1) sum += bytes[at + length - 1]! << 8;
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  return ~sum & 0xffff;
}

/** Makes echo requests, knows their answers, and answers who asks for the driver's ethernet address. */
export class PingFrames {
  readonly #mac: Uint8Array;
  readonly #address: Uint8Array;
  readonly #target: Uint8Array;
  // Everybody hears it until the target has answered.
  readonly #targetMac = new Uint8Array(6).fill(0xff);
  readonly #answers: Uint8Array<ArrayBuffer>[] = [];

  /** @throws SvqError BAD_ADDRESS */
  constructor({ address, target, mac }: PingOptions) {
    this.#mac = parseMac(mac);
    this.#address = parseIpv4(address);
    this.#target = parseIpv4(target);
  }

  /**
   * Writes the headers in front of a payload that is there already.
   *
   * @param at where the frame begins in `bytes`; the payload, of `payload` bytes, is 42 behind it
   */
  write(bytes: Uint8Array, at: number, payload: number, stream: number, sequence: number): void {
    bytes.set(this.#targetMac, at);
    bytes.set(this.#mac, at + 6);
    put16(bytes, at + 12, ETHERTYPE_IPV4);
    const ip = at + 14;
    bytes.fill(0, ip, ip + 28);
    bytes[ip] = 0x45;
    put16(bytes, ip + 2, 28 + payload);
    put16(bytes, ip + 4, sequence & 0xffff);
    bytes[ip + 8] = 64;
    bytes[ip + 9] = ICMP;
    bytes.set(this.#address, ip + 12);
    bytes.set(this.#target, ip + 16);
    put16(bytes, ip + 10, internetChecksum(bytes, ip, 20));
    const icmp = ip + 20;
    bytes[icmp] = ECHO_REQUEST;
    put16(bytes, icmp + 4, stream & 0xffff);
    put16(bytes, icmp + 6, sequence & 0xffff);
    put16(bytes, icmp + 2, internetChecksum(bytes, icmp, 8 + payload));
  }

  /** Takes a frame that came. @returns whether it is an answer of the target's, with a payload that begins 42 bytes behind `at` */
  receive(bytes: Uint8Array, at: number, length: number): boolean {
    if (length < PING_HEADER_BYTES) return false;
    const type = get16(bytes, at + 12);
    if (type === ETHERTYPE_ARP) this.#asked(bytes, at);
    if (type !== ETHERTYPE_IPV4) return false;
    const ip = at + 14;
    const ours = bytes[ip] === 0x45 && bytes[ip + 9] === ICMP && bytes[ip + 20] === ECHO_REPLY &&
      this.#target.every((byte, i) => bytes[ip + 12 + i] === byte) && this.#address.every((byte, i) => bytes[ip + 16 + i] === byte);
    if (ours) this.#targetMac.set(bytes.subarray(at + 6, at + 12));
    return ours;
  }

  #asked(bytes: Uint8Array, at: number): void {
    const arp = at + 14;
    const forUs = get16(bytes, arp + 6) === ARP_REQUEST && this.#address.every((byte, i) => bytes[arp + 24 + i] === byte);
    if (!forUs || this.#answers.length >= MAX_ANSWERS) return;
    const answer = new Uint8Array(SHORTEST);
    answer.set(bytes.subarray(at, at + ARP_BYTES));
    answer.set(bytes.subarray(arp + 8, arp + 14), 0);
    answer.set(this.#mac, 6);
    put16(answer, 14 + 6, ARP_REPLY);
    // Sender and target change places.
    answer.set(this.#mac, 14 + 8);
    answer.set(this.#address, 14 + 14);
    answer.set(bytes.subarray(arp + 8, arp + 18), 14 + 18);
    this.#answers.push(answer);
  }

  /** A frame that is due before any other. */
  answer(): Uint8Array<ArrayBuffer> | undefined {
    return this.#answers.shift();
  }

  /** It could not be sent. */
  giveBack(answer: Uint8Array<ArrayBuffer>): void {
    this.#answers.unshift(answer);
  }
}
