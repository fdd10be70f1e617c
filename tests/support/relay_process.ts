/**
 * Relays as their users run them: `svq relay run` in a process of its own.
 *
 * @module
 */
import { selfCommand } from "../../src/cli/self_command.ts";
import { ControlClient } from "../../src/relay/control.ts";
import type { TracedMessage } from "../../src/relay/message_log.ts";
import type { RelayMode } from "../../src/relay/relay.ts";
import type { UpgradeReport } from "../../src/relay/upgrade.ts";
import type { RelayStatus } from "../../src/relay/status.ts";
import { Process } from "./process.ts";
import { waitUntil } from "./wait.ts";

/** What a relay is started with. */
export interface RelayProcessOptions {
  /** Folder for its sockets and log. */
  folder: string;
  /** Default `relay`. */
  name?: string;
  /** Device address. */
  device: string;
  /** Where the VMM is met, when the relay is to connect to it; default: it listens. */
  connect?: string;
  /** More words for `svq relay run`. */
  args?: string[];
  /** Words that go before the program's, e.g. of nsenter. */
  within?: string[];
}

const PROGRAM = selfCommand();

/** A running relay; disposing it kills it if it has not ended. */
export class RelayProcess implements AsyncDisposable {
  /** Where VMMs connect. */
  readonly front: string;
  #successor: number | undefined;

  private constructor(readonly process: Process, readonly name: string, readonly folder: string) {
    this.front = `${folder}/${name}.front`;
  }

  /** Starts a relay and waits until it is ready. */
  static async start(options: RelayProcessOptions): Promise<RelayProcess> {
    const name = options.name ?? "relay";
    const [program, ...words] = [...(options.within ?? []), ...PROGRAM];
    const process = new Process(program!, {
      name: `svq relay ${name}`,
      env: { SVQ_RUNTIME_DIR: options.folder, NO_COLOR: "1" },
      args: [
        ...words,
        ...["relay", "run", "--name", name],
        ...["--front", options.connect === undefined ? `unix:${options.folder}/${name}.front` : `connect:${options.connect}`],
        ...["--device", options.device, ...(options.args ?? [])],
      ],
    });
    const relay = new RelayProcess(process, name, options.folder);
    try {
      await process.stderr.wait(/: ready$/);
      return relay;
    } catch (error) {
      await process[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Calls a method of the control socket. */
  async call<T>(method: string, params: Record<string, unknown> = {}): Promise<T> {
    using client = ControlClient.connect(this.name, `${this.folder}/${this.name}.sock`);
    return await client.call(method, params) as T;
  }

  /** The document `svq.relay/1`. */
  status(): Promise<RelayStatus> {
    return this.call("status");
  }

  /** Changes the mode and waits until every queue is in it. */
  setMode(mode: RelayMode): Promise<RelayStatus> {
    return this.call("set", { mode });
  }

  /** The vhost-user messages that the relay has seen so far. */
  async messages(after = 0): Promise<TracedMessage[]> {
    return (await this.call<{ messages: TracedMessage[] }>("messages", { after })).messages;
  }

  /** Waits until the status satisfies a condition. */
  async waitStatus(what: string, condition: (status: RelayStatus) => boolean, timeoutMs?: number): Promise<RelayStatus> {
    return await waitUntil(`relay ${this.name}: ${what}`, async () => {
      const status = await this.status();
      return condition(status) ? status : undefined;
    }, timeoutMs);
  }

  /**
   * Hands the relay over to another process.
   *
   * @param program the new version and its first words; default: this one
   */
  async upgrade(program: string[] = PROGRAM, more: Record<string, unknown> = {}): Promise<UpgradeReport> {
    const report = await this.call<UpgradeReport>("upgrade", { program, ...more });
    this.#successor = report.pid;
    return report;
  }

  /** Ends the relay as an operator does. @throws Error unless it ends with exit code 0 */
  async stop(): Promise<void> {
    this.process.kill("SIGTERM");
    await this.process.expectExit(0);
  }

  /** Kills it, and what it was upgraded to. */
  async [Symbol.asyncDispose](): Promise<void> {
    try {
      if (this.#successor !== undefined) Deno.kill(this.#successor, "SIGKILL");
    } catch { /* it has ended */ }
    await this.process[Symbol.asyncDispose]();
  }
}
