/**
 * The hostile half of the ring target, in a thread of its own: a guest's driver that now and then does what it should, and writes
 * anything into rings, tables and buffers at any moment; and a device that writes anything into the shadow ring. Addresses are
 * of this process.
 */
import { signalEventfd } from "../../src/ffi/eventfd.ts";
import { bufferAt } from "../../src/ffi/libc.ts";
import { packedLayout, splitLayout } from "../../src/vring/layout.ts";
import { Random } from "./random.ts";

/** What the mutator attacks, and how. */
export interface Attack {
  seed: number;
  /** Most mutations. */
  count: number;
  /** 0 to 1: share of steps that are as they should be. */
  honest: number;
  /** Steps between two looks at whether to kick. */
  pace: number;
  ram: { address: number; size: number; gpa: number };
  /** Offset of the ring in RAM. */
  ring: number;
  num: number;
  packed: boolean;
  /** Offsets in RAM: of a table of descriptors, and of buffers. */
  tables: number;
  data: number;
  kickFd: number;
  /** The shadow ring; size 0: the device is honest. */
  shadow: { address: number; size: number };
  /** Int32: 1 stop. */
  stop: SharedArrayBuffer;
}

const scope = self as unknown as { onmessage: ((event: MessageEvent<Attack>) => void) | null; postMessage(message: unknown): void };
/** Of which some are mutations: nobody takes a second for them. */
const MAX_STEPS = 60_000;
const [NEXT, WRITE, INDIRECT] = [1, 2, 4];

class Mutator {
  readonly #random: Random;
  readonly #view: DataView;
  readonly #words: Uint16Array;
  readonly #shadow: DataView | undefined;
  readonly #layout: { total: number; avail: { offset: number }; used: { offset: number } };
  #availIdx = 0;
  #slot = 0;
  #wrap = true;

  constructor(readonly attack: Attack) {
    this.#random = new Random(attack.seed);
    const { ram, shadow, packed, num } = attack;
    const buffer = bufferAt(ram.address, ram.size);
    this.#view = new DataView(buffer);
    this.#words = new Uint16Array(buffer);
    this.#shadow = shadow.size > 0 ? new DataView(bufferAt(shadow.address, shadow.size)) : undefined;
    this.#layout = (packed ? packedLayout : splitLayout)(num);
  }

  run(): number {
    const { count, pace, honest, kickFd, stop } = this.attack;
    const stopped = new Int32Array(stop);
    const random = this.#random;
    let done = 0;
    for (let step = 0; done < count && step < MAX_STEPS && Atomics.load(stopped, 0) === 0; step++) {
      if (random.word() / 2 ** 32 < honest) this.#offer();
      else {
        this.#mutate();
        done++;
      }
      if (step % pace === 0) signalEventfd(kickFd);
    }
    signalEventfd(kickFd);
    return done;
  }

  #address(): bigint {
    const { ram, data } = this.attack;
    const random = this.#random;
    switch (random.below(12)) {
      case 0:
        return random.u64();
      case 1:
        return BigInt(ram.gpa + ram.size - random.below(64));
      case 2:
        return BigInt(ram.gpa - random.below(64));
      case 3:
        return BigInt(ram.gpa + random.below(ram.size));
      default:
        return BigInt(ram.gpa + data + random.below(0x4_0000));
    }
  }

  #length(): number {
    const random = this.#random;
    return random.once(6) ? random.u32() : random.once(6) ? 0 : 1 + random.below(5000);
  }

  #descriptor(at: number, flags: number, last: number): void {
    this.#view.setBigUint64(at, this.#address(), true);
    this.#view.setUint32(at + 8, this.#length(), true);
    this.#view.setUint16(at + (this.attack.packed ? 12 : 14), last, true);
    this.#view.setUint16(at + (this.attack.packed ? 14 : 12), flags, true);
  }

  #valid(at: number, flags: number, last: number): void {
    const { ram, data, packed } = this.attack;
    this.#view.setBigUint64(at, BigInt(ram.gpa + data + this.#random.below(0x4_0000)), true);
    this.#view.setUint32(at + 8, 1 + this.#random.below(256), true);
    this.#view.setUint16(at + (packed ? 12 : 14), last, true);
    this.#view.setUint16(at + (packed ? 14 : 12), flags, true);
  }

  /** A table of `count` descriptors: its guest address. */
  #table(count: number): bigint {
    const { ram, tables } = this.attack;
    const at = tables + this.#random.below(64) * 1024;
    for (let i = 0; i < count; i++) {
      const flags = i < count - 1 ? NEXT : WRITE;
      if (this.#random.once(10)) this.#descriptor(at + 16 * i, this.#random.below(8), this.#random.below(70));
      else this.#valid(at + 16 * i, flags, i + 1);
    }
    return BigInt(ram.gpa + at);
  }

  // A chain as it should be; now and then with a table.
  #offer(): void {
    if (this.attack.packed) this.#offerPacked();
    else this.#offerSplit();
  }

  #offerSplit(): void {
    const { num, ring } = this.attack;
    const random = this.#random;
    const length = 1 + random.below(Math.min(4, num));
    const head = random.below(num);
    if (random.once(3)) {
      const count = 1 + random.below(20);
      this.#view.setBigUint64(ring + 16 * head, this.#table(count), true);
      this.#view.setUint32(ring + 16 * head + 8, 16 * count, true);
      this.#view.setUint16(ring + 16 * head + 12, INDIRECT, true);
    } else {
      for (let i = 0; i < length; i++) {
        const slot = (head + i) % num;
        this.#valid(ring + 16 * slot, i < length - 1 ? NEXT : random.pick([0, WRITE]), (slot + 1) % num);
      }
    }
    const avail = ring + this.#layout.avail.offset;
    this.#view.setUint16(avail + 4 + 2 * (this.#availIdx % num), head, true);
    // Never more than the ring holds, as far as the used index tells.
    const used = this.#words[(ring + this.#layout.used.offset) / 2 + 1]!;
    if (((this.#availIdx - used) & 0xffff) >= num) return;
    this.#availIdx = (this.#availIdx + 1) & 0xffff;
    Atomics.store(this.#words, avail / 2 + 1, this.#availIdx);
  }

  #offerPacked(): void {
    const { num, ring } = this.attack;
    const random = this.#random;
    const marks = () => this.#wrap ? 0x0080 : 0x8000;
    const length = 1 + random.below(Math.min(3, num));
    const first = ring + 16 * this.#slot;
    let firstFlags = 0;
    for (let i = 0; i < length; i++) {
      const at = ring + 16 * this.#slot;
      const table = length === 1 && random.once(3);
      const flags = marks() | (table ? INDIRECT : i < length - 1 ? NEXT : random.pick([0, WRITE]));
      if (table) {
        const count = 1 + random.below(20);
        this.#view.setBigUint64(at, this.#table(count), true);
        this.#view.setUint32(at + 8, 16 * count, true);
        this.#view.setUint16(at + 12, random.below(num), true);
      } else this.#valid(at, i === 0 ? this.#view.getUint16(at + 14, true) : flags, random.below(num));
      if (i === 0) firstFlags = flags;
      else this.#view.setUint16(at + 14, flags, true);
      if (++this.#slot === num) {
        this.#slot = 0;
        this.#wrap = !this.#wrap;
      }
    }
    Atomics.store(this.#words, first / 2 + 7, firstFlags);
  }

  #mutate(): void {
    const { ring, num, packed, tables } = this.attack;
    const random = this.#random;
    const view = this.#view;
    const value = () =>
      random.pick([0, 1, 2, 3, 4, 7, num - 1, num, num + 1, 0x7fff, 0x8000, 0xffff, random.word() & 0xffff, random.word() & 0xffff]);
    if (this.#shadow !== undefined && random.once(8)) {
      const shadow = this.#shadow;
      const at = random.below(shadow.byteLength / 2) * 2;
      if (random.once(4)) shadow.setBigUint64(Math.min(at, shadow.byteLength - 8), random.u64(), true);
      else shadow.setUint16(at, value(), true);
      return;
    }
    switch (random.below(packed ? 6 : 9)) {
      case 0:
        this.#words[(ring + random.below(this.#layout.total / 2) * 2) >> 1] = value();
        return;
      case 1:
        this.#descriptor(
          ring + 16 * random.below(num),
          packed ? random.pick([0, 0x80, 0x8000, 0x8080]) | random.below(8) : random.below(8),
          random.below(num + 2),
        );
        return;
      case 2:
        view.setUint16(ring + 16 * random.below(num) + 12, value(), true);
        return;
      case 3:
        this.#descriptor(tables + random.below(4096) * 16, random.below(8), random.below(70));
        return;
      case 4:
        view.setUint32(ring + 16 * random.below(num) + 8, random.u32(), true);
        return;
      case 5:
        view.setBigUint64(ring + 16 * random.below(num), this.#address(), true);
        return;
      case 6: {
        // An index a little off, or far.
        const at = (ring + this.#layout.avail.offset) / 2 + 1;
        this.#availIdx = (this.#availIdx + (random.once(20) ? value() : random.below(3))) & 0xffff;
        Atomics.store(this.#words, at, this.#availIdx);
        return;
      }
      case 7:
        view.setUint16(ring + this.#layout.avail.offset + 4 + 2 * random.below(num + 1), value(), true);
        return;
      default:
        view.setUint16(ring + this.#layout.used.offset + 2 * random.below(2 + 4 * num), value(), true);
    }
  }
}

scope.onmessage = ({ data }) => scope.postMessage(new Mutator(data).run());
