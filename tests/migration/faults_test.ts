import assert from "node:assert/strict";
import { isClean } from "../../src/migration/document.ts";
import { reportOf } from "../../src/migration/handshake.ts";
import { FRAME, frameName, type FrameType } from "../../src/migration/protocol.ts";
import { faultTable, type Kind, KINDS, promised, type Step, STEPS, strike, Watched } from "../support/faults.ts";
import { MemoryLimit } from "../support/memory_limit.ts";
import { FrameProxy, Hosts, migrationTo, progress } from "../support/migration.ts";

const SOAK = Deno.env.get("SVQ_SOAK") === "1";
// Silence takes its time to be noticed, and processes theirs to start.
const FEWER: readonly FrameType[] = [FRAME.ACCEPT, FRAME.PAGES, FRAME.ROUND_ACK, FRAME.PREPARED, FRAME.COMMIT, FRAME.RUNNING];
const LAST: readonly FrameType[] = [FRAME.COMMIT, FRAME.RUNNING];
// Cancelled at any step: cancel_test.ts.
const CHOSEN: Partial<Record<Kind, readonly FrameType[]>> = {
  "cut": Object.values(FRAME),
  "stall": FEWER,
  "stall-for-good": LAST,
  "flip": FEWER,
  "refuse": Object.values(FRAME),
  "kill-source": LAST.slice(0, 1),
  "kill-destination": LAST.slice(0, 1),
};

for (const [kind, types] of Object.entries(CHOSEN) as [Kind, readonly FrameType[]][]) {
  Deno.test(`A migration of which any frame meets this: ${KINDS[kind]}; the guest is where it is promised to be and loses nothing`, async (test) => {
    for (const step of STEPS.filter(([, type]) => SOAK || types.includes(type))) {
      const wanted = promised(kind, step);
      if (wanted === undefined) continue;
      await test.step(`${frameName(step[1])} of the ${step[0]}`, async () => assert.equal(await strike(kind, step), wanted));
    }
  });
}

Deno.test("The table in docs/migration-faults.md is what is promised", () => {
  const text = Deno.readTextFileSync(new URL("../../docs/migration-faults.md", import.meta.url));
  assert.ok(text.includes(faultTable((kind, step: Step) => promised(kind, step))), "write it anew: deno run -A scripts/fault_table.ts");
});

for (const alone of [false, true]) {
  Deno.test(`A destination that dies with COMMIT unread${alone ? " and is gone then" : ""} never ran: the source goes on`, async () => {
    await using hosts = new Hosts({ destination: { timeoutMs: 10_000 } });
    const guest = await hosts.guest();
    const { destination, path } = hosts.destination();
    let arrived = false;
    destination.arrived().then(() => arrived = true, () => {});
    const rule = (from: string, type: number) => from === "source" && type === FRAME.STATE ? "reset-next" as const : undefined;
    const proxy = hosts.own(new FrameProxy(hosts.dir.join("p"), path, rule, alone));
    const { source, migration } = migrationTo(proxy.path, guest, { timeoutMs: 5000, doubtTimeoutMs: alone ? 300 : 5000 });
    using _source = source;
    using _migration = migration;
    const { outcome, error } = await migration.run();
    assert.ok(proxy.fired, "the fault happened");
    assert.equal(outcome, "aborted", error?.message);
    await progress(guest);
    assert.ok(isClean(reportOf(await guest.driver.stop(10_000))));
    assert.equal(arrived, false, "the destination does not run");
  });
}

Deno.test({
  name: "A destination that runs out of memory while pages arrive is killed, and the guest goes on at the source",
  ignore: !SOAK,
  fn: async () => {
    // A program on Deno needs about 100 MB, and the guest has touched that much besides.
    await using limit = await MemoryLimit.create(150 << 20);
    if (limit === undefined) return console.log("  left out: no control group can be made here");
    await using hosts = new Hosts({ ramSize: 512 << 20 });
    const guest = await hosts.guest();
    await progress(guest, 30_000);
    const path = hosts.dir.join("m");
    const args = ["migrate", "listen", `unix:${path}`, "--device", `sim:blk,file=${hosts.dir.join("disk")},size=16MiB`];
    await using there = new Watched(args, { SVQ_RUNTIME_DIR: hosts.dir.path }, limit.words);
    await there.says(/listening on/);
    const { source, migration } = migrationTo(path, guest);
    using _source = source;
    using _migration = migration;
    const { outcome, phase, error } = await migration.run();
    assert.deepEqual([outcome, phase], ["aborted", "rounds"], error?.message);
    assert.equal((await there.ended).code, 137, there.stderr);
    await progress(guest);
    assert.ok(isClean(reportOf(await guest.driver.stop(10_000))));
  },
});
