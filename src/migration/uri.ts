/**
 * Where a migration's other side is: `unix:PATH` or `tcp:HOST:PORT`.
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

/** A parsed migration URI. */
export type MigrationUri = { kind: "unix"; path: string } | { kind: "tcp"; host: string; port: number };

const HINT = "write unix:PATH or tcp:HOST:PORT, e.g. tcp:192.0.2.7:4444 or tcp:[2001:db8::7]:4444";

/** Reads `unix:PATH` or `tcp:HOST:PORT`; an empty host means all addresses, to listen on. @throws SvqError USAGE */
export function parseMigrationUri(text: string): MigrationUri {
  const bad = (reason: string) =>
    new SvqError("USAGE", `Bad migration URI ${JSON.stringify(text)}: ${reason}`, { exitCode: EXIT.usage, hint: HINT });
  const [, scheme, rest] = /^([a-z]+):(.*)$/s.exec(text) ?? [];
  if (scheme === "unix") {
    if (rest === "") throw bad("the path is missing");
    return { kind: "unix", path: rest! };
  }
  if (scheme !== "tcp") throw bad(scheme === undefined ? "it names no transport" : `there is no transport ${scheme}`);
  const [, bracketed, plain, digits] = /^(?:\[([^\]]*)\]|([^:]*)):(\d{1,5})$/.exec(rest!) ?? [];
  const port = Number(digits);
  if (digits === undefined || port > 65535) throw bad("it has no host and port");
  return { kind: "tcp", host: bracketed ?? plain ?? "", port };
}

/** The text form of a URI. */
export function formatMigrationUri(uri: MigrationUri): string {
  if (uri.kind === "unix") return `unix:${uri.path}`;
  return `tcp:${uri.host.includes(":") ? `[${uri.host}]` : uri.host}:${uri.port}`;
}

function checkSecure(addresses: readonly TcpAddress[], uri: MigrationUri, insecure: boolean): void {
  if (insecure || addresses.every((address) => address.loopback)) return;
  throw new SvqError("INSECURE_TRANSPORT", `${formatMigrationUri(uri)}: guest memory would leave this host unencrypted`, {
    exitCode: EXIT.usage,
    hint: "use a tunnel to a loopback address or a unix socket, or give --insecure on a network that you trust",
  });
}

/** Connects to a destination. @param insecure allow plain TCP beyond this host. @throws SvqError INSECURE_TRANSPORT, SysError */
export async function connectMigration(uri: MigrationUri, insecure: boolean, timeoutMs: number): Promise<UnixStream> {
  if (uri.kind === "unix") return connectUnix(uri.path);
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

/** Listens for sources. @returns the listener, and the URI with the port that it got. @throws SvqError INSECURE_TRANSPORT, SysError */
export async function listenMigration(uri: MigrationUri, insecure: boolean): Promise<{ listener: UnixListener; uri: MigrationUri }> {
  if (uri.kind === "unix") return { listener: listenUnix(uri.path, { mode: 0o600 }), uri };
  const addresses = await resolveTcp(uri.host, uri.port);
  checkSecure(addresses, uri, insecure);
  const listener = listenTcp(addresses[0]!, formatMigrationUri(uri));
  return { listener, uri: { ...uri, port: boundPort(listener.fd) } };
}
