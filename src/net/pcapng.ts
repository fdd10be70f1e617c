/**
 * Files of frames in the pcapng format, which Wireshark and tcpdump read: one section, one interface, little-endian, timestamps
 * in nanoseconds. Pure. Source: draft-ietf-opsawg-pcapng.
 *
 * @module
 */

const SECTION_HEADER = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION = 1;
const INTERFACE_STATISTICS = 5;
const ENHANCED_PACKET = 6;
const BYTE_ORDER = 0x1a2b_3c4d;
const LINKTYPE_ETHERNET = 1;

const OPT_END = 0;
const SHB_USERAPPL = 4;
const IF_NAME = 2;
const IF_TSRESOL = 9;
const EPB_FLAGS = 2;
const EPB_DROPCOUNT = 4;
const EPB_QUEUE = 6;
const ISB_IFDROP = 5;

/** Which way a frame went, as the guest sees it. */
export type FrameDirection = "in" | "out";

/** One captured frame. */
export interface CapturedFrame {
  /** When, nanoseconds since 1970, to about a microsecond. */
  timeNs: bigint;
  /** Queue that it went through. */
  queue: number;
  /** Which way. */
  direction: FrameDirection;
  /** Bytes that it had. */
  length: number;
  /** The first of them. */
  bytes: Uint8Array;
  /** Frames of this queue that were not captured since the one before, since the buffer was full. */
  dropped: number;
}

class Block {
  readonly #parts: number[] = [];

  u16(value: number): this {
    this.#parts.push(value & 0xff, value >>> 8 & 0xff);
    return this;
  }
  u32(value: number): this {
    return this.u16(value & 0xffff).u16(value >>> 16);
  }
  u64(value: bigint): this {
    return this.u32(Number(value & 0xffff_ffffn)).u32(Number(value >> 32n & 0xffff_ffffn));
  }
  bytes(bytes: Uint8Array): this {
    for (const byte of bytes) this.#parts.push(byte);
    while (this.#parts.length % 4 !== 0) this.#parts.push(0);
    return this;
  }
  option(code: number, value: Uint8Array): this {
    return this.u16(code).u16(value.length).bytes(value);
  }
  end(type: number): Uint8Array<ArrayBuffer> {
    const body = this.u16(OPT_END).u16(0).#parts;
    const length = body.length + 12;
    const out = new Uint8Array(length);
    const view = new DataView(out.buffer);
    view.setUint32(0, type, true);
    view.setUint32(4, length, true);
    out.set(body, 8);
    view.setUint32(length - 4, length, true);
    return out;
  }
}

const text = (value: string) => new TextEncoder().encode(value);

function word(value: number): Uint8Array {
  return new Uint8Array(Uint32Array.of(value).buffer);
}

function longWord(value: number): Uint8Array {
  return new Uint8Array(BigUint64Array.of(BigInt(value)).buffer);
}

/**
 * The beginning of a file.
 *
 * @param name of the interface that frames were seen on
 * @param snapLength most bytes that are kept of a frame
 */
export function pcapngHeader(name: string, snapLength: number): Uint8Array<ArrayBuffer> {
  const section = new Block().u32(BYTE_ORDER).u16(1).u16(0).u32(0xffff_ffff).u32(0xffff_ffff).option(SHB_USERAPPL, text("svq"));
  const iface = new Block().u16(LINKTYPE_ETHERNET).u16(0).u32(snapLength).option(IF_NAME, text(name)).option(IF_TSRESOL, Uint8Array.of(9));
  return join([section.end(SECTION_HEADER), iface.end(INTERFACE_DESCRIPTION)]);
}

/** One frame. */
export function pcapngFrame({ timeNs, queue, direction, length, bytes, dropped }: CapturedFrame): Uint8Array<ArrayBuffer> {
  const block = new Block().u32(0).u32(Number(timeNs >> 32n)).u32(Number(timeNs & 0xffff_ffffn)).u32(bytes.length).u32(length);
  block.bytes(bytes).option(EPB_FLAGS, word(direction === "in" ? 1 : 2)).option(EPB_QUEUE, word(queue));
  if (dropped > 0) block.option(EPB_DROPCOUNT, longWord(dropped));
  return block.end(ENHANCED_PACKET);
}

/** The end of a capture: how many frames were not captured. @param timeNs nanoseconds since 1970 */
export function pcapngStatistics(timeNs: bigint, dropped: number): Uint8Array<ArrayBuffer> {
  return new Block().u32(0).u32(Number(timeNs >> 32n)).u32(Number(timeNs & 0xffff_ffffn)).option(ISB_IFDROP, longWord(dropped))
    .end(INTERFACE_STATISTICS);
}

/** Several pieces as one. */
export function join(parts: readonly Uint8Array[]): Uint8Array<ArrayBuffer> {
  const out = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}
