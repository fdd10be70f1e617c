/**
 * The control channel: JSON-RPC 2.0 over a unix socket, one document a line.
 *
 * @module
 */
import { type ErrorRecord, EXIT, fromErrorRecord, SvqError, toErrorRecord } from "../errors.ts";
import {
  connectUnix,
  effectiveUid,
  ERRNO,
  listenUnix,
  ReactorCancelled,
  SysError,
  type UnixListener,
  type UnixStream,
} from "../ffi/mod.ts";

/** Longest line accepted from a peer, bytes. */
const MAX_LINE = 1 << 20;
/** Connections served at the same time. */
const MAX_CLIENTS = 64;
/** Longest answer, bytes: a dump of many large rings. */
const MAX_ANSWER = 256 << 20;

/** Bytes read at a time, at first and at most. */
const LEAST_BUFFER = 4096, MOST_BUFFER = 65536;

// JSON-RPC's own numbers.
const PARSE_ERROR = -32700;
const INVALID_REQUEST = -32600;
const METHOD_NOT_FOUND = -32601;
const SERVER_ERROR = -32000;

/** A method: gets the request's params, returns what becomes `result`. */
export type ControlMethod = (params: Record<string, unknown>) => unknown;

class Lines {
  readonly #stream: UnixStream;
  readonly #limit: number;
  #buffer = new Uint8Array(LEAST_BUFFER);
  #pending: Uint8Array<ArrayBuffer>[] = [];
  #length = 0;

  constructor(stream: UnixStream, limit: number) {
    this.#stream = stream;
    this.#limit = limit;
  }

  /** The next line without its end; undefined at the end of the stream. */
  async next(): Promise<string | undefined> {
    for (;;) {
      const last = this.#pending.at(-1);
      const end = last?.indexOf(10) ?? -1;
      if (last !== undefined && end >= 0) {
        const parts = [...this.#pending.slice(0, -1), last.subarray(0, end)];
        const rest = last.subarray(end + 1);
        this.#pending = rest.length > 0 ? [rest] : [];
        this.#length = rest.length;
        const line = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
        let at = 0;
        for (const part of parts) {
          line.set(part, at);
          at += part.length;
        }
        return new TextDecoder().decode(line);
      }
      if (this.#length > this.#limit) throw new SvqError("CONTROL_LINE_TOO_LONG", `A control message is longer than ${this.#limit} bytes`);
      const { bytes, fds } = await this.#stream.receive(this.#buffer);
      for (const fd of fds) fd.close();
      if (bytes === 0) return undefined;
      this.#pending.push(this.#buffer.slice(0, bytes));
      this.#length += bytes;
      // What fills the buffer is long: more at a time. Most connections ask for a status, and `relay list` opens hundreds.
      if (bytes === this.#buffer.length && bytes < MOST_BUFFER) this.#buffer = new Uint8Array(bytes * 4);
    }
  }
}

function encode(document: unknown): Uint8Array<ArrayBuffer> {
  return new TextEncoder().encode(JSON.stringify(document) + "\n");
}

/** Serves control methods until closed. Only the same user and root may connect. */
export class ControlServer implements Disposable {
  readonly #listener: UnixListener;
  readonly #methods: Record<string, ControlMethod>;
  readonly #clients = new Set<UnixStream>();
  readonly #answers = new Set<Promise<void>>();

  /** Listens. @param listener listens already, and is owned @throws SysError EADDRINUSE when a relay of that name runs */
  constructor(readonly path: string, methods: Record<string, ControlMethod>, listener?: UnixListener) {
    this.#listener = listener ?? listenUnix(path, { mode: 0o600 });
    this.#methods = methods;
    this.#accept();
  }

  async #accept(): Promise<void> {
    for (;;) {
      let stream: UnixStream;
      try {
        stream = await this.#listener.accept();
      } catch (error) {
        if (this.#listener.closed || error instanceof ReactorCancelled) return;
        // Out of descriptors: try again when some are free.
        await new Promise((resolve) => setTimeout(resolve, 100));
        continue;
      }
      const { uid } = stream.peerCredentials();
      if ((uid !== 0 && uid !== effectiveUid()) || this.#clients.size >= MAX_CLIENTS) {
        stream.close();
        continue;
      }
      this.#clients.add(stream);
      this.#serve(stream).catch(() => {}).finally(() => {
        this.#clients.delete(stream);
        stream.close();
      });
    }
  }

  async #serve(stream: UnixStream): Promise<void> {
    const lines = new Lines(stream, MAX_LINE);
    for (let line = await lines.next(); line !== undefined; line = await lines.next()) {
      if (line.trim() === "") continue;
      const answered = this.#answer(line).then((answer) => stream.send(encode(answer)));
      this.#answers.add(answered);
      await answered.finally(() => this.#answers.delete(answered));
    }
  }

  async #answer(line: string): Promise<unknown> {
    let id: unknown = null;
    const failure = (code: number, error: ErrorRecord) => ({ jsonrpc: "2.0", id, error: { code, message: error.message, data: error } });
    let request: Record<string, unknown>;
    try {
      request = JSON.parse(line);
    } catch (error) {
      return failure(PARSE_ERROR, { code: "CONTROL_PARSE", message: `Not JSON: ${error instanceof Error ? error.message : error}` });
    }
    if (typeof request !== "object" || request === null || Array.isArray(request) || typeof request.method !== "string") {
      return failure(INVALID_REQUEST, { code: "CONTROL_REQUEST", message: "Not a JSON-RPC 2.0 request" });
    }
    const named = request.id ?? null;
    // What comes back in the answer: a list a million deep would be more than JSON.stringify can do.
    if (typeof named === "object" && named !== null) {
      return failure(INVALID_REQUEST, { code: "CONTROL_REQUEST", message: "id is neither a string nor a number" });
    }
    id = named;
    const params = request.params ?? {};
    const method = Object.hasOwn(this.#methods, request.method) ? this.#methods[request.method] : undefined;
    if (method === undefined) {
      return failure(METHOD_NOT_FOUND, { code: "CONTROL_METHOD", message: `No method "${request.method}"` });
    }
    if (typeof params !== "object" || Array.isArray(params)) {
      return failure(INVALID_REQUEST, { code: "CONTROL_REQUEST", message: "params is not an object" });
    }
    try {
      return { jsonrpc: "2.0", id, result: await method(params as Record<string, unknown>) ?? null };
    } catch (error) {
      return failure(SERVER_ERROR, toErrorRecord(error));
    }
  }

  /** The listening socket, for another process. */
  get fd(): number {
    return this.#listener.fd;
  }

  /** Another process serves the socket from now on. What was asked already is answered here: resolves when that is done. */
  async retire(): Promise<void> {
    this.#listener.keepPath();
    this.#listener.close();
    await Promise.allSettled([...this.#answers]);
  }

  /** Closes all connections and removes the socket. */
  close(): void {
    this.#listener.close();
    for (const stream of this.#clients) stream.close();
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}

/** One connection to a relay's control socket. */
export class ControlClient implements Disposable {
  readonly #stream: UnixStream;
  readonly #lines: Lines;
  #nextId = 1;

  private constructor(stream: UnixStream) {
    this.#stream = stream;
    this.#lines = new Lines(stream, MAX_ANSWER);
  }

  /** Connects to the relay `name`. @throws SvqError NO_SUCH_RELAY (exit code 3) when nobody listens there */
  static connect(name: string, path: string): ControlClient {
    try {
      return new ControlClient(connectUnix(path));
    } catch (cause) {
      if (!(cause instanceof SysError) || (cause.errno !== ERRNO.ENOENT && cause.errno !== ERRNO.ECONNREFUSED)) throw cause;
      throw new SvqError("NO_SUCH_RELAY", `No relay "${name}" runs`, {
        exitCode: EXIT.noDevice,
        hint: "svq relay list shows the running ones; SVQ_RUNTIME_DIR says where they are looked for",
        cause,
      });
    }
  }

  /** Calls a method and waits for its answer. @throws the relay's error, or SvqError CONTROL_CLOSED */
  async call(method: string, params: Record<string, unknown> = {}): Promise<unknown> {
    const id = this.#nextId++;
    await this.#stream.send(encode({ jsonrpc: "2.0", id, method, params }));
    const line = await this.#lines.next();
    if (line === undefined) throw new SvqError("CONTROL_CLOSED", "The relay closed the control connection", { exitCode: EXIT.noDevice });
    const answer = JSON.parse(line) as { result?: unknown; error?: { message: string; data?: ErrorRecord } };
    if (answer.error !== undefined) throw fromErrorRecord(answer.error.data ?? { code: "CONTROL_ERROR", message: answer.error.message });
    return answer.result;
  }

  /** Closes the connection. */
  close(): void {
    this.#stream.close();
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}
