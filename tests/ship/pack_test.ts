import assert from "node:assert/strict";
import { assembleLauncher } from "../../scripts/ship/launcher.ts";
import { toPiece } from "../../scripts/ship/pack.ts";

function run(pieces: Record<string, string>, entry: string): Record<string, unknown> {
  const loaded = new Map<string, Record<string, unknown>>();
  const load = Object.assign((name: string): Record<string, unknown> => {
    if (!loaded.has(name)) loaded.set(name, (0, eval)(toPiece(name, pieces[name]!))(load));
    return loaded.get(name)!;
  }, { worker: (name: string) => new URL(`worker:${name}`) });
  return load(entry);
}

Deno.test("a module of the bundle becomes a function that returns what it exports", async () => {
  const exports = run({
    "chunk.js":
      `// src/a.ts\nvar load = 1;\nfunction double(x) {\n  return 2 * x;\n}\n\nexport {\n  load as one,\n  double\n};\n/*! licence */\n`,
    "side.js": `globalThis.sideEffect = true;\n`,
    "later.js": `import {\n  double\n} from "./chunk.js";\nvar command = double(21);\nexport {\n  command\n};\n`,
    "main.js":
      `import {\n  double,\n  one as uno\n} from "./chunk.js";\nimport "./side.js";\n\n// src/main.ts\nvar later = () => import("./later.js");\nvar worker = new URL("./relay_worker.js", import.meta.url).href;\nvar two = double(uno);\nvar place = import.meta.url;\nexport {\n  two as default,\n  later,\n  worker,\n  place\n};\n`,
  }, "main.js");
  assert.equal(exports["default"], 2);
  assert.equal(exports["worker"], "worker:relay_worker.js");
  assert.equal(exports["place"], "file:///svq/main.js");
  assert.equal((globalThis as unknown as { sideEffect?: boolean }).sideEffect, true);
  assert.deepEqual(await (exports["later"] as () => Promise<unknown>)(), { command: 42 });
});

Deno.test("what cannot be turned into a function is refused when packing, not when running", () => {
  assert.throws(() => toPiece("x.js", `await Promise.resolve();`), SyntaxError);
  assert.throws(() => toPiece("x.js", `if (import.meta.main) run();`), SyntaxError);
  assert.throws(() => toPiece("x.js", `var a = 1;\nexport default a;\n`), SyntaxError);
  assert.throws(() => toPiece("x.js", `var __svq_load = 1;`), /uses the name/);
});

Deno.test("a launcher keeps the stack aligned and its targets in reach", () => {
  const plan = { address: 0x5dd2000, entry: 0x1e04000, setenvSlot: 0x5d68c48, env: { A: "1" }, words: ["run", "x"] };
  for (const machine of ["x86_64", "aarch64"] as const) {
    assert.throws(() => assembleLauncher(machine, { ...plan, words: ["run"] }), /must be even/);
    assert.throws(() => assembleLauncher(machine, { ...plan, entry: 2 ** 40 }), /out of reach/);
  }
});

Deno.test("the launcher's machine code is what a disassembler was seen to read", () => {
  const plan = { address: 0x10000, entry: 0x1000, setenvSlot: 0x8008, env: { A: "1" }, words: ["run", "x"] };
  const hex = (machine: "x86_64" | "aarch64") => assembleLauncher(machine, plan).toHex();
  assert.equal(
    hex("x86_64"),
    "524883ec08488d3d54000000488d354f00000031d2ff15ed7fffff4883c4085a488b0424488b4c24084881ec100000004883c0024889042448894c2408488d05200000004889842410000000488d05150000004889842418000000e9a00fffff4100310072756e007800",
  );
  assert.equal(
    hex("aarch64"),
    "ff4300d1e00300f9600200104102005002008052d0ffff90100640f900023fd6e00340f9ff430091e10340f9e20740f9ff4300d121080091e10300f9e20700f9c3000010e30b00f9a3000010e30f00f9ecc3ff174100310072756e007800",
  );
});
