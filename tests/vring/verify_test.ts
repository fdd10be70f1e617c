import assert from "node:assert/strict";
import { dumpRing } from "../../src/vring/dump.ts";
import { diffImages } from "../../src/vring/diff.ts";
import { decodeImage, encodeImage, type ImageQueue } from "../../src/vring/image.ts";
import { outstandingChains, RingView } from "../../src/vring/inspect.ts";
import type { RingFormat } from "../../src/vring/queue.ts";
import { VRING_RULES, type VringRule } from "../../src/vring/rules.ts";
import { type RingSnapshot, snapshotRing } from "../../src/vring/snapshot.ts";
import { verifyRing } from "../../src/vring/verify.ts";
import { packedLayout, splitLayout } from "../../src/vring/layout.ts";
import { FlatMemory, packedPlace, type RingPlace, splitPlace } from "../support/ring_memory.ts";

const NUM = 8;
const BASE = 0x10000;
const SIZE = 0x8000;
const BUFFER = BASE + 0x4000;
const NEXT = 1, WRITE = 2, INDIRECT = 4, AVAIL = 0x80, USED = 0x8000;

/** A sound ring with two chains outstanding and one that came back, to be broken by hand. */
class Image {
  readonly memory = new FlatMemory(SIZE, BASE);
  readonly place: RingPlace;
  readonly table: number;
  shape: { eventIdx: boolean; indirect: boolean; inOrder: boolean } = { eventIdx: false, indirect: true, inOrder: false };
  lastAvail: number | null = 1;
  used: number | null = null;
  lastUsed: number | null = 0;

  constructor(readonly layout: RingFormat) {
    this.place = layout === "split" ? splitPlace(this.memory, NUM) : packedPlace(this.memory, NUM);
    this.table = this.memory.alloc(0x2000);
    if (layout === "split") this.#split();
    else this.#packed();
  }

  // Chain 6 is used; chain 0 (descriptors 0, 1) and chain 4 (its table) are not taken.
  #split(): void {
    this.desc(6, BUFFER, 16, WRITE);
    this.desc(0, BUFFER, 16, NEXT, 1);
    this.desc(1, BUFFER + 0x100, 512, WRITE);
    this.entry(0, BUFFER, 16, NEXT, 1);
    this.entry(1, BUFFER, 1, WRITE);
    this.desc(4, BASE + this.table, 32, INDIRECT);
    this.avail(6, 0, 4);
    this.done([6, 16]);
  }

  // Slot 0 is used with id 6; slots 1 and 2 are the list of id 0, slot 3 the table of id 4.
  #packed(): void {
    this.slot(0, BUFFER, 16, 6, AVAIL | USED | WRITE);
    this.slot(1, BUFFER, 16, 0, AVAIL | NEXT);
    this.slot(2, BUFFER, 512, 0, AVAIL | WRITE);
    this.entry(0, BUFFER, 16, 0);
    this.entry(1, BUFFER, 1, 0, WRITE);
    this.slot(3, BASE + this.table, 32, 4, AVAIL | INDIRECT);
    this.lastAvail = this.used = 1 | 0x8000;
    this.lastUsed = 0x8000;
  }

  desc(index: number, address: number, length: number, flags: number, next = 0): void {
    this.memory.desc(this.place.desc.byteOffset, index, address, length, flags, next);
  }

  slot(slot: number, address: number, length: number, id: number, flags: number): void {
    this.memory.packedDesc(this.place.desc.byteOffset, slot, address, length, id, flags);
  }

  /** An entry of the table; split: flags and next, packed: id and flags. */
  entry(index: number, address: number, length: number, third: number, fourth = 0): void {
    this.memory.desc(this.table, index, address, length, third, fourth);
  }

  /** The whole avail ring. */
  avail(...heads: number[]): void {
    for (const [i, head] of heads.entries()) this.word("avail", 2 + i, head);
    this.word("avail", 1, heads.length);
  }

  /** The whole used ring, as id and length. */
  done(...elements: [number, number][]): void {
    for (const [i, [id, length]] of elements.entries()) {
      this.memory.view.setUint32(this.place.used.byteOffset + 4 + 8 * i, id, true);
      this.memory.view.setUint32(this.place.used.byteOffset + 8 + 8 * i, length, true);
    }
    this.word("used", 1, elements.length);
  }

  word(part: "avail" | "used", index: number, value: number): void {
    this.memory.view.setUint16(this.place[part].byteOffset + 2 * index, value, true);
  }

  snapshot(): RingSnapshot {
    const { desc, avail, used } = this.place;
    const { lastAvail, lastUsed } = this;
    return snapshotRing({
      ...this.shape,
      layout: this.layout,
      num: NUM,
      addresses: { desc: BASE + desc.byteOffset, avail: BASE + avail.byteOffset, used: BASE + used.byteOffset },
      memory: [{ address: BASE, size: SIZE }],
      desc,
      avail,
      used,
      tableMemory: this.memory,
      positions: () => ({ lastAvail, used: this.used, lastUsed }),
    });
  }
}

type Break = (image: Image) => void | ((snapshot: RingSnapshot) => void);

const SPLIT: readonly [VringRule, string, Break][] = [
  ["RING_SIZE", "seven", () => (s) => s.num = 7],
  ["RING_SIZE", "none", () => (s) => s.num = 0],
  ["RING_ALIGNMENT", "address", () => (s) => s.addresses!.used += 2],
  ["RING_ALIGNMENT", "short", () => (s) => s.used = s.used.slice(0, 60)],
  ["BASE_INVALID", "", (i) => void (i.lastAvail = 100, i.word("avail", 1, 103), i.word("used", 1, 50), i.lastUsed = null)],
  ["AVAIL_INDEX_JUMP", "", (i) => i.word("avail", 1, 1 + NUM + 1)],
  ["AVAIL_INDEX_JUMP", "of a device that is not known", (i) => void (i.lastAvail = null, i.word("avail", 1, 1 + NUM + 1))],
  ["USED_INDEX_JUMP", "beyond the device", (i) => void (i.lastUsed = null, i.word("used", 1, 2))],
  ["USED_INDEX_JUMP", "beyond the avail index", (i) => void (i.lastAvail = i.lastUsed = null, i.word("used", 1, 4))],
  ["USED_INDEX_JUMP", "behind the driver", (i) => void (i.lastUsed = 2)],
  ["HEAD_OUT_OF_RANGE", "", (i) => i.avail(6, 0, NUM)],
  ["HEAD_IN_FLIGHT", "", (i) => i.avail(6, 0, 0)],
  ["HEAD_IN_FLIGHT", "as the past tells", (i) => void (i.lastAvail = null, i.avail(6, 3, 3), i.desc(3, BUFFER, 1, 0))],
  ["NEXT_OUT_OF_RANGE", "", (i) => i.desc(0, BUFFER, 16, NEXT, NUM)],
  ["NEXT_OUT_OF_RANGE", "in a table", (i) => i.entry(0, BUFFER, 16, NEXT, 2)],
  ["CHAIN_LOOP", "", (i) => i.desc(1, BUFFER, 16, NEXT, 0)],
  ["CHAIN_LOOP", "in a table", (i) => i.entry(1, BUFFER, 16, NEXT, 0)],
  ["CHAIN_TOO_LONG", "", (i) => {
    i.desc(1, BUFFER, 1, WRITE | NEXT, 2);
    i.desc(2, BUFFER, 1, WRITE);
    return (s) => s.maxChain = 2;
  }],
  ["CHAIN_BYTES", "", (i) => {
    i.desc(0, BUFFER, 0xffff_ffff, NEXT, 1);
    return (s) => s.memory = [{ address: BASE, size: 2 ** 40 }];
  }],
  ["READABLE_AFTER_WRITABLE", "", (i) => void (i.desc(0, BUFFER, 16, NEXT | WRITE, 1), i.desc(1, BUFFER, 1, 0))],
  ["DESCRIPTOR_EMPTY", "", (i) => i.desc(1, BUFFER, 0, WRITE)],
  ["DESCRIPTOR_FLAGS", "", (i) => i.desc(1, BUFFER, 1, WRITE | 8)],
  ["ADDRESS_LIMIT", "", (i) => i.desc(1, 2 ** 52, 1, WRITE)],
  ["OUTSIDE_MEMORY", "buffer", (i) => i.desc(1, BASE + SIZE - 1, 2, WRITE)],
  ["OUTSIDE_MEMORY", "table", (i) => i.desc(4, BASE - 16, 32, INDIRECT)],
  ["INDIRECT_NOT_NEGOTIATED", "", (i) => void (i.shape.indirect = false)],
  ["INDIRECT_NESTED", "", (i) => i.entry(1, BUFFER, 16, INDIRECT)],
  ["INDIRECT_WITH_NEXT", "", (i) => i.desc(4, BASE + i.table, 32, INDIRECT | NEXT, 5)],
  ["INDIRECT_SIZE", "odd", (i) => i.desc(4, BASE + i.table, 33, INDIRECT)],
  ["INDIRECT_SIZE", "empty", (i) => i.desc(4, BASE + i.table, 0, INDIRECT)],
  ["INDIRECT_TOO_LONG", "", (i) => i.desc(4, BASE + i.table, 16 * 1025, INDIRECT)],
  ["USED_ID_OUT_OF_RANGE", "", (i) => i.done([NUM, 16])],
  ["USED_NOT_IN_FLIGHT", "twice, as the driver sees it", (i) => void (i.lastAvail = 2, i.done([6, 1], [6, 1]))],
  ["USED_NOT_IN_FLIGHT", "twice, as the past tells", (i) => void (i.lastAvail = 2, i.lastUsed = null, i.done([6, 1], [6, 1]))],
  ["USED_LENGTH", "", (i) => i.done([6, 17])],
  ["IN_ORDER", "", (i) => void (i.shape.inOrder = true, i.lastAvail = 2, i.done([0, 16]))],
  ["IN_ORDER_NEXT", "", (i) => void (i.shape.inOrder = true, i.desc(0, BUFFER, 1, NEXT, 3), i.desc(3, BUFFER, 1, 0))],
  ["SUPPRESSION_FLAGS", "driver", (i) => i.word("avail", 0, 2)],
  ["SUPPRESSION_FLAGS", "device, with EVENT_IDX", (i) => void (i.shape.eventIdx = true, i.word("used", 0, 1))],
  ["DESCRIPTOR_SHARED", "", (i) => void (i.desc(4, BUFFER, 1, NEXT, 1))],
];

const PACKED: readonly [VringRule, string, Break][] = [
  ["RING_SIZE", "", () => (s) => s.num = 32769],
  ["BASE_INVALID", "", (i) => void (i.used = 2 | 0x8000)],
  ["BASE_INVALID", "outside", (i) => void (i.lastAvail = NUM | 0x8000)],
  ["CHAIN_LOOP", "", (i) => {
    for (let slot = 0; slot < NUM; slot++) i.slot(slot, BUFFER, 1, 0, AVAIL | NEXT);
    i.lastAvail = i.used = i.lastUsed = 0x8000;
  }],
  ["PACKED_LIST_BROKEN", "at the end", (i) => i.slot(3, BUFFER, 1, 4, AVAIL | NEXT)],
  ["PACKED_LIST_BROKEN", "", (i) => i.slot(2, BUFFER, 512, 0, AVAIL | USED | WRITE)],
  ["PACKED_ID_OUT_OF_RANGE", "", (i) => i.slot(3, BUFFER, 1, NUM, AVAIL)],
  ["PACKED_ID_IN_FLIGHT", "", (i) => i.slot(3, BUFFER, 1, 0, AVAIL)],
  ["PACKED_INDIRECT_FLAGS", "", (i) => i.entry(0, BUFFER, 16, 0, NEXT)],
  ["PACKED_INDIRECT_MIXED", "", (i) => i.slot(2, BASE + i.table, 32, 0, AVAIL | INDIRECT)],
  ["PACKED_EVENT_FLAGS", "reserved", (i) => i.word("avail", 1, 3)],
  ["PACKED_EVENT_FLAGS", "not negotiated", (i) => i.word("used", 1, 2)],
  ["PACKED_EVENT_OFFSET", "", (i) => void (i.shape.eventIdx = true, i.word("used", 1, 2), i.word("used", 0, NUM))],
  ["PACKED_WRAP_COUNTER", "", (i) => [5, 7].forEach((slot) => i.slot(slot, BUFFER, 1, 5, AVAIL))],
  ["USED_ID_OUT_OF_RANGE", "", (i) => i.slot(0, BUFFER, 16, NUM, AVAIL | USED)],
  [
    "USED_NOT_IN_FLIGHT",
    "",
    (i) => void (i.slot(1, BUFFER, 16, 6, AVAIL | USED), i.slot(2, BUFFER, 16, 0, AVAIL), i.lastAvail = i.used = 2 | 0x8000),
  ],
  ["DESCRIPTOR_EMPTY", "", (i) => i.slot(2, BUFFER, 0, 0, AVAIL)],
  ["DESCRIPTOR_FLAGS", "", (i) => i.slot(2, BUFFER, 1, 0, AVAIL | 8)],
  ["READABLE_AFTER_WRITABLE", "", (i) => i.slot(1, BUFFER, 1, 0, AVAIL | NEXT | WRITE) ?? i.slot(2, BUFFER, 1, 0, AVAIL)],
  ["OUTSIDE_MEMORY", "", (i) => i.slot(2, BASE - 1, 1, 0, AVAIL)],
  ["INDIRECT_NESTED", "", (i) => i.entry(0, BUFFER, 16, 0, INDIRECT)],
];

Deno.test("An image of a ring that breaks one rule is told by that rule, with its section, and by no other", async (t) => {
  for (const [layout, cases] of [["split", SPLIT], ["packed", PACKED]] as const) {
    for (const [rule, how, breakIt] of cases) {
      await t.step(`${layout}: ${rule} ${how}`.trim(), () => {
        const image = new Image(layout);
        const change = breakIt(image);
        const snapshot = image.snapshot();
        change?.(snapshot);
        const found = verifyRing(snapshot);
        assert.deepEqual([...new Set(found.map((anomaly) => anomaly.rule))], [rule], JSON.stringify(found));
        assert.equal(found[0]!.spec, VRING_RULES[rule].spec);
        // It survives the way through a file.
        const queue: ImageQueue = { index: 0, side: "guest", mode: "shadow", ring: snapshot, seen: [] };
        const text = JSON.stringify(encodeImage({ created: "2026-01-01T00:00:00Z", queues: [queue] }));
        assert.deepEqual(verifyRing(decodeImage(JSON.parse(text), "test").queues[0]!.ring!), found);
      });
    }
  }
});

Deno.test("Every rule about a ring's contents has an image that breaks it", () => {
  const covered = new Set([...SPLIT, ...PACKED].map(([rule]) => rule));
  // A saved state is no ring.
  const missing = Object.keys(VRING_RULES).filter((rule) => rule !== "STATE_INVALID" && !covered.has(rule as VringRule));
  assert.deepEqual(missing, []);
  assert.ok(covered.size >= 25);
});

Deno.test("A driver in the middle of a batch breaks no rule: the first slot of the batch is what it has not published", () => {
  const image = new Image("packed");
  for (const slot of [5, 6]) image.slot(slot, BUFFER, 1, 5, AVAIL);
  image.lastAvail = image.used = image.lastUsed = null;
  assert.deepEqual(verifyRing(image.snapshot()), []);
  assert.equal(dumpRing(image.snapshot())!.avail_idx, 4);
  // Over the end of the ring, and with the first slot in front of it.
  for (const slot of [4, 5, 6, 7]) image.slot(slot, BUFFER, 1, 5, slot === 6 ? 0 : AVAIL);
  for (const slot of [0, 1]) image.slot(slot, BUFFER, 1, 5, USED);
  const dump = dumpRing(image.snapshot())!;
  assert.deepEqual([dump.avail_idx, dump.wrap_counters!.avail], [6, 1]);
});

Deno.test("A sound image breaks no rule, whatever is known of the positions", () => {
  for (const layout of ["split", "packed"] as const) {
    for (const known of [true, false]) {
      const image = new Image(layout);
      if (!known) image.lastAvail = image.used = image.lastUsed = null;
      assert.deepEqual(verifyRing(image.snapshot()), []);
    }
  }
});

Deno.test("A dump tells chains, directions, tables, suppression and windows of a split ring", () => {
  const image = new Image("split");
  const dump = dumpRing(image.snapshot())!;
  assert.deepEqual([dump.avail_idx, dump.used_idx, dump.last_avail_idx, dump.in_flight], [3, 1, 1, 2]);
  assert.deepEqual(
    dump.chains.map(({ head, position, direction, length, readable_bytes, writable_bytes, in_flight, taken, certain }) => (
      { head, position, direction, length, readable_bytes, writable_bytes, in_flight, taken, certain }
    )),
    [
      {
        head: 0,
        position: 1,
        direction: "read+write",
        length: 2,
        readable_bytes: 16,
        writable_bytes: 512,
        in_flight: true,
        taken: false,
        certain: true,
      },
      {
        head: 4,
        position: 2,
        direction: "read+write",
        length: 2,
        readable_bytes: 16,
        writable_bytes: 1,
        in_flight: true,
        taken: false,
        certain: true,
      },
    ],
  );
  assert.deepEqual(dump.chains[1]!.indirect, { address: `0x${(BASE + image.table).toString(16)}`, bytes: 32, entries: 2 });
  assert.deepEqual(dump.descriptors.map(({ index }) => index), [0, 1, 4]);
  assert.deepEqual(dump.descriptors[0], { index: 0, address: "0x14000", length: 16, flags: ["next"], next: 1 });
  assert.deepEqual(dump.suppression.kicks, { wanted: "always", event: null, event_wrap: null, next_notifies: true });
  assert.deepEqual(dump.window.avail.filter(({ next }) => next), [{ position: 3, id: 0, next: true }]);
  const all = dumpRing(image.snapshot(), { all: true })!;
  assert.equal(all.descriptors.length, NUM);
  assert.deepEqual(all.chains.map(({ head, in_flight }) => [head, in_flight]), [[6, false], [0, true], [4, true]]);
});

Deno.test("A dump tells positions, wrap counters and lists of a packed ring", () => {
  const image = new Image("packed");
  image.shape.eventIdx = true;
  image.word("used", 0, 4 | 0x8000);
  image.word("used", 1, 2);
  const dump = dumpRing(image.snapshot())!;
  assert.deepEqual([dump.avail_idx, dump.used_idx, dump.last_avail_idx], [4, 1, 1]);
  assert.deepEqual(dump.wrap_counters, { avail: 1, used: 1, last_avail: 1 });
  assert.deepEqual(dump.chains.map(({ head, position, descriptors, in_flight }) => ({ head, position, descriptors, in_flight })), [
    { head: 0, position: 1, descriptors: [1, 2], in_flight: true },
    { head: 4, position: 3, descriptors: [3], in_flight: true },
  ]);
  assert.deepEqual(dump.suppression.kicks, { wanted: "at_event", event: 4, event_wrap: 1, next_notifies: true });
  // Without knowing the device's position the lists may have come back.
  image.lastAvail = image.used = image.lastUsed = null;
  const blind = dumpRing(image.snapshot())!;
  assert.deepEqual([blind.avail_idx, blind.used_idx], [4, null]);
  assert.deepEqual(blind.chains.map(({ in_flight }) => in_flight), [null, null]);
});

Deno.test("A chain that is out for longer than the ring remembers is counted, and nothing else is taken for it", () => {
  const memory = new FlatMemory(SIZE, BASE);
  const place = splitPlace(memory, 16);
  const layout = splitLayout(16);
  const avail = new Uint16Array(memory.bytes.buffer, place.avail.byteOffset, layout.avail.size >> 1);
  const used = new Uint32Array(memory.bytes.buffer, place.used.byteOffset, layout.used.size >> 2);
  for (let index = 0; index < 16; index++) memory.desc(place.desc.byteOffset, index, BUFFER, 1, 0);
  // Head 9 was made available at first and never used; heads 0 to 3 went round a hundred times, used in pairs the other way.
  const offered = [9];
  const returned: number[] = [];
  for (let round = 0; round < 100; round++) {
    offered.push(0, 1, 2, 3);
    returned.push(1, 0, 3, 2);
  }
  offered.push(2, 0);
  for (const [i, head] of offered.entries()) avail[2 + i % 16] = head;
  for (const [i, head] of returned.entries()) used[1 + 2 * (i % 16)] = head;
  avail[1] = offered.length;
  new Uint16Array(used.buffer, used.byteOffset)[1] = returned.length;
  const snapshot = snapshotRing({ ...place, layout: "split", eventIdx: false, indirect: false, inOrder: false });
  const { chains, count } = outstandingChains(new RingView(snapshot));
  assert.equal(count, 3);
  assert.deepEqual(chains.map(({ head }) => head), [2, 0]);
  assert.deepEqual(verifyRing(snapshot), []);
});

Deno.test("A ring that moves while it is copied is copied again, and is called torn when it never rests", () => {
  const image = new Image("split");
  let moves = 4;
  // Tables are read behind the rings: that is when this ring moves, to and fro.
  const source = () => ({
    ...image.shape,
    ...image.place,
    layout: "split" as const,
    tableMemory: {
      contains: () => true,
      buffer: (address: number, length: number) => {
        if (moves-- > 0) image.word("avail", 1, 3 + moves % 2);
        return image.memory.buffer(address, length);
      },
    },
  });
  const rested = snapshotRing(source());
  assert.deepEqual([rested.consistent, rested.attempts], [true, 5]);
  moves = 1000;
  const torn = snapshotRing(source(), 5);
  assert.deepEqual([torn.consistent, torn.attempts], [false, 5]);
  image.word("avail", 0, 2);
  assert.deepEqual(verifyRing({ ...torn, avail: snapshotRing(source(), 1).avail }).map(({ rule }) => rule), ["SUPPRESSION_FLAGS"]);
});

Deno.test("A packed ring whose descriptors change during the copy is torn", () => {
  const image = new Image("packed");
  let next = 0;
  const snapshot = snapshotRing({
    ...image.shape,
    ...image.place,
    layout: "packed",
    tableMemory: {
      contains: () => true,
      buffer: (address, length) => {
        image.slot(7, BUFFER, ++next, 0, 0);
        return image.memory.buffer(address, length);
      },
    },
  }, 3);
  assert.equal(snapshot.consistent, false);
});

Deno.test("Positions of counters that trail behind the ring are not believed", () => {
  const image = new Image("split");
  image.used = 0;
  assert.deepEqual(image.snapshot().positions, { lastAvail: null, used: null, lastUsed: null });
  image.used = 1;
  assert.equal(image.snapshot().positions.lastAvail, 1);
});

Deno.test("A snapshot writes nothing", () => {
  for (const layout of ["split", "packed"] as const) {
    const image = new Image(layout);
    const before = image.memory.bytes.slice();
    dumpRing(image.snapshot(), { all: true });
    assert.deepEqual(image.memory.bytes, before);
    assert.equal(packedLayout(NUM).avail.size, 4);
  }
});

Deno.test("A diff tells what was made available, what came back and what stayed", () => {
  const image = new Image("split");
  const queue = (): ImageQueue => ({ index: 2, side: "guest", mode: "shadow", ring: image.snapshot(), seen: [] });
  const at = (queues: ImageQueue[]) => ({ created: "2026-01-01T00:00:00Z", queues });
  const before = queue();
  image.avail(6, 0, 4, 6);
  image.done([6, 16], [0, 512]);
  image.lastAvail = 3;
  image.lastUsed = 1;
  const [diff] = diffImages(at([before]), at([queue()]));
  assert.deepEqual([diff!.avail_moved, diff!.used_moved, diff!.identical], [1, 1, false]);
  assert.deepEqual(diff!.returned, [{ head: 0, position: 1 }]);
  assert.deepEqual(diff!.added, [{ head: 6, position: 3 }]);
  assert.deepEqual(diff!.stayed, [{ head: 4, position: 2 }]);
  assert.deepEqual(diff!.changes, [{ field: "last_avail_idx", from: 1, to: 3 }]);
  assert.deepEqual(diffImages(at([before]), at([before])).map(({ identical }) => identical), [true]);
  assert.equal(diffImages(at([]), at([before]))[0]!.only_in, "b");
});

Deno.test("What is no image is refused with the place", () => {
  const image = encodeImage({
    created: "2026-01-01T00:00:00Z",
    queues: [{ index: 0, side: "guest", mode: "shadow", ring: new Image("split").snapshot(), seen: [] }],
  });
  const copy = () => JSON.parse(JSON.stringify(image));
  // deno-lint-ignore no-explicit-any -- the point is to put in what does not belong
  const cases: [RegExp, (image: any) => unknown][] = [
    [/\$ is no object/, () => []],
    [/\$\.schema is missing/, () => ({})],
    [/\$\.schema is "svq\.vring-image\/2"/, (i) => ({ ...i, schema: "svq.vring-image/2" })],
    [/\$\.queues\[0\]\.side is not one of/, (i) => (i.queues[0].side = "both", i)],
    [/\$\.queues\[0\]\.ring\.desc is no base64/, (i) => (i.queues[0].ring.desc = "!", i)],
    [/\$\.queues\[0\]\.ring\.num is no integer/, (i) => (i.queues[0].ring.num = -1, i)],
    [/\$\.queues\[0\]\.ring\.positions\.used is no integer/, (i) => (i.queues[0].ring.positions.used = 65536, i)],
    [/\$\.queues\[0\]\.ring\.tables\[0\]\.address is no address/, (i) => (i.queues[0].ring.tables[0].address = "5", i)],
    [/\$\.queues\[0\] has neither/, (i) => (delete i.queues[0].ring, i)],
  ];
  for (const [message, change] of cases) assert.throws(() => decodeImage(change(copy()), "x.json"), { code: "BAD_IMAGE", message });
});
