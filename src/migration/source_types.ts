/**
 * What the source's side of a migration is told, and what it tells.
 *
 * @module
 */
import type { RunCommand } from "../drivers/messages.ts";
import type { ErrorRecord } from "../errors.ts";
import type { UnixStream } from "../ffi/mod.ts";
import type { ConvergenceOptions } from "./convergence.ts";
import type { CopyDisk, DiskResult } from "./disk_copy.ts";
import type { RoundResult } from "./page_sender.ts";

/** Where a migration is, in order. After `commit` it cannot be undone from here. */
export const PHASES = ["connect", "offer", "disk", "log", "rounds", "stop", "last_round", "state", "commit", "completed"] as const;
/** One of {@linkcode PHASES}. */
export type Phase = typeof PHASES[number];

/** How a migration is done. */
export interface SourceOptions extends ConvergenceOptions {
  /** Connects to the destination; called again when the outcome is in doubt. */
  connect: () => Promise<UnixStream>;
  /** Longest silence of the other side, milliseconds. */
  timeoutMs: number;
  /** How long the device may hold its rings when they are stopped, milliseconds. */
  drainTimeoutMs: number;
  /** Bytes per second while the guest runs; infinite for no limit. */
  maxBandwidth: number;
  /** Compare all of memory on both sides while both stand still. */
  verify: boolean;
  /** Have the destination report how the guest does. */
  follow: boolean;
  /** Copy the guest's disk: where the destination's is another one, always, or never (then both must share it). */
  copyDisk: CopyDisk;
  /** Only ask whether it would work, and measure how fast the guest writes. */
  dryRun: boolean;
  /**
   * The end of the stream, or its reset, proves that the destination never said anything further: what it wrote is delivered
   * before. So it is where the destination's socket is the link (unix, TCP), and not where bytes wait in a process on their way.
   */
  endIsProof: boolean;
  /** How long to ask for the outcome when the link was lost in the hand-over, milliseconds. */
  doubtTimeoutMs: number;
  /** The run that goes on at the destination; default: the one that goes on here. */
  run?: () => RunCommand | undefined;
  /** Called when something happened. */
  onEvent?: (event: MigrationEvent) => void;
}

/** Defaults of {@linkcode SourceOptions}. */
export const DEFAULT_SOURCE_OPTIONS = {
  timeoutMs: 30_000,
  drainTimeoutMs: 10_000,
  downtimeLimitMs: 300,
  maxBandwidth: Infinity,
  maxIterations: 30,
  onNoConvergence: "stop",
  verify: true,
  follow: true,
  copyDisk: "no",
  dryRun: false,
  endIsProof: true,
  doubtTimeoutMs: 60_000,
} as const satisfies Partial<SourceOptions>;

/** What {@linkcode SourceOptions.onEvent} is told. */
export type MigrationEvent =
  | { kind: "phase"; phase: Phase }
  | { kind: "round"; round: RoundResult; dirtyPages: number; estimateMs: number; throttlePercent: number }
  | { kind: "pages"; round: number; done: number; of: number; disk: boolean };

/** The parts of the time in which the guest stood still, microseconds. */
export interface Downtime {
  /** From pausing the guest until the destination said that it runs. */
  total: number;
  /** Pause the guest, take the rings from the device. */
  stop: number;
  /** The last blocks of the disk. */
  disk: number;
  /** The last pages. */
  last_round: number;
  /** State of rings and driver, until the destination was prepared. */
  state: number;
  /** Comparing all of memory. */
  verify: number;
  /** From COMMIT to RUNNING. */
  resume: number;
}

/** What a dry run expects. */
export interface Estimate {
  /** Bytes of pages that the guest and its device write per second. */
  dirtyBytesPerS: number;
  /** Bytes per second that were assumed: `maxBandwidth`, or {@linkcode ASSUMED_BANDWIDTH} without a limit. */
  bandwidth: number;
  /** Rounds before the guest is stopped. */
  rounds: number;
  /** Does it come below the downtime limit? */
  converges: boolean;
  /** Expected downtime, milliseconds. */
  downtimeMs: number;
  /** How much of its time the guest is held still in the end, percent. */
  throttlePercent: number;
}

/** Bandwidth that a dry run assumes where no limit is given, bytes per second. */
export const ASSUMED_BANDWIDTH = 500e6;

/** How a migration ended. */
export interface MigrationResult {
  /** `completed`: the guest runs at the destination. `in-doubt`: nobody knows. Otherwise it runs here. */
  outcome: "completed" | "cancelled" | "aborted" | "in-doubt" | "possible";
  /** Where it ended. */
  phase: Phase;
  /** All rounds, the one while the guest stood still included. */
  rounds: RoundResult[];
  /** Bytes sent in all. */
  bytes: number;
  /** null where the guest did not stop, or not for good. */
  downtimeUs: Downtime | null;
  /** null where it was not compared. */
  memoryIdentical: boolean | null;
  /** What became of the disk; null where nobody asked. */
  disk: DiskResult | null;
  /** After a dry run. */
  estimate: Estimate | null;
  /** How much of its time the guest was held still at most before it was stopped, percent. */
  throttlePercent: number;
  /** Why it did not complete. */
  error: ErrorRecord | null;
}

/** How far a migration is. */
export interface MigrationProgress {
  /** Which phase. */
  phase: Phase;
  /** Rounds done. */
  rounds: RoundResult[];
  /** Pages to go in this round. */
  remainingPages: number;
  /** Bytes sent so far. */
  bytes: number;
  /** Bytes per second, from the last round. */
  bandwidth: number;
  /** Expected downtime now, milliseconds; null before the first round is done. */
  estimateMs: number | null;
  /** How much of its time the guest is held still, percent. */
  throttlePercent: number;
}
