/**
 * A split ring driven by hand, one chain at a time: for tests that want to see every byte.
 */
import { createEventfd, createMemfd, mapFd, signalEventfd } from "../../src/ffi/mod.ts";
import type { MemoryRegion } from "../../src/memory/region.ts";
import type { VringAddresses, VringStart } from "../../src/vhost/backend.ts";
import { waitUntil } from "./wait.ts";

const NUM = 16;
const RING_BYTES = 4096;

/** Guest memory with rings in it. */
export class HandMemory implements Disposable {
  readonly fd;
  readonly bytes: Uint8Array;
  readonly view: DataView;
  readonly #mapping;

  constructor(readonly size = 1 << 20, readonly gpa = 0) {
    this.fd = createMemfd("hand", size);
    this.#mapping = mapFd(this.fd.fd, { length: size });
    this.bytes = new Uint8Array(this.#mapping.buffer());
    this.view = new DataView(this.#mapping.buffer());
  }

  get region(): MemoryRegion {
    return { gpa: this.gpa, size: this.size, uaddr: this.gpa, fd: this.fd.fd, fdOffset: 0 };
  }

  [Symbol.dispose](): void {
    this.#mapping.close();
    this.fd.close();
  }
}

/** One ring at `at` (three pages) with buffers behind it. */
export class HandRing implements Disposable {
  readonly kick = createEventfd();
  readonly call = createEventfd();
  /** Offers are not signalled: they are kicked by another way. */
  silent = false;
  availIdx = 0;
  usedSeen = 0;

  constructor(readonly memory: HandMemory, readonly index: number, readonly at: number) {}

  get addresses(): VringAddresses {
    const base = this.memory.gpa + this.at;
    return { desc: base, avail: base + RING_BYTES, used: base + 2 * RING_BYTES };
  }

  start(base = 0): VringStart {
    this.availIdx = this.usedSeen = base;
    const { view } = this.memory;
    view.setUint16(this.at + RING_BYTES + 2, base, true);
    view.setUint16(this.at + 2 * RING_BYTES + 2, base, true);
    const { index, addresses } = this;
    return { index, num: NUM, base, addresses, kick: this.kick.fd, call: this.call.fd, err: null, enabled: true };
  }

  /** Bytes of the used ring, to see whether anybody writes there. */
  get usedBytes(): string {
    return this.memory.bytes.slice(this.at + 2 * RING_BYTES, this.at + 2 * RING_BYTES + 4 + 8 * NUM).toHex();
  }

  get usedIdx(): number {
    return this.memory.view.getUint16(this.at + 2 * RING_BYTES + 2, true);
  }

  /** Offers a chain: [offset in memory, bytes, device writes]. */
  offer(...segments: readonly [number, number, boolean][]): void {
    const { view, gpa } = this.memory;
    segments.forEach(([offset, length, writable], i) => {
      const at = this.at + 16 * i;
      view.setBigUint64(at, BigInt(gpa + offset), true);
      view.setUint32(at + 8, length, true);
      view.setUint16(at + 12, (i + 1 < segments.length ? 1 : 0) | (writable ? 2 : 0), true);
      view.setUint16(at + 14, i + 1, true);
    });
    view.setUint16(this.at + RING_BYTES + 4 + 2 * (this.availIdx % NUM), 0, true);
    this.availIdx = (this.availIdx + 1) & 0xffff;
    view.setUint16(this.at + RING_BYTES + 2, this.availIdx, true);
    if (!this.silent) signalEventfd(this.kick.fd);
  }

  /** Waits for the chain to come back. @returns bytes that the device says it wrote */
  async taken(what = "used buffer"): Promise<number> {
    await waitUntil(what, () => this.usedIdx !== this.usedSeen, 5000);
    const at = this.at + 2 * RING_BYTES + 4 + 8 * (this.usedSeen % NUM);
    this.usedSeen = (this.usedSeen + 1) & 0xffff;
    return this.memory.view.getUint32(at + 4, true);
  }

  [Symbol.dispose](): void {
    this.kick.close();
    this.call.close();
  }
}
