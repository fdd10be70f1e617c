import assert from "node:assert/strict";
import { boundsChecked, GUARD_BYTES, WindowMemory } from "../../src/ffi/mod.ts";
import { V8_FLAGS } from "../../src/packaging.ts";

const ROOT = new URL("../../", import.meta.url).pathname;
const FOUR_GIB = 2 ** 32;

async function deno(args: string[], env: Record<string, string> = {}): Promise<{ code: number; signal: Deno.Signal | null; text: string }> {
  const command = new Deno.Command(Deno.execPath(), { args, cwd: ROOT, env: { NO_COLOR: "1", ...env }, stdin: "null" });
  const { code, signal, stdout, stderr } = await command.output();
  const [out, err] = [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes));
  return { code, signal, text: `${out}${err}` };
}

function mapped(address: number): string | undefined {
  return Deno.readTextFileSync("/proc/self/maps").split("\n").find((line) => {
    const [start, end] = line.split(" ")[0]!.split("-").map((text) => parseInt(text, 16));
    return start! <= address && address < end!;
  });
}

Deno.test("behind the memory of each relay core lie pages that cannot be accessed", () => {
  const memories = [...Array(4)].map(() => new WindowMemory());
  for (const memory of memories) {
    assert.ok(memory.guarded);
    for (const at of [FOUR_GIB, FOUR_GIB + GUARD_BYTES - 1]) assert.match(mapped(memory.address(at))!, /---p/);
    // And so are those in it that it has not grown to.
    assert.match(mapped(memory.address(memory.size))!, /---p/);
    assert.match(mapped(memory.address(FOUR_GIB - 1))!, /---p/);
  }
});

const TOUCH = `
  import { boundsChecked } from "${ROOT}src/ffi/mod.ts";
  import { WasmHost } from "${ROOT}src/relay/wasm_host.ts";
  const host = new WasmHost({ memory: {}, translation: undefined, dirty: undefined });
  console.log("checked", boundsChecked());
  const at = Number(Deno.args[0]);
  try {
    if (Deno.args[1] === "far") host.exports.disableKicks(at);
    else host.exports.peek(at);
    console.log("it got something");
  } catch (error) {
    console.log(error.name);
  }
`;

Deno.test("an address that is not the memory's own ends a process without bounds checks, and is an error in one with them", async () => {
  const program = await Deno.makeTempFile({ suffix: ".ts" });
  try {
    await Deno.writeTextFile(program, TOUCH);
    // In what was never grown; across the end of the 4 GiB, by a static offset.
    for (const words of [[String(2 ** 31)], [String(FOUR_GIB - 4)], [String(FOUR_GIB - 8), "far"]]) {
      const run = (flags: string[]) => deno(["run", "-A", "--no-check", "--no-config", ...flags, program, ...words]);
      const [checked, unchecked] = [await run(["--v8-flags=--wasm-bounds-checks"]), await run([`--v8-flags=${V8_FLAGS}`])];
      assert.match(checked.text, /checked true\nRuntimeError/);
      assert.match(unchecked.text, /checked false/);
      assert.doesNotMatch(unchecked.text, /it got something|Error/);
      assert.equal(unchecked.signal, "SIGSEGV");
    }
  } finally {
    await Deno.remove(program);
  }
});

Deno.test("without bounds checks the relay cores keep to the same rules, whatever guest and device write", async () => {
  // This process runs the same files; here V8 is started the other way.
  const flags = boundsChecked() ? V8_FLAGS : "--wasm-bounds-checks";
  const files = ["tests/relay/core_test.ts", "tests/relay/hostile_guest_test.ts"];
  const { code, text } = await deno(["test", "-A", "--no-check", `--v8-flags=${flags}`, ...files]);
  assert.equal(code, 0, text);
});

Deno.test("svq starts itself without bounds checks, unless DENO_V8_FLAGS says how V8 is started", async () => {
  const program = `import { selfCommand } from "${ROOT}src/cli/self_command.ts"; console.log(selfCommand().join(" "))`;
  const ask = async (env: Record<string, string>) => (await deno(["eval", program], env)).text;
  assert.ok((await ask({})).includes(V8_FLAGS));
  assert.ok(!(await ask({ DENO_V8_FLAGS: "--wasm-bounds-checks" })).includes("bounds-checks"));
  const { tasks } = JSON.parse(await Deno.readTextFile(`${ROOT}deno.json`)) as { tasks: Record<string, string> };
  for (const name of ["svq", "demo"]) assert.ok(tasks[name]!.includes(V8_FLAGS), name);
});

// Other modules would run without bounds checks, too, over memory that nobody guards.
Deno.test("no other WebAssembly than the relay core, the page scan and the question for bounds checks is in the program", async () => {
  const found: string[] = [];
  const look = async (folder: string): Promise<void> => {
    for await (const { name, isDirectory } of Deno.readDir(folder)) {
      if (isDirectory) await look(`${folder}/${name}`);
      else if (/new WebAssembly\.(Module|Memory)|WebAssembly\.(compile|instantiate)/.test(await Deno.readTextFile(`${folder}/${name}`))) {
        found.push(`${folder}/${name}`.slice(ROOT.length));
      }
    }
  };
  await look(`${ROOT}src`);
  assert.deepEqual(found.sort(), ["src/ffi/window.ts", "src/relay/wasm_host.ts", "src/wasm/page_scan.ts"]);
});
