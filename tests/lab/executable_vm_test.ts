// The executable on a machine that has nothing else: the lab VM, whose Deno it does not use.
import assert from "node:assert/strict";
import { runInVm } from "../../scripts/lab/vm_run.ts";
import { compile } from "../support/executable_suite.ts";
import { unavailable } from "../support/lab_vm.ts";
import { assertMatchesSchema } from "../support/schema.ts";
import { TempDir } from "../support/temp.ts";

const NAME = "the executable alone, with an empty environment, probes the lab VM's devices and relays a disk of it";

// One document a line. A copy in the VM's own memory: /lab is a share of the host.
const COMMANDS = `set -e
mkdir /tmp/alone && cp /lab/files/svq /tmp/alone/svq && chmod 755 /tmp/alone/svq && cd /tmp/alone
svq() { env -i SVQ_RUNTIME_DIR=/tmp/run /tmp/alone/svq "$@"; }
svq version -j
svq probe --open -j
svq relay start --name r --front unix:/tmp/front --device vdpa:blk0 -j
svq drive unix:/tmp/front --requests 200 -j
svq relay stop r -j`;

Deno.test({ name: unavailable === null ? NAME : `${NAME} (skipped: ${unavailable})`, ignore: unavailable !== null }, async () => {
  using place = new TempDir();
  await compile(["--kind=packed", `--output=${place.join("svq")}`]);
  const { code, stdout, stderr } = await runInVm(["sh", "-c", COMMANDS], {
    modules: ["vhost_vdpa", "vdpa_sim_blk"],
    setup: ["vdpa dev add name blk0 mgmtdev vdpasim_blk"],
    files: { svq: Deno.readFileSync(place.join("svq")) },
    timeoutMs: 240_000,
  });
  assert.equal(code, 0, stderr + stdout);
  const documents = stdout.trimEnd().split("\n").map((line) => {
    const document = JSON.parse(line);
    assertMatchesSchema(document.schema, line);
    return document;
  });
  const [version, probe, started, relayed] = documents;
  assert.equal(version.packaging, "packed");
  assert.deepEqual(probe.devices.map((device: Record<string, unknown>) => [device.address, device.error]), [["/dev/vhost-vdpa-0", null]]);
  const { requests } = relayed;
  assert.deepEqual([requests.completed, requests.lost, requests.duplicated, requests.corrupted], [200, 0, 0, 0]);
  assert.equal(started.name, "r");
  assert.equal(documents.length, 5);
});
