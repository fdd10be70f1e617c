/**
 * The embedded driver's workload migrated between the kernel's vDPA devices, in the lab VM: disks that two devices share, and
 * disks that are copied from one kind of device to another.
 */
import assert from "node:assert/strict";
import { openDevice } from "../../../src/devices/open.ts";
import { EmbeddedDriver } from "../../../src/drivers/embedded_driver.ts";
import { dupFd, type OwnedFd } from "../../../src/ffi/mod.ts";
import type { DriverState } from "../../../src/drivers/state.ts";
import { Relay } from "../../../src/relay/relay.ts";
import { DEFAULT_RELAY_CONFIG } from "../../../src/relay/relay_config.ts";
import { readDisk, writeDisk } from "../../support/lab_disk.ts";
import { startSvq } from "../../support/lab_svq.ts";
import { labMachines } from "../../support/lab_machines.ts";
import { vmTest } from "../../support/lab_vm.ts";
import { assertMatchesSchema } from "../../support/schema.ts";
import { waitUntil } from "../../support/wait.ts";

const { pair } = labMachines(import.meta.url);

const MIB = 1 << 20;
const REGION = 512 << 10;
const PATIENCE_MS = 180_000;

for (
  const [what, from, to] of [
    ["two vdpa_sim_blk that share their memory", "vdpa:sim0", "vdpa:sim1"],
    ["two VDUSE devices on one file", "vdpa:user0", "vdpa:user1"],
  ] as const
) {
  vmTest(`svq migrate run takes the workload from one to the other of ${what}, and no request is lost`, pair, async () => {
    const uri = `unix:/tmp/${from.slice(5)}.migration`;
    const listen = startSvq("migrate", "listen", uri, "--device", to, "-j");
    await waitUntil("the destination", () => listen.texts.stderr.includes("listening on"), PATIENCE_MS);
    const words = ["--device", from, "--mem", "4MiB", "--region", "1MiB", "--depth", "8", "--duration", "6s", "--timeout", "120s"];
    const run = startSvq("migrate", "run", "--to", uri, ...words, "--drain-timeout", "60s", "-j");
    assert.equal(await run.ended, 0, run.texts.stderr + run.texts.stdout + listen.texts.stderr);
    assertMatchesSchema("svq.migrate/1", run.texts.stdout);
    const { outcome, requests, memory_identical } = JSON.parse(run.texts.stdout);
    assert.deepEqual([outcome, memory_identical], ["completed", true]);
    assert.deepEqual([requests.lost, requests.duplicated, requests.corrupted], [0, 0, 0]);
    assert.ok(requests.completed > 0);
    assert.equal(await listen.ended, 0, listen.texts.stderr);
  });
}

/** A part of the workload through a relay on `address`, from the beginning or from where another part was stopped. */
async function part(address: string, requests: number, before?: { ram: OwnedFd; state: DriverState }) {
  await using device = await openDevice(address);
  await using relay = new Relay(device, { ...DEFAULT_RELAY_CONFIG }, { log: () => {}, error: ({ message }) => assert.fail(message) });
  // What vdpa_sim does not have is not taken of VDUSE either.
  const shape = { ramSize: 4 * MIB, depth: 8, num: 128, regionSize: REGION, eventIdx: false, indirect: false };
  await using driver = before === undefined
    ? await EmbeddedDriver.open(relay, shape)
    : await EmbeddedDriver.resume(relay, before.ram, before.state);
  // In mid-flight: the run is not ended, its requests are out when the rings are stopped.
  const run = before === undefined ? driver.run() : driver.finished();
  run.catch(() => {});
  const reached = async () => (await driver.report()).completed >= requests;
  await waitUntil(`${requests} requests on ${address}`, reached, PATIENCE_MS);
  return {
    report: await driver.report(),
    state: await driver.exportState(),
    ram: dupFd(driver.ram.fd),
  };
}

vmTest(
  "with its disk copied the workload goes from vdpa_sim_blk to VDUSE and back, and every sector is what was written",
  pair,
  async () => {
    let before: { ram: OwnedFd; state: DriverState } | undefined;
    let target = 0;
    let last = "";
    for (const address of ["vdpa:sim0", "vdpa:user0", "vdpa:sim1"]) {
      if (last !== "") {
        // Somebody else's bytes first, so that a copy that did nothing would be noticed.
        await writeDisk(address, new Uint8Array(REGION).fill(0xee));
        await writeDisk(address, await readDisk(last, REGION));
      }
      target += 100;
      const { report, state, ram } = await part(address, target, before);
      assert.deepEqual([report.duplicated, report.corrupted, report.faults], [0, 0, []]);
      before = { state, ram };
      last = address;
    }
    // The end of the workload, with nothing out any more.
    await using device = await openDevice(last);
    await using driver = await EmbeddedDriver.resume(device, before!.ram, before!.state);
    const report = await driver.stop(60_000);
    assert.deepEqual([report.lost, report.duplicated, report.corrupted, report.faults], [0, 0, 0, []]);
    assert.ok(report.completed >= target);
  },
);
