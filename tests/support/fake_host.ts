/**
 * The command line inside a test, without a process.
 *
 * @module
 */
import { runCli } from "../../src/cli/app.ts";
import type { Host } from "../../src/cli/context.ts";
import type { Sink } from "../../src/cli/output.ts";

/** A sink that keeps what is written. */
export class MemorySink implements Sink {
  text = "";
  /** Throws BrokenPipe from now on. */
  broken = false;

  constructor(readonly isTerminal = false) {}

  write(text: string): void {
    if (this.broken) throw new Deno.errors.BrokenPipe("broken pipe");
    this.text += text;
  }
}

/** A host that keeps what is printed. */
export function fakeHost(env: Record<string, string> = {}, terminal = false): Host & { stdout: MemorySink; stderr: MemorySink } {
  return { stdout: new MemorySink(terminal), stderr: new MemorySink(terminal), env: (name) => env[name] };
}

/** `svq ARGS` in this process. */
export async function runInProcess(
  args: readonly string[],
  env: Record<string, string> = {},
  terminal = false,
): Promise<{ code: number; stdout: string; stderr: string }> {
  const host = fakeHost({ HOME: "/nonexistent", ...env }, terminal);
  const code = await runCli(args, host);
  return { code, stdout: host.stdout.text, stderr: host.stderr.text };
}
