import assert from "node:assert/strict";
import { askAllRelays } from "../../../src/cli/ask_relays.ts";
import { listenUnix } from "../../../src/ffi/mod.ts";
import { ControlServer } from "../../../src/relay/control.ts";
import type { RelayStatus } from "../../../src/relay/status.ts";
import { TempDir } from "../../support/temp.ts";

// What a relay with one queue answers, as far as a list needs it.
function status(name: string): RelayStatus {
  return { schema: "svq.relay/1", name, pid: 1, state: "waiting", mode: "auto", queues: [] } as unknown as RelayStatus;
}

function withRuntimeDir<T>(path: string, body: () => Promise<T>): Promise<T> {
  const before = Deno.env.get("SVQ_RUNTIME_DIR");
  Deno.env.set("SVQ_RUNTIME_DIR", path);
  return body().finally(() => before === undefined ? Deno.env.delete("SVQ_RUNTIME_DIR") : Deno.env.set("SVQ_RUNTIME_DIR", before));
}

Deno.test("relay list asks 1000 relays, and names those that are dead", async () => {
  using folder = new TempDir();
  Deno.chmodSync(folder.path, 0o700);
  await withRuntimeDir(folder.path, async () => {
    using stack = new DisposableStack();
    for (let i = 0; i < 1000; i++) {
      const name = `relay-${i}`;
      stack.use(new ControlServer(folder.join(`${name}.sock`), { status: () => status(name) }));
    }
    // Killed: the socket is there, and nobody listens.
    const killed = listenUnix(folder.join("killed.sock"));
    Deno.renameSync(folder.join("killed.sock"), folder.join("kept"));
    killed.close();
    Deno.renameSync(folder.join("kept"), folder.join("killed.sock"));
    const begun = performance.now();
    const { relays, dead } = await askAllRelays(60_000);
    if (Deno.env.has("SVQ_SOAK")) console.log(`1001 relays asked in ${(performance.now() - begun).toFixed(0)} ms`);
    assert.equal(relays.length, 1000);
    assert.equal(new Set(relays.map(({ name }) => name)).size, 1000);
    assert.deepEqual(dead.map(({ name, code }) => [name, code]), [["killed", "NO_SUCH_RELAY"]]);
  });
});

Deno.test("relay list does not wait for a relay that never answers", async () => {
  using folder = new TempDir();
  Deno.chmodSync(folder.path, 0o700);
  await withRuntimeDir(folder.path, async () => {
    // It listens, and nobody takes the connection.
    using _stuck = listenUnix(folder.join("stuck.sock"));
    const { relays, dead } = await askAllRelays(100);
    assert.deepEqual(relays, []);
    assert.deepEqual(dead.map(({ name, code }) => [name, code]), [["stuck", "RELAY_SILENT"]]);
  });
});
