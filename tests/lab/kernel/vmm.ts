/**
 * A VMM and svq drive on a kernel vDPA device through svq relay run, in the lab VM.
 */
import assert from "node:assert/strict";
import { BOOT_OK, bootSector, FILL_BYTE } from "../../support/boot_sector.ts";
import { withDisk } from "../../support/lab_disk.ts";
import { labRelay, runSvq, startSvq } from "../../support/lab_svq.ts";
import { labMachines } from "../../support/lab_machines.ts";
import { vdpaNode, vmTest } from "../../support/lab_vm.ts";
import { Process } from "../../support/process.ts";
import { waitUntil } from "../../support/wait.ts";

const { pair, behindIommu } = labMachines(import.meta.url);

const PATIENCE_MS = 180_000;
const SECTORS = 40;

for (const mode of ["passthrough", "shadow"]) {
  vmTest(`svq drive does a checked workload on vdpa_sim_blk through svq relay run in mode ${mode}`, pair, async () => {
    await using front = await labRelay(vdpaNode("sim0"), `drive-${mode}`, "--mode", mode);
    const { ended, texts } = startSvq(
      "drive",
      `unix:${front.path}`,
      "--requests",
      "100",
      "--region",
      "4MiB",
      "--ram",
      "4MiB",
      "--depth",
      "8",
      "-j",
    );
    assert.equal(await ended, 0, texts.stderr);
    const { requests } = JSON.parse(texts.stdout);
    assert.deepEqual([requests.lost, requests.duplicated, requests.corrupted], [0, 0, 0]);
    assert.ok(requests.completed >= 100);
  });
}

function nestedQemu(disk: string, ...args: string[]): Process {
  return new Process("qemu-system-x86_64", {
    name: "nested QEMU",
    args: [
      ...["-accel", "tcg", "-M", "pc,graphics=off,memory-backend=m,hpet=off", "-m", "32", "-nodefaults", "-display", "none"],
      ...["-object", "memory-backend-memfd,id=m,size=32M,share=on", "-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=1"],
      ...["-chardev", `socket,id=c,path=${disk}`, "-device", "vhost-user-blk-pci,chardev=c,num-queues=1,bootindex=0"],
      ...args,
    ],
  });
}

async function boots(node: string, name: string, mode: string, says = /ready/): Promise<void> {
  await withDisk(node, async (move) => {
    await move(0, bootSector(SECTORS));
    for (let sector = 1; sector <= SECTORS; sector++) await move(sector, new Uint8Array(512));
  });
  {
    await using front = await labRelay(node, name, "--mode", mode);
    await using qemu = nestedQemu(front.path);
    await qemu.expectExit(BOOT_OK, PATIENCE_MS).catch((error) => Promise.reject(new Error(`${error.message}\nrelay: ${front.log()}`)));
    await qemu.stdout.done;
    assert.match(qemu.stdout.text, new RegExp(`\\.{${SECTORS}}K`));
    assert.match(front.log(), says);
  }
  await withDisk(node, async (move) => {
    for (let sector = 1; sector <= SECTORS; sector++) {
      const bytes = await move(sector);
      const wrong = bytes.findIndex((byte, i) => byte !== (i % 2 === 0 ? sector : FILL_BYTE));
      assert.equal(wrong, -1, `sector ${sector}`);
    }
  });
}

for (const mode of ["passthrough", "shadow"]) {
  vmTest(
    `a nested QEMU boots from vdpa_sim_blk through svq in mode ${mode}, and its sectors are on the disk`,
    pair,
    () => boots(vdpaNode("sim0"), `boot-${mode}`, mode),
  );
}

vmTest("a nested QEMU boots from vp_vdpa through svq, and its sectors are on the disk", behindIommu, async () => {
  // The driver pins the guest's memory, more than the 8 MiB that the kernel allows at first.
  await new Deno.Command("prlimit", { args: ["--pid", String(Deno.pid), "--memlock=unlimited:unlimited"] }).output();
  await boots(vdpaNode("vpblk"), "boot-vp", "auto");
});

vmTest("on the rings of vp_vdpa itself a nested QEMU, which cannot map its doorbells, kicks by events", behindIommu, async () => {
  await boots(vdpaNode("vpblk"), "boot-vp-passthrough", "passthrough", /does not map doorbells/);
});

vmTest("svq migrate vm refuses a guest with a balloon whose memory vp_vdpa pins, and svq doctor names it", behindIommu, async () => {
  await using from = await labRelay(vdpaNode("vpblk"), "pinned");
  await using to = await labRelay("sim:blk,size=64MiB", "unpinned");
  const monitor = (name: string) => ["-qmp", `unix:/tmp/${name}.qmp,server=on,wait=off`];
  await using _source = nestedQemu(from.path, ...monitor("balloon"), "-device", "virtio-balloon-pci,id=bal");
  await using _destination = nestedQemu(to.path, ...monitor("empty"), "-incoming", "defer");
  const exists = (name: string) => () => Array.from(Deno.readDirSync("/tmp")).some((entry) => entry.name === `${name}.qmp`);
  for (const name of ["balloon", "empty"]) await waitUntil("the monitor", exists(name), PATIENCE_MS);
  const words = ["--source", "/tmp/balloon.qmp", "--destination", "/tmp/empty.qmp", "--source-relay", "pinned", "--destination-relay"];
  // The two disks differ, which is not what is asked about here.
  const otherwise = ["--skip-check", "CONFIG_DIFFERS"];
  const { code, stdout, stderr } = await runSvq(
    "migrate",
    "vm",
    ...words,
    "unpinned",
    "--uri",
    "unix:/tmp/pinned.migration",
    ...otherwise,
    "-j",
  );
  assert.notEqual(code, 0);
  assert.match(stdout + stderr, /PINNED_MEMORY.{0,400}peripheral\/bal \(balloon\)/s);
  const doctor = await runSvq("doctor", "--qmp", "/tmp/balloon.qmp", "-j");
  assert.equal(doctor.code, 6, doctor.stderr);
  const check = JSON.parse(doctor.stdout).checks.find(({ name }: { name: string }) => name === "pinned-memory");
  assert.deepEqual([check.status, check.required], ["missing", true]);
  assert.match(check.found, /peripheral\/bal \(balloon\); relay pinned pins guest memory/);
});

vmTest("svq migrate vm takes a guest from one nested QEMU and vDPA device to another, and its disk is right", pair, async () => {
  await withDisk(vdpaNode("sim0"), async (move) => void await move(0, bootSector(SECTORS, true)));
  {
    await using from = await labRelay(vdpaNode("sim0"), "from");
    await using to = await labRelay(vdpaNode("sim1"), "to");
    const monitor = (name: string) => ["-qmp", `unix:/tmp/${name}.qmp,server=on,wait=off`];
    await using source = nestedQemu(from.path, ...monitor("source"));
    await using destination = nestedQemu(to.path, ...monitor("destination"), "-incoming", "defer");
    await waitUntil("the guest to write", () => source.stdout.text.length > 5, PATIENCE_MS);
    const args = [
      "--source",
      "/tmp/source.qmp",
      "--destination",
      "/tmp/destination.qmp",
      "--source-relay",
      "from",
      "--destination-relay",
      "to",
    ];
    const { ended, texts } = startSvq("migrate", "vm", ...args, "--uri", "unix:/tmp/migration", "-j");
    assert.equal(await ended, 0, texts.stderr + texts.stdout);
    const document = JSON.parse(texts.stdout);
    assert.equal(document.outcome, "completed");
    assert.deepEqual(
      document.positions.map(({ index, agree }: { index: number; agree: boolean }) => [index, agree]),
      [[0, true]],
      texts.stdout + from.log(),
    );
    const goesOn = () => destination.stdout.text.length > 2 * SECTORS;
    await waitUntil("two rounds more", goesOn, PATIENCE_MS).catch((error) =>
      Promise.reject(new Error(`${error.message}: ${destination.stdout.text}`))
    );
    assert.match(destination.stdout.text, /^\.+$/);
    assert.ok(!source.stdout.text.includes("F"));
  }
  await withDisk(vdpaNode("sim1"), async (move) => {
    // The round that the end interrupted, and the one before.
    const fill = (await move(1))[1]!;
    for (let sector = 1, now = fill; sector <= SECTORS; sector++) {
      const bytes = await move(sector);
      if (bytes[1] === fill - 1) now = fill - 1;
      assert.equal(bytes.findIndex((byte, i) => byte !== (i % 2 === 0 ? sector : now)), -1, `sector ${sector}`);
    }
  });
});
