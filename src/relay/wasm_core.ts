/**
 * The relay core in WebAssembly: the hot loops of src/wasm/assembly, over windows into guest memory, shadow rings and dirty
 * log. What happens rarely is done here, on the same plain state.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import type { InflightChains, InflightLog } from "../vring/inflight.ts";
import { completePackedBase, PACKED_BASE_START, packedBase, packedPosition } from "../vring/packed.ts";
import {
  checkPackedNum,
  checkSplitNum,
  packedLayout,
  splitLayout,
  VRING_PACKED_DESC_F_AVAIL as PACKED_AVAIL,
  VRING_PACKED_DESC_F_USED as PACKED_USED,
} from "../vring/layout.ts";
import { VringError } from "../vring/rules.ts";
import { type DataPath, maxChainOf, type RelayCore } from "./core.ts";
import { COUNTER } from "./counters.ts";
import { availRingOf, openInflight, packedRingOf } from "./inflight_start.ts";
import { loggedRanges } from "./logged_ring.ts";
import type { QueueProgress, QueueStart, RingPlace } from "./messages.ts";
import { errorOf } from "./wasm_errors.ts";
import { openInflightWindow, takeOverInflight } from "./wasm_inflight.ts";
import type { WasmHost } from "./wasm_host.ts";
import { PLACE, type QueueField, RESULT } from "./wasm_layout.ts";
import { WasmQueue } from "./wasm_queue.ts";

const PACKED_STATE = PACKED_AVAIL | PACKED_USED;
const NO_ROOM = "The device's ring has no room for what was in flight";
const KINDS = { split: 0, packed: 1, heads: 2 } as const;

/** Implements {@linkcode RelayCore} in WebAssembly. */
export class WasmCore implements RelayCore {
  /** Which implementation. */
  readonly kind = "wasm";
  /** See {@linkcode RelayCore.callWanted}. */
  callWanted = false;
  /** See {@linkcode RelayCore.kickWanted}. */
  kickWanted = false;
  /** See {@linkcode RelayCore.full}. */
  full = false;

  readonly #host: WasmHost;
  readonly #path: DataPath;
  readonly #counters: Float64Array;
  readonly #stack = new DisposableStack();
  readonly #guest: RingPlace;
  readonly #queue: WasmQueue;
  // Looking them up costs as much as calling them.
  readonly #forward: (queue: number) => number;
  readonly #returnUsed: (queue: number) => number;
  readonly #at: number;
  #releaseDevice: () => void = () => {};
  #inflight: InflightLog | undefined;
  /** A driver whose chains were taken by a relay before this one is called at the first chance. */
  #mustCall = false;
  #logged: readonly number[] = [];

  /**
   * Opens windows on both rings.
   *
   * @throws VringError, SvqError OUTSIDE_MEMORY when the guest's ring cannot be used; SvqError WASM_UNUSABLE when the ring can
   * be used, but not by this core
   */
  constructor(start: QueueStart, host: WasmHost, path: DataPath, counters: Float64Array) {
    this.#host = host;
    this.#path = path;
    this.#counters = counters;
    this.#guest = start.guest;
    const { guest, device } = start;
    if (guest.packed) checkPackedNum(guest.num);
    else checkSplitNum(guest.num);
    using cleanup = new DisposableStack();
    this.#queue = cleanup.use(new WasmQueue(host.windows, host.env, guest.num, device.num));
    this.#at = this.#queue.at;
    this.#forward = host.exports.forward;
    this.#returnUsed = host.exports.returnUsed;
    cleanup.defer(() => this.#releaseDevice());
    this.#openGuest(start, cleanup);
    this.#openDevice(start);
    this.setLogUsed(start.logUsedGpa);
    if (start.inflight !== undefined) this.#openInflight(start, cleanup);
    this.#stack = cleanup.move();
  }

  #set(field: QueueField, value: number): void {
    this.#queue.set(field, value);
  }

  #get(field: QueueField): number {
    return this.#queue.get(field);
  }

  // The window of a whole region where there is one, else one of the ring's part alone.
  #guestPart(gpa: number, size: number, cleanup: DisposableStack): number {
    const { windows } = this.#host;
    const address = this.#path.memory.addressOf(gpa, size);
    const shown = this.#host.find(gpa, size);
    if (shown !== undefined) return shown;
    const offset = windows.map(address, size);
    if (offset === undefined) throw new SvqError("WASM_UNUSABLE", "no window opens on the guest's ring");
    cleanup.defer(() => windows.release(offset, size));
    return offset;
  }

  #openGuest({ guest, guestBase }: QueueStart, cleanup: DisposableStack): void {
    const layout = guest.packed ? packedLayout(guest.num) : splitLayout(guest.num);
    this.#set("guestPacked", guest.packed ? 1 : 0);
    this.#set("guestNum", guest.num);
    this.#set("guestEventIdx", guest.eventIdx ? 1 : 0);
    this.#set("guestIndirect", guest.indirect ? 1 : 0);
    this.#set("guestInOrder", guest.inOrder ? 1 : 0);
    const parts = { guestDesc: "desc", guestAvail: "avail", guestUsed: "used" } as const;
    for (const [field, part] of Object.entries(parts) as [QueueField, "desc" | "avail" | "used"][]) {
      const align = part === "desc" ? 4 : part === "avail" && !guest.packed ? 2 : 4;
      if (guest[part] % align !== 0) {
        throw new VringError("RING_ALIGNMENT", -1, `The guest's ${part} part at 0x${guest[part].toString(16)} is not aligned to ${align}`);
      }
      const offset = this.#guestPart(guest[part], layout[part].size, cleanup);
      // Guest memory may begin anywhere in its file.
      if (offset % align !== 0) throw new SvqError("WASM_UNUSABLE", "the guest's ring lies at an odd place of its file");
      this.#set(field, offset);
    }
    if (guest.packed) {
      const ring = new Uint16Array(this.#host.windows.memory.buffer, this.#get("guestDesc"), guest.num * 8);
      this.#setPosition(completePackedBase(guestBase, guest.num, ring), 0);
      return;
    }
    const base = guestBase & 0xffff;
    const used = this.#host.exports.peek(this.#get("guestUsed")) >>> 16;
    if (((base - used) & 0xffff) > guest.num) {
      throw new VringError("BASE_INVALID", -1, `The ring base is ${base} and the used index ${used}, with a queue of ${guest.num}`);
    }
    this.#setPosition(base, used);
  }

  #openInflight(start: QueueStart, cleanup: DisposableStack): void {
    const { windows } = this.#host;
    const region = start.inflight!;
    const window = openInflightWindow(windows, region);
    cleanup.defer(() => windows.release(window, region.size));
    this.#inflight = openInflight(start, this.#path)!;
    if (start.resume !== undefined) this.#resume(start.resume);
    takeOverInflight(this.#queue, this.#inflight, window);
  }

  // What was in flight is taken from a ring in private memory, by the same rules as what a guest offers; then it counts as taken
  // from the guest's. The record has it already.
  #resume(resume: InflightChains): void {
    const { windows, exports } = this.#host;
    const { packed, num } = this.#guest;
    const ring = packed ? packedRingOf(resume, num) : new Uint8Array(availRingOf(resume, num).buffer);
    const at = windows.alloc(ring.length);
    using released = new DisposableStack();
    released.defer(() => windows.release(at, ring.length));
    new Uint8Array(windows.memory.buffer, at, ring.length).set(ring);
    const part = packed ? "guestDesc" : "guestAvail";
    const own = this.#get(part);
    this.#set(part, at);
    this.#setPosition(packed ? PACKED_BASE_START : 0, 0);
    const moved = this.#take(exports.take);
    this.#set(part, own);
    this.#setPosition(resume.base, resume.used);
    const slots = resume.entries.reduce((sum, chain) => sum + chain.length, 0);
    if (moved !== resume.ids.length || this.#get("openSlots") !== slots) {
      throw new SvqError("INFLIGHT_INVALID", this.full ? NO_ROOM : "What was in flight is not what its record says");
    }
    this.#noteOrder(resume);
    this.#markHeld();
    this.logRing();
    if (packed) this.#withdrawUsed();
    this.#mustCall = true;
    exports.publishAdded(this.#queue.at);
  }

  // With IN_ORDER used and taken chains lie at the same positions.
  #noteOrder({ ids, entries, used }: InflightChains): void {
    const { packed, num } = this.#guest;
    const order = this.#queue.halves("guestOrder");
    let place = packed ? used & 0x7fff : used & (num - 1);
    ids.forEach((id, i) => {
      order[place] = id;
      place = (place + (packed ? entries[i]!.length : 1)) % num;
    });
  }

  // Somebody who was killed before a flush may have left used descriptors behind the place where the driver looks.
  #withdrawUsed(): void {
    const flags = new Uint16Array(this.#host.windows.memory.buffer, this.#get("guestDesc"), this.#guest.num * 8);
    let [slot, wrap] = [this.#get("guestUsedNext"), this.#get("guestUsedSeen")];
    for (let left = this.#get("openSlots"); left > 0; left--) {
      const at = slot * 8 + 7;
      Atomics.store(flags, at, (Atomics.load(flags, at) & ~PACKED_STATE) | (wrap === 1 ? PACKED_AVAIL : PACKED_USED));
      if (++slot === this.#guest.num) [slot, wrap] = [0, wrap ^ 1];
    }
  }

  // Where the guest's ring goes on. `used`: for a packed ring it is in the base.
  #setPosition(base: number, used: number): void {
    if (this.#guest.packed) {
      this.#set("guestNext", base & 0x7fff);
      this.#set("guestSeen", base >>> 15 & 1);
      this.#set("guestUsedNext", base >>> 16 & 0x7fff);
      this.#set("guestUsedSeen", base >>> 31);
      return;
    }
    this.#set("guestNext", base);
    this.#set("guestSeen", base);
    this.#set("guestUsedNext", used);
    this.#set("guestUsedSeen", used);
  }

  #openDevice(start: QueueStart): void {
    const { windows } = this.#host;
    const { device } = start;
    const { num, packed, tables } = device;
    if (packed) checkPackedNum(num);
    else checkSplitNum(num);
    const heads = start.mode === "used";
    const layout = packed ? packedLayout(num) : splitLayout(num);
    const entries = !heads && device.indirect && tables !== undefined && tables.entries > 1 ? tables.entries : 0;
    // Mode used has no descriptor table of its own.
    const parts: [number, number][] = [[device.avail, layout.avail.size], [device.used, layout.used.size]];
    if (!heads) parts.push([device.desc, layout.desc.size]);
    if (entries > 0) parts.push([tables!.address, num * entries * 16]);
    const first = Math.min(...parts.map(([address]) => address));
    const size = Math.max(...parts.map(([address, length]) => address + length)) - first;
    const offset = windows.map(first, size);
    if (offset === undefined) throw new SvqError("WASM_UNUSABLE", "no window opens on the shadow ring");
    this.#releaseDevice();
    this.#releaseDevice = () => windows.release(offset, size);
    this.#set("deviceKind", heads ? KINDS.heads : packed ? KINDS.packed : KINDS.split);
    this.#set("deviceNum", num);
    this.#set("deviceDesc", heads ? 0 : offset + (device.desc - first));
    this.#set("deviceAvail", offset + (device.avail - first));
    this.#set("deviceUsed", offset + (device.used - first));
    this.#set("deviceEventIdx", device.eventIdx ? 1 : 0);
    this.#set("tables", entries > 0 ? offset + (tables!.address - first) : 0);
    this.#set("tableEntries", entries);
    this.#set("tablesIovaLow", entries > 0 ? tables!.iova % 2 ** 32 : 0);
    this.#set("tablesIovaHigh", entries > 0 ? Math.floor(tables!.iova / 2 ** 32) : 0);
    this.#set("maxChain", maxChainOf(start));
    this.#set("deviceInOrder", device.inOrder ? 1 : 0);
    // A table of one format cannot be read as one of the other.
    this.#set("passTables", device.indirect && device.passTables === true && packed === this.#guest.packed ? 1 : 0);
    this.#queue.resetDevice(packed, heads);
  }

  #fail(result: number): never {
    throw errorOf(result, {
      index: this.#get("errorIndex") | 0,
      value: this.#get("errorValue"),
      num: this.#guest.num,
      deviceNum: this.#get("deviceNum"),
      limit: this.#get("maxChain"),
      published: this.#get("devicePublished"),
    });
  }

  #countDirty(): void {
    const pages = this.#queue.takeDirtyPages();
    if (pages > 0) this.#counters[COUNTER.dirtyPages]! += pages;
  }

  /** See {@linkcode RelayCore.forward}. */
  forward(): number {
    this.kickWanted = false;
    this.full = false;
    const result = this.#forward(this.#at);
    if (result >= 0 && (result & (RESULT.full | RESULT.grow)) === 0) {
      this.kickWanted = (result & RESULT.notify) !== 0;
      return result & RESULT.count;
    }
    return this.#finishTaking(this.#forward, result);
  }

  #take(step: (queue: number) => number): number {
    this.kickWanted = false;
    this.full = false;
    return this.#finishTaking(step, step(this.#at));
  }

  #finishTaking(step: (queue: number) => number, first: number): number {
    let moved = 0;
    for (let result = first;; result = step(this.#at)) {
      if (result < 0) this.#fail(result);
      moved += result & RESULT.count;
      if ((result & RESULT.notify) !== 0) this.kickWanted = true;
      if ((result & RESULT.full) !== 0) {
        this.full = true;
        this.#counters[COUNTER.full]!++;
      }
      if ((result & RESULT.grow) === 0) return moved;
      this.#queue.grow();
    }
  }

  /** See {@linkcode RelayCore.returnUsed}. */
  returnUsed(): number {
    this.callWanted = false;
    const result = this.#returnUsed(this.#at);
    if (result < 0) this.#fail(result);
    if (result === 0) return 0;
    const moved = result & RESULT.count;
    this.callWanted = (result & RESULT.notify) !== 0 || this.#mustCall;
    this.#mustCall = false;
    this.#counters[COUNTER.chains]! += moved;
    this.#counters[COUNTER.bytes]! += this.#queue.takeBytes();
    this.#countDirty();
    // The used ring's own pages are marked after it was written: the reader clears a bit first and copies then.
    if (this.#logged.length > 0) this.logRing();
    return moved;
  }

  /** See {@linkcode RelayCore.disableCalls}. */
  disableCalls(): void {
    this.#host.exports.disableCalls(this.#queue.at);
  }

  /** See {@linkcode RelayCore.enableCalls}. */
  enableCalls(): boolean {
    const result = this.#host.exports.enableCalls(this.#queue.at);
    if (result < 0) this.#fail(result);
    return result !== 0;
  }

  /** See {@linkcode RelayCore.disableKicks}. */
  disableKicks(): void {
    this.#host.exports.disableKicks(this.#queue.at);
  }

  /** See {@linkcode RelayCore.enableKicks}. */
  enableKicks(): boolean {
    const result = this.#host.exports.enableKicks(this.#queue.at);
    if (result < 0) this.#fail(result);
    return result !== 0;
  }

  /** See {@linkcode RelayCore.setLogUsed}. */
  setLogUsed(gpa: number): void {
    this.#logged = loggedRanges(gpa, this.#guest);
  }

  /** See {@linkcode RelayCore.logRing}. */
  logRing(): void {
    const { dirty } = this.#path;
    if (dirty === undefined) return;
    for (let i = 0; i < this.#logged.length; i += 2) dirty.markRange(this.#logged[i]!, this.#logged[i + 1]!);
  }

  /** See {@linkcode RelayCore.inflight}. */
  get inflight(): number {
    return this.#get("inflight");
  }

  /** See {@linkcode RelayCore.guestBase}. */
  get guestBase(): number {
    if (!this.#guest.packed) return this.#get("guestNext");
    const used = packedPosition(this.#get("guestUsedNext"), this.#get("guestUsedSeen"));
    return packedBase(packedPosition(this.#get("guestNext"), this.#get("guestSeen")), used);
  }

  /** See {@linkcode RelayCore.guestUsed}. */
  get guestUsed(): number {
    return this.#guest.packed ? this.guestBase >>> 16 : (this.guestBase - this.#get("open")) & 0xffff;
  }

  #deviceBase(): number {
    if (this.#get("deviceKind") !== KINDS.packed) return this.#get("returned") & 0xffff;
    const used = packedPosition(this.#get("deviceUsedNext"), this.#get("deviceUsedSeen"));
    return packedBase(used, used);
  }

  /** See {@linkcode RelayCore.progress}. */
  progress(): QueueProgress {
    return { deviceBase: this.#deviceBase(), inflight: this.inflight, guestBase: this.guestBase };
  }

  /** See {@linkcode RelayCore.uses}. */
  uses(gpa: number, size: number): number {
    const touches = ({ address, length }: { address: number; length: number }) => address < gpa + size && address + length > gpa;
    return this.#queue.held().filter(({ segments }) => segments.some(touches)).length;
  }

  // Makes all chains in flight available again, where they are exactly those that were taken last.
  #rewind(): boolean {
    const open = this.#get("open");
    const { packed, num } = this.#guest;
    if (packed) {
      const lap = this.#get("guestSeen") === this.#get("guestUsedSeen") ? 0 : num;
      const distance = (this.#get("guestNext") - this.#get("guestUsedNext") + lap + 2 * num) % (2 * num);
      if (distance !== this.#get("openSlots")) return false;
    } else if (((this.#get("guestNext") - open) & 0xffff) !== this.#get("guestUsedSeen")) return false;
    if (this.#queue.done.includes(1) || this.#queue.held().some(({ age }) => age > open)) return false;
    this.#queue.halves("taken").fill(0);
    this.#set("open", 0);
    this.#set("openSlots", 0);
    this.#set("guestNext", this.#get("guestUsedNext"));
    this.#set("guestSeen", packed ? this.#get("guestUsedSeen") : this.#get("guestUsedNext"));
    return true;
  }

  /** See {@linkcode RelayCore.finish}. */
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
    return { deviceBase: this.#deviceBase(), inflight, guestBase: this.guestBase };
  }

  #markHeld(): void {
    const result = this.#host.exports.markHeld(this.#queue.at);
    this.#countDirty();
    if (result < 0) this.#fail(result);
  }

  /** See {@linkcode RelayCore.renew}. */
  renew(start: QueueStart): void {
    this.#markHeld();
    const held = this.#queue.held();
    this.#openDevice(start);
    const { exports } = this.#host;
    const taken = this.#get("order");
    for (const { guestId, order, segments } of held) {
      for (;;) {
        exports.begin();
        for (const { address, length, writable } of segments) exports.segment(this.#queue.at, address, length, writable ? 1 : 0);
        const id = exports.add(this.#queue.at, guestId);
        // Its place in the order in which the guest's chains were taken stays what it was.
        if (id >= 0) this.#queue.setOrder(id, order);
        if (id >= 0) break;
        if (id === PLACE.full) throw new SvqError("INTERNAL", "A fresh ring has no room for what the one before it held");
        if (id !== PLACE.grow) this.#fail(id);
        this.#queue.grow();
      }
    }
    this.#set("order", taken);
    exports.publishAdded(this.#queue.at);
  }

  /** See {@linkcode RelayCore.abandon}. */
  abandon(keep: boolean): QueueProgress {
    this.#markHeld();
    if (!keep) this.#inflight?.end();
    return this.progress();
  }

  /** Closes the windows. */
  close(): void {
    this.#stack.dispose();
  }
}
