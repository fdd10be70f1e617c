/**
 * Plots as SVG text: bars, and points or lines over time. No scripts, no fonts, nothing to load.
 *
 * @module
 */

const WIDTH = 860;
const LEFT = 70;
const RIGHT = 12;
const TOP = 14;
const BOTTOM = 34;

/** Text for HTML and SVG. */
export function escapeText(text: string): string {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}

/** A number with at most three digits that count. */
export function short(value: number): string {
  if (value === 0) return "0";
  const power = Math.min(4, Math.max(0, Math.floor(Math.log10(Math.abs(value)) / 3)));
  const digits = value / 1000 ** power;
  const text = digits >= 100 ? digits.toFixed(0) : digits >= 10 ? digits.toFixed(1) : digits.toFixed(2);
  return `${text.includes(".") ? text.replace(/\.?0+$/, "") : text}${["", "k", "M", "G", "T"][power]}`;
}

/** Round values from 0 to at least `max`, about `steps` of them. */
export function linearTicks(max: number, steps: number = 4): number[] {
  if (!(max > 0)) return [0, 1];
  const rough = max / steps;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((one) => one >= rough * 0.999) ?? 10 * unit;
  return Array.from({ length: Math.ceil(max / step - 1e-9) + 1 }, (_, i) => i * step);
}

/** Powers of ten around [low, high]. */
export function logTicks(low: number, high: number): number[] {
  const first = Math.floor(Math.log10(Math.max(low, 1e-3)));
  const last = Math.max(first + 1, Math.ceil(Math.log10(Math.max(high, 1e-3)) - 1e-9));
  return Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i));
}

interface Axis {
  ticks: number[];
  place: (value: number) => number;
}

function vertical(ticks: number[], height: number, log: boolean): Axis {
  const scale = log ? Math.log10 : (value: number) => value;
  const [low, high] = [scale(ticks[0]!), scale(ticks.at(-1)!)];
  const room = height - TOP - BOTTOM;
  const clamp = (share: number) => Math.min(1, Math.max(0, share));
  return { ticks, place: (value) => TOP + room * (1 - clamp((scale(Math.max(value, log ? ticks[0]! : 0)) - low) / (high - low))) };
}

function horizontal(max: number): Axis {
  return { ticks: linearTicks(max, 10), place: (value) => LEFT + (WIDTH - LEFT - RIGHT) * value / max };
}

const at = (value: number) => value.toFixed(1);

function frame(title: string, height: number, y: Axis, format: (value: number) => string, body: string): string {
  const grid = y.ticks.map((tick) =>
    `<line class="grid" x1="${LEFT}" x2="${WIDTH - RIGHT}" y1="${at(y.place(tick))}" y2="${at(y.place(tick))}"/>` +
    `<text class="tick" x="${LEFT - 6}" y="${at(y.place(tick) + 4)}" text-anchor="end">${escapeText(format(tick))}</text>`
  );
  return `<svg viewBox="0 0 ${WIDTH} ${height}" role="img" aria-label="${escapeText(title)}">${grid.join("")}${body}</svg>`;
}

/** One bar. */
export interface Bar {
  /** Below it. */
  label: string;
  /** How high it is. */
  value: number;
  /** How much of it is of the second kind. */
  part?: number;
  /** What it says when pointed at. */
  hint: string;
  /** Shown in the colour of the gap. */
  marked?: boolean;
}

/** A bar for each round. */
export function barChart(title: string, bars: readonly Bar[], unit: string = ""): string {
  const height = 220;
  const y = vertical(linearTicks(Math.max(1, ...bars.map(({ value }) => value))), height, false);
  const slot = (WIDTH - LEFT - RIGHT) / Math.max(1, bars.length);
  const bottom = height - BOTTOM;
  const every = Math.ceil(bars.length / 40);
  const body = bars.map(({ label, value, part = 0, hint, marked }, i) => {
    const x = LEFT + slot * (i + 0.15);
    const rect = (from: number, to: number, kind: string) =>
      `<rect class="${kind}" x="${at(x)}" width="${at(slot * 0.7)}" y="${at(y.place(to))}" height="${at(y.place(from) - y.place(to))}"/>`;
    const text = i % every === 0
      ? `<text class="tick" x="${at(x + slot * 0.35)}" y="${bottom + 16}" text-anchor="middle">${escapeText(label)}</text>`
      : "";
    return `<g><title>${escapeText(hint)}</title>${rect(0, value - part, marked ? "gap" : "first")}${
      part > 0 ? rect(value - part, value, "second") : ""
    }${text}</g>`;
  });
  return frame(title, height, y, (value) => short(value) + unit, body.join(""));
}

/** A line over time. */
export interface Line {
  /** In the legend. */
  name: string;
  /** Its colour: a class of the page's style. */
  kind: string;
  /** Pieces that are not joined with each other. */
  pieces: (readonly [x: number, y: number])[][];
}

/** A stretch of time. */
export interface Band {
  /** Milliseconds. */
  from: number;
  /** Milliseconds. */
  to: number;
  /** Written at its top. */
  label: string;
  /** Its colour: a class of the page's style. */
  kind: string;
}

/** Lines over time in milliseconds. */
export function timeChart(
  title: string,
  lines: readonly Line[],
  bands: readonly Band[],
  options: { endMs: number; format: (value: number) => string; log: boolean },
): string {
  const { endMs, format, log } = options;
  const height = 260;
  const values = lines.flatMap(({ pieces }) => pieces.flat().map(([, value]) => value)).filter((value) => value > 0);
  const [low, high] = values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, 0]);
  const y = vertical(log ? logTicks(Number.isFinite(low) ? low : 1, high || 1) : linearTicks(high), height, log);
  const x = horizontal(Math.max(1, endMs));
  const bottom = height - BOTTOM;
  const shades = bands.map(({ from, to, label, kind }) => {
    const [left, right] = [x.place(from), Math.max(x.place(to), x.place(from) + 1.5)];
    return `<g><title>${escapeText(label)}</title><rect class="${kind}" x="${at(left)}" width="${at(right - left)}" y="${TOP}" height="${
      bottom - TOP
    }"/></g>`;
  });
  const ticks = x.ticks.filter((tick) => tick <= endMs).map((tick) =>
    `<text class="tick" x="${at(x.place(tick))}" y="${bottom + 16}" text-anchor="middle">${escapeText(`${short(tick / 1000)} s`)}</text>`
  );
  const paths = lines.map(({ name, kind, pieces }) => {
    const drawn = pieces.filter((piece) => piece.length > 0).map((piece) => {
      const points = piece.map(([px, py]) => `${at(x.place(px))},${at(y.place(py))}`);
      // A piece of one point would be invisible as a line.
      return points.length === 1
        ? `<circle class="${kind} dot" r="2" cx="${points[0]!.split(",")[0]}" cy="${points[0]!.split(",")[1]}"/>`
        : `<polyline class="${kind} line" points="${points.join(" ")}"/>`;
    });
    return `<g><title>${escapeText(name)}</title>${drawn.join("")}</g>`;
  });
  return frame(title, height, y, format, shades.join("") + ticks.join("") + paths.join(""));
}

/** Parts of a whole, side by side. */
export function splitChart(title: string, parts: readonly { name: string; value: number; hint: string }[]): string {
  const height = 46;
  const total = parts.reduce((sum, { value }) => sum + value, 0) || 1;
  let left = 0;
  const body = parts.map(({ value, hint }, i) => {
    const width = WIDTH * value / total;
    const rect = `<g><title>${escapeText(hint)}</title><rect class="part${i}" x="${at(left)}" width="${at(width)}" y="6" height="34"/></g>`;
    left += width;
    return rect;
  });
  return `<svg viewBox="0 0 ${WIDTH} ${height}" role="img" aria-label="${escapeText(title)}">${body.join("")}</svg>`;
}
