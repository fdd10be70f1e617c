/** `svq iova ranges`, `show`, `alloc`, `free`: on a device or a running relay. @module */
import { buildCommand } from "@stricli/core";
import { openSim } from "../../devices/open.ts";
import { EXIT, SvqError } from "../../errors.ts";
import type { IovaPermission } from "../../iova/allocation.ts";
import { type IovaDocument, iovaDocument } from "../../iova/document.ts";
import type { IovaPlan } from "../../iova/plan.ts";
import { ControlClient } from "../../relay/control.ts";
import { controlPath, relayNames } from "../../relay/runtime_dir.ts";
import { emptyLayout, RelayMemory } from "../../relay/relay_memory.ts";
import type { RelayStatus } from "../../relay/status.ts";
import { formatSize, formatSizeExact, parseAddress, parseSize } from "../../units.ts";
import { type DeviceAddress, formatDeviceAddress, parseDeviceAddress } from "../../vhost/address.ts";
import type { VhostBackend } from "../../vhost/backend.ts";
import { openKernel } from "../../vhost/open_kernel.ts";
import { nodeOfName } from "../../vhost/sysfs.ts";
import type { CliContext } from "../context.ts";
import { addressFlag, integerFlag, proposeAddresses, sizeFlag, textFlag } from "../parameters.ts";
import { aborted } from "../signals.ts";

/** What `svq.iova/1` says of a device or a relay. */
type LiveDocument = IovaDocument & { relay?: string; device: string; allocated?: unknown; freed?: unknown };

const target = {
  parse: String,
  brief: "Name of a running relay, or a device address",
  placeholder: "TARGET",
  proposeCompletions: (partial: string) => [...relayNames().filter((name) => name.startsWith(partial)), ...proposeAddresses(partial)],
} as const;

const asidFlag = integerFlag("Address space", { default: "0", min: 0, max: 65535 });

/** Names of relays have neither of these, device addresses always have one. */
function isAddress(text: string): boolean {
  return /[:/]/.test(text);
}

// The node, where it can be known: one device has several addresses.
function identity(address: string): string {
  try {
    const parsed = parseDeviceAddress(address);
    return parsed.kind === "vdpa" ? nodeOfName(parsed.name).node : formatDeviceAddress(parsed);
  } catch {
    return address;
  }
}

/** The running relay that has a device. */
async function relayOf(address: string): Promise<string | undefined> {
  const wanted = identity(address);
  for (const name of relayNames()) {
    try {
      using client = ControlClient.connect(name, controlPath(name));
      const { device } = await client.call("status") as RelayStatus;
      if (identity(device) === wanted) return name;
    } catch (error) {
      if (!(error instanceof SvqError)) throw error;
    }
  }
  return undefined;
}

async function ask(name: string, method: string, params: Record<string, unknown> = {}): Promise<LiveDocument> {
  using client = ControlClient.connect(name, controlPath(name));
  return await client.call(method, params) as LiveDocument;
}

/** Runs `work` on a device that no relay has. @param reach whether it must be reached, or facts that hold of its kind will do */
async function withDevice<T>(
  address: DeviceAddress,
  reach: boolean,
  work: (plan: IovaPlan, device?: VhostBackend) => Promise<T>,
): Promise<T> {
  switch (address.kind) {
    case "sim": {
      await using device = await openSim(address);
      return await work(emptyLayout(device.info), device);
    }
    case "vhost-vdpa":
    case "vdpa": {
      await using device = openKernel(address);
      return await work(emptyLayout(device.info), device);
    }
    default:
      if (reach) {
        throw new SvqError("CANNOT_MAP", `${formatDeviceAddress(address)}: nothing can be allocated without a relay`, {
          exitCode: EXIT.usage,
          hint: "Start a relay on it and name that: vhost-user and vhost-net devices hold no addresses of their own",
        });
      }
      // They take any address; what is connected to is disturbed by it, so nobody is.
      return await work(emptyLayout({ kind: "vhost-user" } as VhostBackend["info"]));
  }
}

function deviceDocument(plan: IovaPlan, address: DeviceAddress): LiveDocument {
  return { ...iovaDocument(plan), device: formatDeviceAddress(address) };
}

/** The layout as it is: of the relay, of the relay that has the device, or of a device that nobody uses. */
async function layout(text: string): Promise<LiveDocument> {
  if (!isAddress(text)) return await ask(text, "iova");
  const relay = await relayOf(text);
  if (relay !== undefined) return await ask(relay, "iova");
  const address = parseDeviceAddress(text);
  return await withDevice(address, false, (plan) => Promise.resolve(deviceDocument(plan, address)));
}

const OPENS = "A vhost-vdpa device that no relay has is opened, which resets it: name none that a VM is about to take.";

/** `svq iova ranges`. */
export const ranges = buildCommand({
  docs: {
    brief: "Show which addresses a device can be given, and which are free",
    fullDescription:
      `The usable range of each address space, the holes that the IOMMU keeps for itself, and what is free. ${OPENS}\n\nExample:\n  svq iova ranges /dev/vhost-vdpa-0`,
  },
  parameters: { positional: { kind: "tuple", parameters: [target] } },
  async func(this: CliContext, _flags: Record<never, never>, text: string): Promise<void> {
    const document = await layout(text);
    this.output.document({ ...document }, () => {
      const rows = [
        ...document.ranges.map((range) => ["usable", ...rangeCells(range), null]),
        ...document.reserved.map((hole) => ["reserved", ...rangeCells(hole), hole.tag]),
        ...document.free.map((range) => ["free", ...rangeCells(range), document.spaces.length > 1 ? `address space ${range.asid}` : null]),
      ];
      this.output.table(["what", "range", "size", "note"], rows);
      this.output.line();
      for (const space of document.spaces) {
        this.output.line(`address space ${space.asid}: fragmentation ${space.fragmentation.toFixed(3)}`);
      }
    });
  },
});

function rangeCells({ first, last }: { first: string; last: string }): string[] {
  return [`${first}-${last}`, formatSize(Number(BigInt(last) - BigInt(first) + 1n))];
}

/** `svq iova show`. */
export const show = buildCommand({
  docs: {
    brief: "Show what lies where in a relay's or a device's address space",
    fullDescription:
      `Guest memory, shadow rings and what svq iova alloc made. A device is looked up among the running relays first. ${OPENS}\n\nExample:\n  svq iova show vm1-disk`,
  },
  parameters: { positional: { kind: "tuple", parameters: [target] } },
  async func(this: CliContext, _flags: Record<never, never>, text: string): Promise<void> {
    const document = await layout(text);
    this.output.document({ ...document }, () => {
      if (document.allocations.length === 0) {
        this.output.info(
          document.relay === undefined
            ? "nothing is allocated: no relay has this device"
            : "nothing is allocated yet: no front-end has connected",
        );
      } else {
        printAllocations(this, document);
      }
    });
  },
});

function printAllocations({ output }: CliContext, document: LiveDocument): void {
  output.table(
    ["asid", "iova", "size", "perm", "gpa", "owner"],
    document.allocations.map(({ asid, iova, size_bytes, perm, tag }) => {
      const region = document.regions.find((region) => region.asid === asid && region.iova === iova);
      return [asid, iova, formatSizeExact(size_bytes), perm, region?.gpa, tag];
    }),
  );
  output.line();
  output.line(`fragmentation ${document.fragmentation.toFixed(3)}`);
}

interface AllocFlags {
  readonly iova?: bigint;
  readonly align?: number;
  readonly asid: number;
  readonly perm: IovaPermission;
  readonly tag: string;
  readonly map: boolean;
  readonly hold: boolean;
}

/** `svq iova alloc`. */
export const alloc = buildCommand({
  docs: {
    brief: "Take a range out of a device's address space",
    fullDescription:
      `In a running relay: guest memory and shadow rings keep clear of the range until svq iova free, also when the VMM connects anew. With --map, memory of the relay's own lies there, which the device can reach. Guest memory that is plugged in later on a range taken here is moved, and its queues stay in mode shadow.

On a vDPA device that no relay has: the range is mapped at the device, which shows whether its IOMMU takes it, and is given back at once: maps of a vDPA device end with the process that has it open. With --hold it stays until a signal comes. ${OPENS}

Example:
  svq iova alloc vm1-disk 2MiB --iova 0x7fe0000000 --tag doorbells`,
  },
  parameters: {
    flags: {
      iova: addressFlag("First address (default: the highest that is free)", { optional: true }),
      align: sizeFlag("Only multiples of this", { optional: true }),
      asid: asidFlag,
      perm: { kind: "enum", values: ["ro", "wo", "rw"] as const, brief: "What the device may do there", default: "rw" },
      tag: textFlag("Name of the owner, for people", { default: "operator" }),
      map: { kind: "boolean", brief: "Put memory of the relay's own behind it", default: false },
      hold: { kind: "boolean", brief: "On a device: keep it until a signal comes", default: false },
    },
    positional: {
      kind: "tuple",
      parameters: [target, { parse: parseSize, brief: "Bytes: whole pages", placeholder: "SIZE" }],
    },
  },
  async func(this: CliContext, flags: AllocFlags, text: string, size: number): Promise<void> {
    const { asid, perm, tag, map, hold } = flags;
    const place = {
      size,
      asid,
      perm,
      tag,
      ...(flags.iova === undefined ? {} : { iova: addressNumber(flags.iova) }),
      ...(flags.align === undefined ? {} : { align: flags.align }),
    };
    const print = (document: LiveDocument, note: string) => {
      const { iova, size_bytes } = document.allocated as { iova: string; size_bytes: number };
      this.output.document({ ...document }, () => `${iova} ${formatSizeExact(size_bytes)}${note}`);
    };
    const relay = isAddress(text) ? await relayOf(text) : text;
    if (relay !== undefined) return print(await ask(relay, "iova_alloc", { ...place, map }), "");
    const address = parseDeviceAddress(text);
    await withDevice(address, true, async (_plan, device) => {
      using memory = new RelayMemory({ info: device!.info, reach: (work) => work(device!) }, 0, []);
      const made = await memory.allocRange({ ...place, map: true });
      const document = deviceDocument(memory.plan, address);
      const allocated = document.allocations.find((one) => BigInt(one.iova) === made.iova && one.asid === made.asid);
      print({ ...document, allocated }, hold ? "" : ": the device takes it; given back");
      if (hold) await aborted(this.signal);
      await memory.freeRange({ iova: Number(made.iova), asid: made.asid });
    });
  },
});

function addressNumber(address: bigint): number {
  if (address <= BigInt(Number.MAX_SAFE_INTEGER)) return Number(address);
  throw new SvqError("IOVA_ADDRESS_LIMIT", `IOVA 0x${address.toString(16)} is above 2^52`, {
    exitCode: EXIT.usage,
    hint: "svq handles addresses below 2^52 (4 PiB).",
  });
}

/** `svq iova free`. */
export const free = buildCommand({
  docs: {
    brief: "Give back what svq iova alloc took in a relay",
    fullDescription:
      "Guest memory and shadow rings cannot be freed: they belong to the VMM and to the relay.\n\nExample:\n  svq iova free vm1-disk 0x7fe0000000",
  },
  parameters: {
    flags: {
      size: sizeFlag("Bytes, to be sure (default: what was allocated there)", { optional: true }),
      asid: asidFlag,
    },
    positional: {
      kind: "tuple",
      parameters: [target, { parse: parseAddress, brief: "First address", placeholder: "IOVA" }],
    },
  },
  async func(this: CliContext, flags: { readonly size?: number; readonly asid: number }, text: string, iova: bigint): Promise<void> {
    const relay = isAddress(text) ? await relayOf(text) : text;
    if (relay === undefined) {
      throw new SvqError("IOVA_NOT_ALLOCATED", `No relay has ${text}, so nothing is allocated there`, {
        exitCode: EXIT.noDevice,
        hint: "What a process has mapped at a vDPA device ends with that process: stop `svq iova alloc --hold`, or name the relay",
      });
    }
    const document = await ask(relay, "iova_free", {
      iova: addressNumber(iova),
      asid: flags.asid,
      ...(flags.size === undefined ? {} : { size: flags.size }),
    });
    this.output.document({ ...document }, () => `freed ${(document.freed as { iova: string }).iova}`);
  },
});
