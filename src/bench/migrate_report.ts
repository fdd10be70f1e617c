/**
 * The results of `svq bench migrate` as a document, as CSV and as a page.
 *
 * @module
 */
import { formatDuration, formatSize } from "../units.ts";
import type { DowntimeResult, StreamResult } from "./migrate.ts";
import { bars, csv, page, type PageHead, table } from "./page.ts";
import { summarize } from "./statistics.ts";

/** Gigabytes (10^9) per second. */
export function rate(bytes: number, ms: number): number {
  return bytes / ms / 1e6;
}

const round = (value: number) => Math.round(value * 1000) / 1000;

/** A stream as the document `svq.bench.migrate/1` has it. */
export function streamRecord({ contents, sink, memoryBytes, streamBytes, ms, allMs }: StreamResult): Record<string, unknown> {
  return {
    contents,
    sink,
    memory_bytes: memoryBytes,
    stream_bytes: streamBytes,
    ms: round(ms),
    all_ms: allMs.map(round),
    gb_per_s: round(rate(memoryBytes, ms)),
  };
}

/** The gaps as the document has them. */
export function downtimeRecord({ migrations, memoryBytes, p50, p90, p99, max }: DowntimeResult): Record<string, number> {
  return { migrations, memory_bytes: memoryBytes, p50, p90, p99, max };
}

/** A line for each figure: name, figure, value. */
export function migrateCsv(streams: readonly StreamResult[], downtime: DowntimeResult | null): string {
  const lines: Record<string, unknown>[] = [];
  for (const stream of streams) {
    const { contents, sink, stream_bytes, ms, gb_per_s } = streamRecord(stream);
    const figures = { memory_bytes: stream.memoryBytes, stream_bytes, ms, gb_per_s };
    for (const [figure, value] of Object.entries(figures)) lines.push({ name: `${contents} into ${sink}`, figure, value });
  }
  const gap = downtime === null ? {} : downtimeRecord(downtime);
  for (const [figure, value] of Object.entries(gap)) {
    lines.push({ name: "downtime", figure: /^(p\d+|max)$/.test(figure) ? `${figure}_us` : figure, value });
  }
  return csv(lines, ["name", "figure", "value"]);
}

/** A page that stands alone. */
export function migratePage(
  streams: readonly StreamResult[],
  downtime: DowntimeResult | null,
  head: Pick<PageHead, "machine" | "version">,
): string {
  const sections = [
    "<h2>Streams</h2>",
    table(
      ["memory", "into", "size", "time", "rate"],
      streams.map(({ contents, sink, memoryBytes, ms }) => [
        ...[contents, sink === "discard" ? "nothing" : "a receiver", formatSize(memoryBytes), formatDuration(ms * 1e6)],
        `${rate(memoryBytes, ms).toFixed(2)} GB/s`,
      ]),
    ),
    bars(
      "GB/s of guest memory",
      streams.map(({ contents, sink, memoryBytes, ms, allMs }) => {
        const { min, max } = summarize(allMs.map((each) => rate(memoryBytes, each)));
        return { label: `${contents}, ${sink}`, value: rate(memoryBytes, ms), min, max };
      }),
      2,
    ),
  ];
  if (downtime !== null) {
    const { p50, p90, p99, max, migrations, memoryBytes } = downtime;
    const parts = Object.entries({ p50, p90, p99, max });
    sections.push(
      `<h2>Gap of ${migrations} migrations of ${formatSize(memoryBytes)}</h2>`,
      table(parts.map(([name]) => name), [parts.map(([, us]) => formatDuration(us * 1000))]),
      bars("gap, us", parts.map(([label, us]) => ({ label, value: us, min: us, max: us })), 0),
    );
  }
  return page({
    title: "svq bench migrate",
    about: "How fast guest memory goes into a stream (the fastest of its runs, and the spread of all of them), and for how long a guest " +
      "stands still while it is migrated between two embedded devices.",
    ...head,
  }, sections);
}
