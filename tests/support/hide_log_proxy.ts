/**
 * A vhost-user proxy that makes a back-end look like one without dirty logging: it clears LOG_ALL in the features and LOG_SHMFD
 * in the protocol features, passes everything else on with its file descriptors, and writes down what it passed.
 *
 * @module
 */
import { connectUnix, listenUnix, type UnixListener, type UnixStream } from "../../src/ffi/unix_socket.ts";
import type { OwnedFd } from "../../src/ffi/fd.ts";

const HEADER_SIZE = 12;
const FLAG_REPLY = 4;
const MAX_PAYLOAD = 1 << 20;

/** Requests that the tests name. */
export const REQUEST = {
  GET_FEATURES: 1,
  SET_FEATURES: 2,
  SET_LOG_BASE: 6,
  SET_LOG_FD: 7,
  GET_PROTOCOL_FEATURES: 15,
  SET_PROTOCOL_FEATURES: 16,
} as const;
const LOG_ALL = 1n << 26n;
const LOG_SHMFD = 1n << 1n;

/** A message that went through. */
export interface PassedMessage {
  /** Which side sent it. */
  from: "frontend" | "backend";
  /** Number of the connection, from 0. */
  connection: number;
  request: number;
  flags: number;
  /** As passed on, after what was cleared. */
  payload: Uint8Array<ArrayBuffer>;
  /** How many file descriptors came with it. */
  fds: number;
}

/** Which bits the proxy clears. */
export interface ProxyOptions {
  /** Bits of the features; default LOG_ALL. */
  hideFeatures?: bigint;
  /** Bits of the protocol features; default LOG_SHMFD. */
  hideProtocolFeatures?: bigint;
  /**
   * Instead of hiding anything, keeps the log from the device: LOG_ALL is taken out of SET_FEATURES and SET_LOG_BASE is answered
   * here. To the VMM it is a device that logs, but forgets everything.
   */
  forgetLog?: boolean;
  /** Sees every message before it is passed on; may change its bytes and replace its descriptors (closing the old ones). */
  onMessage?: (message: ProxyMessage, from: "frontend" | "backend") => void;
}

/** A message on its way. */
export interface ProxyMessage {
  /** Header (request, flags, size: u32 each) and payload. */
  bytes: Uint8Array<ArrayBuffer>;
  fds: OwnedFd[];
}

/** Reads exactly `into`; false at the end. The descriptors that come go to `fds`. */
async function readFully(stream: UnixStream, into: Uint8Array<ArrayBuffer>, fds: OwnedFd[]): Promise<boolean> {
  for (let at = 0; at < into.length;) {
    const received = await stream.receive(into.subarray(at));
    fds.push(...received.fds);
    if (received.bytes === 0) return false;
    at += received.bytes;
  }
  return true;
}

// Never more than one message per read: what comes with the bytes of the next one would be taken for this one's descriptors.
async function readMessage(stream: UnixStream): Promise<ProxyMessage | undefined> {
  const header = new Uint8Array(HEADER_SIZE);
  const fds: OwnedFd[] = [];
  if (!await readFully(stream, header, fds)) return undefined;
  const size = new DataView(header.buffer).getUint32(8, true);
  if (size > MAX_PAYLOAD) throw new Error(`A message of ${size} bytes`);
  const bytes = new Uint8Array(HEADER_SIZE + size);
  bytes.set(header);
  return await readFully(stream, bytes.subarray(HEADER_SIZE), fds) ? { bytes, fds } : undefined;
}

/** The answer to SET_LOG_BASE: version 1, reply, a u64 of 0. */
function logBaseReply(): Uint8Array<ArrayBuffer> {
  const reply = new Uint8Array(HEADER_SIZE + 8);
  const view = new DataView(reply.buffer);
  view.setUint32(0, REQUEST.SET_LOG_BASE, true);
  view.setUint32(4, 1 | FLAG_REPLY, true);
  view.setUint32(8, 8, true);
  return reply;
}

/** The proxy. It takes one front-end after the other, and connects to the back-end for each. */
export class HideLogProxy implements AsyncDisposable {
  /** Everything that went through, in order. */
  readonly passed: PassedMessage[] = [];
  readonly #listener: UnixListener;
  readonly #backend: string;
  readonly #hide: Required<Omit<ProxyOptions, "onMessage">>;
  readonly #onMessage: ProxyOptions["onMessage"];
  readonly #open: Set<UnixStream> = new Set();
  readonly #serving: Promise<void>;
  #connections = 0;

  /**
   * @param socket where it listens
   * @param backend where the real back-end listens
   */
  constructor(socket: string, backend: string, options: ProxyOptions = {}) {
    this.#listener = listenUnix(socket);
    this.#backend = backend;
    const forgetLog = options.forgetLog === true;
    this.#onMessage = options.onMessage;
    this.#hide = {
      hideFeatures: options.hideFeatures ?? (forgetLog ? 0n : LOG_ALL),
      hideProtocolFeatures: options.hideProtocolFeatures ?? (forgetLog ? 0n : LOG_SHMFD),
      forgetLog,
    };
    this.#serving = this.#serve();
  }

  /** What the front-end sent with that request id. */
  sent(request: number): PassedMessage[] {
    return this.passed.filter((message) => message.from === "frontend" && message.request === request);
  }

  /** Whether the device was ever told to log: SET_FEATURES with LOG_ALL, SET_LOG_BASE or SET_LOG_FD. */
  get deviceWasToldToLog(): boolean {
    const features = this.sent(REQUEST.SET_FEATURES).some(({ payload }) =>
      (new DataView(payload.buffer).getBigUint64(0, true) & LOG_ALL) !== 0n
    );
    return features || this.sent(REQUEST.SET_LOG_BASE).length > 0 || this.sent(REQUEST.SET_LOG_FD).length > 0;
  }

  async #serve(): Promise<void> {
    try {
      for (;;) await this.#connection(await this.#listener.accept());
    } catch {
      // The listener was closed.
    }
  }

  async #connection(frontend: UnixStream): Promise<void> {
    const connection = this.#connections++;
    this.#open.add(frontend);
    let backend: UnixStream | undefined;
    try {
      backend = connectUnix(this.#backend);
      this.#open.add(backend);
      await Promise.all([
        this.#pump(frontend, backend, "frontend", connection),
        this.#pump(backend, frontend, "backend", connection),
      ]);
    } catch {
      /* one side is gone: the front-end sees the end of its connection */
    } finally {
      for (const stream of [frontend, backend]) {
        if (stream === undefined) continue;
        stream.close();
        this.#open.delete(stream);
      }
    }
  }

  async #pump(from: UnixStream, to: UnixStream, side: "frontend" | "backend", connection: number): Promise<void> {
    try {
      for (let message = await readMessage(from); message !== undefined; message = await readMessage(from)) {
        const { bytes } = message;
        try {
          this.#onMessage?.(message, side);
          const view = new DataView(bytes.buffer);
          if (this.#hide.forgetLog && side === "frontend" && view.getUint32(0, true) === REQUEST.SET_LOG_BASE) {
            await from.send(logBaseReply());
            continue;
          }
          this.#change(bytes, side);
          this.passed.push({
            from: side,
            connection,
            request: view.getUint32(0, true),
            flags: view.getUint32(4, true),
            payload: bytes.slice(HEADER_SIZE),
            fds: message.fds.length,
          });
          await to.send(bytes, message.fds.map(({ fd }) => fd));
        } finally {
          for (const fd of message.fds) fd.close();
        }
      }
    } finally {
      from.shutdown();
      to.shutdown();
    }
  }

  #change(bytes: Uint8Array<ArrayBuffer>, side: "frontend" | "backend"): void {
    const view = new DataView(bytes.buffer);
    if (this.#hide.forgetLog && side === "frontend" && view.getUint32(0, true) === REQUEST.SET_FEATURES) {
      view.setBigUint64(HEADER_SIZE, view.getBigUint64(HEADER_SIZE, true) & ~LOG_ALL, true);
    }
    if (side !== "backend" || (view.getUint32(4, true) & FLAG_REPLY) === 0 || bytes.length < HEADER_SIZE + 8) return;
    const request = view.getUint32(0, true);
    const hidden = request === REQUEST.GET_FEATURES
      ? this.#hide.hideFeatures
      : request === REQUEST.GET_PROTOCOL_FEATURES
      ? this.#hide.hideProtocolFeatures
      : 0n;
    if (hidden !== 0n) view.setBigUint64(HEADER_SIZE, view.getBigUint64(HEADER_SIZE, true) & ~hidden, true);
  }

  /** Ends all connections. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#listener.close();
    for (const stream of this.#open) stream.shutdown();
    await this.#serving;
  }
}
