import assert from "node:assert/strict";
import { Chain, type RingMemory } from "../../src/vring/queue.ts";
import { completePackedBase, PackedDevice, PackedDriver } from "../../src/vring/packed.ts";
import { SplitDevice, SplitDriver } from "../../src/vring/split.ts";
import { VRING_RULES, VringError } from "../../src/vring/rules.ts";
import { packedLayout, splitLayout } from "../../src/vring/layout.ts";
import { FlatMemory, packedPlace, splitPlace } from "../support/ring_memory.ts";

const NUM = 8;
const NEXT = 1, WRITE = 2, INDIRECT = 4, AVAIL = 0x80, USED = 0x8000;
const BASE = 0x10000;
const BUFFER = BASE + 0x3000;

function expect(rule: keyof typeof VRING_RULES, action: () => unknown): void {
  assert.throws(action, (error: unknown) => {
    assert.ok(error instanceof VringError, String(error));
    assert.equal(error.code, rule);
    assert.equal(error.spec, VRING_RULES[rule].spec);
    return true;
  });
}

/** A split ring whose driver's part the test writes by hand: chains as heads, published by `ready`. */
function splitRing(options: { indirect?: boolean; maxChain?: number; memory?: RingMemory } = {}) {
  const memory = new FlatMemory(0x8000, BASE);
  const place = splitPlace(memory, NUM);
  const table = memory.alloc(0x400);
  const desc = (index: number, address: number, length: number, flags: number, next = 0) =>
    memory.desc(place.desc.byteOffset, index, address, length, flags, next);
  const entry = (index: number, address: number, length: number, flags: number, next = 0) =>
    memory.desc(table, index, address, length, flags, next);
  const ready = (...heads: number[]) => {
    for (const [i, head] of heads.entries()) memory.view.setUint16(place.avail.byteOffset + 4 + 2 * i, head, true);
    memory.view.setUint16(place.avail.byteOffset + 2, heads.length, true);
  };
  const device = new SplitDevice({ ...place, eventIdx: false, indirect: options.indirect ?? true, memory, ...options });
  const chain = new Chain(64);
  return { memory, place, table: BASE + table, desc, entry, ready, device, chain, pop: () => device.pop(chain) };
}

/** The same for a packed ring. */
function packedRing(options: { indirect?: boolean; maxChain?: number } = {}) {
  const memory = new FlatMemory(0x8000, BASE);
  const place = packedPlace(memory, NUM);
  const table = memory.alloc(0x400);
  const desc = (slot: number, address: number, length: number, id: number, flags: number) =>
    memory.packedDesc(place.desc.byteOffset, slot, address, length, id, flags);
  const entry = (index: number, address: number, length: number, flags: number) =>
    memory.packedDesc(table, index, address, length, 0, flags);
  const device = new PackedDevice({ ...place, eventIdx: false, indirect: options.indirect ?? true, memory, ...options });
  const chain = new Chain(64);
  return { memory, place, table: BASE + table, desc, entry, device, chain, pop: () => device.pop(chain) };
}

Deno.test("A device stops at a split ring that breaks a rule, and names the rule", async (t) => {
  const cases: [keyof typeof VRING_RULES, string, (ring: ReturnType<typeof splitRing>) => void, Parameters<typeof splitRing>[0]?][] = [
    ["AVAIL_INDEX_JUMP", "ahead", (r) => r.memory.view.setUint16(r.place.avail.byteOffset + 2, NUM + 1, true)],
    ["AVAIL_INDEX_JUMP", "back", (r) => r.memory.view.setUint16(r.place.avail.byteOffset + 2, 0xffff, true)],
    ["HEAD_OUT_OF_RANGE", "", (r) => r.ready(NUM)],
    ["HEAD_IN_FLIGHT", "", (r) => (r.desc(3, BUFFER, 1, 0), r.ready(3, 3), r.pop())],
    ["NEXT_OUT_OF_RANGE", "", (r) => (r.desc(0, BUFFER, 1, NEXT, NUM), r.ready(0))],
    ["CHAIN_LOOP", "of one", (r) => (r.desc(0, BUFFER, 1, NEXT, 0), r.ready(0))],
    ["CHAIN_LOOP", "of two", (r) => (r.desc(5, BUFFER, 1, NEXT, 6), r.desc(6, BUFFER, 1, NEXT, 5), r.ready(5))],
    [
      "CHAIN_TOO_LONG",
      "",
      (r) => (r.desc(0, BUFFER, 1, NEXT, 1), r.desc(1, BUFFER, 1, NEXT, 2), r.desc(2, BUFFER, 1, 0), r.ready(0)),
      { maxChain: 2 },
    ],
    ["READABLE_AFTER_WRITABLE", "", (r) => (r.desc(0, BUFFER, 1, WRITE | NEXT, 1), r.desc(1, BUFFER, 1, 0), r.ready(0))],
    ["DESCRIPTOR_EMPTY", "", (r) => (r.desc(0, BUFFER, 0, 0), r.ready(0))],
    ["ADDRESS_LIMIT", "far above", (r) => (r.desc(0, 2 ** 60, 1, 0), r.ready(0))],
    ["ADDRESS_LIMIT", "across", (r) => (r.desc(0, 2 ** 52 - 1, 2, 0), r.ready(0))],
    ["OUTSIDE_MEMORY", "below", (r) => (r.desc(0, BASE - 1, 2, 0), r.ready(0))],
    ["OUTSIDE_MEMORY", "above", (r) => (r.desc(0, BASE + 0x7fff, 2, 0), r.ready(0))],
    ["CHAIN_BYTES", "", (r) => {
      r.desc(0, BUFFER, 0xffff_ffff, NEXT, 1);
      r.desc(1, BUFFER, 2, 0);
      r.ready(0);
    }, { memory: { contains: () => true, buffer: (_, length) => new ArrayBuffer(length) } }],
    ["INDIRECT_NOT_NEGOTIATED", "", (r) => (r.desc(0, r.table, 16, INDIRECT), r.ready(0)), { indirect: false }],
    ["INDIRECT_NESTED", "", (r) => (r.desc(0, r.table, 16, INDIRECT), r.entry(0, r.table, 16, INDIRECT), r.ready(0))],
    ["INDIRECT_WITH_NEXT", "", (r) => (r.desc(0, r.table, 16, INDIRECT | NEXT, 1), r.ready(0))],
    ["INDIRECT_SIZE", "empty", (r) => (r.desc(0, r.table, 0, INDIRECT), r.ready(0))],
    ["INDIRECT_SIZE", "odd", (r) => (r.desc(0, r.table, 24, INDIRECT), r.ready(0))],
    ["INDIRECT_TOO_LONG", "", (r) => (r.desc(0, r.table, 16 * 65, INDIRECT), r.ready(0))],
    ["INDIRECT_TOO_LONG", "4 GiB", (r) => (r.desc(0, r.table, 0xffff_fff0, INDIRECT), r.ready(0))],
    ["OUTSIDE_MEMORY", "table", (r) => (r.desc(0, BASE + 0x7ff8, 16, INDIRECT), r.ready(0))],
    ["NEXT_OUT_OF_RANGE", "in a table", (r) => (r.desc(0, r.table, 16, INDIRECT), r.entry(0, BUFFER, 1, NEXT, 1), r.ready(0))],
    ["CHAIN_LOOP", "in a table", (r) => {
      r.desc(0, r.table, 32, INDIRECT);
      r.entry(0, BUFFER, 1, NEXT, 1);
      r.entry(1, BUFFER, 1, NEXT, 0);
      r.ready(0);
    }],
  ];
  for (const [rule, how, breakIt, options] of cases) {
    await t.step(`${rule} ${how}`.trim(), () => {
      const ring = splitRing(options);
      breakIt(ring);
      expect(rule, ring.pop);
      expect(rule, ring.pop);
    });
  }
});

Deno.test("A device stops at a packed ring that breaks a rule, and names the rule", async (t) => {
  const cases: [keyof typeof VRING_RULES, string, (ring: ReturnType<typeof packedRing>) => void, Parameters<typeof packedRing>[0]?][] = [
    ["PACKED_LIST_BROKEN", "", (r) => (r.desc(0, BUFFER, 1, 0, AVAIL | NEXT), r.desc(1, BUFFER, 1, 0, USED))],
    ["PACKED_ID_OUT_OF_RANGE", "", (r) => r.desc(0, BUFFER, 1, NUM, AVAIL)],
    ["PACKED_ID_IN_FLIGHT", "", (r) => (r.desc(0, BUFFER, 1, 4, AVAIL), r.desc(1, BUFFER, 1, 4, AVAIL), r.pop())],
    ["CHAIN_LOOP", "", (r) => {
      for (let slot = 0; slot < NUM; slot++) r.desc(slot, BUFFER, 1, 0, AVAIL | NEXT);
    }],
    ["CHAIN_LOOP", "into a chain in flight", (r) => {
      r.desc(0, BUFFER, 1, 7, AVAIL);
      for (let slot = 1; slot < NUM; slot++) r.desc(slot, BUFFER, 1, 0, AVAIL | NEXT);
      r.pop();
    }],
    ["CHAIN_TOO_LONG", "", (r) => {
      for (const slot of [0, 1, 2]) r.desc(slot, BUFFER, 1, 0, AVAIL | (slot < 2 ? NEXT : 0));
    }, { maxChain: 2 }],
    ["READABLE_AFTER_WRITABLE", "", (r) => (r.desc(0, BUFFER, 1, 0, AVAIL | NEXT | WRITE), r.desc(1, BUFFER, 1, 0, AVAIL))],
    ["DESCRIPTOR_EMPTY", "", (r) => r.desc(0, BUFFER, 0, 0, AVAIL)],
    ["ADDRESS_LIMIT", "", (r) => r.desc(0, 2 ** 52, 1, 0, AVAIL)],
    ["OUTSIDE_MEMORY", "", (r) => r.desc(0, BASE - 1, 1, 0, AVAIL)],
    ["INDIRECT_NOT_NEGOTIATED", "", (r) => r.desc(0, r.table, 16, 0, AVAIL | INDIRECT), { indirect: false }],
    ["INDIRECT_WITH_NEXT", "", (r) => r.desc(0, r.table, 16, 0, AVAIL | INDIRECT | NEXT)],
    ["INDIRECT_NESTED", "", (r) => (r.desc(0, r.table, 16, 0, AVAIL | INDIRECT), r.entry(0, r.table, 16, INDIRECT))],
    ["INDIRECT_SIZE", "", (r) => r.desc(0, r.table, 15, 0, AVAIL | INDIRECT)],
    ["INDIRECT_TOO_LONG", "", (r) => r.desc(0, r.table, 16 * 65, 0, AVAIL | INDIRECT)],
    ["PACKED_INDIRECT_MIXED", "", (r) => (r.desc(0, BUFFER, 1, 0, AVAIL | NEXT), r.desc(1, r.table, 16, 0, AVAIL | INDIRECT))],
  ];
  for (const [rule, how, breakIt, options] of cases) {
    await t.step(`${rule} ${how}`.trim(), () => {
      const ring = packedRing(options);
      breakIt(ring);
      expect(rule, ring.pop);
      expect(rule, ring.pop);
    });
  }
});

Deno.test("The id of a packed chain is that of its last descriptor, and reserved flags in its table are ignored", () => {
  const ring = packedRing();
  ring.desc(0, BUFFER, 1, 7, AVAIL | NEXT);
  ring.desc(1, BUFFER, 1, 2, AVAIL);
  ring.desc(2, ring.table, 32, 5, AVAIL | INDIRECT | WRITE);
  ring.entry(0, BUFFER, 1, NEXT | AVAIL);
  ring.entry(1, BUFFER + 8, 4, NEXT | WRITE);
  assert.ok(ring.pop());
  assert.equal(ring.chain.id, 2);
  assert.equal(ring.chain.slots, 2);
  assert.ok(ring.pop());
  assert.deepEqual([ring.chain.id, ring.chain.count, ring.chain.readableCount, ring.chain.slots], [5, 2, 1, 1]);
  assert.deepEqual([ring.chain.indirectAddress, ring.chain.indirectLength], [ring.table, 32]);
});

Deno.test("A split chain may end in an indirect table, whose WRITE flag counts for nothing", () => {
  const ring = splitRing();
  ring.desc(0, BUFFER, 1, NEXT, 1);
  ring.desc(1, ring.table, 48, INDIRECT | WRITE);
  ring.entry(0, BUFFER + 8, 2, NEXT, 2);
  ring.entry(2, BUFFER + 16, 4, WRITE);
  ring.ready(0);
  assert.ok(ring.pop());
  assert.deepEqual([...ring.chain.addresses.subarray(0, 3)], [BUFFER, BUFFER + 8, BUFFER + 16]);
  assert.deepEqual([ring.chain.count, ring.chain.readableCount, ring.chain.slots], [3, 2, 2]);
});

Deno.test("A driver stops at a split used ring that breaks a rule, and names the rule", async (t) => {
  const cases: [keyof typeof VRING_RULES, string, (used: (idx: number, id: number, length?: number) => void) => void, boolean][] = [
    ["USED_INDEX_JUMP", "beyond what is available", (used) => used(3, 0), false],
    ["USED_INDEX_JUMP", "back", (used) => used(0xffff, 0), false],
    ["USED_ID_OUT_OF_RANGE", "", (used) => used(1, NUM), false],
    ["USED_ID_OUT_OF_RANGE", "far", (used) => used(1, 0xffff_ffff), false],
    ["USED_NOT_IN_FLIGHT", "never given", (used) => used(1, 5), false],
    ["USED_NOT_IN_FLIGHT", "not yet published", (used) => used(1, 2), false],
    ["USED_NOT_IN_FLIGHT", "in order", (used) => used(1, 5), true],
    ["IN_ORDER", "a batch beyond the used index", (used) => used(1, 1), true],
  ];
  for (const [rule, how, breakIt, inOrder] of cases) {
    await t.step(`${rule} ${how}`.trim(), () => {
      const memory = new FlatMemory(0x1000);
      const place = splitPlace(memory, NUM);
      const driver = new SplitDriver({ ...place, eventIdx: false, inOrder });
      for (let i = 0; i < 2; i++) driver.add([{ address: BUFFER, length: 1 }], []);
      driver.publish();
      driver.add([{ address: BUFFER, length: 1 }], []);
      breakIt((idx, id, length = 0) => {
        memory.view.setUint32(place.used.byteOffset + 4, id, true);
        memory.view.setUint32(place.used.byteOffset + 8, length, true);
        memory.view.setUint16(place.used.byteOffset + 2, idx, true);
      });
      expect(rule, () => driver.take());
    });
  }
});

Deno.test("A driver stops at a packed used descriptor that breaks a rule, and clamps lengths", () => {
  const make = () => {
    const memory = new FlatMemory(0x1000);
    const place = packedPlace(memory, NUM);
    const driver = new PackedDriver({ ...place, eventIdx: false });
    for (let i = 0; i < 2; i++) driver.add([], [{ address: BUFFER, length: 100 }]);
    driver.publish();
    driver.add([{ address: BUFFER, length: 1 }], []);
    return { driver, used: (id: number, length = 0) => memory.packedDesc(place.desc.byteOffset, 0, 0, length, id, AVAIL | USED) };
  };
  for (const [rule, id] of [["USED_ID_OUT_OF_RANGE", NUM], ["USED_NOT_IN_FLIGHT", 5], ["USED_NOT_IN_FLIGHT", 2]] as const) {
    const { driver, used } = make();
    used(id);
    expect(rule, () => driver.take());
  }
  const { driver, used } = make();
  used(1, 4000);
  assert.equal(driver.take(), 1);
  assert.equal(driver.usedLength, 100);
});

Deno.test("A device that writes one used element for a batch is understood with IN_ORDER", () => {
  const memory = new FlatMemory(0x2000);
  const split = splitPlace(memory, NUM);
  const splitDriver = new SplitDriver({ ...split, eventIdx: false, inOrder: true });
  const packed = packedPlace(memory, NUM);
  const packedDriver = new PackedDriver({ ...packed, eventIdx: false, inOrder: true });
  for (const driver of [splitDriver, packedDriver]) {
    const ids = [10, 20, 30].map((length) => driver.add([{ address: 64, length: 1 }], [{ address: 64, length }]));
    driver.publish();
    if (driver === splitDriver) {
      memory.view.setUint32(split.used.byteOffset + 4, ids[2]!, true);
      memory.view.setUint32(split.used.byteOffset + 8, 7, true);
      memory.view.setUint16(split.used.byteOffset + 2, 3, true);
    } else {
      memory.packedDesc(packed.desc.byteOffset, 0, 0, 7, ids[2]!, AVAIL | USED | WRITE);
    }
    const back = [0, 1, 2].map(() => [driver.take(), driver.usedLength]);
    assert.deepEqual(back, [[ids[0], 10], [ids[1], 20], [ids[2], 7]]);
    assert.equal(driver.take(), -1);
    assert.equal(driver.numFree, NUM);
  }
});

Deno.test("Sizes, alignments and bases that no ring can have are refused", () => {
  const memory = new FlatMemory(0x2000);
  const place = splitPlace(memory, NUM);
  const options = { ...place, eventIdx: true, indirect: false };
  for (const num of [0, 3, -1, 65536, 1.5, NaN]) {
    expect("RING_SIZE", () => new SplitDevice({ ...options, num }));
    expect("RING_SIZE", () => splitLayout(num));
  }
  for (const num of [0, -1, 32769, 1.5, NaN]) expect("RING_SIZE", () => packedLayout(num));
  const at = (byteOffset: number) => ({ buffer: place.desc.buffer, byteOffset });
  expect("RING_ALIGNMENT", () => new SplitDevice({ ...options, desc: at(2) }));
  expect("RING_ALIGNMENT", () => new SplitDevice({ ...options, avail: at(1) }));
  expect("RING_ALIGNMENT", () => new SplitDevice({ ...options, used: at(2) }));
  expect("RING_ALIGNMENT", () => new SplitDevice({ ...options, used: at(0x2000 - 4) }));
  expect("RING_ALIGNMENT", () => new SplitDriver({ ...place, eventIdx: true, desc: at(-16) }));
  expect("BASE_INVALID", () => new SplitDevice({ ...options, base: NUM + 1 }));
  expect("BASE_INVALID", () => completePackedBase(0x8008_8008, NUM));
  expect("BASE_INVALID", () => completePackedBase(0x8001_8000, NUM));
  expect("BASE_INVALID", () => new PackedDriver({ ...packedPlace(memory, NUM), eventIdx: false, base: 0x8000_8001 }));
});

Deno.test("A packed base of a peer that sends only the avail half is completed", () => {
  assert.equal(completePackedBase(0x8000_8000, NUM), 0x8000_8000);
  assert.equal(completePackedBase(0x0000_8005, NUM), 0x8005_8005);
  assert.equal(completePackedBase(0x8006_0002, NUM), 0x8006_0002, "four in flight across the wrap");
});

Deno.test("Where half a packed base could be a whole one, the ring tells: all that is in flight must look offered", () => {
  const [AVAIL, USED] = [1 << 7, 1 << 15];
  const ring = (...flags: number[]) => Uint16Array.from({ length: 8 * NUM }, (_, i) => i % 8 === 7 ? flags[i >> 3] ?? 0 : 0);
  const fresh = ring();
  assert.equal(completePackedBase(0x0000_8000, NUM, fresh), 0x8000_8000, "nothing was ever offered");
  assert.equal(completePackedBase(0x0000_8000, NUM, ring(...Array(NUM).fill(USED))), 0x0000_8000, "a full ring in flight");
  assert.equal(completePackedBase(0x0000_8000, NUM, ring(...Array(NUM).fill(USED).with(3, 0))), 0x8000_8000);
  assert.equal(completePackedBase(0x0000_0003, NUM, ring(USED, USED | 1, USED)), 0x0000_0003, "three in flight");
  assert.equal(completePackedBase(0x0000_0003, NUM, ring(0, USED | 1, USED)), 0x0003_0003, "the first one came back");
  assert.equal(completePackedBase(0x0000_0003, NUM, ring(AVAIL | USED, USED, USED)), 0x0003_0003);
  const wrapped = ring(USED | 1, USED, USED).with(8 * NUM - 1, AVAIL | 1);
  assert.equal(completePackedBase(0x0000_0002, NUM, wrapped), 0x0002_0002, "the end of a chain that began in the lap before");
  assert.equal(completePackedBase(0x0000_0000, NUM, fresh), 0);
  assert.equal(completePackedBase(0x8006_0002, NUM, fresh), 0x8006_0002, "an upper half is never doubted");
  assert.throws(() => completePackedBase(0x0000_0008, NUM, fresh), /BASE_INVALID|no position/);
});

Deno.test("A saved state that does not fit is refused and changes nothing", () => {
  const memory = new FlatMemory(0x2000);
  const place = splitPlace(memory, NUM);
  const device = new SplitDevice({ ...place, eventIdx: false, indirect: false });
  const driver = new SplitDriver({ ...place, eventIdx: false });
  driver.add([{ address: 64, length: 1 }], []);
  driver.publish();
  device.pop(new Chain(8));
  const good = device.save();
  const record = good.inflight[0]!;
  const bad: unknown[] = [
    null,
    [],
    "x",
    {},
    { ...good, layout: "packed" },
    { ...good, side: "driver" },
    { ...good, num: 4 },
    { ...good, base: -1 },
    { ...good, base: 1.5 },
    { ...good, base: NUM + 1 },
    { ...good, used: "0" },
    { ...good, inflight: {} },
    { ...good, inflight: [null] },
    { ...good, inflight: [record, record] },
    { ...good, inflight: [{ ...record, id: NUM }] },
    { ...good, inflight: [{ ...record, age: 0 }] },
    { ...good, inflight: [{ ...record, slots: 0 }] },
    { ...good, inflight: [{ ...record, written: 1 }] },
    { ...good, inflight: new Array(NUM + 1).fill(record) },
  ];
  for (const state of bad) expect("STATE_INVALID", () => device.restore(state));
  assert.deepEqual(device.save(), good);
  const own = driver.save();
  const out = own.inflight[0]!;
  for (
    const state of [
      { ...own, avail: 2 },
      { ...own, inflight: [] },
      { ...own, inflight: [{ ...out, descriptors: [] }] },
      { ...own, inflight: [{ ...out, descriptors: [1] }] },
      { ...own, inflight: [{ ...out, descriptors: [out.id, out.id] }] },
      { ...own, inflight: [{ ...out, writable_bytes: -1 }] },
    ]
  ) expect("STATE_INVALID", () => driver.restore(state));
  assert.deepEqual(driver.save(), own);
});

Deno.test("Chains in flight can be made available again only when nothing was used out of order", () => {
  for (const make of [splitPair, packedPair]) {
    const { driver, device } = make();
    const chain = new Chain(NUM);
    for (let i = 0; i < 4; i++) driver.add([{ address: 64 + i, length: 1 }], []);
    driver.publish();
    const start = device.base;
    const ids = [0, 1, 2].map(() => (device.pop(chain), chain.id));
    device.push(ids[1]!, 0);
    assert.equal(device.rewind(), false, "pushed, not flushed");
    device.flush();
    assert.equal(device.rewind(), false, "there is a gap");
    assert.equal(device.inflight, 2);
    device.push(ids[0]!, 0);
    device.flush();
    assert.ok(device.rewind());
    assert.equal(device.inflight, 0);
    assert.notEqual(device.base, start);
    assert.ok(device.pop(chain));
    assert.equal(chain.id, ids[2]);
    assert.ok(device.pop(chain));
    assert.ok(!device.pop(chain));
  }
});

function splitPair() {
  const place = splitPlace(new FlatMemory(0x1000), NUM);
  return {
    driver: new SplitDriver({ ...place, eventIdx: false }),
    device: new SplitDevice({ ...place, eventIdx: false, indirect: false }),
  };
}

function packedPair() {
  const place = packedPlace(new FlatMemory(0x1000), NUM);
  return {
    driver: new PackedDriver({ ...place, eventIdx: false }),
    device: new PackedDevice({ ...place, eventIdx: false, indirect: false }),
  };
}

Deno.test("A chain that even the empty ring cannot hold is refused by name, never left to wait", () => {
  const segments = Array.from({ length: NUM + 1 }, () => ({ address: 64, length: 1 }));
  for (const { driver } of [splitPair(), packedPair()]) {
    expect("CHAIN_TOO_LONG", () => driver.add(segments, []));
    assert.ok(driver.add(segments.slice(1), []) >= 0);
    assert.equal(driver.add([{ address: 64, length: 1 }], []), -1);
  }
});
