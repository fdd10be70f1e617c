/**
 * Guest memory on its way through a relay: mapped here, placed in the device's address space by the plan, given to the
 * device with the arena, and told to the Workers.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { createMemfd, fileSize, isSameFile, type OwnedFd } from "../ffi/mod.ts";
import type { IovaAllocation } from "../iova/allocation.ts";
import { IovaPlan } from "../iova/plan.ts";
import type { TranslatedRegion } from "../iova/translation.ts";
import { GuestMemory, type MappedRegion } from "../memory/guest_memory.ts";
import type { MemoryRegion } from "../memory/region.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import { Arena, slotSize } from "./arena.ts";
import { Lane } from "./lane.ts";
import { checkMappable, type ManualAllocation, type MapFigures, overlap, type PlacedMemory } from "./placed_memory.ts";
import { pause } from "./ring_rest.ts";
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
  /** Does a ring run? Absent: none does. */
  running?(): boolean;
}

/** Where a region lies for the front-end until that has told: an address that none has. */
const EARLY_UADDR = 2 ** 51;

/** Memory of one relayed device. */
export class RelayMemory implements PlacedMemory, Disposable {
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
  /** Maps made before the VMM gave the memory ({@linkcode premap}). */
  readonly early: MapFigures = { regions: 0, bytes: 0, ms: 0 };
  /** Maps made when the VMM gave the memory and no ring ran: at the destination of a migration the guest stands still meanwhile. */
  readonly atStart: MapFigures = { regions: 0, bytes: 0, ms: 0 };
  /** Regions of the VMM's that were found mapped. */
  adopted = 0;
  /** By GPA: regions that the VMM has not given yet. */
  readonly #waiting = new Set<number>();
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

  /** Regions that were taken early, and that the VMM has not given yet. */
  get waiting(): readonly MappedRegion[] {
    return this.guest.regions.filter(({ gpa }) => this.#waiting.has(gpa));
  }

  /** See {@linkcode PlacedMemory.premap}. */
  premap(regions: readonly Omit<MemoryRegion, "uaddr">[]): Promise<void> {
    return this.#lane.run(() =>
      this.#timed(this.early, async () => {
        if (this.#closed || this.guest.regions.length > this.#waiting.size) {
          throw new SvqError("PREMAP_TOO_LATE", "The VMM has given its memory already: nothing is left to be taken early", {
            hint: "take it when the destination's VMM has started, and before the migration has ended",
          });
        }
        const fresh = regions.filter((region) => this.#early(region) === undefined);
        await this.#release(this.waiting.filter((old) => fresh.some((region) => overlap(old, region))));
        const added = fresh.map((region) => ({ ...region, uaddr: EARLY_UADDR + region.gpa }));
        if (added.length > 0) await this.#extend(added);
        for (const { gpa } of added) this.#waiting.add(gpa);
        return added;
      })
    );
  }

  /** See {@linkcode PlacedMemory.settle}. */
  settle(): Promise<void> {
    if (this.#waiting.size === 0) return Promise.resolve();
    return this.#lane.run(() => this.#release(this.waiting));
  }

  async #release(regions: readonly MappedRegion[]): Promise<void> {
    const told = regions.map((region) => this.#toDevice(region));
    await this.#drop(regions);
    for (const { gpa, size, uaddr } of told) await this.#device.reach((device) => device.removeMemRegion({ gpa, size, uaddr }));
  }

  async #timed(figures: MapFigures, work: () => Promise<readonly MemoryRegion[]>): Promise<void> {
    const begun = performance.now();
    const added = await work();
    figures.regions += added.length;
    figures.bytes += added.reduce((sum, { size }) => sum + size, 0);
    figures.ms += performance.now() - begun;
  }

  // What the VMM causes while rings run costs its guest nothing.
  #byVmm(work: () => Promise<readonly MemoryRegion[]>): Promise<void> {
    return this.#timed(this.#device.running?.() === true ? { regions: 0, bytes: 0, ms: 0 } : this.atStart, work);
  }

  // The region that was taken early for this one.
  #early({ gpa, size, fd, fdOffset }: Omit<MemoryRegion, "uaddr">): MappedRegion | undefined {
    return this.waiting.find((old) => old.gpa === gpa && old.size === size && old.fdOffset === fdOffset && isSameFile(old.fd, fd));
  }

  // Was it taken early? Then it is the VMM's from now on.
  #adopt(region: MemoryRegion): boolean {
    const found = this.#early(region);
    if (found === undefined) return false;
    this.guest.readdress(found, region.uaddr);
    this.#waiting.delete(region.gpa);
    this.adopted++;
    return true;
  }

  // Maps here and at the device, whose table is replaced as a whole.
  async #extend(added: readonly MemoryRegion[]): Promise<void> {
    const done: MemoryRegion[] = [];
    try {
      for (const region of added) {
        this.#add(region);
        done.push(region);
      }
      await this.#device.reach((device) => device.setMemTable(this.table()));
      this.#arenaAtDevice = true;
    } catch (error) {
      for (const region of done) this.#forget(region);
      throw error;
    }
    await this.#tellWorkers(this.guest.ranges());
  }

  #forget(region: Pick<MemoryRegion, "gpa" | "size" | "uaddr">): void {
    this.guest.remove(region);
    this.plan.removeRegion({ gpa: region.gpa, size: region.size });
    this.#waiting.delete(region.gpa);
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
    return this.#lane.run(() => this.#byVmm(() => this.#set(regions)));
  }

  async #set(regions: readonly MemoryRegion[]): Promise<readonly MemoryRegion[]> {
    const same = (a: MemoryRegion, b: MemoryRegion) =>
      a.gpa === b.gpa && a.size === b.size && a.uaddr === b.uaddr && a.fdOffset === b.fdOffset && isSameFile(a.fd, b.fd);
    const adopted = regions.filter((region) => this.#adopt(region)).length;
    const gone = this.guest.regions.filter((old) => !regions.some((region) => same(old, region)));
    await this.#drop(gone);
    const added = regions.filter((region) => !this.guest.regions.some((old) => same(old, region)));
    // The device has exactly this table since it was taken early.
    if (adopted > 0 && gone.length + added.length === 0) await this.#tellWorkers(this.guest.ranges());
    else await this.#extend(added);
    return added;
  }

  /** Adds a region, here and at the device; on an error nothing has changed. */
  add(region: MemoryRegion): Promise<void> {
    return this.#lane.run(() => this.#byVmm(() => this.#addRegion(region)));
  }

  async #addRegion(region: MemoryRegion): Promise<readonly MemoryRegion[]> {
    if (this.#adopt(region)) {
      await this.#tellWorkers(this.guest.ranges());
      return [];
    }
    await this.#release(this.waiting.filter((early) => this.#inTheWay(early, region)));
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
    return [region];
  }

  // At its place, or in the device's last slot.
  #inTheWay(early: MappedRegion, region: MemoryRegion): boolean {
    const full = this.guest.regions.length + this.#own.length + 2 > this.#device.info.maxMemSlots;
    return full || overlap(early, region);
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

  /** See {@linkcode PlacedMemory.allocRange}. */
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
