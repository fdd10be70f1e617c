import assert from "node:assert/strict";
import { asSource, compileRelayCore } from "../../scripts/build_wasm.ts";
import { GUARD_BYTES } from "../../src/ffi/mod.ts";

Deno.test("the WebAssembly in src/wasm is what its source makes, and no access of it gets past the guard behind its memory", async () => {
  const carried = await Deno.readTextFile(new URL("../../src/wasm/relay_core.ts", import.meta.url));
  const { binary, text } = await compileRelayCore();
  assert.equal(carried, asSource(binary), "deno task wasm makes it anew");
  const offsets = [...text.matchAll(/\boffset=(\d+)/g)].map(([, offset]) => Number(offset));
  assert.ok(offsets.length > 100);
  // The widest access has 16 bytes.
  assert.ok(Math.max(...offsets) + 16 < GUARD_BYTES);
});
