/** Keeps docs/troubleshooting.md complete. */
import assert from "node:assert/strict";
import { VRING_RULES } from "../src/vring/rules.ts";
import { VERSION } from "../src/version.ts";

const ROOT = new URL("../", import.meta.url).pathname;
const CODE = "[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*";
/** How errors and findings are made: error classes, and the helpers of checks. */
const MADE = new RegExp(`(?:\\bnew \\w*Error\\(|\\bsuper\\(|\\bbad\\(|\\bequal\\(|\\brefused\\(|\\bcode(?::| =))\\s*"(${CODE})"`, "g");

function* sources(folder: string): Generator<string> {
  for (const entry of Deno.readDirSync(folder)) {
    const path = `${folder}/${entry.name}`;
    if (entry.isDirectory) yield* sources(path);
    else if (entry.name.endsWith(".ts")) yield path;
  }
}

/** Every error code that the source makes, and where. */
function codes(): Map<string, string> {
  const found = new Map<string, string>();
  for (const path of sources(`${ROOT}src`)) {
    const text = Deno.readTextFileSync(path).replace(/\/\*[\s\S]*?\*\//g, "");
    for (const [, code] of text.matchAll(MADE)) found.set(code!, path.slice(ROOT.length));
  }
  for (const rule of Object.keys(VRING_RULES)) found.set(rule, "src/vring/rules.ts");
  return found;
}

function documented(): string[] {
  const text = Deno.readTextFileSync(`${ROOT}docs/troubleshooting.md`);
  return [...text.matchAll(new RegExp(`^\\| \`(${CODE})\` \\|`, "gm"))].map((match) => match[1]!);
}

Deno.test("docs/troubleshooting.md has a row for every error code of the source", () => {
  const made = codes();
  assert.ok(made.size > 100, "the codes were found");
  const known = new Set(documented());
  assert.deepEqual([...made].filter(([code]) => !known.has(code)).map(([code, path]) => `${code} (${path})`), []);
});

Deno.test("docs/troubleshooting.md has no row for a code that the source does not make", () => {
  const made = codes();
  assert.deepEqual(documented().filter((code) => !made.has(code)), []);
});

Deno.test("docs/troubleshooting.md gives the broken rules of rings as the source does", () => {
  const text = Deno.readTextFileSync(`${ROOT}docs/troubleshooting.md`);
  for (const [code, { spec, text: rule }] of Object.entries(VRING_RULES)) {
    assert.ok(text.includes(`| \`${code}\` | ${spec} | ${rule} |`), code);
  }
});

Deno.test("the changelog begins with the version of deno.json", () => {
  const text = Deno.readTextFileSync(`${ROOT}CHANGELOG.md`);
  assert.equal(/^## (\S+)/m.exec(text)?.[1], VERSION);
});

Deno.test("the files that documents and units name are there", () => {
  for (const name of ["docs/operations.md", "CHANGELOG.md"]) {
    const text = Deno.readTextFileSync(ROOT + name);
    for (const [path] of text.matchAll(/(?<![\w/])(?:tests|units|share|scripts)\/[\w@./-]*\w/g)) Deno.statSync(ROOT + path);
  }
});

Deno.test("the examples of docs/library.md run as they stand", async () => {
  const { success, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["test", "-A", "--doc", "--quiet", "docs/library.md"],
    cwd: ROOT,
    stdin: "null",
  }).output();
  const text = new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
  assert.ok(success, text);
  assert.match(text, /[4-9] passed/);
});
