/**
 * The results of `svq bench relay` as a document, as CSV and as a page.
 *
 * @module
 */
import { formatSize } from "../units.ts";
import { bars, csv, page, type PageHead, table } from "./page.ts";
import type { IdleMemory, RelayResult, SwitchResult } from "./relay.ts";
import type { RelayLoad } from "./relay_rig.ts";
import type { Summary } from "./statistics.ts";

/** All that one run found. */
export interface RelayBench {
  /** What was driven. */
  load: RelayLoad;
  /** By contender. */
  results: readonly RelayResult[];
  /** By size of memory and direction. */
  switches: readonly SwitchResult[];
  /** What idle queues take; undefined: not measured. */
  idle: IdleMemory | undefined;
}

/** A number with few enough digits to be read. */
export function round(value: number): number {
  return Number(value.toPrecision(4));
}

function spread({ median, min, max }: Summary): { median: number; min: number; max: number } {
  return { median: round(median), min: round(min), max: round(max) };
}

const orNull = (summary: Summary | null) => summary === null ? null : spread(summary);

/** The document `svq.bench.relay/1`, without the machine. */
export function relayRecord({ load, results, switches, idle }: RelayBench): Record<string, unknown> {
  const { link, latencyUs, queues, depth, requestSize, config } = load;
  return {
    load: {
      ...{ device: link, latency_us: latencyUs, queues, depth, request_bytes: requestSize },
      ...{
        workers: config.workers ?? 1,
        poll_us: typeof config.pollUs === "number" ? config.pollUs : null,
        cpus: config.cpus ?? [],
        core: config.core ?? "auto",
      },
    },
    results: results.map((result) => ({
      contender: result.contender,
      iops: spread(result.iops),
      latency_us: { p50: spread(result.p50), p99: spread(result.p99), p999: spread(result.p999) },
      cpu_us_per_request: spread(result.cpuUs),
      ratio: { iops: spread(result.iopsRatio), p99: spread(result.p99Ratio), cpu: spread(result.cpuRatio) },
      syscalls_per_batch: orNull(result.syscallsPerBatch),
      sleeps_per_batch: orNull(result.sleepsPerBatch),
      chains_per_batch: orNull(result.chainsPerBatch),
    })),
    switches: switches.map(({ memoryBytes, to, count, drainUs, switchUs, switchP99 }) => ({
      ...{ memory_bytes: memoryBytes, to, count, drain_us: spread(drainUs), switch_us: { ...spread(switchUs), p99: round(switchP99) } },
    })),
    idle: idle === undefined ? null : { queues: idle.queues, bytes_per_queue: Math.round(idle.bytesPerQueue) },
  };
}

/** A line for each figure: section, name, figure, median, min, max. */
export function relayCsv({ results, switches, idle }: RelayBench): string {
  const lines: Record<string, unknown>[] = [];
  const add = (name: string, figure: string, summary: Summary | null) => {
    if (summary !== null) lines.push({ name, figure, ...spread(summary) });
  };
  for (const result of results) {
    add(result.contender, "iops", result.iops);
    add(result.contender, "p50_us", result.p50);
    add(result.contender, "p99_us", result.p99);
    add(result.contender, "p999_us", result.p999);
    add(result.contender, "cpu_us_per_request", result.cpuUs);
    add(result.contender, "iops_ratio", result.iopsRatio);
    add(result.contender, "p99_ratio", result.p99Ratio);
    add(result.contender, "cpu_ratio", result.cpuRatio);
    add(result.contender, "syscalls_per_batch", result.syscallsPerBatch);
    add(result.contender, "sleeps_per_batch", result.sleepsPerBatch);
    add(result.contender, "chains_per_batch", result.chainsPerBatch);
  }
  for (const { to, memoryBytes, drainUs, switchUs } of switches) {
    add(`to ${to}, ${memoryBytes} bytes`, "drain_us", drainUs);
    add(`to ${to}, ${memoryBytes} bytes`, "switch_us", switchUs);
  }
  if (idle !== undefined) {
    const value = Math.round(idle.bytesPerQueue);
    lines.push({ name: `${idle.queues} idle queues`, figure: "bytes_per_queue", median: value, min: value, max: value });
  }
  return csv(lines, ["name", "figure", "median", "min", "max"]);
}

/** Header and rows of the table of contenders, for people. */
export function relayTable({ results }: RelayBench): { header: string[]; rows: string[][] } {
  const [base] = results;
  const text = (summary: Summary | null, digits = 0) =>
    summary === null ? "-" : `${summary.median.toFixed(digits)} (${summary.min.toFixed(digits)}-${summary.max.toFixed(digits)})`;
  const ratio = (result: RelayResult, name: "iopsRatio" | "p99Ratio" | "cpuRatio") => result === base ? "-" : text(result[name], 2);
  return {
    header: ["mode", "req/s", "p50 us", "p99 us", "p99.9 us", "CPU us/req", "req/s ratio", "p99 ratio", "CPU ratio", "syscalls/batch"],
    rows: results.map((result) => [
      result.contender,
      text(result.iops),
      text(result.p50),
      text(result.p99),
      text(result.p999),
      text(result.cpuUs, 1),
      ratio(result, "iopsRatio"),
      ratio(result, "p99Ratio"),
      ratio(result, "cpuRatio"),
      text(result.syscallsPerBatch, 2),
    ]),
  };
}

/** Header and rows of the table of switches. */
export function switchTable({ switches }: RelayBench): { header: string[]; rows: string[][] } {
  const text = ({ median, min, max }: Summary) => `${median.toFixed(0)} (${min.toFixed(0)}-${max.toFixed(0)})`;
  return {
    header: ["memory", "to", "switches", "drain us", "switch us", "switch p99 us"],
    rows: switches.map(({ memoryBytes, to, count, drainUs, switchUs, switchP99 }) => [
      ...[formatSize(memoryBytes), to, String(count), text(drainUs), text(switchUs), switchP99.toFixed(0)],
    ]),
  };
}

/** The load in words. */
export function loadText({ link, latencyUs, queues, depth, requestSize, config }: RelayLoad): string {
  const device = latencyUs === 0 ? "a device that is as fast as its CPU" : `a device that takes ${latencyUs} us`;
  const workers = config.workers ?? 1;
  return `${device} (${link === "sim" ? "in this process" : "over a vhost-user socket"}), ${queues} queue${queues === 1 ? "" : "s"} of ` +
    `depth ${depth}, requests of ${requestSize} bytes, ${workers} worker${workers === 1 ? "" : "s"}, poll-us ${config.pollUs ?? "auto"}`;
}

/** A page that stands alone. */
export function relayPage(bench: RelayBench, head: Pick<PageHead, "machine" | "version">): string {
  const { load, results, switches, idle } = bench;
  const chart = (what: string, of: (result: RelayResult) => Summary, digits: number) =>
    `<h3>${what}</h3>` + bars(
      what,
      results.map((result) => ({ label: result.contender, value: of(result).median, min: of(result).min, max: of(result).max })),
      digits,
    );
  const contenders = relayTable(bench);
  const sections = [
    `<h2>Modes</h2>`,
    table(contenders.header, contenders.rows),
    chart("requests per second", ({ iops }) => iops, 0),
    chart("p99 latency, us", ({ p99 }) => p99, 0),
    chart("CPU per request, us", ({ cpuUs }) => cpuUs, 1),
  ];
  if (switches.length > 0) {
    const switched = switchTable(bench);
    sections.push(
      "<h2>Switching under load</h2>",
      table(switched.header, switched.rows),
      bars(
        "switch without its drain, us",
        switches.map(({ memoryBytes, to, switchUs: { median, min, max } }) => ({
          ...{ label: `${formatSize(memoryBytes)} ${to}`, value: median, min, max },
        })),
        0,
      ),
    );
  }
  if (idle !== undefined) sections.push(`<p>An idle queue in mode shadow takes ${formatSize(idle.bytesPerQueue)} of memory.</p>`);
  return page({
    title: "svq bench relay",
    about: `An embedded guest on ${loadText(load)}: directly, and through a relay in each mode. Medians and spreads; contenders took ` +
      "turns, ratios are of the same repetition. Only they mean anything beyond this run.",
    ...head,
  }, sections);
}
