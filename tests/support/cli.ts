/**
 * Runs the command line as a child process, as a user would.
 *
 * @module
 */

/** What came of a run. */
export interface CliResult {
  code: number;
  stdout: string;
  stderr: string;
}

export const MAIN: string = new URL("../../src/cli/main.ts", import.meta.url).pathname;

/**
 * `svq ARGS` to its end.
 *
 * @param args the words after svq
 * @param env variables on top of a small environment of its own
 */
export async function svq(args: readonly string[], env: Record<string, string> = {}): Promise<CliResult> {
  const output = await svqCommand(args, env).output();
  const decoder = new TextDecoder();
  return { code: output.code, stdout: decoder.decode(output.stdout), stderr: decoder.decode(output.stderr) };
}

/** The command for `svq ARGS`, with stdout and stderr piped, to be spawned. @param before words in front of it: a program that runs it */
export function svqCommand(args: readonly string[], env: Record<string, string> = {}, before: readonly string[] = []): Deno.Command {
  const kept = ["PATH", "DENO_DIR", "TMPDIR"].flatMap((name) => {
    const value = Deno.env.get(name);
    return value === undefined ? [] : [[name, value]];
  });
  // A home without config files and cache: but where Deno keeps what it has loaded must stay.
  const denoDir = Deno.env.get("DENO_DIR") ?? `${Deno.env.get("HOME") ?? "/root"}/.cache/deno`;
  const [program, ...rest] = [...before, Deno.execPath(), "run", "-A", "--quiet", MAIN, ...args];
  return new Deno.Command(program!, {
    args: rest,
    clearEnv: true,
    env: { ...Object.fromEntries(kept), HOME: "/nonexistent", DENO_DIR: denoDir, ...env },
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  });
}
