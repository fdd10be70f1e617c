/**
 * What runs the data path of one queue: moves chains from the guest's ring to the device's and back. Two implementations
 * pass the same tests: WebAssembly over windows of memory (src/relay/wasm_core.ts), and JavaScript (src/relay/js_core.ts).
 *
 * @module
 */
import type { DirtyBitmap } from "../dirty/bitmap.ts";
import type { Iotlb, IotlbMiss } from "../iova/iotlb.ts";
import type { Translation } from "../iova/translation.ts";
import type { RangeTable } from "../memory/range_table.ts";
import type { QueueProgress, QueueStart } from "./messages.ts";

/** What is asked for; `auto` is WebAssembly where it runs. */
export type CoreChoice = "auto" | "wasm" | "js";

/** What all queues of a Worker share; replaced while they run. */
export interface DataPath {
  /** Guest memory. */
  memory: RangeTable;
  /** Where the device finds guest memory; undefined: everywhere IOVA = GPA. */
  translation: Translation | undefined;
  /** Where written pages are marked, if anywhere. */
  dirty: DirtyBitmap | undefined;
  /** What is known of the guest's IOMMU, where one may be relayed; the same object all the time. */
  readonly iotlb?: Iotlb;
}

/** The relay of one queue in mode `used` or `shadow`. Any method may throw a VringError when a ring broke a rule. */
export interface RelayCore {
  /** Which implementation. */
  readonly kind: "wasm" | "js";
  /** After {@linkcode returnUsed}: the guest wants a call. */
  readonly callWanted: boolean;
  /** After {@linkcode forward}: the device wants a kick. */
  readonly kickWanted: boolean;
  /** The device's ring has no room for the guest's next chain. */
  readonly full: boolean;
  /** Chains in the device's ring, or on their way there. */
  readonly inflight: number;
  /** Position of the guest's ring as a vring base. */
  readonly guestBase: number;
  /** Used position of the guest's ring. */
  readonly guestUsed: number;
  /** Offers what the guest has made available to the device. @returns chains moved */
  forward(): number;
  /** Gives back to the guest what the device has used: what it could have written is marked dirty first. @returns chains moved */
  returnUsed(): number;
  /** Tells the device that calls are not needed (a hint). */
  disableCalls(): void;
  /** Asks the device for calls. @returns whether used chains arrived meanwhile */
  enableCalls(): boolean;
  /** Tells the guest that kicks are not needed (a hint). */
  disableKicks(): void;
  /** Asks the guest for kicks. @returns whether chains arrived meanwhile */
  enableKicks(): boolean;
  /** Where writes to the guest's used ring are logged, a guest address; -1: nowhere. */
  setLogUsed(gpa: number): void;
  /** Marks the guest's used ring dirty, where the VMM asked for it: after it was written. */
  logRing(): void;
  /** How many chains at the device touch `[gpa, gpa + size)`. */
  uses(gpa: number, size: number): number;
  /** The same by IOVA. Absent in a core that runs no guests with an IOMMU: those (`iommu` of the start) go to the other one. */
  usesIova?(iova: number, size: number): number;
  /** After {@linkcode forward}: the guest's next chain names an address that is not known yet. */
  readonly miss?: IotlbMiss | undefined;
  /** Where both rings stand. */
  progress(): QueueProgress;
  /**
   * Ends the mode. The device must have left its ring, holding nothing that it took.
   *
   * @throws SvqError RING_GAP when chains are missing in the middle: then it did hold something
   */
  finish(): QueueProgress;
  /**
   * The device is gone and can write nothing any more. What it held is offered to its successor in the fresh ring that
   * `start` names, in the order in which it was taken; it may have been written in part, so it is marked dirty.
   */
  renew(start: QueueStart): void;
  /** Ends the mode after a broken rule: nothing is rewound. @param keep what the in-flight region says stays as it is */
  abandon(keep: boolean): QueueProgress;
  /** Gives up what it holds; the mode has ended. */
  close(): void;
}

/** Longest chain that the device's ring of `start` takes, in segments. */
export function maxChainOf(start: QueueStart): number {
  const entries = start.device.indirect ? start.device.tables?.entries ?? 0 : 0;
  return Math.max(start.device.num, entries);
}
