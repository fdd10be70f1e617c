/** `svq relay premap`. @module */
import { buildCommand } from "@stricli/core";
import { SvqError, toErrorRecord } from "../../errors.ts";
import { ControlClient } from "../../relay/control.ts";
import { layoutOf, type PremapRegion, type PremapReport } from "../../relay/premap.ts";
import { controlPath } from "../../relay/runtime_dir.ts";
import type { MemoryStatus } from "../../relay/status.ts";
import { formatSize, parseAddress, parseSize } from "../../units.ts";
import { askStatus } from "../ask_relay.ts";
import type { CliContext } from "../context.ts";
import { integerFlag, pathFlag, relayArgument, textFlag } from "../parameters.ts";
import { usageError } from "../usage.ts";

interface PremapFlags {
  readonly like?: string;
  readonly layout?: string;
  readonly region?: readonly PremapRegion[];
  readonly path?: string;
  readonly pid?: number;
  readonly fd?: number;
  readonly drop: boolean;
}

function regionOf(text: string): PremapRegion {
  const match = /^([^+@]+)\+([^+@]+)(?:@([^+@]+))?$/.exec(text);
  try {
    if (match === null) throw new Error("no + in it");
    return { gpa: Number(parseAddress(match[1]!)), size: parseSize(match[2]!), offset: Number(parseAddress(match[3] ?? "0")) };
  } catch {
    throw usageError(`${JSON.stringify(text)} is no region`, "write GPA+SIZE or GPA+SIZE@OFFSET, e.g. 0x100000000+2GiB@0x80000000");
  }
}

function readLayout(path: string): PremapRegion[] {
  try {
    const { memory } = JSON.parse(Deno.readTextFileSync(path)) as { memory?: MemoryStatus[] };
    if (!Array.isArray(memory)) throw new Error("it has no memory");
    return layoutOf(memory);
  } catch (cause) {
    throw new SvqError("BAD_LAYOUT", `${path} cannot be used: ${toErrorRecord(cause).message}`, {
      hint: "svq relay status SOURCE -j prints such a document while the guest runs there",
      cause,
    });
  }
}

async function regionsOf({ like, layout, region }: PremapFlags): Promise<PremapRegion[]> {
  const given = [like, layout, region].filter((value) => value !== undefined);
  if (given.length !== 1) {
    throw usageError("Say once where the guest's memory lies", "one of --like RELAY, --layout FILE or --region GPA+SIZE@OFFSET");
  }
  if (region !== undefined) return [...region];
  const regions = layout !== undefined ? readLayout(layout) : layoutOf((await askStatus(like!)).memory ?? []);
  if (regions.length > 0) return regions;
  throw new SvqError("NO_LAYOUT", `${like === undefined ? layout : `Relay ${like}`} knows no guest memory`, {
    hint: "the source's guest must run: its VMM gives its memory when the driver starts",
  });
}

/** `svq relay premap NAME`. */
export const premap = buildCommand({
  docs: {
    brief: "Take the destination guest's memory early, so that a migration does not wait for it",
    fullDescription:
      "A VMM gives its guest's memory when it starts the device: at the destination of a migration the guest stands still then, while the memory " +
      "is mapped (and pinned, where the device pins). This maps it beforehand. The layout is the source's; the memory itself is found in the VMM " +
      "that is connected, or named with --path, --pid and --fd. What the VMM gives later is compared by inode and place; what does not fit is let go of.\n\n" +
      "svq migrate vm does this by itself.\n\nExample:\n  svq relay premap vm1-disk-b --like vm1-disk-a",
  },
  parameters: {
    flags: {
      like: textFlag("The source's relay, on this host: its guest's layout is taken", { optional: true }),
      layout: pathFlag("The same from a file: what svq relay status -j printed at the source", { optional: true }),
      region: {
        kind: "parsed",
        parse: regionOf,
        variadic: true,
        optional: true,
        placeholder: "REGION",
        brief: "The same by hand: GPA+SIZE@OFFSET, guest address, size and place in the file; may be repeated",
      },
      path: pathFlag("The memory's file (memory-backend-file), as the relay sees it", { optional: true }),
      pid: integerFlag("The VMM's process (default: the one that is connected)", { optional: true, min: 1 }),
      fd: integerFlag("Descriptor of the memory in that process (default: found by its size)", { optional: true, min: 0 }),
      drop: { kind: "boolean", brief: "Let go of what was taken and not given by the VMM yet", default: false },
    },
    positional: { kind: "tuple", parameters: [relayArgument()] },
  },
  async func(this: CliContext, flags: PremapFlags, name: string): Promise<void> {
    const { path, pid, fd, drop } = flags;
    if (path !== undefined && (pid ?? fd) !== undefined) throw usageError("--path goes without --pid and --fd", "the file alone is enough");
    const where = { ...(path === undefined ? {} : { path: await Deno.realPath(path).catch(() => path) }), ...{ pid, fd } };
    const params = drop ? { drop } : { regions: await regionsOf(flags), ...where };
    using client = ControlClient.connect(name, controlPath(name));
    const report = await client.call("premap", params) as PremapReport;
    this.output.document(
      { ...report },
      () =>
        drop
          ? `${name}: ${report.dropped} regions let go of`
          : `${name}: ${report.regions} regions, ${
            formatSize(report.bytes)
          }, taken in ${report.ms} ms, which the start does not take any more`,
    );
  },
});
