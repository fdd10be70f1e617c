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
  assert.ok(stdout.includes("\x1b[1mUsage:\x1b[22m"));
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

/** Files that are loaded when `entry` is, dynamic imports left out. */
async function staticGraph(...entries: string[]): Promise<string[]> {
  const files = new Set<string>();
  for (const entry of entries) {
    const output = await new Deno.Command(Deno.execPath(), {
      args: ["info", "--json", new URL(`../../${entry}`, import.meta.url).pathname],
    })
      .output();
    const graph = JSON.parse(new TextDecoder().decode(output.stdout));
    const modules = new Map<string, { specifier: string; dependencies?: { isDynamic?: boolean; code?: { specifier?: string } }[] }>(
      graph.modules.map((module: { specifier: string }) => [module.specifier, module]),
    );
    const visit = (specifier: string) => {
      if (files.has(specifier)) return;
      files.add(specifier);
      for (const dependency of modules.get(specifier)?.dependencies ?? []) {
        if (dependency.isDynamic !== true && dependency.code?.specifier !== undefined) visit(dependency.code.specifier);
      }
    };
    for (const root of graph.roots) visit(root);
  }
  return [...files].flatMap((file) => /\/src\/(.*)$/.exec(file)?.[1] ?? []);
}

Deno.test("svq version loads itself, no framework, no command, and nothing of the other rooms", async () => {
  const loaded = await staticGraph("src/cli/main.ts", "src/cli/print_version.ts");
  assert.ok(loaded.includes("cli/app.ts") && loaded.includes("version.ts"), loaded.join(" "));
  assert.deepEqual(loaded.filter((file) => /^(?!cli\/).*\//.test(file)), []);
  assert.deepEqual(loaded.filter((file) => /^cli\/(?:commands\/|parse)/.test(file)), []);
  assert.ok(!loaded.includes("cli/help.ts") && !loaded.includes("cli/man.ts"));
});

Deno.test("the first signal asks a command to stop, the second one ends it at once", async () => {
  const signals = new URL("../../src/cli/signals.ts", import.meta.url).href;
  const start = (after: string) =>
    new Deno.Command(Deno.execPath(), {
      args: [
        "eval",
        `import { aborted, untilSignal } from "${signals}";
         const signal = untilSignal();
         console.log("ready");
         await aborted(signal);
         console.log(signal.reason.code, signal.reason.exitCode);
         ${after}`,
      ],
      stdout: "piped",
    }).spawn();
  const lines = (child: Deno.ChildProcess) => child.stdout.pipeThrough(new TextDecoderStream())[Symbol.asyncIterator]();
  for (const [name, exitCode] of [["SIGINT", 130], ["SIGTERM", 143]] as const) {
    const polite = start("Deno.exit(0);");
    let output = lines(polite);
    assert.equal((await output.next()).value, "ready\n");
    polite.kill(name);
    assert.equal((await output.next()).value, `INTERRUPTED ${exitCode}\n`);
    assert.equal((await polite.status).code, 0);
    const stuck = start("await new Promise((resolve) => setTimeout(resolve, 60_000));");
    output = lines(stuck);
    await output.next();
    stuck.kill(name);
    await output.next();
    stuck.kill(name);
    assert.equal((await stuck.status).code, exitCode);
    await output.return?.();
  }
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
