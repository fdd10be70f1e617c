/**
 * Where running relays are found: one control socket `NAME.sock` each, in a directory of the user's own.
 *
 * @module
 */
import { usageError } from "./usage.ts";

/**
 * `$SVQ_RUNTIME_DIR`, else `/run/svq` for root, else `$XDG_RUNTIME_DIR/svq`, else `/tmp/svq-UID`. It may not exist yet.
 *
 * @param env for the variables
 */
export function runtimeDirectory(env: (name: string) => string | undefined): string {
  const own = env("SVQ_RUNTIME_DIR");
  if (own !== undefined && own !== "") return own;
  const uid = Deno.uid();
  if (uid === 0) return "/run/svq";
  const user = env("XDG_RUNTIME_DIR");
  return user !== undefined && user !== "" ? `${user}/svq` : `/tmp/svq-${uid}`;
}

/** Path of the control socket of the relay `name`. @throws SvqError USAGE for a name that is no file name */
export function controlSocketPath(name: string, env: (name: string) => string | undefined): string {
  if (!/^[\w][\w.:@-]{0,63}$/.test(name)) {
    throw usageError(`Bad relay name: ${JSON.stringify(name)}`, "letters, digits and . _ - : @, at most 64");
  }
  return `${runtimeDirectory(env)}/${name}.sock`;
}

/** Names that have a control socket, sorted. A relay that died may have left its socket behind: connect to know. */
export function relayNames(env: (name: string) => string | undefined): string[] {
  try {
    return [...Deno.readDirSync(runtimeDirectory(env))]
      .filter((entry) => entry.name.endsWith(".sock"))
      .map((entry) => entry.name.slice(0, -".sock".length))
      .sort();
  } catch {
    return [];
  }
}
