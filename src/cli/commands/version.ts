/** `svq version`. @module */
import { buildCommand, type Command } from "@stricli/core";
import type { CliContext } from "../context.ts";
import { printVersion } from "../print_version.ts";

/** Prints the version of svq and of the runtime under it. */
export const command: Command<CliContext> = buildCommand({
  docs: { brief: "Print the version" },
  parameters: {},
  func(this: CliContext): void {
    printVersion(this.output);
  },
});
