/**
 * The results of `svq bench ring` as a document, as CSV, as a table and as a page.
 *
 * @module
 */
import { bars, csv, escapeHtml, page } from "./page.ts";
import type { RingResult } from "./ring.ts";
import type { Contender } from "./ring_rig.ts";

/** The contenders from fast to slow, as pages and tables list them. */
export const CONTENDERS: readonly Contender[] = ["wasm", "js", "c", "bound", "syscalls"];

/** Results of one arrangement, workload and batch, by contender. */
export interface RingRow {
  /** `shadow, split to split`. */
  arrangement: string;
  /** Chain shape. */
  workload: string;
  /** Chains per round. */
  batch: number;
  /** By contender, those that took part. */
  results: Partial<Record<Contender, RingResult>>;
}

/** Puts what belongs side by side into one row. */
export function ringRows(results: readonly RingResult[]): RingRow[] {
  const rows = new Map<string, RingRow>();
  for (const result of results) {
    const arrangement = `${result.mode}, ${result.guestRing} to ${result.deviceRing}`;
    const key = `${arrangement}/${result.workload}/${result.batch}`;
    let row = rows.get(key);
    if (row === undefined) rows.set(key, row = { arrangement, workload: result.workload, batch: result.batch, results: {} });
    row.results[result.core] = result;
  }
  return [...rows.values()];
}

/** A contender's median over C's; undefined unless both took part. */
export function overC(row: RingRow, core: Contender): number | undefined {
  const [one, c] = [row.results[core], row.results.c];
  return one === undefined || c === undefined || c.median === 0 ? undefined : one.median / c.median;
}

/** What a contender takes beyond the bare system calls of a batch, ns per chain; undefined unless both took part. */
export function overSyscalls(row: RingRow, core: Contender): number | undefined {
  const [one, bare] = [row.results[core], row.results.syscalls];
  return one === undefined || bare === undefined ? undefined : one.median - bare.median;
}

/** A result as the document `svq.bench.ring/1` has it. */
export function ringRecord(result: RingResult): Record<string, unknown> {
  const { core, mode, guestRing, deviceRing, workload, batch, median, min, max } = result;
  const digits = (value: number) => Math.round(value * 100) / 100;
  return {
    ...{ core, mode, guest_ring: guestRing, device_ring: deviceRing, workload, batch },
    ns_per_chain: digits(median),
    min: digits(min),
    max: digits(max),
  };
}

/** Comma-separated values with a header line. */
export function ringCsv(results: readonly RingResult[]): string {
  const keys = ["core", "mode", "guest_ring", "device_ring", "workload", "batch", "ns_per_chain", "min", "max"];
  return csv(results.map(ringRecord), keys);
}

const COLOURS: Readonly<Record<Contender, string>> = {
  wasm: "#2b6cb0",
  js: "#b7791f",
  c: "#4a5568",
  bound: "#a0aec0",
  syscalls: "#718096",
};

function chart(rows: readonly RingRow[]): string {
  return bars(
    "ns per chain",
    rows.flatMap((row) =>
      CONTENDERS.flatMap((core) => row.results[core] ?? []).map(({ core, median, min, max }, i) => ({
        ...{ label: `${row.workload} ×${row.batch} ${core}`, value: median, min, max, colour: COLOURS[core], apart: i === 0 },
      }))
    ),
  );
}

/** A page that stands alone: tables, bars, and what was measured on. */
export function ringPage(results: readonly RingResult[], machine: Readonly<Record<string, string | number>>, version: string): string {
  const rows = ringRows(results);
  const arrangements = [...new Set(rows.map((row) => row.arrangement))];
  const cell = (row: RingRow, core: Contender) => {
    const result = row.results[core];
    if (result === undefined) return "<td>-</td>";
    const ratio = core === "c" ? undefined : overC(row, core);
    const times = ratio === undefined ? "" : ` <small>${ratio.toFixed(2)}×</small>`;
    return `<td title="${result.min.toFixed(1)} to ${result.max.toFixed(1)}">${result.median.toFixed(1)}${times}</td>`;
  };
  const sections = arrangements.map((arrangement) => {
    const own = rows.filter((row) => row.arrangement === arrangement);
    const lines = own.map((row) =>
      `<tr><th>${row.workload}</th><th>${row.batch}</th>${CONTENDERS.map((core) => cell(row, core)).join("")}</tr>`
    );
    const head = CONTENDERS.map((core) => `<th>${core}</th>`).join("");
    return `<h2>${escapeHtml(arrangement)}</h2><table><tr><th>chain</th><th>batch</th>${head}</tr>${lines.join("")}</table>${chart(own)}`;
  });
  return page({
    title: "svq bench ring",
    about: "Nanoseconds per descriptor chain that the relay itself takes: medians, and their ratio to tight C. Guest and device models " +
      "are not timed, and check every chain. Contenders took turns; only ratios within this run mean anything.",
    ...{ machine, version },
  }, sections);
}
