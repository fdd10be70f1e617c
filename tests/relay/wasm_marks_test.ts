import assert from "node:assert/strict";
import { DirtyBitmap, logBytes } from "../../src/dirty/bitmap.ts";
import { createMemfd, mapFd } from "../../src/ffi/mod.ts";
import { RangeTable } from "../../src/memory/range_table.ts";
import { Arena, slotSize } from "../../src/relay/arena.ts";
import { CoreMaker } from "../../src/relay/core_maker.ts";
import { Counters } from "../../src/relay/counters.ts";
import type { QueueStart } from "../../src/relay/messages.ts";
import { splitLayout } from "../../src/vring/layout.ts";
import { Chain } from "../../src/vring/queue.ts";
import { SplitDevice, SplitDriver } from "../../src/vring/split.ts";

const MIB = 2 ** 20;
const NUM = 8;
const HIGH = 64 * MIB;
/** Writable buffers, several per chain: within a page, over pages of one word of the log, over words, in both regions. */
const CHAINS: readonly (readonly [number, number][])[] = [
  [[MIB + 100, 200]],
  [[MIB + 0x1_8f00, 0x2000]],
  [[MIB + 0x1_f800, 300 * 1024], [HIGH + 0x800, 1536]],
  [[HIGH + 0x1_f000, 0x3000], [2 * MIB, 16], [HIGH + 0x10_0000, 0x8_0001]],
  [[HIGH + 0x20_0000, 4096]],
  [[3 * MIB, MIB]],
];

for (const mode of ["shadow", "used"] as const) {
  for (const kind of ["wasm", "js"] as const) {
    Deno.test(`every page of large and of scattered buffers is marked: ${mode}, ${kind}`, () => {
      using stack = new DisposableStack();
      const shared = (size: number) => {
        using fd = createMemfd("svq-test", size);
        return stack.use(mapFd(fd.fd, { length: size }));
      };
      const [low, high, log] = [shared(4 * MIB), shared(4 * MIB), shared(logBytes(HIGH + 4 * MIB))];
      const arena = stack.use(new Arena(1, 2 ** 40, slotSize(undefined)));
      arena.place(0, NUM);
      const local = arena.local(0, NUM);
      const layout = splitLayout(NUM);
      const guest = { desc: layout.desc.offset, avail: layout.avail.offset, used: layout.used.offset };
      const common = { num: NUM, packed: false, eventIdx: false, indirect: false, inOrder: false };
      const start: QueueStart = {
        ...{ index: 0, mode, kickFd: -1, callFd: -1, deviceKickFd: -1, deviceCallFd: -1, logUsedGpa: -1, paused: false },
        ...{ guest: { ...common, ...guest }, device: { ...common, ...local }, guestBase: 0 },
      };
      const ranges = [
        { gpa: 0, size: 4 * MIB, uaddr: 0, address: low.address },
        { gpa: HIGH, size: 4 * MIB, uaddr: HIGH, address: high.address },
      ];
      const dirty = new DirtyBitmap(log.buffer());
      const maker = new CoreMaker(kind, { memory: new RangeTable(ranges), translation: undefined, dirty });
      maker.setMemory(ranges);
      maker.setLog(log.address, log.length);
      const core = maker.make(start, new Counters(1).of(0));
      stack.defer(() => core.close());
      assert.equal(core.kind, kind);
      const part = (name: "desc" | "avail" | "used") => ({ buffer: low.buffer(guest[name], layout[name].size) });
      const driver = new SplitDriver({ num: NUM, eventIdx: false, desc: part("desc"), avail: part("avail"), used: part("used") });
      const at = (place: number) => ({ buffer: arena.slot(0), byteOffset: place - local.desc });
      const desc = mode === "used" ? part("desc") : at(local.desc);
      const device = new SplitDevice({ num: NUM, eventIdx: false, indirect: false, desc, avail: at(local.avail), used: at(local.used) });
      const chain = new Chain(NUM);
      for (let turn = 0; turn < 3; turn++) {
        for (const segments of CHAINS) {
          dirty.clear();
          chain.clear();
          for (const [address, length] of segments) chain.addWritable(address, length);
          assert.ok(driver.addChain(chain) >= 0);
          driver.publish();
          assert.equal(core.forward(), 1);
          assert.ok(device.pop(chain));
          device.push(chain.id, 1);
          device.flush();
          assert.equal(core.returnUsed(), 1);
          assert.ok(driver.take() >= 0);
          const expected = new Set<number>();
          for (const [address, length] of segments) {
            for (let page = Math.floor(address / 4096); page <= Math.floor((address + length - 1) / 4096); page++) expected.add(page);
          }
          for (let page = 0; page < (HIGH + 4 * MIB) / 4096; page++) assert.equal(dirty.has(page), expected.has(page), `page ${page}`);
        }
      }
    });
  }
}
