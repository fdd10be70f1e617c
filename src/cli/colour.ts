/**
 * Colours: functions that wrap text in SGR sequences, or return it as it is.
 *
 * @module
 */

/** The colours that svq uses, by name. */
export interface Paint {
  /** Whether anything is coloured at all. */
  readonly enabled: boolean;
  /** Headings, names. */
  bold(text: string): string;
  /** What matters less. */
  dim(text: string): string;
  /** Failed. */
  red(text: string): string;
  /** Good. */
  green(text: string): string;
  /** Look here. */
  yellow(text: string): string;
  /** Links, hints. */
  cyan(text: string): string;
}

/** Colours, or functions of the same names that change nothing. @param enabled false gives functions that change nothing */
export function painter(enabled: boolean): Paint {
  const wrap = (on: number, off: number) => (text: string) => enabled && text !== "" ? `\x1b[${on}m${text}\x1b[${off}m` : text;
  return {
    enabled,
    bold: wrap(1, 22),
    dim: wrap(2, 22),
    red: wrap(31, 39),
    green: wrap(32, 39),
    yellow: wrap(33, 39),
    cyan: wrap(36, 39),
  };
}

/** Columns that `text` takes on a terminal: colours take none. */
export function displayWidth(text: string): number {
  // deno-lint-ignore no-control-regex
  return [...text.replace(/\x1b\[[0-9;]*m/g, "")].length;
}
