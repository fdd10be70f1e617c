import assert from "node:assert/strict";
import { isClean } from "../../src/migration/document.ts";
import { reportOf } from "../../src/migration/handshake.ts";
import { FRAME, frameName, type FrameType } from "../../src/migration/protocol.ts";
import { type Fault, FrameProxy, Hosts, migrationTo, progress } from "../support/migration.ts";
import { waitUntil } from "../support/wait.ts";

type Side = "source" | "destination";

// Every frame of a migration, in order, with who sends it.
const STEPS: [Side, FrameType][] = [
  ["source", FRAME.HELLO],
  ["destination", FRAME.HELLO],
  ["source", FRAME.OFFER],
  ["destination", FRAME.ACCEPT],
  ["source", FRAME.ROUND],
  ["source", FRAME.PAGES],
  ["source", FRAME.ZERO],
  ["source", FRAME.ROUND_END],
  ["destination", FRAME.ROUND_ACK],
  ["source", FRAME.STATE],
  ["destination", FRAME.PREPARED],
  ["source", FRAME.COMMIT],
  ["destination", FRAME.RUNNING],
];

// Silence takes its time to be noticed.
const FEWER: readonly FrameType[] = [FRAME.ACCEPT, FRAME.PAGES, FRAME.ROUND_ACK, FRAME.PREPARED, FRAME.COMMIT, FRAME.RUNNING];

interface Case {
  fault: Fault;
  /** Nobody can connect again after the fault. */
  alone?: boolean;
  /** What comes of it when the fault hits RUNNING; otherwise the source goes on. */
  atRunning: "completed" | "aborted" | "in-doubt";
  /** What comes of it when it hits COMMIT. */
  atCommit: "aborted" | "in-doubt";
}

const CASES: Case[] = [
  { fault: "cut", atCommit: "aborted", atRunning: "completed" },
  { fault: "stall", atCommit: "aborted", atRunning: "completed" },
  { fault: "stall", alone: true, atCommit: "in-doubt", atRunning: "in-doubt" },
  { fault: "flip", atCommit: "aborted", atRunning: "completed" },
];

for (const { fault, alone = false, atCommit, atRunning } of CASES) {
  const steps = alone ? STEPS.slice(-2) : fault === "cut" ? STEPS : STEPS.filter(([, type]) => FEWER.includes(type));
  const name = `The link ${fault === "flip" ? "damages a frame" : `is ${fault === "cut" ? "cut" : "silent"}`}${alone ? ", for good," : ""}`;
  Deno.test(`${name} at any step: the guest runs on exactly one side and loses nothing`, async (test) => {
    for (const [side, type] of steps) {
      await test.step(`${frameName(type)} of the ${side}`, async () => {
        const wanted = type === FRAME.COMMIT ? atCommit : type === FRAME.RUNNING ? atRunning : "aborted";
        await strike(fault, alone, side, type, wanted);
      });
    }
  });
}

async function strike(fault: Fault, alone: boolean, side: Side, type: FrameType, wanted: string, timeoutMs = 1500): Promise<void> {
  await using hosts = new Hosts({ destination: { timeoutMs: 10_000 } });
  const guest = await hosts.guest();
  const { destination, path } = hosts.destination();
  const proxy = hosts.own(
    new FrameProxy(hosts.dir.join("p"), path, (from, kind) => from === side && kind === type ? fault : undefined, alone),
  );
  const { source, migration } = migrationTo(proxy.path, guest, {
    timeoutMs: fault === "stall" ? timeoutMs : 5000,
    doubtTimeoutMs: alone ? 300 : 5000,
  });
  using _source = source;
  using _migration = migration;
  const result = await migration.run();
  // On a machine that is busy the honest part of the migration may be slower than that.
  if (fault === "stall" && !proxy.fired && timeoutMs < 20_000) return await strike(fault, alone, side, type, wanted, timeoutMs * 4);
  assert.ok(proxy.fired, "the fault happened");
  assert.equal(result.outcome, wanted, result.error?.message);
  let arrived = false;
  destination.arrived().then(() => arrived = true, () => {});
  if (wanted === "aborted") {
    await progress(guest);
    assert.ok(isClean(reportOf(await guest.driver.stop(10_000))));
    assert.equal(arrived, false, "the destination does not run");
    return;
  }
  const { completed } = await guest.driver.report();
  if (wanted === "completed" || type === FRAME.RUNNING) {
    await waitUntil("the guest at the destination", () => arrived);
    const there = hosts.own(await destination.arrived());
    await progress(there);
    assert.ok(isClean(reportOf(await there.driver.stop(10_000))));
  }
  assert.equal((await guest.driver.report()).completed, completed, "the source stands still");
}

for (const alone of [false, true]) {
  Deno.test(`A destination that dies with COMMIT unread${alone ? " and is gone then" : ""} never ran: the source goes on`, async () => {
    await strike("reset-next", alone, "source", FRAME.STATE, "aborted");
  });
}

Deno.test("A destination whose device refuses to start says so, and the guest goes on at the source", async () => {
  await using hosts = new Hosts();
  const guest = await hosts.guest();
  const { path } = hosts.destinationWith((device) => {
    const start = device.setVringEnable.bind(device);
    device.setVringEnable = (index, enabled) => enabled ? Promise.reject(new Error("no")) : start(index, enabled);
  });
  const { source, migration } = migrationTo(path, guest);
  using _source = source;
  using _migration = migration;
  const result = await migration.run();
  assert.deepEqual([result.outcome, result.phase], ["aborted", "commit"]);
  await progress(guest);
  assert.ok(isClean(reportOf(await guest.driver.stop(10_000))));
});
