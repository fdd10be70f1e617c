/** Flags for `tls:` links of `svq migrate`. @module */
import { secretOf, type TlsClientOptions, type TlsServerOptions } from "../../migration/tls.ts";
import type { LinkSecurity, MigrationUri } from "../../migration/uri.ts";
import { usageError } from "../usage.ts";

const HINT = "docs/operations.md shows how to make a certificate and a secret";

async function read(path: string): Promise<Uint8Array<ArrayBuffer>> {
  try {
    return await Deno.readFile(path);
  } catch (error) {
    throw usageError(`${path} cannot be read: ${error instanceof Error ? error.message : error}`, "it is needed for tls:");
  }
}

const text = async (path: string) => new TextDecoder().decode(await read(path));

/** Security of the source's side. @throws SvqError USAGE */
export async function runSecurity(
  { to, insecure, tlsCa, tlsSecret }: { to: MigrationUri; insecure: boolean; tlsCa?: string; tlsSecret?: string },
): Promise<LinkSecurity<TlsClientOptions>> {
  if (tlsSecret === undefined) {
    if (to.kind === "tls") throw usageError("tls: needs --tls-secret", HINT);
    return { insecure };
  }
  const secret = secretOf(await read(tlsSecret));
  return { insecure, tls: tlsCa === undefined ? { secret } : { secret, caCerts: [await text(tlsCa)] } };
}

/** Security of the destination's side. @throws SvqError USAGE */
export async function listenSecurity(
  uri: MigrationUri,
  { insecure, tlsCert, tlsKey, tlsSecret }: { insecure: boolean; tlsCert?: string; tlsKey?: string; tlsSecret?: string },
): Promise<LinkSecurity<TlsServerOptions>> {
  if (tlsSecret === undefined || tlsCert === undefined || tlsKey === undefined) {
    if (uri.kind === "tls") throw usageError("tls: needs --tls-cert, --tls-key and --tls-secret", HINT);
    return { insecure };
  }
  return { insecure, tls: { cert: await text(tlsCert), key: await text(tlsKey), secret: secretOf(await read(tlsSecret)) } };
}
