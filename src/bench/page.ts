/**
 * Pages that stand alone: what the reports of all benchmarks have in common.
 *
 * @module
 */

/** Text as it may stand in a page. */
export function escapeHtml(text: string): string {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");
}

/** What a page says around its sections. */
export interface PageHead {
  /** The command: title and heading. */
  title: string;
  /** What was measured, a paragraph of text. */
  about: string;
  /** What it was measured on. */
  machine: Readonly<Record<string, string | number>>;
  /** Version of svq. */
  version: string;
}

const STYLE = "body{font:15px/1.4 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse;margin:1em 0}" +
  "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}svg text{font:11px sans-serif}" +
  "dl{display:grid;grid-template-columns:max-content auto;gap:0 1em}dd{margin:0}";

/** A whole page. @param sections HTML, one after the other */
export function page(head: PageHead, sections: readonly string[]): string {
  const facts = Object.entries({ svq: head.version, ...head.machine })
    .map(([key, value]) => `<dt>${escapeHtml(key)}</dt><dd>${escapeHtml(String(value))}</dd>`).join("");
  return `<!doctype html>
<html lang="en"><meta charset="utf-8"><title>${escapeHtml(head.title)}</title>
<style>${STYLE}</style>
<h1>${escapeHtml(head.title)}</h1>
<p>${escapeHtml(head.about)}</p>
<dl>${facts}</dl>
${sections.join("\n")}
</html>
`;
}

/** A table of text. */
export function table(header: readonly string[], rows: readonly (readonly (string | number)[])[]): string {
  const line = (cells: readonly (string | number)[], name: "td" | "th") =>
    `<tr>${cells.map((cell) => `<${name}>${escapeHtml(String(cell))}</${name}>`).join("")}</tr>`;
  return `<table>${line(header, "th")}${rows.map((row) => line(row, "td")).join("")}</table>`;
}

/** A bar of {@linkcode bars}. */
export interface Bar {
  /** What stands before it. */
  label: string;
  /** Its length. */
  value: number;
  /** The least measured. */
  min: number;
  /** The greatest measured. */
  max: number;
  /** A CSS colour. */
  colour?: string;
  /** More room above it. */
  apart?: boolean;
}

const BAR = 16;
const LABEL = 150;
const WIDTH = 560;

/** Bars from 0, each with the spread as a thin line across its end. @param what the unit, for those who cannot see it */
export function bars(what: string, list: readonly Bar[], digits = 1): string {
  const most = Math.max(Number.MIN_VALUE, ...list.map(({ max }) => max));
  const x = (value: number) => LABEL + value / most * (WIDTH - LABEL - 70);
  const parts: string[] = [];
  let y = 4;
  for (const { label, value, min, max, colour, apart } of list) {
    if (apart === true) y += 6;
    const middle = y + BAR / 2;
    parts.push(
      `<text x="${LABEL - 8}" y="${middle + 4}" text-anchor="end">${escapeHtml(label)}</text>`,
      `<rect x="${LABEL}" y="${y + 2}" width="${(x(value) - LABEL).toFixed(1)}" height="${BAR - 4}" fill="${colour ?? "#2b6cb0"}"/>`,
      `<line x1="${x(min).toFixed(1)}" x2="${x(max).toFixed(1)}" y1="${middle}" y2="${middle}" stroke="#000"/>`,
      `<text x="${(x(max) + 6).toFixed(1)}" y="${middle + 4}">${value.toFixed(digits)}</text>`,
    );
    y += BAR;
  }
  return `<svg viewBox="0 0 ${WIDTH} ${y}" width="${WIDTH}" height="${y}" role="img" aria-label="${escapeHtml(what)}">${
    parts.join("")
  }</svg>`;
}

/** Comma-separated values with a header line; null and undefined are empty. */
export function csv(records: readonly Readonly<Record<string, unknown>>[], keys: readonly string[]): string {
  const cell = (value: unknown) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [keys.join(","), ...records.map((record) => keys.map((key) => cell(record[key])).join(","))].join("\n") + "\n";
}
