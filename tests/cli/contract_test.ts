import assert from "node:assert/strict";
import { COMMANDS } from "../../src/cli/commands.ts";
import { entriesOf, isGroup, type Target } from "../../src/cli/model.ts";
import { svq, svqCommand } from "../support/cli.ts";
import { runInProcess } from "../support/fake_host.ts";
import { RelayProcess } from "../support/relay_process.ts";
import { assertMatchesSchema } from "../support/schema.ts";
import { TempDir } from "../support/temp.ts";
import { waitUntil } from "../support/wait.ts";

// What scripts rely on, for every command that there is: a new command fails the first test here until it has a row.

/** How a command behaves under -j. */
interface Contract {
  /** Words after the command that work on the relay `relay` of these tests; absent where another file runs it. */
  good?: string[];
  /** The document that `good` prints; `lines` of it where there are several; `text` where the result is no JSON. */
  prints?: string;
  /** Exit code of `good`. */
  code?: number;
  /** The test file that holds the command's document against its schema. */
  elsewhere?: string;
  /** Words that are wrong, the exit code, and the document that says so where it is a result and not an error. */
  bad: [string[], number, string?];
}

const CONTRACTS: Record<string, Contract> = {
  "probe": { good: ["sim:blk"], prints: "svq.probe/1", bad: [["unix:/nonexistent/socket"], 3, "svq.probe/1"] },
  "iova plan": { good: ["--region", "0x0+2GiB"], prints: "svq.iova/1", bad: [["--region", "none"], 2] },
  "iova ranges": { good: ["sim:blk"], prints: "svq.iova/1", bad: [["/dev/vhost-vdpa-999"], 3] },
  "iova show": { good: ["relay"], prints: "svq.iova/1", bad: [["nobody"], 3] },
  "iova alloc": { good: ["relay", "2MiB", "--tag", "contract"], prints: "svq.iova/1", bad: [["nobody", "4KiB"], 3] },
  "iova free": { elsewhere: "tests/cli/commands/iova_live_test.ts", bad: [["nobody", "0x1000"], 3] },
  "relay run": { good: ["--print-capabilities"], prints: "any", bad: [["--front", "unix:/nonexistent/a/b", "--device", "sim:blk"], 3] },
  "relay start": { elsewhere: "tests/cli/contract_test.ts", bad: [["--device", "sim:nothing"], 2] },
  "relay stop": { elsewhere: "tests/cli/contract_test.ts", bad: [["nobody"], 3] },
  "relay list": { good: [], prints: "svq.relay-list/1", bad: [["surplus"], 2] },
  "relay status": { good: ["relay"], prints: "svq.relay/1", bad: [["nobody"], 3] },
  "relay set": { good: ["relay", "--mode", "shadow"], prints: "svq.relay/1", bad: [["relay", "--mode", "dark"], 2] },
  "relay premap": { good: ["relay", "--drop"], prints: "svq.relay-premap/1", bad: [["relay"], 2] },
  "relay upgrade": { elsewhere: "tests/cli/contract_test.ts", bad: [["nobody"], 3] },
  "migrate run": {
    elsewhere: "tests/cli/commands/migrate_test.ts",
    bad: [["--to", "unix:/nonexistent/m", "--device", "sim:blk"], 7, "svq.migrate/1"],
  },
  "migrate listen": { elsewhere: "tests/cli/commands/migrate_test.ts", bad: [["ftp:x", "--device", "sim:blk"], 2] },
  "migrate vm": {
    elsewhere: "tests/support/migrate_cli.ts",
    bad: [["--source", "/nonexistent", "--destination", "/nonexistent", "--source-relay", "a", "--destination-relay", "b"], 3],
  },
  "migrate status": { elsewhere: "tests/cli/commands/migrate_test.ts", bad: [["nobody"], 3] },
  "migrate cancel": { elsewhere: "tests/cli/commands/migrate_test.ts", bad: [["nobody"], 3] },
  "demo": { elsewhere: "tests/cli/commands/demo_test.ts", bad: [["--mem", "no"], 2] },
  "vring dump": { good: ["relay"], prints: "svq.vring/1", bad: [["nobody"], 3] },
  "vring verify": { elsewhere: "tests/cli/commands/vring_test.ts", bad: [["--image", "/nonexistent/image.json"], 2] },
  "vring watch": { good: ["relay", "--count", "2", "--interval", "20ms"], prints: "lines svq.vring/1", bad: [["nobody"], 3] },
  "vring diff": { elsewhere: "tests/cli/commands/vring_test.ts", bad: [["/nonexistent/a", "/nonexistent/b"], 2] },
  "trace": { good: ["relay"], prints: "lines svq.trace.message/1", bad: [["nobody"], 3] },
  "monitor": { good: ["relay", "--count", "2", "--interval", "20ms"], prints: "lines svq.monitor/1", bad: [["nobody"], 3] },
  "doctor": { good: ["--for", "user"], prints: "svq.doctor/1", bad: [["--for", "nothing"], 2] },
  "schema": { good: [], prints: "svq.schemas/1", bad: [["nothing"], 2] },
  "completions": { good: ["bash"], prints: "text", bad: [["cmd"], 2] },
  "man": { good: ["probe"], prints: "text", bad: [["nothing"], 2] },
  "drive": { good: ["sim:blk,size=1MiB", "--requests", "50"], prints: "svq.drive/1", bad: [["unix:/nonexistent/socket"], 3] },
  "bench ring": {
    good: [
      "--mode",
      "shadow",
      "--guest-ring",
      "split",
      "--device-ring",
      "split",
      "--workload",
      "rx1",
      "--batch",
      "8",
      "--repetitions",
      "1",
      "--time",
      "1ms",
    ],
    prints: "svq.bench.ring/1",
    bad: [["--batch", "200"], 2],
  },
  "bench relay": {
    good: [
      ...["--mode", "shadow", "--latency", "0", "--depth", "4", "--repetitions", "1", "--time", "20ms"],
      ...["--switches", "1", "--guest-mem", "8MiB", "--idle-queues", "2"],
    ],
    prints: "svq.bench.relay/1",
    bad: [["--request-size", "100"], 2],
  },
  "bench migrate": {
    good: ["--mem", "1MiB", "--runs", "1", "--migrations", "1", "--guest-mem", "8MiB"],
    prints: "svq.bench.migrate/1",
    bad: [["--runs", "0"], 2],
  },
  "device run": { good: ["blk", "--print-capabilities"], prints: "any", bad: [["blk", "--socket-path", "/nonexistent/a/b"], 3] },
  "version": { good: [], prints: "svq.version/1", bad: [["surplus"], 2] },
};

async function leaves(): Promise<string[]> {
  const found: string[] = [];
  const walk = (path: string, target: Target): void => {
    if (!isGroup(target)) found.push(path);
    else for (const entry of entriesOf(target)) walk(`${path} ${entry.name}`, entry.target);
  };
  for (const [name, { hidden, load }] of Object.entries(COMMANDS)) if (hidden !== true) walk(name, (await load()).command);
  return found;
}

// deno-lint-ignore no-control-regex
const CONTROL = /[\x00-\x09\x0b-\x1f\x7f]/;

function assertError(what: string, stdout: string, stderr: string): void {
  assert.equal(stdout, "", `${what}: stdout`);
  const last = stderr.trimEnd().split("\n").at(-1)!;
  assertMatchesSchema("error", last);
}

Deno.test("every command has a row in the table of what scripts rely on", async () => {
  assert.deepEqual((await leaves()).sort(), Object.keys(CONTRACTS).sort());
});

Deno.test("every command refuses wrong words under -j with one JSON error, nothing on stdout, and its exit code", async (t) => {
  using folder = new TempDir();
  for (const [name, { bad: [words, expected, document] }] of Object.entries(CONTRACTS)) {
    await t.step(`${name} ${words.join(" ")} exits ${expected}`, async () => {
      const { code, stdout, stderr } = await runInProcess(["-j", ...name.split(" "), ...words], { SVQ_RUNTIME_DIR: folder.path });
      assert.equal(code, expected, stderr);
      if (document === undefined) assertError(name, stdout, stderr);
      else assertMatchesSchema(document, stdout);
    });
    await t.step(`${name} with a flag that does not exist exits 2`, async () => {
      const { code, stdout, stderr } = await runInProcess(["-j", ...name.split(" "), "--no-such-flag"]);
      assert.equal(code, 2, stderr);
      assertError(name, stdout, stderr);
    });
  }
});

Deno.test("every command prints what its schema says under -j, and no control characters otherwise", async (t) => {
  using folder = new TempDir();
  await using relay = await RelayProcess.start({
    folder: folder.path,
    device: "sim:blk,size=64MiB,latency=2ms",
    args: ["--mode", "shadow"],
  });
  const env = { SVQ_RUNTIME_DIR: folder.path };
  const guest = svqCommand(["drive", `unix:${relay.front}`, "--duration", "10m", "--depth", "4", "--drain-timeout", "1s"], env).spawn();
  try {
    await relay.waitStatus("has requests", ({ queues }) => queues.length > 0 && queues[0]!.inflight > 0);
    for (const [name, { good, prints = "", code: expected = 0 }] of Object.entries(CONTRACTS)) {
      if (good === undefined) continue;
      await t.step(`${name} prints ${prints}`, async () => {
        const { code, stdout, stderr } = await svq(["-j", ...name.split(" "), ...good], env);
        assert.equal(code, expected, stderr);
        if (prints === "text") return assert.ok(stdout.length > 100);
        const lines = stdout.trimEnd().split("\n");
        if (!prints.startsWith("lines ")) assert.equal(lines.length, 1, "one document");
        for (const line of lines) {
          if (prints === "any") JSON.parse(line);
          else assertMatchesSchema(prints.replace("lines ", ""), line);
        }
        const plain = await svq([...name.split(" "), ...good], env);
        assert.equal(plain.code, expected);
        assert.ok(!CONTROL.test(plain.stdout + plain.stderr), plain.stdout + plain.stderr);
      });
    }
    await t.step("relay start, relay upgrade and relay stop print the relay and what became of it", async () => {
      const started = await svq(["-j", "relay", "start", "--front", `unix:${folder.join("b")}`, "--device", "sim:blk", "--name", "b"], env);
      assert.equal(started.code, 0, started.stderr);
      assertMatchesSchema("svq.relay/1", started.stdout);
      const upgraded = await svq(["-j", "relay", "upgrade", "b"], env);
      assert.equal(upgraded.code, 0, upgraded.stderr);
      assertMatchesSchema("svq.relay-upgrade/1", upgraded.stdout);
      assert.notEqual(JSON.parse(upgraded.stdout).pid, JSON.parse(started.stdout).pid);
      const stopped = await svq(["-j", "relay", "stop", "b"], env);
      assert.equal(stopped.code, 0, stopped.stderr);
      assertMatchesSchema("svq.relay-stop/1", stopped.stdout);
    });
  } finally {
    guest.kill("SIGKILL");
    await guest.output();
  }
});

Deno.test("where another file holds a command's document against its schema, it does so", async () => {
  for (const [name, { good, elsewhere }] of Object.entries(CONTRACTS)) {
    assert.ok((good === undefined) !== (elsewhere === undefined), name);
    if (elsewhere === undefined) continue;
    const text = await Deno.readTextFile(new URL(`../../${elsewhere}`, import.meta.url));
    assert.match(text, /assertMatchesSchema\(/, `${elsewhere} for ${name}`);
  }
});

Deno.test("work that a signal cuts short ends with 130 or 143, and says under -j what was done", async () => {
  for (const [signal, expected] of [["SIGINT", 130], ["SIGTERM", 143]] as const) {
    using folder = new TempDir();
    const [socket, disk] = [folder.join("device"), folder.join("disk")];
    Deno.writeFileSync(disk, new Uint8Array());
    const env = { SVQ_RUNTIME_DIR: folder.path };
    const device = svqCommand(["device", "run", "blk", "--file", disk, "--size", "1MiB", "--socket-path", socket], env).spawn();
    try {
      await waitUntil("the device listens", () => Deno.stat(socket).then(() => true, () => false));
      const guest = svqCommand(["drive", "-j", `unix:${socket}`, "--duration", "10m"], env).spawn();
      const output = guest.output();
      await waitUntil("the guest's first writes", () => Deno.statSync(disk).blocks! > 0);
      guest.kill(signal);
      const { code, stdout } = await output;
      assert.equal(code, expected);
      assertMatchesSchema("svq.drive/1", new TextDecoder().decode(stdout).trim());
    } finally {
      device.kill("SIGTERM");
      await device.output();
    }
  }
});
