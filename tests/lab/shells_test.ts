/**
 * What svq prints for other programs, in those programs: completions in fish and zsh, manual pages in mandoc.
 */
import assert from "node:assert/strict";
import { programInRoot } from "../../scripts/lab/apt.ts";
import { root } from "../../scripts/lab/host.ts";
import { COMMANDS } from "../../src/cli/commands.ts";
import { MAIN, svq } from "../support/cli.ts";
import { labTest } from "../support/real_parts.ts";
import type { TempDir } from "../support/temp.ts";

/** Runs a program of the shells' packages with an `svq` on its PATH. */
async function run(folder: TempDir, program: string, args: string[], ok = true): Promise<string> {
  const bin = folder.join("bin");
  await Deno.mkdir(bin, { recursive: true });
  await Deno.writeTextFile(`${bin}/svq`, `#!/bin/sh\nexec "${Deno.execPath()}" run -A --quiet "${MAIN}" "$@"\n`, { mode: 0o755 });
  const { command, args: before } = programInRoot(await root("shells"), program);
  const { success, stdout, stderr } = await new Deno.Command(command, {
    args: [...before, ...args],
    env: { HOME: folder.path, PATH: `${bin}:${Deno.env.get("PATH")}`, SVQ_RUNTIME_DIR: folder.path },
    stdin: "null",
  }).output();
  const text = new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
  if (ok) assert.ok(success, text);
  return text;
}

const words = (text: string) => text.trim().split("\n").map((line) => line.split("\t")[0]!);

await labTest("fish completes commands, choices and device addresses", ["shells"], async ({ folder }) => {
  await Deno.writeTextFile(folder.join("svq.fish"), (await svq(["completions", "fish"])).stdout);
  const ask = async (line: string) =>
    words(await run(folder, "bin/fish", ["--no-config", "-c", `source ${folder.join("svq.fish")}; complete -C '${line}'`]));
  assert.deepEqual(await ask("svq doc"), ["doctor"]);
  assert.deepEqual(await ask("svq relay set x --mode "), ["auto", "notify", "passthrough", "shadow", "used"]);
  assert.ok((await ask("svq probe sim:")).includes("sim:blk"));
});

await labTest("zsh completes commands, choices and device addresses", ["shells"], async ({ folder }) => {
  await Deno.writeTextFile(folder.join("_svq"), (await svq(["completions", "zsh"])).stdout);
  const packages = await root("shells");
  // What zsh's completion system would be handed is printed instead.
  const script = folder.join("ask.zsh");
  await Deno.writeTextFile(
    script,
    `module_path=(${packages}/usr/lib/x86_64-linux-gnu/zsh/*(/))
fpath=(${folder.path} ${packages}/usr/share/zsh/functions/*(/))
autoload -Uz compinit && compinit -u -d ${folder.join("dump")}
compadd() { shift 3; print -rl -- "$@" }
_describe() { print -rl -- "\${(@P)2}" }
_files() { print FILES }
autoload -Uz +X _svq
words=("$@"); CURRENT=\${#words}
_svq
`,
  );
  const ask = async (...line: string[]) =>
    (await run(folder, "bin/zsh", ["-f", script, "svq", ...line], false)).trim().split("\n").map((line) => line.replace(/(?<!\\):.*/, ""));
  assert.deepEqual(await ask("doc"), ["doctor"]);
  assert.deepEqual(await ask("relay", "set", "x", "--mode", ""), ["auto", "passthrough", "notify", "used", "shadow"]);
  assert.ok((await ask("probe", "")).includes("unix"), "an address that goes on after its colon");
});

await labTest("mandoc finds no error in any manual page", ["shells"], async ({ folder }) => {
  for (const name of ["", ...Object.keys(COMMANDS).filter((name) => COMMANDS[name]!.hidden !== true)]) {
    const page = await svq(["man", ...(name === "" ? [] : [name])]);
    assert.equal(page.code, 0, page.stderr);
    const file = folder.join("page.1");
    await Deno.writeTextFile(file, page.stdout);
    const complaints = (await run(folder, "bin/mandoc", ["-T", "lint", "-W", "warning", file], false)).split("\n")
      // The same commit gives the same bytes: there is no date.
      .filter((line) => line !== "" && !/missing date/.test(line));
    assert.deepEqual(complaints, [], name);
  }
});
