import assert from "node:assert/strict";
import fc from "fast-check";
import { type CapturedFrame, join, pcapngFrame, pcapngHeader, pcapngStatistics } from "../../src/net/pcapng.ts";
import { decodePcapng } from "../support/pcapng.ts";

Deno.test("A file has what was captured, by the rules of the format", () => {
  const frame: fc.Arbitrary<CapturedFrame> = fc.record({
    timeNs: fc.bigInt({ min: 0n, max: (1n << 62n) - 1n }),
    queue: fc.nat(255),
    direction: fc.constantFrom("in" as const, "out" as const),
    length: fc.nat(65535),
    bytes: fc.uint8Array({ maxLength: 100 }),
    dropped: fc.nat(3),
  });
  fc.assert(
    fc.property(fc.array(frame, { maxLength: 10 }), fc.nat(0xffff_ffff), (frames, dropped) => {
      const file = join([pcapngHeader("vm1-net", 100), ...frames.map(pcapngFrame), pcapngStatistics(1n << 40n, dropped)]);
      const read = decodePcapng(file);
      assert.deepEqual(read.interface, { name: "vm1-net", linkType: 1, snapLength: 100 });
      assert.equal(read.dropped, dropped);
      assert.deepEqual(read.frames, structuredClone(frames));
    }),
    { numRuns: 100, seed: 20261123 },
  );
});
