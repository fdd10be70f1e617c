/**
 * Parses the words of a command and runs it, with the framework.
 *
 * @module
 */
import { buildApplication, type Command, run, text_en } from "@stricli/core";
import type { CliContext } from "./context.ts";
import { parseErrorText } from "./parse_errors.ts";

/** What a command is called with. */
export interface Call {
  /** `relay run`. */
  name: string;
  /** Its words, defaults included. */
  words: readonly string[];
  /** Where defaults came from, by flag or argument. */
  origins: ReadonlyMap<string, string>;
}

/** Runs a command. @throws SvqError USAGE, or what the command throws */
export async function parseAndRun(context: CliContext, command: Command<CliContext>, { name, words, origins }: Call): Promise<void> {
  // The framework formats errors to text; ours leave it as they are, by being thrown through it.
  const rethrow = (error: unknown): never => {
    throw error;
  };
  const app = buildApplication(command, {
    name: `svq ${name}`,
    scanner: { caseStyle: "allow-kebab-for-camel", allowArgumentEscapeSequence: true },
    localization: {
      text: {
        ...text_en,
        exceptionWhileParsingArguments: (error) => rethrow(parseErrorText(error, { name, command, words, origins })),
        exceptionWhileLoadingCommandFunction: rethrow,
        exceptionWhileLoadingCommandContext: rethrow,
        exceptionWhileRunningCommand: rethrow,
        commandErrorResult: rethrow,
      },
    },
  }, {});
  await run(app, words, context);
}
