/** `svq bench migrate`. @module */
import { buildCommand, type Command } from "@stricli/core";
import { benchDowntime, benchStream } from "../../bench/migrate.ts";
import { machineFacts } from "../../bench/machine.ts";
import { downtimeRecord, migrateCsv, migratePage, rate, streamRecord } from "../../bench/migrate_report.ts";
import { formatDuration, formatSize } from "../../units.ts";
import { VERSION } from "../../version.ts";
import { writeReport } from "../bench_files.ts";
import type { CliContext } from "../context.ts";
import { integerFlag, pathFlag, sizeFlag } from "../parameters.ts";
import { Progress } from "../progress.ts";

interface Flags {
  readonly mem: number;
  readonly runs: number;
  readonly migrations: number;
  readonly guestMem: number;
  readonly csv?: string;
  readonly report?: string;
}

/** Measures streams and gaps. */
export const migrate: Command<CliContext> = buildCommand({
  docs: {
    brief: "Measure how fast guest memory goes into a stream, and for how long a guest stands still",
    fullDescription:
      "Sends memory that is random, half zero and zero into a socket that throws it away, and into a receiver that checks and keeps it, " +
      "as a destination does. Then migrates a guest under load between two embedded devices. Needs no privileges.\n\n" +
      "Example:\n  svq bench migrate --mem 256MiB --migrations 10",
  },
  parameters: {
    flags: {
      mem: sizeFlag("Memory to stream", { default: "1GiB" }),
      runs: integerFlag("Times that each stream is sent; the fastest counts", { default: "3", min: 1, max: 100 }),
      migrations: integerFlag("Migrations to measure the gap with; 0: none", { default: "20", max: 10_000 }),
      guestMem: sizeFlag("Memory of the guest that is migrated", { default: "64MiB" }),
      csv: pathFlag("Write comma-separated values", { optional: true }),
      report: pathFlag("Write a page with tables and pictures", { optional: true }),
    },
  },
  async func(this: CliContext, flags: Flags): Promise<void> {
    using progress = new Progress(this.output, "measuring");
    const steps = 6 + flags.migrations;
    let step = 0;
    const streams = await benchStream(
      flags.mem,
      flags.runs,
      ({ contents, sink }) => progress.update(++step / steps, `${contents}, ${sink}`),
    );
    const downtime = flags.migrations === 0
      ? null
      : await benchDowntime(flags.guestMem, flags.migrations, (done) => progress.update((step + done) / steps, `migration ${done}`));
    progress[Symbol.dispose]();
    const machine = machineFacts();
    if (flags.report !== undefined) writeReport(flags.report, migratePage(streams, downtime, { machine, version: VERSION }));
    if (flags.csv !== undefined) writeReport(flags.csv, migrateCsv(streams, downtime));
    const document = {
      schema: "svq.bench.migrate/1",
      machine,
      streams: streams.map(streamRecord),
      downtime_us: downtime === null ? null : downtimeRecord(downtime),
    };
    this.output.document(document, () => {
      this.output.table(
        ["memory", "into", "size", "time", "rate"],
        streams.map(({ contents, sink, memoryBytes, ms }) => [
          contents,
          sink === "discard" ? "nothing" : "a receiver",
          formatSize(memoryBytes),
          formatDuration(ms * 1e6),
          `${rate(memoryBytes, ms).toFixed(2)} GB/s`,
        ]),
      );
      if (downtime === null) return;
      const us = (value: number) => formatDuration(value * 1000);
      const { migrations, p50, p90, p99, max } = downtime;
      this.output.line(`gap of ${migrations} migrations: half ${us(p50)}, 9 of 10 ${us(p90)}, 99 of 100 ${us(p99)}, longest ${us(max)}`);
    });
  },
});
