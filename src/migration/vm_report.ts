/**
 * What goes into a migration between two QEMUs, and what comes out of it.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { QmpError } from "./qmp.ts";
import { blockerHint, type Check } from "./vm_checks.ts";
import type { RingPosition } from "./vm_relays.ts";

/** What a migration between two QEMUs is told. Times are milliseconds. */
export interface VmMigrationOptions {
  /** Monitor of the QEMU that runs the guest. */
  source: string;
  /** Monitor of the QEMU that waits for it. */
  destination: string;
  /** Relays of the source: names, or paths of control sockets. */
  sourceRelays: readonly string[];
  /** Relays of the same devices at the destination. */
  destinationRelays: readonly string[];
  /** Where the stream goes; default: where the destination listens, or a unix socket in a private folder. */
  uri?: string;
  /** Longest stop of the guest that QEMU aims at. */
  downtimeLimitMs?: number;
  /** Bytes per second. */
  maxBandwidth?: number;
  /** Cancels when it has not ended by then. */
  cancelAfterMs?: number;
  /** The same, but as a failure with exit code 124. */
  timeoutMs?: number;
  /** Migration capabilities to turn on, on both sides. */
  capabilities?: readonly string[];
  /** Codes of checks that may fail. */
  skipChecks?: readonly string[];
  /** Cancels. */
  signal?: AbortSignal;
  /** Called about ten times a second. */
  onProgress?: (progress: VmProgress) => void;
  /** Something that a reader of the log wants to know. */
  onWarning?: (message: string) => void;
}

/** Where a migration is. */
export type VmPhase = "check" | "setup" | "copy" | "switchover" | "cancel" | "verify" | "done";

/** How far a migration is. */
export interface VmProgress {
  /** What goes on. */
  phase: VmPhase;
  /** Since the start, ms. */
  elapsedMs: number;
  /** Times that the dirty log was collected. */
  round: number;
  /** Bytes sent. */
  transferred: number;
  /** Bytes left. */
  remaining: number;
  /** Bytes of RAM. */
  total: number;
  /** As of the last round. */
  dirtyPagesPerSecond: number;
  /** Bytes per second. */
  bandwidth: number;
  /** Stop of the guest that QEMU expects, ms. */
  expectedDowntimeMs: number | undefined;
}

/** One pass over the pages that were dirty. */
export interface VmRound {
  /** Pages to send at its start. */
  dirtyPages: number;
  /** Bytes sent in it. */
  bytes: number;
  /** How long it took. */
  ms: number;
}

/** How a migration ended. */
export interface VmMigrationReport {
  /** `completed`; `cancelled` (asked for) or `aborted`: the source still runs; `failed`: after the switchover. */
  outcome: "completed" | "cancelled" | "aborted" | "failed";
  /** In which phase. */
  phase: VmPhase;
  /** As seen from outside; short rounds may be seen as one. */
  rounds: VmRound[];
  /** Bytes sent. */
  bytes: number;
  /** As QEMU says. */
  totalMs: number | undefined;
  /** As QEMU says. */
  downtimeMs: number | undefined;
  /** As QEMU says. */
  setupMs: number | undefined;
  /** Every queue that ran. */
  positions: RingPosition[];
  /** The destination's run state in the end. */
  destinationState: string | undefined;
  /** What was looked at before. */
  checks: Check[];
  /** Why it did not complete. */
  error: SvqError | undefined;
}

/** The error for a command that QEMU refused before anything was copied. */
export function refused(error: unknown): SvqError {
  if (!(error instanceof QmpError)) {
    return error instanceof SvqError ? error : new SvqError("INTERNAL", error instanceof Error ? error.message : String(error));
  }
  const { command, message } = error;
  const hint = command === "migrate"
    ? blockerHint(message)
    : command === "migrate-set-capabilities"
    ? "some capabilities (multifd) must be set before the destination listens: start it with -incoming defer"
    : command === "migrate-incoming"
    ? "start the destination with -incoming defer, or give the URI at which it listens with --uri"
    : "look up the command in QEMU's QMP reference";
  return new SvqError("MIGRATION_REFUSED", `QEMU refused ${command}: ${message}`, { exitCode: EXIT.migrationAborted, hint, cause: error });
}

/** The error for a queue that lost its place. */
export function positionError({ source, destination, index, sourceBase, destinationBase }: RingPosition): SvqError {
  const at = (base: number | null, none: string) => base === null ? none : `at ${base}`;
  return new SvqError(
    "RING_POSITION_DIFFERS",
    `Queue ${index}: ${source} stopped ${at(sourceBase, "nowhere (it still runs)")}, ${destination} went on ${
      at(destinationBase, "nowhere (it was not started)")
    }`,
    {
      exitCode: EXIT.failedAfterSwitchover,
      hint: "do not trust the guest's disk: stop the guest and check it; were the relays named in the same order on both sides?",
    },
  );
}
