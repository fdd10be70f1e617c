/**
 * Entry point of the program.
 *
 * @module
 */
import { runCli } from "./app.ts";
import { processSink } from "./output.ts";

if (import.meta.main) {
  // A command may leave Workers or sockets behind on purpose; its end is the program's end.
  Deno.exit(
    await runCli(Deno.args, {
      stdout: processSink(Deno.stdout),
      stderr: processSink(Deno.stderr),
      env: (name) => Deno.env.get(name),
    }),
  );
}
