/**
 * svq probe on the kernel's real devices, in the lab VM: what it says is what the drivers of Linux 6.12 are known to have.
 */
import assert from "node:assert/strict";
import { runCli } from "../../../src/cli/app.ts";
import type { Sink } from "../../../src/cli/output.ts";
import { openDevice } from "../../../src/devices/open.ts";
import { labMachines } from "../../support/lab_machines.ts";
import { SVQ_IN_VM, vdpaNode, vmTest } from "../../support/lab_vm.ts";
import { assertMatchesSchema } from "../../support/schema.ts";

const { plain } = labMachines(import.meta.url);

/** svq, in this process. */
async function svq(...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  const texts = { stdout: "", stderr: "" };
  const sink = (name: keyof typeof texts): Sink => ({ isTerminal: false, write: (text) => void (texts[name] += text) });
  const code = await runCli(args, { stdout: sink("stdout"), stderr: sink("stderr"), env: (name) => Deno.env.get(name) });
  return { code, ...texts };
}

const everywhere = { first: "0x0", last: "0xffffffffffffffff" };

/** What a probe must say of each device of this VM. */
const TABLE = {
  net0: {
    ...{ device_id: 1, features: "0x308830028", backend_features: "0x17e", vring_num_max: 256, iova_range: everywhere },
    ...{ config_size: 24, queues: 3, groups: 2, vring_groups: [0, 0, 1], address_spaces: 2, suspend: true, resume: true },
    ...{ driver: "vdpasim_net", ring_stop: "each", doorbell: false },
  },
  blk0: {
    ...{ device_id: 2, features: "0x308007646", backend_features: "0x17e", vring_num_max: 256, iova_range: everywhere },
    ...{ config_size: 96, queues: 1, groups: 1, vring_groups: [0], address_spaces: 1, suspend: true, resume: true },
    ...{ driver: "vdpasim_blk", ring_stop: "each", doorbell: false },
  },
  user0: {
    ...{ device_id: 2, features: "0x331007644", backend_features: "0xe", vring_num_max: 256, iova_range: everywhere },
    ...{ config_size: 96, queues: 2, groups: 1, address_spaces: 1, suspend: false, resume: false },
    ...{ driver: "vduse", ring_stop: "at-rest", doorbell: false },
  },
};

vmTest("svq probe lists the devices and who has them, and opens none", plain, async () => {
  await using _device = await openDevice("vdpa:blk0");
  const { code, stdout, stderr } = await svq("probe", "-j");
  assert.equal(code, 0, stderr);
  assertMatchesSchema("probe", stdout);
  const devices = JSON.parse(stdout).devices as Record<string, unknown>[];
  assert.deepEqual(devices.map((device) => [device.name ?? device.address, device.driver ?? null, device.opened]), [
    ["blk0", "vdpasim_blk", false],
    ["net0", "vdpasim_net", false],
    ["user0", "vduse", false],
    ["/dev/vhost-net", null, false],
  ]);
  assert.equal((devices[0]!.in_use_by as { pid: number }).pid, Deno.pid);
});

vmTest("svq probe --open says of each device what its driver is known to have, and one in use hides no other", plain, async () => {
  const { code, stdout, stderr } = await svq("probe", "-j", "--open");
  assert.equal(code, 0, stderr);
  assertMatchesSchema("probe", stdout);
  const devices = JSON.parse(stdout).devices as Record<string, unknown>[];
  for (const [name, expected] of Object.entries(TABLE)) {
    const found = devices.find((device) => device.name === name)!;
    assert.deepEqual(Object.fromEntries(Object.keys(expected).map((key) => [key, found[key]])), expected);
  }
  assert.equal(devices.at(-1)!.features, "0x1033d008000");
  const blk = devices.find((device) => device.name === "blk0")!;
  assert.equal((blk.config as { capacity: number }).capacity, 262144);
  await using _device = await openDevice("vdpa:blk0");
  const again = JSON.parse((await svq("probe", "-j", "--open")).stdout).devices as Record<string, unknown>[];
  assert.equal((again[0]!.error as { code: string }).code, "DEVICE_IN_USE");
  assert.equal(again[1]!.opened, true);
  const named = await svq("probe", "vdpa:blk0");
  assert.equal(named.code, 1);
  assert.match(named.stderr, new RegExp(`in use by ${Deno.pid} `));
});

vmTest("without the right to open a node svq says so, and exits 4", plain, async () => {
  const node = vdpaNode("blk0");
  await Deno.chmod(node, 0);
  // Root may do it all the same, unless that is taken away.
  const rights = "-dac_override,-dac_read_search";
  const run = [...SVQ_IN_VM, "probe", node];
  const { code, stderr } = await new Deno.Command("setpriv", { args: [`--bounding-set=${rights}`, `--inh-caps=${rights}`, ...run] })
    .output();
  await Deno.chmod(node, 0o600);
  const text = new TextDecoder().decode(stderr);
  assert.match(text, /permission denied/);
  assert.equal(code, 4, text);
});
