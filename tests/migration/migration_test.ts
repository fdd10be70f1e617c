import assert from "node:assert/strict";
import type { DirtyBitmap } from "../../src/dirty/bitmap.ts";
import type { DriverReport } from "../../src/drivers/report.ts";
import { connectUnix } from "../../src/ffi/mod.ts";
import { isClean } from "../../src/migration/document.ts";
import type { Guest } from "../../src/migration/guest.ts";
import { reportOf } from "../../src/migration/handshake.ts";
import { FRAME } from "../../src/migration/protocol.ts";
import type { Phase } from "../../src/migration/source.ts";
import { FrameProxy, Hosts, migrationTo, progress } from "../support/migration.ts";

function assertClean(report: DriverReport): void {
  assert.ok(isClean(reportOf(report)), JSON.stringify(reportOf(report)));
}

/** The guest works on; then it is stopped, and every request is accounted for. */
async function assertLives(guest: Guest): Promise<void> {
  await progress(guest);
  assertClean(await guest.driver.stop(10_000));
}

Deno.test("A guest under load moves to another device; memory is identical and no request is lost, duplicated or corrupted", async () => {
  await using hosts = new Hosts({ device: { jitterUs: 300 } });
  const guest = await hosts.guest();
  const { destination, path } = hosts.destination();
  const { source, migration } = migrationTo(path, guest);
  using _source = source;
  using _migration = migration;
  const result = await migration.run();
  assert.equal(result.error, null);
  assert.equal(result.outcome, "completed");
  assert.equal(result.memoryIdentical, true);
  const [first, ...rest] = result.rounds;
  assert.equal(first!.pages, 2048, "the first round has all of the 8 MiB");
  assert.ok(rest.length >= 1 && rest.some((round) => round.pages > 0), "under load pages get dirty again");
  const { total, stop, last_round, state, verify, resume } = result.downtimeUs!;
  assert.ok(stop >= 0 && last_round > 0 && state >= 0 && verify > 0 && resume > 0);
  assert.ok(Math.abs(total - (stop + last_round + state + verify + resume)) < 10, "the parts add up to the downtime");
  await guest.close();
  await assertLives(hosts.own(await destination.arrived()));
});

for (const packed of [false, true]) {
  Deno.test(`A guest with ${packed ? "packed" : "split"} rings moves from A to B and back to A, twice`, () => thereAndBack(packed));
}

async function thereAndBack(packed: boolean): Promise<void> {
  await using hosts = new Hosts({ queues: 2, packed, device: { jitterUs: 300 } });
  let guest = await hosts.guest();
  for (let move = 0; move < 4; move++) {
    const { destination, path } = hosts.destination();
    const { source, migration } = migrationTo(path, guest);
    const result = await migration.run();
    assert.equal(result.outcome, "completed", `move ${move}: ${result.error?.message}`);
    assert.equal(result.memoryIdentical, true);
    source[Symbol.dispose]();
    migration.close();
    await guest.close();
    guest = hosts.own(await destination.arrived());
    await progress(guest);
  }
  await assertLives(guest);
}

const CANCELLABLE: Phase[] = ["connect", "offer", "log", "rounds", "stop", "last_round", "state"];

Deno.test("Cancelled in any phase before the hand-over, the guest goes on at the source and can be migrated afterwards", async () => {
  await using hosts = new Hosts();
  const guest = await hosts.guest();
  const { destination, path } = hosts.destination();
  for (const phase of CANCELLABLE) {
    const { source, migration } = migrationTo(path, guest, {
      onEvent: (event) => {
        if (event.kind === "phase" && event.phase === phase) assert.ok(migration.cancel());
      },
    });
    const result = await migration.run();
    assert.equal(result.outcome, "cancelled", phase);
    assert.equal(result.error!.exit_code, 7);
    source[Symbol.dispose]();
    migration.close();
    await progress(guest);
  }
  const { source, migration } = migrationTo(path, guest);
  const result = await migration.run();
  assert.equal(result.outcome, "completed", result.error?.message);
  assert.equal(migration.cancel(), false, "after the hand-over it is too late");
  source[Symbol.dispose]();
  migration.close();
  await guest.close();
  await assertLives(hosts.own(await destination.arrived()));
});

Deno.test("A dirty log that loses bits is noticed: memory is not identical, and the source keeps the guest", async () => {
  await using hosts = new Hosts();
  const guest = await hosts.guest();
  const { path } = hosts.destination();
  const { source, migration } = migrationTo(path, guest);
  using _source = source;
  using _migration = migration;
  source.filter = (harvested: DirtyBitmap) => harvested.clear();
  const result = await migration.run();
  assert.equal(result.outcome, "aborted");
  assert.equal(result.memoryIdentical, false);
  assert.equal(result.error!.code, "MEMORY_DIFFERS");
  assert.equal(result.error!.exit_code, 7);
  await assertLives(guest);
});

Deno.test("A migration that does not converge stops the guest nevertheless, or gives up, as told", async () => {
  await using hosts = new Hosts();
  const guest = await hosts.guest();
  const { destination, path } = hosts.destination();
  const { source, migration } = migrationTo(path, guest, { downtimeLimitMs: 0, maxIterations: 2, onNoConvergence: "abort" });
  using _source = source;
  using _migration = migration;
  const result = await migration.run();
  assert.equal(result.error?.code, "NO_CONVERGENCE");
  assert.equal(result.rounds.length, 2);
  await progress(guest);
  const stopped = migrationTo(path, guest, { downtimeLimitMs: 0, maxIterations: 2, onNoConvergence: "stop" });
  const { outcome, rounds } = await stopped.migration.run();
  assert.deepEqual([outcome, rounds.length], ["completed", 3], "two rounds, and the last one");
  stopped.source[Symbol.dispose]();
  stopped.migration.close();
  await guest.close();
  await assertLives(hosts.own(await destination.arrived()));
});

Deno.test("A guest that writes faster than the link is slowed down until it converges; given up, it runs at full speed again", async () => {
  await using hosts = new Hosts({ depth: 16 });
  const guest = await hosts.guest();
  const { destination, path } = hosts.destination();
  // What the guest writes in a second is many times what the link carries.
  const limits = { maxBandwidth: 32 << 20, downtimeLimitMs: 20, maxIterations: 40 };
  const unslowed = migrationTo(path, guest, { ...limits, maxIterations: 5, onNoConvergence: "abort" });
  const stuck = await unslowed.migration.run();
  assert.deepEqual([stuck.error?.code, stuck.throttlePercent], ["NO_CONVERGENCE", 0]);
  unslowed.source[Symbol.dispose]();
  unslowed.migration.close();
  const givenUp = migrationTo(path, guest, { ...limits, downtimeLimitMs: 0, maxIterations: 5, onNoConvergence: "throttle" });
  const before = await givenUp.migration.run();
  assert.equal(before.error?.code, "NO_CONVERGENCE");
  assert.ok(before.throttlePercent >= 20, `${before.throttlePercent} %`);
  givenUp.source[Symbol.dispose]();
  givenUp.migration.close();
  await progress(guest);
  const steps: number[] = [];
  const slowed = migrationTo(path, guest, {
    ...limits,
    onNoConvergence: "throttle",
    onEvent: (event) => event.kind === "round" && steps.push(event.throttlePercent),
  });
  using _source = slowed.source;
  using _migration = slowed.migration;
  const result = await slowed.migration.run();
  assert.equal(result.outcome, "completed", result.error?.message);
  assert.ok(result.throttlePercent >= 20 && result.rounds.length < 40, `${result.throttlePercent} %, ${result.rounds.length} rounds`);
  assert.deepEqual(steps, steps.toSorted((a, b) => a - b), "it is never let go faster in between");
  await guest.close();
  await assertLives(hosts.own(await destination.arrived()));
});

Deno.test("A device that does not give its rings back in time keeps the guest: it goes on when the device answers", async () => {
  await using hosts = new Hosts({ device: { latencyUs: 500_000 }, depth: 2 });
  const guest = await hosts.guestWithoutProgress();
  const { path } = hosts.destination();
  const { source, migration } = migrationTo(path, guest, { drainTimeoutMs: 20 });
  using _source = source;
  using _migration = migration;
  const result = await migration.run();
  assert.equal(result.error?.code, "DRAIN_TIMEOUT");
  assert.ok(["rounds", "stop"].includes(result.phase), "it may already be late when the dirty log is turned on");
  await source.settled();
  await progress(guest, 3);
  assertClean(await guest.driver.stop(10_000));
});

Deno.test("Bandwidth is limited while the guest runs", async () => {
  await using hosts = new Hosts();
  const guest = await hosts.guest();
  const { path } = hosts.destination();
  const { source, migration } = migrationTo(path, guest, { maxBandwidth: 8 << 20, maxIterations: 1 });
  using _source = source;
  using _migration = migration;
  const result = await migration.run();
  assert.equal(result.outcome, "completed", result.error?.message);
  const { bytes, ms } = result.rounds[0]!;
  assert.ok(bytes / ms * 1000 < 1.5 * (8 << 20), `${bytes} bytes in ${ms} ms`);
});

Deno.test("A dry run asks and moves nothing; a destination that cannot take the guest says why", async () => {
  await using hosts = new Hosts();
  const guest = await hosts.guest();
  const { path } = hosts.destination();
  const asked = migrationTo(path, guest, { dryRun: true });
  const { outcome, estimate, bytes } = await asked.migration.run();
  assert.equal(outcome, "possible");
  assert.ok(estimate!.dirtyBytesPerS > 0 && estimate!.rounds >= 1 && estimate!.downtimeMs > 0);
  assert.ok(bytes < 4096, "no page was sent");
  asked.migration.close();
  await using small = new Hosts({ destination: { maxMemory: 1 << 20 } });
  const refused = migrationTo(small.destination().path, guest, { dryRun: true });
  const result = await refused.migration.run();
  assert.deepEqual([result.outcome, result.phase, result.error?.code], ["aborted", "offer", "NO_MEMORY"]);
  refused.migration.close();
  await using other = new Hosts({ device: { size: 1 << 20 } });
  const differs = migrationTo(other.destination().path, guest);
  assert.equal((await differs.migration.run()).error?.code, "DISK_DIFFERS");
  differs.migration.close();
  await assertLives(guest);
});

Deno.test("A destination that has a guest refuses another one", async () => {
  await using hosts = new Hosts();
  const [one, two] = [await hosts.guest(), await hosts.guest()];
  const { destination, path } = hosts.destination();
  const first = migrationTo(path, one);
  assert.equal((await first.migration.run()).outcome, "completed");
  first.migration.close();
  hosts.own(await destination.arrived());
  const second = migrationTo(path, two);
  const { error } = await second.migration.run();
  assert.equal(error?.code, "DESTINATION_BUSY");
  assert.match(error.hint!, /takes one guest/);
  second.migration.close();
});

Deno.test("A destination that is still letting go of a guest that was cancelled takes the next one as soon as it can", async () => {
  await using hosts = new Hosts();
  const guest = await hosts.guest();
  const letGo = Promise.withResolvers<void>();
  let devices = 0;
  const { destination, path } = hosts.destinationWith((device) => {
    if (devices++ > 0) return;
    const close = device.close.bind(device);
    device.close = async () => {
      await letGo.promise;
      await close();
    };
  });
  const first = migrationTo(path, guest, { onEvent: ({ kind }) => kind === "round" ? void first.migration.cancel() : undefined });
  assert.equal((await first.migration.run()).outcome, "cancelled");
  first.migration.close();
  await using proxy = new FrameProxy(hosts.dir.join("proxy"), path, (_from, type) => {
    // When the second one's offer has been there for a while.
    if (type === FRAME.OFFER) setTimeout(letGo.resolve, 100);
    return undefined;
  });
  const second = migrationTo(proxy.path, guest);
  const result = await second.migration.run();
  assert.equal(result.outcome, "completed", result.error?.message);
  second.migration.close();
  const there = hosts.own(await destination.arrived());
  await guest.close();
  await assertLives(there);
});

Deno.test("Nobody listening is exit code 3 underneath, and the guest goes on", async () => {
  await using hosts = new Hosts();
  const guest = await hosts.guest();
  const { migration } = migrationTo(hosts.dir.join("nobody"), guest);
  const result = await migration.run();
  assert.equal(result.outcome, "aborted");
  assert.equal(result.error?.code, "ENOENT");
  await assertLives(guest);
});

Deno.test("A proxy that passes everything changes nothing", async () => {
  await using hosts = new Hosts();
  const guest = await hosts.guest();
  const { path } = hosts.destination();
  const proxy = hosts.own(new FrameProxy(hosts.dir.join("proxy"), path, () => undefined));
  const { migration } = migrationTo(proxy.path, guest, { connect: () => Promise.resolve(connectUnix(proxy.path)) });
  const result = await migration.run();
  assert.equal(result.outcome, "completed", result.error?.message);
  migration.close();
});
