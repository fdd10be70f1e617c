/**
 * svq device run blk --vduse: the embedded disk as a vDPA device of the kernel, in the lab VM.
 */
import assert from "node:assert/strict";
import { runCli } from "../../src/cli/app.ts";
import type { Sink } from "../../src/cli/output.ts";
import { openDevice } from "../../src/devices/open.ts";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { VduseDevice } from "../../src/devices/vduse.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import type { SvqError } from "../../src/errors.ts";
import { ioctl, O, openFd } from "../../src/ffi/mod.ts";
import { encodeVduseConfig, VDUSE } from "../../src/uapi/vduse.ts";
import { VhostVdpa } from "../../src/vhost/vdpa.ts";
import { SVQ_IN_VM, vmTest, type VmTestOptions } from "../support/lab_vm.ts";
import { Process } from "../support/process.ts";
import { waitUntil } from "../support/wait.ts";

const MIB = 1 << 20;
const PATIENCE_MS = 180_000;

/** svq as a process of its own: who serves a VDUSE device must not be who waits for it. */
function svq(...args: string[]): Process {
  const [deno, ...run] = SVQ_IN_VM;
  return new Process(deno!, {
    args: [...run, ...args],
    name: "svq",
  });
}

/** A running `svq device run blk --vduse NAME --add`; stopped as a user would when disposed. */
async function serve(name: string, ...args: string[]): Promise<{ process: Process } & AsyncDisposable> {
  const process = svq("device", "run", "blk", "--vduse", name, "--add", ...args);
  const stop = async () => {
    process.kill("SIGTERM");
    await process.status;
    await process[Symbol.asyncDispose]();
  };
  try {
    await process.stderr.wait(/: ready, /, { timeoutMs: PATIENCE_MS });
  } catch (error) {
    await stop();
    throw error;
  }
  return { process, [Symbol.asyncDispose]: stop };
}

function exists(path: string): boolean {
  try {
    Deno.lstatSync(path);
    return true;
  } catch {
    return false;
  }
}

async function openVdpa(name: string): Promise<VhostVdpa> {
  const device = await openDevice(`vdpa:${name}`);
  assert.ok(device instanceof VhostVdpa);
  return device;
}

const onVhost: VmTestOptions = {
  file: import.meta.url,
  modules: ["vhost_vdpa", "vduse"],
  timeoutMs: 900_000,
};

// A process takes long to start in the VM: one serves all tests of the group, and the last test stops it.
let shared: ReturnType<typeof serve> | undefined;
const mine = () => shared ??= serve("mine", "--size", "16MiB", "--packed", "--queues", "2", "--num", "256");

for (const packed of [false, true]) {
  const layout = packed ? "packed" : "split";
  vmTest(`a disk served over VDUSE does a checked workload on ${layout} rings, stops at rest and goes on`, onVhost, async () => {
    await mine();
    await using device = await openVdpa("mine");
    assert.deepEqual([device.info.deviceId, device.info.queueNum, device.info.ringStop], [2, 2, "at-rest"]);
    const options = { ramSize: 4 * MIB, depth: 8, num: 128, queues: 2, packed, regionSize: 4 * MIB };
    await using driver = await EmbeddedDriver.open(device, options);
    for (let part = 0; part < 2; part++) {
      const report = await driver.run({ requests: 50 * (part + 1) });
      assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.faults], [0, 0, 0, []]);
      assert.ok(report.completed >= 50 * (part + 1), `${report.completed} requests`);
      if (part === 0) {
        await driver.exportState();
        await driver.continueHere();
      }
    }
  });
}

vmTest("svq drive does a checked workload on it", onVhost, async () => {
  await mine();
  let out = "";
  const sink: Sink = { isTerminal: false, write: (text) => void (out += text) };
  const err: Sink = { isTerminal: false, write: () => {} };
  const args = ["drive", "vdpa:mine", "--requests", "50", "--region", "4MiB", "--ram", "4MiB", "--depth", "8", "-j"];
  assert.equal(await runCli(args, { stdout: sink, stderr: err, env: () => undefined }), 0);
  const { requests } = JSON.parse(out);
  assert.deepEqual([requests.lost, requests.duplicated, requests.corrupted], [0, 0, 0]);
});

vmTest("a name that is in use is refused", onVhost, async () => {
  await mine();
  await using disk = await SimDevice.open({ kind: "blk", size: MIB });
  await assert.rejects(VduseDevice.create("mine", disk), (error: SvqError) => {
    assert.equal(error.code, "VDUSE_NAME_TAKEN");
    assert.match(error.hint!, /vdpa dev del mine/);
    return true;
  });
});

vmTest(
  "Linux 6.12 has API 0 and neither SUSPEND nor QUEUE_READY; closed on the bus, a device is left there with a warning",
  onVhost,
  async () => {
    await using disk = await SimDevice.open({ kind: "blk", size: MIB });
    const warnings: string[] = [];
    await using device = await VduseDevice.create("onbus", disk, { warn: (message) => warnings.push(message) });
    assert.deepEqual(device.agreement, { apiVersion: 0, queueReady: false, suspend: false });
    await device.attach();
    await device.close();
    assert.match(warnings.join(), /onbus is on the vdpa bus still.*vdpa dev del onbus/);
    // A second one of the name: EBUSY at its destruction, although nobody serves it.
    await using other = await SimDevice.open({ kind: "blk", size: MIB });
    await assert.rejects(VduseDevice.create("onbus", other), (error: SvqError) => error.code === "VDUSE_NAME_TAKEN");
    await new Deno.Command("vdpa", { args: ["dev", "del", "onbus"] }).output();
    await using again = await VduseDevice.create("onbus", other);
    assert.ok(exists("/dev/vduse/onbus"));
    await assert.rejects(VduseDevice.create("mine", other), (error: SvqError) => /in use/.test(error.message));
    void again;
  },
);

vmTest("without the rights that it takes, the error names them: no access to the control device, no CAP_NET_ADMIN", onVhost, async () => {
  const without = async (rights: string, ...args: string[]) => {
    const drop = [`--bounding-set=${rights}`, `--inh-caps=${rights}`, ...SVQ_IN_VM, ...args];
    const { code, stderr } = await new Deno.Command("setpriv", { args: drop }).output();
    return { code, text: new TextDecoder().decode(stderr) };
  };
  const run = ["device", "run", "blk", "--size", "1MiB", "--vduse", "denied"];
  const bus = await without("-net_admin", ...run, "--add");
  assert.equal(bus.code, 4, bus.text);
  assert.match(bus.text, /CAP_NET_ADMIN/);
  assert.ok(!exists("/dev/vduse/denied"), "nothing is left behind");
  await Deno.chmod("/dev/vduse/control", 0);
  const control = await without("-dac_override,-dac_read_search", ...run);
  await Deno.chmod("/dev/vduse/control", 0o600);
  assert.equal(control.code, 4, control.text);
  assert.match(control.text, /root/);
});

vmTest("what a process left behind that died is replaced, and closing leaves nothing behind", onVhost, async () => {
  const config = { name: "left", vendorId: 0, deviceId: 2, features: 1n << 33n, vqNum: 1, vqAlign: 4096, config: new Uint8Array(96) };
  {
    using control = openFd("/dev/vduse/control", O.RDWR);
    ioctl(control.fd, VDUSE.SET_API_VERSION, new Uint8Array(8), "VDUSE_SET_API_VERSION");
    ioctl(control.fd, VDUSE.CREATE_DEV, encodeVduseConfig(config), "VDUSE_CREATE_DEV");
  }
  assert.ok(exists("/dev/vduse/left"));
  await using disk = await SimDevice.open({ kind: "blk", size: MIB });
  {
    await using device = await VduseDevice.create("left", disk);
    await device.attach();
    assert.equal(device.listing?.driver, "vduse");
    await device.detach();
    assert.equal(device.listing, undefined);
  }
  assert.ok(!exists("/dev/vduse/left"));
});

vmTest("SIGTERM takes the device off the bus and destroys it, once its user has let go of it", onVhost, async () => {
  const server = await mine();
  assert.ok(exists("/dev/vduse/mine") && exists("/sys/bus/vdpa/devices/mine"));
  {
    await using _device = await openVdpa("mine");
    server.process.kill("SIGTERM");
    await server.process.stderr.wait(new RegExp(`mine is in use by ${Deno.pid} .*waiting`), { timeoutMs: PATIENCE_MS });
  }
  await server.process.expectExit(0, PATIENCE_MS);
  assert.ok(!exists("/dev/vduse/mine") && !exists("/sys/bus/vdpa/devices/mine"));
});

const onVirtio: VmTestOptions = {
  file: import.meta.url,
  modules: ["virtio_vdpa", "virtio_blk", "vduse"],
  timeoutMs: 900_000,
};

vmTest("through virtio_vdpa the kernel has it as a disk, and what it writes lies in the file", onVirtio, async () => {
  Deno.writeFileSync("/tmp/disk", new Uint8Array(8 * MIB).fill(0x5a));
  const before = new Set(Array.from(Deno.readDirSync("/sys/block"), ({ name }) => name));
  await using server = await serve("kerneldisk", "--file", "/tmp/disk");
  await server.process.stderr.wait(/taken by virtio_vdpa/);
  const names = () => Array.from(Deno.readDirSync("/sys/block"), ({ name }) => name).filter((name) => !before.has(name));
  await waitUntil("the disk", () => names().length === 1, PATIENCE_MS);
  const disk = `/dev/${names()[0]}`;
  const dd = async (...args: string[]) => {
    const { code, stderr } = await new Deno.Command("dd", { args }).output();
    assert.equal(code, 0, new TextDecoder().decode(stderr));
  };
  await dd(`if=${disk}`, "of=/tmp/copy", "bs=1M", "iflag=direct");
  assert.deepEqual(Deno.readFileSync("/tmp/copy"), Deno.readFileSync("/tmp/disk"));
  const pattern = crypto.getRandomValues(new Uint8Array(65536));
  Deno.writeFileSync("/tmp/pattern", pattern);
  await dd("if=/tmp/pattern", `of=${disk}`, "bs=64k", "seek=3", "oflag=direct", "conv=fsync");
  assert.deepEqual(Deno.readFileSync("/tmp/disk").subarray(3 * 65536, 4 * 65536), pattern);
  server.process.kill("SIGTERM");
  await server.process.expectExit(0, PATIENCE_MS);
  assert.deepEqual(names(), []);
});
