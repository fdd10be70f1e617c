/** What both threads of litmus_test.ts set up; the second one runs in this file as a Worker. Addresses are of this process. */
import { WasmHost } from "../../src/relay/wasm_host.ts";
import { WasmQueue } from "../../src/relay/wasm_queue.ts";
import { splitLayout } from "../../src/vring/layout.ts";
import { RangeTable } from "../../src/memory/range_table.ts";

/** Descriptors of the ring. */
const NUM = 16;

/** One test: a ring (or a word of a log) and the words by which the threads meet, in a page each. */
export interface Litmus {
  module: WebAssembly.Module;
  /** `kicks` and `calls`: which notification is asked for. */
  what: "kicks" | "calls" | "marks";
  packed: boolean;
  eventIdx: boolean;
  /** Ring or log. */
  ring: number;
  meeting: number;
  rounds: number;
}

interface Loops {
  sleeper(queue: number, calls: number, at: number, from: number, to: number): number;
  publisher(queue: number, calls: number, at: number, rounds: number): void;
  marker(env: number, second: number, at: number, from: number, to: number): number;
}

/** One thread's part, ready to run. `from` and `to`: rounds; the second thread runs until the first one stops. */
export function prepare({ module, what, packed, eventIdx, ring, meeting, rounds }: Litmus, first: boolean) {
  const host = new WasmHost({ memory: new RangeTable([]), translation: undefined, dirty: undefined }, { module, imports: {} });
  const loops = host.exports as unknown as Loops;
  const at = host.windows.map(meeting, 4096)!;
  if (what === "marks") {
    host.setLog(ring, 4096);
    return (from: number, to: number) => loops.marker(host.env, first ? 0 : 1, at, from, first ? to : rounds + 1);
  }
  const base = host.windows.map(ring, 4096)!;
  const layout = splitLayout(NUM);
  const queue = new WasmQueue(host.windows, host.env, NUM, NUM);
  // The one thread's guest ring is the other one's device ring.
  const guest = first === (what === "kicks");
  const side = guest ? "guest" : "device";
  queue.set(`${side}Num`, NUM);
  queue.set(`${side}EventIdx`, eventIdx ? 1 : 0);
  queue.set(`${side}Desc`, base + layout.desc.offset);
  queue.set(`${side}Avail`, base + layout.avail.offset);
  queue.set(`${side}Used`, base + layout.used.offset);
  if (guest) queue.set("guestPacked", packed ? 1 : 0);
  else queue.set("deviceKind", packed ? 1 : 0);
  if (guest && packed) queue.set("guestSeen", 1);
  // A device may use no more than it was given.
  if (first && what === "calls") queue.set("devicePublished", 1);
  const calls = what === "calls" ? 1 : 0;
  return (from: number, to: number): number => {
    if (first) return loops.sleeper(queue.at, calls, at, from, to);
    loops.publisher(queue.at, calls, at, rounds);
    return 0;
  };
}

if (typeof WorkerGlobalScope !== "undefined" && self instanceof WorkerGlobalScope) {
  const scope = self as unknown as { onmessage: ((event: MessageEvent<Litmus>) => void) | null; postMessage(message: unknown): void };
  scope.onmessage = ({ data }) => {
    const run = prepare(data, false);
    scope.postMessage("ready");
    run(1, 0);
    scope.postMessage("done");
  };
}
