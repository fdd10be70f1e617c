/** Keeps the dependency rules of docs/architecture.md. */
import assert from "node:assert/strict";

const ROOT = new URL("../", import.meta.url).pathname;

/** Which rooms a room may import. Files directly in src (errors, units, suggest, version) lie below every room. */
const MAY_IMPORT: Readonly<Record<string, readonly string[]>> = {
  ffi: [],
  uapi: [],
  memory: ["uapi", "ffi"],
  vring: ["uapi", "memory"],
  iova: ["uapi", "memory"],
  dirty: ["uapi", "memory"],
  net: ["uapi"],
  vhost: ["uapi", "memory", "vring", "iova", "dirty", "ffi", "vhost_user"],
  vhost_user: ["uapi", "memory", "vring", "iova", "dirty", "ffi", "vhost"],
  wasm: [],
  relay: ["uapi", "net", "memory", "vring", "iova", "dirty", "vhost", "vhost_user", "ffi", "wasm"],
  devices: ["uapi", "net", "memory", "vring", "iova", "dirty", "vhost", "vhost_user", "ffi"],
  drivers: ["uapi", "net", "memory", "vring", "iova", "dirty", "vhost", "vhost_user", "ffi"],
  migration: ["uapi", "net", "memory", "vring", "iova", "dirty", "vhost", "vhost_user", "relay", "devices", "drivers", "ffi", "wasm"],
  bench: ["uapi", "memory", "vring", "iova", "dirty", "vhost", "vhost_user", "relay", "devices", "drivers", "migration", "ffi", "wasm"],
  cli: [
    "uapi",
    "net",
    "memory",
    "vring",
    "iova",
    "dirty",
    "vhost",
    "vhost_user",
    "relay",
    "devices",
    "drivers",
    "migration",
    "bench",
    "ffi",
    "wasm",
  ],
};

/** Rooms that must reach ffi through nothing: their tests run without privileges. */
const PURE = ["uapi", "vring", "iova", "dirty", "net"];
/** Files of memory that pure rooms may import: records and tables, no maps. */
const PURE_MEMORY = ["memory/region.ts", "memory/range_table.ts"];
/** Packages, and the room that may import each. */
const PACKAGES: Readonly<Record<string, readonly string[]>> = {
  "@stricli/core": ["cli"],
  "smol-toml": ["cli"],
  valibot: ["cli", "migration", "relay"],
};

interface SourceFile {
  /** Below src, e.g. `ffi/libc.ts`. */
  path: string;
  text: string;
}

/** Every import of a file: static, re-export, dynamic, and Worker modules by `new URL(…, import.meta.url)`. */
function importsOf(text: string): string[] {
  const code = text.replace(/\/\*[\s\S]*?\*\//g, "").replace(/^\s*\/\/.*$/gm, "");
  const patterns = [
    /\b(?:import|export)\b[^"'`;]*?\bfrom\s*["']([^"']+)["']/g,
    /\bimport\s*["']([^"']+)["']/g,
    /\bimport\s*\(\s*["'`]([^"'`]+)["'`]/g,
    /\bnew URL\(\s*["'`]([^"'`]+)["'`]\s*,\s*import\.meta\.url/g,
  ];
  return patterns.flatMap((pattern) => [...code.matchAll(pattern)].map((match) => match[1]!));
}

/** What a file breaks, as sentences. */
function violations({ path, text }: SourceFile): string[] {
  const room = path.includes("/") ? path.split("/")[0]! : "";
  const found: string[] = [];
  const code = text.replace(/\/\*[\s\S]*?\*\//g, "").replace(/\/\/.*$/gm, "");
  if (room !== "ffi" && /\bDeno\.(?:dlopen|Unsafe\w+)/.test(code)) found.push(`${path} uses FFI outside src/ffi`);
  if (/\bimport\s*\(\s*[^"'\s)]/.test(code)) found.push(`${path} imports by a computed name: a bundler cannot follow it`);
  for (const specifier of importsOf(text)) {
    if (specifier.startsWith("node:")) found.push(`${path} imports ${specifier}: no node: modules in src`);
    if (!specifier.startsWith(".")) {
      const name = Object.keys(PACKAGES).find((known) => specifier === known);
      if (name === undefined) {
        if (!specifier.startsWith("node:")) found.push(`${path} imports ${specifier}, which is no package of this project`);
      } else if (!PACKAGES[name]!.includes(room)) found.push(`${path} imports ${name}, which is for ${PACKAGES[name]!.join(", ")}`);
      continue;
    }
    const target = new URL(specifier, `file:///src/${path}`).pathname.slice(1);
    if (target === "deno.json") {
      if (path !== "version.ts") found.push(`${path} imports deno.json: the version comes from version.ts`);
      continue;
    }
    if (!target.startsWith("src/")) {
      found.push(`${path} imports ${specifier}, outside src`);
      continue;
    }
    const inside = target.slice("src/".length);
    const other = inside.includes("/") ? inside.split("/")[0]! : "";
    if (other === room || other === "") continue;
    if (room === "") found.push(`${path} lies below every room and imports ${inside}`);
    else if (!(MAY_IMPORT[room] ?? []).includes(other)) found.push(`${path} imports ${inside}: ${room} may not import ${other}`);
    else if (PURE.includes(room) && other === "memory" && !PURE_MEMORY.includes(inside)) {
      found.push(`${path} imports ${inside}, which needs ffi`);
    }
  }
  return found;
}

function* sources(directory = `${ROOT}src`, prefix = ""): Generator<SourceFile> {
  for (const entry of Deno.readDirSync(directory)) {
    const path = prefix + entry.name;
    // AssemblyScript is no TypeScript of ours.
    if (entry.isDirectory && path !== "wasm") yield* sources(`${directory}/${entry.name}`, `${path}/`);
    else if (entry.name.endsWith(".ts")) yield { path, text: Deno.readTextFileSync(`${directory}/${entry.name}`) };
  }
}

Deno.test("every file of src keeps the dependency rules of docs/architecture.md", () => {
  const files = [...sources()];
  assert.ok(files.length > 30, "the files of src were found");
  assert.deepEqual(files.flatMap(violations), []);
});

Deno.test("the rules name every room that exists", () => {
  const rooms = [...Deno.readDirSync(`${ROOT}src`)].filter((entry) => entry.isDirectory).map((entry) => entry.name);
  assert.deepEqual(rooms.filter((room) => !(room in MAY_IMPORT)), []);
});

Deno.test("no room can reach one that can reach it, except vhost and vhost_user", () => {
  const reach = (from: string, seen = new Set<string>()): Set<string> => {
    for (const next of MAY_IMPORT[from]!) {
      if (seen.has(next)) continue;
      seen.add(next);
      reach(next, seen);
    }
    return seen;
  };
  for (const room of Object.keys(MAY_IMPORT)) {
    if (room === "vhost" || room === "vhost_user") continue;
    assert.ok(!reach(room).has(room), `${room} is in a circle`);
  }
});

Deno.test("the rules find what breaks them", () => {
  const bad: [string, string, RegExp][] = [
    ["vring/split.ts", `import { libc } from "../ffi/libc.ts";`, /vring may not import ffi/],
    ["iova/plan.ts", `export * from "../ffi/mod.ts";`, /iova may not import ffi/],
    ["vring/split.ts", `import {\n  GuestMemory,\n} from "../memory/guest_memory.ts";`, /needs ffi/],
    ["ffi/fd.ts", `import type { Relay } from "../relay/relay.ts";`, /ffi may not import relay/],
    ["relay/relay.ts", `const cli = await import("../cli/output.ts");`, /relay may not import cli/],
    ["devices/blk.ts", `new Worker(new URL("../relay/worker.ts", import.meta.url))`, /devices may not import relay/],
    ["relay/relay.ts", `import fs from "node:fs";`, /no node: modules/],
    ["relay/relay.ts", `import "npm:left-pad";`, /no package of this project/],
    ["vring/split.ts", `import { run } from "@stricli/core";`, /which is for cli/],
    ["relay/relay.ts", `Deno.dlopen("libc.so.6", {});`, /FFI outside src\/ffi/],
    ["cli/x.ts", `new Deno.UnsafePointerView(p)`, /FFI outside src\/ffi/],
    ["units.ts", `import { x } from "./cli/table.ts";`, /below every room/],
    ["cli/x.ts", `import { x } from "../../tests/support/wait.ts";`, /outside src/],
    ["cli/x.ts", "const m = await import(name);", /computed name/],
    ["cli/x.ts", `import config from "../../deno.json" with { type: "json" };`, /version comes from/],
  ];
  for (const [path, text, expected] of bad) {
    const found = violations({ path, text });
    assert.ok(found.some((sentence) => expected.test(sentence)), `${path}: ${text}\n${found.join("\n")}`);
  }
});

Deno.test("comments and what is allowed break no rule", () => {
  const text = `/** import { x } from "../cli/x.ts"; Deno.dlopen */\n// import "node:fs"\nimport { SvqError } from "../errors.ts";`;
  assert.deepEqual(violations({ path: "vring/split.ts", text }), []);
});
