/**
 * Cost of moving chains through a ring in one thread, both sides: `deno bench -A tests/bench/vring_bench.ts`. One iteration
 * is one batch of 32 chains: add, publish, pop, push, flush, take.
 *
 * @module
 */
import { Chain, type DeviceQueue, type DriverQueue } from "../../src/vring/queue.ts";
import { PackedDevice, PackedDriver } from "../../src/vring/packed.ts";
import { SplitDevice, SplitDriver } from "../../src/vring/split.ts";
import { DirtyBitmap } from "../../src/dirty/bitmap.ts";
import { FlatMemory, packedPlace, splitPlace } from "../support/ring_memory.ts";

const NUM = 256;
const BATCH = 32;

function round(driver: DriverQueue, device: DeviceQueue, offered: Chain, taken: Chain): void {
  for (let i = 0; i < BATCH; i++) driver.addChain(offered);
  driver.publish();
  while (device.pop(taken)) device.push(taken.id, taken.writableBytes);
  device.flush();
  while (driver.take() >= 0);
}

for (const layout of ["split", "packed"] as const) {
  for (const [name, readable, writable] of [["tx1", 1500, 0], ["rx1", 0, 1536], ["2desc", 16, 1536]] as const) {
    const memory = new FlatMemory(1 << 16);
    const place = layout === "split" ? splitPlace(memory, NUM) : packedPlace(memory, NUM);
    const options = { ...place, eventIdx: true };
    const driver = layout === "split" ? new SplitDriver(options) : new PackedDriver(options);
    const device = layout === "split"
      ? new SplitDevice({ ...options, indirect: false })
      : new PackedDevice({ ...options, indirect: false });
    const offered = new Chain(4);
    if (readable > 0) offered.addReadable(0x1_2345_6000, readable);
    if (writable > 0) offered.addWritable(0x2_2345_6000, writable);
    const taken = new Chain(NUM);
    Deno.bench(`${layout} ${name}, ${BATCH} chains`, { group: name, baseline: layout === "split" }, () => {
      round(driver, device, offered, taken);
    });
  }
}

const log = DirtyBitmap.covering(2 ** 30);
let page = 0;
Deno.bench("dirty log: mark a buffer of 1536 bytes, 32 times", () => {
  for (let i = 0; i < 32; i++) log.markRange(page = (page + 4999) % (2 ** 30 - 4096), 1536);
});
