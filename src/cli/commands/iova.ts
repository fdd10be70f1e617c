/** `svq iova`. @module */
import { buildCommand, buildRouteMap } from "@stricli/core";
import { EXIT, SvqError } from "../../errors.ts";
import { iovaDocument } from "../../iova/document.ts";
import { parseMemoryMap, parseRange, parseRegion, parseReserved } from "../../iova/memory_map.ts";
import { type ArenaRequest, type IovaPlan, planIova, type RegionRequest } from "../../iova/plan.ts";
import { formatAddress, formatRange, IOVA_MAX, type IovaRange, rangeSize, type ReservedRange } from "../../iova/range.ts";
import { ADDRESS_LIMIT } from "../../memory/region.ts";
import { formatSize, formatSizeExact, parseInteger, parseSize, quote } from "../../units.ts";
import type { CliContext } from "../context.ts";
import { integerFlag, sizeFlag } from "../parameters.ts";
import { usageError } from "../usage.ts";
import { alloc, free, ranges, show } from "./iova_live.ts";

/** An arena as typed: its name may be left out. */
type ArenaFlag = Omit<ArenaRequest, "name"> & { name?: string };

interface Flags {
  readonly region?: readonly RegionRequest[];
  readonly range?: readonly IovaRange[];
  readonly reserved?: readonly ReservedRange[];
  readonly arena?: readonly ArenaFlag[];
  readonly align: number;
  readonly asids: number;
}

const plan = buildCommand({
  docs: {
    brief: "Lay out guest memory and shadow rings in a device's address range",
    fullDescription: `Lay out guest memory and shadow rings in a device's address range, without any device.

Guest memory keeps IOVA = GPA wherever the range and the holes allow; arenas (shadow rings) go top-down from the end of the range; what cannot keep its address is moved to a free place.

MAP is a file, or - for stdin: lines FIRST-LAST or START+SIZE (then optionally =IOVA and a name), the guest's /proc/iomem read as root, QEMU's "info mtree -f", or JSON [{gpa, size_bytes}].

Example:
  svq iova plan --region 0x0+2GiB --region 4GiB+6GiB --range 0x0-0x7fffffffff --reserved 0xfee00000-0xfeefffff=msi --arena rings=8MiB`,
  },
  parameters: {
    flags: {
      region: {
        kind: "parsed",
        parse: parseRegion,
        brief: "Guest region, e.g. 0x100000000+2GiB, with =IOVA for a fixed place",
        placeholder: "REGION",
        variadic: true,
        optional: true,
      },
      range: {
        kind: "parsed",
        parse: parseRange,
        brief: "Usable range of the device, both ends inclusive; all 64 bits when left out",
        placeholder: "FIRST-LAST",
        variadic: true,
        optional: true,
      },
      reserved: {
        kind: "parsed",
        parse: parseReserved,
        brief: "Hole in the range, optionally =NAME",
        placeholder: "FIRST-LAST",
        variadic: true,
        optional: true,
      },
      arena: {
        kind: "parsed",
        parse: parseArena,
        brief: "Memory for shadow rings: [NAME=]SIZE[@ASID]",
        placeholder: "SIZE",
        variadic: true,
        optional: true,
      },
      align: sizeFlag("Page size of the mapping", { default: "4KiB" }),
      asids: integerFlag("Number of address spaces that the device has", { default: "1", min: 1, max: 65536 }),
    },
    positional: {
      kind: "tuple",
      parameters: [{ parse: String, brief: "Memory map: a file, or - for stdin", placeholder: "MAP", optional: true }],
    },
  },
  async func(this: CliContext, flags: Flags, map?: string): Promise<void> {
    const regions = [...(map === undefined ? [] : parseMemoryMap(await readMap(map))), ...(flags.region ?? [])];
    const arenas = (flags.arena ?? []).map((arena, index) => ({ ...arena, name: arena.name ?? (index === 0 ? "rings" : `rings${index}`) }));
    if (regions.length === 0 && arenas.length === 0) {
      throw usageError("Nothing to lay out", "name a memory map, or give --region or --arena; svq iova plan --help explains them");
    }
    const ranges = flags.range ?? [{ first: 0n, last: IOVA_MAX }];
    const layout = planIova({ ranges, reserved: flags.reserved ?? [], regions, arenas, align: flags.align, asids: flags.asids });
    this.output.document({ ...iovaDocument(layout) }, () => printPlan(this, layout));
  },
});

/** `[NAME=]SIZE[@ASID]`. */
function parseArena(text: string): ArenaFlag {
  const match = /^(?:([^=@]+)=)?([^=@]+)(?:@(\d+))?$/.exec(text);
  if (match === null) throw usageError(`Bad arena: ${quote(text)}`, "write a size like 8MiB, or NAME=SIZE@ASID");
  const [, name, size, asid] = match;
  const bytes = parseSize(size!);
  if (bytes === 0) throw usageError(`Bad arena: ${quote(text)} is empty`, "write a size like 8MiB");
  return { size: bytes, ...(name === undefined ? {} : { name }), ...(asid === undefined ? {} : { asid: parseInteger(asid) }) };
}

async function readMap(path: string): Promise<string> {
  try {
    return path === "-" ? await new Response(Deno.stdin.readable).text() : await Deno.readTextFile(path);
  } catch (cause) {
    const denied = cause instanceof Deno.errors.PermissionDenied || cause instanceof Deno.errors.NotCapable;
    const missing = cause instanceof Deno.errors.NotFound;
    const reason = missing ? "it does not exist" : denied ? "permission denied" : String(cause);
    throw new SvqError("MEMORY_MAP_UNREADABLE", `Cannot read the memory map ${quote(path)}: ${reason}`, {
      exitCode: missing ? EXIT.usage : denied ? EXIT.permission : EXIT.failed,
      hint: "name a readable file, or - for stdin",
      cause,
    });
  }
}

function printPlan({ output }: CliContext, layout: IovaPlan): void {
  const several = layout.spaces.length > 1;
  const columns = <T>(asid: T, rest: T[]): T[] => several ? [asid, ...rest] : rest;
  const placed = [
    ...layout.regions.map((region) => ({
      ...region,
      gpa: formatAddress(region.gpa),
      placement: region.identity ? "identity" : region.reason === "fixed" ? "fixed" : `moved: ${region.reason}`,
    })),
    ...layout.arenas.map((arena) => ({ ...arena, name: `arena ${arena.name}`, gpa: undefined, placement: "top-down" })),
  ];
  output.table(
    columns("asid", ["name", "gpa", "iova", "size", "placement"]),
    placed.map(({ name, asid, gpa, iova, size, placement }) =>
      columns<unknown>(asid, [name, gpa, formatAddress(iova), formatSizeExact(size), placement])
    ),
  );
  output.line();
  output.table(
    columns("asid", ["free", "size"]),
    layout.spaces.flatMap((space) =>
      space.freeRanges().map((range) => columns<unknown>(space.asid, [formatRange(range), formatSize(Number(rangeSize(range)))]))
    ),
  );
  output.line();
  for (const space of layout.spaces) {
    const name = several ? `address space ${space.asid}: ` : "";
    output.line(`${name}fragmentation ${space.fragmentation().toFixed(3)}, usable range ${layout.ranges.map(formatRange).join(", ")}`);
  }
  if (layout.ranges.some(({ last }) => last >= BigInt(ADDRESS_LIMIT))) {
    output.line(`used up to ${formatAddress(ADDRESS_LIMIT - 1)}: svq handles addresses below 2^52`);
  }
  for (const { name, detail, reason } of layout.regions) {
    if (detail !== undefined && reason !== "fixed") output.line(`${name} cannot keep its address: ${detail}`);
  }
}

/** `svq iova …`. */
export const command = buildRouteMap({
  routes: { plan, ranges, show, alloc, free },
  docs: { brief: "Plan, show and change where memory lies in a device's address space" },
});
