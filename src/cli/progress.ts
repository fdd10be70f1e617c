/**
 * Progress on stderr: a bar that moves on a terminal, a line every few seconds otherwise, nothing under `-j` and `-q`.
 *
 * @module
 */
import { displayWidth } from "./colour.ts";
import { type Output, printable } from "./output.ts";

const TERMINAL_INTERVAL_MS = 100;
const LINE_INTERVAL_MS = 3000;
const BAR_WIDTH = 30;

/** Shows how far something is. Dispose it before anything else is printed as the result. */
export class Progress implements Disposable {
  readonly #output: Output;
  readonly #label: string;
  readonly #silent: boolean;
  #shownAt: number;
  #drawn = 0;

  /**
   * A bar that appears with the first update.
   *
   * @param label what goes on, e.g. `migrating`
   */
  constructor(output: Output, label: string) {
    this.#output = output;
    this.#label = label;
    this.#silent = output.json || output.options.verbosity < 0;
    // Short work on a log is not worth a line: the first one comes after the interval.
    this.#shownAt = output.stderr.isTerminal ? -Infinity : performance.now();
  }

  /**
   * Shows a state; cheap when called often.
   *
   * @param fraction 0 to 1, or undefined where the end is not known
   * @param note figures for the reader, e.g. `round 3, 12 MiB left`
   */
  update(fraction: number | undefined, note = ""): void {
    if (this.#silent) return;
    const terminal = this.#output.stderr.isTerminal;
    const now = performance.now();
    if (now - this.#shownAt < (terminal ? TERMINAL_INTERVAL_MS : LINE_INTERVAL_MS)) return;
    this.#shownAt = now;
    const percent = fraction === undefined ? "" : ` ${String(Math.floor(clamp(fraction) * 100)).padStart(3)}%`;
    const tail = note === "" ? "" : `  ${printable(note)}`;
    if (!terminal) {
      this.#output.writeError(`${this.#label}:${percent}${tail}`);
      return;
    }
    const filled = Math.round(clamp(fraction ?? 0) * BAR_WIDTH);
    const bar = fraction === undefined ? "" : ` [${"#".repeat(filled)}${".".repeat(BAR_WIDTH - filled)}]`;
    this.#draw(`${this.#label}${bar}${percent}${tail}`);
  }

  /** Takes the bar away. */
  [Symbol.dispose](): void {
    if (this.#drawn > 0) this.#output.stderr.write(`\r${" ".repeat(this.#drawn)}\r`);
    this.#drawn = 0;
  }

  #draw(text: string): void {
    const columns = terminalColumns() - 1;
    const shown = displayWidth(text) > columns ? [...text].slice(0, columns).join("") : text;
    const width = displayWidth(shown);
    this.#output.stderr.write(`\r${shown}${" ".repeat(Math.max(0, this.#drawn - width))}`);
    this.#drawn = width;
  }
}

function clamp(fraction: number): number {
  return Math.min(1, Math.max(0, fraction));
}

function terminalColumns(): number {
  try {
    return Deno.consoleSize().columns;
  } catch {
    return 80;
  }
}
