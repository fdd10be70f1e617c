import assert from "node:assert/strict";
import fc from "fast-check";
import { SvqError } from "../../src/errors.ts";
import { createMemfd, isOpenFd } from "../../src/ffi/mod.ts";
import { GuestMemory } from "../../src/memory/guest_memory.ts";
import { RangeTable } from "../../src/memory/range_table.ts";
import type { MemoryRegion } from "../../src/memory/region.ts";

const MIB = 1 << 20;

function code(expected: string): (error: unknown) => boolean {
  return (error) => error instanceof SvqError && error.code === expected;
}

function region(fd: number, gpa: number, size: number, rest: Partial<MemoryRegion> = {}): MemoryRegion {
  return { gpa, size, uaddr: 0x7f00_0000_0000 + gpa, fd, fdOffset: 0, ...rest };
}

Deno.test("A region is mapped: what the file holds is what the buffer shows", () => {
  using fd = createMemfd("ram", 2 * MIB);
  using memory = new GuestMemory();
  memory.add(region(fd.fd, 0x1000, MIB, { fdOffset: MIB }));
  memory.add(region(fd.fd, 0x1000_0000, 2 * MIB));
  new Uint8Array(memory.buffer(0x1000_0000 + MIB + 5, 1))[0] = 42;
  assert.equal(new Uint8Array(memory.buffer(0x1005, 1))[0], 42);
  assert.equal(memory.endGpa, 0x1000_0000 + 2 * MIB);
  assert.equal(memory.gpaOfUaddr(0x7f00_0000_0000 + 0x1000 + 77, 10), 0x1000 + 77);
  assert.throws(() => memory.gpaOfUaddr(0x7f00_0000_0000 + 0x1000 + MIB - 5, 10), code("OUTSIDE_MEMORY"));
});

Deno.test("Memory survives the borrowed descriptor being closed", () => {
  using memory = new GuestMemory();
  {
    using fd = createMemfd("ram", MIB);
    memory.add(region(fd.fd, 0, MIB));
  }
  assert.ok(isOpenFd(memory.regions[0]!.fd));
  new Uint8Array(memory.buffer(0, MIB)).fill(1);
});

Deno.test("Bad regions are refused, and the table stays as it was", () => {
  using fd = createMemfd("ram", MIB);
  using memory = new GuestMemory();
  memory.add(region(fd.fd, MIB, MIB));
  assert.throws(() => memory.add(region(fd.fd, 0, 0)), code("BAD_REGION"));
  assert.throws(() => memory.add(region(fd.fd, 2 ** 52 - 4096, 8192)), code("BAD_REGION"));
  assert.throws(() => memory.add(region(fd.fd, 0, 4096, { uaddr: 2 ** 52 })), code("BAD_REGION"));
  assert.throws(() => memory.add(region(fd.fd, 0, 4096, { fdOffset: -4096 })), code("BAD_REGION"));
  assert.throws(() => memory.add(region(fd.fd, 0, MIB, { fdOffset: 4096 })), code("REGION_TRUNCATED"));
  assert.throws(() => memory.add(region(fd.fd, MIB / 2, MIB)), code("REGION_OVERLAPS"));
  assert.throws(() => memory.replaceAll([region(fd.fd, 0, MIB), region(fd.fd, 4096, 4096)]), code("REGION_OVERLAPS"));
  assert.throws(() => memory.remove({ gpa: MIB, size: MIB, uaddr: 1 }), code("NO_SUCH_REGION"));
  assert.deepEqual(memory.regions.map((r) => r.gpa), [MIB]);
});

Deno.test("Replacing the table keeps the mapping of an unchanged region and only of that", () => {
  using fd = createMemfd("ram", MIB);
  using other = createMemfd("ram", MIB);
  using same = fd.dup();
  using memory = new GuestMemory();
  memory.replaceAll([region(fd.fd, 0, MIB), region(fd.fd, MIB, MIB)]);
  const [first, second] = memory.regions;
  memory.replaceAll([region(other.fd, MIB, MIB), region(same.fd, 0, MIB)]);
  assert.equal(memory.regions[0], first);
  assert.notEqual(memory.regions[1], second);
  assert.ok(!isOpenFd(second!.fd) || memory.regions[1]!.fd === second!.fd);
  memory.remove(memory.regions[0]!);
  assert.deepEqual(memory.regions.map((r) => r.gpa), [MIB]);
});

Deno.test("Memory that was exchanged stays mapped until Workers have let go of it", () => {
  using fd = createMemfd("ram", MIB);
  using memory = new GuestMemory();
  const old = memory.add(region(fd.fd, 0, MIB));
  const view = new Uint8Array(memory.buffer(0, MIB));
  {
    using _gone = memory.exchange([]);
    assert.deepEqual(memory.ranges(), []);
    view[0] = 1;
    assert.ok(isOpenFd(old.fd));
  }
  assert.ok(!isOpenFd(old.fd));
});

Deno.test("A range may span adjacent regions but an address lies in one mapping", () => {
  using fd = createMemfd("ram", 4 * MIB);
  using memory = new GuestMemory();
  for (const gpa of [2 * MIB, 0, MIB]) memory.add(region(fd.fd, gpa, MIB, { fdOffset: gpa }));
  const table = new RangeTable(memory.ranges());
  for (const view of [memory, table]) {
    assert.ok(view.contains(5, 3 * MIB - 5));
    assert.ok(!view.contains(5, 3 * MIB));
    assert.throws(() => view.addressOf(MIB - 1, 2), code("OUTSIDE_MEMORY"));
    assert.throws(() => view.buffer(3 * MIB - 1, 2), code("OUTSIDE_MEMORY"));
  }
  assert.equal(table.runLength(MIB - 1), 1);
  assert.equal(table.runLength(3 * MIB), 0);
});

Deno.test("Words and bytes are read across regions and at any alignment", () => {
  using fd = createMemfd("ram", MIB + 1);
  using memory = new GuestMemory();
  memory.add(region(fd.fd, 0, 4096));
  memory.add(region(fd.fd, 4096, 8191, { fdOffset: 4097 }));
  const table = new RangeTable(memory.ranges());
  for (let i = 4090; i < 4106; i++) table.writeByte(i, i & 0xff);
  const words = new Uint32Array(3);
  for (const gpa of [4090, 4092, 4093, 4096, 4097]) {
    assert.ok(table.readWords(gpa, words, 2));
    const expected = [gpa, gpa + 4].map((at) => [0, 1, 2, 3].reduce((sum, i) => sum + ((at + i) & 0xff) * 2 ** (8 * i), 0));
    assert.deepEqual([...words.subarray(0, 2)], expected);
  }
  assert.ok(!table.readWords(4096 + 8191 - 8, words, 3));
  assert.equal(table.readByte(4095), 0xff);
  assert.throws(() => table.readByte(4096 + 8191), code("OUTSIDE_MEMORY"));
});

Deno.test("A range table agrees with a search of all ranges", () => {
  const address = fc.integer({ min: 0, max: 64 });
  fc.assert(
    fc.property(
      fc.array(fc.boolean(), { minLength: 64, maxLength: 64 }),
      fc.array(fc.tuple(address, address), { minLength: 20 }),
      (set, asks) => {
        const ranges = set.flatMap((there, i) => there ? [{ gpa: i * 4096, size: 4096, uaddr: 0, address: 2 ** 40 - i * 8192 }] : []);
        const table = new RangeTable(ranges);
        for (const [page, length] of asks) {
          const all = set.slice(page, page + length).every((there) => there) && page + length <= 64;
          assert.equal(table.contains(page * 4096, length * 4096), all && (length > 0 || set[page] === true));
          assert.equal(table.find(page * 4096 + 1, 4095), set[page] ? 2 ** 40 - page * 8192 + 1 : -1);
        }
      },
    ),
    { numRuns: 100, seed: 1 },
  );
});
