/**
 * All commands: name, one line for `svq --help`, and how to load the file. The import specifiers are literal so that
 * `deno compile` and bundlers find the files. The line must equal the `brief` of the command itself (a test compares).
 *
 * @module
 */
import type { Target } from "./model.ts";

/** A command that is loaded when it is needed. */
export interface LazyCommand {
  /** One line. */
  brief: string;
  /** Not shown in help, man pages and completions. */
  hidden?: boolean;
  /** Loads the file. */
  load: () => Promise<{ command: Target }>;
}

/** In the order of `svq --help`. */
export const COMMANDS: Readonly<Record<string, LazyCommand>> = {
  iova: { brief: "Plan where guest memory and shadow rings lie for a device", load: () => import("./commands/iova.ts") },
  version: { brief: "Print the version", load: () => import("./commands/version.ts") },
};
