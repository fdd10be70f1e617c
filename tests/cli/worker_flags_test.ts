import assert from "node:assert/strict";
import { listText, workerConfig, workerWords } from "../../src/cli/worker_flags.ts";
import { allowedCpus } from "../../src/ffi/mod.ts";
import type { SvqError } from "../../src/errors.ts";
import { runInProcess } from "../support/fake_host.ts";

Deno.test("a CPU that this process may not use is a usage error that names those it may", () => {
  const allowed = allowedCpus();
  const foreign = Array.from({ length: 1025 }, (_, cpu) => cpu).find((cpu) => !allowed.includes(cpu))!;
  assert.throws(
    () => workerConfig({ workers: 1, pollUs: "auto", cpus: [allowed[0]!, foreign] }),
    (error: SvqError) => error.exitCode === 2 && error.message.includes(String(foreign)) && error.hint!.includes(listText(allowed)),
  );
  const config = { workers: 2, pollUs: 30, cpus: allowed };
  assert.deepEqual(workerConfig(config), config);
});

Deno.test("lists of CPUs and times to poll that cannot be are usage errors of relay run and relay start", async () => {
  const device = ["--front", "unix:/nonexistent/f", "--device", "sim:blk"];
  for (const verb of ["run", "start"]) {
    for (const words of [["--cpus", "x"], ["--cpus", "3-1"], ["--cpus", "60000"], ["--poll-us", "-1"], ["--poll-us", "often"]]) {
      const { code, stderr } = await runInProcess(["relay", verb, ...device, ...words]);
      assert.equal(code, 2, `${verb} ${words.join(" ")}: ${stderr}`);
    }
  }
});

Deno.test("what a relay in the background is told is what was asked for", () => {
  assert.deepEqual(workerWords({ workers: 3, pollUs: "auto", cpus: [1, 2] }), ["--workers", "3", "--poll-us", "auto", "--cpus", "1,2"]);
  assert.deepEqual(workerWords({ workers: 1, pollUs: 0 }), ["--workers", "1", "--poll-us", "0"]);
  assert.equal(listText([0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
});
