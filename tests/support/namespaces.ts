/**
 * Two hosts as network namespaces that a pair of virtual cards joins, and a process in each that has a guest or waits for one.
 *
 * @module
 */
import type { HostCommand } from "./host_process.ts";

async function ip(...args: string[]): Promise<void> {
  const { success, stderr } = await new Deno.Command("ip", { args }).output();
  if (!success) throw new Error(`ip ${args.join(" ")}: ${new TextDecoder().decode(stderr)}`);
}

/** Why namespaces cannot be made here; undefined where they can. */
export async function namespacesMissing(): Promise<string | undefined> {
  const name = `svq-probe-${Deno.pid}`;
  try {
    await ip("netns", "add", name);
    await ip("netns", "del", name);
    return undefined;
  } catch (error) {
    return `network namespaces (${(error as Error).message.split("\n")[0]!.slice(0, 120)})`;
  }
}

let count = 0;

/** A pair of namespaces. */
export class Namespaces implements AsyncDisposable {
  private constructor(
    /** Their names. */
    readonly names: readonly [string, string],
    /** Their addresses. */
    readonly addresses: readonly [string, string],
  ) {}

  /** Makes both, and joins them. */
  static async create(): Promise<Namespaces> {
    const number = `${Deno.pid}-${count++}`;
    const [a, b] = [`svq-a-${number}`, `svq-b-${number}`];
    const pair = new Namespaces([a, b], ["192.0.2.1", "192.0.2.2"]);
    try {
      for (const name of pair.names) await ip("netns", "add", name);
      await ip("link", "add", "svq0", "netns", a, "type", "veth", "peer", "name", "svq0", "netns", b);
      for (const [i, name] of pair.names.entries()) {
        await ip("-n", name, "address", "add", `${pair.addresses[i]}/24`, "dev", "svq0");
        for (const card of ["lo", "svq0"]) await ip("-n", name, "link", "set", card, "up");
      }
      return pair;
    } catch (error) {
      await pair[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** The words that run a program in one of them. */
  within(index: 0 | 1): string[] {
    return ["ip", "netns", "exec", this.names[index]];
  }

  /** Removes both; what runs in them must have ended. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const name of this.names) await ip("netns", "del", name).catch(() => {});
  }
}

/** A process in a namespace; see host_process.ts. */
export class HostProcess implements AsyncDisposable {
  readonly #child: Deno.ChildProcess;
  readonly #writer: WritableStreamDefaultWriter<Uint8Array<ArrayBuffer>>;
  readonly #answers: AsyncIterableIterator<string>;

  /** Starts it in namespace `index`. */
  constructor(namespaces: Namespaces, index: 0 | 1) {
    const program = new URL("./host_process.ts", import.meta.url).pathname;
    const [command, ...before] = namespaces.within(index);
    this.#child = new Deno.Command(command!, {
      args: [...before, Deno.execPath(), "run", "-A", "--quiet", "--no-check", program],
      stdin: "piped",
      stdout: "piped",
      stderr: "inherit",
    }).spawn();
    this.#writer = this.#child.stdin.getWriter();
    this.#answers = lines(this.#child.stdout);
  }

  /** Tells it something, and waits for the answer. @throws Error with its own */
  async tell<T>(command: HostCommand): Promise<T> {
    await this.#writer.write(new TextEncoder().encode(JSON.stringify(command) + "\n"));
    const { value, done } = await this.#answers.next();
    if (done) throw new Error(`The host ended when it was told to ${command.do}`);
    const answer = JSON.parse(value) as { value: T } | { failed: string };
    if ("failed" in answer) throw new Error(answer.failed);
    return answer.value;
  }

  /** Ends it: at the end of its input, or by force when it is busy with something. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#writer.close().catch(() => {});
    const timer = setTimeout(() => this.#child.kill("SIGKILL"), 10_000);
    await this.#child.status;
    clearTimeout(timer);
    await this.#answers.return?.().catch(() => {});
  }
}

async function* lines(stream: ReadableStream<Uint8Array<ArrayBuffer>>): AsyncIterableIterator<string> {
  let text = "";
  for await (const chunk of stream.pipeThrough(new TextDecoderStream())) {
    text += chunk;
    for (let end = text.indexOf("\n"); end >= 0; end = text.indexOf("\n")) {
      yield text.slice(0, end);
      text = text.slice(end + 1);
    }
  }
}
