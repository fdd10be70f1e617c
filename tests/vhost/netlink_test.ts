import assert from "node:assert/strict";
import { decodeNetlink } from "../../src/uapi/netlink.ts";
import { listVdpaDevices } from "../../src/vhost/netlink.ts";
import { formatHolders } from "../../src/vhost/holders.ts";
import { nodeOfName, scanVdpa } from "../../src/vhost/sysfs.ts";
import type { SvqError } from "../../src/errors.ts";

// What Linux 6.12 was sent and what it answered, in a VM with one device of each kind.
const FAMILY_REQUEST = "2000000010000100010000000000000003010000090002007664706100000000";
const FAMILY_ANSWER = "d00000001000000001000000ac00000001020000090002007664706100000000060001002300000008000300010000000800040000000000" +
  "080005002500000090000600140001000800010002000000080002000e000000140002000800010003000000080002000b0000001400030008000100040000000800" +
  "02000b000000140004000800010005000000080002000e000000140005000800010006000000080002000e00000014000600080001000700000008000200" +
  "0b000000140007000800010008000000080002000b000000";
const DUMP_REQUEST = "1400000023000103020000000000000005010000";
const DUMP_ANSWER =
  "580000002300020002000000ac00000003010000100002007664706173696d5f6e657400090004006e65743000000000080005000100000008000600" +
  "00000000080007000300000006000800000100000600090001000000580000002300020002000000ac00000003010000100002007664706173696d5f626c6b0009" +
  "000400626c6b300000000008000500020000000800060000000000080007000100000006000800000100000600090001000000540000002300020002000000ac00" +
  "0000030100000a00020076647573650000000a00040075736572300000000800050002000000080006000000000008000700020000000600080000010000060009" +
  "0001000000600000002300020002000000ac00000003010000080001007063690011000200303030303a30303a30352e300000000008000400767030000800" +
  "05000200000008000600f41a0000080007000100000006000800000100000600090001000000";
const DONE = "140000000300020002000000ac00000000000000";

function recorded(...answers: string[]) {
  const sent: string[] = [];
  return {
    sent,
    send: (message: Uint8Array<ArrayBuffer>) => void sent.push(message.toHex()),
    receive: () => Uint8Array.fromHex(answers.shift()!),
  };
}

Deno.test("the vdpa family is asked for its devices as the kernel expects, and its answer is understood", () => {
  const channel = recorded(FAMILY_ANSWER, DUMP_ANSWER, DONE);
  const devices = listVdpaDevices(channel);
  assert.deepEqual(channel.sent, [FAMILY_REQUEST, DUMP_REQUEST]);
  assert.deepEqual(devices.map(({ name, managementDevice, deviceId, maxVqs }) => [name, managementDevice, deviceId, maxVqs]), [
    ["net0", "vdpasim_net", 1, 3],
    ["blk0", "vdpasim_blk", 2, 1],
    ["user0", "vduse", 2, 2],
    ["vp0", "pci/0000:00:05.0", 2, 1],
  ]);
});

Deno.test("a kernel without the family says so with the module to load", () => {
  const header = "24000000" + "02000000" + "01000000" + "ac000000";
  const channel = recorded(header + "feffffff" + FAMILY_REQUEST.slice(0, 32));
  assert.throws(() => listVdpaDevices(channel), (error: SvqError) => {
    assert.equal(error.code, "ENOENT");
    assert.match(error.hint!, /modprobe vdpa/);
    return true;
  });
});

Deno.test("lengths that do not fit are refused", () => {
  for (let cut = 1; cut < 32; cut++) {
    const bytes = Uint8Array.fromHex(FAMILY_ANSWER).slice(0, cut);
    assert.throws(() => decodeNetlink(bytes), { code: "BAD_RECORD" }, `${cut} bytes`);
  }
  assert.throws(() => decodeNetlink(Uint8Array.fromHex("18000000230000000200000000000000050100000300ffff")), { code: "BAD_RECORD" });
});

/** A sysfs with a simulator, a VDUSE device without driver and one on PCI that virtio_vdpa has. */
async function fakeSysfs(): Promise<{ sys: string; remove: () => Promise<void> }> {
  const root = await Deno.makeTempDir();
  const make = (path: string) => Deno.mkdir(`${root}/${path}`, { recursive: true });
  const link = (target: string, path: string) => Deno.symlink(`${root}/${target}`, `${root}/${path}`);
  await make("devices/blk0/vhost-vdpa-1");
  await make("devices/virtual/vduse/user0/user0");
  await make("devices/pci0000:00/0000:00:05.0/vp0");
  await make("bus/vdpa/devices");
  for (const driver of ["bus/vdpa/drivers/vhost_vdpa", "bus/vdpa/drivers/virtio_vdpa", "bus/pci/drivers/vp-vdpa"]) await make(driver);
  await link("devices/blk0", "bus/vdpa/devices/blk0");
  await link("devices/virtual/vduse/user0/user0", "bus/vdpa/devices/user0");
  await link("devices/pci0000:00/0000:00:05.0/vp0", "bus/vdpa/devices/vp0");
  await link("bus/vdpa/drivers/vhost_vdpa", "devices/blk0/driver");
  await link("bus/vdpa/drivers/virtio_vdpa", "devices/pci0000:00/0000:00:05.0/vp0/driver");
  await link("bus/pci/drivers/vp-vdpa", "devices/pci0000:00/0000:00:05.0/driver");
  return { sys: root, remove: () => Deno.remove(root, { recursive: true }) };
}

Deno.test("sysfs and netlink together tell node, drivers and parent of each device", async () => {
  const { sys, remove } = await fakeSysfs();
  const netlink = () => listVdpaDevices(recorded(FAMILY_ANSWER, DUMP_ANSWER, DONE));
  assert.deepEqual(
    scanVdpa({ sys, netlink }).map(({ name, node, busDriver, driver, parent }) => [name, node, busDriver, driver, parent]),
    [
      ["blk0", "/dev/vhost-vdpa-1", "vhost_vdpa", "vdpasim_blk", undefined],
      ["user0", undefined, undefined, "vduse", "user0"],
      ["vp0", undefined, "virtio_vdpa", "vp-vdpa", "0000:00:05.0"],
    ],
  );
  assert.equal(nodeOfName("blk0", { sys, netlink }).node, "/dev/vhost-vdpa-1");
  assert.throws(() => nodeOfName("user0", { sys, netlink }), { code: "MODULE_MISSING" });
  assert.throws(() => nodeOfName("vp0", { sys, netlink }), { code: "NOT_VHOST" });
  assert.throws(() => nodeOfName("x", { sys, netlink }), { code: "NO_SUCH_DEVICE" });
  await remove();
});

Deno.test("a host without a vdpa bus has no devices, and netlink is not even asked", () => {
  const netlink = () => {
    throw new Error("asked");
  };
  assert.deepEqual(scanVdpa({ sys: "/nonexistent", netlink }), []);
});

Deno.test("holders are named by process id and name", () => {
  assert.equal(formatHolders([{ pid: 7, name: "qemu-system-x86" }, { pid: 9, name: "svq" }]), "7 qemu-system-x86, 9 svq");
});
