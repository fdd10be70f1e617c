import assert from "node:assert/strict";
import { createMemfd, mapFd } from "../../src/ffi/mod.ts";
import { RangeTable } from "../../src/memory/range_table.ts";
import { Arena, slotSize } from "../../src/relay/arena.ts";
import type { DataPath, RelayCore } from "../../src/relay/core.ts";
import { CoreMaker } from "../../src/relay/core_maker.ts";
import { Counters } from "../../src/relay/counters.ts";
import { alignUp, splitLayout } from "../../src/vring/layout.ts";

const NUM = 256;
const QUEUES = 257;
/** What docs/performance.md states. */
const BOUND = 96 * 1024;

for (const choice of ["wasm", "js"] as const) {
  Deno.test(`An idle queue of 256 descriptors in mode shadow takes less than 96 KiB: ${choice} core`, () => {
    const layout = splitLayout(NUM);
    const each = alignUp(layout.total, 4096);
    const size = each * QUEUES;
    using fd = createMemfd("svq-test-ram", size);
    using ram = mapFd(fd.fd, { length: size });
    // The guest's own rings are no part of it.
    new Uint8Array(ram.buffer()).fill(0);
    using arena = new Arena(QUEUES, 2 ** 40, slotSize(undefined));
    const ranges = [{ gpa: 0, size, uaddr: 0, address: ram.address }];
    const path: DataPath = { memory: new RangeTable(ranges), translation: undefined, dirty: undefined };
    const maker = new CoreMaker(choice, path);
    maker.setMemory(ranges);
    const counters = new Counters(QUEUES);
    const cores: RelayCore[] = [];
    let before = 0;
    for (let index = 0; index < QUEUES; index++) {
      arena.place(index, NUM);
      const at = index * each;
      const place = { num: NUM, packed: false, eventIdx: true, indirect: true, inOrder: false };
      const core = maker.make({
        ...{ index, mode: "shadow", kickFd: -1, callFd: -1, deviceKickFd: -1, deviceCallFd: -1, paused: false },
        ...{ logUsedGpa: -1, guestBase: 0, device: { ...place, ...arena.local(index, NUM) } },
        guest: { ...place, desc: at + layout.desc.offset, avail: at + layout.avail.offset, used: at + layout.used.offset },
      }, counters.of(index));
      assert.equal(core.kind, choice, maker.reason);
      core.forward();
      core.returnUsed();
      core.enableKicks();
      core.enableCalls();
      cores.push(core);
      // What the first one brings along counts for no queue.
      if (index === 0) before = Deno.memoryUsage().rss;
    }
    const grown = (Deno.memoryUsage().rss - before) / (QUEUES - 1);
    if (Deno.env.has("SVQ_SOAK")) console.log(`${choice}: ${(grown / 1024).toFixed(1)} KiB for each queue`);
    for (const core of cores) core.close();
    assert.ok(grown < BOUND, `${(grown / 1024).toFixed(1)} KiB for each queue`);
  });
}
