/**
 * One executable without Deno's own `deno compile`: the runtime, a launcher in front of its first instruction, and the
 * program. It is an ordinary ELF file; nothing is unpacked anywhere when it starts.
 *
 *     runtime (unchanged but for one program header and the entry) | launcher | pieces of the program
 *
 * @module
 */
import { V8_FLAGS } from "../../src/packaging.ts";
import type { Bundle } from "./bundle.ts";
import { ElfImage } from "./elf.ts";
import { assembleLauncher } from "./launcher.ts";

/**
 * The least that works: Deno asks for everything before it opens files of /proc and /dev, and ffi is everything anyway.
 * Code from elsewhere stays out by --no-remote.
 */
export const PERMISSION = "--allow-all";

// Set before the runtime starts where the user has not set them, and taken out of the environment again by the program.
const ENVIRONMENT: Readonly<Record<string, string>> = {
  // No cache of compiled modules is wanted, and no folder in anybody's home.
  DENO_DIR: "/dev/null",
  DENO_NO_PACKAGE_JSON: "1",
  DENO_NO_UPDATE_CHECK: "1",
  DENO_V8_FLAGS: V8_FLAGS,
};

const IMPORT = /\s*(?:\/\/[^\n]*\n\s*)*import\s*(?:\{([^}]*)\}\s*from\s*)?"\.\/([\w.-]+)";/y;
// Behind it stand the licences of packages.
const EXPORT = /\bexport\s*\{([^}]*)\};\s*((?:\/\*[\s\S]*?\*\/\s*)*)$/;

// No module may have a name of its own like this.
const LOAD = "__svq_load";

function renames(list: string): string {
  return list.split(",").map((item) => item.trim()).filter((item) => item !== "").map((item) => item.replace(/\s+as\s+/, ": ")).join(", ");
}

/** The exports of a piece: `local as name` becomes `name: local`. */
function exported(list: string): string {
  return list.split(",").map((item) => item.trim()).filter((item) => item !== "").map((item) => {
    const [local, name] = item.split(/\s+as\s+/);
    return name === undefined ? local! : `${name}: ${local}`;
  }).join(", ");
}

/**
 * Turns a module of the bundle into a function of the loader that returns its exports. The bundler exports nothing that is
 * assigned to later, so values do.
 *
 * @throws SyntaxError where something of a module is left
 */
export function toPiece(name: string, module: string): string {
  if (module.includes(LOAD)) throw new Error(`${name} uses the name ${LOAD}`);
  let at = 0;
  let imports = "";
  for (;;) {
    IMPORT.lastIndex = at;
    const match = IMPORT.exec(module);
    if (match === null) break;
    imports += `${match[1] === undefined ? "" : `const { ${renames(match[1])} } = `}${LOAD}("${match[2]}");\n`;
    at = IMPORT.lastIndex;
  }
  let body = module.slice(at);
  let exports = "";
  body = body.replace(EXPORT, (_whole, list: string, licences: string) => {
    exports = exported(list);
    return licences;
  });
  body = body
    .replace(/\bimport\("\.\/([\w.-]+)"\)/g, `Promise.resolve().then(() => ${LOAD}("$1"))`)
    .replace(/new URL\("\.\/([\w]+_worker\.js)",\s*import\.meta\.url\)/g, `${LOAD}.worker("$1")`)
    .replaceAll("import.meta.url", JSON.stringify(`file:///svq/${name}`));
  const text = `(function (${LOAD}) {\n"use strict";\n${imports}${body}\nreturn { ${exports} };\n})\n//# sourceURL=svq:${name}\n`;
  new Function(text);
  return text;
}

/** A number that takes eight places, so that texts keep their length whatever it is. */
function padded(value: number): string {
  return String(value).padStart(8);
}

/** Source that starts a thread: reads pieces from the running file, when they are needed, and hands them to the boot code. */
function stageSource(position: number, indexSize: number, entry: string): string {
  return `const f=Deno.openSync("/proc/self/exe"),r=(s,e)=>{const b=new Uint8Array(e-s);f.seekSync(${padded(position)}+s,0);let n=0;` +
    `for(let k;n<b.length&&(k=f.readSync(b.subarray(n)))!==null;)n+=k;` +
    `if(n<b.length){console.error("error: this file of svq is incomplete: copy it again");Deno.exit(1)}` +
    `return new TextDecoder().decode(b)},i=JSON.parse(r(0,${padded(indexSize)})),p=(x)=>r(...i[x]);` +
    `(0,eval)(p("boot.js"))(p,(e)=>p("stage.js").replace("EN"+"TRY",e),"${entry}")`;
}

/**
 * The pieces behind their index, a JSON object with begin and end of each.
 *
 * @param position where it will lie in the file
 */
function payloadOf(bundle: Bundle, boot: string, position: number): { bytes: Uint8Array<ArrayBuffer>; indexSize: number } {
  const encoder = new TextEncoder();
  const texts = new Map([...bundle.files].map(([name, text]) => [name, toPiece(name, text)]));
  texts.set("stage.js", stageSource(position, 0, "ENTRY"));
  // Every start reads the last piece, and so finds out when the file was not copied to its end.
  texts.set("boot.js", boot.replace(/^(?:\/\/.*\n)+/, "").replace("ENVIRONMENT", JSON.stringify(ENVIRONMENT)));
  const lengths = [...texts].map(([name, text]) => [name, encoder.encode(text).length] as const);
  const index = (base: number) => {
    let end = base;
    const cells = lengths.map(([name, length]) => `${JSON.stringify(name)}:[${padded(end)},${padded(end += length)}]`);
    return encoder.encode(`{${cells.join(",")}}\n`);
  };
  const indexSize = index(0).length;
  texts.set("stage.js", stageSource(position, indexSize, "ENTRY"));
  const parts = [index(indexSize), ...[...texts.values()].map((text) => encoder.encode(text))];
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return { bytes, indexSize };
}

/**
 * Packs a program.
 *
 * @param runtime the bytes of the `deno` executable
 * @param boot source of boot.js
 * @throws Error where the runtime is not as expected
 */
export function packProgram(runtime: Uint8Array<ArrayBuffer>, bundle: Bundle, boot: string): Uint8Array<ArrayBuffer> {
  const image = new ElfImage(runtime.slice());
  // aarch64 kernels may have pages of 64 KiB.
  const align = image.machine === "x86_64" ? 4096 : 65536;
  const offset = Math.ceil(runtime.length / align) * align;
  const address = image.endAddress(align);
  const launcher = (position: number, indexSize: number): Uint8Array<ArrayBuffer> => {
    const words = [
      ...["run", "--quiet", "--no-config", "--no-lock", "--no-remote", "--no-npm", "--no-prompt", "--no-code-cache"],
      PERMISSION,
      `data:text/javascript,${encodeURIComponent(stageSource(position, indexSize, "main.js"))}`,
    ];
    return assembleLauncher(image.machine, {
      address,
      entry: image.entry,
      setenvSlot: image.importSlot("setenv"),
      env: ENVIRONMENT,
      words,
    });
  };
  const length = Math.ceil((launcher(offset, 0).length + 4096) / align) * align;
  const payload = payloadOf(bundle, boot, offset + length);
  const code = launcher(offset + length, payload.indexSize);
  image.addSegment({ offset, vaddr: address, size: code.length, align, entry: address });
  const result = new Uint8Array(offset + length + payload.bytes.length);
  result.set(image.bytes);
  result.set(code, offset);
  result.set(payload.bytes, offset + length);
  return result;
}
