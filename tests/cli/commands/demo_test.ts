import assert from "node:assert/strict";
import { runDemo } from "../../../src/cli/demo.ts";
import { selfCommand } from "../../../src/cli/self_command.ts";
import { svq, svqCommand } from "../../support/cli.ts";
import { assertMatchesSchema } from "../../support/schema.ts";
import { TempDir } from "../../support/temp.ts";
import { waitUntil } from "../../support/wait.ts";

Deno.test("svq demo -j migrates without a loss, prints svq.demo/1 and leaves nothing behind", async () => {
  using dir = new TempDir();
  const { code, stdout, stderr } = await svq(["demo", "-j", "--load", "300ms"], { TMPDIR: dir.path });
  assert.equal(code, 0, stderr);
  assertMatchesSchema("demo", stdout);
  const demo = JSON.parse(stdout);
  assert.equal(demo.outcome, "ok");
  assert.equal(demo.memory_identical, true);
  const { completed, lost, duplicated, corrupted } = demo.requests;
  assert.deepEqual([lost, duplicated, corrupted], [0, 0, 0]);
  assert.ok(completed > 0 && demo.sectors_compared > 0 && demo.downtime_us > 0 && demo.switch_us > 0);
  assert.equal(demo.rounds[0].dirty_pages, 16384, "the first round has all of the 64 MiB");
  assert.ok(demo.rounds.length >= 2);
  assert.deepEqual([...Deno.readDirSync(dir.path)], []);
});

Deno.test("svq demo tells a newcomer what happens and why, in order", async () => {
  const { code, stdout, stderr } = await svq(["demo", "--load", "200ms"]);
  assert.equal(code, 0, stderr);
  const steps = [...stdout.matchAll(/^ +\d+\.\d\d s {2}(\S+)/gm)].map((match) => match[1]);
  const wanted = ["guest", "passthrough", "shadow", "migrate", "round", "stop", "state", "hand-over", "resume", "verify"];
  assert.deepEqual(steps.filter((step, i) => wanted.includes(step!) && steps.indexOf(step) === i), wanted);
  assert.match(stdout, /none lost, duplicated or corrupted/);
});

Deno.test("Ctrl-C in the middle of a demo ends it with 130, and nothing is left behind", async () => {
  using dir = new TempDir();
  const child = svqCommand(["demo", "--load", "30s"], { TMPDIR: dir.path }).spawn();
  const path = await waitUntil("the demo's folder", () => [...Deno.readDirSync(dir.path)][0]?.name);
  await waitUntil("the destination", () => {
    try {
      return Deno.lstatSync(`${dir.path}/${path}/migration.sock`).isSocket;
    } catch {
      return false;
    }
  });
  const descendant = childrenOf(child.pid)[0]!;
  child.kill("SIGINT");
  const { code, stderr } = await child.output();
  assert.equal(code, 130, new TextDecoder().decode(stderr));
  assert.deepEqual([...Deno.readDirSync(dir.path)], []);
  assert.throws(() => Deno.statSync(`/proc/${descendant}`), Deno.errors.NotFound, "the destination's process is gone");
});

function childrenOf(pid: number): number[] {
  return Deno.readTextFileSync(`/proc/${pid}/task/${pid}/children`).trim().split(" ").filter(Boolean).map(Number);
}

Deno.test("A demo with a dirty log that loses bits fails, says that memory differs, and loses nothing", async () => {
  const result = await runDemo({
    ramSize: 8 << 20,
    depth: 4,
    loadMs: 200,
    start: (words) => {
      const [program, ...args] = [...selfCommand(), ...words];
      return new Deno.Command(program!, { args, stdin: "piped", stdout: "null", stderr: "null" }).spawn();
    },
    onStep: () => {},
    log: () => {},
    filter: (harvested) => harvested.clear(),
  });
  assert.equal(result.outcome, "memory");
  assert.equal(result.migration.memoryIdentical, false);
  assert.equal(result.error?.code, "MEMORY_DIFFERS");
  assert.deepEqual([result.requests.lost, result.requests.duplicated, result.requests.corrupted], [0, 0, 0]);
});
