/**
 * The rows of the interoperability matrix that need the lab VM: they run tests of tests/lab, and a cell names those that it went by.
 *
 * @module
 */
import { parseJunit } from "./_junit.ts";

const ROOT = new URL("..", import.meta.url).pathname;
const RELAY = "tests/lab/kernel_lab_test.ts";
const VMM = "tests/lab/kernel_pair_lab_test.ts";
/** A VM boots, its kernel emulated, and a test runs a nested QEMU in it: far above what a machine with other work needs. */
const DEADLINE_MS = 15 * 60_000;
const runs = new Map<string, Promise<string>>();

/** Runs one test of a file; the other tests of its VM are left out, which would take long. @returns the JUnit report */
async function runOne(file: string, name: string): Promise<string> {
  const report = await Deno.makeTempFile({ prefix: "svq-interop-", suffix: ".xml" });
  try {
    const { code, signal } = await new Deno.Command(Deno.execPath(), {
      args: ["test", "-A", "--no-check", `--junit-path=${report}`, file],
      cwd: ROOT,
      env: { SVQ_LAB_FILTER: name, NO_COLOR: "1" },
      ...{ stdin: "null", stdout: "null", stderr: "null", signal: AbortSignal.timeout(DEADLINE_MS) },
    }).output();
    if (signal !== null) throw new Error(`the test "${name}" did not end within ${DEADLINE_MS / 60_000} minutes`);
    const xml = await Deno.readTextFile(report);
    if (!xml.includes("<testcase")) throw new Error(`the test "${name}" ended with ${code} and said nothing`);
    return xml;
  } finally {
    await Deno.remove(report);
  }
}

/** A cell that goes by one lab test. @throws Error where it failed, or could not be run */
function byTest(file: string, name: string): () => Promise<string> {
  return async () => {
    let run = runs.get(name);
    if (run === undefined) runs.set(name, run = runOne(file, name));
    const { passedNames, skippedNames } = parseJunit(await run);
    if (passedNames.includes(name)) return name;
    throw new Error(skippedNames.find((other) => other.startsWith(name)) ?? `the test "${name}" failed`);
  };
}

const NO_GUEST = "impossible: `svq drive` has no memory to migrate (`svq migrate run` has tests of its own)";
const NO_SUSPEND = "impossible on a running guest (no SUSPEND): it stays behind the relay's own rings and is stopped by not forwarding";

/** Rows in the lab VM (Linux 6.12). */
export const KERNEL_PAIRS = [
  {
    front: "embedded driver",
    device: "vhost-net",
    tasks: {
      "I/O": byTest(RELAY, "frames go through the relay and vhost-net to a tap, and answers come back, in every mode"),
      "switch under load": byTest(RELAY, "frames go through the relay and vhost-net to a tap, and answers come back, in every mode"),
      migrate: NO_GUEST,
    },
  },
  {
    front: "embedded driver",
    device: "vdpa_sim",
    tasks: {
      "I/O": byTest(VMM, "svq drive does a checked workload on vdpa_sim_blk through svq relay run in mode passthrough"),
      "switch under load": byTest(
        RELAY,
        "modes change under load on vdpa_sim_blk, and the device leaves the guest's used ring alone after each switch",
      ),
      migrate: NO_GUEST,
    },
  },
  {
    front: "embedded driver",
    device: "VDUSE",
    tasks: {
      "I/O": byTest(RELAY, "a VDUSE device runs on the relay's own used ring from the start, changes to shadow, and stops drained"),
      "switch under load": NO_SUSPEND,
      migrate: NO_GUEST,
    },
  },
  {
    front: "QEMU 10",
    device: "vdpa_sim",
    tasks: {
      "I/O": byTest(VMM, "a nested QEMU boots from vdpa_sim_blk through svq in mode passthrough, and its sectors are on the disk"),
      "switch under load": "not run by this script",
      migrate: byTest(VMM, "svq migrate vm takes a guest from one nested QEMU and vDPA device to another, and its disk is right"),
    },
  },
];
