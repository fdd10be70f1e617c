/** `svq monitor`. @module */
import { buildCommand, type Command } from "@stricli/core";
import { relayNames } from "../../relay/runtime_dir.ts";
import type { RelayStatus } from "../../relay/status.ts";
import { formatSize } from "../../units.ts";
import { askStatus } from "../ask_relay.ts";
import type { CliContext } from "../context.ts";
import { integerFlag, pauseFlag, relayArgument } from "../parameters.ts";
import { type MonitorDocument, monitorDocument, type QueueRate, type RelayRate, totalRate } from "../relay_rates.ts";
import { pauseUnless } from "../signals.ts";
import { formatTable } from "../table.ts";

interface Flags {
  readonly interval: number;
  readonly count?: number;
  readonly queues: boolean;
}

/** Events that stay on the picture. */
const EVENTS_SHOWN = 10;
const HEADER = ["relay", "state", "queue", "mode", "chains/s", "bytes/s", "kicks/s", "calls/s", "dirty/s", "inflight"];

// A relay that was named must be there at first; later it may end, which is an event.
async function look(names: readonly string[], first: boolean): Promise<RelayStatus[]> {
  const wanted = names.length > 0 ? names : relayNames();
  const answers = await Promise.all(wanted.map((name) => {
    const asked = askStatus(name);
    return names.length > 0 && first ? asked : asked.catch(() => undefined);
  }));
  return answers.filter((status) => status !== undefined);
}

function row(
  { name, state, logging }: RelayRate,
  queue: string | number,
  rate: Omit<QueueRate, "index" | "mode"> & { mode: string },
): unknown[] {
  return [
    name,
    logging ? `${state}, logging` : state,
    queue,
    rate.mode,
    rate.chains_per_s,
    formatSize(rate.bytes_per_s),
    rate.kicks_per_s,
    rate.calls_per_s,
    rate.dirty_pages_per_s,
    rate.inflight,
  ];
}

function rows(relay: RelayRate, each: boolean): unknown[][] {
  if (!each) return [row(relay, relay.queues.length, totalRate(relay))];
  return relay.queues.map((queue) => row(relay, queue.index, queue));
}

function eventLine(time: string, { relay, queue, text }: MonitorDocument["events"][number]): string {
  return `${time.slice(11, 19)}  ${relay}${queue === null ? "" : ` queue ${queue}`}: ${text}`;
}

/** `svq monitor`. */
export const command: Command<CliContext> = buildCommand({
  docs: {
    brief: "Watch what relays do, per second",
    fullDescription:
      "Rates of all running relays, or of those that are named, and what happens to them: modes that change, the dirty log, lost devices. On a terminal the picture is redrawn; elsewhere each round prints its lines, under -j a document. Looking does not touch the data path.\n\nExample:\n  svq monitor vm1-disk --queues --interval 2s",
  },
  parameters: {
    flags: {
      interval: pauseFlag("Time between two rounds", { default: "1s" }),
      count: integerFlag("Rounds (default: until stopped)", { optional: true, min: 1 }),
      queues: { kind: "boolean", brief: "A line per queue, not per relay", default: false },
    },
    positional: { kind: "array", parameter: relayArgument() },
  },
  async func(this: CliContext, flags: Flags, ...names: string[]): Promise<void> {
    const { output, signal } = this;
    const history: string[] = [];
    let before: RelayStatus[] | undefined;
    let lookedMs = 0;
    for (let round = 1; !signal.aborted; round++) {
      const now = await look(names, before === undefined);
      const nowMs = performance.now();
      const document = monitorDocument(now, before, nowMs - lookedMs);
      before = now;
      lookedMs = nowMs;
      output.record(document, () => {
        const events = document.events.map((event) => eventLine(document.time, event));
        history.push(...events);
        const table = document.relays.flatMap((relay) => rows(relay, flags.queues));
        const lines = table.length === 0
          ? ["no relay runs; svq relay start starts one"]
          : [formatTable(HEADER, table, { paint: output.paint })];
        if (!output.interactive) return [...events, ...lines].join("\n");
        history.splice(0, Math.max(0, history.length - EVENTS_SHOWN));
        // Home, clear: the picture stands still.
        return ["\x1b[H\x1b[2J" + output.paint.bold(document.time.slice(11, 19)), ...lines, ...history].join("\n");
      });
      if (round === flags.count) return;
      await pauseUnless(flags.interval / 1e6, signal);
    }
  },
});
