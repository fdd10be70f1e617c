/**
 * Is this host ready? Each check says what it found and, where something is missing, what to do. Nothing is opened that
 * opening would change: a vhost-vdpa node is only looked at.
 *
 * @module
 */
import { formatSize } from "../units.ts";

/** What the host is to be used for: vhost-user only, the kernel's vhost devices, or devices made by VDUSE. */
export const PURPOSES = ["user", "kernel", "vduse"] as const;
/** One of {@linkcode PURPOSES}. */
export type Purpose = typeof PURPOSES[number];

/** The parts of the host that the checks look at. */
export interface DoctorHost {
  /** Text of a file, undefined when it cannot be read. */
  read(path: string): string | undefined;
  /** Names in a directory, empty when it cannot be read. */
  list(path: string): string[];
  /** Owner and mode of a file, undefined when it is not there. */
  stat(path: string): { uid: number; gid: number; mode: number } | undefined;
  /** Soft RLIMIT_MEMLOCK in bytes, or why FFI does not work. */
  memlock(): number | Error;
  /** Does V8 check each address of WebAssembly? */
  boundsChecked(): boolean | Error;
  /** Makes and seals a memfd. */
  tryMemfd(): Error | undefined;
  /** State of a Deno permission. */
  permission(name: "ffi" | "read" | "write" | "net" | "env"): string;
  /** Effective user and groups. */
  identity: { uid: number; gids: readonly number[] };
  /** Version of the runtime. */
  deno: string;
  /** `linux`. */
  os: string;
  /** `x86_64`. */
  arch: string;
  /** CPUs that this process may use. */
  cpus: number;
  /** Where control sockets go. */
  runtimeDirectory: string;
  /** PATH. */
  path: string;
}

/** Result of one check. */
export interface Check {
  /** Stable name. */
  name: string;
  /** Unknown: it could not be looked at. */
  status: "ok" | "missing" | "unknown";
  /** Missing, it makes the host not ready for a purpose that was asked for. */
  required: boolean;
  /** What was found. */
  found: string;
  /** What to do about it. */
  remedy?: string;
}

/** A module, what it is good for, and the kernel option that builds it. */
const MODULES: readonly { name: string; config: string; node?: string; purposes: readonly Purpose[]; required: boolean }[] = [
  { name: "vdpa", config: "CONFIG_VDPA", purposes: ["kernel", "vduse"], required: false },
  { name: "vhost_vdpa", config: "CONFIG_VHOST_VDPA", purposes: ["kernel", "vduse"], required: false },
  { name: "vhost_net", config: "CONFIG_VHOST_NET", node: "/dev/vhost-net", purposes: ["kernel"], required: false },
  { name: "tun", config: "CONFIG_TUN", node: "/dev/net/tun", purposes: ["kernel", "user"], required: false },
  { name: "vduse", config: "CONFIG_VDPA_USER", node: "/dev/vduse/control", purposes: ["vduse"], required: true },
];

const OLDEST_DENO = [2, 6];
const OLDEST_KERNEL: Record<Purpose, readonly [number, number, string]> = {
  user: [4, 19, "sealed memfds"],
  kernel: [5, 7, "vhost-vdpa"],
  vduse: [5, 15, "VDUSE"],
};
const MEMLOCK_WANTED = 2 ** 30;
const CAP_NET_ADMIN = 12n;

/** Runs all checks that matter for `purposes`. */
export function diagnose(host: DoctorHost, purposes: readonly Purpose[]): Check[] {
  const checks = [...runtimeChecks(host), ...kernelChecks(host, purposes)];
  if (purposes.includes("user")) checks.push(...userChecks(host));
  for (const module of MODULES) {
    if (module.purposes.some((purpose) => purposes.includes(purpose))) checks.push(moduleCheck(host, module));
  }
  checks.push(nodeCheck(host, "tun-node", "/dev/net/tun", { required: false, module: "tun" }));
  if (purposes.includes("kernel")) checks.push(...kernelDeviceChecks(host));
  if (purposes.includes("vduse")) checks.push(...vduseChecks(host));
  checks.push(...resourceChecks(host, purposes));
  return checks;
}

function check(name: string, required: boolean, problem: string | undefined, found: string): Check {
  return problem === undefined ? { name, status: "ok", required, found } : { name, status: "missing", required, found, remedy: problem };
}

function runtimeChecks(host: DoctorHost): Check[] {
  const [major = 0, minor = 0] = host.deno.split(".").map(Number);
  const newEnough = major > OLDEST_DENO[0]! || (major === OLDEST_DENO[0] && minor >= OLDEST_DENO[1]!);
  const memlock = host.memlock();
  const denied = (["ffi", "read", "write", "net", "env"] as const).filter((name) => host.permission(name) !== "granted");
  const supported = host.os === "linux" && ["x86_64", "aarch64"].includes(host.arch);
  return [
    check("platform", true, supported ? undefined : "use Linux on x86_64 or aarch64", `${host.os} ${host.arch}`),
    check("deno", true, newEnough ? undefined : `install Deno ${OLDEST_DENO.join(".")} or newer`, host.deno),
    check(
      "permissions",
      true,
      denied.length === 0 ? undefined : `run with ${denied.map((name) => `--allow-${name}`).join(" ")}, or with -A`,
      denied.length === 0 ? "ffi, read, write, net and env granted" : `not granted: ${denied.join(", ")}`,
    ),
    check(
      "libc",
      true,
      memlock instanceof Error ? "use a Linux with glibc (libc.so.6)" : undefined,
      memlock instanceof Error ? memlock.message : "callable",
    ),
    wasmCheck(host.boundsChecked()),
  ];
}

function wasmCheck(checked: boolean | Error): Check {
  if (checked instanceof Error) return { name: "wasm", status: "unknown", required: false, found: checked.message };
  const remedy = "start svq as one executable or by deno task svq, or deno with --v8-flags=--no-wasm-bounds-checks: relaying is faster";
  const found = checked ? "V8 checks each address of WebAssembly" : "guarded by pages, no bounds checks";
  return { name: "wasm", status: "ok", required: false, found, ...(checked ? { remedy } : {}) };
}

function kernelChecks(host: DoctorHost, purposes: readonly Purpose[]): Check[] {
  const release = host.read("/proc/sys/kernel/osrelease")?.trim() ?? "unknown";
  const [major = 0, minor = 0] = release.split(/[.-]/).map(Number);
  const lacking = purposes.filter((purpose) => {
    const [wantedMajor, wantedMinor] = OLDEST_KERNEL[purpose];
    return major < wantedMajor || (major === wantedMajor && minor < wantedMinor);
  });
  const remedy = lacking.map((purpose) => `${OLDEST_KERNEL[purpose][2]} needs Linux ${OLDEST_KERNEL[purpose].slice(0, 2).join(".")}`).join(
    "; ",
  );
  return [check("kernel", true, lacking.length === 0 ? undefined : remedy, release)];
}

function userChecks(host: DoctorHost): Check[] {
  const memfd = host.tryMemfd();
  const directory = host.runtimeDirectory;
  const nearest = [directory, directory.replace(/\/[^/]+$/, "") || "/"].find((path) => host.stat(path) !== undefined);
  const writable = nearest !== undefined && mayUse(host, nearest, 3);
  return [
    check(
      "memfd",
      true,
      memfd === undefined ? undefined : "allow memfd_create(2): a seccomp filter or an old kernel refuses it",
      memfd?.message ?? "can be made and sealed",
    ),
    check(
      "runtime-directory",
      true,
      writable ? undefined : "set SVQ_RUNTIME_DIR to a directory of your own",
      `${directory} ${writable ? nearest === directory ? "is writable" : "can be made" : "cannot be written"}`,
    ),
  ];
}

function moduleCheck(host: DoctorHost, module: { name: string; config: string; node?: string; required: boolean }): Check {
  const { name, config, node, required } = module;
  const label = `module-${name.replaceAll("_", "-")}`;
  const loaded = host.read("/proc/modules")?.split("\n").some((line) => line.startsWith(`${name} `)) ?? false;
  if (loaded) return check(label, required, undefined, "loaded");
  if (host.stat(`/sys/module/${name}`) !== undefined) return check(label, required, undefined, "built in");
  const release = host.read("/proc/sys/kernel/osrelease")?.trim() ?? "";
  const pattern = new RegExp(`/${name.replaceAll("_", "[-_]")}\\.ko`);
  if (pattern.test(host.read(`/lib/modules/${release}/modules.builtin`) ?? "")) return check(label, required, undefined, "built in");
  if (pattern.test(host.read(`/lib/modules/${release}/modules.dep`) ?? "")) return check(label, required, `modprobe ${name}`, "not loaded");
  // Built into the kernel without parameters, it shows up nowhere but in its node.
  if (node !== undefined && host.stat(node) !== undefined) return check(label, required, undefined, `${node} exists`);
  return check(label, required, `use a kernel with ${config}, or install its modules`, "not in this kernel");
}

function nodeCheck(host: DoctorHost, name: string, path: string, options: { required: boolean; module: string }): Check {
  const { required, module } = options;
  if (host.stat(path) === undefined) {
    return check(name, required, `modprobe ${module}; in a container, pass ${path} in`, `${path} does not exist`);
  }
  if (!mayUse(host, path, 6)) {
    return check(name, required, `run as root, or give this user access: setfacl -m u:USER:rw ${path}`, `no permission for ${path}`);
  }
  return check(name, required, undefined, `${path} is accessible`);
}

function kernelDeviceChecks(host: DoctorHost): Check[] {
  const nodes = host.list("/dev").filter((name) => name.startsWith("vhost-vdpa-")).sort();
  const net = nodeCheck(host, "vhost-net-node", "/dev/vhost-net", { required: false, module: "vhost_net" });
  const vdpa = nodes.length === 0
    ? check(
      "vhost-vdpa-node",
      false,
      "make one: vdpa dev add name NAME mgmtdev DEV, with vhost_vdpa loaded (svq device run --vduse makes one too)",
      "no /dev/vhost-vdpa-N",
    )
    : nodeCheck(host, "vhost-vdpa-node", `/dev/${nodes.find((name) => mayUse(host, `/dev/${name}`, 6)) ?? nodes[0]}`, {
      required: false,
      module: "vhost_vdpa",
    });
  const usable = [vdpa, net].filter((node) => node.status === "ok");
  const groups = host.list("/sys/kernel/iommu_groups").length;
  return [
    vdpa,
    net,
    check(
      "kernel-device",
      true,
      usable.length > 0 ? undefined : "one of vhost-vdpa-node and vhost-net-node must be ok: see their remedies",
      usable.length > 0
        ? `usable: ${usable.map((node) => node.name.replace(/-node$/, "")).join(", ")}`
        : "neither vhost-vdpa nor vhost-net is usable",
    ),
    check(
      "iommu",
      false,
      groups > 0 ? undefined : "boot with intel_iommu=on or amd_iommu=on: vDPA hardware needs it, simulators and vhost-net do not",
      `${groups} IOMMU groups`,
    ),
  ];
}

function vduseChecks(host: DoctorHost): Check[] {
  const effective = /^CapEff:\s*([0-9a-f]+)/m.exec(host.read("/proc/self/status") ?? "")?.[1] ?? "0";
  const admin = (BigInt(`0x${effective}`) >> CAP_NET_ADMIN & 1n) === 1n;
  return [
    nodeCheck(host, "vduse-node", "/dev/vduse/control", { required: true, module: "vduse" }),
    check(
      "net-admin",
      true,
      admin ? undefined : "run as root or with CAP_NET_ADMIN: adding a vdpa device needs it",
      admin ? "CAP_NET_ADMIN held" : "CAP_NET_ADMIN missing",
    ),
  ];
}

function resourceChecks(host: DoctorHost, purposes: readonly Purpose[]): Check[] {
  const checks: Check[] = [];
  const memlock = host.memlock();
  if (purposes.includes("kernel") && !(memlock instanceof Error)) {
    const enough = memlock >= MEMLOCK_WANTED;
    const remedy =
      "raise it: ulimit -l unlimited, or LimitMEMLOCK=infinity in a unit; vDPA devices that pin guest memory count all of it (root too)";
    checks.push(check("memlock", false, enough ? undefined : remedy, memlock === Infinity ? "unlimited" : `limit ${formatSize(memlock)}`));
  }
  checks.push(check("cpus", false, host.cpus >= 2 ? undefined : "a relay that polls wants a CPU of its own", `${host.cpus} usable`));
  const huge = Number(/^HugePages_Free:\s*(\d+)/m.exec(host.read("/proc/meminfo") ?? "")?.[1] ?? 0);
  checks.push(
    check(
      "hugepages",
      false,
      huge > 0 ? undefined : "not needed; large guests map faster with them: sysctl vm.nr_hugepages=N",
      `${huge} free`,
    ),
  );
  if (purposes.includes("user")) {
    const qemu = host.path.split(":").map((directory) => `${directory}/qemu-system-${host.arch}`).find((path) =>
      host.stat(path) !== undefined
    );
    checks.push(
      check(
        "qemu",
        false,
        qemu === undefined ? "not needed for the embedded parts; install QEMU to run guests here" : undefined,
        qemu ?? "not on PATH",
      ),
    );
  }
  return checks;
}

/** May this process use `path` in all ways of `wanted` (4 read, 2 write, 1 search)? */
function mayUse(host: DoctorHost, path: string, wanted: number): boolean {
  const file = host.stat(path);
  if (file === undefined) return false;
  const { uid, gids } = host.identity;
  if (uid === 0) return true;
  const shift = file.uid === uid ? 6 : gids.includes(file.gid) ? 3 : 0;
  return (file.mode >> shift & wanted) === wanted;
}
