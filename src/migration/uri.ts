/**
 * Where a migration's other side is: `unix:PATH`, `tcp:HOST:PORT` or `tls:HOST:PORT`.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import {
  boundPort,
  connectTcp,
  connectUnix,
  listenTcp,
  listenUnix,
  resolveTcp,
  type TcpAddress,
  type UnixListener,
  type UnixStream,
} from "../ffi/mod.ts";
import { connectTls, type TlsClientOptions, TlsListener, type TlsServerOptions } from "./tls.ts";

/** A parsed migration URI. */
export type MigrationUri = { kind: "unix"; path: string } | { kind: "tcp" | "tls"; host: string; port: number };

/** What accepts connections of a migration. */
export type StreamListener = Pick<UnixListener, "accept" | "close" | "closed">;

const HINT = "write unix:PATH, tcp:HOST:PORT or tls:HOST:PORT, e.g. tcp:192.0.2.7:4444 or tls:[2001:db8::7]:4444";

/** Reads `unix:PATH`, `tcp:HOST:PORT` or `tls:HOST:PORT`; an empty host means all addresses, to listen on. @throws SvqError USAGE */
export function parseMigrationUri(text: string): MigrationUri {
  const bad = (reason: string) =>
    new SvqError("USAGE", `Bad migration URI ${JSON.stringify(text)}: ${reason}`, { exitCode: EXIT.usage, hint: HINT });
  const [, scheme, rest] = /^([a-z]+):(.*)$/s.exec(text) ?? [];
  if (scheme === "unix") {
    if (rest === "") throw bad("the path is missing");
    return { kind: "unix", path: rest! };
  }
  if (scheme !== "tcp" && scheme !== "tls") throw bad(scheme === undefined ? "it names no transport" : `there is no transport ${scheme}`);
  const [, bracketed, plain, digits] = /^(?:\[([^\]]*)\]|([^:]*)):(\d{1,5})$/.exec(rest!) ?? [];
  const port = Number(digits);
  if (digits === undefined || port > 65535) throw bad("it has no host and port");
  return { kind: scheme, host: bracketed ?? plain ?? "", port };
}

/** The text form of a URI. */
export function formatMigrationUri(uri: MigrationUri): string {
  if (uri.kind === "unix") return `unix:${uri.path}`;
  return `${uri.kind}:${uri.host.includes(":") ? `[${uri.host}]` : uri.host}:${uri.port}`;
}

function checkSecure(addresses: readonly TcpAddress[], uri: MigrationUri, insecure: boolean): void {
  if (insecure || addresses.every((address) => address.loopback)) return;
  throw new SvqError("INSECURE_TRANSPORT", `${formatMigrationUri(uri)}: guest memory would leave this host unencrypted`, {
    exitCode: EXIT.usage,
    hint: "use tls:HOST:PORT, a tunnel to a loopback address or a unix socket, or give --insecure on a network that you trust",
  });
}

/** How a link is protected. */
export interface LinkSecurity<Tls> {
  /** Allow plain TCP beyond this host. */
  insecure: boolean;
  /** Needed for `tls:`. */
  tls?: Tls;
}

function needed<Tls>(tls: Tls | undefined, flags: string): Tls {
  if (tls !== undefined) return tls;
  throw new SvqError("USAGE", `tls: needs ${flags}`, {
    exitCode: EXIT.usage,
    hint: "docs/operations.md shows how to make certificate and secret",
  });
}

/**
 * Refuses a link to a destination that would be refused anyway, before anything is started for it.
 *
 * @throws SvqError INSECURE_TRANSPORT, USAGE
 */
export async function checkLink(uri: MigrationUri, { insecure, tls }: LinkSecurity<TlsClientOptions>): Promise<void> {
  if (uri.kind === "tls") needed(tls, "--tls-secret");
  if (uri.kind === "tcp") checkSecure(await resolveTcp(uri.host || "localhost", uri.port), uri, insecure);
}

/** Connects to a destination. @throws SvqError INSECURE_TRANSPORT, TLS_FAILED, SysError */
export async function connectMigration(
  uri: MigrationUri,
  security: LinkSecurity<TlsClientOptions>,
  timeoutMs: number,
): Promise<UnixStream> {
  const { insecure, tls } = security;
  if (uri.kind === "unix") return connectUnix(uri.path);
  if (uri.kind === "tls") return await connectTls(uri.host || "localhost", uri.port, needed(tls, "--tls-secret"), timeoutMs);
  const addresses = await resolveTcp(uri.host || "localhost", uri.port);
  checkSecure(addresses, uri, insecure);
  let failure: unknown;
  for (const address of addresses) {
    try {
      return await connectTcp(address, formatMigrationUri(uri), timeoutMs);
    } catch (error) {
      failure ??= error;
    }
  }
  throw failure;
}

/**
 * Listens for sources.
 *
 * @param onRefused told of connections that failed before a migration began on them
 * @returns the listener, and the URI with the port that it got
 * @throws SvqError INSECURE_TRANSPORT, TLS_FAILED, SysError
 */
export async function listenMigration(
  uri: MigrationUri,
  security: LinkSecurity<TlsServerOptions>,
  onRefused: (reason: string) => void = () => {},
): Promise<{ listener: StreamListener; uri: MigrationUri }> {
  const { insecure, tls } = security;
  if (uri.kind === "unix") return { listener: listenUnix(uri.path, { mode: 0o600 }), uri };
  if (uri.kind === "tls") {
    const listener = new TlsListener(uri.host, uri.port, needed(tls, "--tls-cert, --tls-key and --tls-secret"), onRefused);
    return { listener, uri: { ...uri, port: listener.port } };
  }
  const addresses = await resolveTcp(uri.host, uri.port);
  checkSecure(addresses, uri, insecure);
  const listener = listenTcp(addresses[0]!, formatMigrationUri(uri));
  return { listener, uri: { ...uri, port: boundPort(listener.fd) } };
}
