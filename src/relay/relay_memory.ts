/**
 * Guest memory on its way through a relay: mapped here, placed in the device's address space by the plan, given to the
 * device with the arena, and told to the Workers.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { isSameFile } from "../ffi/mod.ts";
import { IovaPlan } from "../iova/plan.ts";
import type { TranslatedRegion } from "../iova/translation.ts";
import { GuestMemory, type MappedRegion } from "../memory/guest_memory.ts";
import type { MemoryRegion } from "../memory/region.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import { Arena, slotSize } from "./arena.ts";
import { pause } from "./queue_steps.ts";
import type { RelayWorker } from "./worker_client.ts";

/** uaddr = IOVA + this, towards a vhost-user device: an address that is none of ours and none of the VMM's. */
const DEVICE_UADDR_OFFSET = 2 ** 47;
/** vhost-user devices take any address; the arena ends here, above any guest memory. */
const VHOST_USER_IOVA_LAST = 2n ** 46n - 1n;

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

  /** @param queues how many may need a shadow ring */
  constructor(device: MemoryDevice, queues: number, workers: readonly RelayWorker[]) {
    this.#device = device;
    this.#queues = queues;
    this.#workers = workers;
    const { first, last } = device.info.iovaRange ?? { first: 0n, last: VHOST_USER_IOVA_LAST };
    this.plan = new IovaPlan({ ranges: { first, last } });
  }

  /** The shadow rings, once there are any. */
  get arena(): Arena | undefined {
    return this.#arena;
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
      this.#arena = new Arena(this.#queues, iova, slot);
    }
    return this.#arena;
  }

  /** The whole table as the device gets it: the arena first. */
  table(): MemoryRegion[] {
    return [this.#ensureArena().region(DEVICE_UADDR_OFFSET), ...this.guest.regions.map((region) => this.#toDevice(region))];
  }

  /** Makes `regions` the whole guest memory, here and at the device. On an error of a new region the others stay. */
  async set(regions: readonly MemoryRegion[]): Promise<void> {
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
  async add(region: MemoryRegion): Promise<void> {
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
  async remove(region: Pick<MemoryRegion, "gpa" | "size" | "uaddr">): Promise<void> {
    const found = this.guest.regions.find((old) => old.gpa === region.gpa && old.size === region.size && old.uaddr === region.uaddr);
    if (found === undefined) {
      throw new SvqError("NO_SUCH_REGION", `No memory region 0x${region.gpa.toString(16)}+0x${region.size.toString(16)}`);
    }
    const { gpa, size, uaddr } = this.#toDevice(found);
    await this.#drop([found]);
    await this.#device.reach((device) => device.removeMemRegion({ gpa, size, uaddr }));
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
    this.guest.clear();
    this.#arena?.close();
    this.#arena = undefined;
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}
