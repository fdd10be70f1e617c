/**
 * The main thread's handle of a relay Worker.
 *
 * @module
 */
import { type ErrorRecord, fromErrorRecord, SvqError } from "../errors.ts";
import { createEventfd, type OwnedFd, signalEventfd } from "../ffi/mod.ts";
import type {
  ControlEvent,
  CoreFallback,
  QueueFailure,
  QueueMiss,
  QueueProgress,
  WorkerCommand,
  WorkerInit,
  WorkerReply,
} from "./messages.ts";

interface Pending {
  resolve: (reply: WorkerReply) => void;
  reject: (error: unknown) => void;
}

/** Starts a Worker and talks to it: each command is an eventfd signal plus a message, and resolves with its answer. */
export class RelayWorker {
  readonly #worker: Worker;
  readonly #control: OwnedFd = createEventfd();
  readonly #posted = new SharedArrayBuffer(4);
  readonly #pending = new Map<number, Pending>();
  #nextId = 1;
  #dead: Error | undefined;

  /**
   * @param settings what the Worker is told first, besides what is made here
   * @param onFallback a queue runs on another core than it was meant to
   * @param onQueueFailure a queue of this Worker stopped itself
   * @param onMiss a queue of this Worker waits for an address of the guest's IOMMU
   * @param onDeath the Worker ended with an error: its queues are lost
   * @param onControl a command on a control queue was answered
   */
  constructor(
    settings: Omit<WorkerInit, "controlFd" | "posted">,
    onFallback: (index: number, reason: string) => void,
    onQueueFailure: (index: number, error: ErrorRecord) => void,
    onMiss: (index: number, iova: number, perm: number) => void,
    onDeath: (error: Error) => void,
    onControl: (event: ControlEvent) => void = () => {},
  ) {
    this.#worker = new Worker(new URL("./worker.ts", import.meta.url).href, { type: "module", name: "relay" });
    this.#worker.onmessage = (event: MessageEvent<WorkerReply | QueueFailure | QueueMiss | CoreFallback | ControlEvent>) => {
      if ("failed" in event.data) onQueueFailure(event.data.failed, event.data.error);
      else if ("fellBack" in event.data) onFallback(event.data.fellBack, event.data.reason);
      else if ("controlled" in event.data) onControl(event.data);
      else if ("missed" in event.data) onMiss(event.data.missed, event.data.iova, event.data.perm);
      else this.#settle(event.data);
    };
    this.#worker.onerror = (event) => {
      event.preventDefault();
      this.#dead = new SvqError("RELAY_WORKER_DIED", `A relay worker ended: ${event.message}`);
      for (const { reject } of this.#pending.values()) reject(this.#dead);
      this.#pending.clear();
      onDeath(this.#dead);
    };
    const init: WorkerInit = { controlFd: this.#control.fd, posted: this.#posted, ...settings };
    this.#worker.postMessage(init);
  }

  #settle(reply: WorkerReply): void {
    const pending = this.#pending.get(reply.id);
    this.#pending.delete(reply.id);
    if (reply.error !== undefined) pending?.reject(fromErrorRecord(reply.error));
    else pending?.resolve(reply);
  }

  /** Sends a command. @throws the Worker's error */
  send(command: WorkerCommand): Promise<WorkerReply> {
    if (this.#dead !== undefined) return Promise.reject(this.#dead);
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      this.#pending.set(id, { resolve, reject });
      this.#worker.postMessage({ id, command });
      // The count is what the Worker compares: a signal that it takes for two commands is no loss.
      Atomics.add(new Int32Array(this.#posted), 0, 1);
      signalEventfd(this.#control.fd);
    });
  }

  /** Like {@linkcode send}, for commands that answer with a queue's progress. */
  async progress(command: WorkerCommand): Promise<QueueProgress> {
    return (await this.send(command)).progress!;
  }

  /** Ends the Worker; its queues must be stopped. */
  async close(): Promise<void> {
    if (this.#dead === undefined) await this.send({ type: "exit" }).catch(() => {});
    this.#worker.terminate();
    this.#control.close();
  }
}
