/** What both threads of js_litmus_test.ts set up; the second one runs in this file as a Worker. Addresses are of this process. */
import { DirtyBitmap } from "../../src/dirty/bitmap.ts";
import { bufferAt } from "../../src/ffi/mod.ts";
import { RangeTable } from "../../src/memory/range_table.ts";
import { FastQueue } from "../../src/relay/fast_state.ts";
import type { QueueStart } from "../../src/relay/messages.ts";
import { packedLayout, splitLayout } from "../../src/vring/layout.ts";
import { PackedDevice, PackedDriver } from "../../src/vring/packed.ts";
import { Chain } from "../../src/vring/queue.ts";
import { SplitDevice, SplitDriver } from "../../src/vring/split.ts";

// The real ones: a core that is broken on purpose uses others.
const { load, store, or } = Atomics;
const plain = {
  store: (array: Uint16Array, index: number, value: number) => array[index] = value,
  or: (array: Int32Array, index: number, value: number) => array[index]! |= value,
};

/** Descriptors of the ring. */
const NUM = 16;
/** Bytes for a ring or for the words by which the threads meet. */
export const PART = 4096;
/** In the meeting's page, words in cache lines of their own. */
const OTHER = 16, ANSWER = 32, STOP = 48;

/**
 * Words of memory that no cache holds, and a step through them that no prefetcher guesses. Between a store and a load of the core lie
 * two calls of V8's, longer than a store takes to leave the processor's store buffer. So that the window is wide enough for
 * both threads to be in it at once, each fills its store buffer with stores to such memory first: they leave in order on x86.
 */
const COLD = 2 ** 22, STRIDE = 4099 * 16;

/** One test. */
export interface JsLitmus {
  /** `fast`: the fast path's queue; the others: the rings of src/vring, which the general path is made of. */
  ring: "fast" | "split" | "packed";
  /** `kicks` and `calls`: which notification is asked for. */
  what: "kicks" | "calls" | "marks";
  eventIdx: boolean;
  /** Stores and ors are plain. */
  broken: boolean;
  /** Three parts: the ring or the log, a ring that nobody looks at, the meeting. */
  memory: number;
  rounds: number;
}

/** One side of a round. */
interface Side {
  /** Before the threads meet. */
  ready(): void;
  /** What is raced: whether there was something to see, or whether to notify. */
  race(): boolean;
  /** When both have done it. */
  after(): void;
}

function fastSide({ what, eventIdx, memory }: JsLitmus, sleeper: boolean): Side {
  const { desc, avail, used } = splitLayout(NUM);
  const place = { num: NUM, packed: false, eventIdx, indirect: false, inOrder: false };
  // The one thread's guest ring is the other one's device ring.
  const guest = sleeper === (what === "kicks");
  const at = (base: number) => ({ desc: base + desc.offset, avail: base + avail.offset, used: base + used.offset });
  const start: QueueStart = {
    ...{ index: 0, mode: "shadow", kickFd: -1, callFd: -1, deviceKickFd: -1, deviceCallFd: -1, paused: false },
    ...{ logUsedGpa: -1, guestBase: 0, guest: { ...place, ...at(guest ? 0 : PART) } },
    device: { ...place, ...at(memory + (guest ? PART : 0)) },
  };
  const ranges = [{ gpa: 0, size: 2 * PART, uaddr: 0, address: memory }];
  const q = new FastQueue(start, { memory: new RangeTable(ranges), translation: undefined, dirty: undefined }, undefined);
  // A device may use no more than it was given.
  if (sleeper && !guest) q.devicePublished = 1;
  const up = (value: number) => (value + 1) & 0xffff;
  if (what === "kicks") {
    return sleeper
      ? { ready: () => q.disableKicks(), race: () => q.enableKicks(), after: () => void (q.guestNext = up(q.guestNext)) }
      : { ready: () => void (q.deviceNext = up(q.deviceNext)), race: () => q.publish(), after: () => {} };
  }
  if (!sleeper) return { ready: () => void (q.guestUsedNext = up(q.guestUsedNext)), race: () => q.flush(), after: () => {} };
  const after = () => {
    q.devicePublished = up(q.devicePublished);
    q.deviceUsedNext = up(q.deviceUsedNext);
  };
  return { ready: () => q.disableCalls(), race: () => q.enableCalls(), after };
}

function ringSide({ ring, what, eventIdx, memory }: JsLitmus, sleeper: boolean): Side {
  const packed = ring === "packed";
  const { desc, avail, used } = packed ? packedLayout(NUM) : splitLayout(NUM);
  const part = (byteOffset: number) => ({ buffer: bufferAt(memory, PART), byteOffset });
  const options = { num: NUM, eventIdx, desc: part(desc.offset), avail: part(avail.offset), used: part(used.offset) };
  const chain = new Chain(NUM);
  if (sleeper === (what === "kicks")) {
    const device = packed ? new PackedDevice({ ...options, indirect: false }) : new SplitDevice({ ...options, indirect: false });
    const done = () => {
      if (!device.pop(chain)) throw new Error("the chain of this round is not there");
      device.push(chain.id, 0);
    };
    if (!sleeper) return { ready: done, race: () => device.flush(), after: () => {} };
    const after = () => {
      done();
      device.flush();
    };
    return { ready: () => device.disableKicks(), race: () => device.enableKicks(), after };
  }
  const driver = packed ? new PackedDriver(options) : new SplitDriver(options);
  const add = () => {
    chain.clear();
    chain.addWritable(65536, 64);
    while (driver.take() >= 0);
    driver.addChain(chain);
  };
  if (!sleeper) return { ready: add, race: () => driver.publish(), after: () => {} };
  const ready = () => {
    add();
    driver.publish();
    driver.disableCalls();
  };
  return { ready, race: () => driver.enableCalls(), after: () => {} };
}

/** One thread's part, ready to run. `from` and `to`: rounds; the second thread runs until the first one stops. */
export function prepare(litmus: JsLitmus, first: boolean): (from: number, to: number) => number {
  const words = new Int32Array(bufferAt(litmus.memory + 2 * PART, PART));
  const mine = first ? 0 : OTHER;
  const nobody = new Int32Array(new SharedArrayBuffer(4));
  const meet = (turn: number): boolean => {
    store(words, mine, turn);
    for (let spins = 1; load(words, OTHER - mine) < turn; spins++) {
      if (load(words, STOP) !== 0) return false;
      // On a busy machine the other thread waits for a processor: perhaps for this one.
      if (spins % 10_000 === 0) Atomics.wait(nobody, 0, 0, 0.05);
    }
    return true;
  };
  const cold = new Int32Array(litmus.what === "marks" ? 0 : COLD);
  let at = 0;
  const burst = (count: number) => {
    for (let i = 0; i < count; i++) cold[at = (at + STRIDE) & (COLD - 1)] = i;
  };
  const run = litmus.what === "marks" ? marks(litmus, first, meet) : handshake(litmus, first, meet, burst, words);
  return (from, to) => {
    if (litmus.broken) Object.assign(Atomics, plain);
    try {
      return run(from, first ? to : litmus.rounds + 1);
    } finally {
      Object.assign(Atomics, { store, or });
    }
  };
}

type Meet = (turn: number) => boolean;

function handshake(litmus: JsLitmus, first: boolean, meet: Meet, burst: (count: number) => void, words: Int32Array) {
  const side = litmus.ring === "fast" ? fastSide(litmus, first) : ringSide(litmus, first);
  // A device has a chain to give back only after the driver has offered it.
  const second = !first && litmus.what === "calls";
  return (from: number, to: number): number => {
    let forbidden = 0;
    for (let round = from; round < to; round++) {
      if (!second) side.ready();
      if (!meet(round * 3 - 2)) break;
      if (second) side.ready();
      if (!meet(round * 3 - 1)) break;
      burst(24 + round % (first ? 19 : 17));
      const result = side.race();
      if (!first) store(words, ANSWER, result ? 1 : 0);
      if (!meet(round * 3)) break;
      if (first && !result && load(words, ANSWER) === 0) forbidden++;
      side.after();
    }
    return forbidden;
  };
}

// Each thread marks every second page of a word in every round; the first one counts the words that lack a bit.
function marks({ memory }: JsLitmus, first: boolean, meet: Meet) {
  const buffer = bufferAt(memory, PART);
  const words = new Int32Array(buffer);
  const dirty = new DirtyBitmap(buffer);
  return (from: number, to: number): number => {
    let lost = 0;
    for (let round = from; round < to; round++) {
      if (first) store(words, 0, 0);
      if (!meet(round * 2 - 1)) break;
      for (let page = first ? 0 : 1; page < 32; page += 2) if (!dirty.markWithinWord(page, page)) dirty.markRange(page * 4096, 1);
      if (!meet(round * 2)) break;
      if (first && load(words, 0) !== -1) lost++;
    }
    return lost;
  };
}

if (typeof WorkerGlobalScope !== "undefined" && self instanceof WorkerGlobalScope) {
  const scope = self as unknown as { onmessage: ((event: MessageEvent<JsLitmus>) => void) | null; postMessage(message: unknown): void };
  scope.onmessage = ({ data }) => {
    const run = prepare(data, false);
    scope.postMessage("ready");
    run(1, 0);
    scope.postMessage("done");
  };
}
