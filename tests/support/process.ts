/**
 * Child processes of tests: their output line by line, waiting for a line, and a certain end.
 *
 * @module
 */
import { PATIENCE_MS } from "./wait.ts";

/** A line that came, and when (performance.now()). */
export interface Line {
  text: string;
  atMs: number;
}

/** What {@linkcode LineLog.wait} looks at and how long it waits. */
export interface WaitOptions {
  timeoutMs?: number;
  /** Index of the first line that is looked at; default: all that came so far, too. */
  since?: number;
  /** Looks at the last line before it has ended, too: for prompts. */
  partial?: boolean;
}

/** The lines of one output stream. */
export class LineLog {
  readonly lines: Line[] = [];
  readonly done: Promise<void>;
  #name: string;
  #rest = "";
  #ended = false;
  #watchers: Set<() => void> = new Set();

  /** @param name whose output it is, for messages */
  constructor(name: string, stream: ReadableStream<Uint8Array>) {
    this.#name = name;
    this.done = this.#read(stream);
  }

  /** Everything that came, the unfinished last line included. */
  get text(): string {
    return [...this.lines.map((line) => line.text), this.#rest].join("\n");
  }

  async #read(stream: ReadableStream<Uint8Array>): Promise<void> {
    const decoder = new TextDecoder();
    for await (const chunk of stream) {
      const pieces = (this.#rest + decoder.decode(chunk, { stream: true })).split(/\r*\n/);
      this.#rest = pieces.pop()!;
      const atMs = performance.now();
      for (const text of pieces) this.lines.push({ text, atMs });
      this.#tell();
    }
    this.#ended = true;
    this.#tell();
  }

  #tell(): void {
    for (const watcher of [...this.#watchers]) watcher();
  }

  /** The lines of text that match, from `since` on. */
  matching(pattern: RegExp, since = 0): RegExpExecArray[] {
    return this.lines.slice(since).map((line) => pattern.exec(line.text)).filter((match) => match !== null);
  }

  /** Waits for a line that matches. @throws Error at the deadline or the stream's end, with its last lines */
  async wait(pattern: RegExp, options: WaitOptions = {}): Promise<RegExpExecArray> {
    const timeoutMs = options.timeoutMs ?? PATIENCE_MS;
    let at = options.since ?? 0;
    const { promise, resolve, reject } = Promise.withResolvers<RegExpExecArray>();
    const look = () => {
      for (; at < this.lines.length; at++) {
        const match = pattern.exec(this.lines[at]!.text);
        if (match !== null) return resolve(match);
      }
      const match = options.partial === true || this.#ended ? pattern.exec(this.#rest) : null;
      if (match !== null) return resolve(match);
      if (this.#ended) reject(new Error(`${this.#name} ended without ${pattern}; it wrote:\n${this.tail()}`));
    };
    const timer = setTimeout(
      () => reject(new Error(`${this.#name} wrote nothing like ${pattern} within ${timeoutMs} ms; it wrote:\n${this.tail()}`)),
      timeoutMs,
    );
    this.#watchers.add(look);
    try {
      look();
      return await promise;
    } finally {
      this.#watchers.delete(look);
      clearTimeout(timer);
    }
  }

  /** The last `count` lines. */
  tail(count = 30): string {
    return this.text.split("\n").slice(-count).join("\n");
  }
}

/** How to start a child. */
export interface ProcessOptions {
  args?: string[];
  env?: Record<string, string>;
  cwd?: string;
  /** For messages; default: the command. */
  name?: string;
}

/** A running child process. Disposing it kills it and waits for its end. */
export class Process implements AsyncDisposable {
  readonly pid: number;
  readonly stdout: LineLog;
  readonly stderr: LineLog;
  readonly status: Promise<Deno.CommandStatus>;
  readonly name: string;
  readonly #stdin: WritableStreamDefaultWriter<Uint8Array>;
  #ended = false;

  constructor(command: string, options: ProcessOptions = {}) {
    const { args = [], env = {}, cwd } = options;
    this.name = options.name ?? command;
    const child = new Deno.Command(command, {
      args,
      env,
      ...(cwd === undefined ? {} : { cwd }),
      stdin: "piped",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    this.pid = child.pid;
    this.stdout = new LineLog(this.name, child.stdout);
    this.stderr = new LineLog(`${this.name} (stderr)`, child.stderr);
    this.#stdin = child.stdin.getWriter();
    this.#stdin.closed.catch(() => {});
    this.status = child.status.then((status) => {
      this.#ended = true;
      return status;
    });
  }

  /** Whether the process has ended. */
  get ended(): boolean {
    return this.#ended;
  }

  /** Writes to its standard input. */
  async write(text: string): Promise<void> {
    await this.#stdin.write(new TextEncoder().encode(text));
  }

  /** Sends a signal unless it has ended. */
  kill(signal: Deno.Signal = "SIGKILL"): void {
    if (this.#ended) return;
    try {
      Deno.kill(this.pid, signal);
    } catch { /* it ended meanwhile */ }
  }

  /** Waits for its end. @throws Error unless it ended with `code` */
  async expectExit(code = 0, timeoutMs: number = PATIENCE_MS): Promise<void> {
    let timer: ReturnType<typeof setTimeout> | undefined;
    const late = new Promise<never>((_, reject) => {
      timer = setTimeout(() => reject(new Error(`${this.name} did not end within ${timeoutMs} ms`)), timeoutMs);
    });
    try {
      const status = await Promise.race([this.status, late]);
      if (status.code === code) return;
      throw new Error(
        `${this.name} ended with ${status.signal ?? status.code} instead of ${code}:\n${this.stdout.tail()}\n${this.stderr.tail()}`,
      );
    } finally {
      clearTimeout(timer);
    }
  }

  /** Kills it and waits until it is gone and its output is read. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.kill();
    await this.status;
    await Promise.all([this.stdout.done, this.stderr.done, this.#stdin.close().catch(() => {})]);
  }
}
