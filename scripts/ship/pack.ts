/**
 * One executable without Deno's own `deno compile`: the runtime, a launcher in front of its first instruction, and the
 * program. It is an ordinary ELF file; nothing is unpacked anywhere when it starts.
 *
 *     runtime (unchanged but for one program header and the entry) | launcher | pieces of the program
 *
 * @module
 */
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

/** Source that starts a thread: reads the pieces from the running file and hands them to the boot code. */
function stageSource(position: string, size: string, entry: string): string {
  return `const f=Deno.openSync("/proc/self/exe"),b=new Uint8Array(${size});f.seekSync(${position},0);let n=0;` +
    `for(let k;n<b.length&&(k=f.readSync(b.subarray(n)))!==null;)n+=k;f.close();` +
    `if(n<b.length){console.error("error: this file of svq is incomplete: copy it again");Deno.exit(1)}` +
    `const t=(s,e)=>new TextDecoder().decode(b.subarray(s,e)),i=JSON.parse(t(0,b.indexOf(10))),p=(x)=>t(...i[x]);` +
    `(0,eval)(p("boot.js"))(p,(e)=>p("stage.js").replace("EN"+"TRY",e),"${entry}")`;
}

function payloadOf(bundle: Bundle, boot: string, position: number): Uint8Array<ArrayBuffer> {
  const encoder = new TextEncoder();
  const build = (size: number): Uint8Array<ArrayBuffer> => {
    const texts = new Map([...bundle.files].map(([name, text]) => [name, toPiece(name, text)]));
    texts.set("boot.js", boot.replace(/^(?:\/\/.*\n)+/, "").replace("ENVIRONMENT", JSON.stringify(ENVIRONMENT)));
    texts.set("stage.js", stageSource(String(position), String(size).padStart(8, " "), "ENTRY"));
    const parts = [...texts].map(([name, text]) => [name, encoder.encode(text)] as const);
    // Offsets of fixed width: the index does not change its length when they are known.
    let end = 0;
    const index = (base: number) => {
      end = base;
      const cells = parts.map(([name, bytes]) => {
        const begin = end;
        end += bytes.length;
        return `${JSON.stringify(name)}:[${String(begin).padStart(8)},${String(end).padStart(8)}]`;
      });
      return encoder.encode(`{${cells.join(",")}}\n`);
    };
    const head = index(index(0).length);
    const result = new Uint8Array(end);
    result.set(head);
    let at = head.length;
    for (const [, bytes] of parts) {
      result.set(bytes, at);
      at += bytes.length;
    }
    return result;
  };
  return build(build(0).length);
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
  const launcher = (position: number, size: number): Uint8Array<ArrayBuffer> => {
    const words = [
      ...["run", "--quiet", "--no-config", "--no-lock", "--no-remote", "--no-npm", "--no-prompt", "--no-code-cache"],
      PERMISSION,
      `data:text/javascript,${encodeURIComponent(stageSource(String(position), String(size).padStart(8, " "), "main.js"))}`,
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
  const code = launcher(offset + length, payload.length);
  image.addSegment({ offset, vaddr: address, size: code.length, align, entry: address });
  const result = new Uint8Array(offset + length + payload.length);
  result.set(image.bytes);
  result.set(code, offset);
  result.set(payload, offset + length);
  return result;
}
