/**
 * Pairs of the interoperability matrix that are not run, and why: what cannot be, and what nobody has built a run for.
 *
 * @module
 */
const NET_ONLY = "impossible: virtio-user drives network cards only";
const NO_WORKLOAD = "impossible: `svq drive` has checked workloads for disks, loops and networks that echo, and none for this device";
const NO_RUN = "not run: nothing in this script sets it up";
const IN_VM = "not run: the device is in the lab VM, where QEMU is emulated twice";
const NO_LIBVIRT = "not run: the lab VM has no libvirt";

const REASONS: Record<string, Record<string, string>> = {
  "QEMU 7.2": { passt: NO_RUN, "vhost-net": IN_VM, vdpa_sim: IN_VM, VDUSE: IN_VM },
  "QEMU 10": { "vhost-net": IN_VM, VDUSE: IN_VM },
  libvirt: {
    passt: "not run: libvirt starts passt by itself, without a relay between",
    virtiofsd: "not run: libvirt starts virtiofsd by itself, without a relay between (`<source socket=…>` would take one)",
    "sim:blk": "not run: libvirt and QEMU see the same relay as with the storage daemon",
    "sim:net": "not run: libvirt and QEMU see the same relay as with testpmd",
    "vhost-net": NO_LIBVIRT,
    vdpa_sim: NO_LIBVIRT,
    VDUSE: NO_LIBVIRT,
  },
  "DPDK virtio-user": {
    "storage daemon": NET_ONLY,
    passt: NO_RUN,
    virtiofsd: NET_ONLY,
    "sim:blk": NET_ONLY,
    "vhost-net": "not run: the lab VM has no DPDK",
    vdpa_sim: "not run: the lab VM has no DPDK",
    VDUSE: NET_ONLY,
  },
  "embedded driver": { testpmd: NO_RUN, passt: NO_WORKLOAD, virtiofsd: NO_WORKLOAD },
};

/** A row for each of them. */
export const MISSING_PAIRS: { front: string; device: string; tasks: Record<"I/O" | "switch under load" | "migrate", string> }[] = Object
  .entries(REASONS).flatMap(([front, devices]) =>
    Object.entries(devices).map(([device, reason]) => ({
      front,
      device,
      tasks: { "I/O": reason, "switch under load": reason, migrate: reason },
    }))
  );
