/**
 * The host's test lab: real parts (QEMU 7.2 and 10, storage daemons, DPDK, passt, virtiofsd, a guest), unpacked or built once
 * in a cache folder outside the checkout. Nothing is installed on the host, except a C compiler where there is none.
 *
 *     deno run -A scripts/lab/host.ts [PART]...
 *
 * @module
 */
import { programInRoot, type Suite, unpackedRoot } from "./apt.ts";
import { labFolder, LabUnavailable } from "./cache.ts";
import { type GuestImage, guestImage } from "./guest_image.ts";

/** A program to start: the command, the arguments that come before its own, and its environment. */
export interface Program {
  command: string;
  args: string[];
  env: Record<string, string>;
}

const ROOTS = {
  "qemu-7.2": { suite: "bookworm", packages: ["qemu-system-x86", "qemu-system-common", "qemu-utils"] },
  "qemu-10": { suite: "trixie", packages: ["qemu-system-x86", "qemu-system-common", "qemu-utils"] },
  dpdk: { suite: "trixie", packages: ["dpdk-dev", "librte-net-vhost25", "librte-net-virtio25"] },
  passt: { suite: "trixie", packages: ["passt"] },
  // An arm64 userland's libraries, and what runs its programs on another processor.
  aarch64: {
    suite: "bookworm",
    packages: ["qemu-user-static", "libc6-arm64-cross", "libgcc-s1-arm64-cross", "libstdc++6-arm64-cross"],
  },
  // What users type svq into and read its manual with.
  shells: { suite: "bookworm", packages: ["fish", "zsh", "mandoc"] },
  // Who else reads captures.
  wireshark: { suite: "bookworm", packages: ["tshark", "wireshark-common"] },
  virtiofsd: { suite: "trixie", packages: ["virtiofsd"] },
  // Two daemons, each in a mount namespace of its own.
  libvirt: { suite: "bookworm", packages: ["libvirt-daemon-system", "libvirt-clients", "libvirt-daemon-driver-qemu"] },
  "vhost-device": { suite: "sid", packages: ["vhost-device-vsock"] },
} as const satisfies Record<string, { suite: Suite; packages: readonly string[] }>;

/** A part that is a folder of unpacked packages. */
export type RootName = keyof typeof ROOTS;
/** A part of the lab. */
export type PartName = RootName | "guest";

/** Names of all parts. */
export const PARTS: readonly PartName[] = ["guest", ...Object.keys(ROOTS) as RootName[]];
const DEFAULT_PARTS: readonly PartName[] = ["qemu-7.2", "qemu-10", "guest"];

/** A part that is there, or why it is not. */
export type PartState = { ok: true; folder: string } | { ok: false; reason: string };

/** What {@linkcode ensureHostLab} found or built. */
export interface HostLab {
  /** The cache folder. */
  folder: string;
  /** The parts that were asked for. */
  parts: Partial<Record<PartName, PartState>>;
}

const states = new Map<PartName, Promise<PartState>>();

async function build(name: PartName): Promise<PartState> {
  try {
    if (name === "guest") return { ok: true, folder: (await guest()).kernel.replace(/\/[^/]*$/, "") };
    return { ok: true, folder: await root(name) };
  } catch (error) {
    if (error instanceof LabUnavailable) return { ok: false, reason: error.message };
    throw error;
  }
}

/** Makes sure of one part; asked for again, it answers at once. */
export function ensurePart(name: PartName): Promise<PartState> {
  let state = states.get(name);
  if (state === undefined) states.set(name, state = build(name));
  return state;
}

/** Makes sure of the parts that QEMU tests need (or of `names`). A part that cannot be had is a value, not an error. */
export async function ensureHostLab(names: readonly PartName[] = DEFAULT_PARTS): Promise<HostLab> {
  const folder = labFolder();
  await Deno.mkdir(folder, { recursive: true });
  const parts: Partial<Record<PartName, PartState>> = {};
  for (const name of names) parts[name] = await ensurePart(name);
  return { folder, parts };
}

/** The folder of an unpacked part. @throws LabUnavailable */
export async function root(name: RootName): Promise<string> {
  await Deno.mkdir(labFolder(), { recursive: true });
  return await unpackedRoot(name, ROOTS[name].suite, [...ROOTS[name].packages]);
}

/** The guest's kernel, initramfs and workload. @throws LabUnavailable */
export async function guest(): Promise<GuestImage> {
  await Deno.mkdir(labFolder(), { recursive: true });
  return await guestImage();
}

/** The QEMU versions of the lab. */
export type QemuVersion = "7.2" | "10";

/**
 * A program of a QEMU's packages, e.g. `qemu-system-x86_64` or `qemu-storage-daemon`.
 *
 * @throws LabUnavailable
 */
export async function qemuProgram(version: QemuVersion, program: string): Promise<Program> {
  const folder = await root(`qemu-${version}`);
  const { command, args } = programInRoot(folder, `bin/${program}`);
  const data = program.startsWith("qemu-system") ? ["-L", `${folder}/usr/share/qemu`, "-L", `${folder}/usr/share/seabios`] : [];
  // Loadable modules must be of the same build as the program; without this it would look among the host's.
  return { command, args: [...args, ...data], env: { QEMU_MODULE_DIR: `${folder}/usr/lib/x86_64-linux-gnu/qemu` } };
}

/**
 * DPDK's testpmd with the drivers for vhost-user (as back-end `net_vhost0` and as front-end `net_virtio_user0`), without huge
 * pages and without PCI. What follows is its own: `--vdev=net_vhost0,iface=SOCKET,queues=1 -- --forward-mode=icmpecho`.
 *
 * @param runtimeFolder where it keeps its files; one for each running testpmd
 * @throws LabUnavailable
 */
export async function testpmdProgram(runtimeFolder: string): Promise<Program> {
  const folder = await root("dpdk");
  const { command, args } = programInRoot(folder, "bin/dpdk-testpmd");
  const drivers = ["bus_vdev", "mempool_ring", "net_pcap", "net_vhost", "net_virtio"]
    .flatMap((name) => ["-d", `${folder}/usr/lib/x86_64-linux-gnu/librte_${name}.so.25`]);
  return {
    command,
    // Its polling thread may run on either processor: two testpmd that both had the second one to themselves would share it.
    args: [...args, "--lcores=0@(0-1),1@(0-1)", "--no-huge", "-m", "128", "--no-pci", ...drivers],
    env: { RUNTIME_DIRECTORY: runtimeFolder },
  };
}

/** passt. @throws LabUnavailable */
export async function passtProgram(): Promise<Program> {
  return { ...programInRoot(await root("passt"), "bin/passt"), env: {} };
}

/** `tshark` or `capinfos`. @throws LabUnavailable */
export async function wiresharkProgram(program: "tshark" | "capinfos"): Promise<Program> {
  return { ...programInRoot(await root("wireshark"), `bin/${program}`), env: {} };
}

/** virtiofsd. @throws LabUnavailable */
export async function virtiofsdProgram(): Promise<Program> {
  return { ...programInRoot(await root("virtiofsd"), "libexec/virtiofsd"), env: {} };
}

/** vhost-device-vsock. @throws LabUnavailable */
export async function vsockProgram(): Promise<Program> {
  return { ...programInRoot(await root("vhost-device"), "bin/vhost-device-vsock"), env: {} };
}

if (import.meta.main) {
  const unknown = Deno.args.find((name) => !PARTS.includes(name as PartName));
  if (unknown !== undefined) {
    console.error(`No part is called ${unknown}; there are ${PARTS.join(", ")}`);
    Deno.exit(2);
  }
  const lab = await ensureHostLab(Deno.args.length > 0 ? Deno.args as PartName[] : PARTS);
  for (const [name, state] of Object.entries(lab.parts)) {
    console.log(`${name}: ${state.ok ? state.folder : `not available: ${state.reason}`}`);
  }
  Deno.exit(Object.values(lab.parts).every((state) => state.ok) ? 0 : 1);
}
