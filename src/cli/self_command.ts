/**
 * How to start this program again.
 *
 * @module
 */
import { packaging } from "../packaging.ts";

/** The words that run svq: the executable itself where it is one file, otherwise deno with the main module. */
export function selfCommand(): string[] {
  if (packaging() !== "source") return [Deno.execPath()];
  return [Deno.execPath(), "run", "-A", "--quiet", new URL("./main.ts", import.meta.url).pathname];
}
