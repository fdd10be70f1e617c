/**
 * Which processes have a device node open, as far as /proc shows them to this user.
 *
 * @module
 */

/** A process that holds a file open. */
export interface Holder {
  /** Process id. */
  pid: number;
  /** Its name, as /proc/PID/comm gives it. */
  name: string;
}

/**
 * Processes with `path` open, this one included. Processes of other users are seen by root only.
 *
 * @param path absolute path of a device node
 * @param proc the proc file system (default /proc)
 */
export function findHolders(path: string, proc = "/proc"): Holder[] {
  const holders: Holder[] = [];
  for (const pid of names(proc)) {
    if (!/^\d+$/.test(pid)) continue;
    if (names(`${proc}/${pid}/fd`).some((fd) => readLink(`${proc}/${pid}/fd/${fd}`) === path)) {
      holders.push({ pid: Number(pid), name: readText(`${proc}/${pid}/comm`) || "?" });
    }
  }
  return holders.sort((a, b) => a.pid - b.pid);
}

/** `1234 qemu-system-x86, 1300 svq`. */
export function formatHolders(holders: readonly Holder[]): string {
  return holders.map(({ pid, name }) => `${pid} ${name}`).join(", ");
}

function names(directory: string): string[] {
  try {
    return Array.from(Deno.readDirSync(directory), (entry) => entry.name);
  } catch {
    return [];
  }
}

function readLink(path: string): string | undefined {
  try {
    return Deno.readLinkSync(path);
  } catch {
    return undefined;
  }
}

function readText(path: string): string {
  try {
    return Deno.readTextFileSync(path).trim();
  } catch {
    return "";
  }
}
