import assert from "node:assert/strict";
import { type Check, diagnose, type DoctorHost, type Purpose } from "../../src/cli/doctor.ts";
import { pinnedChecks } from "../../src/cli/doctor_pinned.ts";
import { assertMatchesSchema } from "../support/schema.ts";

/** A host with everything, changed by `changes`. */
function host(changes: Partial<DoctorHost> & { files?: Record<string, string>; nodes?: Record<string, number> } = {}): DoctorHost {
  const files: Record<string, string> = {
    "/proc/sys/kernel/osrelease": "6.12.1-test\n",
    "/proc/modules": "vhost_vdpa 1 0 - Live 0x0\nvdpa 1 0 - Live 0x0\nvhost_net 1 0 - Live 0x0\nvduse 1 0 - Live 0x0\ntun 1 0 - Live 0x0\n",
    "/proc/self/status": "CapEff:\t000001ffffffffff\n",
    "/proc/meminfo": "HugePages_Free:     12\n",
    ...changes.files,
  };
  const nodes: Record<string, number> = {
    "/dev/vhost-vdpa-0": 0o600,
    "/dev/vhost-net": 0o660,
    "/dev/vduse/control": 0o600,
    "/dev/net/tun": 0o666,
    "/run": 0o755,
    "/usr/bin/qemu-system-x86_64": 0o755,
    ...changes.nodes,
  };
  return {
    read: (path) => files[path],
    list: (path) =>
      path === "/sys/kernel/iommu_groups"
        ? ["0", "1"]
        : Object.keys(nodes).filter((node) => node.startsWith(`${path}/`)).map((node) => node.slice(path.length + 1)),
    stat: (path) => (nodes[path] ?? -1) < 0 ? undefined : { uid: 0, gid: 0, mode: nodes[path]! },
    memlock: () => Infinity,
    boundsChecked: () => false,
    tryMemfd: () => undefined,
    permission: () => "granted",
    identity: { uid: 0, gids: [0] },
    deno: "2.9.6",
    os: "linux",
    arch: "x86_64",
    cpus: 4,
    runtimeDirectory: "/run/svq",
    path: "/bin:/usr/bin",
    ...changes,
  };
}

const ALL: Purpose[] = ["user", "kernel", "vduse"];
const missing = (checks: Check[]) => checks.filter((check) => check.status !== "ok").map((check) => check.name);
const find = (checks: Check[], name: string) => checks.find((check) => check.name === name)!;

Deno.test("a host with everything misses nothing, and each check has a name of its own", () => {
  const checks = diagnose(host(), ALL);
  assert.deepEqual(missing(checks), []);
  assert.equal(new Set(checks.map((check) => check.name)).size, checks.length);
  assertMatchesSchema("doctor", { schema: "svq.doctor/1", purposes: ALL, ready: true, checks });
});

Deno.test("what is missing has a remedy, and only the purposes asked for count", () => {
  const none = host({ files: { "/proc/modules": "" }, nodes: { "/dev/vhost-vdpa-0": -1, "/dev/vhost-net": -1, "/dev/vduse/control": -1 } });
  for (const check of diagnose(none, ALL)) assert.equal(check.remedy !== undefined, check.status !== "ok", check.name);
  assert.equal(diagnose(none, ["user"]).some((check) => check.status !== "ok" && check.required), false);
  const required = diagnose(none, ALL).filter((check) => check.status !== "ok" && check.required).map((check) => check.name);
  assert.deepEqual(required.sort(), ["kernel-device", "module-vduse", "vduse-node"]);
});

Deno.test("one usable kernel device is enough for the kernel purpose", () => {
  const onlyNet = diagnose(host({ nodes: { "/dev/vhost-vdpa-0": -1 } }), ["kernel"]);
  assert.equal(find(onlyNet, "kernel-device").status, "ok");
  assert.equal(find(onlyNet, "vhost-vdpa-node").status, "missing");
});

Deno.test("a node without permission for this user is not usable", () => {
  const user = diagnose(host({ identity: { uid: 1000, gids: [1000] }, runtimeDirectory: "/tmp/svq-1000", nodes: { "/tmp": 0o1777 } }), ALL);
  assert.match(find(user, "vhost-vdpa-node").found, /no permission/);
  assert.equal(find(user, "tun-node").status, "ok");
  assert.equal(find(user, "runtime-directory").status, "ok");
  const group = diagnose(host({ identity: { uid: 1000, gids: [1000, 0] } }), ["kernel"]);
  assert.equal(find(group, "vhost-net-node").status, "ok", "the group may use it");
});

Deno.test("a module is loaded, built in, can be loaded, or is not there", () => {
  const release = "/lib/modules/6.12.1-test/";
  const state = (files: Record<string, string>, nodes: Record<string, number> = {}) =>
    find(diagnose(host({ files: { "/proc/modules": "", ...files }, nodes }), ["kernel"]), "module-vhost-vdpa");
  assert.equal(state({}, { "/sys/module/vhost_vdpa": 0o755 }).found, "built in");
  assert.equal(state({ [`${release}modules.builtin`]: "kernel/drivers/vhost/vhost-vdpa.ko\n" }).found, "built in");
  assert.equal(state({ [`${release}modules.dep`]: "kernel/drivers/vhost/vhost_vdpa.ko.xz: a.ko\n" }).remedy, "modprobe vhost_vdpa");
  assert.match(state({}).remedy!, /CONFIG_VHOST_VDPA/);
});

Deno.test("old kernels, old runtimes, missing permissions and small limits are found", () => {
  const found = (changes: Parameters<typeof host>[0]) => missing(diagnose(host(changes), ALL));
  assert.deepEqual(found({ files: { "/proc/sys/kernel/osrelease": "5.10.0\n" } }), ["kernel"]);
  assert.deepEqual(found({ deno: "2.5.9" }), ["deno"]);
  assert.deepEqual(found({ deno: "3.0.0" }), []);
  assert.deepEqual(found({ permission: (name) => name === "ffi" ? "prompt" : "granted" }), ["permissions"]);
  assert.deepEqual(found({ memlock: () => 8 * 2 ** 20 }), ["memlock"]);
  assert.deepEqual(found({ memlock: () => new Error("no libc") }), ["libc"]);
  assert.deepEqual(found({ tryMemfd: () => new Error("refused") }), ["memfd"]);
  assert.deepEqual(found({ files: { "/proc/self/status": "CapEff:\t0000000000000000\n" } }), ["net-admin"]);
  assert.deepEqual(found({ os: "darwin" }), ["platform"]);
});

Deno.test("a balloon in front of a device that pins memory makes a host not ready; without such a device it is a hint", () => {
  const devices = [{ path: "/machine/peripheral/b", kind: "balloon", freePageReporting: true }] as const;
  const vm = { path: "/run/vm.qmp", devices: [...devices] };
  const [pinned] = pinnedChecks(["disk"], [vm]);
  assert.deepEqual([pinned!.status, pinned!.required], ["missing", true]);
  assert.match(pinned!.found, /peripheral\/b \(balloon with free page reporting\); relay disk pins guest memory/);
  const [harmless] = pinnedChecks([], [vm]);
  assert.deepEqual([harmless!.status, harmless!.required], ["missing", false]);
  assert.equal(pinnedChecks(["disk"], [{ path: "/run/vm.qmp", devices: [] }])[0]!.status, "ok");
  const [unreachable] = pinnedChecks(["disk"], [{ path: "/run/vm.qmp", devices: new Error("nobody listens") }]);
  assert.deepEqual([unreachable!.status, unreachable!.required], ["unknown", true]);
  const [unasked] = pinnedChecks(["disk"], []);
  assert.match(unasked!.remedy!, /svq doctor --qmp/);
  assert.deepEqual(pinnedChecks([], []), []);
});
