import assert from "node:assert/strict";
import { checkPinnedMemory, pinnedMemoryChecks, reclaimingDevices } from "../../src/migration/pinned_memory.ts";
import { QmpError } from "../../src/migration/qmp.ts";
import type { RelayFacts } from "../../src/migration/vm_checks.ts";
import type { RelayStatus } from "../../src/relay/status.ts";

function relay(name: string, pins: boolean | null): RelayFacts {
  return { name, status: { pins_memory: pins } as RelayStatus };
}

/** A QEMU whose object tree has these children; it must not be asked where `tree` is undefined. */
function qemu(tree: Record<string, [string, string][]>, reporting: string[] = []) {
  return {
    execute(command: string, args?: Record<string, unknown>): Promise<unknown> {
      const { path } = args as { path: string };
      if (command === "qom-list" && path in tree) return Promise.resolve(tree[path]!.map(([name, type]) => ({ name, type })));
      if (command === "qom-get" && reporting.includes(path)) return Promise.resolve(true);
      return Promise.reject(new QmpError(command, "GenericError", "no"));
    },
  };
}

Deno.test("balloons, free page reporting and virtio-mem are found wherever QEMU keeps its devices", async () => {
  const tree = {
    "/machine/peripheral": [["m0", "child<virtio-mem-pci>"], ["d0", "child<vhost-user-blk-pci>"], ["type", "string"]],
    "/machine/peripheral-anon": [["device[0]", "child<virtio-balloon-pci-non-transitional>"], ["device[1]", "child<virtio-balloon-pci>"]],
  } satisfies Record<string, [string, string][]>;
  assert.deepEqual(await reclaimingDevices(qemu(tree, ["/machine/peripheral-anon/device[1]"])), [
    { path: "/machine/peripheral/m0", kind: "virtio-mem", freePageReporting: false },
    { path: "/machine/peripheral-anon/device[0]", kind: "balloon", freePageReporting: false },
    { path: "/machine/peripheral-anon/device[1]", kind: "balloon", freePageReporting: true },
  ]);
});

Deno.test("a migration is refused where the device pins memory that the VMM may give back", () => {
  const devices = [{ path: "/machine/peripheral/b", kind: "balloon", freePageReporting: true }] as const;
  const [check, ...rest] = checkPinnedMemory("source", [relay("one", false), relay("two", true)], devices);
  assert.deepEqual(rest, []);
  assert.deepEqual([check!.code, check!.ok], ["PINNED_MEMORY", false]);
  assert.match(check!.message, /Relay two \(source\).*peripheral\/b \(balloon with free page reporting\)/);
  assert.equal(checkPinnedMemory("source", [relay("two", true)], [])[0]!.ok, true);
});

Deno.test("QEMU is not asked where no device pins memory", async () => {
  const never = { execute: () => Promise.reject(new Error("asked")) };
  assert.deepEqual(await pinnedMemoryChecks("destination", never, [relay("one", false), relay("two", null), { name: "away" }]), []);
});
