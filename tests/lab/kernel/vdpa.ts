/**
 * The vhost-vdpa and vhost-net back-ends on the kernel's real drivers, in the lab VM.
 */
import assert from "node:assert/strict";
import { EmbeddedDriver } from "../../../src/drivers/embedded_driver.ts";
import { createMemfd, mapFd } from "../../../src/ffi/mod.ts";
import { openDevice } from "../../../src/devices/open.ts";
import { VhostVdpa } from "../../../src/vhost/vdpa.ts";
import { HandMemory, HandRing } from "../../support/hand_ring.ts";
import { labRelay, runSvq, svqJson } from "../../support/lab_svq.ts";
import { labMachines } from "../../support/lab_machines.ts";
import { vdpaNode, vmTest } from "../../support/lab_vm.ts";
import { waitUntil } from "../../support/wait.ts";
import { withCode } from "../../support/with_code.ts";

const { plain, behindIommu } = labMachines(import.meta.url);

const MIB = 1 << 20;

async function openVdpa(name: string): Promise<VhostVdpa> {
  const device = await openDevice(`vdpa:${name}`);
  assert.ok(device instanceof VhostVdpa);
  return device;
}

/** A checked workload, whose rings are stopped and started again in the middle. */
async function workload(device: VhostVdpa, options: { packed?: boolean; requests?: number } = {}): Promise<void> {
  const { packed = false, requests = 120 } = options;
  await using driver = await EmbeddedDriver.open(device, { ramSize: 4 * MIB, depth: 16, num: 128, packed, regionSize: 4 * MIB });
  const first = await driver.run({ requests: Math.floor(requests / 2) });
  assert.deepEqual([first.lost, first.duplicated, first.corrupted, first.faults], [0, 0, 0, []]);
  if (!packed) {
    await driver.exportState();
    await driver.continueHere();
  }
  const report = await driver.run({ requests });
  assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.faults], [0, 0, 0, []]);
  assert.ok(report.completed >= requests, `${report.completed} requests`);
}

vmTest("vdpa_sim_blk does a checked workload, and goes on after its rings were stopped", plain, async () => {
  await using device = await openVdpa("blk0");
  assert.equal(device.info.ringStop, "each");
  assert.equal(device.backendFeatures, 0x17en);
  await workload(device);
});

vmTest("a VDUSE device does a checked workload, and goes on after its rings were stopped at rest", plain, async () => {
  await using device = await openVdpa("user0");
  assert.equal(device.info.ringStop, "at-rest");
  await workload(device);
});

vmTest("suspended under load, a device keeps its position and every request", plain, async () => {
  await using device = await openVdpa("blk0");
  await using driver = await EmbeddedDriver.open(device, { ramSize: 4 * MIB, depth: 16, num: 128, regionSize: 4 * MIB });
  const run = driver.run();
  for (let round = 0; round < 5; round++) {
    const before = (await driver.report()).completed;
    await waitUntil("requests to complete", async () => (await driver.report()).completed > before + 5, 20_000);
    await device.suspend();
    const base = device.node.vringBase(0);
    await new Promise((resolve) => setTimeout(resolve, 20));
    assert.equal(device.node.vringBase(0), base, "a suspended device takes nothing");
    await device.resume();
  }
  await driver.stop();
  const report = await run;
  assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.faults], [0, 0, 0, []]);
});

/** Asks the disk for its name: one chain, and no byte of the disk is touched. */
async function askForId(ring: HandRing, buffers: number): Promise<void> {
  const { memory } = ring;
  memory.bytes.fill(0, buffers, buffers + 64);
  memory.view.setUint32(buffers, 8, true);
  memory.bytes[buffers + 60] = 0xff;
  ring.offer([buffers, 16, false], [buffers + 32, 20, true], [buffers + 60, 1, true]);
  await ring.taken("the disk's name");
  assert.equal(memory.bytes[buffers + 60], 0, "status OK");
}

for (const driver of ["vdpasim_blk", undefined]) {
  const how = driver === undefined ? "by a rebuild" : "under SUSPEND";
  vmTest(`a ring moves to new addresses ${how}, and its old place is not written any more`, plain, async () => {
    await using device = VhostVdpa.open(vdpaNode("blk0"), { driver });
    assert.equal(device.info.ringStop, driver === undefined ? "together" : "each");
    using memory = new HandMemory();
    using here = new HandRing(memory, 0, 0x10000);
    using there = new HandRing(memory, 0, 0x20000);
    await device.setMemTable([memory.region]);
    await device.setFeatures(0n);
    await device.startVrings([here.start(0)]);
    for (let i = 0; i < 20; i++) await askForId(here, 0x40000);
    const [base] = await device.stopVrings([{ index: 0 }]);
    assert.equal(base, 20);
    const left = here.usedBytes;
    await device.startVrings([there.start(base)]);
    // The old ring's kick must not reach it either.
    here.offer([0x40000, 16, false], [0x40020, 20, true], [0x4003c, 1, true]);
    for (let i = 0; i < 20; i++) await askForId(there, 0x50000);
    assert.equal(here.usedBytes, left);
    assert.equal(await device.getVringBase(0), 40);
  });
}

vmTest("frames go through vdpa_sim_net and come back on its receive ring", plain, async () => {
  await using device = await openVdpa("net0");
  assert.equal(device.info.queueNum, 1);
  using memory = new HandMemory();
  using rx = new HandRing(memory, 0, 0x10000);
  using tx = new HandRing(memory, 1, 0x20000);
  await device.setMemTable([memory.region]);
  await device.setFeatures(1n << 5n);
  await device.startVrings([rx.start(), tx.start()]);
  for (let round = 0; round < 3; round++) {
    rx.offer([0x40000, 2048, true]);
    const frame = 0x50000;
    memory.bytes.fill(0xff, frame + 12, frame + 18);
    memory.bytes.fill(round + 1, frame + 18, frame + 12 + 100);
    tx.offer([frame, 112, false]);
    await tx.taken("the frame to leave");
    assert.equal(await rx.taken("the frame to come back"), 112);
    assert.deepEqual(memory.bytes.slice(0x40000 + 12, 0x40000 + 112), memory.bytes.slice(frame + 12, frame + 112));
  }
  assert.deepEqual(await device.stopVrings([{ index: 0 }, { index: 1 }]), [3, 3]);
});

vmTest("vhost-net carries an ARP request to a tap and the kernel's answer back", plain, async () => {
  await using device = await openDevice("/dev/vhost-net,tap=svqtap0");
  for (const args of ["addr add 192.0.2.1/24 dev svqtap0", "link set svqtap0 up"]) {
    assert.equal((await new Deno.Command("ip", { args: args.split(" ") }).output()).code, 0, args);
  }
  using memory = new HandMemory();
  using rx = new HandRing(memory, 0, 0x10000);
  using tx = new HandRing(memory, 1, 0x20000);
  await device.setMemTable([memory.region]);
  await device.setFeatures(1n << 32n);
  for (const ring of [rx, tx]) {
    const start = ring.start();
    await device.setVringNum(start.index, start.num);
    await device.setVringBase(start.index, 0);
    await device.setVringAddresses(start.index, start.addresses);
    await device.setVringCall(start.index, start.call);
    await device.setVringKick(start.index, start.kick!);
    await device.setVringEnable(start.index, true);
  }
  const mac = [0x02, 0, 0, 0, 0, 2];
  const arp = [
    ...[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, ...mac, 0x08, 0x06],
    ...[0, 1, 8, 0, 6, 4, 0, 1, ...mac, 192, 0, 2, 2, 0, 0, 0, 0, 0, 0, 192, 0, 2, 1],
  ];
  memory.bytes.fill(0, 0x50000, 0x50000 + 128);
  memory.bytes.set(arp, 0x50000 + 12);
  rx.offer([0x40000, 2048, true]);
  tx.offer([0x50000, 12 + 60, false]);
  await tx.taken("the request to leave");
  // Other frames (IPv6 neighbour discovery) may come first.
  for (;;) {
    await rx.taken("an answer");
    const frame = memory.bytes.slice(0x40000 + 12, 0x40000 + 12 + 42);
    if (frame[12] === 8 && frame[13] === 6) {
      assert.deepEqual([...frame.slice(20, 22)], [0, 2], "an ARP reply");
      assert.deepEqual([...frame.slice(28, 32)], [192, 0, 2, 1]);
      break;
    }
    rx.offer([0x40000, 2048, true]);
  }
  const rxBase = await device.getVringBase(0);
  assert.equal(rxBase, rx.availIdx);
  assert.equal(await device.getVringBase(1), 1);
});

vmTest("a device that is in use is refused with the name of its user", plain, async () => {
  await using _device = await openVdpa("blk0");
  assert.throws(() => VhostVdpa.open(vdpaNode("blk0")), withCode("DEVICE_IN_USE", new RegExp(`in use by ${Deno.pid} \\S+`)));
});

vmTest("memory that is no shared file is refused, with the QEMU option that makes it one", plain, async () => {
  await using device = await openVdpa("blk0");
  const anonymous = { gpa: 0, size: MIB, uaddr: 0, fd: device.node.device.fd, fdOffset: 0 };
  await assert.rejects(device.setMemTable([anonymous]), withCode("MEMORY_NOT_SHARED", /share=on/));
});

vmTest("the kernel's bare EFAULT becomes a sentence where no check could foresee it", plain, async () => {
  await using device = await openVdpa("blk0");
  using ram = createMemfd("ram", MIB);
  using other = mapFd(ram.fd, { length: 4096 });
  // Behind the book's back.
  device.node.map({ iova: 0, size: 4096, address: other.address }, 0);
  const region = { gpa: 0, size: MIB, uaddr: 0, fd: ram.fd, fdOffset: 0 };
  await assert.rejects(device.setMemTable([region]), withCode("IOTLB_REFUSED", /refused to map it at 0x0-0xfffff/));
});

vmTest("svq iova shows, tries, allocates and frees on a device and in the relay that has it", plain, async () => {
  interface Layout {
    relay?: string;
    range: { first: string; last: string };
    allocations: { tag: string; iova: string }[];
    allocated: { iova: string };
    spaces: unknown[];
  }
  const net = await svqJson<Layout>("iova", "ranges", "vdpa:net0");
  assert.deepEqual(net.range, { first: "0x0", last: "0xffffffffffffffff" });
  assert.equal(net.spaces.length, 2, "both address spaces of vdpa_sim_net");
  for (const name of ["blk0", "user0"]) {
    const tried = await runSvq("iova", "alloc", `vdpa:${name}`, "2MiB");
    assert.deepEqual([tried.code, /the device takes it; given back/.test(tried.stdout)], [0, true], tried.stderr);
  }
  const none = await runSvq("iova", "free", "vdpa:blk0", "0x1000");
  assert.deepEqual([none.code, /No relay has/.test(none.stderr)], [3, true], none.stderr);
  {
    await using _device = await openVdpa("blk0");
    const busy = await runSvq("iova", "ranges", "vdpa:blk0", "-j");
    assert.equal(busy.code, 1);
    assert.match(busy.stderr, /DEVICE_IN_USE.*in use by/);
  }
  await using relay = await labRelay("vdpa:blk0", "iova");
  // By its node, although the relay was given its name.
  const made = await svqJson<Layout>("iova", "alloc", vdpaNode("blk0"), "2MiB", "--map", "--tag", "lab");
  assert.equal(made.relay, "iova");
  const drive = await runSvq("drive", `unix:${relay.path}`, "--requests", "50", "--region", "4MiB", "--ram", "4MiB", "--depth", "8");
  assert.equal(drive.code, 0, drive.stderr);
  const shown = await svqJson<Layout>("iova", "show", "iova");
  assert.ok(shown.allocations.some(({ tag, iova }) => tag === "lab" && iova === made.allocated.iova), "it stays when a front-end leaves");
  await svqJson("iova", "free", "iova", made.allocated.iova);
  const taken = await runSvq("iova", "alloc", "iova", "4KiB", "--iova", "0x10000000000000");
  assert.match(taken.stderr, /2\^52|outside/);
});

vmTest("vp_vdpa does a checked workload with split rings", behindIommu, async () => {
  await using device = await openVdpa("vpblk");
  assert.equal(device.info.ringStop, "at-rest");
  await using driver = await EmbeddedDriver.open(device, { ramSize: 4 * MIB, depth: 16, num: 128, regionSize: 4 * MIB });
  const report = await driver.run({ requests: 120 });
  assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.faults], [0, 0, 0, []]);
  await driver.exportState();
  await assert.rejects(driver.continueHere(), withCode("BASE_NOT_SUPPORTED", /shadow mode/));
});

vmTest("vp_vdpa does a checked workload with packed rings", behindIommu, async () => {
  await using device = await openVdpa("vpblk");
  await using driver = await EmbeddedDriver.open(device, { ramSize: 4 * MIB, depth: 16, num: 128, packed: true, regionSize: 4 * MIB });
  const report = await driver.run({ requests: 120 });
  assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.faults], [0, 0, 0, []]);
  await driver.exportState();
});

vmTest("a region outside the IOMMU's range is refused with the range", behindIommu, async () => {
  await using device = await openVdpa("vpblk");
  using fd = createMemfd("ram", MIB);
  const high = { gpa: 2 ** 39, size: MIB, uaddr: 0, fd: fd.fd, fdOffset: 0 };
  await assert.rejects(device.setMemTable([high]), withCode("IOVA_OUTSIDE_RANGE", /0x0-0x7fffffffff/));
});

vmTest("svq iova knows the IOMMU's range and the hole in it that is for interrupts", behindIommu, async () => {
  const { range, reserved } = await svqJson("iova", "ranges", "vdpa:vpblk");
  assert.deepEqual(range, { first: "0x0", last: "0x7fffffffff" });
  assert.deepEqual(reserved, [{ first: "0xfee00000", last: "0xfeefffff", tag: "msi" }]);
  for (const [place, code] of [["0xfee00000", "IOVA_RESERVED"], ["0x8000000000", "IOVA_OUTSIDE_RANGE"]] as const) {
    const refused = await runSvq("iova", "alloc", "vdpa:vpblk", "4KiB", "--iova", place, "-j");
    assert.equal(refused.code, 1);
    assert.match(refused.stderr, new RegExp(`"${code}"`));
  }
  const tried = await runSvq("iova", "alloc", "vdpa:vpblk", "64KiB");
  assert.equal(tried.code, 0, tried.stderr);
  assert.match(tried.stdout, /^0x7ffff[0-9a-f]{5} 64KiB: the device takes it/);
});

vmTest("vp_vdpa gives doorbell pages", behindIommu, async () => {
  await using device = await openVdpa("vpblk");
  assert.deepEqual(device.doorbell(0), { fd: device.node.device.fd, offset: 0, size: 4096 });
});
