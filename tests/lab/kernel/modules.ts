/**
 * Modules that are missing or loaded in another way, in the lab VM. They change the machine: these tests come last.
 */
import assert from "node:assert/strict";
import { openDevice } from "../../../src/devices/open.ts";
import { createMemfd } from "../../../src/ffi/mod.ts";
import { VhostVdpa } from "../../../src/vhost/vdpa.ts";
import { runSvq } from "../../support/lab_svq.ts";
import { labMachines } from "../../support/lab_machines.ts";
import { vmTest } from "../../support/lab_vm.ts";
import { withCode } from "../../support/with_code.ts";

const MIB = 1 << 20;
const { plain } = labMachines(import.meta.url);

async function shell(script: string): Promise<void> {
  const { code, stderr } = await new Deno.Command("bash", { args: ["-ec", script] }).output();
  assert.equal(code, 0, new TextDecoder().decode(stderr));
}

vmTest("where the driver pins memory, a low memlock limit is refused with the limit that is needed", plain, async () => {
  await shell(
    "modprobe -r vdpa_sim_blk vdpa_sim_net vdpa_sim; modprobe vdpa_sim use_va=0; modprobe vdpa_sim_blk; vdpa dev add name blk0 mgmtdev vdpasim_blk",
  );
  const limit = (kib: string) => new Deno.Command("prlimit", { args: ["--pid", String(Deno.pid), `--memlock=${kib}`] }).output();
  await limit(`${8 * MIB}:unlimited`);
  await using device = await openDevice("vdpa:blk0");
  assert.ok(device instanceof VhostVdpa);
  using fd = createMemfd("ram", 64 * MIB);
  const region = { gpa: 0, size: 64 * MIB, uaddr: 0, fd: fd.fd, fdOffset: 0 };
  await assert.rejects(device.setMemTable([region]), withCode("MEMLOCK", /64MiB.*8MiB.*65536 KiB/s));
  await limit("unlimited:unlimited");
  await device.setMemTable([region]);
  assert.equal(device.maps.counters.mapped, 1);
  await device.close();
  await limit(`${8 * MIB}:unlimited`);
  const tried = await runSvq("iova", "alloc", "vdpa:blk0", "64MiB", "-j");
  assert.equal(tried.code, 1);
  assert.match(tried.stderr, /"MEMLOCK".*LimitMEMLOCK/);
});

vmTest("a vDPA device without vhost_vdpa is refused with the module's name", plain, async () => {
  await shell("modprobe -r vhost_vdpa");
  await assert.rejects(openDevice("vdpa:blk0"), withCode("MODULE_MISSING", /modprobe vhost_vdpa/));
  await assert.rejects(openDevice("vdpa:other"), withCode("NO_SUCH_DEVICE", /There are: blk0/));
  await assert.rejects(openDevice("/dev/vhost-vdpa-0"), withCode("NO_SUCH_DEVICE", /vdpa dev add/));
});
