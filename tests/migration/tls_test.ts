import assert from "node:assert/strict";
import { FRAME } from "../../src/migration/protocol.ts";
import { connectTls, secretOf, TlsListener } from "../../src/migration/tls.ts";
import { assertMoves, type Fault, FrameProxy, Hosts, migrationTo } from "../support/migration.ts";
import { svq } from "../support/cli.ts";
import { TempDir } from "../support/temp.ts";

const SECRET = new TextEncoder().encode("0123456789abcdef0123");

/** A certificate for localhost and 127.0.0.1, as docs/operations.md says how to make one. */
async function certificate(dir: TempDir): Promise<{ cert: string; key: string; certPath: string; keyPath: string }> {
  const [certPath, keyPath] = [dir.join("cert.pem"), dir.join("key.pem")];
  const { success, stderr } = await new Deno.Command("openssl", {
    args: [
      ...["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30", "-subj", "/CN=svq"],
      ...["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"],
      ...["-keyout", keyPath, "-out", certPath],
    ],
  }).output();
  assert.ok(success, new TextDecoder().decode(stderr));
  return { certPath, keyPath, cert: await Deno.readTextFile(certPath), key: await Deno.readTextFile(keyPath) };
}

const hasOpenssl = await new Deno.Command("openssl", { args: ["version"] }).output().then(({ success }) => success, () => false);

function tlsTest(name: string, body: (dir: TempDir) => Promise<void>): void {
  Deno.test({
    name,
    ignore: !hasOpenssl,
    fn: async () => {
      using dir = new TempDir();
      await body(dir);
    },
  });
}

tlsTest("A guest moves over TLS", async (dir) => {
  const { cert, key } = await certificate(dir);
  await using hosts = new Hosts();
  const listener = new TlsListener("127.0.0.1", 0, { cert, key, secret: SECRET }, () => {});
  const destination = hosts.destinationOn(listener);
  const connect = () => connectTls("127.0.0.1", listener.port, { caCerts: [cert], secret: SECRET }, 5000);
  await assertMoves(hosts, { destination, path: "" }, { connect, endIsProof: false });
});

tlsTest("Another certificate, another name, another secret: no migration, and each says why", async (dir) => {
  const { cert, key } = await certificate(dir);
  using other = new TempDir();
  const { cert: stranger } = await certificate(other);
  const refusals: string[] = [];
  using listener = new TlsListener("127.0.0.1", 0, { cert, key, secret: SECRET }, (reason) => refusals.push(reason));
  const accepting = (async () => {
    for (;;) (await listener.accept()).close();
  })();
  accepting.catch(() => {});
  const to = (host: string, caCerts: string[], secret = SECRET) => connectTls(host, listener.port, { caCerts, secret }, 5000);
  await assert.rejects(to("127.0.0.1", [stranger]), { code: "TLS_FAILED", message: /certificate/i });
  await assert.rejects(to("127.0.0.2", [cert]), { message: /ECONNREFUSED|refused|NotValidForName|certificate/i });
  await assert.rejects(to("127.0.0.1", [cert], new TextEncoder().encode("another secret of 16")), { code: "TLS_FAILED" });
  assert.ok(refusals.some((reason) => /does not know the shared secret/.test(reason)), refusals.join("; "));
  (await to("127.0.0.1", [cert])).close();
});

for (const [fault, type, outcome] of [["cut", FRAME.RUNNING, "completed"], ["cut", FRAME.COMMIT, "aborted"]] as const) {
  Deno.test(`Where the end of the stream proves nothing, the destination is asked: ${fault} at ${type === FRAME.COMMIT ? "COMMIT" : "RUNNING"}`, async () => {
    await using hosts = new Hosts();
    const guest = await hosts.guest();
    const { path } = hosts.destination();
    const proxy = hosts.own(
      new FrameProxy(hosts.dir.join("p"), path, (_from, kind): Fault | undefined => kind === type ? fault : undefined),
    );
    const { source, migration } = migrationTo(proxy.path, guest, { endIsProof: false, doubtTimeoutMs: 5000 });
    using _source = source;
    using _migration = migration;
    assert.equal((await migration.run()).outcome, outcome);
  });
}

Deno.test("Where the end of the stream proves nothing and nobody answers, the guest stays stopped", async () => {
  await using hosts = new Hosts();
  const guest = await hosts.guest();
  const { path } = hosts.destination();
  const proxy = hosts.own(new FrameProxy(hosts.dir.join("p"), path, (_from, kind) => kind === FRAME.RUNNING ? "cut" : undefined, true));
  const { source, migration } = migrationTo(proxy.path, guest, { endIsProof: false, doubtTimeoutMs: 300 });
  using _source = source;
  using _migration = migration;
  assert.equal((await migration.run()).outcome, "in-doubt");
});

Deno.test("A secret is long enough, and the white space around it does not count", () => {
  assert.deepEqual(secretOf(new TextEncoder().encode("  0123456789abcdef\n")), new TextEncoder().encode("0123456789abcdef"));
  assert.throws(() => secretOf(new TextEncoder().encode("0123456789abcde\n")), { code: "USAGE" });
});

Deno.test("tls: without certificate or secret is a usage error, on both sides", async () => {
  using dir = new TempDir();
  const env = { SVQ_RUNTIME_DIR: dir.path };
  const listen = await svq(["migrate", "listen", "tls:127.0.0.1:0", "--device", "sim:blk"], env);
  assert.equal(listen.code, 2, listen.stderr);
  assert.match(listen.stderr, /--tls-cert, --tls-key and --tls-secret/);
  const run = await svq(["migrate", "run", "--to", "tls:127.0.0.1:1", "--device", "sim:blk"], env);
  assert.equal(run.code, 2, run.stderr);
  assert.match(run.stderr, /--tls-secret/);
});
