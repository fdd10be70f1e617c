/** `svq man`. @module */
import { buildCommand, type Command } from "@stricli/core";
import { COMMANDS } from "../commands.ts";
import type { CliContext } from "../context.ts";
import { commandPage, mainPage } from "../man.ts";
import { suggestionHint } from "../../suggest.ts";
import { usageError } from "../usage.ts";

function names(): string[] {
  return Object.entries(COMMANDS).filter(([, command]) => !command.hidden).map(([name]) => name);
}

/** Prints the manual page of svq or of one command, in roff. */
export const command: Command<CliContext> = buildCommand({
  docs: {
    brief: "Print a manual page",
    fullDescription: "Print the manual page of svq, or of one of its commands, in roff.\n\n" +
      "Examples:\n  svq man relay | man -l -\n  svq man > /usr/local/share/man/man1/svq.1",
  },
  parameters: {
    positional: {
      kind: "tuple",
      parameters: [{
        parse: String,
        brief: "Name of a command",
        placeholder: "COMMAND",
        optional: true,
        proposeCompletions: (partial: string) => names().filter((name) => name.startsWith(partial)),
      }],
    },
  },
  async func(this: CliContext, _flags: Record<never, never>, name?: string): Promise<void> {
    if (name === undefined) return this.output.write(mainPage());
    const lazy = Object.hasOwn(COMMANDS, name) ? COMMANDS[name] : undefined;
    if (lazy === undefined) throw usageError(`Unknown command ${JSON.stringify(name)}`, suggestionHint(name, names(), "commands"));
    this.output.write(commandPage([name], (await lazy.load()).command));
  },
});
