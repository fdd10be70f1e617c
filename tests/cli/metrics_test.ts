import assert from "node:assert/strict";
import { prometheusText } from "../../src/cli/metrics.ts";
import type { RelayStatus } from "../../src/relay/status.ts";

Deno.test("The metrics name every counter once, with its type before its samples, and escape what a label must not hold", () => {
  const queue = {
    index: 3,
    mode: "shadow",
    chains: 5,
    bytes: 700,
    kicks: 2,
    calls: 4,
    errors: 0,
    full: 1,
    redone: 0,
    dirty_pages: 9,
    inflight: 6,
    switches: { count: 8 },
  };
  const relay = { name: 'a"b\\', uptime_ms: 1500, logging: true, device_connected: true, needs_reset: false, queues: [queue] };
  const text = prometheusText([relay as unknown as RelayStatus]);
  const label = 'relay="a\\"b\\\\"';
  for (
    const line of [
      `svq_relay_uptime_seconds{${label}} 1.5`,
      `svq_queue_chains_total{${label},queue="3"} 5`,
      `svq_queue_bytes_total{${label},queue="3"} 700`,
      `svq_queue_inflight{${label},queue="3"} 6`,
      `svq_queue_mode{${label},queue="3",mode="shadow"} 1`,
      `svq_queue_mode{${label},queue="3",mode="used"} 0`,
    ]
  ) assert.ok(text.split("\n").includes(line), line);
  const types = [...text.matchAll(/^# TYPE (\S+) (counter|gauge)$/gm)].map(([, name]) => name!);
  assert.equal(new Set(types).size, types.length);
  let current = "";
  for (const line of text.trimEnd().split("\n")) {
    if (line.startsWith("# TYPE ")) current = line.split(" ")[2]!;
    else if (!line.startsWith("#")) assert.equal(line.split("{")[0], current);
  }
  assert.ok(text.endsWith("\n"));
});
