import assert from "node:assert/strict";
import { runInVm } from "../../scripts/lab/vm_run.ts";
import { unavailable } from "../support/lab_vm.ts";

const ignore = unavailable !== null;
const suffix = ignore ? ` (skipped: ${unavailable})` : "";

Deno.test({
  name: `A command in the lab VM gets files and environment, and gives its exit status, output and files back${suffix}`,
  ignore,
  fn: async () => {
    const script = `cat /lab/files/greeting; echo "$WORD" >&2; touch mod.ts || echo "read-only" >&2; echo made > /lab/out/file; exit 7`;
    const result = await runInVm(["sh", "-c", script], { files: { greeting: "hello\n" }, env: { WORD: "it's" } });
    assert.equal(result.code, 7);
    assert.equal(result.stdout, "hello\n");
    assert.match(result.stderr, /^it's\n.*Read-only file system\nread-only\n$/);
    assert.equal(new TextDecoder().decode(result.outputs["file"]), "made\n");
  },
});

Deno.test({
  name: `A setup line that fails ends the run with its status and keeps the command from running${suffix}`,
  ignore,
  fn: async () => {
    const result = await runInVm(["echo", "ran"], { setup: ["modprobe vdpa_sim_none"] });
    assert.notEqual(result.code, 0);
    assert.equal(result.stdout, "");
    assert.match(result.stderr, /vdpa_sim_none/);
  },
});

Deno.test({
  name: `A command that outlives its time limit is ended with its machine${suffix}`,
  ignore,
  fn: async () => {
    await assert.rejects(runInVm(["sh", "-c", "echo started; exec sleep 1000"], { timeoutMs: 3000 }), {
      code: "LAB_TIMEOUT",
      message: /started/,
    });
  },
});

Deno.test({
  name: `A kernel that dies under the command is an error, not an exit status${suffix}`,
  ignore,
  fn: async () => {
    await assert.rejects(runInVm(["sh", "-c", "echo c > /proc/sysrq-trigger"], {}), { code: "LAB_VM_DIED", message: /sysrq|panic/i });
  },
});

Deno.test({
  name: `A VM that stands still is started again, once, and is an error of its own then${suffix}`,
  ignore,
  fn: async () => {
    // As the host sees it: the file that tells of life is not written any more.
    const command = ["sh", "-c", "kill -STOP $LAB_ALIVE_PID; echo begun >> /lab/out/runs; exec sleep 1000"];
    await assert.rejects(runInVm(command, { stallTimeoutMs: 4000, timeoutMs: 100_000 }), { code: "LAB_VM_STALLED", message: /twice/ });
  },
});
