/**
 * Entry point of the program.
 *
 * @module
 */
import { runCli } from "./app.ts";
import { processSink } from "./output.ts";

/** Runs the program with this process's arguments, and ends the process. */
export async function main(): Promise<never> {
  // A command may leave Workers or sockets behind on purpose; its end is the program's end.
  Deno.exit(
    await runCli(Deno.args, {
      stdout: processSink(Deno.stdout),
      stderr: processSink(Deno.stderr),
      env: (name) => Deno.env.get(name),
    }),
  );
}

if (import.meta.main) main();
