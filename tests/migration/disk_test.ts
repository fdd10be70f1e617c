import assert from "node:assert/strict";
import fc from "fast-check";
import { Random } from "../../src/drivers/random.ts";
import { hasStamp, isZero } from "../../src/drivers/stamp.ts";
import type { DriverState } from "../../src/drivers/state.ts";
import { isClean } from "../../src/migration/document.ts";
import { reportOf } from "../../src/migration/handshake.ts";
import { FRAME, frameName, type FrameType } from "../../src/migration/protocol.ts";
import type { MigrationEvent } from "../../src/migration/source.ts";
import { VIRTIO_BLK_T } from "../../src/uapi/virtio_blk.ts";
import { assertMoves, type Fault, FrameProxy, Hosts, type HostsOptions, migrationTo, progress } from "../support/migration.ts";

const SIZE = 6 << 20;
/** In place of a number: in the last round of the disk. */
const FROZEN = -1;
const SOAK = Deno.env.get("SVQ_SOAK") === "1";

/** Every destination has a disk of its own. */
function apart(more: HostsOptions = {}, there: { size?: number } = {}): HostsOptions {
  return {
    ...more,
    device: { size: SIZE, jitterUs: 200, ...more.device },
    openDestination: (hosts) => hosts.openDevice({ file: hosts.dir.join("there"), ...there }),
  };
}

/** Source's and destination's disk before: each with something of its own on it. */
async function fillDisks(hosts: Hosts, size: number, seed: number): Promise<void> {
  const random = new Random(seed);
  const here = new Uint8Array(size);
  for (let at = 0; at < size; at += 65536) {
    // Runs of data and of zeros, of odd lengths.
    const length = random.below(3) === 0 ? 0 : random.below(Math.min(65536, size - at));
    crypto.getRandomValues(here.subarray(at, at + length));
  }
  await Deno.writeFile(hosts.dir.join("disk"), here);
  await Deno.writeFile(hosts.dir.join("there"), new Uint8Array(size).fill(0xee));
}

/** Sectors of writes that were out when the guest left, with what they write (0: zeros): one of the two devices has done them. */
function writesOut(state: DriverState): Map<number, number> {
  const sectors = new Map<number, number>();
  for (const [type = 0, sector = 0, count = 0, _pieces, sequence = 0] of state.worker.workload.slots.filter((slot) => slot !== null)) {
    if (type !== VIRTIO_BLK_T.OUT && type !== VIRTIO_BLK_T.WRITE_ZEROES) continue;
    for (let i = 0; i < count; i++) sectors.set(sector + i, type === VIRTIO_BLK_T.OUT ? sequence : 0);
  }
  return sectors;
}

function holds(image: Uint8Array, sector: number, sequence: number): boolean {
  const words = new Int32Array(image.buffer, image.byteOffset + sector * 512, 128);
  return sequence === 0 ? isZero(words, 0, 128) : hasStamp(words, 0, 128, sector, sequence, 1);
}

function words(bytes: Uint8Array, from: number): BigInt64Array {
  return new BigInt64Array(bytes.buffer, bytes.byteOffset + from, 64);
}

function differing(a: Uint8Array, b: Uint8Array): number[] {
  assert.equal(a.length, b.length);
  const sectors: number[] = [];
  for (let sector = 0; sector * 512 < a.length; sector++) {
    const from = sector * 512;
    if (words(a, from).some((word, i) => word !== words(b, from)[i])) sectors.push(sector);
  }
  return sectors;
}

Deno.test("Whatever the guest writes while its disk is copied, both images are equal afterwards, but for requests that were out", async () => {
  const shape = fc.record({
    packed: fc.boolean(),
    queues: fc.integer({ min: 1, max: 2 }),
    num: fc.constantFrom(16, 64, 256),
    depth: fc.integer({ min: 1, max: 24 }),
    tail: fc.integer({ min: 0, max: 7 }),
    seed: fc.nat(),
    jitterUs: fc.constantFrom(0, 500, 3000),
    maxIterations: fc.integer({ min: 1, max: 4 }),
  });
  await fc.assert(
    fc.asyncProperty(shape, async ({ tail, jitterUs, seed, maxIterations, ...guestOf }) => {
      const size = (2 << 20) + tail * 512;
      await using hosts = new Hosts(apart({ ...guestOf, device: { size, jitterUs } }));
      await fillDisks(hosts, size, seed);
      const guest = await hosts.guest();
      const { destination, path } = hosts.destination();
      const { source, migration } = migrationTo(path, guest, {
        copyDisk: "yes",
        maxIterations,
        run: () => ({ durationMs: 0, drainMs: 10_000 }),
      });
      using _source = source;
      using _migration = migration;
      const { outcome, error } = await migration.run();
      assert.equal(outcome, "completed", error?.message);
      const out = writesOut(await guest.driver.exportState());
      const there = hosts.own(await destination.arrived());
      const report = reportOf(await there.driver.finished());
      assert.ok(isClean(report), JSON.stringify(report));
      const [a, b] = await Promise.all(["disk", "there"].map((name) => Deno.readFile(hosts.dir.join(name))));
      assert.deepEqual(differing(a!, b!).filter((sector) => !out.has(sector)), []);
      assert.deepEqual([...out].filter(([sector, sequence]) => !holds(b!, sector, sequence)), []);
    }),
    { numRuns: SOAK ? 100 : 4, seed: 6, endOnFailure: true },
  );
});

Deno.test("A disk that the destination does not share is copied while the guest writes to it, and every sector is right there", async () => {
  await using hosts = new Hosts(apart());
  const { disk, downtimeUs } = await assertMoves(hosts, hosts.destination(), { copyDisk: "auto" });
  assert.equal(disk!.shared, false);
  assert.equal(disk!.rounds[0]!.pages, SIZE / 4096, "the first round has all of it");
  assert.ok(disk!.rounds.length >= 2 && disk!.rounds.slice(1).some(({ pages }) => pages > 0), "what is written meanwhile comes again");
  assert.ok(disk!.rounds[0]!.bytes < SIZE / 2 + (1 << 20), "of a disk of zeros only what was written travels");
  assert.ok(downtimeUs!.disk > 0);
});

Deno.test("A disk that both share is found out, and not copied onto itself, not even when told to", async () => {
  await using hosts = new Hosts({ device: { size: SIZE } });
  const guest = await hosts.guest();
  const { destination, path } = hosts.destination();
  const told = migrationTo(path, guest, { copyDisk: "yes" });
  assert.equal((await told.migration.run()).error?.code, "DISK_SHARED");
  told.source[Symbol.dispose]();
  await progress(guest);
  const { source, migration } = migrationTo(path, guest, { copyDisk: "auto" });
  using _source = source;
  using _migration = migration;
  const { outcome, disk, error } = await migration.run();
  assert.deepEqual([outcome, disk], ["completed", { shared: true, sizeBytes: SIZE, rounds: [] }], error?.message);
  await guest.close();
  const there = hosts.own(await destination.arrived());
  await progress(there);
  assert.ok(isClean(reportOf(await there.driver.stop(10_000))), "what was asked of the disk was written back");
});

Deno.test("A dry run says whether the disk would be copied, and changes no sector on either side", async () => {
  await using hosts = new Hosts(apart());
  const guest = await hosts.guest();
  await Deno.writeFile(hosts.dir.join("there"), new Uint8Array(SIZE).fill(7));
  const { path } = hosts.destination();
  const { migration } = migrationTo(path, guest, { copyDisk: "auto", dryRun: true, maxBandwidth: 1 << 20 });
  const { outcome, disk, estimate } = await migration.run();
  migration.close();
  assert.deepEqual([outcome, disk?.shared, disk?.rounds], ["possible", false, []]);
  assert.ok(estimate!.rounds >= 1);
  assert.ok((await Deno.readFile(hosts.dir.join("there"))).every((byte) => byte === 7));
  await progress(guest);
  assert.ok(isClean(reportOf(await guest.driver.stop(10_000))));
});

Deno.test("A destination that keeps its disk, has a smaller one, or none, is told apart, and the guest goes on at the source", async () => {
  const cases: [HostsOptions, string][] = [
    [{ ...apart(), destination: { copyDisk: false } }, "DISK_REFUSED"],
    [apart({}, { size: SIZE - 512 }), "DISK_DIFFERS"],
  ];
  for (const [options, code] of cases) {
    await using hosts = new Hosts(options);
    const { source, migration } = migrationTo(hosts.destination().path, await hosts.guest(), { copyDisk: "yes" });
    using _source = source;
    using _migration = migration;
    const result = await migration.run();
    assert.deepEqual([result.outcome, result.error?.code, result.error?.exit_code], ["aborted", code, 7]);
  }
});

const STEPS: ["source" | "destination", FrameType, number][] = [
  ["source", FRAME.DISK_READ, 1],
  ["destination", FRAME.DISK_DATA, 1],
  ["source", FRAME.DISK, 1],
  ["source", FRAME.ROUND, 1],
  ["source", FRAME.BLOCKS, 3],
  ["source", FRAME.ZERO_BLOCKS, 1],
  ["source", FRAME.ROUND_END, 1],
  ["destination", FRAME.ROUND_ACK, 1],
  ["source", FRAME.ROUND, FROZEN],
  ["destination", FRAME.ROUND_ACK, FROZEN],
  ["source", FRAME.STATE, 1],
  ["destination", FRAME.PREPARED, 1],
  ["source", FRAME.COMMIT, 1],
];

for (const fault of ["cut", "flip", "stall"] as const) {
  // Silence takes its time to be noticed.
  const few: FrameType[] = fault === "cut" ? [FRAME.DISK_READ, FRAME.BLOCKS, FRAME.ROUND_ACK] : [FRAME.DISK_DATA, FRAME.BLOCKS];
  const steps = SOAK ? STEPS : STEPS.filter(([, type]) => few.includes(type));
  Deno.test(`With a disk that travels, ${fault === "cut" ? "the link cut" : fault === "flip" ? "a damaged frame" : "silence"} at any step leaves the guest at the source, unharmed`, async (test) => {
    for (const [side, type, nth] of steps) {
      await test.step(`${frameName(type)} of the ${side}${nth === FROZEN ? " in the last round of the disk" : ""}`, () =>
        strike(fault, side, type, nth));
    }
  });
}

async function strike(fault: Fault, side: string, type: FrameType, nth: number): Promise<void> {
  await using hosts = new Hosts(apart());
  const guest = await hosts.guest();
  const { destination, path } = hosts.destination();
  let count = 0;
  let frozen = false;
  const rule = (from: string, kind: number, payload: Uint8Array): Fault | undefined => {
    // Flags of the mark: the last round of the disk.
    if (kind === FRAME.ROUND) frozen = payload[4] === 3;
    if (from !== side || kind !== type) return undefined;
    count++;
    return (nth === FROZEN ? frozen : count === nth) ? fault : undefined;
  };
  const proxy = hosts.own(new FrameProxy(hosts.dir.join("p"), path, rule));
  const { source, migration } = migrationTo(proxy.path, guest, { copyDisk: "auto", timeoutMs: fault === "stall" ? 2500 : 10_000 });
  using _source = source;
  using _migration = migration;
  const { outcome, error } = await migration.run();
  assert.ok(proxy.fired, "the fault happened");
  assert.equal(outcome, "aborted", error?.message);
  let arrived = false;
  destination.arrived().then(() => arrived = true, () => {});
  await progress(guest);
  assert.ok(isClean(reportOf(await guest.driver.stop(10_000))));
  assert.equal(arrived, false, "the destination does not run");
}

Deno.test("Cancelled at any moment of the copy the guest goes on at the source, and the next migration copies its disk", async () => {
  await using hosts = new Hosts(apart());
  const guest = await hosts.guest();
  const { destination, path } = hosts.destination();
  const moments: ((event: MigrationEvent) => boolean)[] = [
    (event) => event.kind === "phase" && event.phase === "disk",
    (event) => event.kind === "pages" && event.disk && event.done > 200,
    (event) => event.kind === "round",
    (event) => event.kind === "phase" && event.phase === "last_round",
  ];
  for (const moment of moments) {
    const { source, migration } = migrationTo(path, guest, {
      copyDisk: "auto",
      onEvent: (event) => void (moment(event) && migration.cancel()),
    });
    assert.equal((await migration.run()).outcome, "cancelled");
    source[Symbol.dispose]();
    migration.close();
    await progress(guest);
  }
  const { source, migration } = migrationTo(path, guest, { copyDisk: "auto" });
  using _source = source;
  using _migration = migration;
  const { outcome, disk, error } = await migration.run();
  assert.deepEqual([outcome, disk?.shared], ["completed", false], error?.message);
  await guest.close();
  const there = hosts.own(await destination.arrived());
  await progress(there);
  assert.ok(isClean(reportOf(await there.driver.stop(10_000))));
});
