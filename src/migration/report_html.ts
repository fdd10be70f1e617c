/**
 * `--report`: one page about a migration, with everything in it: readable without a network, without scripts, on paper.
 *
 * @module
 */
import { formatCount, formatDuration, formatSize } from "../units.ts";
import { VERSION } from "../version.ts";
import { type Band, barChart, escapeText, type Line, short, splitChart, timeChart } from "./charts.ts";
import { describeWrong, downtimeParts, migrateDocument } from "./document.ts";
import type { MigrationReport } from "./handshake.ts";
import type { MigrationResult } from "./source_types.ts";
import type { Sample, Timeline } from "./timeline.ts";

/** What a page is about. */
export interface PageInput {
  /** How the migration ended. */
  result: MigrationResult;
  /** How the guest's requests went, where that is known. */
  requests: MigrationReport | undefined;
  /** What happened when. */
  timeline: Pick<Timeline, "source" | "destination" | "phases" | "rounds" | "begin">;
  /** Named facts for the head of the page: from where to where. */
  facts: readonly (readonly [name: string, value: string])[];
  /** When it was. */
  date: Date;
}

const STYLE = `
:root{color-scheme:light dark;--ink:#1c2430;--soft:#667085;--line:#e3e7ee;--page:#fff;--card:#f7f8fa;--a:#2f6fde;--b:#8db4f5;--c:#d9822b;--bad:#c8372d;--ok:#1e8e4e}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#333b48;--page:#14181f;--card:#1c222c;--a:#6ea0ff;--b:#3b5f9e;--c:#f0a04b;--bad:#ff7468;--ok:#4cc47f}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:920px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em;margin:0 0 .2em}h2{font-size:1.1em;margin:2em 0 .3em}p,figcaption{color:var(--soft);margin:.3em 0}figure{margin:0}
.outcome{font-weight:600}.good{color:var(--ok)}.bad{color:var(--bad)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:.6em;margin:1em 0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.5em .8em}.facts dt{color:var(--soft);font-size:.85em}.facts dd{margin:0;font-weight:600;overflow-wrap:anywhere}
svg{width:100%;height:auto;display:block}.grid{stroke:var(--line)}.tick{fill:var(--soft);font-size:11px}
.first,.part3{fill:var(--a)}.second,.part1{fill:var(--b)}.gap,.part0{fill:var(--bad)}.part2{fill:var(--c)}.part4{fill:var(--ok)}
.gapband{fill:var(--bad);opacity:.28}.slowband{fill:var(--c);opacity:.13}.copyband{fill:var(--a);opacity:.08}
.line{fill:none;stroke-width:1.5}.p50.line,.rate.line{stroke:var(--a)}.p99.line{stroke:var(--c)}.max.line{stroke:var(--soft);stroke-dasharray:3 2}
.p50.dot,.rate.dot{fill:var(--a)}.p99.dot{fill:var(--c)}.max.dot{fill:var(--soft)}
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.3em;vertical-align:-1px}.entry{white-space:nowrap;margin-right:1em}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}th,td{text-align:right;padding:.2em .6em;border-bottom:1px solid var(--line)}th{color:var(--soft);font-weight:500}
pre{background:var(--card);padding:1em;border-radius:8px;white-space:pre-wrap;overflow-wrap:anywhere}`;

const us = (value: number) => formatDuration(value * 1000);
const ms = (value: number) => formatDuration(value * 1e6);

/** The page, as HTML. */
export function reportPage(input: PageInput): string {
  const { result, requests, date } = input;
  const good = result.outcome === "completed" || result.outcome === "possible";
  const parts = [
    `<h1>Migration of a guest</h1><p>${escapeText(date.toISOString())} · svq ${escapeText(VERSION)}</p>`,
    `<p class="outcome ${good ? "good" : "bad"}">${escapeText(outcomeText(result))}</p>`,
    facts(input),
    downtime(result),
    overTime(input),
    rounds(input),
    `<h2>All of it as data</h2><details><summary>svq.migrate/1</summary><pre>${
      escapeText(JSON.stringify(migrateDocument(result, requests), null, 1))
    }</pre></details>`,
  ];
  return `<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Migration: ${escapeText(result.outcome)}</title><style>${STYLE}</style></head>
<body>${parts.join("\n")}</body></html>
`;
}

function outcomeText({ outcome, phase, error }: MigrationResult): string {
  switch (outcome) {
    case "completed":
      return "Completed: the guest runs at the destination";
    case "possible":
      return "Not migrated: this was a dry run, and the destination could take the guest";
    case "in-doubt":
      return `In doubt: ${error?.message ?? "the link was lost in the hand-over"}`;
    default:
      return `${outcome === "cancelled" ? "Cancelled" : "Given up"} in phase ${phase}: ${
        error?.message ?? ""
      }. The guest goes on at the source`;
  }
}

function facts({ result, requests, timeline, facts }: PageInput): string {
  const all: [string, string][] = facts.map(([name, value]) => [name, value]);
  const [begin, end] = [timeline.begin("log") ?? timeline.begin("connect"), timeline.begin("completed")];
  if (begin !== undefined && end !== undefined) all.push(["Total time", ms(end - begin)]);
  if (result.downtimeUs !== null) all.push(["Downtime", us(result.downtimeUs.total)]);
  all.push(["Sent", `${formatSize(result.bytes)} in ${result.rounds.length} rounds`]);
  if (result.throttlePercent > 0) all.push(["Guest slowed down", `held still for up to ${result.throttlePercent} %`]);
  if (result.memoryIdentical !== null) all.push(["All memory", result.memoryIdentical ? "identical on both sides" : "DIFFERS"]);
  if (requests !== undefined) {
    all.push([
      "Requests",
      `${formatCount(requests.completed)} completed, ${describeWrong(requests) || "none lost, duplicated or corrupted"}`,
    ]);
  }
  return `<dl class="facts">${
    all.map(([name, value]) => `<div><dt>${escapeText(name)}</dt><dd>${escapeText(value)}</dd></div>`).join("")
  }</dl>`;
}

function downtime({ downtimeUs }: MigrationResult): string {
  if (downtimeUs === null) return "";
  const parts = downtimeParts(downtimeUs).map(([name, value]) => ({ name, value, hint: `${name}: ${us(value)}` }));
  const keys = parts.map(({ hint }, i) => key(PART_COLOURS[i]!, hint));
  return `<h2>The gap: ${us(downtimeUs.total)} in which the guest stood still</h2><figure>${
    splitChart("Parts of the downtime", parts)
  }<figcaption>${keys.join("")}</figcaption></figure>`;
}

const PART_COLOURS = ["var(--bad)", "var(--b)", "var(--c)", "var(--a)", "var(--ok)"];

function bandsOf({ timeline }: PageInput, endMs: number): Band[] {
  const bands: Band[] = [];
  const [begin, stop, end] = [timeline.begin("rounds"), timeline.begin("stop"), timeline.begin("completed")];
  if (begin !== undefined) bands.push({ from: begin, to: stop ?? endMs, label: "memory is copied while the guest runs", kind: "copyband" });
  const slow = timeline.rounds.find(({ throttlePercent }) => throttlePercent > 0);
  if (slow !== undefined) bands.push({ from: slow.atMs, to: stop ?? endMs, label: "the guest is slowed down", kind: "slowband" });
  if (stop !== undefined) bands.push({ from: stop, to: end ?? stop, label: "the gap: the guest stands still", kind: "gapband" });
  return bands;
}

function overTime(input: PageInput): string {
  const { source, destination, phases } = input.timeline;
  if (source.length + destination.length === 0) return "";
  const endMs = Math.max(phases.at(-1)?.atMs ?? 0, source.at(-1)?.atMs ?? 0, destination.at(-1)?.atMs ?? 0);
  const bands = bandsOf(input, endMs);
  const pieces = (value: (sample: Sample) => number): [number, number][][] =>
    [source, destination].map((samples) => samples.map((sample) => [sample.atMs - sample.ms / 2, value(sample)]));
  const latency: Line[] = [
    { name: "slowest", kind: "max", pieces: pieces(({ max }) => max) },
    { name: "99 of 100", kind: "p99", pieces: pieces(({ p99 }) => p99) },
    { name: "half", kind: "p50", pieces: pieces(({ p50 }) => p50) },
  ];
  const rate: Line[] = [{ name: "requests per second", kind: "rate", pieces: pieces(({ completed, ms }) => completed / ms * 1000) }];
  const shared = { endMs, log: false, format: short };
  const slowed = bands.some(({ kind }) => kind === "slowband");
  return `<h2>Latency of the guest's requests</h2><figure>${
    timeChart("Latency of requests over time", latency, bands, { endMs, log: true, format: us })
  }<figcaption>${key("var(--a)", "half of the requests")}${key("var(--c)", "99 of 100")}${key("var(--soft)", "the slowest")}${
    key("var(--bad)", "the gap")
  }${
    slowed ? key("var(--c)", "the guest slowed down (shaded)") : ""
  }. Left of the gap the source, right of it the destination.</figcaption></figure>
<h2>Requests per second</h2><figure>${timeChart("Requests per second over time", rate, bands, shared)}</figure>`;
}

function key(colour: string, text: string): string {
  return `<span class="entry"><span class="key" style="background:${colour}"></span>${escapeText(text)}</span> `;
}

function rounds({ result, timeline }: PageInput): string {
  if (result.rounds.length === 0) return "";
  const frozen = (round: number) => round > timeline.rounds.length;
  const label = (round: number) => frozen(round) ? "last" : String(round);
  const pages = result.rounds.map(({ round, pages, zeroPages }) => ({
    label: label(round),
    value: pages,
    part: zeroPages,
    marked: frozen(round),
    hint: `round ${label(round)}: ${formatCount(pages)} pages, ${formatCount(zeroPages)} of them zero`,
  }));
  const bytes = result.rounds.map((one) => ({
    label: label(one.round),
    value: one.bytes,
    marked: frozen(one.round),
    hint: `round ${label(one.round)}: ${formatSize(one.bytes)} in ${ms(one.ms)}`,
  }));
  const rows = result.rounds.map((one, i) => {
    const cells = [
      label(one.round),
      formatCount(one.pages),
      formatCount(one.zeroPages),
      formatSize(one.bytes),
      ms(one.ms),
      one.ms > 0 ? `${formatSize(Math.round(one.bytes / one.ms * 1000))}/s` : "",
      `${timeline.rounds[i - 1]?.throttlePercent ?? 0} %`,
    ];
    return `<tr>${cells.map((cell) => `<td>${escapeText(cell)}</td>`).join("")}</tr>`;
  });
  const heads = ["Round", "Dirty pages", "Zero", "Sent", "Time", "Rate", "Guest held still"];
  return `<h2>Dirty pages in each round</h2><figure>${barChart("Dirty pages in each round", pages)}<figcaption>${
    key("var(--a)", "with data")
  }${key("var(--b)", "zero, sent as a number")}${key("var(--bad)", "while the guest stood still")}</figcaption></figure>
<h2>Bytes sent in each round</h2><figure>${barChart("Bytes sent in each round", bytes, "B")}</figure>
<table><thead><tr>${heads.map((head) => `<th>${head}</th>`).join("")}</tr></thead><tbody>${rows.join("")}</tbody></table>`;
}
