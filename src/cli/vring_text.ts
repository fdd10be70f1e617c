/**
 * Rings for people: what `svq vring` prints without `-j`.
 *
 * @module
 */
import type { RingDiff } from "../vring/diff.ts";
import type { ChainDump, DescriptorDump, SuppressionDump, WindowEntry } from "../vring/dump.ts";
import type { Output } from "./output.ts";
import type { RingEntry, VringDocument } from "./vring_document.ts";

function positionText(at: number | null | undefined, wrap: number | null | undefined): string {
  if (at === null || at === undefined) return "?";
  return wrap === null || wrap === undefined ? String(at) : `${at} (wrap ${wrap})`;
}

function suppressionText({ wanted, event, event_wrap, next_notifies }: SuppressionDump): string {
  if (wanted !== "at_event") return wanted === "always" ? "wanted" : "not wanted";
  const next = next_notifies === null ? "" : next_notifies ? ": the next one" : ": not the next one";
  return `wanted at ${positionText(event, event_wrap)}${next}`;
}

function flightText(ring: RingEntry): string {
  if (ring.in_flight === 0) return "nothing";
  const chains = ring.chains ?? [];
  const listed = chains.filter((chain) => chain.in_flight === true).length;
  if (ring.in_flight === null || ring.in_flight === undefined) {
    const possible = chains.filter((chain) => chain.in_flight === null).length;
    return `${listed} not taken yet${possible > 0 ? `, ${possible} that may have come back` : ""}`;
  }
  const hidden = ring.in_flight - listed;
  return `${ring.in_flight} chains${hidden > 0 ? `, ${hidden} of them no longer in the ring's memory` : ""}`;
}

function chainState(chain: ChainDump): string {
  if (chain.in_flight === false) return "returned";
  const where = chain.taken === null ? "" : chain.taken ? ", at the device" : ", not taken";
  if (chain.in_flight === null) return "in flight or returned";
  return `in flight${where}${chain.likelihood >= 0.9 ? "" : " (likely)"}`;
}

function chainRow(chain: ChainDump): unknown[] {
  const { indirect, descriptors } = chain;
  const list = descriptors.length > 6 ? `${descriptors.slice(0, 5).join(" ")} … ${descriptors.at(-1)}` : descriptors.join(" ");
  const table = indirect === null ? "" : `${indirect.entries || indirect.bytes / 16} at ${indirect.address}`;
  const since = chain.in_flight_ms === null ? "" : `≥ ${(chain.in_flight_ms / 1000).toFixed(1)} s`;
  return [
    chain.head,
    chain.position,
    chain.direction,
    chain.length,
    chain.readable_bytes,
    chain.writable_bytes,
    list,
    table,
    chainState(chain),
    since,
  ];
}

function descriptorRow(descriptor: DescriptorDump): unknown[] {
  const { index, address, length, flags, next, id } = descriptor;
  return [index, address, length, flags.join("+"), id ?? next];
}

function windowText(entries: readonly WindowEntry[]): string {
  return entries.map(({ position, id, length, state, next }) => {
    const text = `${position}:${id}${length === undefined ? "" : `+${length}`}${state === undefined ? "" : ` ${state}`}`;
    return next ? `[${text}]` : text;
  }).join("  ");
}

function title(output: Output, ring: RingEntry): string {
  const torn = ring.consistent === false ? `  ${output.paint.yellow("TORN: the ring moved while it was read")}` : "";
  return `${output.paint.bold(`queue ${ring.index} ${ring.side}`)}  ${ring.layout}, ${ring.num} descriptors, mode ${ring.mode}${torn}`;
}

function printRing(output: Output, ring: RingEntry): void {
  output.line(title(output, ring));
  const { suppression, flags, wrap_counters: wraps, window, addresses, features } = ring;
  if (suppression !== undefined && flags !== undefined && window !== undefined && features !== undefined) {
    const names = [
      ...(features.event_idx ? ["EVENT_IDX"] : []),
      ...(features.indirect ? ["INDIRECT_DESC"] : []),
      ...(features.in_order ? ["IN_ORDER"] : []),
    ];
    output.line(`  avail      ${positionText(ring.avail_idx, wraps?.avail)}, flags ${flags.avail}`);
    output.line(`  taken to   ${positionText(ring.last_avail_idx, wraps?.last_avail)}`);
    output.line(`  used       ${positionText(ring.used_idx, wraps?.used)}, flags ${flags.used}`);
    output.line(`  in flight  ${flightText(ring)}`);
    output.line(`  kicks      ${suppressionText(suppression.kicks)}`);
    output.line(`  calls      ${suppressionText(suppression.calls)}`);
    if (names.length > 0) output.line(`  features   ${names.join(", ")}`);
    if (addresses) output.line(`  memory     desc ${addresses.desc}, avail ${addresses.avail}, used ${addresses.used}`);
    if (window.avail.length > 0) output.line(`  avail ring ${windowText(window.avail)}`);
    if (window.used.length > 0) output.line(`  used ring  ${windowText(window.used)}`);
  }
  if (ring.chains !== undefined && ring.chains.length > 0) {
    output.line();
    const header = ["head", "at", "device may", "buffers", "readable", "writable", "descriptors", "table", "state", "since"];
    output.table(header, ring.chains.map(chainRow), { indent: 2 });
  }
  if (ring.descriptors !== undefined && ring.descriptors.length > 0) {
    output.line();
    const link = ring.layout === "packed" ? "id" : "next";
    output.table(["descriptor", "address", "length", "flags", link], ring.descriptors.map(descriptorRow), { indent: 2 });
  }
  printAnomalies(output, ring);
}

function printAnomalies(output: Output, ring: RingEntry): void {
  for (const { rule, spec, detail } of ring.anomalies) {
    output.line(`  ${output.paint.red(rule)}  ${spec === "svq" ? "limit of svq" : `virtio 1.3, ${spec}`}: ${detail}`);
  }
}

function printUnreadable(output: Output, document: VringDocument): void {
  for (const { index, side, message } of document.unreadable) output.line(`queue ${index} ${side}: cannot be read: ${message}`);
}

/** `svq vring dump`. */
export function printDump(output: Output, document: VringDocument): void {
  document.queues.forEach((ring, i) => {
    if (i > 0) output.line();
    printRing(output, ring);
  });
  printUnreadable(output, document);
  if (document.queues.length + document.unreadable.length === 0) output.info("no ring is set up");
}

/** `svq vring verify`. */
export function printVerify(output: Output, document: VringDocument): void {
  for (const ring of document.queues) {
    const count = ring.anomalies.length;
    const verdict = count > 0
      ? output.paint.red(`${count} broken rule${count > 1 ? "s" : ""}`)
      : ring.consistent
      ? output.paint.green("no broken rule")
      : "not checked";
    output.line(`${title(output, ring)}: ${verdict}`);
    printAnomalies(output, ring);
  }
  printUnreadable(output, document);
  if (document.queues.length + document.unreadable.length === 0) output.info("no ring is set up");
}

function moved(now: number | null | undefined, before: number | null | undefined): string {
  if (now === null || now === undefined || before === null || before === undefined) return "";
  return ` (+${(now - before) & 0xffff})`;
}

/** One line about a ring of `svq vring watch`. @param before the same ring in the round before */
export function watchLine(ring: RingEntry, before: RingEntry | undefined): string {
  const packed = ring.layout === "packed";
  const step = (name: "avail_idx" | "used_idx") => {
    const wraps = ring.wrap_counters?.[name === "avail_idx" ? "avail" : "used"];
    return positionText(ring[name], packed ? wraps : null) + (packed ? "" : moved(ring[name], before?.[name]));
  };
  const oldest = Math.max(-1, ...(ring.chains ?? []).map((chain) => chain.in_flight_ms ?? -1));
  const wants = ring.suppression;
  return [
    `queue ${ring.index} ${ring.side}, ${ring.layout}, mode ${ring.mode}`,
    `avail ${step("avail_idx")}`,
    `used ${step("used_idx")}`,
    `in flight ${flightText(ring)}`,
    ...(oldest < 0 ? [] : [`oldest ≥ ${(oldest / 1000).toFixed(1)} s`]),
    ...(wants === undefined ? [] : [`kicks ${suppressionText(wants.kicks)}`, `calls ${suppressionText(wants.calls)}`]),
    ...(ring.consistent ? [] : ["torn"]),
    ...(ring.anomalies.length === 0 ? [] : [ring.anomalies.map(({ rule }) => rule).join(" ")]),
  ].join("  ");
}

function heads(chains: readonly { head: number }[]): string {
  const shown = chains.slice(0, 12).map(({ head }) => head).join(" ");
  return chains.length > 12 ? `${shown} … (${chains.length})` : shown;
}

// A fact as a person writes it; in the document it is JSON.
function fact(value: unknown): string {
  if (value === null || value === undefined) return "unknown";
  return typeof value === "string" ? value : JSON.stringify(value);
}

/** `svq vring diff`. */
export function printDiff(output: Output, diffs: readonly RingDiff[]): void {
  for (const diff of diffs) {
    output.line(output.paint.bold(`queue ${diff.index} ${diff.side}`) + (diff.identical ? "  nothing moved" : ""));
    if (diff.only_in !== null) output.line(`  only in ${diff.only_in === "a" ? "the first" : "the second"}`);
    if (diff.torn) output.line(`  ${output.paint.yellow("one of the two is torn")}`);
    if (diff.avail_moved) output.line(`  made available  ${diff.avail_moved} ${diff.unit}`);
    if (diff.used_moved) output.line(`  used            ${diff.used_moved} ${diff.unit}`);
    if (diff.returned.length > 0) output.line(`  returned        ${heads(diff.returned)}`);
    if (diff.added.length > 0) output.line(`  new in flight   ${heads(diff.added)}`);
    if (diff.stayed.length > 0) output.line(`  still in flight ${heads(diff.stayed)}`);
    if (diff.descriptors_changed.length > 0) output.line(`  descriptors     ${diff.descriptors_changed.length} changed`);
    for (const { field, from, to } of diff.changes) output.line(`  ${field.replaceAll(/[._]/g, " ")}: ${fact(from)} -> ${fact(to)}`);
  }
  if (diffs.length === 0) output.info("no ring in either");
}
