/** `svq version`. @module */
import { buildCommand, type Command } from "@stricli/core";
import { packaging } from "../../packaging.ts";
import { VERSION } from "../../version.ts";
import type { CliContext } from "../context.ts";

/** Prints the version of svq and of the runtime under it. */
export const command: Command<CliContext> = buildCommand({
  docs: { brief: "Print the version" },
  parameters: {},
  func(this: CliContext): void {
    const { deno, v8, typescript } = Deno.version;
    const document = { schema: "svq.version/1", version: VERSION, deno, v8, typescript, packaging: packaging(), target: Deno.build.target };
    this.output.document(document, () => `svq ${VERSION} (deno ${deno}, ${Deno.build.target}, ${packaging()})`);
  },
});
