import assert from "node:assert/strict";
import { asSource, buildRelayCore } from "../../scripts/build_wasm.ts";

Deno.test("the WebAssembly in src/wasm is what its source makes (deno task wasm makes it anew)", async () => {
  const carried = await Deno.readTextFile(new URL("../../src/wasm/relay_core.ts", import.meta.url));
  assert.equal(carried, asSource(await buildRelayCore()));
});
