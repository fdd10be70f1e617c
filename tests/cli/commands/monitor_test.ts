import assert from "node:assert/strict";
import { monitorDocument, totalRate } from "../../../src/cli/relay_rates.ts";
import type { QueueStatus, RelayStatus } from "../../../src/relay/status.ts";
import { MAIN, svq, svqCommand } from "../../support/cli.ts";
import { RelayProcess } from "../../support/relay_process.ts";
import { assertMatchesSchema } from "../../support/schema.ts";
import { TempDir } from "../../support/temp.ts";

function queue(change: Partial<QueueStatus> = {}): QueueStatus {
  const switches = { count: 0, drain_us: 0, switch_us: 0, longest_stall_us: 0 };
  const counted = { chains: 100, bytes: 4096, kicks: 10, calls: 5, dirty_pages: 0, inflight: 3 };
  return { index: 0, mode: "shadow", ...counted, switches, error: null, ...change } as QueueStatus;
}

function relay(change: Partial<RelayStatus> = {}): RelayStatus {
  return {
    name: "r",
    pid: 7,
    state: "running",
    logging: false,
    marking_all: false,
    error: null,
    queues: [queue()],
    ...change,
  } as RelayStatus;
}

Deno.test("the first look has no rates and no events; the second one divides by the time in between", () => {
  const first = monitorDocument([relay()], undefined, 0);
  assert.deepEqual([first.interval_ms, first.events, first.relays[0]!.queues[0]!.chains_per_s], [0, [], 0]);
  const later = relay({ queues: [queue({ chains: 1100, bytes: 4096 + 8192, kicks: 14, dirty_pages: 6, inflight: 1 })] });
  const second = monitorDocument([later], [relay()], 2000);
  const expected = { inflight: 1, chains_per_s: 500, bytes_per_s: 4096, kicks_per_s: 2, calls_per_s: 0, dirty_pages_per_s: 3 };
  assert.deepEqual(second.relays[0]!.queues, [{ index: 0, mode: "shadow", ...expected }]);
  assert.deepEqual(totalRate(second.relays[0]!), { mode: "shadow", ...expected });
  assertMatchesSchema("svq.monitor/1", JSON.stringify(second));
});

Deno.test("what happens to relays and their queues is told once", () => {
  const switches = { count: 3, drain_us: 1500, switch_us: 2000, longest_stall_us: 0 };
  const error = { code: "RING_LOOP", message: "Queue 0: the chain loops" };
  const before = [relay(), relay({ name: "gone" })];
  const now = [
    relay({ logging: true, state: "device-lost", queues: [queue({ mode: "passthrough", switches }), queue({ index: 1, error })] }),
    relay({ name: "new" }),
  ];
  assert.deepEqual(monitorDocument(now, before, 1000).events.map(({ relay, queue, text }) => [relay, queue, text]), [
    ["r", null, "running -> device-lost"],
    ["r", null, "dirty log on"],
    ["r", 0, "shadow -> passthrough (1.5+2.0 ms)"],
    ["r", 1, "set up, shadow"],
    ["new", null, "started, running"],
    ["gone", null, "ended"],
  ]);
  assert.deepEqual(monitorDocument(now, now, 1000).events, []);
  // One that was started again counts from 0: that is no negative rate.
  const again = monitorDocument([relay({ pid: 8, queues: [queue({ chains: 2 })] })], [relay()], 1000);
  assert.deepEqual([again.events[0]!.text, again.relays[0]!.queues[0]!.chains_per_s], ["started again as process 8", 0]);
});

Deno.test("svq monitor prints a document per round, lines where nobody looks, and a picture that stands still on a terminal, as svq vring watch does", async () => {
  using folder = new TempDir();
  const env = { SVQ_RUNTIME_DIR: folder.path };
  await using relay = await RelayProcess.start({ folder: folder.path, device: "sim:blk,size=16MiB", args: ["--mode", "shadow"] });
  const guest = svqCommand(["drive", `unix:${relay.front}`, "--duration", "10m", "--depth", "4", "--drain-timeout", "1s"], env).spawn();
  try {
    await relay.waitStatus("has requests", ({ queues }) => queues.length > 0 && queues[0]!.chains > 0);
    const rounds = await svq(["monitor", "-j", "--count", "2", "--interval", "200ms"], env);
    assert.equal(rounds.code, 0, rounds.stderr);
    const documents = rounds.stdout.trimEnd().split("\n").map((line) => {
      assertMatchesSchema("svq.monitor/1", line);
      return JSON.parse(line);
    });
    assert.equal(documents.length, 2);
    assert.ok(documents[1].relays[0].queues[0].chains_per_s > 0, rounds.stdout);

    const lines = await svq(["monitor", "relay", "--queues", "--count", "1"], env);
    assert.match(lines.stdout, /^RELAY +STATE +QUEUE +MODE +CHAINS\/S/);
    assert.match(lines.stdout, /\nrelay +running +0 +shadow +/);
    assert.ok(!lines.stdout.includes("\x1b"));

    for (const words of ["monitor relay", "vring watch relay"]) {
      // script(1) gives the program a terminal.
      const { stdout } = await new Deno.Command("script", {
        args: ["-qec", `${Deno.execPath()} run -A --quiet ${MAIN} ${words} --count 3 --interval 50ms`, "/dev/null"],
        env: { ...env, TERM: "xterm" },
        stdin: "null",
      }).output();
      const pictures = new TextDecoder().decode(stdout).split("\x1b[H\x1b[2J").slice(1);
      assert.equal(pictures.length, 3, words);
      for (const picture of pictures) assert.match(picture, words.startsWith("monitor") ? /relay +running/ : /queue 0 guest/);
    }
  } finally {
    guest.kill("SIGKILL");
    await guest.output();
  }
});
