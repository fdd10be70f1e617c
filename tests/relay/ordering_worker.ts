/** The other thread of ordering_test.ts. Addresses are of this process. */
import { DirtyBitmap } from "../../src/dirty/bitmap.ts";
import { bufferAt } from "../../src/ffi/mod.ts";
import { RangeTable } from "../../src/memory/range_table.ts";
import { WasmHost } from "../../src/relay/wasm_host.ts";
import { ENV } from "../../src/relay/wasm_layout.ts";
import { splitLayout } from "../../src/vring/layout.ts";
import { Chain } from "../../src/vring/queue.ts";
import { SplitDriver } from "../../src/vring/split.ts";

/** What the thread is to do; `flags` is how the two threads talk while they work. */
export type Task =
  | { type: "mark"; log: number; size: number; rounds: number; ahead: number; flags: SharedArrayBuffer }
  | { type: "publish"; ram: number; size: number; num: number; eventIdx: boolean; flags: SharedArrayBuffer };

const scope = self as unknown as { onmessage: ((event: MessageEvent<Task>) => void) | null; postMessage(message: unknown): void };

/** One page a time; never more than `ahead` rounds before the reader. */
function mark({ log, size, rounds, ahead, flags }: Extract<Task, { type: "mark" }>): void {
  const shared = new Int32Array(flags);
  const path = { memory: new RangeTable([]), translation: undefined, dirty: new DirtyBitmap(bufferAt(log, size)) };
  const host = new WasmHost(path);
  host.setLog(log, size);
  if (new Int32Array(host.windows.memory.buffer, host.env, 16)[ENV.logMode] !== 1) throw new Error("the log has no window");
  const pages = size * 8;
  for (let round = 1; round <= rounds && Atomics.load(shared, 2) === 0; round++) {
    host.exports.markRange(host.env, round % pages * 4096, 1);
    Atomics.store(shared, 0, round);
    while (Atomics.load(shared, 1) < round - ahead && Atomics.load(shared, 2) === 0);
  }
}

/** A guest that offers one chain a round, and says whether it would have kicked. */
function publish({ ram, size, num, eventIdx, flags }: Extract<Task, { type: "publish" }>): void {
  const shared = new Int32Array(flags);
  const layout = splitLayout(num);
  const buffer = bufferAt(ram, size);
  const part = (offset: number) => ({ buffer, byteOffset: offset });
  const driver = new SplitDriver({
    ...{ num, eventIdx },
    ...{ desc: part(layout.desc.offset), avail: part(layout.avail.offset), used: part(layout.used.offset) },
  });
  const chain = new Chain(1);
  chain.addWritable(65536, 64);
  for (let round = 1;; round++) {
    while (Atomics.load(shared, 0) < round);
    if (Atomics.load(shared, 2) !== 0) return;
    while (driver.take() >= 0);
    driver.addChain(chain);
    // Ready: both go on at once.
    Atomics.store(shared, 1, round);
    while (Atomics.load(shared, 4) < round);
    const kick = driver.publish();
    Atomics.store(shared, 3, kick ? 1 : 0);
    Atomics.store(shared, 5, round);
  }
}

scope.onmessage = ({ data }) => {
  if (data.type === "mark") mark(data);
  else publish(data);
  scope.postMessage("done");
};
