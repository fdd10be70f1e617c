/**
 * A QMP monitor that answers as a test wants.
 *
 * @module
 */

const GREETING = { QMP: { version: { qemu: { major: 10, minor: 0, micro: 2 } }, capabilities: ["oob"] } };

/** Answers a command: `{ return }` or `{ error }`; undefined: not at all. */
export type Answer = (command: string, args: unknown, send: (message: unknown) => Promise<void>) => Promise<unknown>;

/** A monitor that answers as told. */
export class FakeMonitor implements AsyncDisposable {
  readonly #listener: Deno.UnixListener;
  readonly #answer: Answer;
  readonly #serving: Promise<void>;
  readonly #greeting: string;
  #connection: Deno.UnixConn | undefined;

  constructor(path: string, answer: Answer, greeting: string = JSON.stringify(GREETING)) {
    this.#listener = Deno.listen({ transport: "unix", path });
    this.#answer = answer;
    this.#greeting = greeting;
    this.#serving = this.#serve().catch(() => {});
  }

  async #serve(): Promise<void> {
    const connection = this.#connection = await this.#listener.accept();
    // One byte at a time, so that the client meets lines and UTF-8 letters in pieces.
    const write = async (text: string) => {
      for (const byte of new TextEncoder().encode(text)) await connection.write(Uint8Array.of(byte));
    };
    const send = (message: unknown) => write(JSON.stringify(message) + "\r\n");
    if (this.#greeting !== "") await write(this.#greeting + "\n");
    let text = "";
    for await (const chunk of connection.readable.pipeThrough(new TextDecoderStream())) {
      text += chunk;
      for (let end = text.indexOf("\n"); end >= 0; end = text.indexOf("\n")) {
        const { execute, arguments: args, id } = JSON.parse(text.slice(0, end));
        text = text.slice(end + 1);
        const answer = execute === "qmp_capabilities" ? { return: {} } : await this.#answer(execute, args, send);
        if (answer !== undefined) await send({ ...answer, id });
      }
    }
  }

  hangUp(): void {
    this.#connection?.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#listener.close();
    try {
      this.#connection?.close();
    } catch { /* closed already */ }
    await this.#serving;
  }
}
