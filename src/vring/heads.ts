/**
 * The driver's side of a split ring whose descriptors are somebody else's: only the avail ring is written and only the
 * used ring read. It is what relay mode `used` offers a device: the guest's descriptor table, with an avail ring and a
 * used ring of the relay's own.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { checkSplitNum, type RingPart } from "./layout.ts";
import type { Chain, DriverQueue, DriverQueueState } from "./queue.ts";
import { VringError } from "./rules.ts";
import { SplitRings } from "./split_rings.ts";

/** Where the two rings lie, for {@linkcode HeadDriver}. */
export interface HeadDriverOptions {
  /** Queue size, a power of two: the descriptor table's. */
  num: number;
  /** Avail ring, zeroed. */
  avail: RingPart;
  /** Used ring, zeroed. */
  used: RingPart;
  /** EVENT_IDX was negotiated. */
  eventIdx: boolean;
  /** IN_ORDER was negotiated: the device may write one used element for several heads. */
  inOrder?: boolean;
}

/**
 * Implements {@linkcode DriverQueue} over heads: `addChain` publishes the chain's own id, which is the head in the table that
 * the device reads. A chain's id is its id here.
 */
export class HeadDriver implements DriverQueue {
  /** Always `split`. */
  readonly layout = "split";
  /** Queue size in descriptors. */
  readonly num: number;
  /** See {@linkcode DriverQueue.usedLength}. */
  usedLength = 0;
  readonly #rings: SplitRings;
  /** Writable bytes of heads at the device; -1 for the others. */
  readonly #writable: Float64Array;
  readonly #inOrder: boolean;
  readonly #mask: number;
  /** IN_ORDER: heads by their position in the avail ring, the other way round, and the end of the batch being worked off. */
  readonly #headAt: Uint16Array;
  readonly #positionOf: Uint16Array;
  #batchHead = -1;
  #batchLength = 0;

  /** @throws VringError RING_SIZE or RING_ALIGNMENT */
  constructor(options: HeadDriverOptions) {
    checkSplitNum(options.num);
    this.num = options.num;
    this.#rings = new SplitRings({ ...options, base: 0 });
    this.#writable = new Float64Array(options.num).fill(-1);
    this.#inOrder = options.inOrder ?? false;
    this.#mask = options.num - 1;
    this.#headAt = new Uint16Array(options.num);
    this.#positionOf = new Uint16Array(options.num);
  }

  /** Heads that can still be offered. */
  get numFree(): number {
    return this.num - this.inflight;
  }

  /** Heads at the device, or waiting for `publish`. */
  get inflight(): number {
    return this.#rings.inflight;
  }

  /** There are no descriptors of its own to put segments in. @throws SvqError UNSUPPORTED */
  add(): number {
    throw new SvqError("UNSUPPORTED", "Only chains that lie in the device's descriptor table can be offered");
  }

  /** Offers the chain by its head. @returns the head, or -1 when the ring is full */
  addChain(chain: Chain): number {
    const head = chain.id;
    if (this.inflight === this.num) return -1;
    if (this.#writable[head] !== -1) throw new VringError("HEAD_IN_FLIGHT", head, `Descriptor ${head} is in flight already`);
    this.#writable[head] = chain.writableBytes;
    this.#headAt[this.#rings.availNext & this.#mask] = head;
    this.#positionOf[head] = this.#rings.availNext;
    this.#rings.offer(head);
    return head;
  }

  /** Makes added heads available; see {@linkcode DriverQueue.publish}. @returns whether the device wants a kick */
  publish(): boolean {
    return this.#rings.publish();
  }

  /** Takes the next used head; see {@linkcode DriverQueue.take}. @throws VringError */
  take(): number {
    const rings = this.#rings;
    const position = rings.lastUsed;
    if (position === rings.usedSeen && !rings.look()) return -1;
    if (this.#inOrder) return this.#takeInOrder(position);
    const head = rings.readUsed();
    this.#checkHead(head, position);
    return this.#finish(head, rings.length);
  }

  #checkHead(head: number, position: number): void {
    if (this.#writable[head]! < 0) {
      throw new VringError("USED_NOT_IN_FLIGHT", head, `Used entry ${position} holds ${head}, which the device does not have`);
    }
  }

  #takeInOrder(position: number): number {
    const rings = this.#rings;
    const oldest = this.#headAt[position & this.#mask]!;
    if (this.#batchHead < 0) {
      const head = rings.readUsed();
      this.#checkHead(head, position);
      // The batch ends with this head; it must be all published as used.
      if (((this.#positionOf[head]! - position) & 0xffff) >= ((rings.usedSeen - position) & 0xffff)) {
        throw new VringError("IN_ORDER", head, `Used entry ${position} ends a batch at ${head}, beyond used index ${rings.usedSeen}`);
      }
      this.#batchHead = head;
      this.#batchLength = rings.length;
    }
    if (oldest !== this.#batchHead) return this.#finish(oldest, this.#writable[oldest]!);
    this.#batchHead = -1;
    return this.#finish(oldest, this.#batchLength);
  }

  #finish(head: number, length: number): number {
    const writable = this.#writable[head]!;
    this.#writable[head] = -1;
    this.usedLength = length < writable ? length : writable;
    this.#rings.lastUsed = (this.#rings.lastUsed + 1) & 0xffff;
    return head;
  }

  /** Tells the device that calls are not needed (a hint). */
  disableCalls(): void {
    this.#rings.disableCalls();
  }

  /** Asks for calls again. @returns whether used heads arrived meanwhile. @throws VringError USED_INDEX_JUMP */
  enableCalls(): boolean {
    return this.#rings.enableCalls();
  }

  /** The state as plain data; a head's chain is known to the table's owner, here it is one descriptor. */
  save(): DriverQueueState {
    const { availNext, availPublished, lastUsed } = this.#rings;
    if (availNext !== availPublished) throw new SvqError("VRING_MISUSE", "A ring is saved before its publish");
    const inflight = [];
    for (let head = 0; head < this.num; head++) {
      if (this.#writable[head]! >= 0) inflight.push({ id: head, descriptors: [head], writable_bytes: this.#writable[head]! });
    }
    return { layout: "split", side: "driver", num: this.num, avail: availPublished, used: lastUsed, inflight };
  }

  /** A ring of heads always starts anew. @throws SvqError UNSUPPORTED */
  restore(): void {
    throw new SvqError("UNSUPPORTED", "A ring of heads is not restored: it starts anew over the guest's table");
  }
}
