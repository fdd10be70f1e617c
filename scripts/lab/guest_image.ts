/**
 * The guest of the lab: a Debian kernel, its virtio modules, and an initramfs of busybox, our checked workload and an init
 * that runs what the kernel command line asks for.
 *
 * @module
 */
import { unpackSingle } from "./apt.ts";
import { ensureBuilt, exists, recipeHash, runTool } from "./cache.ts";
import { CpioWriter } from "./cpio.ts";

const SOURCES = new URL("../../tests/lab/guest/", import.meta.url);

/** Kernel modules of the guest, each list in the order of its use by /init (`svq.modules=`). */
const MODULES: Record<string, string[]> = {
  base: ["virtio_pci"],
  disk: ["virtio_blk"],
  net: ["virtio_net"],
  fs: ["virtiofs"],
  console: ["virtio_console"],
  vsock: ["vmw_vsock_virtio_transport"],
};

/** Our own programs in the guest: the checked workload, and one end of a vsock connection. */
const PROGRAMS = ["svq_guest", "vsock_talk"];

/** Paths of what a guest boots. */
export interface GuestImage {
  kernel: string;
  initramfs: string;
  /** The checked workload, a static program that runs on the host too. */
  workload: string;
}

/** The name of a module's file, without folder and ending, as depends= and modprobe know it. */
function moduleName(path: string): string {
  return path.replace(/^.*\//, "").replace(/\.ko$/, "").replaceAll("-", "_");
}

function walk(folder: string, found: Map<string, string> = new Map()): Map<string, string> {
  for (const entry of Deno.readDirSync(folder)) {
    const path = `${folder}/${entry.name}`;
    if (entry.isDirectory) walk(path, found);
    else if (entry.name.endsWith(".ko")) found.set(moduleName(path), path);
  }
  return found;
}

/** Modules that `bytes` (an ELF module) names in its `depends=` entry. */
function dependencies(bytes: Uint8Array): string[] {
  const text = new TextDecoder("latin1").decode(bytes);
  const list = /\0depends=([^\0]*)\0/.exec(text)?.[1] ?? "";
  return list.split(",").filter((name) => name !== "").map((name) => name.replaceAll("-", "_"));
}

/** `names` after everything they need. A name without a file is built into the kernel or not in this one. */
function loadOrder(names: string[], files: Map<string, string>): string[] {
  const order: string[] = [];
  const visit = (name: string) => {
    const path = files.get(name);
    if (path === undefined || order.includes(name)) return;
    for (const needed of dependencies(Deno.readFileSync(path))) visit(needed);
    order.push(name);
  };
  names.forEach(visit);
  return order;
}

async function kernelAndBusybox(): Promise<string> {
  return await ensureBuilt("guest-base", await recipeHash("base 1"), async (root) => {
    await unpackSingle(root, "bookworm", ["linux-image-cloud-amd64", "busybox-static"]);
  });
}

/** A program of the guest, static. */
async function compile(source: string, target: string): Promise<void> {
  if (!await hasStaticCompiler()) {
    await runTool("apt-get", ["-qq", "-y", "--no-install-recommends", "install", "gcc", "libc6-dev"]);
  }
  await runTool("gcc", ["-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o", target, new URL(source, SOURCES).pathname]);
}

async function hasStaticCompiler(): Promise<boolean> {
  try {
    await runTool("gcc", ["--version"]);
    return exists((await runTool("gcc", ["-print-file-name=libc.a"])).trim());
  } catch {
    return false;
  }
}

/** Builds or finds the guest. @throws LabUnavailable */
export async function guestImage(): Promise<GuestImage> {
  const init = await Deno.readTextFile(new URL("init.sh", SOURCES));
  const sources = await Promise.all(PROGRAMS.map((program) => Deno.readTextFile(new URL(`${program}.c`, SOURCES))));
  const hash = await recipeHash("guest 1", init, ...sources, JSON.stringify(MODULES));
  const folder = await ensureBuilt("guest", hash, async (folder) => {
    const base = await kernelAndBusybox();
    const kernel = Array.from(Deno.readDirSync(`${base}/boot`)).find((entry) => entry.name.startsWith("vmlinuz-"))!;
    await Deno.copyFile(`${base}/boot/${kernel.name}`, `${folder}/vmlinuz`);
    for (const program of PROGRAMS) await compile(`${program}.c`, `${folder}/${program}`);
    const files = walk(`${base}/usr/lib/modules`);
    const image = new CpioWriter();
    for (const name of ["bin", "dev", "proc", "sys", "lib", "mnt", "tmp", "etc"]) image.directory(name);
    image.device("dev/console", 5, 1);
    image.device("dev/null", 1, 3);
    const busybox = ["usr/bin/busybox", "usr/sbin/busybox"].map((path) => `${base}/${path}`).find(exists)!;
    image.file("bin/busybox", await Deno.readFile(busybox), 0o755);
    for (const program of PROGRAMS) image.file(`bin/${program}`, await Deno.readFile(`${folder}/${program}`), 0o755);
    image.file("init", new TextEncoder().encode(init), 0o755);
    const packed = new Set<string>();
    for (const [list, names] of Object.entries(MODULES)) {
      const order = loadOrder(names, files);
      image.file(`lib/${list}.modules`, new TextEncoder().encode(order.map((name) => `${name}\n`).join("")), 0o644);
      for (const name of order) {
        if (packed.has(name)) continue;
        packed.add(name);
        image.file(`lib/${name}.ko`, await Deno.readFile(files.get(name)!), 0o644);
      }
    }
    await Deno.writeFile(`${folder}/initramfs`, image.finish());
  });
  return { kernel: `${folder}/vmlinuz`, initramfs: `${folder}/initramfs`, workload: `${folder}/svq_guest` };
}
