import assert from "node:assert/strict";
import { CurrentMemory, locateRing } from "../../src/devices/ring.ts";
import { mapAnonymous } from "../../src/ffi/mod.ts";
import { RangeTable } from "../../src/memory/range_table.ts";

Deno.test("memory that appears later is asked for when an address is missing, by rings, buffers and tables of descriptors", () => {
  using mapping = mapAnonymous(8192, "test");
  new Uint32Array(mapping.buffer())[1] = 7;
  const full = new RangeTable([{ gpa: 0x1000, size: 8192, uaddr: 0x1000, address: mapping.address }]);
  const uses: ((memory: CurrentMemory) => unknown)[] = [
    (memory) => memory.contains(0x1000, 16),
    (memory) => memory.buffer(0x1000, 16),
    (memory) => memory.readWords(0x1004, new Uint32Array(1), 1),
    (memory) => locateRing({ num: 4, addresses: { desc: 0x1000, avail: 0x1100, used: 0x1200 }, features: 0n }, memory),
  ];
  for (const use of uses) {
    const memory = new CurrentMemory(new RangeTable([]));
    const asked: number[] = [];
    memory.fault = (address) => {
      asked.push(address);
      memory.table = full;
      return true;
    };
    assert.ok(use(memory));
    assert.equal(asked.length, 1);
  }
});

Deno.test("an address that is missing for good is outside of memory", () => {
  const memory = new CurrentMemory(new RangeTable([]));
  memory.fault = () => true;
  assert.equal(memory.contains(0x1000, 16), false);
  assert.equal(memory.readWords(0x1000, new Uint32Array(1), 1), false);
  assert.throws(() => memory.buffer(0x1000, 16), { code: "OUTSIDE_MEMORY" });
});
