/**
 * One queue of an embedded driver, in the driver's worker.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { signalEventfd } from "../ffi/mod.ts";
import { hasBit } from "../uapi/bits.ts";
import { VIRTIO_FEATURE_BITS } from "../uapi/virtio.ts";
import { Chain, type DriverQueue, type DriverQueueState } from "../vring/queue.ts";
import { PackedDriver } from "../vring/packed.ts";
import { SplitDriver } from "../vring/split.ts";
import { INDIRECT_ENTRIES } from "./layout.ts";
import { type GuestRam, logWrite, type Workload } from "./workload.ts";

function openRing(ram: GuestRam, index: number, features: bigint): DriverQueue {
  const { layout, bytes } = ram;
  const start = layout.ringOffset(index);
  const { desc, avail, used } = layout.ring;
  const indirect = hasBit(features, VIRTIO_FEATURE_BITS.INDIRECT_DESC);
  const area = { buffer: bytes.buffer, byteOffset: layout.indirectOffset(index), address: layout.gpa(layout.indirectOffset(index)) };
  const options = {
    num: layout.options.num,
    desc: { buffer: bytes.buffer, byteOffset: start + desc.offset },
    avail: { buffer: bytes.buffer, byteOffset: start + avail.offset },
    used: { buffer: bytes.buffer, byteOffset: start + used.offset },
    eventIdx: hasBit(features, VIRTIO_FEATURE_BITS.EVENT_IDX),
    inOrder: hasBit(features, VIRTIO_FEATURE_BITS.IN_ORDER),
    ...(indirect ? { indirect: { ...area, entries: INDIRECT_ENTRIES } } : {}),
  };
  return layout.options.packed ? new PackedDriver(options) : new SplitDriver(options);
}

/** What a queue's owner does with each answer. */
export interface Finisher {
  /** A chain came back. */
  finished: (queue: GuestQueue, slot: number, written: number, startedMs: number) => void;
}

/** A ring with the slots of its requests. */
export class GuestQueue {
  /** The ring. */
  readonly ring: DriverQueue;
  /** A call has come, or is assumed. */
  called = false;
  /** Why the queue stopped. */
  broken: Error | undefined;
  readonly #ram: GuestRam;
  readonly #slotOf: Int32Array;
  readonly #startedMs: Float64Array;
  readonly #free: number[];
  readonly #firstSlot: number;
  readonly #chain = new Chain(64);
  // Chains that are not the workload's, by id.
  readonly #foreign = new Map<number, () => void>();

  /** Queue `index`. @param fds its eventfds */
  constructor(readonly index: number, ram: GuestRam, features: bigint, readonly fds: { kick: number; call: number }) {
    this.#ram = ram;
    this.ring = openRing(ram, index, features);
    const { num, depth } = ram.layout.options;
    this.#slotOf = new Int32Array(num).fill(-1);
    this.#startedMs = new Float64Array(num);
    this.#firstSlot = index * depth;
    this.#free = Array.from({ length: depth }, (_, i) => this.#firstSlot + depth - 1 - i);
  }

  /** Requests that are out. */
  get inflight(): number {
    return this.#ram.layout.options.depth - this.#free.length;
  }

  /** Takes all answers. @returns how many. @throws VringError when the device breaks a rule */
  take(finisher: Finisher): number {
    let count = 0;
    for (let id = this.ring.take(); id >= 0; id = this.ring.take()) {
      const foreign = this.#foreign.get(id);
      if (foreign !== undefined) {
        this.#foreign.delete(id);
        foreign();
        continue;
      }
      const slot = this.#slotOf[id]!;
      this.#slotOf[id] = -1;
      finisher.finished(this, slot, this.ring.usedLength, this.#startedMs[id]!);
      this.#free.push(slot);
      count++;
    }
    return count;
  }

  /** Adds up to `limit` requests, as many as there are slots, and publishes them. @returns how many */
  fill(workload: Workload, limit: number, now: number): number {
    let count = 0;
    while (count < limit && this.#free.length > 0) {
      const slot = this.#free.pop()!;
      if (!workload.prepare(slot, this.#chain)) {
        this.#free.push(slot);
        break;
      }
      const id = this.ring.addChain(this.#chain);
      if (id < 0) {
        workload.cancel(slot);
        this.#free.push(slot);
        break;
      }
      this.#slotOf[id] = slot;
      this.#startedMs[id] = now;
      count++;
    }
    if (count > 0) this.publish();
    return count;
  }

  /**
   * Adds a chain that is no request of the workload; {@linkcode publish} follows.
   *
   * @param done called when it is back
   * @returns false when the ring has no room now
   */
  addForeign(chain: Chain, done: () => void): boolean {
    const id = this.ring.addChain(chain);
    if (id < 0) return false;
    this.#foreign.set(id, done);
    return true;
  }

  /** Publishes what was added and kicks where the device wants it. */
  publish(): void {
    this.#logRing();
    if (this.ring.publish()) signalEventfd(this.fds.kick);
  }

  #logRing(): void {
    if (this.#ram.log === undefined) return;
    const { layout } = this.#ram;
    logWrite(this.#ram, layout.ringOffset(this.index), layout.ringBytes);
  }

  /** Asks for calls. @returns whether answers are there already */
  enableCalls(): boolean {
    const more = this.ring.enableCalls();
    this.#logRing();
    return more;
  }

  /** The ring and the slots of what is out. @throws SvqError DISK_BUSY while chains are out that are not the workload's */
  save(): { ring: DriverQueueState; owners: [number, number][] } {
    if (this.#foreign.size > 0) {
      throw new SvqError("DISK_BUSY", `The device still has ${this.#foreign.size} requests of an earlier copy of its disk`, {
        hint: "try again when the device has answered them",
      });
    }
    const owners: [number, number][] = [];
    this.#slotOf.forEach((slot, id) => {
      if (slot >= 0) owners.push([id, slot]);
    });
    return { ring: this.ring.save(), owners };
  }

  /** Takes over a state; latencies of what is out count from `now`. @throws SvqError STATE_INVALID */
  restore(ring: DriverQueueState, owners: readonly [number, number][], now: number): void {
    this.ring.restore(ring);
    for (const [id, slot] of owners) {
      const at = this.#free.indexOf(slot);
      if (at < 0 || this.#slotOf[id] !== -1) {
        throw new SvqError("STATE_INVALID", `The driver's state cannot be used: chain ${id} of queue ${this.index} names slot ${slot}`);
      }
      this.#free.splice(at, 1);
      this.#slotOf[id] = slot;
      this.#startedMs[id] = now;
    }
  }
}
