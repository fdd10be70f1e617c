import assert from "node:assert/strict";

const MAIN = new URL("../../../src/cli/main.ts", import.meta.url).href;

function spawn(args: string[]): Deno.ChildProcess {
  return new Deno.Command(Deno.execPath(), {
    args: ["run", "--quiet", "--no-check", "-A", MAIN, ...args],
    env: { NO_COLOR: "1" },
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
}

async function svq(...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  const { code, stdout, stderr } = await spawn(args).output();
  return { code, stdout: new TextDecoder().decode(stdout), stderr: new TextDecoder().decode(stderr) };
}

/** Reads stderr until `text` has come. */
async function printed(child: Deno.ChildProcess, text: string): Promise<void> {
  const reader = child.stderr.pipeThrough(new TextDecoderStream()).getReader();
  for (let all = ""; !all.includes(text);) {
    const { value, done } = await reader.read();
    if (done) throw new Error(`It ended without "${text}": ${all}`);
    all += value;
  }
  // The pipe must not fill up.
  (async () => {
    while (!(await reader.read()).done);
  })();
}

Deno.test("svq drive prints one svq.drive/1 document", async () => {
  const { code, stdout, stderr } = await svq("-j", "drive", "sim:loopback,latency=50us", "--requests", "200");
  assert.equal(stderr, "");
  const document = JSON.parse(stdout);
  assert.equal(document.schema, "svq.drive/1");
  assert.equal(document.device, "sim:loopback,latency=50us");
  const { completed, lost, duplicated, corrupted, out_of_order } = document.requests;
  assert.deepEqual({ completed, lost, duplicated, corrupted, out_of_order }, {
    completed: 200,
    lost: 0,
    duplicated: 0,
    corrupted: 0,
    out_of_order: 0,
  });
  assert.deepEqual(Object.keys(document.latency_us), ["p50", "p99", "p999", "max"]);
  assert.equal(code, 0);
});

Deno.test("svq drive counts requests that never come back as lost and exits 1", async () => {
  const { code, stdout } = await svq("-j", "drive", "sim:blk,size=1MiB,latency=60s", "--requests", "10", "--drain-timeout", "200ms");
  assert.equal(JSON.parse(stdout).requests.lost, 10);
  assert.equal(code, 1);
});

Deno.test("svq device run serves one front-end after the other, keeps the disk, and ends cleanly at SIGTERM", async () => {
  const dir = await Deno.makeTempDir();
  const path = `${dir}/disk.sock`;
  const device = spawn(["device", "run", "blk", "--socket-path", path, "--size", "8MiB", "--queues", "2"]);
  try {
    await printed(device, "ready on");
    for (const args of [["--queues", "2"], ["--seed", "9", "--depth", "4"]]) {
      const { code, stdout, stderr } = await svq("-j", "drive", `unix:${path}`, "--requests", "300", ...args);
      assert.equal(code, 0, stderr);
      assert.equal(JSON.parse(stdout).requests.completed, 300);
    }
    device.kill("SIGTERM");
    assert.equal((await device.status).code, 0);
    await assert.rejects(Deno.lstat(path), Deno.errors.NotFound);
  } finally {
    try {
      device.kill("SIGKILL");
    } catch { /* it has ended */ }
    await device.status;
    await device.stdout.cancel();
    await Deno.remove(dir, { recursive: true });
  }
});

Deno.test("svq device run prints its capabilities as the conventions ask, and refuses what makes no sense", async () => {
  const { code, stdout } = await svq("device", "run", "blk", "--print-capabilities");
  assert.equal(code, 0);
  assert.deepEqual(JSON.parse(stdout), { type: "block", features: ["read-only", "blk-file"] });
  assert.equal((await svq("device", "run", "blk")).code, 2);
  assert.equal((await svq("device", "run", "block", "--socket-path", "/tmp/x")).code, 2);
  assert.equal((await svq("device", "run", "blk", "--socket-path", "/nonexistent/x/y", "--file", "/nonexistent/disk")).code, 3);
});
