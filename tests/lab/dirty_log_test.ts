import assert from "node:assert/strict";
import { differingPages, lacksPoisonOnly } from "../support/compare_memory.ts";
import { LogFilter } from "../support/log_filter.ts";
import { assertRelaysSound, assertSound, type MigrateDocument, migrateResult, startMigrateVm } from "../support/migrate_cli.ts";
import { MigrationPair } from "../support/migration_pair.ts";
import { queryMigrate } from "../../src/migration/qemu.ts";
import { labTest, SOAKING } from "../support/real_parts.ts";
import { makeImage, migrate, startVm, type Vm, type VmOptions } from "../support/vm.ts";
import { waitUntil } from "../support/wait.ts";

// QEMU 7.2 under TCG forgets pages that the processor writes while it migrates: the comparison needs QEMU 10. That one still
// forgets a few on a busy machine, with its own virtio-blk just as with a device behind svq (the last test here shows it): of
// 31 migrations each under load, 5 and 9 left pages without the poison that the processor had put there before the next read,
// and nothing else. Only that is let pass; what the device wrote must be there on every page.
const NEEDS = ["qemu-10", "guest"] as const;
const READS = { report: 200, mode: "readonly", depth: 16, hold: 512 };
// The device's writes must fall between the copying of a page and the end. The 16 MiB that the reads go to change faster
// than that, so after some rounds the copying is let go.
const SLOW = "24MiB";
const FAST = 2 ** 30;
const ROUNDS = 4;

interface Compared {
  document: MigrateDocument;
  /** Pages that differ in more than the processor's poison. */
  differing: number[];
  /** Pages that differ in that alone. */
  forgotten: number;
  pages: number;
  writes: number;
}

/** Migrates a guest whose disk is read all the time to a destination that stays stopped, and compares both RAMs then. */
async function migrateAndCompare(pair: MigrationPair, source: Vm, destination: Vm): Promise<Compared> {
  await source.waitReady();
  await source.nextHeartbeat();
  const [from, to] = [{ side: pair.a, vm: source }, { side: pair.b, vm: destination }];
  await using migration = startMigrateVm(pair, from, to, ["--max-bandwidth", SLOW, "--timeout", "90s"]);
  await waitUntil(`${ROUNDS} rounds of copying`, async () => {
    if (migration.ended) return true;
    const { ram } = await queryMigrate(source.qmp);
    return ram !== undefined && ram.rounds >= ROUNDS;
  });
  await source.qmp.execute("migrate-set-parameters", { "max-bandwidth": FAST });
  const document = await migrateResult(migration);
  assert.equal(document.outcome, "completed");
  assert.equal(document.destination_state, "paused");
  const queue = (await pair.a.relay.status()).queues[0]!;
  return { document, ...compare(source, destination), writes: queue.dirty_pages };
}

function compare(source: Vm, destination: Vm): Pick<Compared, "differing" | "forgotten" | "pages"> {
  const [from, to] = [source.memoryPath(), destination.memoryPath()];
  const all = differingPages(from, to);
  const differing = all.filter((page) => !lacksPoisonOnly(from, to, page));
  return { differing, forgotten: all.length - differing.length, pages: Deno.statSync(from).size / 4096 };
}

function pageList(pages: number[]): string {
  return `${pages.length} pages differ: ${pages.slice(0, 20).map((page) => `0x${(page * 4096).toString(16)}`).join(" ")}`;
}

await labTest(
  "after a migration during which the device wrote guest RAM throughout, every page holds what the device wrote",
  NEEDS,
  async ({ folder }) => {
    await using pair = await MigrationPair.start("10", folder.path);
    await using source = await pair.startGuest(pair.a, "source", { workload: READS });
    await using destination = await pair.startGuest(pair.b, "destination", { workload: READS, incoming: "defer", paused: true });
    const { document, differing, forgotten, pages, writes } = await migrateAndCompare(pair, source, destination);
    console.log(
      `  ${pages} pages compared, ${differing.length} differ, on ${forgotten} QEMU forgot a store of the processor; the device wrote ${writes} pages while the log was on; ` +
        `total ${document.total_ms} ms, downtime ${document.downtime_us!.total / 1000} ms, ${document.rounds.length} rounds`,
    );
    assert.deepEqual(differing, [], pageList(differing));
    assert.ok(writes > 1000, `the device wrote only ${writes} pages`);
    await destination.qmp.execute("cont");
    await assertSound(destination, pair.image);
    await assertRelaysSound(pair.a, pair.b);
  },
);

for (
  const [what, keeps] of [["carries every bit over", () => true], ["drops most of the bits", (page: number) => page % 8 === 0]] as const
) {
  await labTest(`a log that ${what} is told apart by comparing the pages`, NEEDS, async ({ folder }) => {
    await using pair = await MigrationPair.start("10", folder.path);
    const socket = folder.join("filter");
    await using filter = new LogFilter(socket, pair.a.relay.front, keeps);
    await using source = await pair.startGuest(pair.a, "source", { disk: { socket }, workload: READS });
    await using destination = await pair.startGuest(pair.b, "destination", { workload: READS, incoming: "defer", paused: true });
    const { differing } = await migrateAndCompare(pair, source, destination);
    console.log(`  ${filter.carried} bits carried over, ${filter.dropped} dropped: ${differing.length} pages differ`);
    assert.ok(filter.carried > 1000, "the log goes through the filter");
    if (keeps(1)) assert.deepEqual(differing, [], pageList(differing));
    else assert.ok(differing.length > 0, "pages are missing and nobody has noticed");
  });
}

// Not about svq: what the comparison lets pass is QEMU's own doing. The soak counts it.
if (SOAKING) {
  await labTest("a guest without svq loses nothing but the processor's poison, too", NEEDS, async ({ folder }) => {
    const image = await makeImage(folder.join("disk.img"));
    const options: VmOptions = {
      ...{ qemu: "10", folder: folder.path, run: "workload", workload: READS, modules: ["disk"] },
      extraArgs: [
        ...["-blockdev", `driver=file,node-name=f0,filename=${image},locking=off`],
        ...["-device", "virtio-blk-pci,drive=f0,share-rw=on"],
      ],
    };
    await using source = await startVm({ ...options, name: "source" });
    await using destination = await startVm({ ...options, name: "destination", incoming: "defer", paused: true });
    await source.waitReady();
    const uri = `unix:${folder.join("migration")}`;
    await destination.qmp.execute("migrate-incoming", { uri });
    await migrate(source, destination, uri, { slowFirstPass: true });
    const { differing, forgotten, pages } = compare(source, destination);
    console.log(`  ${pages} pages compared without svq, ${differing.length} differ, on ${forgotten} QEMU forgot a store of the processor`);
    assert.deepEqual(differing, [], pageList(differing));
  });
}
