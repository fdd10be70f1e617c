/**
 * svq device run blk --vduse: the embedded disk as a vDPA device of the kernel, in the lab VM.
 */
import assert from "node:assert/strict";
import { openDevice } from "../../src/devices/open.ts";
import { EmbeddedDriver } from "../../src/drivers/embedded_driver.ts";
import { VhostVdpa } from "../../src/vhost/vdpa.ts";
import { MAIN } from "../support/cli.ts";
import { vmTest, type VmTestOptions } from "../support/lab_vm.ts";
import { Process } from "../support/process.ts";
import { waitUntil } from "../support/wait.ts";

const MIB = 1 << 20;
const PATIENCE_MS = 180_000;

/** svq as a process of its own: who serves a VDUSE device must not be who waits for it. */
function svq(...args: string[]): Process {
  return new Process(Deno.execPath(), {
    args: ["run", "-A", "--quiet", "--cached-only", "--no-check", "--no-lock", MAIN, ...args],
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

vmTest("a disk served over VDUSE does a checked workload, stops at rest, goes on, and takes the next driver", onVhost, async () => {
  await using _server = await serve("mine", "--size", "16MiB", "--packed", "--queues", "2", "--num", "256");
  for (const packed of [false, true]) {
    await using device = await openVdpa("mine");
    assert.deepEqual([device.info.deviceId, device.info.queueNum, device.info.ringStop], [2, 2, "at-rest"]);
    const options = { ramSize: 4 * MIB, depth: 16, num: 128, queues: 2, packed, regionSize: 4 * MIB };
    await using driver = await EmbeddedDriver.open(device, options);
    for (let part = 0; part < 2; part++) {
      const report = await driver.run({ requests: 100 * (part + 1) });
      assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.faults], [0, 0, 0, []], `packed ${packed}`);
      assert.ok(report.completed >= 100 * (part + 1), `${report.completed} requests`);
      if (part === 0) {
        await driver.exportState();
        await driver.continueHere();
      }
    }
  }
});

vmTest("SIGTERM takes the device off the bus and destroys it, once its user has let go of it", onVhost, async () => {
  await using server = await serve("passing", "--size", "1MiB");
  assert.ok(exists("/dev/vduse/passing") && exists("/sys/bus/vdpa/devices/passing"));
  {
    await using _device = await openVdpa("passing");
    server.process.kill("SIGTERM");
    await server.process.stderr.wait(new RegExp(`passing is in use by ${Deno.pid} .*waiting`), { timeoutMs: PATIENCE_MS });
  }
  await server.process.expectExit(0, PATIENCE_MS);
  assert.ok(!exists("/dev/vduse/passing") && !exists("/sys/bus/vdpa/devices/passing"));
});

vmTest("a name that is in use is refused, and what a killed server left behind is replaced", onVhost, async () => {
  await using first = await serve("again", "--size", "1MiB");
  await using second = svq("device", "run", "blk", "--vduse", "again", "--size", "1MiB");
  await second.expectExit(1, PATIENCE_MS);
  await second.stderr.done;
  assert.match(second.stderr.text, /There is a VDUSE device again already.*\n.*vdpa dev del again/);
  first.process.kill("SIGKILL");
  await first.process.status;
  assert.equal((await new Deno.Command("vdpa", { args: ["dev", "del", "again"] }).output()).code, 0);
  assert.ok(exists("/dev/vduse/again"), "left behind");
  await using _third = await serve("again", "--size", "1MiB");
});

vmTest("svq drive does a checked workload on the device", onVhost, async () => {
  await using _server = await serve("driven", "--size", "16MiB", "--latency", "1ms", "--jitter", "1ms");
  await using drive = svq("drive", "vdpa:driven", "--requests", "200", "--region", "4MiB", "--ram", "4MiB", "-j");
  await drive.expectExit(0, PATIENCE_MS);
  await drive.stdout.done;
  const report = JSON.parse(drive.stdout.text);
  assert.deepEqual([report.requests.lost, report.requests.duplicated, report.requests.corrupted], [0, 0, 0]);
  assert.ok(report.requests.completed >= 200);
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

vmTest("without the module the error names it", { file: import.meta.url, modules: ["vhost_vdpa"] }, async () => {
  await using server = svq("device", "run", "blk", "--vduse", "none");
  await server.expectExit(3, PATIENCE_MS);
  await server.stderr.done;
  assert.match(server.stderr.text, /modprobe vduse/);
});
