import assert from "node:assert/strict";
import { svq } from "../../support/cli.ts";
import { assertMatchesSchema } from "../../support/schema.ts";

Deno.test("svq probe on a host without kernel devices says how to get one and succeeds", async () => {
  const hasDevices = await Deno.stat("/sys/bus/vdpa/devices").then(() => true, () => false) ||
    await Deno.stat("/dev/vhost-net").then(() => true, () => false);
  const { code, stdout } = await svq(["probe", "-j"]);
  assert.equal(code, 0);
  assertMatchesSchema("probe", stdout);
  if (hasDevices) return;
  const document = JSON.parse(stdout);
  assert.deepEqual(document.devices, []);
  assert.match(document.hint, /vdpa dev add/);
});

Deno.test("one device that cannot be asked hides no other, and decides the exit code", async () => {
  const { code, stdout, stderr } = await svq(["probe", "-j", "unix:/nonexistent.sock", "sim:blk"]);
  assert.equal(code, 3);
  assertMatchesSchema("probe", stdout);
  const [missing, sim] = JSON.parse(stdout).devices;
  assert.equal(missing.error.code, "ENOENT");
  assert.equal(sim.device_name, "blk");
  assert.equal(sim.migratable.possible, true);
  assertMatchesSchema("error", stderr);
});

Deno.test("svq probe --require exits 5 when a feature is missing", async () => {
  assert.equal((await svq(["probe", "sim:blk", "--require", "EVENT_IDX,VERSION_1"])).code, 0);
  const { code, stderr } = await svq(["probe", "sim:blk", "--require", "RING_PACKED"]);
  assert.equal(code, 5);
  assert.match(stderr, /lacks RING_PACKED/);
  assert.equal((await svq(["probe", "--require", "EVENT_IDX"])).code, 2, "a plain scan asks nobody");
});
