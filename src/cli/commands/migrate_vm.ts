/** `svq migrate vm`. @module */
import { buildCommand, type Command } from "@stricli/core";
import { EXIT } from "../../errors.ts";
import { VmMigration } from "../../migration/vm.ts";
import type { VmMigrationOptions, VmMigrationReport, VmProgress } from "../../migration/vm_report.ts";
import type { Check } from "../../migration/vm_checks.ts";
import type { RingPosition } from "../../migration/vm_relays.ts";
import { formatCount, formatDuration, formatSize } from "../../units.ts";
import type { CliContext } from "../context.ts";
import { ExitWith } from "../exit_with.ts";
import { type Document, toJson } from "../output.ts";
import { durationFlag, pathFlag, rateFlag, textFlag } from "../parameters.ts";
import { Progress } from "../progress.ts";
import { formatFacts } from "../table.ts";
import { usageError } from "../usage.ts";

interface Flags {
  readonly source: string;
  readonly destination: string;
  readonly sourceRelay: string;
  readonly destinationRelay: string;
  readonly uri?: string;
  readonly downtimeLimit?: number;
  readonly maxBandwidth?: number;
  readonly cancelAfter?: number;
  readonly timeout?: number;
  readonly capability?: readonly string[];
  readonly skipCheck?: readonly string[];
  readonly dryRun: boolean;
  readonly progress: "auto" | "json" | "none";
}

/** Migrates a guest between two QEMUs whose devices are behind relays. */
export const vm: Command<CliContext> = buildCommand({
  docs: {
    brief: "Migrate a guest between two QEMUs whose devices are behind relays",
    fullDescription:
      "Checks both QEMUs and all relays, starts the migration over QMP, shows how it goes, and compares the ring positions on both sides at the end. " +
      "SIGINT cancels: the guest goes on at the source. A relay in mode auto needs none of this; any other program may start the migration as well.\n\n" +
      "Exit 7: aborted or cancelled, the guest runs at the source. Exit 8: failed after the switchover.\n\n" +
      "Example:\n  svq migrate vm --source a.qmp --destination b.qmp --source-relay disk-a --destination-relay disk-b",
  },
  parameters: {
    flags: {
      source: pathFlag("QMP socket of the QEMU that runs the guest", {}),
      destination: pathFlag("QMP socket of the QEMU that waits for it (-incoming defer)", {}),
      sourceRelay: textFlag("Relays of the source's devices, separated by commas", { placeholder: "A,B" }),
      destinationRelay: textFlag("Relays of the same devices at the destination", { placeholder: "A,B" }),
      uri: textFlag(
        "Where the stream goes: unix:PATH or tcp:HOST:PORT (default: where the destination listens, or a private unix socket)",
        {
          optional: true,
          placeholder: "URI",
        },
      ),
      downtimeLimit: durationFlag("Longest stop of the guest to aim at", { optional: true }),
      maxBandwidth: rateFlag("Bytes per second at most", { optional: true }),
      cancelAfter: durationFlag("Cancel when it has not ended by then", { optional: true }),
      timeout: durationFlag("The same, as a failure with exit code 124", { optional: true }),
      capability: {
        kind: "parsed",
        parse: String,
        brief: "Migration capability to turn on in both QEMUs, e.g. multifd or auto-converge; repeatable",
        placeholder: "NAME",
        variadic: true,
        optional: true,
      },
      skipCheck: {
        kind: "parsed",
        parse: String,
        brief: "Go on although this check fails; repeatable",
        placeholder: "CODE",
        variadic: true,
        optional: true,
      },
      dryRun: { kind: "boolean", brief: "Only check", default: false },
      progress: {
        kind: "enum",
        values: ["auto", "json", "none"],
        brief: "auto: a bar on a terminal, lines otherwise; json: JSON lines on stderr",
        default: "auto",
      },
    },
  },
  async func(this: CliContext, flags: Flags): Promise<void> {
    const { output } = this;
    using progress = new Progress(output, "migrating");
    await using migration = await VmMigration.open({
      ...optionsOf(flags),
      signal: this.signal,
      onProgress: (state) => {
        if (flags.progress === "json") output.writeError(toJson({ progress: progressRecord(state) }));
        else if (flags.progress === "auto") progress.update(fractionOf(state), progressText(state));
      },
      onWarning: (message) => output.warn(message),
    });
    if (flags.dryRun) return dryRun(this, await migration.check());
    const report = await migration.run();
    progress[Symbol.dispose]();
    output.document(documentOf(report), () => report.error === undefined ? describe(report) : undefined);
    if (report.error !== undefined) throw report.error;
  },
});

function optionsOf(flags: Flags): VmMigrationOptions {
  const names = (list: string, flag: string) => {
    const found = list.split(",").filter((name) => name !== "");
    if (found.length === 0) throw usageError(`${flag} names no relay`, "svq relay list shows the running ones");
    return found;
  };
  const { uri, downtimeLimit, maxBandwidth, cancelAfter, timeout } = flags;
  return {
    source: flags.source,
    destination: flags.destination,
    sourceRelays: names(flags.sourceRelay, "--source-relay"),
    destinationRelays: names(flags.destinationRelay, "--destination-relay"),
    capabilities: flags.capability ?? [],
    skipChecks: flags.skipCheck ?? [],
    ...(uri === undefined ? {} : { uri }),
    ...(downtimeLimit === undefined ? {} : { downtimeLimitMs: downtimeLimit / 1e6 }),
    ...(maxBandwidth === undefined ? {} : { maxBandwidth }),
    ...(cancelAfter === undefined ? {} : { cancelAfterMs: cancelAfter / 1e6 }),
    ...(timeout === undefined ? {} : { timeoutMs: timeout / 1e6 }),
  };
}

function checkRecord({ code, ok, message, hint }: Check): Record<string, unknown> {
  return { code, ok, message, ...(hint === undefined ? {} : { hint }) };
}

function dryRun({ output }: CliContext, checks: readonly Check[]): void {
  const failed = checks.filter((check) => !check.ok);
  const document: Document = {
    schema: "svq.migrate/1",
    outcome: failed.length === 0 ? "ready" : "not-ready",
    phase: "check",
    rounds: [],
    bytes: 0,
    downtime_us: null,
    checks: checks.map(checkRecord),
  };
  output.document(document, () => {
    for (const { ok, code, message, hint } of checks) {
      output.line(`${ok ? output.paint.green("ok") : output.paint.red("failed")}  ${ok ? message : `${code}: ${message}`}`);
      if (!ok && hint !== undefined) output.line(`    ${output.paint.cyan("hint:")} ${hint}`);
    }
  });
  if (failed.length > 0) throw new ExitWith(failed[0]!.exitCode ?? EXIT.checkFailed);
}

function progressRecord(state: VmProgress): Record<string, unknown> {
  return {
    phase: state.phase,
    elapsed_ms: Math.round(state.elapsedMs),
    round: state.round,
    transferred_bytes: state.transferred,
    remaining_bytes: state.remaining,
    total_bytes: state.total,
    dirty_pages_per_second: state.dirtyPagesPerSecond,
    bytes_per_second: Math.round(state.bandwidth),
    expected_downtime_ms: state.expectedDowntimeMs ?? null,
  };
}

function fractionOf({ total, remaining, phase }: VmProgress): number | undefined {
  if (phase === "setup" || total === 0) return undefined;
  return 1 - remaining / total;
}

function progressText(state: VmProgress): string {
  const { phase, round, remaining, dirtyPagesPerSecond, bandwidth } = state;
  if (phase !== "copy") return phase;
  return `round ${round}, ${formatSize(remaining)} left, ${formatSize(Math.round(bandwidth))}/s, ${
    formatCount(dirtyPagesPerSecond)
  } dirty pages/s`;
}

function positionRecord({ source, destination, index, sourceBase, destinationBase, agree }: RingPosition): Record<string, unknown> {
  return { source, destination, index, source_base: sourceBase, destination_base: destinationBase, agree: agree ?? null };
}

function documentOf(report: VmMigrationReport): Document {
  const { error } = report;
  return {
    schema: "svq.migrate/1",
    outcome: report.outcome,
    phase: report.phase,
    rounds: report.rounds.map(({ dirtyPages, bytes, ms }) => ({ dirty_pages: dirtyPages, bytes, ms })),
    bytes: report.bytes,
    downtime_us: report.downtimeMs === undefined || report.outcome !== "completed"
      ? null
      : { total: report.downtimeMs * 1000, stop: null, last_round: null, state: null, resume: null },
    total_ms: report.totalMs ?? null,
    setup_ms: report.setupMs ?? null,
    requests: null,
    memory_identical: null,
    positions: report.positions.map(positionRecord),
    destination_state: report.destinationState ?? null,
    checks: report.checks.map(checkRecord),
    error: error === undefined
      ? null
      : { code: error.code, message: error.message, ...(error.hint === undefined ? {} : { hint: error.hint }) },
  };
}

function describe(report: VmMigrationReport): string {
  const ms = (value: number | undefined) => value === undefined ? "not known" : formatDuration(value * 1e6);
  const agreed = report.positions.filter(({ agree }) => agree === true);
  const open = report.positions.length - agreed.length;
  const place = ({ index, sourceBase }: RingPosition) => `queue ${index} at ${sourceBase}`;
  return formatFacts([
    ["outcome", `completed; the guest is ${report.destinationState} at the destination`],
    ["total", ms(report.totalMs)],
    ["downtime", ms(report.downtimeMs)],
    ["sent", `${formatSize(report.bytes)} in ${report.rounds.length} rounds`],
    [
      "positions",
      report.positions.length === 0
        ? "nothing to compare: no queue of the guest ran when it left"
        : open === 0
        ? `the same on both sides: ${agreed.map(place).join(", ")}`
        : `${open} not compared: the destination is paused and has not started its queues`,
    ],
  ]);
}
