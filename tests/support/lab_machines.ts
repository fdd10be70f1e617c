/**
 * The machines that lab tests share. Tests of the same machine share one boot of it, so they leave its devices as they found them.
 *
 * @module
 */
import type { VmTestOptions } from "./lab_vm.ts";

const TIMEOUT_MS = 1_800_000;
const MAC = "02:00:00:00:00:01";

/** The machines, by what is special about them. */
export interface LabMachines {
  /** One device of each kind: net0, blk0, user0 (VDUSE, on /tmp/disk), vhost-net. */
  plain: VmTestOptions;
  /** Two of each to migrate between: sim0 and sim1 share their memory, user0 and user1 the file /tmp/disk, net0 and net1 a MAC address. */
  pair: VmTestOptions;
  /** vpblk and vpnet on vp_vdpa behind a 39-bit IOMMU; they offer packed rings. */
  behindIommu: VmTestOptions;
}

/** The machines for the tests of one file. @param file its `import.meta.url` */
export function labMachines(file: string): LabMachines {
  const add = (name: string, kind: "blk" | "net") =>
    `vdpa dev add name ${name} mgmtdev vdpasim_${kind}${kind === "net" ? ` mac ${MAC}` : ""}`;
  return {
    plain: {
      file,
      modules: ["tun", "vhost_net", "vhost_vdpa", "vduse", "vdpa_sim_net", "vdpa_sim_blk"],
      setup: [add("net0", "net"), add("blk0", "blk"), "truncate -s 16M /tmp/disk", "lab-vduse user0 /tmp/disk"],
      timeoutMs: TIMEOUT_MS,
    },
    pair: {
      file,
      modules: ["vhost_vdpa", "vduse", "vdpa_sim_net", "vdpa_sim_blk shared_backend=1"],
      setup: [
        ...[add("sim0", "blk"), add("sim1", "blk"), add("net0", "net"), add("net1", "net")],
        ...["truncate -s 16M /tmp/disk", "lab-vduse user0 /tmp/disk", "lab-vduse user1 /tmp/disk"],
      ],
      timeoutMs: TIMEOUT_MS,
    },
    behindIommu: {
      file,
      modules: ["vhost_vdpa"],
      setup: ["lab-vp 05 vpblk", "lab-vp 06 vpnet"],
      vp: { blk: true, net: true, packed: true },
      timeoutMs: TIMEOUT_MS,
    },
  };
}
