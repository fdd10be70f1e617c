/**
 * The deno runtime of another kind of machine, from the package registry that also carries deno itself.
 *
 * @module
 */

/** Machines that a file can be built for, by Rust's names, and the package that carries the runtime of each. */
export const TARGETS: Readonly<Record<string, string>> = {
  "x86_64-unknown-linux-gnu": "@deno/linux-x64-glibc",
  "aarch64-unknown-linux-gnu": "@deno/linux-arm64-glibc",
};

/** A runtime of another machine. */
export interface Runtime {
  /** The executable, in `folder`. */
  path: string;
  /** Its version: this Deno's, or the newest of the same minor release where the registry lacks it. */
  version: string;
}

async function npm(args: readonly string[], cwd: string): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command("npm", { args: [...args], cwd, stdin: "null" }).output();
  const decoder = new TextDecoder();
  if (!success) throw new Error(`npm ${args.join(" ")} failed: ${decoder.decode(stderr).trim().split("\n").at(-1)}`);
  return decoder.decode(stdout);
}

/** Of the versions that a registry has, the wanted one, or else the newest of the same minor release; undefined without any. */
export function nearestVersion(wanted: string, versions: readonly string[]): string | undefined {
  if (versions.includes(wanted)) return wanted;
  const series = wanted.slice(0, wanted.lastIndexOf(".") + 1);
  return versions.filter((version) => version.startsWith(series) && /^\d+$/.test(version.slice(series.length)))
    .sort((a, b) => Number(a.slice(series.length)) - Number(b.slice(series.length))).at(-1);
}

/**
 * Fetches the runtime for `target` into `folder`.
 *
 * @throws Error where the target is unknown, or the registry has no runtime for it of this minor release
 */
export async function fetchRuntime(target: string, folder: string): Promise<Runtime> {
  const name = TARGETS[target];
  if (name === undefined) throw new Error(`Unknown target ${target}; known are ${Object.keys(TARGETS).join(", ")}`);
  const versions: unknown = JSON.parse(await npm(["view", name, "versions", "--json"], folder));
  const version = nearestVersion(Deno.version.deno, Array.isArray(versions) ? versions : [String(versions)]);
  if (version === undefined) throw new Error(`The registry has no ${name} for Deno ${Deno.version.deno}; name a runtime: --deno=FILE`);
  const archive = (await npm(["pack", "--silent", `${name}@${version}`], folder)).trim().split("\n").at(-1)!;
  const { success } = await new Deno.Command("tar", { args: ["-xzf", archive, "package/deno"], cwd: folder, stdin: "null" }).output();
  if (!success) throw new Error(`${archive} holds no package/deno`);
  await Deno.remove(`${folder}/${archive}`);
  return { path: `${folder}/package/deno`, version };
}
