/**
 * What a command's function gets as `this`.
 *
 * @module
 */
import type { CommandContext } from "@stricli/core";
import type { GlobalFlags } from "./globals.ts";
import { Output, type Sink } from "./output.ts";
import { untilSignal } from "./signals.ts";

/** The outside world of a run: the process, or a test. */
export interface Host {
  /** Result. */
  stdout: Sink;
  /** Everything else. */
  stderr: Sink;
  /** An environment variable. */
  env: (name: string) => string | undefined;
}

/** `this` of every command. */
export class CliContext implements CommandContext {
  /** Prints results, log and errors as the global flags ask. */
  readonly output: Output;
  /** For @stricli/core; commands use `output`. */
  readonly process: CommandContext["process"];

  /** The context of one run. @param host where to print @param flags the global flags of this run */
  constructor(readonly host: Host, readonly flags: GlobalFlags) {
    this.output = new Output(host.stdout, host.stderr, { ...flags, env: host.env });
    this.process = { stdout: host.stdout, stderr: host.stderr };
  }

  /** Aborts at SIGINT or SIGTERM: see {@linkcode untilSignal}. */
  get signal(): AbortSignal {
    return untilSignal();
  }
}
