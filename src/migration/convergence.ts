/**
 * When to stop copying memory of a running guest, and what to do when its writes outrun the link: arithmetic, no I/O.
 *
 * @module
 */

/** What is done when a migration does not converge. */
export const NO_CONVERGENCE = ["throttle", "stop", "abort"] as const;
/** One of {@linkcode NO_CONVERGENCE}. */
export type OnNoConvergence = typeof NO_CONVERGENCE[number];

/** Shares of its time, in percent, for which a guest that writes too fast is held still: one step after the other. */
export const THROTTLE_STEPS: readonly number[] = [20, 40, 60, 80, 90, 95, 99];

/** What {@linkcode Convergence} goes by; see SourceOptions. */
export interface ConvergenceOptions {
  /** The guest is stopped when what is left takes no longer, milliseconds. */
  downtimeLimitMs: number;
  /** Rounds after which it does not converge. */
  maxIterations: number;
  /** What then. With `throttle` the guest is slowed down as soon as two rounds in a row show that it writes too fast. */
  onNoConvergence: OnNoConvergence;
}

/** What a round was like. */
export interface RoundOutcome {
  /** Pages that it sent. */
  sent: number;
  /** Pages that got dirty meanwhile. */
  dirty: number;
  /** How long the guest would stand still if it were stopped now, milliseconds. */
  estimateMs: number;
}

/** What comes next: another round, stopping the guest, or giving up. */
export type NextStep = "round" | "stop" | "give-up";

/** Decides after each round. */
export class Convergence {
  readonly #options: ConvergenceOptions;
  #round = 0;
  #hopeless = 0;
  #step = -1;

  /** Nothing has been sent yet. */
  constructor(options: ConvergenceOptions) {
    this.#options = options;
  }

  /** How much of its time the guest is to be held still, percent; it never falls. */
  get throttlePercent(): number {
    return THROTTLE_STEPS[this.#step] ?? 0;
  }

  /** After a round. */
  next({ sent, dirty, estimateMs }: RoundOutcome): NextStep {
    const { downtimeLimitMs, maxIterations, onNoConvergence } = this.#options;
    this.#round++;
    if (estimateMs <= downtimeLimitMs) return "stop";
    if (this.#round >= maxIterations) return onNoConvergence === "stop" ? "stop" : "give-up";
    // What is left must shrink by half: anything slower takes ever more rounds for ever less.
    this.#hopeless = dirty * 2 > sent ? this.#hopeless + 1 : 0;
    if (onNoConvergence === "throttle" && this.#hopeless >= 2) {
      this.#step = Math.min(this.#step + 1, THROTTLE_STEPS.length - 1);
      // The first step waits for two bad rounds, each further one for one.
      this.#hopeless = 1;
    }
    return "round";
  }
}
