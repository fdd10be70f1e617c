/**
 * Packages of a Debian release, unpacked into a folder without being installed. apt works on private lists and an empty
 * package status, so the host's own packages are neither read nor changed, and no privilege is needed.
 *
 * @module
 */
import { ensureBuilt, exists, labFolder, LabUnavailable, locked, recipeHash, runTool, say } from "./cache.ts";

/** Releases that the lab takes packages from. */
export type Suite = "bookworm" | "trixie" | "sid";

const KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg";
const LISTS_MAX_AGE_MS = 24 * 3600_000;

/** The mirror of the host's own sources that carries Debian's main archive. */
async function debianMirror(): Promise<string> {
  const rows = (await runTool("apt-get", ["indextargets", "--format", "$(SITE) $(RELEASE) $(ORIGIN)", "Created-By: Packages"]))
    .split("\n").map((line) => line.trim().split(" "));
  const release = /^(?:bullseye|bookworm|trixie|forky|sid|stable|testing|unstable)$/;
  const row = rows.find(([, suite, origin]) => origin === "Debian" && release.test(suite ?? "")) ??
    rows.find(([site, suite]) => release.test(suite ?? "") && /\/debian\/?$/.test(site ?? ""));
  if (row?.[0] === undefined) throw new LabUnavailable("apt's sources name no Debian mirror");
  return row[0];
}

/** Options that make apt work in `folder` for one suite. Proxy settings and the like stay the host's. */
function privateOptions(folder: string, archives: string): string[] {
  return [
    `Dir::State=${folder}/state`,
    `Dir::State::lists=${folder}/lists`,
    `Dir::State::status=${folder}/status`,
    `Dir::Cache=${folder}/cache`,
    `Dir::Cache::archives=${archives}`,
    `Dir::Etc::sourcelist=${folder}/sources.list`,
    "Dir::Etc::sourceparts=-",
    "APT::Sandbox::User=root",
    "APT::Architecture=amd64",
    "APT::Architectures=amd64",
    "Acquire::Languages=none",
    "Acquire::http::Timeout=20",
    "Acquire::https::Timeout=20",
    "Acquire::Retries=2",
  ].flatMap((option) => ["-o", option]);
}

/** A private apt folder for `suite` with lists that are at most a day old. */
async function suiteFolder(suite: Suite): Promise<string> {
  const folder = `${labFolder()}/apt-${suite}`;
  const stamp = `${folder}/updated`;
  return await locked(`apt-${suite}`, async () => {
    if (exists(stamp) && Date.now() - (Deno.statSync(stamp).mtime?.getTime() ?? 0) < LISTS_MAX_AGE_MS) return folder;
    for (const name of ["lists/partial", "cache", "state"]) await Deno.mkdir(`${folder}/${name}`, { recursive: true });
    const mirror = await debianMirror();
    const signedBy = exists(KEYRING) ? `[signed-by=${KEYRING}] ` : "";
    await Deno.writeTextFile(`${folder}/status`, "");
    await Deno.writeTextFile(`${folder}/sources.list`, `deb ${signedBy}${mirror} ${suite} main\n`);
    say(`reading the package lists of ${suite}`);
    await runTool("apt-get", [...privateOptions(folder, `${folder}/cache`), "-qq", "--error-on=any", "update"]);
    await Deno.writeTextFile(stamp, "");
    return folder;
  });
}

/**
 * Unpacks one package file over `root`; the merged /usr links of the root are kept.
 *
 * @param exclude patterns of paths to leave out, as tar's --exclude has them (`./usr/share/doc/*`)
 */
export async function unpack(file: string, root: string, exclude: readonly string[] = []): Promise<void> {
  const script = `set -o pipefail; dpkg-deb --fsys-tarfile "$1" | tar -x --keep-directory-symlink --no-same-owner -C "$2" "\${@:3}"`;
  await runTool("bash", ["-c", script, "unpack", file, root, ...exclude.map((pattern) => `--exclude=${pattern}`)]);
}

/** The folders and links of a merged /usr, which packages expect to be there before them. */
export async function mergedUsr(root: string): Promise<void> {
  for (const name of ["bin", "sbin", "lib", "lib64"]) {
    await Deno.mkdir(`${root}/usr/${name}`, { recursive: true });
    await Deno.symlink(`usr/${name}`, `${root}/${name}`);
  }
}

async function unpackAll(folder: string, root: string): Promise<void> {
  await mergedUsr(root);
  for (const entry of Deno.readDirSync(folder)) if (entry.name.endsWith(".deb")) await unpack(`${folder}/${entry.name}`, root);
}

/**
 * Downloads `packages` of `suite` and everything they depend on, and removes the files when `use` has ended.
 *
 * @param use is given the folder of the .deb files
 * @throws LabUnavailable where apt or the mirror cannot be used
 */
export async function withPackages(suite: Suite, packages: readonly string[], use: (folder: string) => Promise<void>): Promise<void> {
  requireAmd64();
  const archives = await archivesFolder();
  try {
    const options = privateOptions(await suiteFolder(suite), archives);
    await runTool("apt-get", [...options, "-qq", "-y", "--no-install-recommends", "--download-only", "install", ...packages]);
    await use(archives);
  } finally {
    await Deno.remove(archives, { recursive: true });
  }
}

/**
 * A folder with `packages` of `suite` and everything they depend on, unpacked.
 *
 * @param name names the folder in the cache
 * @throws LabUnavailable where apt or the mirror cannot be used
 */
export async function unpackedRoot(name: string, suite: Suite, packages: string[]): Promise<string> {
  const hash = await recipeHash("root 1", suite, ...packages);
  return await ensureBuilt(name, hash, (root) => withPackages(suite, packages, (folder) => unpackAll(folder, root)));
}

/** Like {@linkcode unpackedRoot}, without dependencies; a meta package (`linux-image-*`) gives the package it stands for. */
export async function unpackSingle(root: string, suite: Suite, packages: string[]): Promise<void> {
  requireAmd64();
  const archives = await archivesFolder();
  try {
    const options = privateOptions(await suiteFolder(suite), archives);
    const names: string[] = [];
    for (const name of packages) {
      const depends = await runTool("apt-cache", [...options, "depends", name]);
      names.push(/Depends: (linux-image-\d\S*)/.exec(depends)?.[1] ?? name);
    }
    await runTool("apt-get", [...options, "-qq", "download", ...names], { cwd: archives });
    await unpackAll(archives, root);
  } finally {
    await Deno.remove(archives, { recursive: true });
  }
}

async function archivesFolder(): Promise<string> {
  const archives = await Deno.makeTempDir({ dir: labFolder(), prefix: "archives-" });
  await Deno.mkdir(`${archives}/partial`);
  return archives;
}

function requireAmd64(): void {
  if (Deno.build.os !== "linux" || Deno.build.arch !== "x86_64") throw new LabUnavailable("The lab's parts are for x86-64 Linux");
}

/** What to run, and with which environment, for a program inside an unpacked root: through that root's own loader. */
export function programInRoot(root: string, program: string): { command: string; args: string[] } {
  const libraries = ["usr/lib/x86_64-linux-gnu", "usr/lib"].map((path) => `${root}/${path}`).join(":");
  return { command: `${root}/lib64/ld-linux-x86-64.so.2`, args: ["--library-path", libraries, `${root}/usr/${program}`] };
}
