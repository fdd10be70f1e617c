/**
 * How to start this program again.
 *
 * @module
 */
import { packaging, V8_FLAGS } from "../packaging.ts";

/** The words that run svq: the executable itself where it is one file, otherwise deno with the main module. */
export function selfCommand(): string[] {
  if (packaging() !== "source") return [Deno.execPath()];
  const flags = Deno.env.get("DENO_V8_FLAGS") === undefined ? [`--v8-flags=${V8_FLAGS}`] : [];
  return [Deno.execPath(), "run", "-A", "--quiet", ...flags, new URL("./main.ts", import.meta.url).pathname];
}
