/**
 * The network device (virtio 1.3, 5.1): a port on a tap or on a cable to another embedded device. Frames travel with the
 * packet header in front, so that checksums and segments which a guest left to others are passed on as they are.
 *
 * @module
 */
import { bufferAt, copyMemory, ioctlValue, IoVector, mapAnonymous, type Mapping, SysError } from "../ffi/mod.ts";
import type { RangeTable } from "../memory/range_table.ts";
import { decodeNetCommand, formatMac, NET_COMMAND_MAX, type NetCommand, netCommandFeature, parseMac } from "../net/command.ts";
import { completeChecksum } from "../net/checksum.ts";
import { acceptsFrame } from "../net/filter.ts";
import { NET_HASH_TYPES_ALL, plainPair, RssSpreader } from "../net/flow.ts";
import { rarpFrame } from "../net/rarp.ts";
import { NetState, type NetStateDocument } from "../net/state.ts";
import { hasBit } from "../uapi/bits.ts";
import { VIRTIO_FEATURE_BITS } from "../uapi/virtio.ts";
import { TUN, TUN_F } from "../uapi/tun.ts";
import {
  netControlQueueIndex,
  VIRTIO_NET_CTRL_ACK,
  VIRTIO_NET_FEATURE_BITS,
  VIRTIO_NET_HDR_BYTES,
  VIRTIO_NET_HDR_F,
  VIRTIO_NET_HDR_GSO,
  VIRTIO_NET_HDR_LEGACY_BYTES,
} from "../uapi/virtio_net.ts";
import type { Chain } from "../vring/queue.ts";
import { type DeviceModel, malformed, pushGuest, readChain, visitParts, WAIT, writeChain } from "./model.ts";
import { RSS_KEY_MAX, RSS_TABLE_MAX } from "./options.ts";

const F = VIRTIO_NET_FEATURE_BITS;
/** Longest frame with its header: a segment of 64 KiB with all headers. */
const SCRATCH = 0x1_1000;
const ETHERNET_BYTES = 14;
const VLAN_BYTES = 4;
// How long a frame waits for the guest to offer buffers.
const HOLD_MS = 1000;
// Frames thrown away before commands and other queues get their turn.
const DROP_BATCH = 256;

/** What {@linkcode NetModel} serves. Plain data: it travels to the worker. */
export interface NetBacking {
  /** Tap or end of a cable, nonblocking, borrowed for the life of the model. */
  fd: number;
  /** Where frames go out: the same, but for a loop. */
  out: number;
  /** Is it a tap? */
  tap: boolean;
  /** Own address, `xx:xx:xx:xx:xx:xx`. */
  mac: string;
  /** Largest payload of a frame, bytes. */
  mtu: number;
  /** Queue pairs. */
  pairs: number;
  /** Has a control queue. */
  control: boolean;
  /** Somebody is at the other end. */
  link: boolean;
}

/** Why frames were dropped, and how many moved, of one queue. */
export interface NetCounters {
  /** Frames that came through or went out. */
  frames: number;
  /** Bytes of those, without the packet header. */
  bytes: number;
  /** Frames that were dropped. */
  drops: number;
}

/** A network device. */
export class NetModel implements DeviceModel {
  /** What the driver has set. */
  readonly state: NetState = new NetState();
  readonly #backing: NetBacking;
  readonly #vector = new IoVector();
  readonly #scratch: Mapping = mapAnonymous(SCRATCH, "frame");
  readonly #zeros: Mapping = mapAnonymous(4096, "zeros");
  readonly #bytes: Uint8Array;
  readonly #view: DataView;
  readonly #counters: NetCounters[];
  #features = 0n;
  // Of the guest's frames; at the port all headers have the longer form.
  #headerBytes = VIRTIO_NET_HDR_BYTES;
  // A driver has set the device up since the last reset.
  #driven = false;
  #controlled = false;
  #link: boolean;
  #mtu: number;
  #readable = true;
  #blocked = false;
  // There may be more to read, which nobody wants.
  #more = false;
  // The frame that waits for buffers: bytes with header, 0 for none, and its queue.
  #held = 0;
  #heldFor = 0;
  #heldSince = 0;
  #frames = 0;
  // Queues whose driver left a frame without buffers for all of that time, and took none since.
  readonly #starved: boolean[];
  #spreader: RssSpreader | undefined;
  readonly #running: boolean[];

  /** Serves `backing`, whose descriptor the caller keeps open. */
  constructor(backing: NetBacking) {
    this.#backing = backing;
    this.#link = backing.link;
    this.#mtu = backing.mtu;
    this.#bytes = new Uint8Array(bufferAt(this.#scratch.address, SCRATCH));
    this.#view = new DataView(this.#bytes.buffer);
    this.#running = Array.from({ length: backing.pairs * 2 + 1 }, () => false);
    this.#starved = this.#running.slice();
    this.#counters = this.#running.map(() => ({ frames: 0, bytes: 0, drops: 0 }));
  }

  /** Descriptors whose readiness {@linkcode portReady} is to be told: one, or one to read from and one to write to. */
  get ports(): number[] {
    const { fd, out } = this.#backing;
    return fd === out ? [fd] : [fd, out];
  }

  /** Counts of all queues. */
  get counters(): NetCounters[] {
    return this.#counters;
  }

  /** Takes the negotiated features over. */
  configure(features: bigint): void {
    this.#features = features;
    const long = hasBit(features, VIRTIO_FEATURE_BITS.VERSION_1) || this.#has(F.MRG_RXBUF);
    this.#headerBytes = long ? VIRTIO_NET_HDR_BYTES : VIRTIO_NET_HDR_LEGACY_BYTES;
    this.#driven = true;
    this.#setTapOffloads();
  }

  #has(bit: number): boolean {
    return hasBit(this.#features, bit);
  }

  /** A queue's ring runs, or does not any more. */
  setRunning(queue: number, running: boolean): void {
    this.#running[queue] = running;
    if (running && queue === this.#controlQueue) this.#controlled = true;
  }

  /** Forgets what the driver has set; frames are thrown away until the next one comes. */
  reset(): void {
    this.state.reset();
    this.#spreader = undefined;
    this.#driven = this.#controlled = false;
    this.#features = 0n;
    this.#mtu = this.#backing.mtu;
    this.#held = 0;
    this.#running.fill(false);
    this.#setTapOffloads();
  }

  /** Somebody came to the other end, or left it. */
  setLink(up: boolean): void {
    this.#link = up;
    this.#readable = true;
  }

  /** The MTU that was agreed on by other means than the configuration space. */
  setMtu(mtu: number): void {
    this.#mtu = mtu;
  }

  /** What the driver has set, as JSON. */
  saveState(): NetStateDocument {
    return this.state.save();
  }

  get #controlQueue(): number {
    if (!this.#backing.control || !this.#has(F.CTRL_VQ)) return -1;
    return netControlQueueIndex(this.#features, this.#backing.pairs);
  }

  /** Does a queue's driver offer buffers for what comes in? */
  receives(queue: number): boolean {
    return queue % 2 === 0 && queue !== this.#controlQueue;
  }

  /** May a frame take several chains? */
  get mergeable(): boolean {
    return this.#has(F.MRG_RXBUF);
  }

  /** The port says that there is something to read, or room to write. @returns whether senders that wait may go on */
  portReady(readable: boolean, writable: boolean): boolean {
    if (readable) this.#readable = true;
    if (!writable || !this.#blocked) return false;
    this.#blocked = false;
    return true;
  }

  // ---- sending ----

  /** Sends a frame or obeys a control command; see {@linkcode DeviceModel.execute}. */
  execute(chain: Chain, memory: RangeTable, queue: number, mayWait: boolean): number {
    if (queue === this.#controlQueue) return this.#control(chain, memory);
    const length = chain.readableBytes - this.#headerBytes;
    if (length < 0) throw malformed(`A frame has ${chain.readableBytes} bytes, fewer than its header`);
    const counters = this.#counters[queue]!;
    if (!this.#link || length < ETHERNET_BYTES || chain.readableBytes > SCRATCH || this.#tooLong(chain, memory, length)) {
      counters.drops++;
      return 0;
    }
    const sent = this.#send(chain, memory);
    if (sent === WAIT && mayWait) {
      this.#blocked = true;
      return WAIT;
    }
    if (sent !== 0) counters.drops++;
    else {
      counters.frames++;
      counters.bytes += length;
    }
    return 0;
  }

  #tooLong(chain: Chain, memory: RangeTable, length: number): boolean {
    if (length <= this.#mtu + ETHERNET_BYTES) return false;
    const head = new Uint8Array(VIRTIO_NET_HDR_BYTES + ETHERNET_BYTES);
    readChain(chain, memory, 0, head);
    const frame = head.subarray(this.#headerBytes);
    if ((head[1]! & ~VIRTIO_NET_HDR_GSO.ECN) !== VIRTIO_NET_HDR_GSO.NONE) return false;
    const tagged = frame[12] === 0x81 && frame[13] === 0;
    return !tagged || length > this.#mtu + ETHERNET_BYTES + VLAN_BYTES;
  }

  // 0: it is on its way; WAIT: no room now; 1: the port does not take it.
  #send(chain: Chain, memory: RangeTable): number {
    const vector = this.#vector;
    vector.clear();
    const push = (gpa: number, size: number) => {
      if (vector.count > vector.capacity - 32 || !pushGuest(vector, memory, gpa, size)) {
        throw malformed("A frame is scattered over more than 992 pieces");
      }
    };
    const short = VIRTIO_NET_HDR_BYTES - this.#headerBytes;
    visitParts(chain, false, 0, this.#headerBytes, push);
    if (short > 0) vector.push(this.#zeros.address, short);
    visitParts(chain, false, this.#headerBytes, chain.readableBytes - this.#headerBytes, push);
    return this.#write();
  }

  #write(): number {
    try {
      return this.#vector.tryWrite(this.#backing.out) === undefined ? WAIT : 0;
    } catch (error) {
      // A tap that is down (EIO), or a header that the kernel does not believe (EINVAL): the frame is lost, nothing else.
      if (error instanceof SysError) return 1;
      throw error;
    }
  }

  /** Announces a guest to the other end of the port. @returns whether it could be sent */
  announce(mac: Uint8Array): boolean {
    if (!this.#link) return false;
    const frame = rarpFrame(mac);
    using buffer = mapAnonymous(4096, "announcement");
    new Uint8Array(bufferAt(buffer.address, 4096)).set(frame);
    this.#vector.clear();
    this.#vector.push(this.#zeros.address, VIRTIO_NET_HDR_BYTES);
    this.#vector.push(buffer.address, frame.length);
    return this.#write() === 0;
  }

  // ---- receiving ----

  /** The queue that the next frame is for, -1 when there is none. */
  next(now: number): number {
    if (this.#held > 0) {
      if (now - this.#heldSince < HOLD_MS) return this.#heldFor;
      this.#starved[this.#heldFor] = true;
      this.#dropHeld();
    }
    this.#more = false;
    for (let dropped = 0; this.#readable; dropped++) {
      if (dropped === DROP_BATCH) {
        this.#more = true;
        return -1;
      }
      const length = this.#read();
      if (length === 0) {
        this.#readable = false;
        return -1;
      }
      const queue = this.#place(length);
      if (queue < 0) continue;
      this.#held = length;
      this.#frames++;
      this.#heldFor = queue;
      this.#heldSince = now;
      return queue;
    }
    return -1;
  }

  /** When {@linkcode next} has to be asked again though nothing happens, milliseconds of performance.now(). */
  get nextLook(): number {
    if (this.#held > 0) return this.#heldSince + HOLD_MS;
    return this.#more ? 0 : Infinity;
  }

  /** Bytes that the next frame takes in the guest's buffers. */
  get heldBytes(): number {
    return this.#held - VIRTIO_NET_HDR_BYTES + this.#headerBytes;
  }

  /** Which frame it is: another number for each. */
  get frameNumber(): number {
    return this.#frames;
  }

  /** The guest's buffer is too small for the next frame, or nobody wants it any more. */
  dropHeld(): void {
    this.#dropHeld();
  }

  /**
   * The ring has too few buffers for the next frame. One frame waits for them in vain; those behind it do not, or a driver
   * that only sends would be held up by a cable that brings its frames back.
   *
   * @returns whether the frame was dropped
   */
  lacksBuffers(): boolean {
    if (!this.#starved[this.#heldFor]) return false;
    this.#dropHeld();
    return true;
  }

  #dropHeld(): void {
    this.#counters[this.#heldFor]!.drops++;
    this.#held = 0;
  }

  #read(): number {
    const vector = this.#vector;
    vector.clear();
    vector.push(this.#scratch.address, SCRATCH);
    try {
      return vector.tryRead(this.#backing.fd) ?? 0;
    } catch (error) {
      // The tap was taken away or is down.
      if (error instanceof SysError) return 0;
      throw error;
    }
  }

  // The queue for the frame in the scratch memory; -1 where it is not received.
  #place(length: number): number {
    if (!this.#driven || length < VIRTIO_NET_HDR_BYTES + ETHERNET_BYTES) return -1;
    const frame = this.#bytes.subarray(VIRTIO_NET_HDR_BYTES, length);
    const filter = { rx: this.#controlled && this.#has(F.CTRL_RX), vlan: this.#controlled && this.#has(F.CTRL_VLAN) };
    if (!acceptsFrame(this.state, frame, this.#backing.mac, filter)) return -1;
    const queue = this.#steer(frame) * 2;
    if (!this.#fits(frame)) {
      this.#counters[queue]!.drops++;
      return -1;
    }
    return queue;
  }

  #steer(frame: Uint8Array): number {
    const { pairs } = this.#backing;
    if (pairs === 1) return 0;
    if (!this.#controlled) {
      // A VMM that keeps the control queue to itself says by the rings that it starts how many are in use.
      let running = 0;
      while (running < pairs && this.#running[running * 2]) running++;
      return plainPair(frame, Math.max(1, running));
    }
    const { rss } = this.state;
    if (rss === undefined) return plainPair(frame, this.state.pairs ?? 1);
    if (this.#spreader?.rss !== rss) this.#spreader = new RssSpreader(rss);
    return this.#spreader.pair(frame);
  }

  // Does the guest take what others have left to it? A checksum is completed here where it does not.
  #fits(frame: Uint8Array): boolean {
    const flags = this.#bytes[0]!;
    const gso = this.#bytes[1]!;
    const kind = gso & ~VIRTIO_NET_HDR_GSO.ECN;
    if (kind !== VIRTIO_NET_HDR_GSO.NONE) {
      const needed = kind === VIRTIO_NET_HDR_GSO.TCPV4 ? F.GUEST_TSO4 : kind === VIRTIO_NET_HDR_GSO.TCPV6 ? F.GUEST_TSO6 : F.GUEST_UFO;
      if (!this.#accepts(needed) || ((gso & VIRTIO_NET_HDR_GSO.ECN) !== 0 && !this.#accepts(F.GUEST_ECN))) return false;
    }
    if ((flags & VIRTIO_NET_HDR_F.NEEDS_CSUM) !== 0 && !this.#accepts(F.GUEST_CSUM)) {
      if (!completeChecksum(frame, this.#view.getUint16(6, true), this.#view.getUint16(8, true))) return false;
      this.#bytes[0] = flags & ~VIRTIO_NET_HDR_F.NEEDS_CSUM;
    }
    // A driver without GUEST_CSUM must not see DATA_VALID either (5.1.6.4.1).
    if (!this.#accepts(F.GUEST_CSUM)) this.#bytes[0] = 0;
    return true;
  }

  #accepts(bit: number): boolean {
    const { guestOffloads } = this.state;
    return this.#has(bit) && (guestOffloads === undefined || hasBit(guestOffloads, bit));
  }

  /** Copies the next frame into chains that have room for it, and pushes them. */
  deliver(chains: readonly Chain[], memory: RangeTable, push: (id: number, written: number) => void): void {
    const total = this.#held;
    const counters = this.#counters[this.#heldFor]!;
    const short = VIRTIO_NET_HDR_BYTES - this.#headerBytes;
    let at = short;
    if (short === 0) this.#view.setUint16(10, chains.length, true);
    else this.#bytes.copyWithin(short, 0, VIRTIO_NET_HDR_LEGACY_BYTES);
    for (const chain of chains) {
      const written = visitParts(chain, true, 0, total - at, (gpa, size) => {
        at = this.#copyOut(memory, gpa, size, at);
      });
      push(chain.id, written);
    }
    counters.frames++;
    counters.bytes += total - VIRTIO_NET_HDR_BYTES;
    this.#starved[this.#heldFor] = false;
    this.#held = 0;
  }

  #copyOut(memory: RangeTable, gpa: number, length: number, at: number): number {
    for (let done = 0; done < length;) {
      const run = Math.max(1, Math.min(memory.runLength(gpa + done), length - done));
      copyMemory(memory.addressOf(gpa + done, run), this.#scratch.address + at, run);
      at += run;
      done += run;
    }
    return at;
  }

  // ---- control queue ----

  #control(chain: Chain, memory: RangeTable): number {
    if (chain.writableBytes < 1) throw malformed("A control command has no room for its answer");
    const bytes = new Uint8Array(Math.min(chain.readableBytes, NET_COMMAND_MAX + 1));
    readChain(chain, memory, 0, bytes);
    let ok = false;
    let result = new Uint8Array(0);
    try {
      const command = decodeNetCommand(bytes);
      ok = this.#allowed(command);
      if (ok) result = this.#obey(command);
    } catch { /* What cannot be understood is refused by the answer. */ }
    const answer = new Uint8Array(1 + result.length);
    answer[0] = ok ? VIRTIO_NET_CTRL_ACK.OK : VIRTIO_NET_CTRL_ACK.ERR;
    answer.set(result, 1);
    return writeChain(chain, memory, 0, answer.subarray(0, Math.min(answer.length, chain.writableBytes)));
  }

  #allowed(command: NetCommand): boolean {
    const feature = netCommandFeature(command);
    if (feature === undefined || !this.#has(feature)) return false;
    const { pairs } = this.#backing;
    switch (command.name) {
      case "MAC_ADDR_SET":
        return (parseMac(command.mac)[0]! & 1) === 0;
      case "VQ_PAIRS_SET":
        return command.pairs <= pairs;
      case "RSS_CONFIG": {
        const { rss } = command;
        return (rss.hash_types & ~NET_HASH_TYPES_ALL) === 0 && rss.indirection.length <= RSS_TABLE_MAX &&
          rss.key.length <= RSS_KEY_MAX * 2 &&
          rss.max_tx_vq >= 1 && rss.max_tx_vq <= pairs && [rss.unclassified_queue, ...rss.indirection].every((queue) => queue < pairs);
      }
      case "NOTF_COAL_VQ_SET":
      case "NOTF_COAL_VQ_GET":
        return command.queue < pairs * 2;
      case "GUEST_OFFLOADS_SET":
        // Only what was negotiated can be switched.
        return (command.offloads & ~this.#features) === 0n;
      default:
        return true;
    }
  }

  #obey(command: NetCommand): Uint8Array<ArrayBuffer> {
    this.state.apply(command);
    if (command.name === "GUEST_OFFLOADS_SET") this.#setTapOffloads();
    if (command.name !== "NOTF_COAL_VQ_GET") return new Uint8Array(0);
    const { coalescing } = this.state.save();
    const of = coalescing.queues.find(({ queue }) => queue === command.queue) ?? (command.queue % 2 === 0 ? coalescing.rx : coalescing.tx);
    return new Uint8Array(Uint32Array.of(of?.max_packets ?? 0, of?.max_usecs ?? 0).buffer);
  }

  // The kernel completes for a tap's reader what that one does not take.
  #setTapOffloads(): void {
    if (!this.#backing.tap) return;
    let bits = 0;
    if (this.#accepts(F.GUEST_CSUM)) {
      bits = TUN_F.CSUM;
      if (this.#accepts(F.GUEST_TSO4)) bits |= TUN_F.TSO4;
      if (this.#accepts(F.GUEST_TSO6)) bits |= TUN_F.TSO6;
      if (bits > TUN_F.CSUM && this.#accepts(F.GUEST_ECN)) bits |= TUN_F.TSO_ECN;
    }
    try {
      ioctlValue(this.#backing.fd, TUN.SETOFFLOAD, bits, "TUNSETOFFLOAD");
    } catch (error) {
      // A tap that was deleted carries no frames any more; the guest need not fail for it.
      if (!(error instanceof SysError)) throw error;
    }
  }

  /** Lets go of its memory. */
  close(): void {
    this.#scratch.close();
    this.#zeros.close();
  }

  /** The address as the driver has set it, or its own. */
  get mac(): string {
    return this.state.mac ?? formatMac(parseMac(this.#backing.mac));
  }
}
