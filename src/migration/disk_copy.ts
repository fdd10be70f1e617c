/**
 * Whether a migration copies the guest's disk, and how far it is: the source's decisions around {@linkcode SourceDisk}.
 *
 * @module
 */
import type { DirtyBitmap } from "../dirty/bitmap.ts";
import { EXIT, SvqError } from "../errors.ts";
import { hasBit } from "../uapi/bits.ts";
import { VIRTIO_BLK_FEATURE_BITS } from "../uapi/virtio_blk.ts";
import type { Channel } from "./channel.ts";
import { SourceDisk } from "./disk_source.ts";
import type { PageSender, RoundResult } from "./page_sender.ts";
import { FRAME, PAGE_BYTES } from "./protocol.ts";
import type { SourceGuest } from "./source_guest.ts";

/** Is the disk copied? `auto`: where the destination's is another one. */
export const COPY_DISK = ["auto", "yes", "no"] as const;
/** One of {@linkcode COPY_DISK}. */
export type CopyDisk = typeof COPY_DISK[number];

/** What became of the disk. */
export interface DiskResult {
  /** Both sides show the same disk. */
  shared: boolean;
  /** Bytes of the disk that the guest has. */
  sizeBytes: number;
  /** Rounds of blocks, the one while the guest stood still included; none where the disk is shared. */
  rounds: RoundResult[];
}

/** What is asked of the destination: nothing where the guest has no disk, or one that cannot be written. */
export function diskWish(guest: SourceGuest, copyDisk: CopyDisk): "auto" | "yes" | null {
  if (copyDisk === "no") return null;
  const { workload, features } = guest.driver;
  const copyable = workload.kind === "blk" && !hasBit(features, VIRTIO_BLK_FEATURE_BITS.RO);
  if (copyable) return copyDisk;
  if (copyDisk === "auto") return null;
  throw new SvqError("NO_DISK", "The guest has no disk that could be copied: none at all, or one that is read-only", {
    exitCode: EXIT.migrationAborted,
    hint: "leave --copy-disk out",
  });
}

/** The copy of one disk. */
export class DiskCopy {
  /** The disk is the same one on both sides: nothing is copied. */
  shared = false;
  /** Rounds done. */
  readonly rounds: RoundResult[] = [];
  readonly #disk: SourceDisk;
  readonly #dirty: DirtyBitmap;

  private constructor(disk: SourceDisk) {
    this.#disk = disk;
    this.#dirty = disk.bitmap();
  }

  /**
   * Makes ready; {@linkcode ask} follows.
   *
   * @param timeoutMs longest time that the device may take for a request
   * @throws SvqError RAM_TOO_SMALL, DISK_BUSY
   */
  static async open(guest: SourceGuest, timeoutMs: number): Promise<DiskCopy> {
    return new DiskCopy(await SourceDisk.open(guest, timeoutMs));
  }

  /**
   * Finds out whether there is anything to copy, and tells the destination.
   *
   * @param there sectors of the destination's disk
   * @throws SvqError DISK_SHARED, DISK_DIFFERS, DISK_UNKNOWN, and of the link
   */
  async ask(channel: Channel, wish: "auto" | "yes", there: number): Promise<void> {
    this.shared = await this.#disk.isShared(channel);
    if (this.shared && wish === "yes") {
      throw new SvqError("DISK_SHARED", "Both devices show the same disk: to copy it onto itself would destroy it", {
        exitCode: EXIT.migrationAborted,
        hint: "leave --copy-disk out",
      });
    }
    if (!this.shared && there < this.#disk.capacity) {
      throw new SvqError("DISK_DIFFERS", `The destination's disk has ${there} sectors, the guest's has ${this.#disk.capacity}`, {
        exitCode: EXIT.migrationAborted,
        hint: "give the destination a disk that is at least as large, or storage that both share",
      });
    }
    await channel.sendJson(FRAME.DISK, { copy: !this.shared });
    this.#disk.markAll(this.#dirty);
  }

  /** Blocks that are to be sent. */
  get remaining(): number {
    return this.#dirty.count();
  }

  /** Milliseconds for a block, from the best round: small rounds measure the round trip. */
  get pace(): number {
    return Math.min(...this.rounds.filter((one) => one.pages > 0).map((one) => one.ms / one.pages));
  }

  /** Bytes of the disk. */
  get sizeBytes(): number {
    return this.#disk.capacity * 512;
  }

  /** Sends what is to be sent. @returns blocks that it sent */
  async round(sender: PageSender): Promise<number> {
    const result = await this.#disk.send(sender, this.rounds.length + 1, this.#dirty);
    this.rounds.push(result);
    this.#dirty.clear();
    return result.pages;
  }

  /** What has been written since. @returns blocks, and how long they would take if the guest were stopped now, milliseconds */
  harvest(): { blocks: number; ms: number } {
    const blocks = this.#disk.harvest(this.#dirty);
    return { blocks, ms: blocks === 0 ? 0 : blocks * this.pace };
  }

  /** Forgets what has been written so far. */
  forget(): void {
    this.#disk.harvest(this.#dirty);
    this.#dirty.clear();
  }

  /** The last round, see {@linkcode SourceDisk.sendLast}. */
  async last(sender: PageSender, memory: DirtyBitmap): Promise<void> {
    this.rounds.push(await this.#disk.sendLast(sender, this.rounds.length + 1, this.#dirty, memory));
  }

  /** What became of it. */
  get result(): DiskResult {
    return { shared: this.shared, sizeBytes: this.sizeBytes, rounds: [...this.rounds] };
  }

  /** Ends it. */
  close(): Promise<void> {
    return this.#disk.close();
  }
}

/** Blocks of a disk. */
export function blocksOf(sizeBytes: number): number {
  return Math.ceil(sizeBytes / PAGE_BYTES);
}
