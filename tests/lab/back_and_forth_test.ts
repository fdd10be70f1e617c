import assert from "node:assert/strict";
import { assertRelaysSound, assertSound, type End, migrateResult, migrateVm, startMigrateVm } from "../support/migrate_cli.ts";
import { MigrationPair, type Side } from "../support/migration_pair.ts";
import { labTest } from "../support/real_parts.ts";
import type { Vm } from "../support/vm.ts";

// QEMU 7.2 under TCG forgets guest writes by itself (see MigrateOptions): there the guest stands still while it moves.
const QEMUS = ["7.2", "10"] as const;

async function move(pair: MigrationPair, from: End, to: End): Promise<void> {
  const still = pair.qemu === "7.2";
  const before = await from.vm.nextHeartbeat();
  if (still) await from.vm.qmp.execute("stop");
  const { outcome, total_ms, downtime_us, positions } = await migrateVm(pair, from, to);
  if (still) await to.vm.qmp.execute("cont");
  assert.equal(outcome, "completed");
  console.log(
    `  QEMU ${pair.qemu}, ${from.side.relay.name} -> ${to.side.relay.name}: total ${total_ms} ms, downtime ${
      downtime_us!.total / 1000
    } ms, queue 0 stopped at ${positions[0]!.source_base}`,
  );
  await to.vm.progress(before);
  const [stopped, went] = [(await from.side.relay.status()).queues[0]!, (await to.side.relay.status()).queues[0]!];
  assert.ok(stopped.last_base !== null && stopped.last_base === went.start_base, `${stopped.last_base} and ${went.start_base}`);
  assert.equal(went.mode, "passthrough");
}

for (const qemu of QEMUS) {
  await labTest(`a QEMU ${qemu} guest moves A -> B -> A -> B -> A and nothing is lost`, [`qemu-${qemu}`, "guest"], async ({ folder }) => {
    await using pair = await MigrationPair.start(qemu, folder.path);
    let here: { side: Side; vm: Vm } = { side: pair.a, vm: await pair.startGuest(pair.a, "g0") };
    try {
      await here.vm.waitReady();
      for (let i = 1; i <= 4; i++) {
        const side = here.side === pair.a ? pair.b : pair.a;
        const there = { side, vm: await pair.startGuest(side, `g${i}`, { incoming: "defer" }) };
        try {
          await move(pair, here, there);
        } catch (error) {
          await there.vm[Symbol.asyncDispose]();
          throw error;
        }
        await here.vm[Symbol.asyncDispose]();
        await here.side.relay.waitStatus("is free for the next guest", (status) => status.state === "waiting");
        here = there;
      }
      await assertSound(here.vm, pair.image);
      await assertRelaysSound(pair.a, pair.b);
    } finally {
      await here.vm[Symbol.asyncDispose]();
    }
  });
}

for (const [how, code] of [["--cancel-after", 7], ["SIGINT", 130]] as const) {
  await labTest(
    `a migration that is cancelled by ${how} leaves the guest running in passthrough at the source, and the next one works`,
    ["qemu-10", "guest"],
    async ({ folder }) => {
      await using pair = await MigrationPair.start("10", folder.path);
      await using source = await pair.startGuest(pair.a, "source");
      await using first = await pair.startGuest(pair.b, "first", { incoming: "defer" });
      const from = { side: pair.a, vm: source };
      await source.waitReady();
      const before = await source.nextHeartbeat();
      const args = ["--max-bandwidth", "2MiB", ...(how === "SIGINT" ? [] : ["--cancel-after", "3s"])];
      await using migration = startMigrateVm(pair, from, { side: pair.b, vm: first }, args);
      await pair.a.relay.waitStatus("logs", (status) => {
        if (migration.ended) throw new Error(migration.stderr.tail());
        return status.logging && status.queues[0]!.mode !== "passthrough";
      });
      if (how === "SIGINT") migration.kill("SIGINT");
      const document = await migrateResult(migration, code);
      assert.equal(document.outcome, "cancelled");

      // At its end everything is back already.
      const status = await pair.a.relay.status();
      assert.deepEqual({ logging: status.logging, mode: status.queues[0]!.mode }, { logging: false, mode: "passthrough" });
      assert.equal((await source.qmp.execute<{ status: string }>("query-status")).status, "running");
      await source.progress(before);

      await first[Symbol.asyncDispose]();
      await pair.b.relay.waitStatus("is free for the next guest", (status) => status.state === "waiting");
      await using second = await pair.startGuest(pair.b, "second", { incoming: "defer" });
      await move(pair, from, { side: pair.b, vm: second });
      await assertSound(second, pair.image);
      await assertRelaysSound(pair.a, pair.b);
    },
  );
}
