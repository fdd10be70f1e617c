/**
 * Why a migration ends at the source.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";

/** What is dirty does not get less. */
export function noConvergence(rounds: number, dirtyPages: number, estimateMs: number, throttlePercent: number): SvqError {
  const slowed = throttlePercent > 0 ? ` although the guest was held still for ${throttlePercent} % of its time` : "";
  return new SvqError(
    "NO_CONVERGENCE",
    `After ${rounds} rounds ${dirtyPages} pages are still dirty${slowed}: stopping would take about ${Math.round(estimateMs)} ms`,
    {
      exitCode: EXIT.migrationAborted,
      hint: "allow a longer --downtime-limit, more --max-iterations or --max-bandwidth, or use --on-no-convergence throttle or stop",
    },
  );
}

/** The migration was cancelled. */
export function cancelled(message = "The migration was cancelled"): SvqError {
  return new SvqError("MIGRATION_CANCELLED", message, { exitCode: EXIT.migrationAborted });
}

/** Nobody knows on which side the guest runs. */
export class InDoubt extends SvqError {
  /** The link was lost in the hand-over. */
  constructor(cause: unknown) {
    super("MIGRATION_IN_DOUBT", "The link was lost in the hand-over, and the destination does not say whether the guest runs there", {
      exitCode: EXIT.failedAfterSwitchover,
      hint: "the guest stays stopped here: look at the destination before it is started again",
      cause,
    });
  }
}

/** The memories differ. */
export function memoryDiffers(): SvqError {
  return new SvqError("MEMORY_DIFFERS", "The memory that the destination received is not the memory of the source", {
    exitCode: EXIT.migrationAborted,
    hint: "a page was written that the dirty log does not show; the guest goes on at the source",
  });
}

/** Copying the disk was asked for, and the destination does not agree. */
export function diskRefused(): SvqError {
  return new SvqError("DISK_REFUSED", "The destination takes no copy of the guest's disk", {
    exitCode: EXIT.migrationAborted,
    hint: "it was started with --copy-disk no, or its svq is older",
  });
}
