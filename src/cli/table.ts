/**
 * Tables: upper-case header, two spaces between columns, no borders, no trailing spaces.
 *
 * @module
 */
import { displayWidth, type Paint, painter } from "./colour.ts";

/** How a table looks. */
export interface TableOptions {
  /** Colours for the header. */
  paint?: Paint;
  /** Columns to align right, by position; by default those whose cells are all numbers. */
  right?: readonly number[];
  /** Spaces before each line (default 0). */
  indent?: number;
}

/**
 * The lines of a table, without a line end at the last one.
 *
 * @param header column names, in any case
 * @param rows cells: strings (possibly coloured), numbers; undefined and null show as `-`
 */
export function formatTable(header: readonly string[], rows: readonly (readonly unknown[])[], options: TableOptions = {}): string {
  const paint = options.paint ?? painter(false);
  const cells = rows.map((row) => header.map((_, column) => cellText(row[column])));
  const widths = header.map((name, column) => Math.max(displayWidth(name), ...cells.map((row) => displayWidth(row[column]!))));
  const right = header.map((_, column) =>
    options.right?.includes(column) ??
      (rows.length > 0 && rows.every((row) => typeof row[column] === "number" || row[column] === undefined || row[column] === null))
  );
  const indent = " ".repeat(options.indent ?? 0);
  const format = (row: readonly string[]) => {
    const padded = row.map((text, column) => {
      const space = " ".repeat(widths[column]! - displayWidth(text));
      return right[column] ? space + text : text + space;
    });
    return (indent + padded.join("  ")).trimEnd();
  };
  const title = format(header.map((name) => name.toUpperCase()));
  return [paint.bold(title), ...cells.map(format)].join("\n");
}

function cellText(value: unknown): string {
  if (value === undefined || value === null || value === "") return "-";
  // A cell is one line; colour sequences stay.
  // deno-lint-ignore no-control-regex
  return String(value).replace(/[\x00-\x1a\x1c-\x1f\x7f]/g, " ");
}

/** Lines `KEY  value`, aligned, for the facts about one thing. */
export function formatFacts(facts: readonly (readonly [string, unknown])[], paint: Paint = painter(false), indent = 0): string {
  const width = Math.max(0, ...facts.map(([name]) => displayWidth(name)));
  return facts
    .map(([name, value]) => `${" ".repeat(indent)}${paint.bold(name)}${" ".repeat(width - displayWidth(name))}  ${cellText(value)}`)
    .join("\n");
}
