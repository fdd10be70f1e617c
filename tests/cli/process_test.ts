import assert from "node:assert/strict";
import { svq, svqCommand } from "../support/cli.ts";
import { assertMatchesSchema } from "../support/schema.ts";

// deno-lint-ignore no-control-regex
const CONTROL = /[\x00-\x09\x0b-\x1f\x7f]/;

Deno.test("under -j stdout is one JSON document and stderr is silent", async () => {
  const { code, stdout, stderr } = await svq(["version", "-j"]);
  assert.equal(code, 0);
  assert.equal(stderr, "");
  assert.equal(stdout.split("\n").length, 2, "one line");
  assertMatchesSchema("version", stdout);
});

Deno.test("under -j an error is one JSON line on stderr and stdout stays empty", async () => {
  const { code, stdout, stderr } = await svq(["-j", "verison"]);
  assert.equal(code, 2);
  assert.equal(stdout, "");
  assert.equal(stderr.split("\n").length, 2, "one line");
  assertMatchesSchema("error", stderr);
  assert.equal(JSON.parse(stderr).error.hint, "did you mean version?");
});

Deno.test("without -j an error is a sentence with a hint below it", async () => {
  const { code, stdout, stderr } = await svq(["doctor", "--fro", "user"]);
  assert.equal(code, 2);
  assert.equal(stdout, "");
  assert.equal(stderr, "error: Unknown flag --fro\n  hint: did you mean --for?\n");
});

Deno.test("off a terminal nothing has colours or control characters", async () => {
  for (const args of [["--help"], ["doctor"], ["doctor", "--help"], ["schema"], ["nonsense"]]) {
    const { stdout, stderr } = await svq(args);
    assert.ok(!CONTROL.test(stdout + stderr), args.join(" "));
  }
});

Deno.test("colours come when they are asked for, NO_COLOR or not", async () => {
  const { stdout } = await svq(["--help", "--color=always"], { NO_COLOR: "1" });
  assert.match(stdout, /\x1b\[1mUsage:\x1b\[22m/); // deno-lint-ignore no-control-regex
  const json = await svq(["version", "-j", "--color", "always"]);
  assert.ok(!CONTROL.test(json.stdout), "JSON is never coloured");
});

Deno.test("the doctor's document matches its schema and exits 6 exactly when the host is not ready", async () => {
  for (const purpose of ["user", "kernel,vduse"]) {
    const { code, stdout, stderr } = await svq(["doctor", "-j", "--for", purpose]);
    assertMatchesSchema("doctor", stdout);
    assert.equal(stderr, "");
    assert.equal(code, JSON.parse(stdout).ready ? 0 : 6);
  }
});

Deno.test("a reader that goes away is no failure", async () => {
  const child = svqCommand(["schema", "probe", "-p"]).spawn();
  await child.stdout.cancel();
  const { code, stderr } = await child.output().catch(async () => ({ code: (await child.status).code, stderr: new Uint8Array() }));
  assert.equal(code, 0);
  assert.equal(new TextDecoder().decode(stderr), "");
});

Deno.test("the version command loads no other command and no FFI", async () => {
  const main = new URL("../../src/cli/main.ts", import.meta.url).pathname;
  const output = await new Deno.Command(Deno.execPath(), {
    // Without --allow-ffi, --allow-net, --allow-write: and what it may read is its own code.
    args: ["run", "--quiet", "--allow-env", "--allow-sys", main, "version", "-j"],
    stdout: "piped",
    stderr: "piped",
  }).output();
  assert.equal(new TextDecoder().decode(output.stderr), "");
  assert.equal(output.code, 0);
});

Deno.test("the bash completion completes commands, values after = and device addresses after a colon", async () => {
  const script = (await svq(["completions", "bash"])).stdout;
  const main = new URL("../../src/cli/main.ts", import.meta.url).pathname;
  const ask = async (line: string): Promise<string[]> => {
    const output = await new Deno.Command("bash", {
      args: [
        "--norc",
        "-c",
        `svq() { "${Deno.execPath()}" run -A --quiet "${main}" "$@"; }\n${script}\nCOMP_LINE=$1 COMP_POINT=\${#1}; _svq 2>/dev/null; printf '%s\\n' "\${COMPREPLY[@]}"`,
        "bash",
        line,
      ],
    }).output();
    return new TextDecoder().decode(output.stdout).trim().split("\n");
  };
  assert.deepEqual(await ask("svq doc"), ["doctor"]);
  assert.deepEqual(await ask("svq doctor --for=k"), ["kernel"]);
  assert.deepEqual(await ask("svq completions "), ["bash", "zsh", "fish"]);
});
