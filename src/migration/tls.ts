/**
 * `tls:HOST:PORT`: the destination shows a certificate (TLS 1.3 or 1.2 of the runtime), then both sides show that they know a
 * shared secret, which is how the destination knows its sources: the runtime's TLS can neither ask a client for a certificate
 * nor do pre-shared keys. Then the bytes of the migration stream follow.
 *
 *     source                                       destination
 *       |  32 random bytes                              |
 *       |---------------------------------------------->|
 *       |  32 random bytes                              |
 *       |<----------------------------------------------|
 *       |  HMAC-SHA-256(secret, "source", both)         |
 *       |---------------------------------------------->|  closes the link when it is wrong
 *       |  HMAC-SHA-256(secret, "destination", both)    |
 *       |<----------------------------------------------|
 *
 * The stream's own sockets carry plain bytes to a bridge in this process, which encrypts them. So the end of the stream does not
 * prove that everything arrived that was written before it: see SourceOptions.endIsProof.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { ERRNO, SysError, unixPair, type UnixStream } from "../ffi/mod.ts";

/** Shortest secret, bytes. */
export const MIN_SECRET_BYTES = 16;
const NONCE_BYTES = 32;
const MAC_BYTES = 32;
const PUMP_BYTES = 256 * 1024;
const GREETING_MS = 10_000;

/** What a source needs. */
export interface TlsClientOptions {
  /** Certificates (PEM) of who may vouch for the destination; absent: those that the runtime trusts. */
  caCerts?: string[];
  /** Known to both sides. */
  secret: Uint8Array<ArrayBuffer>;
}

/** What a destination needs. */
export interface TlsServerOptions {
  /** Certificate chain, PEM. */
  cert: string;
  /** Its private key, PEM. */
  key: string;
  /** Known to both sides. */
  secret: Uint8Array<ArrayBuffer>;
}

function failed(message: string, hint: string, cause?: unknown): SvqError {
  return new SvqError("TLS_FAILED", message, { exitCode: EXIT.migrationAborted, hint, cause });
}

/** Checks the content of a secret's file; white space around it does not count. @throws SvqError USAGE when it is too short */
export function secretOf(content: Uint8Array): Uint8Array<ArrayBuffer> {
  const bytes = new TextEncoder().encode(new TextDecoder("latin1").decode(content).trim());
  if (bytes.length >= MIN_SECRET_BYTES) return bytes;
  throw new SvqError("USAGE", `The shared secret has ${bytes.length} bytes, at least ${MIN_SECRET_BYTES} are needed`, {
    exitCode: EXIT.usage,
    hint: "openssl rand -hex 32 makes a good one; both sides need the same",
  });
}

async function readExactly(connection: Deno.TlsConn, length: number): Promise<Uint8Array<ArrayBuffer>> {
  const bytes = new Uint8Array(length);
  for (let at = 0; at < length;) {
    const count = await connection.read(bytes.subarray(at));
    if (count === null) throw failed("The other side ended the link before it had shown the shared secret", SECRET_HINT);
    at += count;
  }
  return bytes;
}

async function writeAll(connection: Deno.TlsConn, bytes: Uint8Array): Promise<void> {
  for (let rest = bytes; rest.length > 0;) rest = rest.subarray(await connection.write(rest));
}

const SECRET_HINT = "give both sides the same --tls-secret";

type Side = "source" | "destination";

async function proof(secret: Uint8Array<ArrayBuffer>, side: Side, nonces: Uint8Array): Promise<Uint8Array<ArrayBuffer>> {
  const key = await crypto.subtle.importKey("raw", secret, { name: "HMAC", hash: "SHA-256" }, false, ["sign"]);
  const text = new TextEncoder().encode(`svq migration ${side}\n`);
  return new Uint8Array(await crypto.subtle.sign("HMAC", key, new Uint8Array([...text, ...nonces])));
}

// Takes the same time wherever they differ.
function same(a: Uint8Array, b: Uint8Array): boolean {
  let difference = a.length ^ b.length;
  for (let i = 0; i < a.length; i++) difference |= a[i]! ^ (b[i] ?? 0);
  return difference === 0;
}

/** The greeting; throws when the other side does not know the secret. */
async function greetSecretly(connection: Deno.TlsConn, secret: Uint8Array<ArrayBuffer>, side: Side): Promise<void> {
  const own = crypto.getRandomValues(new Uint8Array(NONCE_BYTES));
  if (side === "source") await writeAll(connection, own);
  const other = await readExactly(connection, NONCE_BYTES);
  if (side === "destination") await writeAll(connection, own);
  const nonces = new Uint8Array(side === "source" ? [...own, ...other] : [...other, ...own]);
  const wrong = () => failed("The other side does not know the shared secret", SECRET_HINT);
  if (side === "source") {
    await writeAll(connection, await proof(secret, "source", nonces));
    if (!same(await proof(secret, "destination", nonces), await readExactly(connection, MAC_BYTES))) throw wrong();
    return;
  }
  if (!same(await proof(secret, "source", nonces), await readExactly(connection, MAC_BYTES))) throw wrong();
  await writeAll(connection, await proof(secret, "destination", nonces));
}

/** Runs `action`, and closes the connection when it takes too long. */
async function withDeadline<T>(connection: Deno.TlsConn, timeoutMs: number, action: () => Promise<T>): Promise<T> {
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    close(connection);
  }, timeoutMs);
  try {
    return await action();
  } catch (error) {
    close(connection);
    throw late ? failed(`The other side has been silent for ${timeoutMs} ms`, SECRET_HINT, error) : error;
  } finally {
    clearTimeout(timer);
  }
}

function close(connection: Deno.TlsConn): void {
  try {
    connection.close();
  } catch { /* closed already */ }
}

/** Carries bytes both ways until both have ended, or one fails; then closes both. */
async function bridge(outer: UnixStream, connection: Deno.TlsConn): Promise<void> {
  const out = async () => {
    const bytes = new Uint8Array(PUMP_BYTES);
    for (;;) {
      const { bytes: count } = await outer.receive(bytes);
      if (count === 0) return await connection.closeWrite();
      await writeAll(connection, bytes.subarray(0, count));
    }
  };
  const back = async () => {
    const bytes = new Uint8Array(PUMP_BYTES);
    for (;;) {
      const count = await connection.read(bytes);
      if (count === null) return outer.shutdownWriting();
      await outer.send(bytes.subarray(0, count));
    }
  };
  const closeBoth = () => {
    close(connection);
    outer.close();
  };
  const guarded = async (pump: () => Promise<void>) => {
    try {
      await pump();
    } catch {
      // Whatever broke: the migration's side sees the end of its stream.
      closeBoth();
    }
  };
  await Promise.all([guarded(out), guarded(back)]);
  closeBoth();
}

/**
 * Connects, checks the certificate, and shows the secret.
 *
 * @throws SvqError TLS_FAILED, SysError ECONNREFUSED (exit code 3)
 */
export async function connectTls(host: string, port: number, options: TlsClientOptions, timeoutMs: number): Promise<UnixStream> {
  const { caCerts, secret } = options;
  const what = `tls:${host}:${port}`;
  let connection: Deno.TlsConn | undefined;
  let late = false;
  let timer: ReturnType<typeof setTimeout> | undefined;
  const connecting = Deno.connectTls({ hostname: host, port, ...(caCerts === undefined ? {} : { caCerts }) });
  connecting.then((made) => late && close(made), () => {});
  try {
    const tooLate = new Promise<never>((_resolve, reject) =>
      timer = setTimeout(() => {
        late = true;
        reject(new SysError("connect", ERRNO.ETIMEDOUT, what));
      }, timeoutMs)
    );
    connection = await Promise.race([connecting, tooLate]);
  } catch (error) {
    if (error instanceof Deno.errors.ConnectionRefused) throw new SysError("connect", ERRNO.ECONNREFUSED, what);
    throw error instanceof SvqError ? error : certificateError(what, error);
  } finally {
    clearTimeout(timer);
  }
  const established = connection;
  await withDeadline(established, timeoutMs, async () => {
    try {
      await established.handshake();
    } catch (error) {
      throw certificateError(what, error);
    }
    try {
      await greetSecretly(established, secret, "source");
    } catch (error) {
      throw error instanceof SvqError ? error : failed(`${what}: the link was lost in the greeting`, SECRET_HINT, error);
    }
  });
  const [inner, outer] = unixPair();
  bridge(outer, established);
  return inner;
}

function certificateError(what: string, error: unknown): SvqError {
  const reason = error instanceof Error ? error.message : String(error);
  return failed(
    `${what}: ${reason}`,
    "--tls-ca names the certificate that the destination's is signed with; the name in it must be the host's",
    error,
  );
}

/** Listens for sources with TLS; it accepts as {@linkcode UnixListener} does. */
export class TlsListener implements Disposable {
  readonly #listener: Deno.TlsListener;
  readonly #options: TlsServerOptions;
  readonly #onRefused: (reason: string) => void;
  #closed = false;

  /**
   * Listens at once.
   *
   * @param port 0: any
   * @param onRefused told of who did not get as far as the migration
   * @throws SvqError TLS_FAILED when certificate or key cannot be used
   */
  constructor(host: string, port: number, options: TlsServerOptions, onRefused: (reason: string) => void) {
    this.#options = options;
    this.#onRefused = onRefused;
    const { cert, key } = options;
    try {
      this.#listener = Deno.listenTls({ hostname: host || "::", port, cert, key });
    } catch (error) {
      if (error instanceof Deno.errors.AddrInUse) throw new SysError("listen", ERRNO.EADDRINUSE, `tls:${host}:${port}`);
      throw failed(
        error instanceof Error ? error.message : String(error),
        "--tls-cert and --tls-key are PEM files that belong together",
        error,
      );
    }
  }

  /** The port that it got. */
  get port(): number {
    return this.#listener.addr.port;
  }

  /** Closed already. */
  get closed(): boolean {
    return this.#closed;
  }

  /** The next connection; whether it knows the secret shows when it is read from. @throws when the listener is closed meanwhile */
  async accept(): Promise<UnixStream> {
    const connection = await this.#listener.accept();
    const [inner, outer] = unixPair();
    this.#serve(connection, outer);
    return inner;
  }

  async #serve(connection: Deno.TlsConn, outer: UnixStream): Promise<void> {
    try {
      await withDeadline(connection, GREETING_MS, () => greetSecretly(connection, this.#options.secret, "destination"));
    } catch (error) {
      outer.close();
      this.#onRefused(error instanceof Error ? error.message : String(error));
      return;
    }
    await bridge(outer, connection);
  }

  /** Stops listening; connections live on. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#listener.close();
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}
