/**
 * The checked network workload: numbered frames with a checksum go out, at a rate or as fast as they are taken, and what
 * comes in is judged. With `echo` the other end is expected to send the driver's own frames back.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { VIRTIO_NET_HDR_BYTES } from "../uapi/virtio_net.ts";
import type { Chain } from "../vring/queue.ts";
import { NetStreams } from "./net_streams.ts";
import { PING_HEADER_BYTES, PingFrames } from "./ping_frames.ts";
import type { NetReport } from "./report.ts";
import { type GuestRam, logWrite, type Tally, type Workload, type WorkloadState } from "./workload.ts";

const ETHERTYPE = 0x88b5;
const MAGIC = 0x53565131;
/** Words of the frame in front of the numbered ones, with `ping`: IPv4 and ICMP. */
const PING_WORDS = (PING_HEADER_BYTES - 14) >> 2;
// Header and frame start here in a block, so that the words behind the 14 bytes of ethernet are aligned.
const START = 2;
const FRAME = START + VIRTIO_NET_HDR_BYTES;
const WORDS_AT = (FRAME + 14) >> 2;
// Magic, stream, sequence, words, checksum.
const HEAD_WORDS = 5;
const CHECKSUM = 4;
const BUFFER_BYTES = 2048;
/** Shortest and longest frame of the workload, bytes: an ethernet frame's. */
export const NET_FRAME_RANGE: readonly [number, number] = [60, 1514];

/** What shapes a network workload. Plain data. */
export interface NetWorkloadOptions {
  /** Which stream this driver sends; receivers tell streams apart by it. */
  stream: number;
  /** Bytes of a frame. */
  size: number;
  /** Frames per second; 0: as fast as they are taken. */
  rate: number;
  /** The frames come back here: the run ends when all have, or it is too late. */
  echo: boolean;
  /** Queue pairs. */
  pairs: number;
  /** The last queue is the control queue. */
  control: boolean;
  /** Its index at the device. */
  controlIndex: number;
  /** The device's address, `xx:xx:xx:xx:xx:xx`. */
  mac: string;
  /** The frames are ICMP echo requests. */
  ping?: { address: string; target: string } | undefined;
}

/** What is done when a control command was answered. */
export type ControlAnswer = (ok: boolean) => void;

interface ControlRequest {
  bytes: Uint8Array;
  answered: ControlAnswer;
}

/** Drives a network device. */
export class NetWorkload implements Workload {
  readonly #ram: GuestRam;
  readonly #options: NetWorkloadOptions;
  readonly #tally: Tally;
  readonly #streams = new NetStreams();
  readonly #out: (number[] | null)[];
  readonly #ping: PingFrames | undefined;
  readonly #wordsAt: number;
  readonly #words: number;
  readonly #mac: number[];
  readonly #control: ControlRequest[] = [];
  readonly #asked = new Map<number, ControlRequest>();
  #sequence = 0;
  #due = 0;

  /** A workload at its beginning. */
  constructor(ram: GuestRam, options: NetWorkloadOptions, tally: Tally) {
    this.#ram = ram;
    this.#options = options;
    this.#tally = tally;
    this.#out = Array.from({ length: ram.layout.slots }, () => null);
    this.#ping = options.ping === undefined ? undefined : new PingFrames({ ...options.ping, mac: options.mac });
    this.#wordsAt = WORDS_AT + (this.#ping === undefined ? 0 : PING_WORDS);
    this.#words = Math.max(HEAD_WORDS + 1, ((options.size - 14) >> 2) - (this.#wordsAt - WORDS_AT));
    this.#mac = options.mac.split(":").map((part) => parseInt(part, 16));
  }

  #queueOf(slot: number): number {
    return Math.floor(slot / this.#ram.layout.options.depth);
  }

  #isControl(queue: number): boolean {
    return this.#options.control && queue === this.#options.pairs * 2;
  }

  /** Receive buffers and control commands do not count as requests. */
  background(queue: number): boolean {
    return queue % 2 === 0;
  }

  /** When the next frame is due, milliseconds of performance.now(); 0 for at once. */
  get nextDue(): number {
    return this.#options.rate > 0 ? this.#due : 0;
  }

  /** Has all come back that shall come back? */
  get settled(): boolean {
    return !this.#options.echo || this.#streams.distinct(this.#options.stream) >= this.#sequence;
  }

  /** Sends a control command when the queue is served next. */
  control(bytes: Uint8Array, answered: ControlAnswer): void {
    if (!this.#options.control) throw new SvqError("NO_CONTROL_QUEUE", "The driver has no control queue of this device");
    this.#control.push({ bytes, answered });
  }

  /** Makes a frame, a receive buffer or a control command; see {@linkcode Workload.prepare}. */
  prepare(slot: number, chain: Chain): boolean {
    const queue = this.#queueOf(slot);
    const { layout } = this.#ram;
    const offset = layout.blockOffset(slot);
    if (this.#isControl(queue)) return this.#prepareControl(slot, chain, offset);
    chain.clear();
    if (queue % 2 === 0) {
      chain.addWritable(layout.gpa(offset + START), BUFFER_BYTES);
      this.#out[slot] = [];
      return true;
    }
    const answer = this.#ping?.answer();
    if (answer !== undefined) return this.#send(slot, chain, offset, this.#copy(offset, answer), []);
    const now = performance.now();
    const { rate } = this.#options;
    if (rate > 0) {
      if (now < this.#due) return false;
      // After a pause the frames that were not sent are not made up for.
      this.#due = Math.max(this.#due + 1000 / rate, now - 1000 / rate);
    }
    return this.#send(slot, chain, offset, this.#write(offset, this.#sequence), [this.#sequence++]);
  }

  #send(slot: number, chain: Chain, offset: number, bytes: number, out: number[]): true {
    const { layout } = this.#ram;
    this.#out[slot] = out;
    chain.addReadable(layout.gpa(offset + START), VIRTIO_NET_HDR_BYTES);
    chain.addReadable(layout.gpa(offset + FRAME), bytes);
    logWrite(this.#ram, offset + START, VIRTIO_NET_HDR_BYTES + bytes);
    return true;
  }

  #prepareControl(slot: number, chain: Chain, offset: number): boolean {
    const request = this.#control.shift();
    if (request === undefined) return false;
    const { layout, bytes } = this.#ram;
    const length = request.bytes.length;
    bytes.set(request.bytes, offset);
    bytes[offset + length] = 0xff;
    chain.clear();
    chain.addReadable(layout.gpa(offset), 2);
    if (length > 2) chain.addReadable(layout.gpa(offset + 2), length - 2);
    chain.addWritable(layout.gpa(offset + length), 1);
    logWrite(this.#ram, offset, length + 1);
    this.#asked.set(slot, request);
    this.#out[slot] = [length];
    return true;
  }

  get #headBytes(): number {
    return 14 + (this.#wordsAt - WORDS_AT) * 4;
  }

  #copy(offset: number, frame: Uint8Array): number {
    const { bytes } = this.#ram;
    bytes.fill(0, offset + START, offset + FRAME);
    bytes.set(frame, offset + FRAME);
    return frame.length;
  }

  // A frame of 14 bytes of ethernet, those of IPv4 and ICMP where it is one of these, and whole words; its length.
  #write(offset: number, sequence: number): number {
    const { bytes, words } = this.#ram;
    bytes.fill(0, offset + START, offset + FRAME);
    bytes.fill(0xff, offset + FRAME, offset + FRAME + 6);
    for (let i = 0; i < 6; i++) bytes[offset + FRAME + 6 + i] = this.#mac[i]!;
    bytes[offset + FRAME + 12] = ETHERTYPE >> 8;
    bytes[offset + FRAME + 13] = ETHERTYPE & 0xff;
    const at = (offset >> 2) + this.#wordsAt;
    const count = this.#words;
    words[at] = MAGIC;
    words[at + 1] = this.#options.stream;
    words[at + 2] = sequence;
    words[at + 3] = count;
    for (let i = HEAD_WORDS; i < count; i++) words[at + i] = Math.imul(sequence + i, 0x9e3779b1);
    words[at + CHECKSUM] = checksum(words, at, count);
    this.#ping?.write(bytes, offset + FRAME, count * 4, this.#options.stream, sequence);
    return this.#headBytes + count * 4;
  }

  /** Takes a frame or command back that did not fit into the ring. */
  cancel(slot: number): void {
    const queue = this.#queueOf(slot);
    const request = this.#asked.get(slot);
    if (request !== undefined) {
      this.#asked.delete(slot);
      this.#control.unshift(request);
    } else if (queue % 2 === 1 && this.#out[slot]?.length === 0) {
      const at = this.#ram.layout.blockOffset(slot) + FRAME;
      this.#ping?.giveBack(this.#ram.bytes.slice(at, at + 60));
    } else if (queue % 2 === 1) {
      this.#sequence--;
      this.#due = 0;
    }
    this.#out[slot] = null;
  }

  /** Judges what came back; see {@linkcode Workload.finish}. */
  finish(slot: number, written: number): boolean | undefined {
    const queue = this.#queueOf(slot);
    const out = this.#out[slot]!;
    this.#out[slot] = null;
    if (this.#isControl(queue)) {
      const request = this.#asked.get(slot);
      this.#asked.delete(slot);
      request?.answered(this.#ram.bytes[this.#ram.layout.blockOffset(slot) + out[0]!] === 0);
      return undefined;
    }
    if (queue % 2 === 1) return out.length === 0 ? undefined : true;
    this.#receive(this.#ram.layout.blockOffset(slot), written);
    return undefined;
  }

  #receive(offset: number, written: number): void {
    const { words } = this.#ram;
    const { counters } = this.#tally;
    const length = written - VIRTIO_NET_HDR_BYTES;
    // Frames of others (a tap's host speaks of its own accord) are none of ours.
    if (length < 14 || length > BUFFER_BYTES || !this.#isOurs(offset + FRAME, length)) return;
    const at = (offset >> 2) + this.#wordsAt;
    // A private copy would only help against a device that writes later; what the checksum covers is what is judged.
    const count = words[at + 3]!;
    const sound = written <= BUFFER_BYTES && count >= HEAD_WORDS && this.#headBytes + count * 4 <= length && words[at] === MAGIC &&
      words[at + CHECKSUM] === checksum(words, at, count);
    if (!sound) {
      counters.corrupted++;
      this.#tally.fault(`a frame of ${length} bytes came with other contents than were sent`);
      return;
    }
    counters.bytes += length;
    counters.verified++;
    const stream = words[at + 1]! >>> 0;
    const sequence = words[at + 2]! >>> 0;
    const arrival = this.#streams.arrive(stream, sequence, performance.timeOrigin + performance.now());
    if (arrival === "duplicate") {
      counters.duplicated++;
      this.#tally.fault(`frame ${sequence} of stream ${stream} came twice`);
    } else if (arrival === "late") counters.outOfOrder++;
  }

  #isOurs(at: number, length: number): boolean {
    const { bytes } = this.#ram;
    if (this.#ping !== undefined) {
      // Another program's answers may come here too: they are of other lengths or without the mark.
      return this.#ping.receive(bytes, at, length) && length >= this.#headBytes + HEAD_WORDS * 4 &&
        this.#ram.words[(at + this.#headBytes) >> 2] === MAGIC;
    }
    return bytes[at + 12] === ETHERTYPE >> 8 && bytes[at + 13] === (ETHERTYPE & 0xff);
  }

  /** Frames sent that have not come back, or were skipped by those that came. */
  get lost(): number {
    const { echo, stream } = this.#options;
    return echo ? Math.max(0, this.#sequence - this.#streams.distinct(stream)) : this.#streams.missing;
  }

  /** How it went. */
  report(): NetReport {
    const longestGapMs = Math.round(this.#streams.longestGapMs * 1000) / 1000;
    const { duplicated, outOfOrder } = this.#tally.counters;
    return {
      sent: this.#sequence,
      received: this.#streams.distinct(),
      missing: this.lost,
      reordered: outOfOrder,
      duplicated,
      longestGapMs,
    };
  }

  /** In words. */
  describe(slot: number): string {
    const queue = this.#queueOf(slot);
    if (this.#isControl(queue)) return "a control command";
    return queue % 2 === 0 ? "a receive buffer" : `frame ${this.#out[slot]?.[0]}`;
  }

  /** The state. @throws SvqError CONTROL_PENDING while a control command is out */
  save(): WorkloadState {
    if (this.#asked.size > 0) throw new SvqError("CONTROL_PENDING", "A control command has not been answered yet");
    return {
      kind: "net",
      random: 0,
      sequence: this.#sequence,
      slots: this.#out.map((values) => values && [...values]),
      table: this.#streams.save(),
    };
  }

  /** Takes over a state. @throws SvqError STATE_INVALID */
  restore(state: WorkloadState): void {
    if (state.kind !== "net" || state.slots.length !== this.#out.length) {
      throw new SvqError("STATE_INVALID", "The workload's state cannot be used: it is of another workload");
    }
    state.slots.forEach((values, slot) => this.#out[slot] = values === null ? null : [...values]);
    this.#sequence = state.sequence;
    this.#streams.restore(state.table);
  }
}

// Over all words but the checksum itself.
function checksum(words: Int32Array, at: number, count: number): number {
  let hash = 0x811c9dc5 | 0;
  for (let i = 0; i < count; i++) if (i !== CHECKSUM) hash = Math.imul(hash ^ words[at + i]!, 0x01000193) ^ (hash >>> 15);
  return hash;
}
