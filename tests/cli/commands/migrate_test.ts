import assert from "node:assert/strict";
import { FRAME } from "../../../src/migration/protocol.ts";
import { svq, svqCommand } from "../../support/cli.ts";
import { FrameProxy } from "../../support/migration.ts";
import { assertMatchesSchema } from "../../support/schema.ts";
import { TempDir } from "../../support/temp.ts";
import { waitUntil } from "../../support/wait.ts";

/** `svq migrate listen` in a process of its own. */
class Listener implements AsyncDisposable {
  readonly #child: Deno.ChildProcess;
  readonly output: Promise<{ code: number; stdout: string; stderr: string }>;
  #stderr = "";
  readonly #ready = Promise.withResolvers<string>();
  #ended = false;

  constructor(uri: string, device: string, env: Record<string, string>) {
    this.#child = svqCommand(["migrate", "listen", uri, "--device", device, "-j"], env).spawn();
    const stdout = new Response(this.#child.stdout).text();
    const stderr = this.#read();
    this.output = Promise.all([this.#child.status, stdout, stderr]).then(([{ code }, out]) => {
      this.#ended = true;
      return { code, stdout: out, stderr: this.#stderr };
    });
  }

  async #read(): Promise<void> {
    const decoder = new TextDecoder();
    for await (const chunk of this.#child.stderr) {
      this.#stderr += decoder.decode(chunk, { stream: true });
      const found = /listening on (\S+?)"/.exec(this.#stderr);
      if (found !== null) this.#ready.resolve(found[1]!);
    }
    this.#ready.reject(new Error(`listen ended: ${this.#stderr}`));
  }

  /** Where it listens. */
  ready(): Promise<string> {
    return this.#ready.promise;
  }

  kill(): void {
    if (!this.#ended) this.#child.kill("SIGKILL");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.kill();
    await this.output;
    await this.#ready.promise.catch(() => {});
  }
}

class Lab implements Disposable {
  readonly dir = new TempDir();
  readonly env = { SVQ_RUNTIME_DIR: this.dir.path, TMPDIR: this.dir.path };
  readonly device = `sim:blk,file=${this.dir.join("disk")},size=16MiB,latency=200us`;

  listen(uri = `unix:${this.dir.join("m")}`): Listener {
    return new Listener(uri, this.device, this.env);
  }

  run(to: string, more: string[] = []): Promise<{ code: number; stdout: string; stderr: string }> {
    return svq([...this.words(to), ...more], this.env);
  }

  words(to: string): string[] {
    return ["migrate", "run", "-j", "--to", to, "--device", this.device, "--mem", "8MiB", "--duration", "1500ms", "--warmup", "200ms"];
  }

  [Symbol.dispose](): void {
    this.dir[Symbol.dispose]();
  }
}

Deno.test("svq migrate run and listen move a guest over TCP on this host; both print svq.migrate/1", async () => {
  using lab = new Lab();
  await using listener = lab.listen("tcp:127.0.0.1:0");
  const uri = await listener.ready();
  const page = lab.dir.join("report.html");
  Deno.writeTextFileSync(page, "x".repeat(1 << 20));
  const { code, stdout, stderr } = await lab.run(uri, ["--report", page]);
  assert.equal(code, 0, stderr);
  assertMatchesSchema("migrate", stdout);
  const html = Deno.readTextFileSync(page);
  assert.ok(html.startsWith("<!DOCTYPE html>") && html.endsWith("</html>\n"), "what was there before is gone");
  assert.equal(html.match(/<svg/g)?.length, 5);
  const [source0, destination0] = html.match(/<polyline class="p50 line" points="[^"]+"/g)!.map((line) =>
    Number(/"([\d.]+),/.exec(line)![1])
  );
  assert.ok(source0! < destination0!, "requests are seen on both sides of the gap");
  const source = JSON.parse(stdout);
  assert.equal(source.outcome, "completed");
  assert.equal(source.memory_identical, true);
  assert.equal(source.requests.lost + source.requests.duplicated + source.requests.corrupted, 0);
  const there = await listener.output;
  assert.equal(there.code, 0, there.stderr);
  assertMatchesSchema("migrate", there.stdout);
  assert.deepEqual(JSON.parse(there.stdout).requests, source.requests, "both tell of the same guest");
});

Deno.test("A report that finds the disk full takes nothing away of what came of the guest: the document is whole, and exit 1 says what is missing", async () => {
  using lab = new Lab();
  await using listener = lab.listen();
  const { code, stdout, stderr } = await lab.run(await listener.ready(), ["--report", "/dev/full"]);
  assert.equal(code, 1, stderr);
  assert.equal(JSON.parse(stdout).outcome, "completed");
  assertMatchesSchema("error", stderr.trim().split("\n").at(-1)!);
  assert.match(stderr, /"code":"UNWRITABLE_FILE"/);
  assert.equal((await listener.output).code, 0);
});

Deno.test("When the destination is killed at any moment before the hand-over, the guest goes on at the source: exit 7, nothing lost", async (test) => {
  // So slow a link is far from done when the kill hits, wherever that is.
  for (const [name, phase] of [["while memory is sent", "rounds"], ["at the log", "log"]] as const) {
    await test.step(name, async () => {
      using lab = new Lab();
      await using listener = lab.listen();
      const uri = await listener.ready();
      const child = svqCommand([...lab.words(uri), "--max-bandwidth", "256KiB", "--progress", "json"], lab.env).spawn();
      const decoder = new TextDecoder();
      let stderr = "";
      const stdout = new Response(child.stdout).text();
      for await (const chunk of child.stderr) {
        stderr += decoder.decode(chunk, { stream: true });
        if (stderr.includes(`"phase":"${phase}"`)) listener.kill();
      }
      const { code } = await child.status;
      assert.equal(code, 7, stderr);
      const document = JSON.parse(await stdout);
      assertMatchesSchema("migrate", document);
      assert.equal(document.outcome, "aborted");
      assert.equal(document.requests.lost + document.requests.duplicated + document.requests.corrupted, 0);
      assert.equal(document.requests.completed, document.requests.submitted);
    });
  }
});

Deno.test("svq migrate status shows a running migration, cancel ends it: exit 7, and the guest goes on", async () => {
  using lab = new Lab();
  await using listener = lab.listen();
  const uri = await listener.ready();
  // No page arrives: the migration stays where it is until it has been looked at.
  await using proxy = new FrameProxy(
    lab.dir.join("p"),
    uri.slice("unix:".length),
    (from, type) => from === "source" && type === FRAME.PAGES ? "stall" : undefined,
  );
  const child = svqCommand([...lab.words(`unix:${proxy.path}`), "--timeout", "10m", "--name", "move"], lab.env).spawn();
  const finished = child.output();
  await waitUntil("the control socket", () => [...Deno.readDirSync(lab.dir.path)].some((entry) => entry.name === "move.migration"));
  const status = await waitUntil("the rounds", async () => {
    const { code, stdout } = await svq(["migrate", "status", "-j"], lab.env);
    const document = code === 0 ? JSON.parse(stdout) : undefined;
    return document?.phase === "rounds" ? document : undefined;
  });
  assertMatchesSchema("migrate", status);
  assert.equal(status.outcome, "running");
  assert.equal((await svq(["migrate", "cancel", "move"], lab.env)).code, 0);
  const { code, stdout, stderr } = await finished;
  assert.equal(code, 7, new TextDecoder().decode(stderr));
  const document = JSON.parse(new TextDecoder().decode(stdout));
  assert.equal(document.outcome, "cancelled");
  assert.equal(document.requests.completed, document.requests.submitted);
  const gone = await svq(["migrate", "status", "move", "-j"], lab.env);
  assert.equal(gone.code, 3);
  assertMatchesSchema("error", gone.stderr);
});

Deno.test("A guest that is slowed down is seen to be: in progress, in status, at the end and in the report", async () => {
  using lab = new Lab();
  await using listener = lab.listen();
  const uri = await listener.ready();
  const page = lab.dir.join("out.html");
  let slowed = false;
  // Once the guest is slowed down nothing more arrives: the migration stays where it is until it has been looked at.
  await using proxy = new FrameProxy(lab.dir.join("p"), uri.slice("unix:".length), () => slowed ? "stall" : undefined);
  // Stopping takes 5 ms in any case: it never converges.
  const limits = ["--max-bandwidth", "16MiB", "--downtime-limit", "1ms", "--max-iterations", "1000", "--on-no-convergence", "throttle"];
  const child = svqCommand(
    [
      ...[...lab.words(`unix:${proxy.path}`), "--depth", "32", ...limits, "--timeout", "10m", "--progress", "json"],
      ...["--report", page, "--name", "slow"],
    ],
    lab.env,
  ).spawn();
  let lines = "";
  const finished = Promise.all([
    child.status,
    new Response(child.stdout).text(),
    (async () => {
      for await (const text of child.stderr.pipeThrough(new TextDecoderStream())) {
        lines += text;
        slowed ||= /"progress":.*"throttle_percent":20\b/.test(lines);
      }
    })(),
  ]);
  await Promise.race([finished, waitUntil("a line that says so", () => slowed)]);
  assert.ok(slowed, lines);
  const { code: found, stdout: status, stderr: refused } = await svq(["migrate", "status", "slow"], lab.env);
  assert.equal(found, 0, refused);
  assert.match(status, /^slow: rounds, .*, guest slowed down by (20|40|60|80|90|95|99) %$/m);
  assert.equal((await svq(["migrate", "cancel", "slow"], lab.env)).code, 0);
  const [{ code }, stdout] = await finished;
  assert.equal(code, 7, lines);
  const document = JSON.parse(stdout);
  assertMatchesSchema("migrate", document);
  assert.equal(document.outcome, "cancelled", lines);
  assert.ok(document.throttle_percent >= 20, JSON.stringify(document));
  assert.match(Deno.readTextFileSync(page), /held still for up to \d+ %/);
});

Deno.test("Plain TCP beyond this host needs --insecure; a URI that is none is a usage error", async () => {
  using lab = new Lab();
  const refused = await svq(["migrate", "listen", "tcp:0.0.0.0:0", "--device", "sim:blk"], lab.env);
  assert.equal(refused.code, 2);
  assert.match(refused.stderr, /unencrypted/);
  // At the source before a guest is started.
  const source = await svq(["migrate", "run", "--to", "tcp:192.0.2.7:99", "--device", "sim:blk"], lab.env);
  assert.deepEqual([source.code, source.stdout], [2, ""]);
  assert.match(source.stderr, /unencrypted/);
  const bad = await svq(["migrate", "run", "--to", "/run/x", "--device", "sim:blk"], lab.env);
  assert.equal(bad.code, 2);
  assert.match(bad.stderr, /tcp:HOST:PORT/);
});
