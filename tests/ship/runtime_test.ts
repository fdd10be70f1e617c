import assert from "node:assert/strict";
import { fetchRuntime, nearestVersion } from "../../scripts/ship/runtime.ts";

Deno.test("the runtime of another machine has this Deno's version, or the newest of its minor release", () => {
  const versions = ["2.8.9", "2.9.4", "2.9.10", "2.9.5", "2.9.11-rc.1", "3.0.0"];
  assert.equal(nearestVersion("2.9.5", versions), "2.9.5");
  assert.equal(nearestVersion("2.9.6", versions), "2.9.10");
  assert.equal(nearestVersion("2.7.1", versions), undefined);
});

Deno.test("an unknown target is refused with those that are known", async () => {
  await assert.rejects(fetchRuntime("riscv64", "/nonexistent"), /Unknown target riscv64; known are .*aarch64-unknown-linux-gnu/);
});
