/**
 * The control queue of a network device: what the guest commands is copied into pages of the relay's own, checked, given to the
 * device, and its answer copied back. The device never sees guest memory on this queue, and what it was told is on record. One
 * command is at the device at a time, so that the record has their order.
 *
 * The relay puts commands of its own into the same ring: to bring a fresh device to the state that another one had, or because
 * the VMM keeps the control queue to itself. Then there is no guest's ring.
 *
 * @module
 */
import { LOG_PAGE_BYTES } from "../dirty/bitmap.ts";
import { SvqError } from "../errors.ts";
import { bufferAt } from "../ffi/mod.ts";
import type { IotlbMiss } from "../iova/iotlb.ts";
import { decodeNetCommand, NET_COMMAND_MAX, netCommandFeature } from "../net/command.ts";
import { hasBit } from "../uapi/bits.ts";
import { VIRTIO_NET_CTRL_ACK } from "../uapi/virtio_net.ts";
import { DESC_BYTES } from "../vring/layout.ts";
import { PackedDriver } from "../vring/packed.ts";
import { Chain, type DeviceQueue, type DriverQueue } from "../vring/queue.ts";
import type { DataPath, RelayCore } from "./core.ts";
import { COUNTER } from "./counters.ts";
import { IommuChains } from "./iommu_chains.ts";
import { guestQueue, shadowQueue } from "./js_core.ts";
import { loggedRanges } from "./logged_ring.ts";
import { type ControlEvent, type ControlStart, type OwnCommand, type QueueProgress, type QueueStart, UNANSWERED } from "./messages.ts";

/** Room for an answer: the acknowledgement and what a question brings back, bytes. */
const ANSWER_BYTES = 4096;
/** Commands that are looked at in one go. */
const BATCH = 64;
/** Commands without success that the main thread is told of in one second: a guest can make more of them than anybody can log. */
const FAILURES_TOLD = 16;
/** Chains of a guest's control queue have few segments; this is what their record holds. */
const MAX_CHAIN = 1024;

/** A guest's chain that waits for the device. */
interface GuestRequest {
  id: number;
  /** GPA and length in turn of the writable part. */
  writable: number[];
  /** As the guest's driver names them, where it has an IOMMU: address and length in turn of all of it. */
  iovas: number[];
}

interface Request {
  /** The relay's own: its number. */
  id?: number;
  bytes: Uint8Array<ArrayBuffer>;
  /** Bytes that the device may answer. */
  room: number;
  /** Undefined: the relay's own. */
  guest: GuestRequest | undefined;
}

/** Implements {@linkcode RelayCore} for a control queue. */
export class ControlCore implements RelayCore {
  /** JavaScript: control queues are slow by nature. */
  readonly kind = "js";
  /** See {@linkcode RelayCore.callWanted}. */
  callWanted = false;
  /** See {@linkcode RelayCore.kickWanted}. */
  kickWanted = false;
  readonly #index: number;
  readonly #start: QueueStart;
  readonly #control: ControlStart;
  readonly #path: DataPath;
  readonly #counters: Float64Array;
  readonly #report: (event: ControlEvent) => void;
  readonly #guest: DeviceQueue | undefined;
  readonly #chain = new Chain(MAX_CHAIN);
  readonly #iommu: IommuChains | undefined;
  #device: DriverQueue;
  #page: { bytes: Uint8Array; iova: number; limit: number };
  /** Commands of the relay's own that were not given to the device yet, and behind them one of the guest's that a lost device had. */
  #waiting: Request[] = [];
  #out: Request | undefined;
  #returned = 0;
  /** The guest wants a call for what came back, or was refused, since the last one. */
  #callDue = false;
  #logged: readonly number[] = [];
  /** Commands without success since `since` (ms), and those of them, or before them, that nobody was told of. */
  #failures = { since: -Infinity, count: 0, untold: 0 };

  /**
   * @param report is told of each command that was answered or refused
   * @throws VringError, SvqError OUTSIDE_MEMORY when the guest's ring cannot be used
   */
  constructor(start: QueueStart, path: DataPath, counters: Float64Array, report: (event: ControlEvent) => void) {
    this.#index = start.index;
    this.#start = start;
    this.#control = start.control!;
    this.#path = path;
    this.#counters = counters;
    this.#report = report;
    this.#guest = this.#control.guestless ? undefined : guestQueue(start, path, MAX_CHAIN, undefined);
    this.#iommu = start.iommu === true ? new IommuChains(path, path.iotlb!, MAX_CHAIN) : undefined;
    this.#device = deviceRing(start);
    this.#page = pageOf(start);
    this.setLogUsed(start.logUsedGpa);
    this.inject(this.#control.first);
  }

  /** Puts commands of the relay's own behind those that wait; each is told back. */
  inject(commands: readonly OwnCommand[]): void {
    const room = this.#control.answers ? 1 : 0;
    this.#waiting.push(...commands.map(({ id, bytes }) => ({ id, bytes, room, guest: undefined })));
  }

  /** See {@linkcode RelayCore.miss}. */
  get miss(): IotlbMiss | undefined {
    return this.#iommu?.miss;
  }

  /** The device works on a command: nothing else is given to it. */
  get full(): boolean {
    return this.#out !== undefined;
  }

  /** See {@linkcode RelayCore.inflight}. */
  get inflight(): number {
    return this.#device.inflight;
  }

  /** See {@linkcode RelayCore.guestBase}. */
  get guestBase(): number {
    return this.#guest?.base ?? 0;
  }

  /** See {@linkcode RelayCore.guestUsed}. */
  get guestUsed(): number {
    const guest = this.#guest;
    if (guest === undefined) return 0;
    return guest.layout === "split" ? (guest.base - guest.inflight) & 0xffff : guest.base >>> 16;
  }

  // ---- to the device

  /** See {@linkcode RelayCore.forward}. */
  forward(): number {
    this.kickWanted = false;
    let moved = 0;
    // A guest that makes nothing but what is refused must not keep the Worker from its other queues and from its orders.
    while (this.#out === undefined && moved < BATCH) {
      const request = this.#waiting.shift() ?? this.#next();
      if (request === undefined) break;
      moved++;
      // Refused: the next one may be better.
      if (request === "refused") continue;
      this.#send(request);
    }
    return moved;
  }

  #send(request: Request): void {
    const { bytes, iova, limit } = this.#page;
    const { length } = request.bytes;
    if (length > limit) {
      // The guest's were checked when they came; a ring that is smaller now can only be that of a successor.
      this.#answer(request, VIRTIO_NET_CTRL_ACK.ERR, "it is longer than the relay has room for");
      return;
    }
    bytes.set(request.bytes, 0);
    bytes.fill(0, limit, limit + request.room);
    // A device that answers nothing has not obeyed.
    bytes[limit] = VIRTIO_NET_CTRL_ACK.ERR;
    const answer = request.room === 0 ? [] : [{ address: iova + limit, length: request.room }];
    if (this.#device.add([{ address: iova, length }], answer) < 0) throw new SvqError("INTERNAL", "A control ring has no room");
    this.#out = request;
    if (this.#device.publish()) this.kickWanted = true;
  }

  // The guest's next command, copied out of its memory once and checked then.
  #next(): Request | "refused" | undefined {
    const guest = this.#guest;
    if (guest === undefined) return undefined;
    const chain = this.#pop(guest);
    if (chain === undefined) return undefined;
    const request: Request = {
      bytes: new Uint8Array(0),
      room: Math.min(chain.writableBytes, ANSWER_BYTES),
      guest: requestOf(chain, this.#iommu?.iovas),
    };
    const limit = Math.min(NET_COMMAND_MAX, this.#page.limit);
    let refused: string | undefined;
    if (chain.readableBytes > limit) refused = `it has ${chain.readableBytes} bytes, and there is room for ${limit}`;
    else if (chain.writableBytes < 1) refused = "it has no room for an answer";
    else {
      request.bytes = this.#copy(chain);
      refused = this.#objection(request.bytes);
    }
    if (refused === undefined) return request;
    this.#answer(request, VIRTIO_NET_CTRL_ACK.ERR, refused);
    return "refused";
  }

  #pop(guest: DeviceQueue): Chain | undefined {
    const chain = this.#chain;
    const iommu = this.#iommu;
    if (iommu === undefined) return guest.pop(chain) ? chain : undefined;
    iommu.miss = undefined;
    if (!iommu.try(() => guest.pop(chain))) return undefined;
    if (iommu.try(() => (iommu.translate(chain), true))) return iommu.chain;
    guest.unpop();
    return undefined;
  }

  #copy(chain: Chain): Uint8Array<ArrayBuffer> {
    const bytes = new Uint8Array(chain.readableBytes);
    let at = 0;
    for (let i = 0; i < chain.readableCount; i++) {
      for (let k = 0; k < chain.lengths[i]!; k++) bytes[at++] = this.#path.memory.readByte(chain.addresses[i]! + k);
    }
    return bytes;
  }

  // What no device would be right to do. A command that nobody here knows goes to the device, which may know it.
  #objection(bytes: Uint8Array): string | undefined {
    try {
      const command = decodeNetCommand(bytes);
      const feature = netCommandFeature(command);
      if (feature === undefined || hasBit(this.#control.features, feature)) return undefined;
      return `${command.name} was not negotiated`;
    } catch (error) {
      return error instanceof Error ? error.message : String(error);
    }
  }

  // ---- from the device

  /** See {@linkcode RelayCore.returnUsed}. */
  returnUsed(): number {
    let moved = 0;
    while (this.#device.take() >= 0) {
      const request = this.#out!;
      this.#out = undefined;
      this.#returned++;
      moved++;
      const { bytes, limit } = this.#page;
      // Copied once: the guest and the record must not be told different things by a device that changes its mind.
      const answer = bytes.slice(limit, limit + request.room);
      this.#answer(request, request.room === 0 ? VIRTIO_NET_CTRL_ACK.OK : answer[0]!, undefined, answer);
    }
    this.callWanted = this.#callDue;
    this.#callDue = false;
    return moved;
  }

  // Without `answer` the guest is told `ack` alone.
  #answer(request: Request, ack: number, refused: string | undefined, answer = Uint8Array.of(ack).subarray(0, request.room)): void {
    const { guest } = request;
    if (guest !== undefined) {
      this.#markWritable(guest);
      this.#copyBack(guest, answer);
      this.#guest!.push(guest.id, answer.length);
      this.#counters[COUNTER.chains]!++;
      this.#counters[COUNTER.bytes]! += request.bytes.length + answer.length;
      if (this.#guest!.flush()) this.#callDue = true;
      this.logRing();
    }
    this.#tell(request, ack, refused);
  }

  #tell(request: Request, ack: number, reason?: string): void {
    const { id, bytes } = request;
    let refused = reason;
    if (id === undefined && ack !== VIRTIO_NET_CTRL_ACK.OK) {
      const failures = this.#failures;
      const now = performance.now();
      if (now - failures.since >= 1000) {
        failures.since = now;
        failures.count = 0;
      }
      if (failures.count++ >= FAILURES_TOLD) {
        failures.untold++;
        return;
      }
      if (failures.untold > 0) refused = `${reason ?? `the device answered ${ack}`} (before it ${failures.untold} more had no success)`;
      failures.untold = 0;
    }
    this.#report({
      controlled: this.#index,
      bytes,
      ack,
      ...(id === undefined ? {} : { id }),
      ...(refused === undefined ? {} : { refused }),
    });
  }

  #copyBack({ writable }: GuestRequest, answer: Uint8Array): void {
    let at = 0;
    for (let i = 0; i < writable.length && at < answer.length; i += 2) {
      const length = Math.min(writable[i + 1]!, answer.length - at);
      // Memory that was unplugged meanwhile takes its answer along.
      if (!this.#path.memory.contains(writable[i]!, length)) return;
      for (let k = 0; k < length; k++) this.#path.memory.writeByte(writable[i]! + k, answer[at++]!);
    }
  }

  #markWritable({ writable }: GuestRequest): void {
    const dirty = this.#path.dirty;
    if (dirty === undefined) return;
    for (let i = 0; i < writable.length; i += 2) {
      const [gpa, length] = [writable[i]!, writable[i + 1]!];
      if (!dirty.markRange(gpa, length)) {
        throw new SvqError("LOG_TOO_SMALL", `Guest memory 0x${gpa.toString(16)}+${length} was written and lies outside the dirty log`);
      }
      this.#counters[COUNTER.dirtyPages]! += Math.ceil((gpa % LOG_PAGE_BYTES + length) / LOG_PAGE_BYTES);
    }
  }

  // ---- notifications and the log

  /** See {@linkcode RelayCore.disableCalls}. */
  disableCalls(): void {
    this.#device.disableCalls();
  }

  /** See {@linkcode RelayCore.enableCalls}. */
  enableCalls(): boolean {
    return this.#device.enableCalls() || this.#callDue;
  }

  /** See {@linkcode RelayCore.disableKicks}. */
  disableKicks(): void {
    this.#guest?.disableKicks();
  }

  /** See {@linkcode RelayCore.enableKicks}. */
  enableKicks(): boolean {
    return this.#guest?.enableKicks() ?? false;
  }

  /** See {@linkcode RelayCore.setLogUsed}. */
  setLogUsed(gpa: number): void {
    this.#logged = this.#guest === undefined ? [] : loggedRanges(gpa, this.#start.guest);
  }

  /** See {@linkcode RelayCore.logRing}. */
  logRing(): void {
    const dirty = this.#path.dirty;
    if (dirty === undefined) return;
    for (let i = 0; i < this.#logged.length; i += 2) dirty.markRange(this.#logged[i]!, this.#logged[i + 1]!);
  }

  // ---- life

  /** See {@linkcode RelayCore.uses}: where the answer goes. */
  uses(gpa: number, size: number): number {
    return touches(this.#out?.guest?.writable ?? [], gpa, size);
  }

  /** See {@linkcode RelayCore.usesIova}. */
  usesIova(iova: number, size: number): number {
    return touches(this.#out?.guest?.iovas ?? [], iova, size);
  }

  /** See {@linkcode RelayCore.progress}. */
  progress(): QueueProgress {
    return { deviceBase: this.#deviceBase(), inflight: this.#device.inflight, guestBase: this.guestBase };
  }

  #deviceBase(): number {
    if (!(this.#device instanceof PackedDriver)) return this.#returned & 0xffff;
    const used = this.#device.usedPosition;
    return (used | used << 16) >>> 0;
  }

  /** See {@linkcode RelayCore.finish}. */
  finish(): QueueProgress {
    const inflight = this.#device.inflight;
    // Only one is ever taken, so it is the last one.
    const held = this.#out?.guest ?? this.#waiting.find((request) => request.guest !== undefined)?.guest;
    if (held !== undefined && !this.#guest!.rewind()) throw new SvqError("RING_GAP", "A control command is missing out of order");
    this.#forsake();
    this.#guest?.enableKicks();
    this.logRing();
    return { deviceBase: this.#deviceBase(), inflight, guestBase: this.guestBase };
  }

  // Who waits for an answer is told that there will be none.
  #forsake(): void {
    for (const request of [...(this.#out === undefined ? [] : [this.#out]), ...this.#waiting]) {
      if (request.guest === undefined) this.#tell(request, UNANSWERED);
    }
    this.#out = undefined;
    this.#waiting = [];
  }

  /** See {@linkcode RelayCore.renew}: the successor gets what brings it to the state of the lost one, then what that one had in hand. */
  renew(start: QueueStart): void {
    const held = this.#out?.guest === undefined ? this.#waiting.filter((request) => request.guest !== undefined) : [this.#out];
    if (this.#out !== undefined) this.#waiting.unshift(this.#out);
    this.#waiting = this.#waiting.filter((request) => request.guest === undefined);
    this.#forsake();
    this.#device = deviceRing(start);
    this.#page = pageOf(start);
    this.#returned = 0;
    this.inject(start.control!.first);
    this.#waiting.push(...held);
  }

  /** See {@linkcode RelayCore.abandon}. */
  abandon(_keep: boolean): QueueProgress {
    const held = this.#out?.guest;
    if (held !== undefined) this.#markWritable(held);
    this.#forsake();
    return this.progress();
  }

  /** Nothing is held. */
  close(): void {}
}

// No tables: their place holds the commands.
function deviceRing(start: QueueStart): DriverQueue {
  const { tables: _tables, ...device } = start.device;
  return shadowQueue({ ...start, device: { ...device, indirect: false } });
}

function pageOf({ device: { num, tables } }: QueueStart): { bytes: Uint8Array; iova: number; limit: number } {
  const size = tables === undefined ? 0 : Math.min(num * tables.entries * DESC_BYTES, NET_COMMAND_MAX + ANSWER_BYTES);
  if (tables === undefined || size <= ANSWER_BYTES) {
    throw new SvqError("RING_TOO_LARGE", `A control ring of ${num} has no room for commands`);
  }
  return { bytes: new Uint8Array(bufferAt(tables.address, size)), iova: tables.iova, limit: size - ANSWER_BYTES };
}

function requestOf(chain: Chain, iovas: Float64Array | undefined): GuestRequest {
  const writable: number[] = [];
  const named: number[] = [];
  for (let i = 0; i < chain.count; i++) {
    if (i >= chain.readableCount) writable.push(chain.addresses[i]!, chain.lengths[i]!);
    if (iovas !== undefined) named.push(iovas[i]!, chain.lengths[i]!);
  }
  return { id: chain.id, writable, iovas: named };
}

function touches(ranges: readonly number[], start: number, size: number): number {
  for (let i = 0; i < ranges.length; i += 2) if (ranges[i]! < start + size && ranges[i]! + ranges[i + 1]! > start) return 1;
  return 0;
}
