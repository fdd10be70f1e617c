/**
 * Where running relays have their control sockets.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { effectiveUid } from "../ffi/mod.ts";

/**
 * Path of the directory of this user's control sockets: `$SVQ_RUNTIME_DIR`, or `svq` in `$XDG_RUNTIME_DIR`, in /run for root,
 * or a directory of this user's own in /tmp. It may not exist yet.
 */
export function runtimeDirPath(): string {
  const uid = effectiveUid();
  const xdg = Deno.env.get("XDG_RUNTIME_DIR");
  const path = Deno.env.get("SVQ_RUNTIME_DIR") || (xdg ? `${xdg}/svq` : uid === 0 ? "/run/svq" : `/tmp/svq-${uid}`);
  // With a slash behind it a link would be looked through.
  return path.replace(/(?<=.)\/+$/, "");
}

/**
 * {@linkcode runtimeDirPath}, made with mode 0700 if it is not there.
 *
 * @throws SvqError RUNTIME_DIR_UNSAFE where it belongs to somebody else or is a symbolic link
 */
export function runtimeDir(): string {
  const path = runtimeDirPath();
  try {
    Deno.mkdirSync(path, { mode: 0o700, recursive: true });
  } catch (cause) {
    throw new SvqError("RUNTIME_DIR_UNUSABLE", `Cannot make ${path}: ${cause instanceof Error ? cause.message : cause}`, {
      exitCode: EXIT.permission,
      hint: "Set SVQ_RUNTIME_DIR to a directory of yours",
      cause,
    });
  }
  const info = Deno.lstatSync(path);
  if (!info.isDirectory || info.uid !== effectiveUid()) {
    throw new SvqError("RUNTIME_DIR_UNSAFE", `${path} is not a directory of this user`, {
      exitCode: EXIT.permission,
      hint: "Remove it, or set SVQ_RUNTIME_DIR to a directory of yours",
    });
  }
  if ((info.mode! & 0o077) !== 0) Deno.chmodSync(path, 0o700);
  return path;
}

/** Control socket of the relay `name`. @throws SvqError BAD_NAME */
export function controlPath(name: string): string {
  if (!/^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/.test(name)) {
    throw new SvqError("BAD_NAME", `A relay cannot be called "${name}"`, {
      exitCode: EXIT.usage,
      hint: "Use up to 64 letters, digits, dots, hyphens and underscores, starting with a letter or digit",
    });
  }
  return `${runtimeDir()}/${name}.sock`;
}

/** Socket of the relay `name` for a process that is to take its place. @throws SvqError BAD_NAME */
export function upgradePath(name: string): string {
  return controlPath(name).replace(/\.sock$/, ".upgrade");
}

/** Names of relays with a control socket, running or not, sorted. */
export function relayNames(): string[] {
  try {
    return [...Deno.readDirSync(runtimeDirPath())]
      .filter((entry) => entry.name.endsWith(".sock"))
      .map((entry) => entry.name.slice(0, -".sock".length))
      .sort();
  } catch (error) {
    // No relay was ever started here.
    if (error instanceof Deno.errors.NotFound) return [];
    throw error;
  }
}
