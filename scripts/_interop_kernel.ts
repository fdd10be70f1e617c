/**
 * The rows of the interoperability matrix that need the lab VM: they run tests of tests/lab, and a cell names those that it went by.
 *
 * @module
 */
import { type JunitCounts, parseJunit } from "./_junit.ts";

const ROOT = new URL("..", import.meta.url).pathname;
const RELAY = "tests/lab/kernel_lab_test.ts";
const VMM = "tests/lab/kernel_pair_lab_test.ts";
const runs = new Map<string, Promise<JunitCounts>>();

// A file's tests share their VMs: it is run once, whoever asks for one of them.
function runFile(file: string): Promise<JunitCounts> {
  let run = runs.get(file);
  if (run === undefined) runs.set(file, run = runNow(file));
  return run;
}

async function runNow(file: string): Promise<JunitCounts> {
  const report = await Deno.makeTempFile({ prefix: "svq-interop-", suffix: ".xml" });
  try {
    const args = ["test", "-A", "--no-check", `--junit-path=${report}`, file];
    await new Deno.Command(Deno.execPath(), { args, cwd: ROOT, stdin: "null", stdout: "null", stderr: "null" }).output();
    return parseJunit(await Deno.readTextFile(report));
  } finally {
    await Deno.remove(report);
  }
}

/** A cell that goes by one lab test. @throws Error where it failed, or could not be run */
function byTest(file: string, name: string): () => Promise<string> {
  return async () => {
    const { passedNames, failedNames, skippedNames } = await runFile(file);
    if (passedNames.includes(name)) return name;
    const skipped = skippedNames.find((other) => other.startsWith(name));
    if (skipped !== undefined) throw new Error(skipped);
    throw new Error(failedNames.includes(name) ? `the test "${name}" failed` : `there is no test "${name}"`);
  };
}

const NO_SUSPEND = "impossible on a running guest (no SUSPEND): it stays behind the relay's own rings and is stopped by not forwarding";

/** Rows in the lab VM (Linux 6.12). */
export const KERNEL_PAIRS = [
  {
    front: "embedded driver",
    device: "vhost-net",
    tasks: {
      "I/O": byTest(RELAY, "frames go through the relay and vhost-net to a tap, and answers come back, in every mode"),
      "switch under load": byTest(RELAY, "frames go through the relay and vhost-net to a tap, and answers come back, in every mode"),
      migrate: "not run by this script",
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
      migrate: "not run by this script",
    },
  },
  {
    front: "embedded driver",
    device: "VDUSE",
    tasks: {
      "I/O": byTest(RELAY, "a VDUSE device runs on the relay's own used ring from the start, changes to shadow, and stops drained"),
      "switch under load": NO_SUSPEND,
      migrate: "not run by this script",
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
