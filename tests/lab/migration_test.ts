import assert from "node:assert/strict";
import { labTest } from "../support/real_parts.ts";
import { svq } from "../support/cli.ts";
import { assertTakenEarly } from "../support/migrate_cli.ts";
import { MigrationPair } from "../support/migration_pair.ts";
import { migrate, verifyImage, type Vm } from "../support/vm.ts";

async function assertSound(vm: Vm, image: string): Promise<void> {
  const result = await vm.finishWorkload();
  assert.equal(result.ok, true, `${result.line}\n${result.errorLines.join("\n")}`);
  assert.equal((await verifyImage(image)).digest, result.digest, "the image holds what the guest wrote");
}

for (const qemu of ["7.2", "10"] as const) {
  await labTest(
    `through the relay a QEMU ${qemu} guest migrates by plain QMP although its device cannot be migrated`,
    [`qemu-${qemu}`, "guest"],
    async ({ folder }) => {
      await using pair = await MigrationPair.start(qemu, folder.path);
      const uri = `unix:${folder.join("migrate")}`;
      await using source = await pair.startGuest(pair.a, "source");
      const memoryFile = folder.join("memory");
      await using destination = await pair.startGuest(pair.b, "destination", { incoming: uri, memoryFile });
      await source.waitReady();
      const premap = ["relay", "premap", "b", "--like", "a", "--path", memoryFile];
      const premapped = await svq(premap, { SVQ_RUNTIME_DIR: folder.path });
      assert.equal(premapped.code, 0, premapped.stderr);
      const before = await source.nextHeartbeat();
      // QEMU 7.2 under TCG forgets pages that the guest writes while it migrates, with or without any vhost device.
      const figures = await migrate(source, destination, uri, { stopGuest: qemu === "7.2" });
      await destination.progress(before);
      await assertSound(destination, pair.image);
      for (const side of [pair.a, pair.b]) {
        assert.equal(side.proxy.deviceWasToldToLog, false, "the device was never sent LOG_ALL nor a log");
        assert.equal((await side.relay.status()).queues.reduce((sum, queue) => sum + queue.errors, 0), 0);
      }
      await assertTakenEarly(pair, qemu);
      console.log(`  QEMU ${qemu}: total ${figures.totalMs} ms, downtime ${figures.downtimeMs} ms`);
    },
  );
}
