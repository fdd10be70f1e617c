/**
 * How to start this program again.
 *
 * @module
 */

/** The words that run svq: the executable itself when compiled, otherwise deno with the main module. */
export function selfCommand(): string[] {
  if (Deno.build.standalone) return [Deno.execPath()];
  return [Deno.execPath(), "run", "-A", "--quiet", new URL("./main.ts", import.meta.url).pathname];
}
