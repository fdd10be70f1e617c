/**
 * `svq bench ring` with the C reference beside it, where there is a C compiler:
 *
 *     deno task bench:ring [FLAG of svq bench ring]...
 *
 * @module
 */
import { selfCommand } from "../src/cli/self_command.ts";

const ROOT = new URL("..", import.meta.url).pathname;

/** Builds tests/bench/reference.c. @returns the library, or undefined where there is no compiler */
export async function buildReference(folder: string): Promise<string | undefined> {
  const output = `${folder}/reference.so`;
  const source = `${ROOT}tests/bench/reference.c`;
  try {
    const { success, stderr } = await new Deno.Command("cc", {
      args: ["-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", output, source],
      stdin: "null",
    }).output();
    if (!success) throw new Error(new TextDecoder().decode(stderr));
    return output;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw error;
  }
}

if (import.meta.main) {
  const folder = await Deno.makeTempDir({ prefix: "svq-reference-" });
  let code = 1;
  try {
    const library = await buildReference(folder);
    if (library === undefined) console.error("No C compiler: without the reference");
    const words = ["bench", "ring", ...(library === undefined ? [] : ["--reference", library]), ...Deno.args];
    const [program, ...args] = [...selfCommand(), ...words];
    code = (await new Deno.Command(program!, { args }).spawn().status).code;
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
  Deno.exit(code);
}
