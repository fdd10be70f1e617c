/**
 * The executable for arm64, built here and run on an emulated processor.
 */
import assert from "node:assert/strict";
import { root } from "../../scripts/lab/host.ts";
import { compile } from "../support/executable_suite.ts";
import { labTest } from "../support/real_parts.ts";
import { assertMatchesSchema } from "../support/schema.ts";

await labTest("an executable for arm64 is built here and does a checked workload there", ["aarch64"], async ({ folder, step }) => {
  const file = folder.join("svq");
  await compile(["--target=aarch64-unknown-linux-gnu", `--output=${file}`]);
  const libraries = await root("aarch64");
  const svq = async (...args: string[]) => {
    const { code, stdout, stderr } = await new Deno.Command(`${libraries}/usr/bin/qemu-aarch64-static`, {
      args: ["-L", `${libraries}/usr/aarch64-linux-gnu`, file, ...args],
      clearEnv: true,
      stdin: "null",
    }).output();
    assert.equal(code, 0, new TextDecoder().decode(stderr));
    return new TextDecoder().decode(stdout);
  };
  await step("it says what it is", async () => assert.match(await svq("--version"), /aarch64-unknown-linux-gnu, packed/));
  await step("workers, rings and eventfds work", async () => {
    const document = JSON.parse(await svq("drive", "sim:blk,size=4MiB", "-j", "--requests", "40", "--region", "2MiB"));
    assertMatchesSchema("svq.drive/1", document);
    const { completed, lost, duplicated, corrupted } = document.requests;
    assert.deepEqual([completed, lost, duplicated, corrupted], [40, 0, 0, 0]);
  });
});
