/**
 * Records what a real QEMU and a real storage daemon say to each other while a guest works and is migrated:
 * `deno run -A tests/lab/record_golden.ts` writes tests/vhost_user/golden/. Not a test: run it when a new version is to be
 * covered.
 *
 * @module
 */
import { HideLogProxy, type PassedMessage } from "../support/hide_log_proxy.ts";
import { TempDir } from "../support/temp.ts";
import { makeImage, migrate, startVm, storageDaemon } from "../support/vm.ts";
import { toHex } from "../support/golden.ts";

function conversation(passed: readonly PassedMessage[]): unknown[] {
  return passed.map(({ from, request, flags, payload, fds }) => [from, request, flags, toHex(payload), fds]);
}

for (const qemu of ["7.2", "10"] as const) {
  using folder = new TempDir();
  const image = await makeImage(folder.join("disk.img"));
  const path = (name: string) => folder.join(name);
  await using _a = await storageDaemon({ version: qemu, image, socket: path("a") });
  await using _b = await storageDaemon({ version: qemu, image, socket: path("b") });
  const nothing = { hideFeatures: 0n, hideProtocolFeatures: 0n };
  await using source = new HideLogProxy(path("pa"), path("a"), nothing);
  await using destination = new HideLogProxy(path("pb"), path("b"), nothing);
  const uri = `unix:${path("migrate")}`;
  const common = { qemu, folder: folder.path, run: "workload", workload: { report: 200 } } as const;
  await using vmA = await startVm({ ...common, name: "a", disk: { socket: path("pa") } });
  await using vmB = await startVm({ ...common, name: "b", disk: { socket: path("pb") }, incoming: uri });
  await vmA.waitReady();
  await migrate(vmA, vmB, uri);
  await vmB.finishWorkload();
  const recorded = {
    qemu: vmA.qmp.greeting.version,
    source: conversation(source.passed),
    destination: conversation(destination.passed),
  };
  const lines = JSON.stringify(recorded).replaceAll("],[", "],\n[");
  await Deno.writeTextFile(new URL(`../vhost_user/golden/qemu_${qemu}_blk.json`, import.meta.url), `${lines}\n`);
  console.log(qemu, recorded.source.length, recorded.destination.length);
}
