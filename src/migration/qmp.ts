/**
 * A client of QEMU's machine protocol (QMP): JSON lines over a unix socket. Source: QEMU docs/interop/qmp-spec.rst.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";

/** Lines above this many characters end the connection: no QMP answer comes near it. */
const MAX_LINE = 32 * 1024 * 1024;
/** Events kept for {@linkcode QmpClient.waitEvent} with `since`. */
const MAX_EVENTS = 4096;
const DEFAULT_TIMEOUT_MS = 30_000;

/** An error that QEMU itself answered; `code` is `QMP_ERROR` and the message is QEMU's text. */
export class QmpError extends SvqError {
  /** `QmpError`. */
  override readonly name: string = "QmpError";
  /** The command that was refused. */
  readonly command: string;
  /** QEMU's class of the error, mostly `GenericError` or `CommandNotFound`. */
  readonly errorClass: string;

  /** Made by {@linkcode QmpClient.execute}. */
  constructor(command: string, errorClass: string, description: string) {
    super("QMP_ERROR", description);
    this.command = command;
    this.errorClass = errorClass;
  }
}

/** An event that QEMU sent. */
export interface QmpEvent {
  /** Its place among the events of this connection, from 0. */
  index: number;
  /** Its name, e.g. `MIGRATION`. */
  name: string;
  /** What came with it, empty where nothing did. */
  data: Record<string, unknown>;
  /** QEMU's clock in microseconds since 1970. */
  timeUs: number;
}

/** What QEMU says about itself when a client connects. */
export interface QmpGreeting {
  /** E.g. `10.0.2`. */
  version: string;
  /** E.g. `oob`. */
  capabilities: string[];
}

/** Which event {@linkcode QmpClient.waitEvent} waits for. */
export interface WaitEventOptions {
  /** Takes the event or waits for the next one. */
  predicate?: (event: QmpEvent) => boolean;
  /** Default 30 s. */
  timeoutMs?: number;
  /** Looks at events from this {@linkcode QmpClient.eventCount} on; default: only those that come after the call. */
  since?: number;
}

interface Pending {
  command: string;
  resolve: (value: unknown) => void;
  reject: (error: unknown) => void;
}

interface Waiter {
  name: string;
  predicate: (event: QmpEvent) => boolean;
  resolve: (event: QmpEvent) => void;
  reject: (error: unknown) => void;
}

type Message = Record<string, unknown>;

function isRecord(value: unknown): value is Message {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Rejects when `promise` takes longer than `timeoutMs`; the timer never outlives it. */
async function within<T>(promise: Promise<T>, timeoutMs: number, late: () => SvqError): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const timeout = new Promise<never>((_, reject) => timer = setTimeout(() => reject(late()), timeoutMs));
  try {
    return await Promise.race([promise, timeout]);
  } finally {
    clearTimeout(timer);
  }
}

/** A connection to one QEMU's monitor, past the handshake. */
export class QmpClient implements AsyncDisposable {
  readonly #connection: Deno.UnixConn;
  readonly #path: string;
  readonly #pending: Map<number, Pending> = new Map();
  readonly #waiters: Set<Waiter> = new Set();
  readonly #listeners: Set<(event: QmpEvent) => void> = new Set();
  #events: QmpEvent[] = [];
  #eventCount = 0;
  #nextId = 1;
  #ended: SvqError | undefined;
  #sending: Promise<unknown> = Promise.resolve();
  #reading: Promise<void>;
  #greeted: PromiseWithResolvers<QmpGreeting> = Promise.withResolvers();
  #greeting: QmpGreeting | undefined;

  private constructor(connection: Deno.UnixConn, path: string) {
    this.#connection = connection;
    this.#path = path;
    this.#greeted.promise.catch(() => {});
    this.#reading = this.#read();
  }

  /**
   * Connects and does the handshake.
   *
   * @param path the monitor's socket (`-qmp unix:PATH,server=on,wait=off`)
   * @throws SvqError QMP_UNREACHABLE (nobody listens), QMP_TIMEOUT (no greeting), QMP_PROTOCOL (something else listens)
   */
  static async connect(path: string, options: { timeoutMs?: number } = {}): Promise<QmpClient> {
    const timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS;
    let connection: Deno.UnixConn;
    try {
      connection = await Deno.connect({ transport: "unix", path });
    } catch (cause) {
      throw new SvqError("QMP_UNREACHABLE", `No QEMU monitor answers at ${path}: ${cause instanceof Error ? cause.message : cause}`, {
        exitCode: EXIT.noDevice,
        hint: "Start QEMU with -qmp unix:PATH,server=on,wait=off and give that path",
        cause,
      });
    }
    const client = new QmpClient(connection, path);
    try {
      client.#greeting = await within(
        client.#greeted.promise,
        timeoutMs,
        () =>
          new SvqError("QMP_TIMEOUT", `${path} accepted the connection but sent no QMP greeting within ${timeoutMs} ms`, {
            exitCode: EXIT.timeout,
            hint: "A monitor serves one client at a time: close the other one, or give QEMU a second -qmp",
          }),
      );
      await client.execute("qmp_capabilities", undefined, { timeoutMs });
      return client;
    } catch (error) {
      await client.close();
      throw error;
    }
  }

  /** What QEMU said about itself. */
  get greeting(): QmpGreeting {
    return this.#greeting!;
  }

  /** How many events have come so far. */
  get eventCount(): number {
    return this.#eventCount;
  }

  /** Whether the connection has ended. */
  get closed(): boolean {
    return this.#ended !== undefined;
  }

  /**
   * Runs a command.
   *
   * @returns what QEMU returned; its shape is the caller's to check
   * @throws QmpError when QEMU refuses it
   * @throws SvqError QMP_CLOSED, QMP_TIMEOUT
   */
  async execute<T = unknown>(command: string, args?: Record<string, unknown>, options: { timeoutMs?: number } = {}): Promise<T> {
    if (this.#ended !== undefined) throw this.#ended;
    const id = this.#nextId++;
    const timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS;
    const answer = new Promise<unknown>((resolve, reject) => this.#pending.set(id, { command, resolve, reject }));
    answer.catch(() => {});
    try {
      this.#send(JSON.stringify({ execute: command, ...(args === undefined ? {} : { arguments: args }), id }));
      return await within(
        answer,
        timeoutMs,
        () =>
          new SvqError("QMP_TIMEOUT", `QEMU at ${this.#path} did not answer ${command} within ${timeoutMs} ms`, {
            exitCode: EXIT.timeout,
          }),
      ) as T;
    } finally {
      this.#pending.delete(id);
    }
  }

  /** Calls `listener` at each event until the returned function is called. */
  onEvent(listener: (event: QmpEvent) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /**
   * Waits for an event.
   *
   * @throws SvqError QMP_TIMEOUT, QMP_CLOSED
   */
  async waitEvent(name: string, options: WaitEventOptions = {}): Promise<QmpEvent> {
    const predicate = options.predicate ?? (() => true);
    const since = options.since ?? this.#eventCount;
    const past = this.#events.find((event) => event.index >= since && event.name === name && predicate(event));
    if (past !== undefined) return past;
    if (this.#ended !== undefined) throw this.#ended;
    const timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS;
    const { promise, resolve, reject } = Promise.withResolvers<QmpEvent>();
    promise.catch(() => {});
    const waiter: Waiter = { name, predicate, resolve, reject };
    this.#waiters.add(waiter);
    try {
      return await within(
        promise,
        timeoutMs,
        () =>
          new SvqError("QMP_TIMEOUT", `QEMU at ${this.#path} sent no matching ${name} event within ${timeoutMs} ms`, {
            exitCode: EXIT.timeout,
          }),
      );
    } finally {
      this.#waiters.delete(waiter);
    }
  }

  /** Ends the connection; commands that wait are rejected with QMP_CLOSED. */
  async close(): Promise<void> {
    this.#end(new SvqError("QMP_CLOSED", `The connection to QEMU at ${this.#path} is closed`));
    await this.#reading;
  }

  /** Same as {@linkcode QmpClient.close}. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  #send(line: string): void {
    let rest = new TextEncoder().encode(line + "\r\n");
    this.#sending = this.#sending.then(async () => {
      while (rest.length > 0) rest = rest.subarray(await this.#connection.write(rest));
    }).catch((cause) => this.#end(this.#lost(cause)));
  }

  #lost(cause?: unknown): SvqError {
    return new SvqError("QMP_CLOSED", `QEMU at ${this.#path} ended the connection`, { cause });
  }

  async #read(): Promise<void> {
    const decoder = new TextDecoder();
    const chunk = new Uint8Array(65536);
    let text = "";
    try {
      for (;;) {
        const count = await this.#connection.read(chunk);
        if (count === null) break;
        text += decoder.decode(chunk.subarray(0, count), { stream: true });
        let at = 0;
        for (let end = text.indexOf("\n"); end >= 0; end = text.indexOf("\n", at)) {
          const line = text.slice(at, end).trim();
          at = end + 1;
          if (line !== "") this.#take(line);
        }
        text = text.slice(at);
        if (text.length > MAX_LINE) throw this.#protocol(`a line is longer than ${MAX_LINE} characters`);
      }
      this.#end(this.#lost());
    } catch (error) {
      this.#end(error instanceof SvqError ? error : this.#lost(error));
    }
  }

  #protocol(what: string): SvqError {
    return new SvqError("QMP_PROTOCOL", `${this.#path} does not speak QMP: ${what}`, {
      hint: "The socket must be one of QEMU's -qmp, not -monitor, and not a device's",
    });
  }

  #take(line: string): void {
    let message: unknown;
    try {
      message = JSON.parse(line);
    } catch {
      throw this.#protocol("a line is no JSON");
    }
    if (!isRecord(message)) throw this.#protocol("a line is no object");
    if (isRecord(message.QMP)) this.#takeGreeting(message.QMP);
    else if (typeof message.event === "string") this.#takeEvent(message, message.event);
    else if ("return" in message || isRecord(message.error)) this.#takeAnswer(message);
    else throw this.#protocol("a message is neither greeting, event nor answer");
  }

  #takeGreeting(greeting: Message): void {
    const version = isRecord(greeting.version) && isRecord(greeting.version.qemu) ? greeting.version.qemu : {};
    const capabilities = Array.isArray(greeting.capabilities) ? greeting.capabilities.map(String) : [];
    this.#greeted.resolve({ version: `${version.major ?? "?"}.${version.minor ?? "?"}.${version.micro ?? "?"}`, capabilities });
  }

  #takeEvent(message: Message, name: string): void {
    const time = isRecord(message.timestamp) ? message.timestamp : {};
    const event: QmpEvent = {
      index: this.#eventCount++,
      name,
      data: isRecord(message.data) ? message.data : {},
      timeUs: Number(time.seconds ?? 0) * 1e6 + Number(time.microseconds ?? 0),
    };
    this.#events.push(event);
    if (this.#events.length > MAX_EVENTS) this.#events = this.#events.slice(MAX_EVENTS / 2);
    for (const waiter of this.#waiters) {
      if (waiter.name !== name || !waiter.predicate(event)) continue;
      this.#waiters.delete(waiter);
      waiter.resolve(event);
    }
    for (const listener of this.#listeners) listener(event);
  }

  #takeAnswer(message: Message): void {
    // An answer to nobody belongs to a command that was given up.
    const pending = typeof message.id === "number" ? this.#pending.get(message.id) : undefined;
    if (pending === undefined) return;
    if (isRecord(message.error)) {
      pending.reject(new QmpError(pending.command, String(message.error.class ?? "GenericError"), String(message.error.desc ?? "")));
    } else {
      pending.resolve(message.return);
    }
  }

  #end(error: SvqError): void {
    if (this.#ended !== undefined) return;
    this.#ended = error;
    this.#greeted.reject(error);
    for (const { reject } of this.#pending.values()) reject(error);
    this.#pending.clear();
    for (const { reject } of this.#waiters) reject(error);
    this.#waiters.clear();
    this.#connection.close();
  }
}
