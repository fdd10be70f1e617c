/**
 * The lab VM has the devices that the other lab tests need, and they are what the drivers of Linux 6.12 are known to be.
 * Requests: include/uapi/linux/vhost.h.
 */
import assert from "node:assert/strict";
import { ioctl, O, openFd } from "../../../src/ffi/mod.ts";
import { labMachines } from "../../support/lab_machines.ts";
import { vdpaNode, vmTest } from "../../support/lab_vm.ts";

const { plain, behindIommu } = labMachines(import.meta.url);

const SET_OWNER = 0xaf01;
const readRequest = (number: number, size: number) => 0x80000000 + (size << 16) + 0xaf00 + number;

/** Asks with an _IOR request and gives the answer as one little-endian number per element of `sizes`. */
function ask(fd: number, name: string, number: number, ...sizes: readonly (1 | 2 | 4 | 8)[]): bigint[] {
  const record = new Uint8Array(sizes.reduce<number>((sum, size) => sum + size, 0));
  ioctl(fd, readRequest(number, record.length), record, name);
  let offset = 0;
  return sizes.map((size) => {
    const bytes = record.slice(offset, offset += size).reverse();
    return BigInt(`0x${bytes.toHex()}`);
  });
}

/** What a vhost-vdpa device says of itself, under the names of the requests. */
function describe(path: string): Record<string, bigint | bigint[]> {
  using device = openFd(path, O.RDWR | O.CLOEXEC);
  const { fd } = device;
  ioctl(fd, SET_OWNER, null, "SET_OWNER");
  const one = (name: string, number: number, size: 1 | 2 | 4 | 8) => ask(fd, name, number, size)[0]!;
  return {
    deviceId: one("GET_DEVICE_ID", 0x70, 4),
    features: one("GET_FEATURES", 0x00, 8),
    backendFeatures: one("GET_BACKEND_FEATURES", 0x26, 8),
    vringNum: one("GET_VRING_NUM", 0x76, 2),
    iovaRange: ask(fd, "GET_IOVA_RANGE", 0x78, 8, 8),
    configSize: one("GET_CONFIG_SIZE", 0x79, 4),
    vqsCount: one("GET_VQS_COUNT", 0x80, 4),
    groups: one("GET_GROUP_NUM", 0x81, 4),
    addressSpaces: one("GET_AS_NUM", 0x7a, 4),
  };
}

const everything = [0n, 2n ** 64n - 1n];
vmTest("/dev/vhost-net answers GET_FEATURES with what this kernel's vhost_net has", plain, () => {
  using device = openFd("/dev/vhost-net", O.RDWR | O.CLOEXEC);
  assert.deepEqual(ask(device.fd, "GET_FEATURES", 0x00, 8), [0x1033d008000n]);
});

vmTest("vdpa_sim_net describes itself as a network device with two groups", plain, () => {
  assert.deepEqual(describe(vdpaNode("net0")), {
    deviceId: 1n,
    features: 0x308830028n,
    backendFeatures: 0x17en,
    vringNum: 256n,
    iovaRange: everything,
    configSize: 24n,
    vqsCount: 3n,
    groups: 2n,
    addressSpaces: 2n,
  });
});

vmTest("vdpa_sim_blk describes itself as a block device that can suspend", plain, () => {
  assert.deepEqual(describe(vdpaNode("blk0")), {
    deviceId: 2n,
    features: 0x308007646n,
    backendFeatures: 0x17en,
    vringNum: 256n,
    iovaRange: everything,
    configSize: 96n,
    vqsCount: 1n,
    groups: 1n,
    addressSpaces: 1n,
  });
});

vmTest("A VDUSE device of qemu-storage-daemon describes itself as a block device that cannot suspend", plain, () => {
  assert.deepEqual(describe(vdpaNode("user0")), {
    deviceId: 2n,
    features: 0x331007644n,
    backendFeatures: 0xen,
    vringNum: 256n,
    iovaRange: everything,
    configSize: 96n,
    vqsCount: 2n,
    groups: 1n,
    addressSpaces: 1n,
  });
});

vmTest("vp_vdpa gives a packed block device behind a 39-bit IOMMU", behindIommu, () => {
  const { vqsCount: _, ...rest } = describe(vdpaNode("vpblk"));
  assert.deepEqual(rest, {
    deviceId: 2n,
    features: 0x10730006e54n,
    backendFeatures: 0x10en,
    vringNum: 256n,
    iovaRange: [0n, 2n ** 39n - 1n],
    configSize: 4096n,
    groups: 1n,
    addressSpaces: 1n,
  });
});

vmTest("vp_vdpa gives a network device, and the VM can speak to the QEMU that has it", behindIommu, async () => {
  assert.equal(describe(vdpaNode("vpnet")).deviceId, 1n);
  const { stdout } = await new Deno.Command("lab-qmp", { args: ["query-status"] }).output();
  assert.match(new TextDecoder().decode(stdout), /"status": "running"/);
  const resized = await new Deno.Command("lab-qmp", { args: ["block_resize", '{"device":"vpdisk","size":33554432}'] }).output();
  assert.equal(resized.code, 0, new TextDecoder().decode(resized.stdout));
});
