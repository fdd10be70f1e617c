/**
 * The JavaScript core for the common case: split rings on both sides, each chain checked and copied once by loops over typed
 * arrays. What is rarer (packed rings, IN_ORDER, a guest with an IOMMU, captured frames, chains taken up from a relay before
 * this one) runs on the general core of js_core.ts, and both do the same.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { SplitInflight } from "../vring/inflight.ts";
import { Chain } from "../vring/queue.ts";
import { headInFlight, headOutOfRange, SplitWalker } from "../vring/split_walk.ts";
import { COUNTER } from "./counters.ts";
import { type DataPath, maxChainOf, type RelayCore } from "./core.ts";
import { headsLoop, shadowLoop } from "./fast_forward.ts";
import { Placer } from "./fast_place.ts";
import { markChain, returnLoop } from "./fast_return.ts";
import { FastQueue, LINK_INDEX, LINK_MORE, RECORD_FIRST, RECORD_ORDER } from "./fast_state.ts";
import { openInflight } from "./inflight_start.ts";
import { loggedRanges } from "./logged_ring.ts";
import type { QueueProgress, QueueStart } from "./messages.ts";

/** Does the fast path run this queue? */
export function isFast({ mode, guest, device, iommu, capture, control, resume }: QueueStart): boolean {
  if (mode === "notify" || iommu === true || capture !== undefined || control !== undefined || resume !== undefined) return false;
  return !guest.packed && !device.packed && !guest.inOrder && !device.inOrder && guest.local === undefined;
}

/** Implements {@linkcode RelayCore} for the queues of {@linkcode isFast}. */
export class FastCore implements RelayCore {
  /** Which implementation: the general one in JavaScript does the same. */
  readonly kind = "js";
  /** After `returnUsed`: the guest wants a call. */
  callWanted = false;
  /** After `forward`: the device wants a kick. */
  kickWanted = false;
  /** The device's ring has no room for the guest's next chain. */
  full = false;
  readonly #q: FastQueue;
  readonly #path: DataPath;
  readonly #counters: Float64Array;
  readonly #walker: SplitWalker;
  readonly #chain: Chain;
  readonly #inflight: SplitInflight | undefined;
  readonly #start: QueueStart;
  #placer: Placer;
  #logged: readonly number[] = [];

  /** @throws VringError, SvqError OUTSIDE_MEMORY when the guest's ring cannot be used */
  constructor(start: QueueStart, path: DataPath, counters: Float64Array) {
    const maxChain = maxChainOf(start);
    const { num, indirect, desc } = start.guest;
    const log = openInflight(start, path);
    this.#inflight = log instanceof SplitInflight ? log : undefined;
    this.#start = start;
    this.#path = path;
    this.#counters = counters;
    this.#q = new FastQueue(start, path, this.#inflight);
    // Looked up through the path at each use: memory may be plugged while the queue runs.
    const memory = {
      contains: (gpa: number, length: number) => path.memory.contains(gpa, length),
      buffer: (gpa: number, length: number) => path.memory.buffer(gpa, length),
      readWords: (gpa: number, target: Uint32Array, count: number) => path.memory.readWords(gpa, target, count),
    };
    this.#walker = new SplitWalker({ num, indirect, maxChain, memory, desc: { buffer: path.memory.buffer(desc, 16 * num) } });
    this.#chain = new Chain(maxChain);
    this.#placer = new Placer(this.#q, start.device, maxChain);
    this.setLogUsed(start.logUsedGpa);
  }

  /** See {@linkcode RelayCore.inflight}. */
  get inflight(): number {
    return this.#q.inflightCount;
  }

  /** See {@linkcode RelayCore.guestBase}. */
  get guestBase(): number {
    return this.#q.guestNext;
  }

  /** See {@linkcode RelayCore.guestUsed}. */
  get guestUsed(): number {
    return (this.#q.guestNext - this.#q.open) & 0xffff;
  }

  /** See {@linkcode RelayCore.forward}. */
  forward(): number {
    const q = this.#q;
    const { memory, translation } = this.#path;
    const single = this.#placer.hasTables;
    q.useMemory(memory);
    this.kickWanted = false;
    this.full = false;
    let moved = 0;
    while (q.guestNext !== q.guestSeen || q.lookAvail()) {
      if (q.heads) moved += headsLoop(q);
      else if (translation === undefined) moved += shadowLoop(q, single);
      if (q.guestNext === q.guestSeen) continue;
      if (!this.#takeOne()) {
        this.full = true;
        this.#counters[COUNTER.full]!++;
        break;
      }
      moved++;
    }
    if (moved > 0) this.kickWanted = q.publish();
    return moved;
  }

  // The guest's next chain, by the long way; it is read anew. @returns false when the device's ring has no room
  #takeOne(): boolean {
    const q = this.#q;
    const chain = this.#chain;
    const position = q.guestNext;
    const head = q.guestAvail[2 + (position & (q.num - 1))]!;
    if (head >= q.num) headOutOfRange(position, head, q.num);
    if (q.taken[head] !== 0) headInFlight(position, head);
    this.#walker.walk(head, chain);
    chain.id = head;
    if (!this.#placer.place(chain, this.#path.translation, q.order)) return false;
    q.order = (q.order + 1) | 0;
    this.#inflight?.takeHead(head);
    q.taken[head] = 1;
    q.guestNext = (position + 1) & 0xffff;
    q.open++;
    return true;
  }

  /** See {@linkcode RelayCore.returnUsed}. */
  returnUsed(): number {
    const q = this.#q;
    this.callWanted = false;
    const moved = returnLoop(q, this.#path.dirty, this.#counters);
    if (moved === 0) return 0;
    q.returned += moved;
    this.#counters[COUNTER.chains]! += moved;
    this.callWanted = q.flush();
    this.#inflight?.flushed();
    // The used ring's own pages are marked after it was written: the reader clears a bit first and copies then.
    if (this.#logged.length > 0) this.logRing();
    return moved;
  }

  /** See {@linkcode RelayCore.disableCalls}. */
  disableCalls(): void {
    this.#q.disableCalls();
  }

  /** See {@linkcode RelayCore.enableCalls}. @throws VringError USED_INDEX_JUMP */
  enableCalls(): boolean {
    return this.#q.enableCalls();
  }

  /** See {@linkcode RelayCore.disableKicks}. */
  disableKicks(): void {
    this.#q.disableKicks();
  }

  /** See {@linkcode RelayCore.enableKicks}. @throws VringError AVAIL_INDEX_JUMP */
  enableKicks(): boolean {
    return this.#q.enableKicks();
  }

  /** See {@linkcode RelayCore.setLogUsed}. */
  setLogUsed(gpa: number): void {
    this.#logged = loggedRanges(gpa, this.#start.guest);
  }

  /** See {@linkcode RelayCore.logRing}. */
  logRing(): void {
    const { dirty } = this.#path;
    if (dirty === undefined) return;
    for (let i = 0; i < this.#logged.length; i += 2) dirty.markRange(this.#logged[i]!, this.#logged[i + 1]!);
  }

  // Ids of the chains at the device, the one taken first before the others.
  #held(): number[] {
    const { records, order } = this.#q;
    const ids: number[] = [];
    for (let id = 0; id < records.length >> 2; id++) if (records[id << 2]! >= 0) ids.push(id);
    // The number of the next chain wraps: what counts is how long ago it was.
    const age = (id: number) => (order - records[(id << 2) + RECORD_ORDER]!) | 0;
    return ids.sort((a, b) => age(b) - age(a));
  }

  #firstOf(id: number): number {
    return this.#q.records[(id << 2) + RECORD_FIRST]!;
  }

  /** See {@linkcode RelayCore.uses}. */
  uses(gpa: number, size: number): number {
    return this.#held().filter((id) => this.#touches(this.#firstOf(id), gpa, size)).length;
  }

  #touches(first: number, gpa: number, size: number): boolean {
    const q = this.#q;
    for (let index = first;;) {
      const address = q.addressOf(index);
      if (address < gpa + size && address + q.lengthOf(index) > gpa) return true;
      const link = q.segments[(index << 2) + 3]!;
      if ((link & LINK_MORE) === 0) return false;
      index = link & LINK_INDEX;
    }
  }

  /** See {@linkcode RelayCore.progress}. */
  progress(): QueueProgress {
    return { deviceBase: this.#q.returned & 0xffff, inflight: this.inflight, guestBase: this.guestBase };
  }

  #markHeld(): void {
    const { dirty } = this.#path;
    if (dirty === undefined) return;
    let pages = 0;
    for (const id of this.#held()) pages += markChain(this.#q, this.#firstOf(id), dirty);
    this.#counters[COUNTER.dirtyPages]! += pages;
  }

  // Makes all chains in flight available again, where they are exactly those that were taken last.
  #rewind(): boolean {
    const q = this.#q;
    if (((q.guestNext - q.open) & 0xffff) !== q.guestFlushed || q.guestUsedNext !== q.guestFlushed) return false;
    const oldest = this.#held()[0];
    if (oldest !== undefined && ((q.order - q.records[(oldest << 2) + RECORD_ORDER]!) | 0) > q.open) return false;
    q.taken.fill(0);
    q.open = 0;
    q.guestNext = q.guestSeen = q.guestFlushed;
    return true;
  }

  /** See {@linkcode RelayCore.finish}. @throws SvqError RING_GAP */
  finish(): QueueProgress {
    const { inflight } = this;
    this.#markHeld();
    if (inflight > 0 && !this.#rewind()) {
      throw new SvqError("RING_GAP", `The device gave its ring back with ${inflight} chains missing out of order`);
    }
    // A driver whose kicks were suppressed must not stay silent towards whoever comes next.
    this.enableKicks();
    this.logRing();
    this.#inflight?.end();
    return { deviceBase: this.#q.returned & 0xffff, inflight, guestBase: this.guestBase };
  }

  /** See {@linkcode RelayCore.renew}. */
  renew(start: QueueStart): void {
    const q = this.#q;
    this.#markHeld();
    const held = this.#held().map((id) => ({
      id: q.records[id << 2]!,
      order: q.records[(id << 2) + RECORD_ORDER]!,
      segments: this.#segmentsOf(this.#firstOf(id)),
    }));
    q.openDevice(start.device);
    this.#placer = new Placer(q, start.device, this.#chain.capacity);
    for (const { id, order, segments } of held) {
      const chain = this.#chain;
      chain.clear();
      for (const { address, length, writable } of segments) {
        if (writable) chain.addWritable(address, length);
        else chain.addReadable(address, length);
      }
      chain.id = id;
      // Its place in the order in which the guest's chains were taken stays what it was.
      if (!this.#placer.place(chain, this.#path.translation, order)) {
        throw new SvqError("INTERNAL", "A fresh ring has no room for what the one before it held");
      }
    }
    q.publish();
  }

  #segmentsOf(first: number): { address: number; length: number; writable: boolean }[] {
    const q = this.#q;
    const segments = [];
    for (let index = first;;) {
      const link = q.segments[(index << 2) + 3]!;
      segments.push({ address: q.addressOf(index), length: q.lengthOf(index), writable: link < 0 });
      if ((link & LINK_MORE) === 0) return segments;
      index = link & LINK_INDEX;
    }
  }

  /** See {@linkcode RelayCore.abandon}. */
  abandon(keep: boolean): QueueProgress {
    this.#markHeld();
    if (!keep) this.#inflight?.end();
    return this.progress();
  }

  /** Nothing is held. */
  close(): void {}
}
