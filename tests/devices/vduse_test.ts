import assert from "node:assert/strict";
import { SimDevice } from "../../src/devices/sim_device.ts";
import { VduseDevice } from "../../src/devices/vduse.ts";
import type { SvqError } from "../../src/errors.ts";

const MIB = 1 << 20;

function withCode(code: string, text: RegExp): (error: SvqError) => true {
  return (error) => {
    assert.equal(error.code, code, error.stack);
    assert.match(`${error.message}\n${error.hint}`, text);
    return true;
  };
}

Deno.test("names that cannot lie in /dev/vduse are refused before anything is made", async () => {
  await using disk = await SimDevice.open({ kind: "blk", size: MIB });
  for (const name of ["", "a/b", "control", "..", "x".repeat(256)]) {
    await assert.rejects(VduseDevice.create(name, disk), withCode("BAD_NAME", /slash/), name);
  }
});

Deno.test("a loopback device cannot be a VDUSE device, since it is of no virtio type", async () => {
  await using device = await SimDevice.open({ kind: "loopback" });
  await assert.rejects(VduseDevice.create("loop", device), withCode("NO_DEVICE_TYPE", /sim:loopback/));
});

let hasVduse = true;
try {
  Deno.statSync("/dev/vduse/control");
} catch {
  hasVduse = false;
}

Deno.test({
  name: "without the module the error names it",
  ignore: hasVduse,
  fn: async () => {
    await using disk = await SimDevice.open({ kind: "blk", size: MIB });
    await assert.rejects(VduseDevice.create("disk", disk), withCode("MODULE_MISSING", /modprobe vduse/));
  },
});
