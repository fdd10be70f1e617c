/**
 * The lab VM's initramfs: busybox, the modules that reach a 9p root, and an init that hands over to the run's own script.
 *
 * @module
 */

import { CpioWriter } from "./cpio.ts";

/**
 * The modules to load for `wanted`, in an order in which each finds what it needs.
 *
 * @param modulesDep text of modules.dep: `path: path path`, each line's dependencies nearest first
 * @returns paths as modules.dep has them
 */
export function loadOrder(modulesDep: string, wanted: readonly string[]): string[] {
  const dependencies = new Map<string, string[]>();
  const pathOf = new Map<string, string>();
  for (const line of modulesDep.split("\n")) {
    const [path, rest] = line.split(":");
    if (!path) continue;
    dependencies.set(path, rest?.trim().split(" ").filter(Boolean) ?? []);
    pathOf.set(path.replace(/^.*\//, "").replace(/\.ko.*$/, "").replaceAll("-", "_"), path);
  }
  const order = new Set<string>();
  const visit = (path: string) => {
    for (const dependency of dependencies.get(path) ?? []) visit(dependency);
    order.add(path);
  };
  for (const name of wanted) {
    const path = pathOf.get(name.replaceAll("-", "_"));
    // What is not a module is built in.
    if (path) visit(path);
  }
  return [...order];
}

/**
 * /init: the root over 9p below a tmpfs (so the root is writable and forgets), the run's directory on /lab, then its start.sh.
 *
 * @param modules file names in /modules, in load order
 */
export function initScript(modules: readonly string[]): string {
  return `#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
for m in ${modules.join(" ")}; do $b insmod /modules/$m || echo "LAB-INSMOD $m"; done
# The machine is saved here (vm_qemu.ts); a mounted share could not be.
until read -t 0.1 answer; do echo LAB-READY; done
p=trans=virtio,version=9p2000.L,msize=512000
$b mount -t 9p -o $p,cache=loose,ro root /lower || echo LAB-NO-ROOT
$b mount -t tmpfs tmpfs /upper
$b mkdir /upper/u /upper/w
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/u,workdir=/upper/w overlay /new || echo LAB-NO-OVERLAY
$b mkdir -p /new/lab
$b mount -t 9p -o $p,cache=none lab /new/lab || echo LAB-NO-SHARE
$b mount --move /proc /new/proc
$b mount --move /dev /new/dev
exec $b switch_root /new /bin/sh /lab/start.sh
`;
}

/** A kernel module: name (ending in .ko) and content, not compressed. */
export interface ModuleFile {
  /** File name. */
  name: string;
  /** Content. */
  data: Uint8Array<ArrayBuffer>;
}

/**
 * The whole initramfs.
 *
 * @param modules in load order
 */
export function initramfs(busybox: Uint8Array<ArrayBuffer>, modules: readonly ModuleFile[]): Uint8Array<ArrayBuffer> {
  const archive = new CpioWriter();
  for (const path of ["bin", "modules", "proc", "dev", "lower", "upper", "new"]) archive.directory(path);
  archive.file("bin/busybox", busybox, 0o755);
  archive.file("init", new TextEncoder().encode(initScript(modules.map((module) => module.name))), 0o755);
  for (const { name, data } of modules) archive.file(`modules/${name}`, data, 0o644);
  return archive.finish();
}
