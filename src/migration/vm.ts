/**
 * Migration of a guest between two QEMUs whose devices are behind relays. The VMMs do the work; this starts it over QMP,
 * follows it, and proves on the relays that no queue lost its place.
 *
 * The relays need none of this: in mode `auto` they follow the VMM's dirty log, whoever starts the migration.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { type MigrationInfo, type QemuFacts, qemuFacts, queryMigrate, queryRunState } from "./qemu.ts";
import { QmpClient, QmpError } from "./qmp.ts";
import { pinnedMemoryChecks } from "./pinned_memory.ts";
import {
  positionError,
  refused,
  type VmMigrationOptions,
  type VmMigrationReport,
  type VmPhase,
  type VmProgress,
  type VmRound,
} from "./vm_report.ts";
import { type Check, checkError, checkMigration } from "./vm_checks.ts";
import { carryNetState, isBack, relayFacts, relayStatus, type RingPosition, ringPositions, takeMemoryEarly } from "./vm_relays.ts";
import type { RelayStatus } from "../relay/status.ts";

const POLL_MS = 100;
/** How long QEMUs and relays may take for what should be at once, ms. */
const SETTLE_MS = 30_000;
const RUNS_STATES = ["setup", "active", "wait-unplug", "pre-switchover", "device", "cancelling"];

function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** Waits for a condition. @returns whether it came true in time */
async function settled(condition: () => Promise<boolean>, timeoutMs = SETTLE_MS): Promise<boolean> {
  const deadline = performance.now() + timeoutMs;
  for (;;) {
    if (await condition()) return true;
    if (performance.now() > deadline) return false;
    await pause(50);
  }
}

/** One migration between two QEMUs. */
export class VmMigration implements AsyncDisposable {
  readonly #options: VmMigrationOptions;
  readonly #source: QmpClient;
  readonly #destination: QmpClient;
  readonly #begun = performance.now();
  readonly #rounds: VmRound[] = [];
  #round = { number: 0, dirtyPages: 0, transferred: 0, atMs: 0 };
  #phase: VmPhase = "check";
  #checks: Check[] = [];
  #before: RelayStatus[] = [];
  #sourceFacts: QemuFacts | undefined;
  #destinationFacts: QemuFacts | undefined;
  #last: MigrationInfo | undefined;
  #cancelReason: SvqError | undefined;
  #folder: string | undefined;

  private constructor(options: VmMigrationOptions, source: QmpClient, destination: QmpClient) {
    this.#options = options;
    this.#source = source;
    this.#destination = destination;
  }

  /** Connects to both monitors. @throws SvqError QMP_UNREACHABLE, QMP_TIMEOUT, QMP_PROTOCOL */
  static async open(options: VmMigrationOptions): Promise<VmMigration> {
    const source = await QmpClient.connect(options.source);
    try {
      return new VmMigration(options, source, await QmpClient.connect(options.destination));
    } catch (error) {
      await source.close();
      throw error;
    }
  }

  /** Looks at both QEMUs and all relays, and changes nothing. */
  async check(): Promise<Check[]> {
    const { source, destination, sourceRelays, destinationRelays, capabilities = [], skipChecks = [] } = this.#options;
    const facts = {
      source: await qemuFacts(this.#source, source),
      destination: await qemuFacts(this.#destination, destination),
      sourceRelays: await Promise.all(sourceRelays.map(relayFacts)),
      destinationRelays: await Promise.all(destinationRelays.map(relayFacts)),
      capabilities,
    };
    this.#sourceFacts = facts.source;
    this.#destinationFacts = facts.destination;
    this.#before = facts.sourceRelays.flatMap(({ status }) => status ?? []);
    const pinned = [
      ...await pinnedMemoryChecks("source", this.#source, facts.sourceRelays),
      ...await pinnedMemoryChecks("destination", this.#destination, facts.destinationRelays),
    ];
    this.#checks = [...checkMigration(facts), ...pinned].map((check) =>
      check.ok || !skipChecks.includes(check.code) ? check : { ...check, ok: true, message: `${check.message} (skipped)` }
    );
    return this.#checks;
  }

  /**
   * Checks, migrates and verifies. What became of it is in the report, its error included.
   *
   * @throws SvqError of the first check that failed; nothing was started then
   */
  async run(): Promise<VmMigrationReport> {
    const failed = (await this.check()).find((check) => !check.ok);
    if (failed !== undefined) throw checkError(failed);
    const stopWatching = this.#watchForCancel();
    try {
      if (this.#cancelReason !== undefined) return this.#report("cancelled", this.#cancelReason);
      return await this.#migrate();
    } finally {
      stopWatching();
    }
  }

  #watchForCancel(): () => void {
    const { signal, cancelAfterMs, timeoutMs } = this.#options;
    const timers: ReturnType<typeof setTimeout>[] = [];
    const cancel = (error: SvqError) => this.#cancelReason ??= error;
    const after = (ms: number | undefined, error: () => SvqError) => {
      if (ms !== undefined) timers.push(setTimeout(() => cancel(error()), ms));
    };
    after(cancelAfterMs, () =>
      new SvqError("MIGRATION_CANCELLED", `The migration was cancelled after ${cancelAfterMs} ms, as asked`, {
        exitCode: EXIT.migrationAborted,
        hint: "the guest runs at the source; start the destination's QEMU anew before the next attempt",
      }));
    after(timeoutMs, () =>
      new SvqError("MIGRATION_TIMEOUT", `The migration did not end within ${timeoutMs} ms and was cancelled`, {
        exitCode: EXIT.timeout,
        hint: "the guest runs at the source; raise --max-bandwidth or --downtime-limit, or try --capability auto-converge",
      }));
    const onAbort = () => {
      const { reason } = signal!;
      cancel(reason instanceof SvqError ? reason : new SvqError("INTERRUPTED", "Interrupted", { exitCode: EXIT.interrupted }));
    };
    if (signal?.aborted) onAbort();
    signal?.addEventListener("abort", onAbort, { once: true });
    return () => {
      timers.forEach(clearTimeout);
      signal?.removeEventListener("abort", onAbort);
    };
  }

  async #migrate(): Promise<VmMigrationReport> {
    this.#phase = "setup";
    let undo: () => Promise<void> = () => Promise.resolve();
    let info: MigrationInfo;
    try {
      undo = await this.#setParameters();
      const uri = await this.#prepareDestination();
      const { sourceRelays, destinationRelays } = this.#options;
      for (const [i, name] of sourceRelays.entries()) {
        await carryNetState(name, destinationRelays[i]!);
        const why = await takeMemoryEarly(name, destinationRelays[i]!);
        if (why !== undefined) this.#warn(why);
      }
      await this.#source.execute("migrate", { uri });
    } catch (error) {
      await undo().catch(() => {});
      return this.#report("aborted", refused(error));
    }
    try {
      info = await this.#follow();
    } catch (error) {
      return await this.#lostSource(error);
    }
    if (info.status === "completed") return await this.#completed();
    await undo().catch((error) => this.#warn(`The source's migration parameters were not restored: ${error.message}`));
    return await this.#notCompleted(info);
  }

  /** Sets what was asked for. @returns what takes it back at the source, for the next migration */
  async #setParameters(): Promise<() => Promise<void>> {
    const { capabilities = [], downtimeLimitMs, maxBandwidth } = this.#options;
    const wanted = {
      ...(downtimeLimitMs === undefined ? {} : { "downtime-limit": Math.max(1, Math.round(downtimeLimitMs)) }),
      ...(maxBandwidth === undefined ? {} : { "max-bandwidth": Math.round(maxBandwidth) }),
    };
    const before = await this.#source.execute<Record<string, unknown>>("query-migrate-parameters");
    const old = Object.fromEntries(Object.keys(wanted).map((name) => [name, before[name]]).filter(([, value]) => value !== undefined));
    const setCapabilities = async (state: boolean) => {
      const list = { capabilities: capabilities.map((capability) => ({ capability, state })) };
      await this.#source.execute("migrate-set-capabilities", list);
      if (state) await this.#destination.execute("migrate-set-capabilities", list);
    };
    if (capabilities.length > 0) await setCapabilities(true);
    if (Object.keys(wanted).length > 0) await this.#source.execute("migrate-set-parameters", wanted);
    return async () => {
      if (Object.keys(old).length > 0) await this.#source.execute("migrate-set-parameters", old);
      if (capabilities.length > 0) await setCapabilities(false);
    };
  }

  /** Makes the destination listen, unless it does. @returns where the source connects */
  async #prepareDestination(): Promise<string> {
    const listening = this.#destinationFacts!.migration.listening;
    if (listening.length > 0) return this.#options.uri ?? listening[0]!;
    let { uri } = this.#options;
    if (uri === undefined) {
      // Mode 0700: whoever could connect there would read the guest's memory or replace it.
      this.#folder = await Deno.makeTempDir({ prefix: "svq-migrate-" });
      uri = `unix:${this.#folder}/stream`;
    }
    try {
      await this.#destination.execute("migrate-incoming", { uri });
    } catch (error) {
      // Started with -incoming of a kind that has no address to show (fd:, exec:): it listens already.
      if (!(error instanceof QmpError && this.#options.uri !== undefined && /already|not specified/.test(error.message))) throw error;
    }
    // With port 0 the destination has chosen one.
    return /:0$/.test(uri) ? (await queryMigrate(this.#destination)).listening[0] ?? uri : uri;
  }

  // Until it has ended, one way or the other. Cancelling is asked for once; QEMU decides whether it was in time.
  async #follow(): Promise<MigrationInfo> {
    let cancelled = false;
    for (;;) {
      const info = await queryMigrate(this.#source);
      this.#last = info;
      this.#takeRound(info);
      if (!RUNS_STATES.includes(info.status) && info.status !== "none") return info;
      this.#phase = cancelled
        ? "cancel"
        : info.status === "setup" || info.status === "none"
        ? "setup"
        : info.status === "active"
        ? "copy"
        : "switchover";
      this.#options.onProgress?.(this.#progress(info));
      if (info.status === "pre-switchover") await this.#source.execute("migrate-continue", { state: "pre-switchover" });
      if (this.#cancelReason !== undefined && !cancelled) {
        cancelled = true;
        await this.#source.execute("migrate_cancel", undefined, { timeoutMs: SETTLE_MS });
      }
      await pause(cancelled ? 20 : POLL_MS);
    }
  }

  #progress(info: MigrationInfo): VmProgress {
    const { ram } = info;
    return {
      phase: this.#phase,
      elapsedMs: info.totalMs ?? performance.now() - this.#begun,
      round: ram?.rounds ?? 0,
      transferred: ram?.transferred ?? 0,
      remaining: ram?.remaining ?? 0,
      total: ram?.total ?? 0,
      dirtyPagesPerSecond: ram?.dirtyPagesPerSecond ?? 0,
      bandwidth: ram?.bandwidth ?? 0,
      expectedDowntimeMs: info.expectedDowntimeMs,
    };
  }

  #takeRound(info: MigrationInfo): void {
    const { ram } = info;
    if (ram === undefined) return;
    const now = performance.now();
    const ended = !RUNS_STATES.includes(info.status);
    if (ram.rounds === this.#round.number && !ended) return;
    if (this.#round.number > 0) {
      this.#rounds.push({
        dirtyPages: this.#round.dirtyPages,
        bytes: ram.transferred - this.#round.transferred,
        ms: Math.round(now - this.#round.atMs),
      });
    }
    this.#round = {
      number: ended ? 0 : ram.rounds,
      dirtyPages: Math.round(ram.remaining / ram.pageSize),
      transferred: ram.transferred,
      atMs: now,
    };
  }

  async #completed(): Promise<VmMigrationReport> {
    this.#phase = "switchover";
    const state = await this.#destinationTakesOver();
    if (state === undefined) {
      const info = await queryMigrate(this.#destination).catch(() => undefined);
      return this.#report(
        "failed",
        new SvqError(
          "DESTINATION_LOST",
          `The destination did not take the guest over${info?.error === undefined ? "" : `: ${info.error}`}`,
          {
            exitCode: EXIT.failedAfterSwitchover,
            hint: "the source still holds the guest, stopped: when the destination is certainly gone, QMP cont lets it go on there",
          },
        ),
      );
    }
    if (this.#cancelReason !== undefined) this.#warn("It was too late to cancel: the guest is at the destination");
    this.#phase = "verify";
    const paused = state !== "running";
    const positions = await this.#verify(paused);
    const wrong = positions.find(({ agree }) => agree === false);
    if (wrong !== undefined) {
      return this.#report("failed", positionError(wrong), positions, state);
    }
    this.#phase = "done";
    return this.#report("completed", undefined, positions, state);
  }

  // A QEMU that cannot load the state ends, so that its monitor closes.
  async #destinationTakesOver(): Promise<string | undefined> {
    let state: string | undefined;
    try {
      await settled(async () => {
        state = await queryRunState(this.#destination);
        return state !== "inmigrate";
      });
    } catch {
      return undefined;
    }
    return state === "inmigrate" ? undefined : state;
  }

  async #verify(paused: boolean): Promise<RingPosition[]> {
    const { sourceRelays, destinationRelays } = this.#options;
    let positions: RingPosition[] = [];
    // The VMM does not wait for the relay when it starts a queue, and a device that pins guest memory takes its time for that.
    await settled(async () => {
      positions = [];
      for (const [i, before] of this.#before.entries()) {
        const source = await relayStatus(sourceRelays[i]!);
        positions.push(...ringPositions(before, source, await relayStatus(destinationRelays[i]!), paused));
      }
      return positions.every(({ sourceBase, destinationBase }) => sourceBase !== null && (paused || destinationBase !== null));
    }, SETTLE_MS);
    return positions;
  }

  async #notCompleted(info: MigrationInfo): Promise<VmMigrationReport> {
    const was = this.#sourceFacts!.runState;
    let state = "unknown";
    const back = await settled(async () => (state = await queryRunState(this.#source)) === was).catch(() => false);
    if (!back) {
      return this.#report(
        "failed",
        new SvqError("SOURCE_STOPPED", `The migration ${info.status} and the source's guest is ${state} instead of ${was}`, {
          exitCode: EXIT.failedAfterSwitchover,
          hint: "look at the destination first; only when the guest does not run there, QMP cont lets it go on at the source",
        }),
      );
    }
    await this.#relaysBack();
    if (info.status === "cancelled" && this.#cancelReason !== undefined) return this.#report("cancelled", this.#cancelReason);
    const what = info.status === "cancelled" ? "was cancelled by somebody else" : `failed: ${info.error ?? "QEMU gives no reason"}`;
    return this.#report(
      "aborted",
      new SvqError("MIGRATION_ABORTED", `The migration ${what}`, {
        exitCode: EXIT.migrationAborted,
        hint: "the guest runs at the source; the log of the destination's QEMU may say more",
      }),
    );
  }

  async #relaysBack(): Promise<void> {
    for (const [i, name] of this.#options.sourceRelays.entries()) {
      const back = await settled(async () => isBack(await relayStatus(name), this.#before[i]!)).catch(() => false);
      if (!back) this.#warn(`Relay ${name} is not back in its mode yet: svq relay status ${name}`);
    }
  }

  async #lostSource(error: unknown): Promise<VmMigrationReport> {
    const state = await queryRunState(this.#destination).catch(() => "gone");
    const message = error instanceof Error ? error.message : String(error);
    const there = state === "running" || state === "paused";
    return this.#report(
      "failed",
      new SvqError("SOURCE_LOST", `The source's monitor was lost in the middle (${message}); the destination is ${state}`, {
        exitCode: there ? EXIT.failedAfterSwitchover : EXIT.failed,
        hint: there ? "the guest is at the destination; the ring positions were not compared" : "look whether the source's QEMU still runs",
        cause: error,
      }),
      [],
      state,
    );
  }

  #warn(message: string): void {
    this.#options.onWarning?.(message);
  }

  #report(
    outcome: VmMigrationReport["outcome"],
    error: SvqError | undefined,
    positions: RingPosition[] = [],
    destinationState?: string,
  ): VmMigrationReport {
    const last = this.#last;
    return {
      outcome,
      phase: this.#phase,
      rounds: this.#rounds,
      bytes: last?.ram?.transferred ?? 0,
      totalMs: last?.totalMs,
      downtimeMs: last?.downtimeMs,
      setupMs: last?.setupMs,
      positions,
      destinationState,
      checks: this.#checks,
      error,
    };
  }

  /** Closes both monitors; a migration that runs goes on. */
  async close(): Promise<void> {
    await Promise.all([this.#source.close(), this.#destination.close()]);
    if (this.#folder !== undefined) await Deno.remove(this.#folder, { recursive: true }).catch(() => {});
    this.#folder = undefined;
  }

  /** The same as {@linkcode close}. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}
