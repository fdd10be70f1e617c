/**
 * Guest memory on its way through a relay: mapped here, placed in the device's address space by the plan, given to the
 * device with the arena, and told to the Workers.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { createMemfd, fileSize, isSameFile, type OwnedFd } from "../ffi/mod.ts";
import type { IovaAllocation } from "../iova/allocation.ts";
import { IovaPlan, type ReservationRequest } from "../iova/plan.ts";
import type { TranslatedRegion } from "../iova/translation.ts";
import { GuestMemory, type MappedRegion } from "../memory/guest_memory.ts";
import type { MemoryRegion } from "../memory/region.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import { Arena, slotSize } from "./arena.ts";
import { Lane } from "./lane.ts";
import { pause } from "./queue_steps.ts";
import type { RelayWorker } from "./worker_client.ts";

/** uaddr = IOVA + this, towards a vhost-user device: an address that is none of ours and none of the VMM's. */
const DEVICE_UADDR_OFFSET = 2 ** 47;
/** vhost-user devices take any address; the arena ends here, above any guest memory. */
const VHOST_USER_IOVA_LAST = 2n ** 46n - 1n;

/** Address spaces that a layout shows at most. */
const MAX_SPACES = 256;

/** The empty layout of a device's address spaces: its range, or the one that svq keeps to where it names none, without the holes. */
export function emptyLayout({ iovaRange, iovaReserved = [], addressSpaces = 1 }: VhostBackend["info"]): IovaPlan {
  const { first, last } = iovaRange ?? { first: 0n, last: VHOST_USER_IOVA_LAST };
  return new IovaPlan({ ranges: { first, last }, reserved: iovaReserved, asids: Math.min(Math.max(1, addressSpaces), MAX_SPACES) });
}

/** A range to be taken out of the layout by hand. */
export interface ManualAllocation extends ReservationRequest {
  /** Put memory of the relay's own behind it, which the device can reach. */
  map?: boolean;
}

interface OwnMap {
  readonly allocation: IovaAllocation;
  readonly fd: OwnedFd;
  readonly region: MemoryRegion;
}

/** How {@linkcode RelayMemory} reaches the device. */
export interface MemoryDevice {
  /** Facts about it. */
  info: VhostBackend["info"];
  /** Runs `work` on the device; where that is gone, nothing: its successor gets the whole table. */
  reach(work: (device: VhostBackend) => Promise<void>): Promise<void>;
}

/** Memory of one relayed device. */
export class RelayMemory implements Disposable {
  /** Guest memory as mapped here. */
  readonly guest: GuestMemory = new GuestMemory();
  /** The layout of the device's address space. */
  readonly plan: IovaPlan;
  readonly #device: MemoryDevice;
  readonly #queues: number;
  readonly #workers: readonly RelayWorker[];
  #arena: Arena | undefined;
  #arenaAtDevice = false;
  #handed: OwnedFd | undefined;
  readonly #own: OwnMap[] = [];
  #closed = false;
  // The table that the device gets is the sum of what both the VMM and the operator have asked for: one change at a time.
  readonly #lane = new Lane();

  /** @param queues how many may need a shadow ring */
  constructor(device: MemoryDevice, queues: number, workers: readonly RelayWorker[]) {
    this.#device = device;
    this.#queues = queues;
    this.#workers = workers;
    this.plan = emptyLayout(device.info);
  }

  /** The shadow rings, once there are any. */
  get arena(): Arena | undefined {
    return this.#arena;
  }

  /** The file of another process's arena becomes this one's, if it is as large: the device may have it already. Owned. */
  adoptArena(fd: OwnedFd): void {
    this.#handed = fd;
  }

  /** The shadow ring of one queue, as the device is given it. */
  ringRegion(index: number): MemoryRegion | undefined {
    return this.#arena?.regionOf(index, DEVICE_UADDR_OFFSET);
  }

  /** Has the device been given memory? */
  get atDevice(): boolean {
    return this.#arenaAtDevice;
  }

  /** Does some guest memory lie elsewhere than at IOVA = GPA, so that descriptors must be translated? */
  get moved(): boolean {
    return this.plan.regions.some((region) => !region.identity);
  }

  // What the device is told of a guest region: where the plan has put it.
  #toDevice(region: MemoryRegion): MemoryRegion {
    const { iova } = this.plan.regionAt(region.gpa)!;
    return { ...region, gpa: iova, uaddr: iova + DEVICE_UADDR_OFFSET };
  }

  #add(region: MemoryRegion): MappedRegion {
    const mapped = this.guest.add(region);
    try {
      this.plan.addRegion({ gpa: region.gpa, size: region.size });
    } catch (error) {
      this.guest.remove(region);
      throw error;
    }
    return mapped;
  }

  #forget(region: Pick<MemoryRegion, "gpa" | "size" | "uaddr">): void {
    this.guest.remove(region);
    this.plan.removeRegion({ gpa: region.gpa, size: region.size });
  }

  // The arena is part of the first table, so that a switch sends no memory message.
  #ensureArena(): Arena {
    if (this.#arena === undefined) {
      const slot = slotSize(this.#device.info.vringNumMax);
      const { iova } = this.plan.addArena({ name: "shadow rings", size: this.#queues * slot });
      const handed = this.#handed;
      this.#handed = undefined;
      const fits = handed !== undefined && fileSize(handed.fd) === this.#queues * slot;
      if (!fits) handed?.close();
      this.#arena = new Arena(this.#queues, iova, slot, fits ? handed : undefined);
    }
    return this.#arena;
  }

  /** The whole table as the device gets it: the arena first. */
  table(): MemoryRegion[] {
    const own = this.#own.map(({ region }) => region);
    return [this.#ensureArena().region(DEVICE_UADDR_OFFSET), ...own, ...this.guest.regions.map((region) => this.#toDevice(region))];
  }

  /** Makes `regions` the whole guest memory, here and at the device. On an error of a new region the others stay. */
  set(regions: readonly MemoryRegion[]): Promise<void> {
    return this.#lane.run(() => this.#set(regions));
  }

  async #set(regions: readonly MemoryRegion[]): Promise<void> {
    const same = (a: MemoryRegion, b: MemoryRegion) =>
      a.gpa === b.gpa && a.size === b.size && a.uaddr === b.uaddr && a.fdOffset === b.fdOffset && isSameFile(a.fd, b.fd);
    await this.#drop(this.guest.regions.filter((old) => !regions.some((region) => same(old, region))));
    const added: MemoryRegion[] = [];
    try {
      for (const region of regions) {
        if (this.guest.regions.some((old) => same(old, region))) continue;
        this.#add(region);
        added.push(region);
      }
      await this.#device.reach((device) => device.setMemTable(this.table()));
      this.#arenaAtDevice = true;
    } catch (error) {
      for (const region of added) this.#forget(region);
      throw error;
    }
    await this.#tellWorkers(this.guest.ranges());
  }

  /** Adds a region, here and at the device; on an error nothing has changed. */
  add(region: MemoryRegion): Promise<void> {
    return this.#lane.run(() => this.#addRegion(region));
  }

  async #addRegion(region: MemoryRegion): Promise<void> {
    const mapped = this.#add(region);
    try {
      const arena = this.#ensureArena();
      if (!this.#arenaAtDevice) {
        await this.#device.reach((device) => device.addMemRegion(arena.region(DEVICE_UADDR_OFFSET)));
        this.#arenaAtDevice = true;
      }
      await this.#device.reach((device) => device.addMemRegion(this.#toDevice(mapped)));
    } catch (error) {
      this.#forget(region);
      throw error;
    }
    await this.#tellWorkers(this.guest.ranges());
  }

  /** Removes a region; resolves when nothing uses it any more. @throws SvqError NO_SUCH_REGION */
  remove(region: Pick<MemoryRegion, "gpa" | "size" | "uaddr">): Promise<void> {
    return this.#lane.run(() => this.#remove(region));
  }

  async #remove(region: Pick<MemoryRegion, "gpa" | "size" | "uaddr">): Promise<void> {
    const found = this.guest.regions.find((old) => old.gpa === region.gpa && old.size === region.size && old.uaddr === region.uaddr);
    if (found === undefined) {
      throw new SvqError("NO_SUCH_REGION", `No memory region 0x${region.gpa.toString(16)}+0x${region.size.toString(16)}`);
    }
    const { gpa, size, uaddr } = this.#toDevice(found);
    await this.#drop([found]);
    await this.#device.reach((device) => device.removeMemRegion({ gpa, size, uaddr }));
  }

  /**
   * Takes a range out of the layout: guest memory and shadow rings keep clear of it until {@linkcode freeRange}.
   *
   * @throws SvqError as {@linkcode IovaPlan.reserve}; CANNOT_MAP, and of mapping it at the device
   */
  allocRange({ map = false, ...request }: ManualAllocation): Promise<IovaAllocation> {
    return this.#lane.run(async () => {
      if (map) checkMappable(this.#device.info, request);
      const allocation = this.plan.reserve(request);
      if (!map) return allocation;
      let fd: OwnedFd | undefined;
      try {
        const size = Number(allocation.size);
        const iova = Number(allocation.iova);
        fd = createMemfd("svq-allocation", size);
        const region = { gpa: iova, size, uaddr: iova + DEVICE_UADDR_OFFSET, fd: fd.fd, fdOffset: 0 };
        await this.#device.reach((device) => device.addMemRegion(region));
        if (this.#closed) throw new SvqError("CLOSED", "The front-end has left meanwhile");
        this.#own.push({ allocation, fd, region });
        return allocation;
      } catch (error) {
        fd?.close();
        this.plan.unreserve({ iova: Number(allocation.iova), asid: allocation.asid });
        throw error;
      }
    });
  }

  /** Gives back what {@linkcode allocRange} took, at the device first. @throws SvqError as {@linkcode IovaPlan.unreserve} */
  freeRange(request: { iova: number; size?: number | undefined; asid?: number | undefined }): Promise<IovaAllocation> {
    return this.#lane.run(async () => {
      const freed = this.plan.unreserve(request);
      const index = this.#own.findIndex(({ allocation }) => allocation === freed);
      const own = this.#own[index];
      if (own === undefined) return freed;
      try {
        await this.#device.reach((device) => device.removeMemRegion(own.region));
      } catch (error) {
        // The device has it still, so nobody else may get the range.
        const { iova, size, asid, perm, tag } = freed;
        this.#own[index] = { ...own, allocation: this.plan.reserve({ iova: Number(iova), size: Number(size), asid, perm, tag }) };
        throw error;
      }
      this.#own.splice(index, 1);
      own.fd.close();
      return freed;
    });
  }

  // Workers stop using the regions, chains in them come back, and only then they are unmapped.
  async #drop(gone: readonly MemoryRegion[]): Promise<void> {
    if (gone.length === 0) return;
    await this.#tellWorkers(this.guest.ranges().filter((range) => !gone.some((region) => region.gpa === range.gpa)));
    for (const { gpa, size, uaddr } of gone) {
      for (;;) {
        const replies = await Promise.all(this.#workers.map((worker) => worker.send({ type: "uses", gpa, size })));
        if (replies.every((reply) => reply.count === 0)) break;
        await pause(2);
      }
      this.#forget({ gpa, size, uaddr });
    }
  }

  async #tellWorkers(ranges: ReturnType<GuestMemory["ranges"]>): Promise<void> {
    const moved: TranslatedRegion[] | undefined = this.moved
      ? this.plan.regions.map(({ gpa, iova, size }) => ({ gpa, iova, size }))
      : undefined;
    await Promise.all(this.#workers.map((worker) => worker.send({ type: "memory", ranges, moved })));
  }

  /** Unmaps everything; Workers and device must have let go. */
  close(): void {
    this.#closed = true;
    this.guest.clear();
    for (const { fd } of this.#own.splice(0)) fd.close();
    this.#arena?.close();
    this.#arena = undefined;
    this.#handed?.close();
    this.#handed = undefined;
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}

function checkMappable({ kind, address }: VhostBackend["info"], { asid = 0, perm = "rw" }: ReservationRequest): void {
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
