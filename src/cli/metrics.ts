/**
 * A relay's status as Prometheus reads it: text exposition format 0.0.4.
 *
 * @module
 */
import type { FrameCounts, QueueStatus, RelayStatus } from "../relay/status.ts";
import type { WorkerLoad } from "../relay/worker_load.ts";

type Metric = readonly [name: string, type: "counter" | "gauge", help: string, value: (queue: QueueStatus) => number];

const QUEUE_METRICS: readonly Metric[] = [
  ["svq_queue_batches_total", "counter", "Times that chains were given to the device", (queue) => queue.batches ?? 0],
  ["svq_queue_chains_total", "counter", "Chains relayed (frames, of a network device's data queues)", (queue) => queue.chains],
  ["svq_queue_bytes_total", "counter", "Bytes in the chains relayed, as their descriptors say", (queue) => queue.bytes],
  ["svq_queue_kicks_total", "counter", "Kicks of the guest that the relay took", (queue) => queue.kicks],
  ["svq_queue_calls_total", "counter", "Calls that the relay gave the guest", (queue) => queue.calls],
  ["svq_queue_errors_total", "counter", "Errors that stopped the queue", (queue) => queue.errors],
  ["svq_queue_full_total", "counter", "Times that the device's ring was full", (queue) => queue.full],
  ["svq_queue_dirty_pages_total", "counter", "Pages marked dirty, each time anew", (queue) => queue.dirty_pages],
  ["svq_queue_uncaptured_total", "counter", "Frames that a capture had no room for", (queue) => queue.uncaptured ?? 0],
  ["svq_queue_switches_total", "counter", "Changes of mode", (queue) => queue.switches.count],
  ["svq_queue_inflight", "gauge", "Chains made available and not used", (queue) => queue.inflight],
];

const FRAME_METRICS: readonly (readonly [name: string, help: string, value: (counts: FrameCounts) => number])[] = [
  ["svq_queue_frames_total", "Frames that an embedded network device has sent or received", ({ frames }) => frames],
  ["svq_queue_frame_bytes_total", "Bytes of those frames, without the packet header", ({ bytes }) => bytes],
  ["svq_queue_frame_drops_total", "Frames that an embedded network device has dropped; a relay drops none", ({ drops }) => drops],
];

const WORKER_METRICS: readonly (readonly [name: string, type: "counter" | "gauge", help: string, value: (load: WorkerLoad) => number])[] = [
  ["svq_worker_waits_total", "counter", "Calls of epoll_wait", (load) => load.waits],
  ["svq_worker_sleeps_total", "counter", "Those that could sleep", (load) => load.sleeps],
  ["svq_worker_polls_total", "counter", "Rounds of polling", (load) => load.polls],
  ["svq_worker_poll_hits_total", "counter", "Times that polling found work", (load) => load.poll_hits],
  ["svq_worker_poll_idle_seconds_total", "counter", "Time spent in looks that found nothing", (load) => load.poll_idle_ms / 1000],
  [
    "svq_worker_poll_held_off_total",
    "counter",
    "Times that self-tuned polling stopped for a while because it did not pay",
    (load) => load.poll_held_off,
  ],
  ["svq_worker_poll_seconds", "gauge", "How long it looks for more at present before it sleeps", (load) => load.poll_us / 1e6],
];

const MODES = ["passthrough", "notify", "used", "shadow"];

function label(value: string): string {
  return `"${value.replaceAll("\\", "\\\\").replaceAll('"', '\\"').replaceAll("\n", "\\n")}"`;
}

function family(name: string, type: string, help: string, samples: readonly string[]): string[] {
  return [`# HELP ${name} ${help}`, `# TYPE ${name} ${type}`, ...samples];
}

/** The metrics of relays, one family after the other, with a line feed at the end. */
export function prometheusText(relays: readonly RelayStatus[]): string {
  const each = (name: string, value: (relay: RelayStatus) => number) =>
    relays.map((relay) => `${name}{relay=${label(relay.name)}} ${value(relay)}`);
  const lines = [
    ...family("svq_relay_up", "gauge", "The relay runs", each("svq_relay_up", () => 1)),
    ...family(
      "svq_relay_uptime_seconds",
      "gauge",
      "Since the relay started",
      each("svq_relay_uptime_seconds", (relay) => relay.uptime_ms / 1000),
    ),
    ...family("svq_relay_logging", "gauge", "The VMM has the dirty log on", each("svq_relay_logging", (relay) => relay.logging ? 1 : 0)),
    ...family(
      "svq_relay_device_connected",
      "gauge",
      "The device is there",
      each("svq_relay_device_connected", (relay) => relay.device_connected ? 1 : 0),
    ),
    ...family("svq_relay_needs_reset", "gauge", "A queue has failed", each("svq_relay_needs_reset", (relay) => relay.needs_reset ? 1 : 0)),
  ];
  for (const [name, type, help, value] of QUEUE_METRICS) {
    const samples = relays.flatMap((relay) =>
      relay.queues.map((queue) => `${name}{relay=${label(relay.name)},queue="${queue.index}"} ${value(queue)}`)
    );
    lines.push(...family(name, type, help, samples));
  }
  for (const [name, help, value] of FRAME_METRICS) {
    const samples = relays.flatMap((relay) =>
      relay.queues.flatMap(({ index, frames }) =>
        frames === null || frames === undefined ? [] : [`${name}{relay=${label(relay.name)},queue="${index}"} ${value(frames)}`]
      )
    );
    // Of embedded network devices only.
    if (samples.length > 0) lines.push(...family(name, "counter", help, samples));
  }
  for (const [name, type, help, value] of WORKER_METRICS) {
    const samples = relays.flatMap((relay) =>
      (relay.workers ?? []).map((load) => `${name}{relay=${label(relay.name)},worker="${load.index}"} ${value(load)}`)
    );
    lines.push(...family(name, type, help, samples));
  }
  const modes = relays.flatMap((relay) =>
    relay.queues.flatMap((queue) =>
      MODES.map((mode) => `svq_queue_mode{relay=${label(relay.name)},queue="${queue.index}",mode="${mode}"} ${queue.mode === mode ? 1 : 0}`)
    )
  );
  lines.push(...family("svq_queue_mode", "gauge", "1 for the mode that the queue is in", modes));
  return lines.join("\n") + "\n";
}
