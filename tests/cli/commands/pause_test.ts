import assert from "node:assert/strict";
import { svq } from "../../support/cli.ts";

for (const command of [["vring", "watch"], ["monitor"]]) {
  Deno.test(`svq ${command.join(" ")} without a pause between its rounds is refused before any relay is asked`, async () => {
    const { code, stderr } = await svq([...command, "no-such-relay", "--interval", "0s"]);
    assert.equal(code, 2, stderr);
    assert.match(stderr, /0s: the pause between two rounds cannot be 0/);
  });
}
