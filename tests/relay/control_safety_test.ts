import assert from "node:assert/strict";
import { connectUnix } from "../../src/ffi/mod.ts";
import { ControlServer } from "../../src/relay/control.ts";
import { runtimeDir } from "../../src/relay/runtime_dir.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { TempDir } from "../support/temp.ts";
import { waitUntil } from "../support/wait.ts";

const MAIN = new URL("../../src/cli/main.ts", import.meta.url).pathname;

/** Addresses at which a process listens for TCP connections, as /proc/net/tcp has them. */
function tcpListeners(pid: number): string[] {
  const inodes = new Set<string>();
  for (const { name } of Deno.readDirSync(`/proc/${pid}/fd`)) {
    try {
      inodes.add(/^socket:\[(\d+)\]$/.exec(Deno.readLinkSync(`/proc/${pid}/fd/${name}`))?.[1] ?? "");
    } catch { /* closed meanwhile */ }
  }
  const lines = ["tcp", "tcp6"].flatMap((table) => Deno.readTextFileSync(`/proc/net/${table}`).trim().split("\n").slice(1));
  return lines.map((line) => line.trim().split(/\s+/)).filter((fields) => fields[3] === "0A" && inodes.has(fields[9]!)).map((f) => f[1]!);
}

Deno.test("a relay's control socket is its user's alone, and no signal opens a debugger", async () => {
  using folder = new TempDir();
  await Deno.chmod(folder.path, 0o755);
  await using relay = await RelayProcess.start({ folder: folder.path, device: "sim:blk,size=16M" });
  assert.equal(Deno.statSync(folder.path).mode! & 0o777, 0o700);
  assert.equal(Deno.lstatSync(`${folder.path}/relay.sock`).mode! & 0o777, 0o600);
  // The runtime takes the signal for itself a moment after the start, and loses it again.
  const ignored = () => BigInt("0x" + /SigIgn:\s*(\w+)/.exec(Deno.readTextFileSync(`/proc/${relay.process.pid}/status`))![1]!);
  await new Promise((resolve) => setTimeout(resolve, 500));
  await waitUntil("SIGUSR1 to be ignored", () => (ignored() & (1n << 9n)) !== 0n);
  relay.process.kill("SIGUSR1");
  // Two answers later the runtime has seen the signal, if it sees it at all.
  const { pid } = await relay.status();
  await new Promise((resolve) => setTimeout(resolve, 300));
  await relay.status();
  assert.deepEqual(tcpListeners(pid), []);
  await relay.stop();
});

Deno.test("a runtime directory that is a link, or somebody else's, is refused", async () => {
  using folder = new TempDir();
  await Deno.mkdir(folder.join("real"));
  await Deno.symlink(folder.join("real"), folder.join("link"));
  const { code, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [
      "run",
      "-A",
      "--quiet",
      MAIN,
      "relay",
      "run",
      "--name",
      "x",
      "--front",
      `unix:${folder.join("f")}`,
      "--device",
      "sim:blk,size=16M",
    ],
    env: { SVQ_RUNTIME_DIR: folder.join("link"), NO_COLOR: "1" },
  }).output();
  assert.equal(code, 4);
  assert.match(new TextDecoder().decode(stderr), /is not a directory of this user/);
  assert.deepEqual([...Deno.readDirSync(folder.join("real"))], []);
});

Deno.test("a slash behind the runtime directory's name does not lead through a link", async () => {
  using folder = new TempDir();
  await Deno.mkdir(folder.join("real"));
  await Deno.symlink(folder.join("real"), folder.join("link"));
  const before = Deno.env.get("SVQ_RUNTIME_DIR");
  try {
    for (const slashes of ["/", "//"]) {
      Deno.env.set("SVQ_RUNTIME_DIR", folder.join("link") + slashes);
      assert.throws(runtimeDir, { code: "RUNTIME_DIR_UNSAFE" });
    }
    Deno.env.set("SVQ_RUNTIME_DIR", folder.join("real") + "/");
    assert.equal(runtimeDir(), folder.join("real"));
  } finally {
    if (before === undefined) Deno.env.delete("SVQ_RUNTIME_DIR");
    else Deno.env.set("SVQ_RUNTIME_DIR", before);
  }
});

Deno.test("a control client whose id is a list thousands deep, gets an answer and harms nobody (found by fuzzing)", async () => {
  using folder = new TempDir();
  const path = folder.join("c.sock");
  using _server = new ControlServer(path, { status: () => ({ fine: true }) });
  using stream = connectUnix(path);
  const deep = "[".repeat(20_000) + "]".repeat(20_000);
  await stream.send(new TextEncoder().encode(`{"id":${deep},"method":"status"}\n{"id":7,"method":"status"}\n`));
  const bytes = new Uint8Array(65536);
  let text = "";
  while (text.split("\n").length < 3) {
    const { bytes: count } = await stream.receive(bytes);
    assert.ok(count > 0, "the connection lives");
    text += new TextDecoder().decode(bytes.subarray(0, count));
  }
  const [refused, answered] = text.trim().split("\n").map((line) => JSON.parse(line));
  assert.deepEqual([refused.id, refused.error.data.code, answered.id, answered.result.fine], [null, "CONTROL_REQUEST", 7, true]);
});
