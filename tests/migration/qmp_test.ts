import assert from "node:assert/strict";
import { SvqError } from "../../src/errors.ts";
import { QmpClient, QmpError } from "../../src/migration/qmp.ts";
import { TempDir } from "../support/temp.ts";

const GREETING = { QMP: { version: { qemu: { major: 10, minor: 0, micro: 2 } }, capabilities: ["oob"] } };

type Answer = (command: string, args: unknown, send: (message: unknown) => Promise<void>) => Promise<unknown>;

/** A monitor that answers as told. */
class FakeMonitor implements AsyncDisposable {
  readonly #listener: Deno.UnixListener;
  readonly #answer: Answer;
  readonly #serving: Promise<void>;
  readonly #greeting: string;
  #connection: Deno.UnixConn | undefined;

  constructor(path: string, answer: Answer, greeting: string = JSON.stringify(GREETING)) {
    this.#listener = Deno.listen({ transport: "unix", path });
    this.#answer = answer;
    this.#greeting = greeting;
    this.#serving = this.#serve().catch(() => {});
  }

  async #serve(): Promise<void> {
    const connection = this.#connection = await this.#listener.accept();
    // One byte at a time, so that the client meets lines and UTF-8 letters in pieces.
    const write = async (text: string) => {
      for (const byte of new TextEncoder().encode(text)) await connection.write(Uint8Array.of(byte));
    };
    const send = (message: unknown) => write(JSON.stringify(message) + "\r\n");
    if (this.#greeting !== "") await write(this.#greeting + "\n");
    let text = "";
    for await (const chunk of connection.readable.pipeThrough(new TextDecoderStream())) {
      text += chunk;
      for (let end = text.indexOf("\n"); end >= 0; end = text.indexOf("\n")) {
        const { execute, arguments: args, id } = JSON.parse(text.slice(0, end));
        text = text.slice(end + 1);
        const answer = execute === "qmp_capabilities" ? { return: {} } : await this.#answer(execute, args, send);
        if (answer !== undefined) await send({ ...answer, id });
      }
    }
  }

  hangUp(): void {
    this.#connection?.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#listener.close();
    try {
      this.#connection?.close();
    } catch { /* closed already */ }
    await this.#serving;
  }
}

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
