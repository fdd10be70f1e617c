/**
 * The layout of a device's address spaces: where guest memory and the shadow rings' arenas lie.
 *
 * Order of placement: what is asked for at a fixed IOVA; guest regions at IOVA = GPA; arenas, top-down from the end of the
 * usable range, so that memory plugged in above today's does not meet them; last the guest regions that cannot keep their
 * address (outside the range, on a reserved hole, or taken), top-down below the arenas, each in one piece.
 *
 * svq handles addresses below 2^52 (src/memory/region.ts): a wider range is used up to there.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { ADDRESS_LIMIT } from "../memory/region.ts";
import { formatSizeExact } from "../units.ts";
import type { IovaAllocation, IovaPermission } from "./allocation.ts";
import { IovaSpace } from "./allocator.ts";
import { ExtentTree } from "./extent_tree.ts";
import { formatAddress, formatRange, intersectRanges, type IovaRange, type ReservedRange } from "./range.ts";
import { Translation } from "./translation.ts";

/** A guest memory region to place. */
export interface RegionRequest {
  /** Guest-physical address, bytes. */
  gpa: number;
  /** Bytes. */
  size: number;
  /** Place it here and nowhere else. */
  iova?: number | undefined;
  /** Address space (default 0). */
  asid?: number | undefined;
  /** Default `rw`. */
  perm?: IovaPermission | undefined;
  /** For people, e.g. `pc.ram`. */
  name?: string | undefined;
}

/** Memory of svq's own that the device must reach: shadow rings. */
export interface ArenaRequest {
  /** Unique in its address space. */
  name: string;
  /** Bytes; rounded up to whole pages. */
  size: number;
  /** Place it here and nowhere else. */
  iova?: number | undefined;
  /** Address space (default 0). */
  asid?: number | undefined;
  /** Default `rw`. */
  perm?: IovaPermission | undefined;
}

/** What {@linkcode planIova} works from. */
export interface PlanRequest {
  /** The device's usable range or ranges. */
  ranges: IovaRange | readonly IovaRange[];
  /** Holes that the device or its IOMMU claims, in every address space. */
  reserved?: readonly ReservedRange[];
  /** Guest memory. */
  regions?: readonly RegionRequest[];
  /** Arenas. */
  arenas?: readonly ArenaRequest[];
  /** Page size of the mapping, bytes: power of two, at least 4096 (default 4096). */
  align?: number;
  /** Number of address spaces that the device has (default 1). */
  asids?: number;
}

/** Why a region does not lie at IOVA = GPA. */
export type TranslatedReason = "fixed" | "outside-range" | "reserved" | "occupied";

/** A placed guest region. */
export interface PlannedRegion {
  /** Guest-physical address, bytes. */
  readonly gpa: number;
  /** Where the device finds it. */
  readonly iova: number;
  /** Bytes. */
  readonly size: number;
  /** IOVA = GPA. */
  readonly identity: boolean;
  /** Address space. */
  readonly asid: number;
  /** What the device may do there. */
  readonly perm: IovaPermission;
  /** As requested, or `guest 0x…`. */
  readonly name: string;
  /** Set when `identity` is false. */
  readonly reason?: TranslatedReason;
  /** The reason in words; set with `reason`. */
  readonly detail?: string;
}

/** A range that somebody asks for by name, beside guest memory and arenas. */
export interface ReservationRequest {
  /** Bytes, a multiple of the page size. */
  size: number;
  /** Place it here and nowhere else. */
  iova?: number | undefined;
  /** Only multiples of this many bytes (power of two). */
  align?: number | undefined;
  /** Address space (default 0). */
  asid?: number | undefined;
  /** Default `rw`. */
  perm?: IovaPermission | undefined;
  /** For people. */
  tag: string;
}

/** A placed arena. */
export interface PlannedArena {
  /** As requested. */
  readonly name: string;
  /** Where the device finds it. */
  readonly iova: number;
  /** Bytes, whole pages. */
  readonly size: number;
  /** Address space. */
  readonly asid: number;
  /** What the device may do there. */
  readonly perm: IovaPermission;
}

/** A translated region of at least this many bytes keeps its offset in this many: an IOMMU can map it with large pages. */
const LARGE_PAGES: readonly number[] = [2 ** 30, 2 ** 21];

const REASONS: Readonly<Record<string, TranslatedReason>> = {
  IOVA_OUTSIDE_RANGE: "outside-range",
  IOVA_RESERVED: "reserved",
  IOVA_OVERLAP: "occupied",
};

/** A layout that can change while the device runs: memory hotplug, more arenas. Made by {@linkcode planIova}. */
export class IovaPlan {
  /** The device's usable ranges, as given. */
  readonly ranges: readonly IovaRange[];
  /** Reserved holes, as given. */
  readonly reserved: readonly ReservedRange[];
  /** Page size of the mapping, bytes. */
  readonly align: number;
  /** One per address space, index = ASID. Their contents change with the plan; allocate and free through the plan. */
  readonly spaces: readonly IovaSpace[];
  readonly #regions: readonly ExtentTree<PlannedRegion>[];
  readonly #arenas: PlannedArena[] = [];
  readonly #reservations = new Set<IovaAllocation>();

  /** An empty layout. @throws {SvqError} IOVA_INVALID, IOVA_ADDRESS_LIMIT when no part of the range is below 2^52, IOVA_EXHAUSTED for an empty range */
  constructor({ ranges, reserved = [], align = 4096, asids = 1 }: Omit<PlanRequest, "regions" | "arenas">) {
    if (!Number.isInteger(asids) || asids < 1 || asids > 65536) {
      throw invalid(`${asids} is not a number of address spaces (1 to 65536)`, "Most devices have one; svq probe tells.");
    }
    if (!Number.isSafeInteger(align)) throw invalid(`Alignment ${align} is not a number of bytes`, "Use a power of two of at least 4096.");
    this.ranges = "first" in ranges ? [ranges] : [...ranges];
    this.reserved = [...reserved];
    this.align = align;
    const limit = { first: 0n, last: BigInt(ADDRESS_LIMIT) - 1n };
    const usable = this.ranges.map((range) => intersectRanges(range, limit)).filter((range) => range !== undefined);
    if (usable.length === 0 && this.ranges.length > 0) {
      throw new SvqError("IOVA_ADDRESS_LIMIT", `The device's range ${this.ranges.map(formatRange).join(", ")} begins above 2^52`, {
        hint: "svq handles addresses below 2^52 only; such a device cannot be relayed.",
      });
    }
    const options = { ranges: usable, reserved: this.reserved, pageSize: BigInt(align) };
    this.spaces = Array.from({ length: asids }, (_, asid) => new IovaSpace({ ...options, asid }));
    this.#regions = this.spaces.map(() => new ExtentTree<PlannedRegion>());
  }

  /** Guest regions, in order of address space and GPA. */
  get regions(): PlannedRegion[] {
    return this.#regions.flatMap((tree) => Array.from(tree, ({ value }) => value));
  }

  /** Arenas, in order of placement. */
  get arenas(): readonly PlannedArena[] {
    return this.#arenas;
  }

  /** The allocations of one address space. @throws {SvqError} IOVA_NO_SUCH_ASID */
  space(asid: number): IovaSpace {
    const space = this.spaces[asid];
    if (space !== undefined) return space;
    const last = this.spaces.length - 1;
    throw new SvqError("IOVA_NO_SUCH_ASID", `The device has no address space ${asid}: they are numbered 0 to ${last}`, {
      exitCode: EXIT.usage,
      hint: "Use one of those, or raise the number of address spaces if the device has more.",
    });
  }

  /** The guest region that holds an address. */
  regionAt(gpa: number, asid = 0): PlannedRegion | undefined {
    return this.#regions[asid]?.at(gpa)?.value;
  }

  /** GPA -> IOVA of one address space, as of now. */
  translation(asid = 0): Translation {
    this.space(asid);
    return new Translation(this.regions.filter((region) => region.asid === asid));
  }

  /**
   * Places one more guest region, at IOVA = GPA where that is free. Nothing that is placed moves.
   *
   * @throws {SvqError} IOVA_REGION_OVERLAP, IOVA_EXHAUSTED, IOVA_UNALIGNED, IOVA_ADDRESS_LIMIT, IOVA_NO_SUCH_ASID; for a fixed
   * IOVA also IOVA_OVERLAP, IOVA_RESERVED, IOVA_OUTSIDE_RANGE
   */
  addRegion(request: RegionRequest): PlannedRegion {
    const { gpa, size, iova, perm = "rw" } = this.#check(request);
    const asid = request.asid ?? 0;
    const name = request.name ?? `guest ${formatAddress(gpa)}`;
    const space = this.space(asid);
    const place = (at: number) => space.allocAt(BigInt(at), BigInt(size), { tag: name, perm });
    const record = (at: number, reason?: TranslatedReason, detail?: string): PlannedRegion => {
      const region: PlannedRegion = { gpa, iova: at, size, identity: at === gpa, asid, perm, name };
      const full = reason === undefined || detail === undefined ? region : { ...region, reason, detail };
      this.#regions[asid]!.insert(gpa, gpa + size, full);
      return full;
    };
    if (iova !== undefined) {
      place(iova);
      return iova === gpa ? record(iova) : record(iova, "fixed", "placed as asked");
    }
    const obstacle = space.conflict(BigInt(gpa), BigInt(size));
    if (obstacle === undefined) {
      place(gpa);
      return record(gpa);
    }
    return record(this.#translated(space, gpa, size, { tag: name, perm }), REASONS[obstacle.code] ?? "occupied", obstacle.message);
  }

  /**
   * Takes a guest region out again, named exactly.
   *
   * @throws {SvqError} IOVA_NOT_ALLOCATED, IOVA_PARTIAL_FREE, IOVA_NO_SUCH_ASID
   */
  removeRegion({ gpa, size, asid = 0 }: { gpa: number; size: number; asid?: number }): PlannedRegion {
    const space = this.space(asid);
    const found = this.#regions[asid]!.firstOverlap(gpa, gpa + size);
    if (found === undefined) {
      throw new SvqError("IOVA_NOT_ALLOCATED", `No guest region at GPA ${formatAddress(gpa)} in address space ${asid}`, {
        hint: "It was removed before, or never added.",
      });
    }
    if (found.start !== gpa || found.end !== gpa + size) {
      throw new SvqError(
        "IOVA_PARTIAL_FREE",
        `GPA ${formatAddress(gpa)}, ${formatSizeExact(size)} is not one region: it meets ${describe(found.value)}`,
        { hint: "Remove a region with the address and the size it was added with." },
      );
    }
    const region = found.value;
    space.free(BigInt(region.iova), BigInt(size));
    this.#regions[asid]!.remove(gpa);
    return region;
  }

  /**
   * Places an arena, top-down from the end of the usable range unless it is fixed.
   *
   * @throws {SvqError} IOVA_ARENA_EXISTS, and as {@linkcode IovaPlan.addRegion}
   */
  addArena({ name, size: wanted, iova, asid = 0, perm = "rw" }: ArenaRequest): PlannedArena {
    if (this.#arenas.some((arena) => arena.name === name && arena.asid === asid)) {
      throw new SvqError("IOVA_ARENA_EXISTS", `Address space ${asid} has an arena ${name} already`, {
        hint: "Give the arena another name.",
      });
    }
    const space = this.space(asid);
    const size = Math.ceil(address(wanted, "Size of an arena") / this.align) * this.align;
    const options = { tag: `arena ${name}`, perm };
    const placed = iova === undefined
      ? space.allocTopDown(BigInt(size), options)
      : space.allocAt(BigInt(address(iova, "IOVA")), BigInt(size), options);
    const arena: PlannedArena = { name, iova: Number(placed.iova), size, asid, perm };
    this.#arenas.push(arena);
    return arena;
  }

  /** Takes an arena out again. @throws {SvqError} IOVA_NOT_ALLOCATED, IOVA_NO_SUCH_ASID */
  removeArena(name: string, asid = 0): PlannedArena {
    const space = this.space(asid);
    const index = this.#arenas.findIndex((arena) => arena.name === name && arena.asid === asid);
    const arena = this.#arenas[index];
    if (arena === undefined) {
      throw new SvqError("IOVA_NOT_ALLOCATED", `Address space ${asid} has no arena ${name}`, {
        hint: "It was removed before, or never added.",
      });
    }
    space.free(BigInt(arena.iova), BigInt(arena.size));
    this.#arenas.splice(index, 1);
    return arena;
  }

  /** Ranges that were asked for, in order of address space and address. */
  get reservations(): IovaAllocation[] {
    return this.spaces.flatMap((space) => space.entries().filter((entry) => this.#reservations.has(entry)));
  }

  /**
   * Takes a range out of what is free, top-down from the end of the usable range unless it is fixed.
   *
   * @throws {SvqError} IOVA_EXHAUSTED, IOVA_UNALIGNED, IOVA_INVALID, IOVA_ADDRESS_LIMIT, IOVA_NO_SUCH_ASID; for a fixed IOVA also
   * IOVA_OVERLAP, IOVA_RESERVED, IOVA_OUTSIDE_RANGE
   */
  reserve({ size, iova, align, asid = 0, perm = "rw", tag }: ReservationRequest): IovaAllocation {
    const space = this.space(asid);
    const bytes = BigInt(address(size, "Size"));
    const options = { tag, perm, ...(align === undefined ? {} : { align: BigInt(align) }) };
    const placed = iova === undefined ? space.allocTopDown(bytes, options) : space.allocAt(BigInt(address(iova, "IOVA")), bytes, options);
    this.#reservations.add(placed);
    return placed;
  }

  /**
   * Gives back what {@linkcode IovaPlan.reserve} took; without a size, the one that begins at `iova`.
   *
   * @throws {SvqError} IOVA_NOT_ALLOCATED, IOVA_PARTIAL_FREE, IOVA_OWNED (guest memory and arenas), IOVA_NO_SUCH_ASID
   */
  unreserve({ iova, size, asid = 0 }: { iova: number; size?: number | undefined; asid?: number | undefined }): IovaAllocation {
    const space = this.space(asid);
    const at = BigInt(address(iova, "IOVA"));
    const found = space.find(at);
    if (found !== undefined && !this.#reservations.has(found)) {
      throw new SvqError("IOVA_OWNED", `${formatAddress(at)} belongs to ${found.tag}, which was not allocated by hand`, {
        hint: "Guest memory goes when the VMM unplugs it, shadow rings go with the relay; only what `svq iova alloc` made can be freed.",
      });
    }
    const freed = space.free(at, size === undefined ? found?.size ?? space.pageSize : BigInt(address(size, "Size")));
    this.#reservations.delete(freed);
    return freed;
  }

  #check(request: RegionRequest): RegionRequest {
    const gpa = address(request.gpa, "GPA");
    const size = address(request.size, "Size of a guest region");
    address(gpa + size, "End of a guest region");
    if (request.iova !== undefined) address(request.iova, "IOVA");
    if (size === 0) throw invalid(`Guest region at ${formatAddress(gpa)} is empty`, "Leave it out of the memory map.");
    const asid = request.asid ?? 0;
    this.space(asid);
    const other = this.#regions[asid]!.firstOverlap(gpa, gpa + size);
    if (other !== undefined) {
      const wanted = formatRange({ first: BigInt(gpa), last: BigInt(gpa + size - 1) });
      throw new SvqError("IOVA_REGION_OVERLAP", `Guest region ${wanted} overlaps ${describe(other.value)}`, {
        hint: "A guest-physical address belongs to one region of an address space: correct the memory map.",
      });
    }
    return { ...request, gpa, size };
  }

  #translated(space: IovaSpace, gpa: number, size: number, options: { tag: string; perm: IovaPermission }): number {
    const bytes = BigInt(size);
    for (const large of LARGE_PAGES) {
      if (size < large || large <= this.align) continue;
      try {
        return Number(space.allocTopDown(bytes, { ...options, align: BigInt(large), congruentTo: BigInt(gpa) }).iova);
      } catch (error) {
        if (!(error instanceof SvqError && error.code === "IOVA_EXHAUSTED")) throw error;
      }
    }
    return Number(space.allocTopDown(bytes, options).iova);
  }
}

/**
 * Lays out guest memory and arenas; see the module text for the order.
 *
 * @throws {SvqError} as {@linkcode IovaPlan}, {@linkcode IovaPlan.addRegion} and {@linkcode IovaPlan.addArena}
 */
export function planIova(request: PlanRequest): IovaPlan {
  const plan = new IovaPlan(request);
  const { regions = [], arenas = [] } = request;
  const moved: RegionRequest[] = [];
  for (const region of regions) if (region.iova !== undefined) plan.addRegion(region);
  for (const arena of arenas) if (arena.iova !== undefined) plan.addArena(arena);
  for (const region of regions) {
    if (region.iova !== undefined) continue;
    const gpa = address(region.gpa, "GPA");
    const size = address(region.size, "Size of a guest region");
    const canStay = size === 0 || plan.space(region.asid ?? 0).conflict(BigInt(gpa), BigInt(size)) === undefined;
    if (canStay) plan.addRegion(region);
    else moved.push(region);
  }
  for (const arena of arenas) if (arena.iova === undefined) plan.addArena(arena);
  // Large ones first: they are the hardest to place.
  for (const region of moved.toSorted((a, b) => b.size - a.size || a.gpa - b.gpa)) plan.addRegion(region);
  return plan;
}

function describe(region: PlannedRegion): string {
  const first = BigInt(region.gpa);
  return `${region.name} at ${formatRange({ first, last: first + BigInt(region.size) - 1n })}`;
}

function address(value: number, what: string): number {
  if (!Number.isInteger(value) || value < 0) {
    throw invalid(`${what} ${value} is not a whole number of bytes`, "Write addresses and sizes in bytes, 0 or more.");
  }
  if (value > ADDRESS_LIMIT) {
    throw new SvqError("IOVA_ADDRESS_LIMIT", `${what} ${formatAddress(BigInt(value))} is above 2^52`, {
      exitCode: EXIT.usage,
      hint: "svq handles addresses below 2^52 (4 PiB).",
    });
  }
  return value;
}

function invalid(message: string, hint: string): SvqError {
  return new SvqError("IOVA_INVALID", message, { exitCode: EXIT.usage, hint });
}
