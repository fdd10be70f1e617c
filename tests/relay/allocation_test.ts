import assert from "node:assert/strict";
import { DirtyBitmap } from "../../src/dirty/bitmap.ts";
import { createEventfd, createMemfd, mapFd } from "../../src/ffi/mod.ts";
import { RangeTable } from "../../src/memory/range_table.ts";
import { Arena, slotSize } from "../../src/relay/arena.ts";
import type { DataPath } from "../../src/relay/core.ts";
import { CoreMaker } from "../../src/relay/core_maker.ts";
import { Counters } from "../../src/relay/counters.ts";
import type { QueueStart } from "../../src/relay/messages.ts";
import { QueueRunner } from "../../src/relay/queue_runner.ts";
import { splitLayout } from "../../src/vring/layout.ts";
import { Chain } from "../../src/vring/queue.ts";
import { SplitDevice, SplitDriver } from "../../src/vring/split.ts";

// What is allocated is collected some day, and a collection holds the data path up. Heap growth is measured, since no collection
// comes within a few thousand rounds that allocate nothing.

const NUM = 64, RAM = 2 ** 21, ROUNDS = 2000;

for (const choice of ["wasm", "js"] as const) {
  Deno.test(`A queue that wakes, forwards, returns, notifies and sleeps allocates nothing once it is compiled: ${choice} core`, () => {
    using stack = new DisposableStack();
    const shared = (name: string, length: number) => {
      using fd = createMemfd(name, length);
      return stack.use(mapFd(fd.fd, { length }));
    };
    const ram = shared("svq-test-ram", RAM);
    const log = shared("svq-test-log", 4096);
    const arena = stack.use(new Arena(1, 2 ** 40, slotSize(undefined)));
    const event = stack.use(createEventfd());
    arena.place(0, NUM);
    const local = arena.local(0, NUM);
    const ranges = [{ gpa: 0, size: RAM, uaddr: 0, address: ram.address }];
    const path: DataPath = { memory: new RangeTable(ranges), translation: undefined, dirty: new DirtyBitmap(log.buffer()) };
    const maker = new CoreMaker(choice, path);
    maker.setMemory(ranges);
    maker.setLog(log.address, log.length);
    const { desc, avail, used } = splitLayout(NUM);
    const place = { num: NUM, packed: false, eventIdx: true, indirect: false, inOrder: false };
    const start: QueueStart = {
      ...{ index: 0, mode: "shadow", kickFd: -1, callFd: event.fd, deviceKickFd: event.fd, deviceCallFd: -1, paused: false },
      ...{ logUsedGpa: used.offset, guestBase: 0, device: { ...place, ...local } },
      guest: { ...place, desc: desc.offset, avail: avail.offset, used: used.offset },
    };
    const counters = new Counters(1).of(0);
    const core = maker.make(start, counters);
    stack.defer(() => core.close());
    assert.equal(core.kind, choice);
    const runner = new QueueRunner(start, core, counters);
    const of = (buffer: ArrayBuffer, byteOffset: number) => ({ buffer, byteOffset });
    const [guest, slot] = [ram.buffer(), arena.slot(0)];
    const rings = { desc: of(guest, desc.offset), avail: of(guest, avail.offset), used: of(guest, used.offset) };
    const driver = new SplitDriver({ num: NUM, eventIdx: true, ...rings });
    const device = new SplitDevice({
      ...{ num: NUM, eventIdx: true, indirect: false, desc: of(slot, 0) },
      ...{ avail: of(slot, local.avail - local.desc), used: of(slot, local.used - local.desc) },
    });
    const offered = new Chain(2);
    const taken = new Chain(NUM);
    const round = () => {
      for (let i = 0; i < 4; i++) {
        offered.clear();
        offered.addReadable(65536, 16);
        offered.addWritable(131072 + i * 4096, 1536);
        driver.addChain(offered);
      }
      driver.publish();
      runner.kicked();
      runner.work();
      runner.arm();
      while (device.pop(taken)) device.push(taken.id, 1536);
      device.flush();
      runner.called();
      runner.work();
      runner.arm();
      while (driver.take() >= 0);
      driver.enableCalls();
      device.enableKicks();
    };
    // The compiler works beside this thread, and on a busy machine after it.
    const deadline = performance.now() + 20_000;
    let each = Infinity;
    while (each > 16 && performance.now() < deadline) {
      for (let i = 0; i < 3 * ROUNDS; i++) round();
      const before = Deno.memoryUsage().heapUsed;
      for (let i = 0; i < ROUNDS; i++) round();
      const grown = Deno.memoryUsage().heapUsed - before;
      // A collection in between says nothing.
      if (grown >= 0) each = grown / ROUNDS;
    }
    assert.equal(counters[2]! > 0, true);
    assert.ok(each <= 16, `${each.toFixed(0)} bytes for each round`);
  });
}
