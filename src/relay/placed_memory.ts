/**
 * What an operator does to the memory of a relayed device, past the VMM.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import type { OwnedFd } from "../ffi/mod.ts";
import type { IovaAllocation } from "../iova/allocation.ts";
import type { ReservationRequest } from "../iova/plan.ts";
import type { MappedRegion } from "../memory/guest_memory.ts";
import type { MemoryRegion } from "../memory/region.ts";
import type { VhostBackend } from "../vhost/backend.ts";

/** A range to be taken out of the layout by hand. */
export interface ManualAllocation extends ReservationRequest {
  /** Put memory of the relay's own behind it, which the device can reach. */
  map?: boolean;
}

/** Maps of guest memory that were made at the device, each counted once. */
export interface MapFigures {
  /** How many regions. */
  regions: number;
  /** Bytes in them. */
  bytes: number;
  /** How long it took, here, at the device and in the Workers, ms. */
  ms: number;
}

/** Guest memory and what else the device can reach. */
export interface PlacedMemory {
  /** Maps made before the VMM gave the memory ({@linkcode PlacedMemory.premap}). */
  readonly early: Readonly<MapFigures>;
  /** Maps made when the VMM gave the memory and no ring ran: at the destination of a migration the guest stands still meanwhile. */
  readonly atStart: Readonly<MapFigures>;
  /** Regions of the VMM's that were found mapped. */
  readonly adopted: number;
  /** Regions that were taken early, and that the VMM has not given yet. */
  readonly waiting: readonly MappedRegion[];
  /**
   * Takes guest memory before the VMM gives it: maps it here, at the device and in the Workers. A region that the VMM gives later, of
   * the same file at the same place, is found mapped; what it does not give is let go of.
   *
   * @throws SvqError PREMAP_TOO_LATE, and as the VMM's own table; nothing has changed then
   */
  premap(regions: readonly Omit<MemoryRegion, "uaddr">[]): Promise<void>;
  /** Lets go of what was taken early and is not given by the VMM. */
  settle(): Promise<void>;
  /**
   * Takes a range out of the layout: guest memory and shadow rings keep clear of it until {@linkcode PlacedMemory.freeRange}.
   *
   * @throws SvqError as `IovaPlan.reserve`; CANNOT_MAP, and of mapping it at the device
   */
  allocRange(request: ManualAllocation): Promise<IovaAllocation>;
  /** Gives back what {@linkcode PlacedMemory.allocRange} took, at the device first. @throws SvqError as `IovaPlan.unreserve` */
  freeRange(request: { iova: number; size?: number | undefined; asid?: number | undefined }): Promise<IovaAllocation>;
  /** The file of another process's shadow rings becomes this one's, if it is as large: the device may have it already. Owned. */
  adoptArena(fd: OwnedFd): void;
}

/** Have two ranges of guest addresses a byte in common? */
export function overlap(a: { gpa: number; size: number }, b: { gpa: number; size: number }): boolean {
  return a.gpa < b.gpa + b.size && b.gpa < a.gpa + a.size;
}

/** Can the device be given memory of the relay's own there? @throws SvqError CANNOT_MAP */
export function checkMappable({ kind, address }: VhostBackend["info"], { asid = 0, perm = "rw" }: ReservationRequest): void {
  const refuse = (why: string, hint: string) => new SvqError("CANNOT_MAP", `${address}: ${why}`, { exitCode: EXIT.usage, hint });
  if (kind !== "vhost-vdpa" && kind !== "sim") {
    throw refuse(
      `a ${kind} device has few memory slots, and they are promised to the VMM`,
      "Leave --map out: the range is kept free without it.",
    );
  }
  if (asid !== 0) throw refuse("the relay's rings all lie in address space 0", "Leave --map out, or leave --asid out.");
  if (perm !== "rw") throw refuse("the relay maps memory for reading and writing only", "Leave --map out, or --perm.");
}
