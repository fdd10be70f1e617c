/**
 * What migrations print under `-j`: parts that several documents share.
 *
 * @module
 */
import type { MigrationReport } from "./handshake.ts";
import type { RoundResult } from "./page_sender.ts";
import type { Downtime, MigrationProgress, MigrationResult } from "./source.ts";

/** `rounds` of svq.demo/1 and svq.migrate/1. */
export function roundDocuments(rounds: readonly RoundResult[]): Record<string, number>[] {
  return rounds.map(({ pages, zeroPages, bytes, ms }) => ({
    dirty_pages: pages,
    zero_pages: zeroPages,
    bytes,
    ms: Math.round(ms * 1000) / 1000,
  }));
}

/** `requests` of both. */
export function requestsDocument(report: MigrationReport): Record<string, number> {
  const { completed, lost, duplicated, corrupted, outOfOrder, missedCalls, submitted } = report;
  return { completed, lost, duplicated, corrupted, out_of_order: outOfOrder, missed_calls: missedCalls, submitted };
}

/** Did every request come back once, with the right data? */
export function isClean(report: MigrationReport): boolean {
  const { lost, duplicated, corrupted, outOfOrder, missedCalls, faults } = report;
  return lost + duplicated + corrupted + outOfOrder + missedCalls + faults.length === 0;
}

/** What went wrong with requests, in words; empty when nothing did. */
export function describeWrong(report: MigrationReport): string {
  const { lost, duplicated, corrupted, outOfOrder, missedCalls } = report;
  const counts: [number, string][] = [
    [lost, "lost"],
    [duplicated, "duplicated"],
    [corrupted, "corrupted"],
    [outOfOrder, "out of order"],
    [missedCalls, "answered without a call"],
  ];
  return counts.filter(([count]) => count > 0).map(([count, what]) => `${count} ${what}`).join(", ");
}

/** The document `svq.migrate/1` of a migration that has ended. */
export function migrateDocument(result: MigrationResult, report: MigrationReport | undefined): { schema: string; [key: string]: unknown } {
  const { outcome, phase, rounds, bytes, downtimeUs, memoryIdentical, estimate, disk, throttlePercent, error } = result;
  return {
    schema: "svq.migrate/1",
    outcome,
    phase,
    rounds: roundDocuments(rounds),
    bytes,
    downtime_us: downtimeUs === null ? null : { ...downtimeUs },
    requests: report === undefined ? null : requestsDocument(report),
    faults: report?.faults ?? [],
    memory_identical: memoryIdentical,
    estimate: estimate === null ? null : {
      dirty_bytes_per_s: estimate.dirtyBytesPerS,
      bandwidth_bytes_per_s: Math.round(estimate.bandwidth),
      rounds: estimate.rounds,
      converges: estimate.converges,
      downtime_us: Math.round(estimate.downtimeMs * 1000),
      throttle_percent: estimate.throttlePercent,
    },
    disk: disk === null ? null : { shared: disk.shared, size_bytes: disk.sizeBytes, rounds: blockDocuments(disk.rounds) },
    throttle_percent: throttlePercent,
    error,
  };
}

function blockDocuments(rounds: readonly RoundResult[]): Record<string, number>[] {
  return rounds.map(({ pages, zeroPages, bytes, ms }) => ({
    blocks: pages,
    zero_blocks: zeroPages,
    bytes,
    ms: Math.round(ms * 1000) / 1000,
  }));
}

/** The document `svq.migrate/1` of a migration that goes on. */
export function progressDocument(progress: MigrationProgress): { schema: string; [key: string]: unknown } {
  const { phase, rounds, remainingPages, bytes, bandwidth, estimateMs, throttlePercent } = progress;
  return {
    schema: "svq.migrate/1",
    outcome: "running",
    phase,
    rounds: roundDocuments(rounds),
    bytes,
    downtime_us: null,
    requests: null,
    memory_identical: null,
    error: null,
    remaining_pages: remainingPages,
    bandwidth_bytes_per_s: Math.round(bandwidth),
    estimated_downtime_us: estimateMs === null ? null : Math.round(estimateMs * 1000),
    throttle_percent: throttlePercent,
  };
}

/** What is said of a guest that is held still for a share of its time, behind other figures; nothing at full speed. */
export function describeThrottle(percent: number): string {
  return percent > 0 ? `, guest slowed down by ${percent} %` : "";
}

/** The parts of a downtime, named, in order. */
export function downtimeParts(downtime: Downtime): [string, number][] {
  return [
    ["stop and drain", downtime.stop],
    ...(downtime.disk > 0 ? [["last blocks of the disk", downtime.disk] as [string, number]] : []),
    ["last round", downtime.last_round],
    ["state", downtime.state],
    ["comparing memory", downtime.verify],
    ["resume", downtime.resume],
  ];
}
