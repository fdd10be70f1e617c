/**
 * What `svq version` and `svq --version` print.
 *
 * @module
 */
import { packaging } from "../packaging.ts";
import { VERSION } from "../version.ts";
import type { Output } from "./output.ts";

/** Prints the version of svq, of the runtime under it, and in which form it runs. */
export function printVersion(output: Output): void {
  const { deno, v8, typescript } = Deno.version;
  const document = { schema: "svq.version/1", version: VERSION, deno, v8, typescript, packaging: packaging(), target: Deno.build.target };
  output.document(document, () => `svq ${VERSION} (deno ${deno}, ${Deno.build.target}, ${packaging()})`);
}
