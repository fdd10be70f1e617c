import assert from "node:assert/strict";
import { svq } from "../../support/cli.ts";

for (const command of ["run", "start"]) {
  Deno.test(`relay ${command} promises no resilience for a guest with an IOMMU, whose requests in flight nobody records`, async () => {
    const both = ["--front", "unix:/nowhere/front.sock", "--device", "sim:blk", "--guest-iommu", "--resilient"];
    const { code, stderr } = await svq(["relay", command, ...both]);
    assert.equal(code, 2, stderr);
    assert.match(stderr, /--resilient does not go with --guest-iommu: what is in flight is not recorded/);
  });
}
