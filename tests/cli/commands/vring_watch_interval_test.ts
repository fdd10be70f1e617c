import assert from "node:assert/strict";
import { svq } from "../../support/cli.ts";

Deno.test("vring watch without a pause between its rounds is refused before any relay is asked", async () => {
  const { code, stderr } = await svq(["vring", "watch", "no-such-relay", "--interval", "0s"]);
  assert.equal(code, 2, stderr);
  assert.match(stderr, /--interval is the pause between two rounds and cannot be 0/);
});
