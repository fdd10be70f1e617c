/** `svq schema`. @module */
import { buildCommand, type Command } from "@stricli/core";
import { suggestionHint } from "../../suggest.ts";
import type { CliContext } from "../context.ts";
import { findSchema, SCHEMAS } from "../schemas/mod.ts";
import { usageError } from "../usage.ts";

/** `svq.probe/1` as typed: `probe`. */
function shortName(name: string): string {
  return name.replace(/^svq\./, "").replace(/\/\d+$/, "");
}

/** Prints a document's JSON schema, or lists the documents. */
export const command: Command<CliContext> = buildCommand({
  docs: {
    brief: "Print the JSON schema of a document",
    fullDescription: "Print the JSON schema (draft 2020-12) of a document that -j prints. Without NAME, list the documents.\n\n" +
      'Keys may be added within a version, never changed. 64-bit addresses and feature words are strings "0x…";\n' +
      "durations end in _ns, _us or _ms, sizes in _bytes.\n\nExample:\n  svq schema probe",
  },
  parameters: {
    positional: {
      kind: "tuple",
      parameters: [{
        parse: String,
        brief: "Document, e.g. probe or svq.probe/1",
        placeholder: "NAME",
        optional: true,
        proposeCompletions: (partial: string) => Object.keys(SCHEMAS).map(shortName).filter((name) => name.startsWith(partial)),
      }],
    },
  },
  func(this: CliContext, _flags: Record<never, never>, name?: string): void {
    if (name === undefined) {
      const documents = Object.entries(SCHEMAS).map(([name, schema]) => ({ name, description: schema.description ?? "" }));
      this.output.document({ schema: "svq.schemas/1", documents }, () => {
        this.output.table(["document", "description"], documents.map(({ name, description }) => [name, description]));
      });
      return;
    }
    const schema = findSchema(name);
    if (schema === undefined) {
      throw usageError(
        `Unknown document ${JSON.stringify(name)}`,
        suggestionHint(shortName(name), Object.keys(SCHEMAS).map(shortName), "documents"),
      );
    }
    // A schema is JSON for whoever reads it; -j only makes it one line.
    this.output.write(JSON.stringify(schema, undefined, this.output.json && !this.output.options.pretty ? undefined : 2) + "\n");
  },
});
