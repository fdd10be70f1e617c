/**
 * Balloons and virtio-mem of real QEMUs, found over QMP: no guest runs, the devices are there from the start.
 */
import assert from "node:assert/strict";
import { qemuProgram, type QemuVersion } from "../../scripts/lab/host.ts";
import { reclaimingDevices } from "../../src/migration/pinned_memory.ts";
import { QmpClient } from "../../src/migration/qmp.ts";
import { runInProcess } from "../support/fake_host.ts";
import { Process } from "../support/process.ts";
import { labTest } from "../support/real_parts.ts";
import { waitUntil } from "../support/wait.ts";

async function startQemu(version: QemuVersion, socket: string, ...devices: string[]): Promise<Process> {
  const { command, args, env } = await qemuProgram(version, "qemu-system-x86_64");
  const words = ["-accel", "tcg", "-M", "q35", "-m", "64M,slots=2,maxmem=1G", "-nodefaults", "-display", "none", "-S"];
  const qemu = new Process(command, {
    name: `QEMU ${version}`,
    env,
    args: [...args, ...words, "-qmp", `unix:${socket},server=on,wait=off`, ...devices],
  });
  const listens = () => {
    try {
      return Deno.statSync(socket).isSocket === true;
    } catch {
      return false;
    }
  };
  await waitUntil("the monitor", () => listens());
  return qemu;
}

for (const version of ["7.2", "10"] as const) {
  await labTest(
    `what gives guest memory back is found in a real QEMU ${version}, and svq doctor says so`,
    [`qemu-${version}`],
    async ({ folder }) => {
      const [with_, without] = [folder.join("with.qmp"), folder.join("without.qmp")];
      const memory = ["-object", "memory-backend-memfd,id=vm,size=128M,share=on", "-device", "virtio-mem-pci,id=plug,memdev=vm"];
      await using _one = await startQemu(
        version,
        with_,
        "-device",
        "virtio-balloon-pci,id=bal,free-page-reporting=on",
        ...memory,
      );
      await using _other = await startQemu(version, without, "-device", "virtio-rng-pci");
      {
        await using qmp = await QmpClient.connect(with_);
        const found = await reclaimingDevices(qmp);
        assert.deepEqual(found.sort((a, b) => a.path < b.path ? -1 : 1), [
          { path: "/machine/peripheral/bal", kind: "balloon", freePageReporting: true },
          { path: "/machine/peripheral/plug", kind: "virtio-mem", freePageReporting: false },
        ]);
      }
      {
        await using qmp = await QmpClient.connect(without);
        assert.deepEqual(await reclaimingDevices(qmp), []);
      }
      const { stdout } = await runInProcess(["doctor", "-j", "--qmp", with_, "--qmp", without, "--qmp", folder.join("nobody")]);
      const checks = (JSON.parse(stdout).checks as { name: string; status: string; found: string }[])
        .filter(({ name }) => name.startsWith("pinned-memory"));
      assert.deepEqual(checks.map(({ status }) => status), ["missing", "ok", "unknown"]);
      assert.match(checks[0]!.found, /bal \(balloon with free page reporting\)/);
      assert.match(checks[0]!.found, /plug \(virtio-mem\)/);
    },
  );
}
