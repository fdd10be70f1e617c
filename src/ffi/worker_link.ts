/**
 * Workers that block in epoll: commanded by a message plus an eventfd, answering every command with a message.
 *
 *     const link = new WorkerLink(new Worker(new URL("./worker.ts", import.meta.url), { type: "module" }));   // main thread
 *     await link.call("start", { … });
 *
 *     servePort(async (port) => {                                                                            // worker.ts
 *       epoll.add(port.controlFd, EPOLL.IN, 0);
 *       while (!closed) { …epoll.wait…; for (const command of await port.commands()) port.reply(command, …); }
 *     });
 *
 * The eventfd ends the blocking wait; only then does the Worker return to its event loop, where messages arrive.
 *
 * @module
 */
import { type ErrorRecord, fromErrorRecord, SvqError, toErrorRecord } from "../errors.ts";
import { createEventfd, drainEventfd, signalEventfd } from "./eventfd.ts";
import type { OwnedFd } from "./fd.ts";

/** A command as the Worker gets it. */
export interface WorkerCommand {
  /** Number of the command, for the reply. */
  id: number;
  /** What to do. */
  name: string;
  /** Its arguments: structured clone of what the caller gave. */
  // deno-lint-ignore no-explicit-any
  data: any;
}

type FromWorker = { died: ErrorRecord } | { reply: number; value?: unknown; error?: ErrorRecord } | { event: unknown };

interface Pending {
  resolve: (value: unknown) => void;
  reject: (error: unknown) => void;
}

/** The main thread's end of a commanded Worker. */
export class WorkerLink implements AsyncDisposable {
  readonly #worker: Worker;
  readonly #control: OwnedFd;
  readonly #pending = new Map<number, Pending>();
  #next = 0;
  #failure: Error | undefined;
  #closing: Promise<void> | undefined;
  /** Called with what the Worker reports by itself. */
  onEvent: ((event: unknown) => void) | undefined;
  /** Called once when the Worker dies. */
  onFailure: ((error: Error) => void) | undefined;

  /** Takes over a Worker whose module calls {@linkcode servePort}. */
  constructor(worker: Worker) {
    this.#worker = worker;
    try {
      this.#control = createEventfd();
    } catch (error) {
      worker.terminate();
      throw error;
    }
    worker.onmessage = (message: MessageEvent<FromWorker>) => this.#receive(message.data);
    worker.onerror = (event) => {
      event.preventDefault();
      this.#fail(new SvqError("WORKER_DIED", `A worker stopped with an error: ${event.message}`));
    };
    worker.postMessage({ control: this.#control.fd });
  }

  #receive(message: FromWorker): void {
    if ("died" in message) return this.#fail(fromErrorRecord(message.died));
    if ("event" in message) {
      this.onEvent?.(message.event);
      return;
    }
    const pending = this.#pending.get(message.reply);
    this.#pending.delete(message.reply);
    if (message.error === undefined) pending?.resolve(message.value);
    else pending?.reject(fromErrorRecord(message.error));
  }

  #fail(error: Error): void {
    if (this.#failure !== undefined) return;
    this.#failure = error;
    for (const pending of this.#pending.values()) pending.reject(error);
    this.#pending.clear();
    this.#worker.terminate();
    if (this.#closing === undefined) this.onFailure?.(error);
  }

  /** Has the Worker do something. @throws SvqError what the Worker failed with, or WORKER_DIED */
  call<Result = void>(name: string, data: unknown = undefined, transfer: Transferable[] = []): Promise<Result> {
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    const id = ++this.#next;
    return new Promise<Result>((resolve, reject) => {
      this.#pending.set(id, { resolve: resolve as (value: unknown) => void, reject });
      this.#worker.postMessage({ id, name, data }, transfer);
      signalEventfd(this.#control.fd);
    });
  }

  /** Sends the command `close`, which the Worker answers as its last, and ends it. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    if (this.#failure === undefined) await this.call("close").catch(() => {});
    this.#failure ??= new SvqError("CLOSED", "The worker is closed");
    this.#worker.terminate();
    this.#control.close();
  }

  /** The same as {@linkcode close}. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

interface WorkerScope {
  onmessage: ((message: MessageEvent) => void) | null;
  postMessage(message: unknown, transfer?: Transferable[]): void;
  close(): void;
}

/** The Worker's end. */
export class WorkerPort {
  readonly #scope: WorkerScope;
  readonly #queue: WorkerCommand[] = [];
  #arrived: (() => void) | undefined;

  /** Made by {@linkcode servePort}. */
  constructor(
    scope: WorkerScope,
    /** Readable when commands wait: register it for EPOLL.IN, level triggered. */
    readonly controlFd: number,
  ) {
    this.#scope = scope;
    scope.onmessage = (message) => {
      this.#queue.push(message.data as WorkerCommand);
      this.#arrived?.();
    };
  }

  /** To be called when {@linkcode controlFd} is readable: the commands that it stands for. */
  async commands(): Promise<WorkerCommand[]> {
    const count = drainEventfd(this.controlFd);
    while (this.#queue.length < count) await new Promise<void>((resolve) => this.#arrived = resolve);
    return this.#queue.splice(0, count);
  }

  /** Answers a command. */
  reply(command: WorkerCommand, value?: unknown, transfer: Transferable[] = []): void {
    this.#scope.postMessage({ reply: command.id, value }, transfer);
  }

  /** Answers a command with an error. */
  fail(command: WorkerCommand, error: unknown): void {
    this.#scope.postMessage({ reply: command.id, error: toErrorRecord(error) });
  }

  /** Reports something by itself. */
  emit(event: unknown): void {
    this.#scope.postMessage({ event });
  }
}

/** Runs `main` in a Worker once the main thread has made a {@linkcode WorkerLink} of it; the Worker ends when it returns. */
export function servePort(main: (port: WorkerPort) => Promise<void>): void {
  const scope = globalThis as unknown as WorkerScope;
  scope.onmessage = (message) => {
    const port = new WorkerPort(scope, (message.data as { control: number }).control);
    const ended = (error: unknown) => {
      // What the system refused is told by name; a fault of the code itself reaches the main thread's onerror, with its place.
      if (error instanceof SvqError) {
        scope.postMessage({ died: toErrorRecord(error) });
        return scope.close();
      }
      setTimeout(() => {
        throw error;
      });
    };
    try {
      main(port).then(() => scope.close(), ended);
    } catch (error) {
      ended(error);
    }
  };
}
