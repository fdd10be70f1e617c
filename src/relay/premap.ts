/**
 * Taking the destination guest's memory early, for the control method `premap`: over vhost-user a VMM gives it only when it starts
 * the device, and at the destination of a migration the guest stands still then. The layout comes from the source's relay; the
 * file is found in the VMM's process, or named. Whether it is the right one shows when the VMM gives its own: by inode, offset,
 * size and guest address.
 *
 * @module
 */
import { EXIT, SvqError, toErrorRecord } from "../errors.ts";
import { O, openFd, type OwnedFd } from "../ffi/fd.ts";
import { ADDRESS_LIMIT } from "../memory/region.ts";
import { requireFileRange } from "../vhost_user/server_memory.ts";
import type { Relay } from "./relay.ts";
import type { MemoryStatus } from "./status.ts";

/** Regions that one call takes at most: more than any device has slots. */
const MAX_REGIONS = 512;

/** A region that is taken. */
export interface PremapRegion {
  /** Guest-physical address. */
  gpa: number;
  /** Bytes. */
  size: number;
  /** Where it starts in its file. */
  offset: number;
  /** Regions with the same word lie in one file. */
  file?: string | undefined;
  /** Bytes in that file, by which it is found in the VMM's process. */
  file_size?: number | undefined;
}

/** What was taken. */
export interface PremapReport {
  /** `svq.relay-premap/1`. */
  schema: "svq.relay-premap/1";
  /** Relay. */
  name: string;
  /** The VMM's process, where the memory was found there. */
  pid: number | null;
  /** Regions that wait for the VMM now. */
  waiting: number;
  /** Regions taken by this call. */
  regions: number;
  /** Regions that were let go of instead. */
  dropped: number;
  /** Bytes taken. */
  bytes: number;
  /** How long it took, ms: what the device's start does not take any more. */
  ms: number;
}

/** A file that a process has mapped shared and writable. */
export interface SharedFile {
  /** Path that opens it. */
  path: string;
  /** `device:inode`. */
  file: string;
  /** Bytes. */
  size: number;
  /** As the kernel calls it. */
  name: string;
}

function bad(message: string): SvqError {
  return new SvqError("BAD_PARAMETER", message, { exitCode: EXIT.usage });
}

function number(value: unknown, what: string): number {
  if (typeof value === "number" && Number.isSafeInteger(value) && value >= 0 && value < ADDRESS_LIMIT) return value;
  throw bad(`${what} is a whole number of 0 or more, below 2^52`);
}

/** Checks the regions that a client asks for. Nothing that came through the socket is trusted. @throws SvqError BAD_PARAMETER */
export function premapRegions(value: unknown): PremapRegion[] {
  if (!Array.isArray(value) || value.length === 0 || value.length > MAX_REGIONS) {
    throw bad(`regions is a list of 1 to ${MAX_REGIONS} regions`);
  }
  return value.map((one) => {
    if (typeof one !== "object" || one === null) throw bad("A region is an object");
    const { gpa, size, offset = 0, file, file_size, ...others } = one as Record<string, unknown>;
    for (const name of Object.keys(others)) throw bad(`A region has no "${name}"`);
    if (file !== undefined && typeof file !== "string") throw bad("file is a word");
    const region = { gpa: number(gpa, "gpa"), size: number(size, "size"), offset: number(offset, "offset") };
    if (region.size === 0 || region.size % 4096 !== 0 || region.gpa % 4096 !== 0 || region.offset % 4096 !== 0) {
      throw bad("gpa, size and offset are whole pages of 4096 bytes, and size is not 0");
    }
    return { ...region, file, ...(file_size === undefined ? {} : { file_size: number(file_size, "file_size") }) };
  });
}

/**
 * Files that a process has mapped shared and writable, and open: among them its guest's memory.
 *
 * @throws SvqError NO_SUCH_PROCESS, NO_PERMISSION
 */
export function sharedFiles(pid: number): SharedFile[] {
  const maps = readOf(pid, () => Deno.readTextFileSync(`/proc/${pid}/maps`));
  const mapped = new Set<string>();
  for (const line of maps.split("\n")) {
    const [, perm, , , inode] = line.split(/\s+/);
    if (perm?.startsWith("rw") && perm.endsWith("s") && inode !== "0") mapped.add(inode!);
  }
  const found = new Map<string, SharedFile>();
  for (const { name } of readOf(pid, () => [...Deno.readDirSync(`/proc/${pid}/fd`)])) {
    const path = `/proc/${pid}/fd/${name}`;
    try {
      const info = Deno.statSync(path);
      if (!info.isFile || !mapped.has(String(info.ino))) continue;
      const file = `${info.dev}:${info.ino}`;
      if (!found.has(file)) found.set(file, { path, file, size: info.size, name: Deno.readLinkSync(path) });
    } catch { /* closed meanwhile */ }
  }
  return [...found.values()];
}

function readOf<T>(pid: number, read: () => T): T {
  try {
    return read();
  } catch (cause) {
    if (cause instanceof Deno.errors.NotFound) {
      throw new SvqError("NO_SUCH_PROCESS", `There is no process ${pid}`, { exitCode: EXIT.noDevice, cause });
    }
    throw new SvqError("NO_PERMISSION", `The memory of process ${pid} cannot be looked at: ${toErrorRecord(cause).message}`, {
      exitCode: EXIT.permission,
      hint: "the relay needs the VMM's user, or CAP_SYS_PTRACE; or name the memory's file with --path",
      cause,
    });
  }
}

/**
 * Which of the files holds `regions`: the one of the size that is wanted, else the only one that is large enough.
 *
 * @throws SvqError MEMORY_NOT_FOUND, MEMORY_AMBIGUOUS
 */
export function chooseFile(files: readonly SharedFile[], regions: readonly PremapRegion[], pid: number): SharedFile {
  const end = Math.max(...regions.map(({ offset, size }) => offset + size));
  const wanted = regions[0]!.file_size;
  const fits = files.filter(({ size }) => (wanted === undefined ? size >= end : size === wanted));
  const [only, ...more] = fits;
  const shown = fits.map(({ path, size, name }) => `${path} (${name}, ${size} bytes)`).join(", ");
  if (only === undefined) {
    throw new SvqError("MEMORY_NOT_FOUND", `Process ${pid} has mapped no shared file of ${wanted ?? `at least ${end}`} bytes`, {
      hint: "its memory must be shared (memory-backend-memfd,share=on) and as large as the source's; or name the file with --path",
    });
  }
  if (more.length > 0) {
    throw new SvqError("MEMORY_AMBIGUOUS", `Process ${pid} has several files that may be this memory: ${shown}`, {
      hint: "name one with --path, and its regions with --region",
    });
  }
  return only;
}

function openMemory(path: string): OwnedFd {
  try {
    return openFd(path, O.RDWR);
  } catch (cause) {
    throw new SvqError("MEMORY_NOT_FOUND", `${path} cannot be opened: ${toErrorRecord(cause).message}`, { exitCode: EXIT.noDevice, cause });
  }
}

function pathsOf(params: { path?: unknown; pid?: unknown; fd?: unknown }, regions: PremapRegion[], front: number | undefined) {
  const { path, pid = front, fd } = params;
  if (path !== undefined) {
    if (typeof path !== "string" || !path.startsWith("/") || params.pid !== undefined || fd !== undefined) {
      throw bad("path is the absolute path of a file, and goes without pid and fd");
    }
    return { pid: null, groups: [{ path, regions }] };
  }
  if (pid === undefined) {
    throw new SvqError("NO_FRONT_END", "No VMM is connected whose memory could be looked for", {
      hint: "say where it is with --pid, or --path",
    });
  }
  const process = number(pid, "pid");
  if (fd !== undefined) return { pid: process, groups: [{ path: `/proc/${process}/fd/${number(fd, "fd")}`, regions }] };
  const files = sharedFiles(process);
  const groups = [...Map.groupBy(regions, ({ file }) => file).values()].map((regions) => ({
    ...chooseFile(files, regions, process),
    regions,
  }));
  if (new Set(groups.map(({ path }) => path)).size < groups.length) {
    throw new SvqError("MEMORY_AMBIGUOUS", `Process ${process} has one file where the layout names several`, {
      hint: "name each with --path, and its regions with --region",
    });
  }
  return { pid: process, groups };
}

/**
 * The control method: takes `regions` of `path`, of descriptor `fd` of process `pid`, or of what is found in `pid` (default: the
 * VMM that is connected). `drop` lets go of what waits.
 *
 * @throws SvqError BAD_PARAMETER, PREMAP_TOO_LATE, NO_FRONT_END, MEMORY_NOT_FOUND, MEMORY_AMBIGUOUS, and of mapping
 */
export async function premap(
  relay: Relay,
  { regions, drop = false, path, pid, fd, ...others }: Record<string, unknown>,
  { name, front, sealed }: { name: string; front: number | undefined; sealed: boolean },
): Promise<PremapReport> {
  for (const other of Object.keys(others)) throw bad(`There is no parameter "${other}"`);
  if (typeof drop !== "boolean") throw bad("drop is true or false");
  const schema = "svq.relay-premap/1";
  if (drop) {
    const given = relay.placed.waiting.length;
    await relay.placed.settle();
    return { schema, name, pid: null, waiting: relay.placed.waiting.length, regions: 0, dropped: given, bytes: 0, ms: 0 };
  }
  const found = pathsOf({ path, pid, fd }, premapRegions(regions), front);
  const files: OwnedFd[] = [];
  try {
    const before = { ...relay.placed.early };
    const all = found.groups.flatMap(({ path, regions }) => {
      const file = openMemory(path);
      files.push(file);
      return regions.map(({ gpa, size, offset }) => {
        requireFileRange(file.fd, offset, size, `${path} at ${offset}`, sealed);
        return { gpa, size, fdOffset: offset, fd: file.fd };
      });
    });
    await relay.placed.premap(all);
    const { early, waiting } = relay.placed;
    const ms = Math.round((early.ms - before.ms) * 100) / 100;
    const taken = { regions: all.length, dropped: 0, bytes: early.bytes - before.bytes, ms };
    return { schema, name, pid: found.pid, waiting: waiting.length, ...taken };
  } finally {
    for (const file of files) file.close();
  }
}

/** The layout of a guest's memory, from the status of the relay where it runs. */
export function layoutOf(memory: readonly MemoryStatus[]): PremapRegion[] {
  return memory.map(({ gpa, size, offset, file, file_size }) => ({ gpa, size, offset, file, file_size }));
}
