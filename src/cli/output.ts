/**
 * What a command prints. stdout carries the result and nothing else: text for people, or under `-j` one JSON document (or
 * JSON lines of a stream). Everything else (log, progress, errors) goes to stderr.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { hexU64 } from "../units.ts";
import { type Paint, painter } from "./colour.ts";
import { formatTable, type TableOptions } from "./table.ts";

/** Where bytes go; the process's own streams, or a test's. */
export interface Sink {
  /** Writes all of `text`. @throws Deno.errors.BrokenPipe when nobody reads any more */
  write(text: string): void;
  /** Writes bytes as they are, where it can. */
  writeBytes?(bytes: Uint8Array): void;
  /** Is it a terminal? */
  readonly isTerminal: boolean;
}

/** Weight of a log line. */
export type LogLevel = "error" | "warning" | "info" | "debug";

const LEVELS: readonly LogLevel[] = ["error", "warning", "info", "debug"];
// sd-daemon(3) prefixes, which journald turns into priorities.
const JOURNAL_PREFIX: Record<LogLevel, string> = { error: "<3>", warning: "<4>", info: "<6>", debug: "<7>" };

/** What decides how an {@linkcode Output} prints. */
export interface OutputOptions {
  /** `-j`: documents as JSON. */
  json: boolean;
  /** `-p`: JSON with line breaks. */
  pretty: boolean;
  /** `--color`. */
  color: "auto" | "always" | "never";
  /** 0 normal, 1 and more for each `-v`, -1 for `-q`. */
  verbosity: number;
  /** The environment variables that matter: NO_COLOR, TERM, JOURNAL_STREAM. */
  env: (name: string) => string | undefined;
}

/** A JSON document with its schema name, e.g. `svq.probe/1`. */
export interface Document {
  /** Name and version of the shape. */
  schema: string;
  /** The keys that cli.md and `svq schema` list. bigint values print as `"0x…"`. */
  [key: string]: unknown;
}

/** Replaces control characters, which a device or a file name may contain, by visible escapes. */
export function printable(text: string): string {
  // deno-lint-ignore no-control-regex
  return text.replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f]/g, (char) => `\\x${char.charCodeAt(0).toString(16).padStart(2, "0")}`);
}

/** JSON text of a document: bigint as `"0x…"`, infinities as null. */
export function toJson(value: unknown, pretty = false): string {
  return JSON.stringify(value, (_key, item) => typeof item === "bigint" ? hexU64(item) : item, pretty ? 2 : undefined);
}

/** The printer that a command gets as `this.output`. */
export class Output {
  /** Documents are JSON (`-j` or `-p`). */
  readonly json: boolean;
  /** Colours for stdout. */
  readonly paint: Paint;
  /** Colours for stderr. */
  readonly paintError: Paint;
  /** Called when the reader of stdout has gone away; nothing is printed to it afterwards. */
  onClosed: (() => void) | undefined;
  #closed = false;

  /** A printer for one run. @param stdout for the result @param stderr for everything else */
  constructor(readonly stdout: Sink, readonly stderr: Sink, readonly options: OutputOptions) {
    this.json = options.json || options.pretty;
    const colour = (sink: Sink) => options.color === "always" || (options.color === "auto" && sink.isTerminal && wantsColour(options.env));
    this.paint = painter(colour(stdout) && !this.json);
    this.paintError = painter(colour(stderr) && !this.json);
  }

  /** A person looks at stdout, so pictures that move are welcome. */
  get interactive(): boolean {
    return this.stdout.isTerminal && !this.json;
  }

  /** Prints the command's result: the document under `-j`, otherwise what `text` returns (or prints by itself). */
  document(document: Document, text: () => string | void): void {
    if (this.json) return this.write(toJson(document, this.options.pretty) + "\n");
    const result = text();
    if (result !== undefined) this.line(result);
  }

  /** Prints one record of a stream: a JSON line under `-j`, otherwise what `text` returns. */
  record(record: Record<string, unknown>, text: () => string | void): void {
    if (this.json) return this.write(toJson(record, this.options.pretty) + "\n");
    const result = text();
    if (result !== undefined) this.line(result);
  }

  /** Prints text for people to stdout, with a line end. Not to be used under `-j`. */
  line(text = ""): void {
    if (this.json) throw new SvqError("INTERNAL", "Text printed to stdout under -j");
    this.write(text.endsWith("\n") ? text : text + "\n");
  }

  /** Prints a table for people to stdout: upper-case header, two spaces between columns. */
  table(header: readonly string[], rows: readonly (readonly unknown[])[], options: TableOptions = {}): void {
    this.line(formatTable(header, rows, { paint: this.paint, ...options }));
  }

  /** Writes bytes to stdout as they are. @returns whether somebody reads them still */
  writeBytes(bytes: Uint8Array): boolean {
    if (this.#closed) return false;
    try {
      this.stdout.writeBytes?.(bytes);
      return true;
    } catch (error) {
      if (!(error instanceof Deno.errors.BrokenPipe)) throw error;
      this.#closed = true;
      return false;
    }
  }

  /** Writes to stdout as it is: for results that are neither documents nor text (scripts, man pages, CSV). */
  write(text: string): void {
    if (this.#closed) return;
    try {
      this.stdout.write(text);
    } catch (error) {
      if (!(error instanceof Deno.errors.BrokenPipe)) throw error;
      this.#closed = true;
      this.onClosed?.();
    }
  }

  /** Logs at level info: shown unless `-q`. */
  info(message: string): void {
    this.log("info", message);
  }

  /** Logs a warning: always shown except under `-qq`. */
  warn(message: string): void {
    this.log("warning", message);
  }

  /** Logs for those who asked by `-v`. */
  debug(message: string): void {
    this.log("debug", message);
  }

  /** Logs a line to stderr; under `-j` as `{"log":{level,message}}`. */
  log(level: LogLevel, message: string): void {
    if (LEVELS.indexOf(level) > 2 + this.options.verbosity) return;
    const text = printable(message);
    if (this.json) return this.writeError(toJson({ log: { level, message } }));
    const journal = !this.stderr.isTerminal && this.options.env("JOURNAL_STREAM") !== undefined;
    if (journal) return this.writeError(text.split("\n").map((line) => JOURNAL_PREFIX[level] + line).join("\n"));
    const label = level === "warning"
      ? this.paintError.yellow("warning: ")
      : level === "error"
      ? this.paintError.red("error: ")
      : level === "debug"
      ? this.paintError.dim("debug: ")
      : "";
    this.writeError(label + text);
  }

  /** Prints an error, once, as the last thing: for people with its hint, under `-j` as one JSON line. */
  error(error: SvqError): void {
    if (this.json) {
      const record = { code: error.code, message: error.message, hint: error.hint, errno: error.errno, syscall: error.syscall };
      return this.writeError(toJson({ error: record }));
    }
    const hint = error.hint === undefined ? "" : `\n  ${this.paintError.cyan("hint:")} ${printable(error.hint)}`;
    this.writeError(`${this.paintError.red("error:")} ${printable(error.message)}${hint}`);
  }

  /** Writes a line to stderr. A stderr that nobody reads is no reason to stop. */
  writeError(text: string): void {
    try {
      this.stderr.write(text.endsWith("\n") ? text : text + "\n");
    } catch { /* nobody to tell */ }
  }
}

function wantsColour(env: (name: string) => string | undefined): boolean {
  return (env("NO_COLOR") ?? "") === "" && env("TERM") !== "dumb";
}

/** The process's own stream. */
export function processSink(stream: typeof Deno.stdout | typeof Deno.stderr): Sink {
  const encoder = new TextEncoder();
  return {
    isTerminal: stream.isTerminal(),
    write(text: string): void {
      this.writeBytes!(encoder.encode(text));
    },
    writeBytes(bytes: Uint8Array): void {
      for (let written = 0; written < bytes.length;) written += stream.writeSync(bytes.subarray(written));
    },
  };
}
