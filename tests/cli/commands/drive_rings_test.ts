import assert from "node:assert/strict";
import { svq } from "../../support/cli.ts";
import { TempDir } from "../../support/temp.ts";

for (const packed of [false, true]) {
  Deno.test(`svq drive --save-rings shows the rings behind a device that keeps requests, without a relay (${packed ? "packed" : "split"})`, async () => {
    using folder = new TempDir();
    const image = folder.join("rings.json");
    // It answers after an hour: what was offered stays at the device.
    const device = `sim:loopback,latency=1h${packed ? ",packed" : ""}`;
    const driven = await svq([
      ...["drive", device, "--requests", "5", "--depth", "5", "--drain-timeout", "300ms", "--save-rings", image],
      ...(packed ? ["--packed"] : []),
    ], {});
    assert.equal(driven.code, 1, driven.stderr);
    const { code, stdout, stderr } = await svq(["-j", "vring", "dump", "--image", image], {});
    assert.equal(code, 0, stderr);
    const { queues, consistent } = JSON.parse(stdout);
    assert.equal(consistent, true);
    assert.deepEqual([queues.length, queues[0].side, queues[0].mode, queues[0].layout], [
      1,
      "guest",
      "driver",
      packed ? "packed" : "split",
    ]);
    assert.equal(queues[0].chains.length, 5);
    const verified = await svq(["vring", "verify", "--image", image], {});
    assert.equal(verified.code, 0, verified.stdout);
  });
}

Deno.test("Rings that find the disk full take nothing away of the report: the document is whole, and exit 1 says what is missing", async () => {
  using folder = new TempDir();
  const rings = folder.join("rings.json");
  const drive = (file: string) => svq(["-j", "drive", "sim:loopback", "--requests", "5", "--save-rings", file], {});
  const full = await drive("/dev/full");
  assert.deepEqual([full.code, JSON.parse(full.stdout).requests.completed], [1, 5]);
  assert.equal(JSON.parse(full.stderr).error.code, "UNWRITABLE_FILE");
  assert.equal((await drive(rings)).code, 0);
  const shown = await svq(["-j", "vring", "dump", "--image", rings, "--save", "/dev/full"], {});
  assert.deepEqual([shown.code, JSON.parse(shown.stdout).queues.length], [1, 1]);
  assert.equal(JSON.parse(shown.stderr).error.code, "UNWRITABLE_FILE");
});

Deno.test("svq vring of a device's address says why its rings cannot be known, and what can be done", async () => {
  for (
    const [words, why] of [[["dump", "unix:/nonexistent"], /one front-end/], [
      ["verify", "/dev/vhost-vdpa-0"],
      /the one process that has the device open/,
    ]] as const
  ) {
    const { code, stdout, stderr } = await svq(["vring", ...words], {});
    assert.deepEqual([code, stdout], [5, ""]);
    assert.match(stderr, why);
    assert.match(stderr, /--save-rings/);
  }
});
