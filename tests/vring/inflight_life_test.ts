import assert from "node:assert/strict";
import { inflightPartSize, PackedInflight, recoverPacked, recoverSplit, SplitInflight } from "../../src/vring/inflight.ts";
import { isOfPackedRing, isOfSplitRing } from "../../src/vring/inflight_life.ts";
import { Chain } from "../../src/vring/queue.ts";

const NUM = 8;
const FIRST_LAP = 1 << 7;

function chain(id: number, address = 0x1000 * (id + 1)): Chain {
  const made = new Chain(4);
  made.id = id;
  made.slots = made.count = 1;
  made.readableCount = 1;
  made.addresses[0] = address;
  made.lengths[0] = 512;
  made.indirectAddress = -1;
  return made;
}

/** A ring in which `offered` heads were made available and the first `returned` of them came back. */
function splitRing(offered: number[], returned: number) {
  const avail = new Uint16Array(2 + NUM);
  const used = new Uint32Array(1 + 2 * NUM);
  offered.forEach((head, at) => {
    avail[2 + at % NUM] = head;
    if (at < returned) used[1 + 2 * (at % NUM)] = head;
  });
  avail[1] = offered.length;
  used[0] = (returned & 0xffff) << 16;
  return { avail, used };
}

function splitRecord(taken: number[], givenBack: number) {
  const part = { buffer: new ArrayBuffer(inflightPartSize(NUM, false)) };
  const log = new SplitInflight(part, NUM, { ids: [], used: 0 });
  taken.forEach((head, at) => {
    log.take(chain(head));
    if (at >= givenBack) return;
    log.give(head);
    log.flushed();
  });
  return part;
}

for (
  const { name, taken, givenBack, ring, ours } of [
    { name: "of the ring as it is", taken: [0, 1, 2, 3], givenBack: 2, ring: splitRing([0, 1, 2, 3], 2), ours: true },
    { name: "from before a reset, with nothing offered since", taken: [0, 1, 2, 3], givenBack: 2, ring: splitRing([], 0), ours: false },
    {
      name: "from before a reset, with requests since",
      taken: [0, 1, 2, 3],
      givenBack: 2,
      ring: splitRing([0, 1, 2, 3, 4, 5], 0),
      ours: false,
    },
    { name: "of a ring of which nothing came back yet", taken: [0, 1, 2], givenBack: 0, ring: splitRing([0, 1, 2, 3], 0), ours: true },
    { name: "of a first life that ended before anything came back", taken: [0, 1, 2], givenBack: 0, ring: splitRing([], 0), ours: false },
    { name: "of such a life, with other requests since", taken: [0, 1, 2], givenBack: 0, ring: splitRing([5, 6, 7], 0), ours: false },
  ]
) {
  Deno.test(`a split queue's record is told from one of an earlier life of the device: ${name}`, () => {
    const part = splitRecord(taken, givenBack);
    const chains = recoverSplit(part, NUM, ring.used[0]! >>> 16);
    assert.equal(isOfSplitRing(part, NUM, chains, ring), ours);
  });
}

/** Descriptors of the first lap: addresses, of which the first `returned` were used. */
function packedRing(addresses: number[], returned: number): Uint16Array {
  const desc = new Uint16Array(8 * NUM);
  addresses.forEach((address, slot) => {
    desc[8 * slot] = address;
    desc[8 * slot + 4] = 512;
    desc[8 * slot + 6] = slot;
    desc[8 * slot + 7] = slot < returned ? FIRST_LAP | 1 << 15 : FIRST_LAP;
  });
  return desc;
}

function packedRecord(addresses: number[], givenBack: number) {
  const part = { buffer: new ArrayBuffer(inflightPartSize(NUM, true)) };
  const log = new PackedInflight(part, NUM, { ids: [], used: 1 << 15, entries: [] });
  addresses.forEach((address, id) => log.take(chain(id, address)));
  for (let id = 0; id < givenBack; id++) {
    log.give(id);
    log.flushed();
  }
  return part;
}

for (
  const { name, taken, givenBack, ring, ours } of [
    {
      name: "of the ring as it is",
      taken: [0x1000, 0x2000, 0x3000],
      givenBack: 1,
      ring: packedRing([0x1000, 0x2000, 0x3000], 1),
      ours: true,
    },
    {
      name: "from before a reset, with nothing offered since",
      taken: [0x1000, 0x2000],
      givenBack: 1,
      ring: packedRing([], 0),
      ours: false,
    },
    {
      name: "from before a reset, with requests since",
      taken: [0x1000, 0x2000],
      givenBack: 1,
      ring: packedRing([0x1000, 0x2000, 0x3000], 0),
      ours: false,
    },
    { name: "of a ring of which nothing came back yet", taken: [0x1000], givenBack: 0, ring: packedRing([0x1000, 0x2000], 0), ours: true },
    { name: "of a first life, with other requests since", taken: [0x1000], givenBack: 0, ring: packedRing([0x5000], 0), ours: false },
  ]
) {
  Deno.test(`a packed queue's record is told from one of an earlier life of the device: ${name}`, () => {
    const part = packedRecord(taken, givenBack);
    const chains = recoverPacked(part, NUM, (slot) => ring[8 * slot + 7]!);
    assert.equal(isOfPackedRing(NUM, chains, ring), ours);
  });
}
