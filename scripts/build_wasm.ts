/**
 * Builds the WebAssembly of the relay core from src/wasm/assembly, as text in src/wasm/relay_core.ts: so it is part of the
 * program whichever way that is packed.
 *
 *     deno task wasm
 *
 * @module
 */
import asc from "npm:assemblyscript@0.28.9/asc";

const ROOT = new URL("..", import.meta.url).pathname;
const ENTRY = "src/wasm/assembly/index.ts";
const TARGET = `${ROOT}src/wasm/relay_core.ts`;
const LINE = 120;

/** Compiles. @param replaced sources to be taken instead, by path from the root @throws Error with what the compiler says */
export async function buildRelayCore(replaced: Readonly<Record<string, string>> = {}): Promise<Uint8Array<ArrayBuffer>> {
  return (await compileRelayCore(replaced)).binary;
}

/** The same, with the module as text. @throws Error with what the compiler says */
export async function compileRelayCore(
  replaced: Readonly<Record<string, string>> = {},
): Promise<{ binary: Uint8Array<ArrayBuffer>; text: string }> {
  let text = "";
  let binary: Uint8Array<ArrayBuffer> | undefined;
  const stderr = asc.createMemoryStream();
  const { error } = await asc.main(
    [
      ENTRY,
      ...["--outFile", "relay_core.wasm", "--textFile", "relay_core.wat", "--runtime", "stub", "-O3", "--converge", "--noAssert"],
      ...["--importMemory", "--sharedMemory", "--initialMemory", "1", "--maximumMemory", "65536"],
      ...["--enable", "threads", "--enable", "bulk-memory", "--use", "abort="],
    ],
    {
      stderr,
      readFile: (name, folder) => {
        if (Object.hasOwn(replaced, name)) return replaced[name]!;
        try {
          return Deno.readTextFileSync(`${ROOT}${folder}/${name}`);
        } catch {
          return null;
        }
      },
      writeFile: (name, contents) => {
        if (name.endsWith(".wasm")) binary = contents as Uint8Array<ArrayBuffer>;
        else text = contents as string;
      },
      listFiles: () => [],
    },
  );
  if (error !== null || binary === undefined) throw new Error(`AssemblyScript: ${error?.message}\n${stderr.toString()}`);
  return { binary, text };
}

/** The TypeScript file that carries the module. */
export function asSource(binary: Uint8Array): string {
  const text = binary.toBase64();
  const lines = Array.from({ length: Math.ceil(text.length / LINE) }, (_, i) => `  "${text.slice(i * LINE, (i + 1) * LINE)}",`);
  return `// Made by deno task wasm from src/wasm/assembly: not to be edited.\n
/** The relay core's WebAssembly module, base64. */
export const RELAY_CORE: string = [\n${lines.join("\n")}\n].join("");\n`;
}

if (import.meta.main) {
  const binary = await buildRelayCore();
  await Deno.writeTextFile(TARGET, asSource(binary));
  console.log(`${binary.length} bytes`);
}
