/** `svq __complete`: what the completion scripts ask. @module */
import { buildCommand, type Command } from "@stricli/core";
import { propose } from "../complete.ts";
import type { CliContext } from "../context.ts";
import { printable } from "../output.ts";

/** Prints proposals for a command line, one per line: word, tab, brief. */
export const command: Command<CliContext> = buildCommand({
  docs: { brief: "Propose words for a command line" },
  parameters: {
    positional: {
      kind: "array",
      parameter: { parse: String, brief: "The words after svq; the last is the one to complete", placeholder: "WORD" },
    },
  },
  async func(this: CliContext, _flags: Record<never, never>, ...words: string[]): Promise<void> {
    let lines = "";
    for (const { word, brief } of await propose(this, words)) lines += `${printable(word)}\t${printable(brief)}\n`;
    this.output.write(lines);
  },
});
