/** A guest for device tests: RAM, one split ring per queue, requests made by hand. */
import assert from "node:assert/strict";
import { createEventfd, createMemfd, drainEventfd, type OwnedFd, readable, signalEventfd } from "../../src/ffi/mod.ts";
import { GuestMemory } from "../../src/memory/guest_memory.ts";
import { bitsOf } from "../../src/uapi/bits.ts";
import { VIRTIO_FEATURE_BITS } from "../../src/uapi/virtio.ts";
import type { VhostBackend } from "../../src/vhost/backend.ts";
import { splitLayout } from "../../src/vring/layout.ts";
import type { Segment } from "../../src/vring/queue.ts";
import { SplitDriver } from "../../src/vring/split.ts";

export const RAM_GPA = 0x4000_0000;
const RAM_SIZE = 8 << 20;
const RING_AREA = 0x10000;

export class TestQueue {
  readonly kick = createEventfd();
  readonly call = createEventfd();
  readonly err = createEventfd();
  driver!: SplitDriver;
  readonly ringGpa: number;

  constructor(readonly guest: TestGuest, readonly index: number, readonly num: number) {
    this.ringGpa = RAM_GPA + index * RING_AREA;
  }

  get addresses() {
    const { desc, avail, used } = splitLayout(this.num);
    return { desc: this.ringGpa + desc.offset, avail: this.ringGpa + avail.offset, used: this.ringGpa + used.offset };
  }

  makeDriver(base = 0): SplitDriver {
    const { desc, avail, used } = splitLayout(this.num);
    const part = (gpa: number, size: number) => ({ buffer: this.guest.memory.buffer(gpa, size) });
    const { addresses } = this;
    return new SplitDriver({
      num: this.num,
      base,
      desc: part(addresses.desc, desc.size),
      avail: part(addresses.avail, avail.size),
      used: part(addresses.used, used.size),
      eventIdx: true,
      indirect: {
        buffer: this.guest.memory.buffer(this.ringGpa + RING_AREA / 2, 4 * 16 * this.num),
        address: this.ringGpa + RING_AREA / 2,
        entries: 4,
      },
    });
  }

  async start(base = 0): Promise<void> {
    const { device } = this.guest;
    await device.setVringNum(this.index, this.num);
    await device.setVringBase(this.index, base);
    await device.setVringAddresses(this.index, this.addresses);
    await device.setVringCall(this.index, this.call.fd);
    await device.setVringErr(this.index, this.err.fd);
    await device.setVringKick(this.index, this.kick.fd);
    await device.setVringEnable(this.index, true);
  }

  add(readable: Segment[], writable: Segment[]): number {
    const id = this.driver.add(readable, writable);
    assert.ok(id >= 0, "the ring is full");
    return id;
  }

  publish(): void {
    if (this.driver.publish()) signalEventfd(this.kick.fd);
  }

  /** Waits for `count` used chains; their ids in order. */
  async take(count: number, deadlineMs = 5000): Promise<number[]> {
    const ids: number[] = [];
    const end = performance.now() + deadlineMs;
    while (ids.length < count) {
      const id = this.driver.take();
      if (id >= 0) {
        ids.push(id);
      } else if (!this.driver.enableCalls()) {
        await within(readable(this.call.fd), end - performance.now(), `${ids.length} of ${count} chains came back`);
        drainEventfd(this.call.fd);
      }
    }
    return ids;
  }

  close(): void {
    for (const fd of [this.kick, this.call, this.err]) fd.close();
  }
}

export async function within<T>(promise: Promise<T>, ms: number, what: string): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => timer = setTimeout(() => reject(new Error(`Too late: ${what}`)), Math.max(0, ms)));
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

export class TestGuest implements AsyncDisposable {
  readonly ram: OwnedFd = createMemfd("guest-ram", RAM_SIZE);
  readonly memory = new GuestMemory();
  readonly queues: TestQueue[];
  readonly view: Uint8Array;
  #next = RAM_GPA + (4 << 20);

  constructor(readonly device: VhostBackend, queues = 1, num = 64) {
    this.memory.add(this.region);
    this.view = new Uint8Array(this.memory.buffer(RAM_GPA, RAM_SIZE));
    this.queues = Array.from({ length: queues }, (_, i) => new TestQueue(this, i, num));
  }

  get region() {
    return { gpa: RAM_GPA, size: RAM_SIZE, uaddr: RAM_GPA, fd: this.ram.fd, fdOffset: 0 };
  }

  async start(features?: bigint): Promise<void> {
    const wanted = features ?? bitsOf([VIRTIO_FEATURE_BITS.VERSION_1, VIRTIO_FEATURE_BITS.EVENT_IDX, VIRTIO_FEATURE_BITS.INDIRECT_DESC]);
    await this.device.setFeatures(wanted);
    await this.device.setMemTable([this.region]);
    for (const queue of this.queues) {
      this.view.fill(0, queue.ringGpa - RAM_GPA, queue.ringGpa - RAM_GPA + RING_AREA);
      queue.driver = queue.makeDriver();
      await queue.start();
    }
  }

  /** Fresh guest memory holding `bytes`, or of that many. */
  buffer(content: Uint8Array | number): Segment {
    const length = typeof content === "number" ? content : content.length;
    const address = this.#next;
    this.#next += length + 3;
    assert.ok(this.#next <= RAM_GPA + RAM_SIZE, "the guest's memory is used up");
    if (typeof content !== "number") this.view.set(content, address - RAM_GPA);
    return { address, length };
  }

  read(segment: Segment): Uint8Array {
    return this.view.slice(segment.address - RAM_GPA, segment.address - RAM_GPA + segment.length);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.device.close();
    for (const queue of this.queues) queue.close();
    this.memory.clear();
    this.ram.close();
  }
}

/** Header of a block request. */
export function blkHeader(type: number, sector = 0): Uint8Array {
  const bytes = new Uint8Array(16);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, type, true);
  view.setBigUint64(8, BigInt(sector), true);
  return bytes;
}

/** One range of a discard or write-zeroes request. */
export function blkRange(sector: number, sectors: number, flags = 0): Uint8Array {
  const bytes = new Uint8Array(16);
  const view = new DataView(bytes.buffer);
  view.setBigUint64(0, BigInt(sector), true);
  view.setUint32(8, sectors, true);
  view.setUint32(12, flags, true);
  return bytes;
}

/** A pattern of `length` bytes that depends on `seed`. */
export function pattern(length: number, seed: number): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => (i * 7 + seed * 31 + (i >> 8)) & 0xff);
}
