/**
 * Builds the lab VM from Debian packages: a trixie kernel with its modules, the vDPA simulators and vp_vdpa compiled from
 * Debian's kernel source, and a root file system with QEMU 10. Reused while the recipe (this file and vm_initramfs.ts) is unchanged.
 *
 * `deno run -A scripts/lab/vm_build.ts` prints the folder.
 *
 * @module
 */
import { mergedUsr, unpack, withPackages } from "./apt.ts";
import { ensureBuilt, exists, LabUnavailable, recipeHash, runTool, say } from "./cache.ts";
import { initramfs, loadOrder } from "./vm_initramfs.ts";

const SUITE = "trixie";
const SOURCE = "linux-source-6.12";
const KERNEL_PACKAGES = ["linux-image-amd64", "linux-headers-amd64", SOURCE, "gcc-14", "make", "mawk", "zstd"];
const ROOT_PACKAGES = [
  ...[
    "bash",
    "busybox-static",
    "coreutils",
    "dash",
    "findutils",
    "grep",
    "iproute2",
    "kmod",
    "libc-bin",
    "libgcc-s1",
    "mount",
    "procps",
    "sed",
    "util-linux",
  ],
  ...["ipxe-qemu", "qemu-system-x86", "qemu-utils", "seabios"],
];

/** What Debian's build leaves out, as paths in the kernel source. */
const MODULE_SOURCES = {
  "vringh.c": "drivers/vhost/vringh.c",
  "vdpa_sim.c": "drivers/vdpa/vdpa_sim/vdpa_sim.c",
  "vdpa_sim.h": "drivers/vdpa/vdpa_sim/vdpa_sim.h",
  "vdpa_sim_net.c": "drivers/vdpa/vdpa_sim/vdpa_sim_net.c",
  "vdpa_sim_blk.c": "drivers/vdpa/vdpa_sim/vdpa_sim_blk.c",
  "vp_vdpa.c": "drivers/vdpa/virtio_pci/vp_vdpa.c",
};
const MODULE_MAKEFILE = "obj-m += vringh.o vdpa_sim.o vdpa_sim_net.o vdpa_sim_blk.o vp_vdpa.o\n";

const UNWANTED_FILES = ["doc", "man", "locale", "info", "lintian"].map((name) => `./usr/share/${name}/*`);

/** Drivers of hardware that the VM does not have; they are most of the image's size. */
const UNWANTED_MODULES = [
  ...["drivers/gpu", "drivers/media", "drivers/infiniband", "drivers/iio", "drivers/usb", "drivers/scsi", "drivers/hid", "drivers/mtd"],
  ...["drivers/net/wireless", "drivers/net/ethernet", "drivers/hwmon", "drivers/staging", "drivers/bluetooth", "net/bluetooth", "sound"],
].map((path) => `./usr/lib/modules/*/kernel/${path}/*`);

const BOOT_MODULES = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];

/** What is only needed to compile modules; removed from the finished root. */
const BUILD_ONLY = [
  "usr/src",
  "usr/lib/gcc",
  "usr/libexec/gcc",
  "usr/include",
  "usr/share/perl",
  "usr/lib/x86_64-linux-gnu/perl-base",
  "boot",
];

/** A finished lab VM. */
export interface LabVm {
  /** Holds everything below. */
  folder: string;
  /** Uncompressed kernel image for QEMU's -kernel. */
  kernel: string;
  /** The initramfs. */
  initramfs: string;
  /** The VM's root file system, which also holds the QEMU that runs it. */
  root: string;
}

/**
 * The lab VM, built now when it is not there. Safe against concurrent callers: one builds, the others wait.
 *
 * @throws LabUnavailable when not root or where packages cannot be had; Error when a step fails
 */
export async function ensureVm(): Promise<LabVm> {
  const texts = await Promise.all(["vm_build.ts", "vm_initramfs.ts"].map((name) => Deno.readTextFile(new URL(name, import.meta.url))));
  const folder = await ensureBuilt("vm", await recipeHash(...texts), async (target) => {
    if (Deno.uid() !== 0) throw new LabUnavailable("The lab VM is built by root only");
    await withPackages(SUITE, [...KERNEL_PACKAGES, ...ROOT_PACKAGES], async (packages) => {
      // From here on it is our own fault, which must not look as if the lab could not be had here.
      await build(layout(target), packages).catch((error) => {
        throw new Error(`The lab VM cannot be built: ${error.message}`, { cause: error });
      });
    });
  });
  return layout(folder);
}

function layout(folder: string): LabVm {
  return { folder, kernel: `${folder}/kernel`, initramfs: `${folder}/initramfs`, root: `${folder}/root` };
}

async function build(vm: LabVm, packages: string): Promise<void> {
  const { root } = vm;
  say("unpacking the VM's packages");
  await prepareRoot(root);
  const debs = Array.from(Deno.readDirSync(packages), (entry) => `${packages}/${entry.name}`).filter((path) => path.endsWith(".deb"))
    .sort();
  const sourceDeb = debs.find((deb) => deb.includes(`/${SOURCE}_`));
  if (sourceDeb === undefined) throw new Error(`${SOURCE} was not downloaded`);
  const others = debs.filter((deb) => deb !== sourceDeb);
  const unpackRest = async () => {
    for (let deb = others.shift(); deb !== undefined; deb = others.shift()) {
      await unpack(deb, root, [...UNWANTED_FILES, ...UNWANTED_MODULES]);
    }
  };
  await Promise.all([moduleSources(sourceDeb, `${root}/usr/src/svq-modules`), unpackRest(), unpackRest()]);
  await finishRoot(root);
  const release = Array.from(Deno.readDirSync(`${root}/usr/lib/modules`), (entry) => entry.name)[0];
  if (release === undefined) throw new Error("The kernel package has no modules");

  say("compiling kernel modules");
  await compileModules(root, release);
  await chroot(root, "depmod", release);
  await Deno.writeFile(vm.initramfs, await bootImage(root, release));
  await bootableKernel(root, release, vm.kernel);
  for (const part of BUILD_ONLY.filter((part) => exists(`${root}/${part}`))) await Deno.remove(`${root}/${part}`, { recursive: true });
}

async function chroot(root: string, ...words: string[]): Promise<void> {
  await runTool("chroot", [root, ...words], { env: { PATH: "/usr/sbin:/usr/bin:/sbin:/bin" } });
}

async function prepareRoot(root: string): Promise<void> {
  await mergedUsr(root);
  for (const name of ["etc", "dev", "proc", "sys", "run", "tmp", "lab", "var/tmp", "root"]) {
    await Deno.mkdir(`${root}/${name}`, { recursive: true });
  }
  await Deno.symlink("../run", `${root}/var/run`);
}

/** What maintainer scripts would have done, as far as the VM needs it. */
async function finishRoot(root: string): Promise<void> {
  await Deno.writeTextFile(`${root}/etc/passwd`, "root:x:0:0:root:/root:/bin/bash\n");
  await Deno.writeTextFile(`${root}/etc/group`, "root:x:0:\nkvm:x:104:\n");
  await Deno.writeTextFile(`${root}/etc/hosts`, "127.0.0.1 localhost lab\n::1 localhost\n");
  await Deno.writeTextFile(`${root}/etc/hostname`, "lab\n");
  for (const [link, target] of [["usr/bin/awk", "mawk"], ["usr/bin/sh", "bash"]] as const) {
    if (!exists(`${root}/${link}`)) await Deno.symlink(target, `${root}/${link}`);
  }
  await runTool("mknod", ["-m", "666", `${root}/dev/null`, "c", "1", "3"]);
  await chroot(root, "ldconfig");
}

/** Takes the wanted files out of the kernel source: an archive in an archive, so nothing else is written. */
async function moduleSources(deb: string, target: string): Promise<void> {
  await Deno.mkdir(target, { recursive: true });
  const members = Object.values(MODULE_SOURCES).map((path) => `${SOURCE}/${path}`);
  const script = `set -o pipefail; dpkg-deb --fsys-tarfile "$1" | tar -xO "./usr/src/$2.tar.xz" | xz -dcT2 |
    tar -x -C "$3" --transform='s|.*/||' "\${@:4}"`;
  await runTool("bash", ["-c", script, "source", deb, SOURCE, target, ...members]);
  await Deno.writeTextFile(`${target}/Makefile`, MODULE_MAKEFILE);
}

async function compileModules(root: string, release: string): Promise<void> {
  const make = ["make", "-s", "-j2", "-C", `/usr/src/linux-headers-${release}`, "M=/usr/src/svq-modules", "CC=gcc-14"];
  // Debian ships no vmlinux, so there is nothing to make BTF against.
  await chroot(root, ...make, "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules");
  const target = `${root}/usr/lib/modules/${release}/updates`;
  await Deno.mkdir(target, { recursive: true });
  for (const name of Object.keys(MODULE_SOURCES).filter((name) => name.endsWith(".c"))) {
    const module = name.replace(/c$/, "ko");
    await Deno.copyFile(`${root}/usr/src/svq-modules/${module}`, `${target}/${module}`);
  }
}

async function bootImage(root: string, release: string): Promise<Uint8Array<ArrayBuffer>> {
  const modules = `${root}/usr/lib/modules/${release}`;
  const order = loadOrder(await Deno.readTextFile(`${modules}/modules.dep`), BOOT_MODULES);
  const loaded = await Promise.all(order.map(async (path) => {
    const { stdout } = await new Deno.Command("xz", { args: ["-dc", `${modules}/${path}`], stdout: "piped" }).output();
    return { name: path.replace(/^.*\//, "").replace(/\.xz$/, ""), data: stdout };
  }));
  return initramfs(await Deno.readFile(`${root}/usr/bin/busybox`), loaded);
}

/**
 * The ELF image inside a bzImage, which QEMU enters directly (PVH): unpacking it under emulation would take seconds. Where the
 * payload lies says the kernel's boot protocol (Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length).
 */
async function bootableKernel(root: string, release: string, target: string): Promise<void> {
  const image = await Deno.readFile(`${root}/boot/vmlinuz-${release}`);
  const header = new DataView(image.buffer);
  const sector = 512;
  const start = (header.getUint8(0x1f1) + 1) * sector + header.getUint32(0x248, true);
  const sizeField = 4;
  const payload = image.subarray(start, start + header.getUint32(0x24c, true) - sizeField);
  await Deno.writeFile(`${root}/boot/payload.zst`, payload);
  await chroot(root, "zstd", "-dqf", "/boot/payload.zst", "-o", "/boot/vmlinux");
  await Deno.rename(`${root}/boot/vmlinux`, target);
}

if (import.meta.main) console.log((await ensureVm()).folder);
