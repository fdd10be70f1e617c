/**
 * Stands between a VMM and a relay and gives the relay a dirty log of its own, from which bits are carried over into the VMM's:
 * all of them, or only some, to see whether tests find a log that forgets pages.
 *
 * @module
 */
import { createMemfd, mapFd, type Mapping } from "../../src/ffi/mapping.ts";
import { HideLogProxy, type ProxyMessage, REQUEST } from "./hide_log_proxy.ts";

const HEADER_SIZE = 12;
const CARRY_INTERVAL_MS = 5;

/** The proxy. */
export class LogFilter implements AsyncDisposable {
  /** Bits carried over. */
  carried = 0;
  /** Bits lost. */
  dropped = 0;
  readonly #proxy: HideLogProxy;
  readonly #keeps: (page: number) => boolean;
  readonly #timer: ReturnType<typeof setInterval>;
  #relayLog: Mapping | undefined;
  #vmmLog: Mapping | undefined;

  /**
   * @param socket where the VMM connects
   * @param relay where the relay listens
   * @param keeps which pages' bits reach the VMM
   */
  constructor(socket: string, relay: string, keeps: (page: number) => boolean) {
    this.#keeps = keeps;
    this.#proxy = new HideLogProxy(socket, relay, {
      hideFeatures: 0n,
      hideProtocolFeatures: 0n,
      onMessage: (message, from) => {
        // Before any answer, so that the last bits are there when the VMM has the ring back.
        if (from === "backend") this.#carry();
        else this.#exchangeLog(message);
      },
    });
    this.#timer = setInterval(() => this.#carry(), CARRY_INTERVAL_MS);
  }

  #exchangeLog(message: ProxyMessage): void {
    const view = new DataView(message.bytes.buffer);
    if (view.getUint32(0, true) !== REQUEST.SET_LOG_BASE) return;
    const size = Number(view.getBigUint64(HEADER_SIZE, true));
    const offset = Number(view.getBigUint64(HEADER_SIZE + 8, true));
    this.#carry();
    this.#close();
    const [theirs] = message.fds;
    this.#vmmLog = mapFd(theirs!.fd, { offset, length: size, what: "the VMM's log" });
    const own = createMemfd("test-log", offset + size);
    this.#relayLog = mapFd(own.fd, { offset, length: size, what: "the relay's log" });
    theirs!.close();
    message.fds = [own];
  }

  #carry(): void {
    if (this.#relayLog === undefined) return;
    const from = new Int32Array(this.#relayLog.buffer());
    const to = new Int32Array(this.#vmmLog!.buffer());
    for (let word = 0; word < from.length; word++) {
      if (Atomics.load(from, word) === 0) continue;
      let bits = Atomics.exchange(from, word, 0);
      for (let bit = 0; bit < 32; bit++) {
        if ((bits & 1 << bit) === 0) continue;
        if (this.#keeps(word * 32 + bit)) this.carried++;
        else {
          bits &= ~(1 << bit);
          this.dropped++;
        }
      }
      if (bits !== 0) Atomics.or(to, word, bits);
    }
  }

  #close(): void {
    this.#relayLog?.close();
    this.#vmmLog?.close();
    this.#relayLog = this.#vmmLog = undefined;
  }

  /** Ends all connections. */
  async [Symbol.asyncDispose](): Promise<void> {
    clearInterval(this.#timer);
    await this.#proxy[Symbol.asyncDispose]();
    this.#close();
  }
}
