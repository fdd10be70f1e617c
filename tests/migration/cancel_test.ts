/**
 * Cancelled at each numbered step of src/migration/protocol.ts, not only where chance leads: the moments of the hand-over are short.
 *
 * @module
 */
import assert from "node:assert/strict";
import { isClean } from "../../src/migration/document.ts";
import type { Guest } from "../../src/migration/guest.ts";
import { reportOf } from "../../src/migration/handshake.ts";
import { FRAME, frameName, type FrameType } from "../../src/migration/protocol.ts";
import type { SourceOptions } from "../../src/migration/source_types.ts";
import { FrameProxy, Hosts, migrationTo, progress } from "../support/migration.ts";
import { waitUntil } from "../support/wait.ts";

type Side = "source" | "destination";

// Every frame, in order, with who sends it. What is cancelled when COMMIT has been sent is too late.
const STEPS: [Side, FrameType, "cancelled" | "completed"][] = [
  ["source", FRAME.HELLO, "cancelled"],
  ["destination", FRAME.HELLO, "cancelled"],
  ["source", FRAME.OFFER, "cancelled"],
  ["destination", FRAME.ACCEPT, "cancelled"],
  ["source", FRAME.ROUND, "cancelled"],
  ["source", FRAME.PAGES, "cancelled"],
  ["source", FRAME.ZERO, "cancelled"],
  ["source", FRAME.ROUND_END, "cancelled"],
  ["destination", FRAME.ROUND_ACK, "cancelled"],
  ["source", FRAME.STATE, "cancelled"],
  ["destination", FRAME.PREPARED, "cancelled"],
  ["source", FRAME.COMMIT, "completed"],
  ["destination", FRAME.RUNNING, "completed"],
];

async function assertRuns(guest: Guest): Promise<void> {
  await progress(guest, 10);
  assert.ok(isClean(reportOf(await guest.driver.stop(10_000))));
}

/** A migration through a proxy that cancels it when `type` of `side` is on its way, and what came of it. */
async function cancelAt(
  hosts: Hosts,
  guest: Guest,
  path: string,
  [side, type, wanted]: typeof STEPS[number],
  options: Partial<SourceOptions> = {},
): Promise<void> {
  let taken: boolean | undefined;
  await using proxy = new FrameProxy(hosts.dir.join("p"), path, (from, kind) => {
    if (from === side && kind === type) taken ??= migration.cancel();
    return undefined;
  });
  const { source, migration } = migrationTo(proxy.path, guest, options);
  using _source = source;
  using _migration = migration;
  const result = await migration.run();
  assert.deepEqual([taken, result.outcome], [wanted === "cancelled", wanted], result.error?.message);
  assert.equal(result.error?.exit_code, wanted === "cancelled" ? 7 : undefined);
}

Deno.test("Cancelled when any frame before COMMIT is on its way, the guest goes on here and nowhere else", async (test) => {
  await using hosts = new Hosts();
  const guest = await hosts.guest();
  for (const step of STEPS.filter(([, , wanted]) => wanted === "cancelled")) {
    await test.step(`${frameName(step[1])} of the ${step[0]}`, async () => {
      // One of its own: the last one may still be letting go of what it had opened.
      const { destination, path } = hosts.destination();
      let arrived = false;
      destination.arrived().then(() => arrived = true, () => {});
      await cancelAt(hosts, guest, path, step);
      await progress(guest, 10);
      assert.equal(arrived, false, "the destination does not run");
    });
  }
  await assertRuns(guest);
});

for (const step of STEPS.filter(([, , wanted]) => wanted === "completed")) {
  Deno.test(`Cancelled when ${frameName(step[1])} is on its way it is too late: the guest runs there and nowhere else`, async () => {
    await using hosts = new Hosts();
    const guest = await hosts.guest();
    const { destination, path } = hosts.destination();
    await cancelAt(hosts, guest, path, step);
    const { completed } = await guest.driver.report();
    await assertRuns(hosts.own(await destination.arrived()));
    assert.equal((await guest.driver.report()).completed, completed, "the source stands still");
  });
}

Deno.test("Cancelled on a link so slow that the next page is due in a quarter of an hour, the guest goes on at once", async () => {
  await using hosts = new Hosts();
  const guest = await hosts.guest();
  const { path } = hosts.destination();
  const cancelled = cancelAt(hosts, guest, path, ["source", FRAME.PAGES, "cancelled"], { maxBandwidth: 1024 });
  let done = false;
  cancelled.then(() => done = true, () => done = true);
  await waitUntil("the end of the migration", () => done);
  await cancelled;
  await assertRuns(guest);
});

Deno.test("Cancelled while all memory is compared, with everything at the destination already, the guest goes on here", async () => {
  await using hosts = new Hosts();
  const guest = await hosts.guest();
  const { path } = hosts.destination();
  const { source, migration } = migrationTo(path, guest);
  using _source = source;
  using _migration = migration;
  const digest = source.map.digest.bind(source.map);
  source.map.digest = async () => {
    const all = await digest();
    assert.ok(migration.cancel());
    return all;
  };
  const result = await migration.run();
  assert.deepEqual([result.outcome, result.phase], ["cancelled", "state"]);
  await assertRuns(guest);
});

Deno.test("Cancelled while a device that hangs is drained, the guest goes on long before the drain's deadline, its rings when it can", async () => {
  await using hosts = new Hosts();
  const guest = await hosts.guest();
  const { path } = hosts.destination();
  const { source, migration } = migrationTo(path, guest, { drainTimeoutMs: 600_000 });
  using _source = source;
  using _migration = migration;
  const answer = Promise.withResolvers<void>();
  const { driver } = guest;
  const stopRings = driver.stopRings.bind(driver);
  driver.stopRings = async () => {
    assert.ok(migration.cancel());
    await answer.promise;
    return await stopRings();
  };
  const result = await migration.run();
  assert.deepEqual([result.outcome, result.phase, result.error!.exit_code], ["cancelled", "stop", 7]);
  await progress(guest, 1);
  answer.resolve();
  await source.settled();
  driver.stopRings = stopRings;
  await assertRuns(guest);
});
