/**
 * When a Worker looks at its queues again and again instead of sleeping, and for how long.
 *
 * @module
 */

/** How long a Worker looks for more before it sleeps: microseconds, 0 for never, or what has shown to be worth it. */
export type PollChoice = number | "auto";

/** Longest that `auto` polls, microseconds: about what a sleep and a wake-up cost both sides. */
const AUTO_MAX_US = 64;
/** What it begins with. */
const AUTO_FIRST_US = 16;
/** Two looks so far apart: another thread had this CPU in between, and may well have been the one that is waited for. */
const PREEMPTED_US = 200;
/** So many rounds are judged together: fewer finds than half of them, and polling has not paid. */
const TRIAL_ROUNDS = 16;
/** How long `auto` does not poll after that, at first and at most, microseconds. */
const HOLD_FIRST_US = 10_000;
const HOLD_MAX_US = 1_000_000;

/**
 * The time to poll for. A fixed one stays what it is. `auto` grows while sleeps turn out to be short, so that polling would
 * have spared them, and shrinks while they are long. It stops for a while, longer each time, when it does not pay: the Worker was taken
 * off its CPU while it polled, or most rounds find nothing although the sleeps after them are short. Then what is waited for needs
 * this very CPU. All times are microseconds of one clock, which the caller reads.
 */
export class Polling {
  readonly #fixed: boolean;
  readonly #max: number;
  #budget: number;
  #heldUntil = -Infinity;
  #hold = HOLD_FIRST_US;
  #heldOff = 0;
  #rounds = 0;
  #finds = 0;

  /**
   * @param choice what the user wants
   * @param spare CPUs that this process may use beyond one for each Worker: with none, `auto` never polls
   */
  constructor(choice: PollChoice, spare: number) {
    this.#fixed = choice !== "auto";
    this.#max = choice === "auto" ? spare > 0 ? AUTO_MAX_US : 0 : choice;
    this.#budget = this.#fixed ? this.#max : 0;
  }

  /** How long to look after the last work, microseconds; 0: sleep at once. */
  get budgetUs(): number {
    return this.#budget;
  }

  /** How often `auto` has stopped because it did not pay. */
  get heldOff(): number {
    return this.#heldOff;
  }

  /** There was work after a sleep of `us`. */
  slept(us: number, now: number): void {
    if (this.#fixed || now < this.#heldUntil) return;
    if (us <= this.#max) this.#budget = Math.min(this.#max, this.#budget === 0 ? AUTO_FIRST_US : this.#budget * 2);
    else this.#budget = this.#budget <= AUTO_FIRST_US ? 0 : this.#budget / 2;
  }

  /** Two looks in one round of polling lay `us` apart. @returns whether polling has to end here */
  lap(us: number, now: number): boolean {
    if (us < PREEMPTED_US) return false;
    if (this.#fixed) return false;
    this.#stop(now);
    return true;
  }

  /** A round of polling is over. @param found it found work at least once */
  ended(found: boolean, now: number): void {
    if (this.#fixed) return;
    this.#rounds++;
    if (found) this.#finds++;
    if (this.#rounds < TRIAL_ROUNDS) return;
    if (this.#finds * 2 < this.#rounds) this.#stop(now);
    // It pays: what disturbs it next is another matter.
    else this.#hold = HOLD_FIRST_US;
    this.#rounds = this.#finds = 0;
  }

  #stop(now: number): void {
    this.#heldUntil = now + this.#hold;
    this.#hold = Math.min(HOLD_MAX_US, this.#hold * 2);
    this.#budget = 0;
    this.#rounds = this.#finds = 0;
    this.#heldOff++;
  }
}
