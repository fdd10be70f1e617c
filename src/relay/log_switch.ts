/**
 * Turning the dirty log on and off while the guest runs. Turning it on is never refused and never late: an older VMM would
 * abort. While a queue cannot be switched yet, all guest memory counts as dirty.
 *
 * @module
 */
import type { GuestMemory } from "../memory/guest_memory.ts";
import type { DirtyLogging } from "./dirty_logging.ts";
import { pause } from "./ring_rest.ts";

/** While a device that nobody follows writes guest memory, all of it is marked dirty this often, ms. */
const MARK_ALL_INTERVAL_MS = 50;
/** After a switch that failed, the next attempt, ms. */
const SWITCH_RETRY_MS = 500;

/** What a {@linkcode LogSwitch} asks its relay. */
export interface LogSwitchContext {
  /** Brings every running queue into the mode that it should be in. */
  applyMode: () => Promise<void>;
  /** Is every running queue in the mode that it should be in? */
  applied: () => boolean;
  /** Has the relay ended? */
  closed: () => boolean;
  /** How long turning the log on may keep the VMM waiting, ms. */
  timeoutMs: () => number;
  /** A line for the log. */
  log: (message: string) => void;
  /** A switch failed; another try follows. */
  report: (error: unknown) => void;
}

/** Is the log on, and does everybody follow it? */
export class LogSwitch {
  readonly #dirty: DirtyLogging;
  readonly #memory: GuestMemory;
  readonly #context: LogSwitchContext;
  #on = false;
  #markingAll = 0;
  /** A relay before this one was logging when it ended: what its device wrote last may have no bit. */
  #tookOver = false;

  /** Off. */
  constructor(dirty: DirtyLogging, memory: GuestMemory, context: LogSwitchContext) {
    this.#dirty = dirty;
    this.#memory = memory;
    this.#context = context;
  }

  /** Has the front-end turned the dirty log on? */
  get on(): boolean {
    return this.#on;
  }

  /** Is all guest memory being marked dirty because a switch takes long? */
  get markingAll(): boolean {
    return this.#markingAll > 0;
  }

  /** Marks all guest memory where a queue may not be followed yet. */
  markAllIfBehind(): void {
    if (this.markingAll && this.#on) this.#markAll();
  }

  #markAll(): void {
    this.#dirty.markAll(this.#memory.regions);
  }

  /** The front-end has given memory. */
  memoryGrew(): void {
    if (this.#tookOver && this.#on) this.#markAll();
    this.#tookOver = false;
  }

  /**
   * The front-end wants the log on or off. Resolves when every running queue logs, or after the time-out.
   *
   * @param first it is the first that this front-end says: its log was on before
   */
  async set(on: boolean, first = false): Promise<void> {
    if (on && first) this.#tookOver = true;
    const { applyMode, log, report } = this.#context;
    if (on !== this.#on) {
      this.#on = on;
      if (on) await this.#dirty.start(this.#memory.endGpa);
      log(on ? "the VMM turned the dirty log on" : "the VMM turned the dirty log off");
    }
    const switched = applyMode();
    if (on) await this.#orMarkAll(switched);
    else switched.then(() => this.#on ? undefined : this.#dirty.stop()).catch(report);
  }

  async #orMarkAll(switched: Promise<void>): Promise<void> {
    let done = false;
    const finished = this.#untilLogging(switched).then(() => done = true);
    let timer: ReturnType<typeof setTimeout> | undefined;
    const timeout = new Promise<void>((resolve) => timer = setTimeout(resolve, this.#context.timeoutMs()));
    await Promise.race([finished, timeout]);
    clearTimeout(timer);
    if (!done) this.#markAllUntil(() => done);
  }

  // A switch that fails leaves a device at work that nobody follows: the migration must not end before another try went well.
  async #untilLogging(switched: Promise<void>): Promise<void> {
    const { applyMode, applied, closed, report } = this.#context;
    for (;;) {
      await switched.catch(report);
      if (applied() || !this.#on || closed()) return;
      await pause(SWITCH_RETRY_MS);
      switched = applyMode();
    }
  }

  #markAllUntil(done: () => boolean): void {
    const { log, timeoutMs, closed } = this.#context;
    log(`switching takes longer than ${timeoutMs()} ms: all guest memory counts as dirty until it is done`);
    this.#markingAll++;
    this.#markAll();
    (async () => {
      while (!done() && !closed()) {
        await pause(MARK_ALL_INTERVAL_MS);
        if (this.#on) this.#markAll();
      }
      this.#markingAll--;
    })();
  }
}
