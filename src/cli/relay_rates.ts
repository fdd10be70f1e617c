/**
 * Two looks at relays, one after the other: what they did per second in between, and what happened to them.
 *
 * @module
 */
import type { QueueStatus, RelayStatus } from "../relay/status.ts";

/** What a queue did per second. */
export interface QueueRate {
  /** Which queue. */
  index: number;
  /** What it does now. */
  mode: QueueStatus["mode"];
  /** Chains made available and not used, now. */
  inflight: number;
  /** Chains relayed. 0 in passthrough, which the relay does not see. */
  chains_per_s: number;
  /** Bytes in them. */
  bytes_per_s: number;
  /** Kicks of the guest that the relay took. */
  kicks_per_s: number;
  /** Calls that it gave the guest. */
  calls_per_s: number;
  /** Pages marked dirty. */
  dirty_pages_per_s: number;
}

/** What a relay did per second. */
export interface RelayRate {
  /** Name of the relay. */
  name: string;
  /** See {@linkcode RelayStatus.state}. */
  state: string;
  /** The VMM has the dirty log on. */
  logging: boolean;
  /** Every queue that is set up. */
  queues: QueueRate[];
}

/** The document `svq.monitor/1`. */
export interface MonitorDocument {
  /** Its name. */
  schema: "svq.monitor/1";
  /** When, ISO 8601. */
  time: string;
  /** Since the look before, ms; 0 at the first one, whose rates are 0. */
  interval_ms: number;
  /** Relays that run, by name. */
  relays: RelayRate[];
  /** What happened since the look before. */
  events: { relay: string; queue: number | null; text: string }[];
  /** Other documents have more. */
  [key: string]: unknown;
}

const COUNTED = ["chains", "bytes", "kicks", "calls", "dirty_pages"] as const;

function queueRate(queue: QueueStatus, before: QueueStatus | undefined, seconds: number): QueueRate {
  const rates = COUNTED.map((name) => {
    // Counters of a relay that was started again begin at 0.
    const moved = before === undefined || seconds === 0 ? 0 : Math.max(0, queue[name] - before[name]);
    return [`${name}_per_s`, seconds === 0 ? 0 : Math.round(moved / seconds)];
  });
  return { index: queue.index, mode: queue.mode, inflight: queue.inflight, ...Object.fromEntries(rates) };
}

function relayEvents(now: RelayStatus, before: RelayStatus): string[] {
  const found: string[] = [];
  if (now.pid !== before.pid) found.push(`started again as process ${now.pid}`);
  if (now.state !== before.state) found.push(`${before.state} -> ${now.state}`);
  if (now.logging !== before.logging) found.push(`dirty log ${now.logging ? "on" : "off"}`);
  if (now.marking_all && !before.marking_all) found.push("a switch takes long: all memory is marked dirty");
  if (now.error !== null && now.error.message !== before.error?.message) found.push(now.error.message);
  return found;
}

function queueEvents(now: QueueStatus, before: QueueStatus | undefined): string[] {
  const found: string[] = [];
  if (before === undefined) return [`set up, ${now.mode}`];
  const { count, drain_us, switch_us } = now.switches;
  if (now.mode !== before.mode) {
    const took = count > before.switches.count ? ` (${(drain_us / 1000).toFixed(1)}+${(switch_us / 1000).toFixed(1)} ms)` : "";
    found.push(`${before.mode} -> ${now.mode}${took}`);
  } else if (count > before.switches.count) {
    found.push(`switched ${count - before.switches.count} times`);
  }
  if (now.error !== null && now.error.message !== before.error?.message) found.push(now.error.message);
  return found;
}

/** Compares two looks. @param now the later one @param before the earlier one, none at first @param intervalMs time between them */
export function monitorDocument(
  now: readonly RelayStatus[],
  before: readonly RelayStatus[] | undefined,
  intervalMs: number,
): MonitorDocument {
  const events: MonitorDocument["events"] = [];
  const relays = now.map((relay): RelayRate => {
    const earlier = before?.find(({ name }) => name === relay.name);
    if (before !== undefined && earlier === undefined) events.push({ relay: relay.name, queue: null, text: `started, ${relay.state}` });
    if (earlier !== undefined) { for (const text of relayEvents(relay, earlier)) events.push({ relay: relay.name, queue: null, text }); }
    const queues = relay.queues.map((queue) => {
      const same = earlier?.queues.find(({ index }) => index === queue.index);
      if (earlier !== undefined) {
        for (const text of queueEvents(queue, same)) events.push({ relay: relay.name, queue: queue.index, text });
      }
      return queueRate(queue, same, before === undefined ? 0 : intervalMs / 1000);
    });
    return { name: relay.name, state: relay.state, logging: relay.logging, queues };
  });
  for (const { name } of before ?? []) {
    if (!now.some((relay) => relay.name === name)) events.push({ relay: name, queue: null, text: "ended" });
  }
  return {
    schema: "svq.monitor/1",
    time: new Date().toISOString(),
    interval_ms: before === undefined ? 0 : Math.round(intervalMs),
    relays,
    events,
  };
}

/** The rates of a relay's queues together. `mode` names each mode once. */
export function totalRate({ queues }: RelayRate): Omit<QueueRate, "index" | "mode"> & { mode: string } {
  const sum = (name: "inflight" | `${typeof COUNTED[number]}_per_s`) => queues.reduce((total, queue) => total + queue[name], 0);
  return {
    mode: [...new Set(queues.map(({ mode }) => mode))].join("+") || "-",
    inflight: sum("inflight"),
    chains_per_s: sum("chains_per_s"),
    bytes_per_s: sum("bytes_per_s"),
    kicks_per_s: sum("kicks_per_s"),
    calls_per_s: sum("calls_per_s"),
    dirty_pages_per_s: sum("dirty_pages_per_s"),
  };
}
