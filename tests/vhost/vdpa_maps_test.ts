import assert from "node:assert/strict";
import fc from "fast-check";
import type { SvqError } from "../../src/errors.ts";
import { createEventfd, createMemfd, type OwnedFd } from "../../src/ffi/mod.ts";
import type { MemoryRegion } from "../../src/memory/region.ts";
import { type MapPolicy, VdpaMaps } from "../../src/vhost/vdpa_maps.ts";
import { VdpaNode } from "../../src/vhost/vdpa_node.ts";
import { type FakeOptions, FakeVdpa } from "./fake_vdpa.ts";

const PAGE = 4096;
const MIB = 1 << 20;

function withCode(code: string, text?: RegExp): (error: SvqError) => true {
  return (error) => {
    assert.equal(error.code, code, error.stack);
    if (text !== undefined) assert.match(`${error.message} ${error.hint}`, text);
    return true;
  };
}

function make(options: FakeOptions = {}, policy: Partial<MapPolicy> = {}): { fake: FakeVdpa; maps: VdpaMaps; fd: OwnedFd } & Disposable {
  const fake = new FakeVdpa(options);
  fake.owned = true;
  const maps = new VdpaMaps(new VdpaNode(fake), {
    range: { first: 0n, last: 2n ** 64n - 1n },
    addressSpaces: 2,
    batch: true,
    asids: true,
    pins: false,
    memlock: () => ({ limit: 8 * MIB, pinned: 0 }),
    ...policy,
  });
  const fd = createMemfd("ram", 64 * MIB);
  return {
    fake,
    maps,
    fd,
    [Symbol.dispose]() {
      maps.close();
      fd.close();
    },
  };
}

function region(fd: OwnedFd, gpa: number, size = MIB, fdOffset = gpa): MemoryRegion {
  return { gpa, size, uaddr: 0, fd: fd.fd, fdOffset };
}

Deno.test("a new table unmaps what is gone, maps what is new and leaves the rest alone, in one batch", () => {
  using t = make();
  t.maps.replaceAll([region(t.fd, 0), region(t.fd, 4 * MIB)]);
  t.fake.log.length = 0;
  t.maps.replaceAll([region(t.fd, 0), region(t.fd, 8 * MIB)]);
  assert.deepEqual(t.fake.log, ["BEGIN", "UNMAP 400000", "MAP 800000+100000", "END"]);
  t.fake.log.length = 0;
  t.maps.replaceAll([region(t.fd, 0), region(t.fd, 8 * MIB)]);
  assert.deepEqual(t.fake.log, [], "the same table costs nothing");
});

Deno.test("the same addresses of another file are mapped anew", () => {
  using t = make();
  using other = createMemfd("other", 64 * MIB);
  t.maps.replaceAll([region(t.fd, 0)]);
  t.maps.replaceAll([region(other, 0)]);
  assert.deepEqual(t.maps.counters, { mapped: 2, unmapped: 1, remapped: 0 });
});

Deno.test("without batches each map goes by itself", () => {
  using t = make({}, { batch: false });
  t.maps.add(region(t.fd, 0));
  assert.deepEqual(t.fake.log, ["MAP 0+100000"]);
});

Deno.test("an overlap is refused with the name of the other map, before the kernel is asked", () => {
  using t = make();
  t.maps.add(region(t.fd, 0, 2 * MIB));
  t.fake.log.length = 0;
  assert.throws(() => t.maps.add(region(t.fd, MIB)), withCode("IOVA_OVERLAP", /region 0x0/));
  t.maps.add(region(t.fd, MIB), 1);
  assert.equal(t.maps.maps.length, 2, "another address space is free");
  assert.throws(() => t.maps.add(region(t.fd, 8 * MIB), 2), withCode("BAD_ASID"));
});

Deno.test("a region outside the device's range is refused with the range", () => {
  using t = make({}, { range: { first: 0n, last: 2n ** 39n - 1n } });
  assert.throws(() => t.maps.add(region(t.fd, 2 ** 39 - MIB, 2 * MIB, 0)), withCode("IOVA_OUTSIDE_RANGE", /0x7fffffffff/));
  assert.deepEqual(t.fake.log, []);
});

Deno.test("memory that is no shared file is refused: the kernel would pass over it silently", () => {
  using t = make();
  using eventfd = createEventfd();
  assert.throws(() => t.maps.add(region(eventfd, 0)), withCode("MEMORY_NOT_SHARED", /share=on/));
  assert.throws(() => t.maps.add({ ...region(t.fd, 0), fd: 9999 }), withCode("MEMORY_NOT_SHARED"));
  assert.throws(() => t.maps.add(region(t.fd, 0, MIB, 64 * MIB)), withCode("REGION_TRUNCATED"));
});

Deno.test("the memlock limit is checked beforehand where the driver pins, and named afterwards where nobody knows", () => {
  for (const pins of [true, undefined]) {
    using t = make({ pinLimit: 8 * MIB }, { pins });
    t.maps.add(region(t.fd, 0, 4 * MIB));
    assert.throws(() => t.maps.add(region(t.fd, 16 * MIB, 16 * MIB)), withCode("MEMLOCK", /8MiB.*16384 KiB/s));
    assert.equal(t.fake.log.some((entry) => entry.endsWith("!")), pins !== true);
    assert.deepEqual(t.maps.maps.map((map) => map.iova), [0]);
  }
});

Deno.test("a refusal in the middle of a table leaves the old one in force", () => {
  using t = make({ pinLimit: 4 * MIB }, { pins: false });
  t.maps.replaceAll([region(t.fd, 0), region(t.fd, 2 * MIB)]);
  assert.throws(
    () => t.maps.replaceAll([region(t.fd, 0), region(t.fd, 8 * MIB), region(t.fd, 16 * MIB, 16 * MIB)]),
    withCode("IOTLB_REFUSED"),
  );
  assert.deepEqual([...t.fake.table.keys()].sort((a, b) => a - b), [0, 2 * MIB]);
  assert.deepEqual(t.maps.maps.map((map) => map.iova), [0, 2 * MIB]);
  assert.equal(t.fake.log.at(-1), "END");
});

Deno.test("after a reset that dropped the maps all of them are made again, once", () => {
  using t = make();
  t.maps.replaceAll([region(t.fd, 0), region(t.fd, 4 * MIB)]);
  t.fake.driverTable.clear();
  t.maps.afterReset(false);
  assert.equal(t.maps.restore(), 2);
  assert.deepEqual([...t.fake.driverTable].sort((a, b) => a - b), [0, 4 * MIB]);
  assert.equal(t.maps.restore(), 0);
  t.maps.afterReset(true);
  assert.equal(t.maps.restore(), 0);
});

Deno.test("whatever tables follow each other, the kernel has exactly the last one that was accepted", () => {
  const place = fc.record({ at: fc.nat(30), pages: fc.integer({ min: 1, max: 6 }) });
  fc.assert(
    fc.property(fc.array(fc.array(place, { maxLength: 5 }), { maxLength: 6 }), (tables) => {
      using t = make({ pinLimit: 12 * PAGE });
      let expected: string[] = [];
      for (const table of tables) {
        const regions = table.map(({ at, pages }) => region(t.fd, at * PAGE, pages * PAGE));
        try {
          t.maps.replaceAll(regions);
          expected = regions.map(({ gpa, size }) => `${gpa}+${size}`).sort();
        } catch (error) {
          assert.ok(["IOVA_OVERLAP", "IOTLB_REFUSED"].includes((error as SvqError).code), String(error));
        }
        assert.deepEqual([...t.fake.table.values()].map(({ iova, size }) => `${iova}+${size}`).sort(), expected);
        assert.deepEqual(t.maps.maps.map(({ iova, size }) => `${iova}+${size}`).sort(), expected);
      }
    }),
    { numRuns: 100 },
  );
});
