import assert from "node:assert/strict";
import { createMemfd, mapFd } from "../../src/ffi/mod.ts";
import { RangeTable } from "../../src/memory/range_table.ts";
import { Arena, slotSize } from "../../src/relay/arena.ts";
import type { DataPath } from "../../src/relay/core.ts";
import { CoreMaker } from "../../src/relay/core_maker.ts";
import { Counters } from "../../src/relay/counters.ts";
import { splitLayout } from "../../src/vring/layout.ts";
import { Chain } from "../../src/vring/queue.ts";
import { SplitDevice } from "../../src/vring/split.ts";
import type { Task } from "./ordering_worker.ts";

const SOAK = Deno.env.get("SVQ_SOAK") === "1";
/** The default run stops at this time, wherever it is: threads that wait for each other are slow on a busy machine. */
const PATIENCE_MS = SOAK ? Infinity : 1500;

async function beside(task: Task, work: (flags: Int32Array) => void): Promise<void> {
  const worker = new Worker(new URL("./ordering_worker.ts", import.meta.url), { type: "module" });
  const flags = new Int32Array(task.flags);
  try {
    const done = Promise.withResolvers<void>();
    worker.onmessage = () => done.resolve();
    worker.onerror = (event) => {
      event.preventDefault();
      done.reject(new Error(event.message));
    };
    worker.postMessage(task);
    // The worker starts only while this thread gives it time.
    while (task.type === "mark" && Atomics.load(flags, 0) === 0) await Promise.race([done.promise, pause()]);
    work(flags);
    await done.promise;
  } finally {
    worker.terminate();
  }
}

function pause(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, 1));
}

Deno.test("no mark that the WebAssembly core sets is lost to a reader that takes whole words at the same time", async () => {
  const size = 64;
  const pages = size * 8;
  const ahead = 200;
  using fd = createMemfd("svq-test-log", 4096);
  using log = mapFd(fd.fd, { length: 4096 });
  const rounds = SOAK ? 2 ** 30 : 200_000;
  const task: Task = { type: "mark", log: log.address, size, rounds, ahead, flags: new SharedArrayBuffer(32) };
  await beside(task, (flags) => {
    const words = new Int32Array(log.buffer(0, size));
    const end = performance.now() + PATIENCE_MS;
    const seenAt = new Int32Array(pages);
    for (let seen = 0; seen < rounds && performance.now() < end;) {
      const upTo = Atomics.load(flags, 0);
      for (let word = 0; word < words.length; word++) {
        const bits = Atomics.exchange(words, word, 0);
        for (let bit = 0; bit < 32; bit++) if ((bits >>> bit & 1) !== 0) seenAt[word * 32 + bit]!++;
      }
      // Pages do not repeat within `ahead` rounds, so each round's mark is one more of its page, or came already.
      for (let round = seen + 1; round <= upTo; round++) {
        const times = Math.floor(round / pages) + (round % pages === 0 ? 0 : 1);
        if (seenAt[round % pages]! < times) {
          Atomics.store(flags, 2, 1);
          assert.fail(`the mark of round ${round} is lost`);
        }
      }
      seen = upTo;
      Atomics.store(flags, 1, seen);
    }
    Atomics.store(flags, 2, 1);
  });
});

// A whole core against a guest's driver. litmus_test.ts and js_litmus_test.ts race the same steps in tighter loops, and fail on
// cores that are broken on purpose: so this is for the soak.
for (const core of SOAK ? ["wasm", "js"] as const : []) {
  for (const eventIdx of [false, true]) {
    const how = eventIdx ? "EVENT_IDX" : "flags";
    Deno.test(`a guest that publishes while the ${core} core goes to sleep is seen, or kicks: with ${how}`, async () => {
      const num = 16;
      const size = 2 ** 18;
      using fd = createMemfd("svq-test-ram", size);
      using ram = mapFd(fd.fd, { length: size });
      using arena = new Arena(1, 2 ** 40, slotSize(undefined));
      arena.place(0, num);
      const local = arena.local(0, num);
      const ranges = [{ gpa: 0, size, uaddr: 0, address: ram.address }];
      const path: DataPath = { memory: new RangeTable(ranges), translation: undefined, dirty: undefined };
      const maker = new CoreMaker(core, path);
      maker.setMemory(ranges);
      const layout = splitLayout(num);
      const common = { num, packed: false, indirect: false, inOrder: false };
      const relay = maker.make({
        ...{ index: 0, mode: "shadow", kickFd: -1, callFd: -1, deviceKickFd: -1, deviceCallFd: -1, paused: false },
        ...{ logUsedGpa: -1, guestBase: 0, device: { ...common, eventIdx: false, ...local } },
        guest: { ...common, eventIdx, desc: layout.desc.offset, avail: layout.avail.offset, used: layout.used.offset },
      }, new Counters(1).of(0));
      assert.equal(relay.kind, core);
      const slot = arena.slot(0);
      const part = (address: number) => ({ buffer: slot, byteOffset: address - local.desc });
      const parts = { desc: part(local.desc), avail: part(local.avail), used: part(local.used) };
      const device = new SplitDevice({ num, eventIdx: false, indirect: false, ...parts });
      const chain = new Chain(num);
      const rounds = SOAK ? 1_000_000 : 20_000;
      let forbidden = 0;
      let slept = 0;
      const task: Task = { type: "publish", ram: ram.address, size, num, eventIdx, flags: new SharedArrayBuffer(32) };
      await beside(task, (flags) => {
        const end = performance.now() + PATIENCE_MS;
        let round = 0;
        while (round < rounds && performance.now() < end) {
          round++;
          relay.disableKicks();
          Atomics.store(flags, 0, round);
          while (Atomics.load(flags, 1) < round);
          Atomics.store(flags, 4, round);
          // Now and then a little later, so that either may be first.
          for (let i = round % 300; i > 0; i--) Atomics.load(flags, 6);
          const more = relay.enableKicks();
          while (Atomics.load(flags, 5) < round);
          if (!more) slept++;
          if (!more && Atomics.load(flags, 3) === 0) forbidden++;
          assert.equal(relay.forward(), 1);
          assert.ok(device.pop(chain));
          device.push(chain.id, 0);
          device.flush();
          assert.equal(relay.returnUsed(), 1);
        }
        Atomics.store(flags, 2, 1);
        Atomics.store(flags, 0, round + 1);
      });
      assert.equal(forbidden, 0);
      assert.ok(slept > 0, "the core never found the ring empty: the threads did not meet");
      relay.close();
    });
  }
}
