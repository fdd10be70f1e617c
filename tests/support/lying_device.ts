/**
 * A device that breaks its promises on purpose: a loopback device (or a disk, enough of one for a driver) in the test's own
 * thread, which writes the used ring by hand.
 */
import { drainEventfd, dupFd, type OwnedFd, readable, signalEventfd } from "../../src/ffi/mod.ts";
import { cancelWaits } from "../../src/ffi/reactor.ts";
import { GuestMemory } from "../../src/memory/guest_memory.ts";
import type { MemoryRegion } from "../../src/memory/region.ts";
import { bitsOf } from "../../src/uapi/bits.ts";
import { VIRTIO_FEATURE_BITS } from "../../src/uapi/virtio.ts";
import type { BackendInfo, VhostBackend, VringAddresses } from "../../src/vhost/backend.ts";

export interface Lies {
  /** This answer is never given (they are counted from 0). */
  drop?: number;
  /** These answers are never given. */
  keep?: readonly number[];
  /** This answer is given twice. */
  duplicate?: number;
  /** In this answer a byte is wrong. */
  corrupt?: number;
  /** This answer's call is not signalled, and nothing afterwards until a kick. */
  dropCall?: number;
}

const num = 64;

export class LyingDevice implements VhostBackend {
  readonly info: BackendInfo = {
    kind: "sim",
    address: "test:lying",
    queueNum: 1,
    maxMemSlots: 8,
    protocolFeatures: 0n,
    canSuspend: false,
    hasConfig: false,
  };
  onConfigChange: (() => void) | undefined;
  onFailure: ((error: Error) => void) | undefined;
  readonly #memory = new GuestMemory();
  #kick: OwnedFd | undefined;
  #call: OwnedFd | undefined;
  #addresses: VringAddresses | undefined;
  #answers = 0;
  #lastAvail = 0;
  #usedIdx = 0;
  #closed = false;

  /** The beginning of each request, in the order in which they were taken. */
  readonly seen: string[] = [];
  /** Of those, the ones that were kept. */
  readonly held: string[] = [];

  constructor(readonly lies: Lies) {}

  static readonly ringSize = num;

  async #run(): Promise<void> {
    const kick = this.#kick!.fd;
    try {
      while (!this.#closed) {
        await readable(kick);
        drainEventfd(kick);
        this.#serve();
      }
    } catch { /* closed */ }
  }

  #serve(): void {
    const { desc, avail, used } = this.#addresses!;
    const availRing = new Uint16Array(this.#memory.buffer(avail, 4 + 2 * num));
    let quiet = false;
    let any = false;
    while (this.#lastAvail !== Atomics.load(availRing, 1)) {
      const head = availRing[2 + this.#lastAvail++ % num]!;
      this.#lastAvail &= 0xffff;
      const written = this.#echo(desc, head);
      const answer = this.#answers++;
      if (answer === this.lies.drop) continue;
      if (this.lies.keep?.includes(answer) === true) {
        this.held.push(this.seen.at(-1)!);
        continue;
      }
      this.#push(used, head, written);
      if (answer === this.lies.duplicate) this.#push(used, head, written);
      quiet ||= answer === this.lies.dropCall;
      any = true;
    }
    if (any && !quiet) signalEventfd(this.#call!.fd);
  }

  #push(used: number, id: number, length: number): void {
    const words = new Uint32Array(this.#memory.buffer(used, 4 + 8 * num));
    const index = new Uint16Array(words.buffer);
    words[1 + this.#usedIdx % num * 2] = id;
    words[2 + this.#usedIdx % num * 2] = length;
    this.#usedIdx = (this.#usedIdx + 1) & 0xffff;
    Atomics.store(index, 1, this.#usedIdx);
  }

  #echo(descGpa: number, head: number): number {
    const table = new DataView(this.#memory.buffer(descGpa, 16 * num));
    const bytes: number[] = [];
    let written = 0;
    for (let index = head, more = true; more;) {
      const gpa = Number(table.getBigUint64(index * 16, true));
      const length = table.getUint32(index * 16 + 8, true);
      const flags = table.getUint16(index * 16 + 12, true);
      const view = new Uint8Array(this.#memory.buffer(gpa, length));
      if ((flags & 2) === 0) {
        bytes.push(...view);
      } else {
        view.set(bytes.slice(written, written + length));
        if (this.#answers === this.lies.corrupt) view[0]! ^= 1;
        written += length;
      }
      index = table.getUint16(index * 16 + 14, true);
      more = (flags & 1) !== 0;
    }
    this.seen.push(bytes.slice(0, 12).join());
    return written;
  }

  getFeatures(): Promise<bigint> {
    return Promise.resolve(bitsOf([VIRTIO_FEATURE_BITS.VERSION_1]));
  }
  async setMemTable(regions: readonly MemoryRegion[]): Promise<void> {
    this.#memory.replaceAll(regions);
  }
  async setVringAddresses(_index: number, addresses: VringAddresses): Promise<void> {
    this.#addresses = addresses;
  }
  async setVringKick(_index: number, fd: number | null): Promise<void> {
    this.#kick = dupFd(fd!);
    this.#run();
  }
  async setVringCall(_index: number, fd: number | null): Promise<void> {
    this.#call = dupFd(fd!);
  }
  async setFeatures(): Promise<void> {}
  async getConfig(): Promise<Uint8Array<ArrayBuffer>> {
    return new Uint8Array(0);
  }
  async setConfig(): Promise<void> {}
  async addMemRegion(region: MemoryRegion): Promise<void> {
    this.#memory.add(region);
  }
  async removeMemRegion(region: Omit<MemoryRegion, "fd" | "fdOffset">): Promise<void> {
    this.#memory.remove(region);
  }
  async setLogBase(): Promise<void> {}
  async setVringNum(): Promise<void> {}
  async setVringBase(): Promise<void> {}
  async getVringBase(): Promise<number> {
    return this.#lastAvail;
  }
  async setVringErr(): Promise<void> {}
  async setVringEnable(): Promise<void> {}
  async getStatus(): Promise<number> {
    return 0;
  }
  async setStatus(): Promise<void> {}
  async suspend(): Promise<void> {}
  async resume(): Promise<void> {}
  async reset(): Promise<void> {
    this.#closed = true;
    if (this.#kick !== undefined && !this.#kick.closed) cancelWaits(this.#kick.fd);
    this.#kick?.close();
    this.#call?.close();
    this.#memory.clear();
  }
  close(): Promise<void> {
    return this.reset();
  }
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}
