import assert from "node:assert/strict";
import { SvqError } from "../../src/errors.ts";
import { QmpClient, QmpError } from "../../src/migration/qmp.ts";
import { FakeMonitor } from "../support/fake_monitor.ts";
import { TempDir } from "../support/temp.ts";

function withCode(code: string): (error: unknown) => boolean {
  return (error) => error instanceof SvqError && error.code === code;
}

Deno.test("QMP: commands give what QEMU returned, refusals give its class and text", async () => {
  using folder = new TempDir();
  await using _monitor = new FakeMonitor(
    folder.join("q"),
    (command, args) => Promise.resolve(command === "echo" ? { return: args } : { error: { class: "CommandNotFound", desc: "grüße" } }),
  );
  await using client = await QmpClient.connect(folder.join("q"));
  assert.equal(client.greeting.version, "10.0.2");
  assert.deepEqual(await client.execute("echo", { a: ["ß"] }), { a: ["ß"] });
  await assert.rejects(client.execute("nonsense"), (error) => {
    assert.ok(error instanceof QmpError);
    assert.deepEqual([error.code, error.errorClass, error.message, error.command], ["QMP_ERROR", "CommandNotFound", "grüße", "nonsense"]);
    return true;
  });
});

Deno.test("QMP: an event is found by name and predicate, among those to come or those since a mark", async () => {
  using folder = new TempDir();
  const event = (name: string, data: unknown) => ({ event: name, data, timestamp: { seconds: 5, microseconds: 7 } });
  await using _monitor = new FakeMonitor(folder.join("q"), async (_command, _args, send) => {
    await send(event("STOP", {}));
    await send(event("MIGRATION", { status: "setup" }));
    await send(event("MIGRATION", { status: "completed" }));
    return { return: {} };
  });
  await using client = await QmpClient.connect(folder.join("q"));
  const seen: string[] = [];
  client.onEvent(({ name }) => seen.push(name));
  const coming = client.waitEvent("MIGRATION", { predicate: ({ data }) => data.status === "completed" });
  await client.execute("go");
  assert.deepEqual([(await coming).index, (await coming).timeUs], [2, 5_000_007]);
  assert.equal((await client.waitEvent("STOP", { since: 0 })).index, 0);
  await assert.rejects(client.waitEvent("STOP", { timeoutMs: 20 }), withCode("QMP_TIMEOUT"));
  assert.deepEqual(seen, ["STOP", "MIGRATION", "MIGRATION"]);
});

Deno.test("QMP: an answer that comes after its command was given up is ignored", async () => {
  using folder = new TempDir();
  const { promise: later, resolve: answerNow } = Promise.withResolvers<void>();
  await using _monitor = new FakeMonitor(folder.join("q"), async (command) => {
    if (command === "slow") await later;
    return { return: command };
  });
  await using client = await QmpClient.connect(folder.join("q"));
  await assert.rejects(client.execute("slow", undefined, { timeoutMs: 20 }), withCode("QMP_TIMEOUT"));
  answerNow();
  assert.equal(await client.execute("next"), "next");
});

Deno.test("QMP: when QEMU goes away, waiting commands and events fail and so do later ones", async () => {
  using folder = new TempDir();
  const { promise: asked, resolve: tell } = Promise.withResolvers<void>();
  await using monitor = new FakeMonitor(folder.join("q"), () => {
    tell();
    return Promise.resolve(undefined);
  });
  await using client = await QmpClient.connect(folder.join("q"));
  const [command, event] = [client.execute("quit"), client.waitEvent("SHUTDOWN")];
  command.catch(() => {});
  event.catch(() => {});
  await asked;
  monitor.hangUp();
  await assert.rejects(command, withCode("QMP_CLOSED"));
  await assert.rejects(event, withCode("QMP_CLOSED"));
  await assert.rejects(client.execute("query-status"), withCode("QMP_CLOSED"));
  assert.equal(client.closed, true);
});

Deno.test("QMP: nobody listening, no greeting and something else listening are told apart", async () => {
  using folder = new TempDir();
  await assert.rejects(QmpClient.connect(folder.join("none")), withCode("QMP_UNREACHABLE"));
  {
    await using _silent = new FakeMonitor(folder.join("silent"), () => Promise.resolve(undefined), "");
    await assert.rejects(QmpClient.connect(folder.join("silent"), { timeoutMs: 50 }), withCode("QMP_TIMEOUT"));
  }
  for (const [i, words] of ["QEMU 10.0.2 monitor - type 'help'", "[1]", '{"jsonrpc":"2.0"}'].entries()) {
    await using _other = new FakeMonitor(folder.join(`other${i}`), () => Promise.resolve(undefined), words);
    await assert.rejects(QmpClient.connect(folder.join(`other${i}`)), withCode("QMP_PROTOCOL"));
  }
});
