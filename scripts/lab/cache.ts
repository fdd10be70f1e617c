/**
 * The lab's cache: named things, each built once from a recipe, in a folder outside the checkout.
 *
 * @module
 */

/** Why a part of the lab cannot be had here, in words for the name of a skipped test. */
export class LabUnavailable extends Error {
  override readonly name = "LabUnavailable";
}

/** The folder of everything that the lab builds: `$SVQ_LAB`, else `svq/lab` in the user's cache folder. */
export function labFolder(): string {
  const chosen = Deno.env.get("SVQ_LAB");
  if (chosen) return chosen;
  const home = Deno.env.get("HOME") ?? "/root";
  return `${Deno.env.get("XDG_CACHE_HOME") || `${home}/.cache`}/svq/lab`;
}

/** A line of progress, on stderr so that a command's output stays clean. */
export function say(text: string): void {
  console.error(`lab: ${text}`);
}

/** The first 12 hexadecimal digits of the SHA-256 of `texts`. */
export async function recipeHash(...texts: (string | Uint8Array<ArrayBuffer>)[]): Promise<string> {
  const encoder = new TextEncoder();
  const pieces: Uint8Array<ArrayBuffer>[] = [];
  for (const text of texts) pieces.push(typeof text === "string" ? encoder.encode(text) : text, new Uint8Array(1));
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", await new Blob(pieces).arrayBuffer()));
  return Array.from(digest.subarray(0, 6), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Whether `path` exists. */
export function exists(path: string): boolean {
  try {
    Deno.lstatSync(path);
    return true;
  } catch {
    return false;
  }
}

/** Runs `work` while no other process holds the lock of that name. */
export async function locked<T>(name: string, work: () => Promise<T>): Promise<T> {
  const folder = `${labFolder()}/locks`;
  await Deno.mkdir(folder, { recursive: true });
  using file = await Deno.open(`${folder}/${name}`, { create: true, write: true });
  await file.lock(true);
  return await work();
}

/** How long a failed build is remembered, so that the many files of a test run do not each wait for a mirror that is away. */
const FAILURE_MEMORY_MS = 60_000;

function recentFailure(path: string): string | undefined {
  try {
    const age = Date.now() - (Deno.statSync(path).mtime?.getTime() ?? 0);
    return age < FAILURE_MEMORY_MS ? Deno.readTextFileSync(path) : undefined;
  } catch {
    return undefined;
  }
}

/**
 * The folder of the thing `name` built by the recipe of that hash. Built at most once, by one process, in a temporary folder
 * that is renamed when complete; a folder of another recipe stays for whoever uses it, until nobody has for two weeks.
 *
 * @param build fills the folder it is given
 * @throws LabUnavailable when `build` threw one, now or within the last minute
 */
export async function ensureBuilt(name: string, hash: string, build: (folder: string) => Promise<void>): Promise<string> {
  const folder = `${labFolder()}/${name}-${hash}`;
  if (exists(folder)) {
    await touch(folder);
    return folder;
  }
  const failure = `${folder}.failed`;
  return await locked(name, async () => {
    if (exists(folder)) return folder;
    const reason = recentFailure(failure);
    if (reason !== undefined) throw new LabUnavailable(reason);
    const started = performance.now();
    say(`building ${name}`);
    const temporary = `${folder}.building`;
    await remove(temporary);
    await Deno.mkdir(temporary, { recursive: true });
    try {
      await build(temporary);
      await Deno.rename(temporary, folder);
    } catch (error) {
      await remove(temporary);
      if (error instanceof LabUnavailable) await Deno.writeTextFile(failure, error.message);
      throw error;
    }
    await remove(failure);
    await removeUnused(name, folder);
    say(`${name} is ready after ${((performance.now() - started) / 1000).toFixed(1)} s`);
    return folder;
  });
}

const DAY_MS = 86_400_000;
const UNUSED_MS = 14 * DAY_MS;

/** A folder's time says when it was last asked for. */
async function touch(folder: string): Promise<void> {
  const { mtime } = await Deno.stat(folder);
  if (Date.now() - (mtime?.getTime() ?? 0) > DAY_MS) await Deno.utime(folder, new Date(), new Date()).catch(() => {});
}

/** Removes what other recipes of `name` have made and nobody has asked for in two weeks. The caller has the lock of that name. */
async function removeUnused(name: string, folder: string): Promise<void> {
  await Deno.utime(folder, new Date(), new Date());
  for (const entry of Deno.readDirSync(labFolder())) {
    const path = `${labFolder()}/${entry.name}`;
    const other = entry.isDirectory && path !== folder && entry.name.startsWith(`${name}-`) &&
      /^[0-9a-f]{12}$/.test(entry.name.slice(name.length + 1));
    if (!other || Date.now() - (Deno.statSync(path).mtime?.getTime() ?? 0) < UNUSED_MS) continue;
    say(`removing ${entry.name}, which nobody has used for two weeks`);
    await remove(path);
  }
}

async function remove(path: string): Promise<void> {
  if (exists(path)) await Deno.remove(path, { recursive: true });
}

/**
 * Runs a program to its end.
 *
 * @returns its standard output
 * @throws LabUnavailable when it cannot be started or fails, with the last lines it wrote
 */
export async function runTool(
  command: string,
  args: string[],
  options: { cwd?: string; env?: Record<string, string> } = {},
): Promise<string> {
  let output: Deno.CommandOutput;
  try {
    output = await new Deno.Command(command, { args, stdin: "null", stdout: "piped", stderr: "piped", ...options }).output();
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) throw new LabUnavailable(`${command} is not installed`);
    throw error;
  }
  const text = new TextDecoder().decode(output.stdout);
  if (output.success) return text;
  const lines = (new TextDecoder().decode(output.stderr).trim() || text.trim()).split("\n");
  // apt's own errors start with E:; a reason becomes part of a test's name, where no mirror's address belongs.
  const reason = (lines.find((line) => line.startsWith("E:")) ?? lines.at(-1)!).replaceAll(/\w+:\/\/\S+/g, "(address)").slice(0, 160);
  throw new LabUnavailable(`${command} failed: ${reason}`);
}
