/** VMMs on the kernel's devices, and migrations between two of them, in one boot of the lab VM. */
import "./kernel/_only_pair.ts";
import "./kernel/migration.ts";
import "./kernel/vmm.ts";
import "./kernel/vmm_net.ts";
