import assert from "node:assert/strict";
import { domainXml, emulator, Libvirt } from "../support/libvirt.ts";
import { assertConversation } from "../support/conversation.ts";
import { assertRelaysSound } from "../support/migrate_cli.ts";
import { MigrationPair, type Side } from "../support/migration_pair.ts";
import { labTest } from "../support/real_parts.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { startTestpmd, verifyImage } from "../support/vm.ts";

const NAME =
  "virsh migrate --live moves a domain with a disk and an interface behind relays from one libvirt daemon to another, without svq";
/** libvirt 9.0 starts it although it is newer, where the domain asks for ACPI. */
const QEMU = "10";

await labTest(NAME, [`qemu-${QEMU}`, "guest", "dpdk", "libvirt", "root"], async ({ folder }) => {
  await using pair = await MigrationPair.start(QEMU, folder.path);
  await using stack = new AsyncDisposableStack();
  const side = async (name: string, { relay }: Side): Promise<{ daemon: Libvirt; net: RelayProcess }> => {
    const device = folder.join(`${name}.netdev`);
    await Deno.mkdir(folder.join(`pmd-${name}`));
    stack.use(await startTestpmd({ folder: folder.join(`pmd-${name}`), socket: device }));
    const net = stack.use(await RelayProcess.start({ folder: folder.path, name: `net-${name}`, device: `unix:${device}` }));
    return { daemon: stack.use(await Libvirt.start(`svq-${name}`, folder.path, { disk: relay.front, net: net.front })), net };
  };
  const { daemon: a, net: cardA } = await side("a", pair.a);
  const { daemon: b } = await side("b", pair.b);
  const xml = folder.join("domain.xml");
  await Deno.writeTextFile(xml, await domainXml("moved", await emulator(folder.path, QEMU), "report=200"));
  await a.virsh(["create", xml]);
  using before = await a.serial();
  await before.log.wait(/SVQ READY .*errors=0/, { timeoutMs: 240_000 });
  await before.log.wait(/^SVQ ops=/);
  // What libvirt's QEMU says before anybody migrates it: the same in every run, and not quite what the tests' own QEMU says.
  await assertConversation("libvirt_qemu_10_blk", await pair.a.relay.messages());
  await assertConversation("libvirt_qemu_10_net", await cardA.messages());
  const migration = a.virsh(["migrate", "--live", "moved", b.uri, "--migrateuri", "tcp://127.0.0.1:49200"], 240_000);
  const begun = performance.now();
  await migration;
  console.log(`  virsh migrate: ${Math.round(performance.now() - begun)} ms`);
  assert.match(await b.virsh(["domstate", "moved"]), /running/);
  assert.doesNotMatch(await a.virsh(["list", "--name"]), /moved/);
  using after = await b.serial();
  await after.log.wait(/^SVQ ops=/, { timeoutMs: 60_000 });
  assert.deepEqual((await pair.b.relay.status()).queues.map(({ errors }) => errors), [0], "while the guest is at work on it");
  await assertRelaysSound(pair.a, pair.b);
  await after.send("stop\n");
  const [line] = await after.log.wait(/^SVQ DONE .*$/, { timeoutMs: 120_000 });
  assert.match(line, /^SVQ DONE ok /);
  assert.equal((await verifyImage(pair.image)).digest, /digest=(\w+)/.exec(line)![1], "the image holds what the guest wrote");
});
