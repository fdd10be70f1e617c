/** vp_vdpa behind an IOMMU, in one boot of the lab VM. */
import "./kernel/_only_iommu.ts";
import "./kernel/describe.ts";
import "./kernel/vdpa.ts";
import "./kernel/relay.ts";
import "./kernel/vmm.ts";
import "./kernel/vmm_net.ts";
