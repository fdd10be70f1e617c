import assert from "node:assert/strict";
import { TARGETS } from "./targets.ts";

// The corpus and some inputs of each target, in a process that is watched (scripts/fuzz.ts); in the soak all of a full run.
const SOAK = Deno.env.get("SVQ_SOAK") === "1";
const SCRIPT = new URL("../../scripts/fuzz.ts", import.meta.url).pathname;

for (const [name, { quick, unit }] of Object.entries(TARGETS)) {
  Deno.test(`${SOAK ? "a full run" : quick} of hostile ${unit} crashes, hangs and leaks nothing: ${name}`, async () => {
    const words = SOAK ? ["--resume"] : ["--count", String(quick), "--seed", "1"];
    const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
      args: ["run", "-A", "--quiet", "--no-check", SCRIPT, name, ...words],
      env: { NO_COLOR: "1" },
      stdin: "null",
    }).output();
    const text = new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
    if (SOAK) console.log(text);
    assert.equal(code, 0, text);
    assert.match(text, /: ok, /);
  });
}
