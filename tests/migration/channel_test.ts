import assert from "node:assert/strict";
import { mapAnonymous, unixPair } from "../../src/ffi/mod.ts";
import { Channel } from "../../src/migration/channel.ts";

Deno.test("A peer whose bytes are always there in time does not keep timers from their turn", async () => {
  const [ours, theirs] = unixPair();
  using channel = new Channel(ours, 60_000);
  using peer = theirs;
  using memory = mapAnonymous(4096, "received");
  const bytes = new Uint8Array(4096);
  let fired = false;
  const timer = setTimeout(() => fired = true, 30);
  const deadline = performance.now() + 5000;
  while (!fired && performance.now() < deadline) {
    assert.equal(peer.trySend(bytes), bytes.length);
    await channel.readInto(memory.address, bytes.length);
  }
  clearTimeout(timer);
  assert.ok(fired);
});
