/** Each of the kernel's devices by itself, in one boot of the lab VM. */
import "./kernel/_only_plain.ts";
import "./kernel/describe.ts";
import "./kernel/probe.ts";
import "./kernel/vdpa.ts";
import "./kernel/relay.ts";
import "./kernel/modules.ts";
