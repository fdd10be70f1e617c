/**
 * The source's side of a migration: the steps of protocol.ts, each with its undo.
 *
 * @module
 */
import { DirtyBitmap } from "../dirty/bitmap.ts";
import { encodeDriverState } from "../drivers/state.ts";
import { toErrorRecord } from "../errors.ts";
import { Channel, linkLost, lossOf, RemoteError } from "./channel.ts";
import { Convergence } from "./convergence.ts";
import { digestText } from "./digest.ts";
import { blocksOf, DiskCopy, diskWish } from "./disk_copy.ts";
import { estimateMigration, FIXED_MS } from "./estimate.ts";
import { greet, type MigrationReport, receiveReports, settleDoubt } from "./handshake.ts";
import { encodeOffer } from "./offer.ts";
import { PageSender, type RoundResult } from "./page_sender.ts";
import { FRAME } from "./protocol.ts";
import { cancelled, diskRefused, InDoubt, memoryDiffers, noConvergence } from "./source_errors.ts";
import { drainTimeout, type SourceGuest } from "./source_guest.ts";
import {
  type Downtime,
  type Estimate,
  type MigrationProgress,
  type MigrationResult,
  type Phase,
  PHASES,
  type SourceOptions,
} from "./source_types.ts";
import type { Sample } from "./timeline.ts";

export * from "./source_types.ts";
export { cancelled } from "./source_errors.ts";

// How long a dry run watches what gets dirty, milliseconds.
const WATCH_MS = 300;

/** One migration, from the source. */
export class Migration implements Disposable {
  readonly #guest: SourceGuest;
  readonly #options: SourceOptions;
  readonly #rounds: RoundResult[] = [];
  readonly #marks = new Map<string, number>();
  #phase: Phase = "connect";
  #channel: Channel | undefined;
  #session = "";
  #cancelled: unknown;
  // What waits for a device, not for the link, ends by it.
  readonly #halt = new AbortController();
  #touched = false;
  #memoryIdentical: boolean | null = null;
  #verifyUs = 0;
  #remaining = 0;
  #estimateMs: number | null = null;
  #estimate: Estimate | null = null;
  #throttlePercent = 0;
  #disk: DiskCopy | undefined;
  #diskUs = 0;
  #onDisk = false;

  /** Nothing happens before {@linkcode run}. */
  constructor(guest: SourceGuest, options: SourceOptions) {
    this.#guest = guest;
    this.#options = options;
    this.#remaining = guest.map.pages;
  }

  /** How far it is. */
  get progress(): MigrationProgress {
    return {
      phase: this.#phase,
      rounds: [...this.#rounds],
      remainingPages: this.#remaining,
      bytes: this.#channel?.bytesSent ?? 0,
      bandwidth: this.#bandwidth,
      estimateMs: this.#estimateMs,
      throttlePercent: this.#throttlePercent,
    };
  }

  /** Ends the migration; the guest goes on here. @returns false when it is too late: the hand-over has begun */
  cancel(reason: unknown = cancelled()): boolean {
    if (this.#committed) return false;
    this.#cancelled = reason;
    this.#channel?.abort(reason);
    this.#halt.abort(reason);
    return true;
  }

  get #committed(): boolean {
    return PHASES.indexOf(this.#phase) >= PHASES.indexOf("commit");
  }

  /** Does it; failures are results. @throws only when the guest could not go on at the source either */
  async run(): Promise<MigrationResult> {
    try {
      const identical = await this.#prepare();
      if (identical === "possible") return this.#result("possible", null);
      await this.#commit();
    } catch (error) {
      if (error instanceof InDoubt) return this.#result("in-doubt", error);
      return await this.#undo(error);
    }
    this.#enter("completed");
    return this.#result("completed", null);
  }

  #enter(phase: Phase): void {
    if (this.#cancelled !== undefined && !this.#committed) throw this.#cancelled;
    this.#phase = phase;
    this.#mark(phase);
    this.#options.onEvent?.({ kind: "phase", phase });
  }

  #mark(name: string): void {
    this.#marks.set(name, performance.now());
  }

  async #undo(error: unknown): Promise<MigrationResult> {
    // Where it failed is what the result says.
    const outcome = this.#cancelled === undefined ? "aborted" : "cancelled";
    const resumed = this.#touched ? this.#guest.goOn() : Promise.resolve();
    await Promise.all([resumed, this.#channel?.farewell(error)]);
    await this.#disk?.close();
    this.#channel?.close();
    return this.#result(outcome, error);
  }

  #result(outcome: MigrationResult["outcome"], error: unknown): MigrationResult {
    return {
      outcome,
      phase: this.#phase,
      rounds: [...this.#rounds],
      bytes: this.#channel?.bytesSent ?? 0,
      downtimeUs: outcome === "completed" ? this.#downtime() : null,
      memoryIdentical: this.#memoryIdentical,
      estimate: this.#estimate,
      disk: this.#disk?.result ?? null,
      throttlePercent: this.#throttlePercent,
      error: error === null ? null : toErrorRecord(error),
    };
  }

  #downtime(): Downtime {
    const us = (from: string, to: string) => Math.round(((this.#marks.get(to) ?? 0) - (this.#marks.get(from) ?? 0)) * 1000);
    const state = us("state", "commit");
    const verify = Math.min(this.#verifyUs, state);
    return {
      total: us("stop", "completed"),
      stop: us("stop", "last_round"),
      disk: Math.round(this.#diskUs),
      last_round: us("last_round", "state") - Math.round(this.#diskUs),
      state: state - verify,
      verify,
      resume: us("commit", "completed"),
    };
  }

  // ---- steps 1 to 10: all can be undone

  async #prepare(): Promise<"possible" | undefined> {
    const { verify, follow, dryRun, timeoutMs } = this.#options;
    const { driver, map } = this.#guest;
    this.#enter("connect");
    this.#channel = new Channel(await this.#options.connect(), timeoutMs);
    if (this.#cancelled !== undefined) throw this.#cancelled;
    const channel = this.#channel;
    this.#session = await greet(channel);
    this.#enter("offer");
    const regions = driver.regions.map(({ gpa, size }) => ({ gpa, size }));
    const { features, workload, layout: { options: ram } } = driver;
    const disk = diskWish(this.#guest, this.#options.copyDisk);
    await channel.sendJson(
      FRAME.OFFER,
      encodeOffer({ session: this.#session, features, ram, regions, workload, verify, follow, dryRun, disk }),
    );
    const accepted = await channel.readJson(await channel.receiveHead([FRAME.ACCEPT]));
    if (disk !== null && typeof accepted.disk_sectors === "number") {
      this.#enter("disk");
      this.#disk = await DiskCopy.open(this.#guest, this.#options.drainTimeoutMs);
      await this.#disk.ask(channel, disk, accepted.disk_sectors);
    } else if (disk === "yes") {
      throw diskRefused();
    }
    if (dryRun) {
      await this.#watch();
      return "possible";
    }
    this.#enter("log");
    this.#touched = true;
    await this.#guest.logOn();
    this.#enter("rounds");
    const dirty = DirtyBitmap.covering(map.endGpa);
    using sender = new PageSender(channel, map, {
      maxBandwidth: this.#options.maxBandwidth,
      onProgress: (done) => this.#onPages(done),
    });
    const copy = this.#disk?.shared === false ? this.#disk : undefined;
    await this.#precopy(sender, dirty, copy);
    await this.#stopAndSend(sender, dirty, copy);
    return undefined;
  }

  async #watch(): Promise<void> {
    this.#touched = true;
    await this.#guest.logOn();
    const copy = this.#disk?.shared === false ? this.#disk : undefined;
    copy?.forget();
    const begun = performance.now();
    await new Promise((resolve) => setTimeout(resolve, WATCH_MS));
    const dirtyPages = this.#guest.harvest(DirtyBitmap.covering(this.#guest.map.endGpa)) + (copy?.harvest().blocks ?? 0);
    const ms = performance.now() - begun;
    await this.#guest.logOff();
    await this.#disk?.close();
    const pages = this.#guest.map.pages + blocksOf(copy?.sizeBytes ?? 0);
    this.#estimate = estimateMigration({ ...this.#options, pages, dirtyPages, ms });
  }

  #onPages(done: number): void {
    const of = this.#remaining;
    this.#options.onEvent?.({ kind: "pages", round: this.#rounds.length + 1, done, of, disk: this.#onDisk });
    if (this.#cancelled !== undefined && !this.#committed) throw this.#cancelled;
  }

  get #bandwidth(): number {
    const last = this.#rounds.at(-1);
    return last === undefined ? 0 : last.bytes / Math.max(0.1, last.ms) * 1000;
  }

  async #diskRound(sender: PageSender, copy: DiskCopy): Promise<number> {
    this.#remaining = copy.remaining;
    if (this.#remaining === 0) return 0;
    this.#onDisk = true;
    try {
      return await copy.round(sender);
    } finally {
      this.#onDisk = false;
    }
  }

  async #precopy(sender: PageSender, dirty: DirtyBitmap, copy: DiskCopy | undefined): Promise<void> {
    const { map } = this.#guest;
    const convergence = new Convergence(this.#options);
    this.#guest.harvest(dirty);
    map.markAll(dirty);
    for (let round = 1;; round++) {
      const blocks = copy === undefined ? 0 : await this.#diskRound(sender, copy);
      this.#remaining = dirty.count();
      const result = await sender.send(round, dirty, false);
      this.#rounds.push(result);
      dirty.clear();
      await this.#untilLogged();
      const dirtyPages = this.#guest.harvest(dirty);
      // The pace of the best round: small rounds measure the round trip, not the link.
      const pace = Math.min(...this.#rounds.filter((one) => one.pages > 0).map((one) => one.ms / one.pages));
      const left = copy?.harvest() ?? { blocks: 0, ms: 0 };
      const estimateMs = FIXED_MS + dirtyPages * pace + left.ms;
      this.#estimateMs = estimateMs;
      this.#remaining = dirtyPages;
      const next = convergence.next({ sent: result.pages + blocks, dirty: dirtyPages + left.blocks, estimateMs });
      const { throttlePercent } = convergence;
      const slower = throttlePercent !== this.#throttlePercent;
      // Whoever is told of the round sees what follows from it.
      this.#throttlePercent = throttlePercent;
      this.#options.onEvent?.({ kind: "round", round: result, dirtyPages, estimateMs, throttlePercent });
      if (this.#cancelled !== undefined) throw this.#cancelled;
      if (next === "stop") return;
      if (next === "give-up") throw noConvergence(round, dirtyPages, estimateMs, throttlePercent);
      if (slower) await this.#guest.throttle(throttlePercent);
    }
  }

  // A device that is slow to give its rings to the relay: until then all memory counts as dirty, and no round makes it less.
  async #untilLogged(): Promise<void> {
    const { drainTimeoutMs } = this.#options;
    const deadline = performance.now() + drainTimeoutMs;
    while (this.#guest.markingAll) {
      if (this.#cancelled !== undefined) throw this.#cancelled;
      if (performance.now() > deadline) throw drainTimeout(drainTimeoutMs);
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }

  async #stopAndSend(sender: PageSender, dirty: DirtyBitmap, copy: DiskCopy | undefined): Promise<void> {
    const channel = this.#channel!;
    const guest = this.#guest;
    this.#enter("stop");
    await guest.stop(this.#options.drainTimeoutMs, this.#halt.signal);
    this.#enter("last_round");
    if (copy !== undefined) {
      await copy.last(sender, dirty);
      this.#diskUs = (performance.now() - this.#marks.get("last_round")!) * 1000;
    }
    this.#remaining = guest.harvest(dirty);
    const last = await sender.sendUnconfirmed(this.#rounds.length + 1, dirty, true);
    const state = await guest.exportState();
    if (this.#options.run !== undefined) state.worker.run = this.#options.run();
    const sent = channel.send(FRAME.STATE, encodeDriverState(state));
    await Promise.all([sent, sender.confirm(last)]);
    this.#rounds.push(last);
    this.#remaining = 0;
    this.#enter("state");
    const begun = performance.now();
    let ownUs = 0;
    const own = this.#options.verify ? guest.map.digest().finally(() => ownUs = (performance.now() - begun) * 1000) : undefined;
    // Waited for below; what fails first is thrown.
    own?.catch(() => {});
    const prepared = await channel.readJson(await channel.receiveHead([FRAME.PREPARED]));
    if (own === undefined) return;
    this.#memoryIdentical = digestText(await own) === prepared.digest;
    // Both sides do it at the same time.
    const there = typeof prepared.verify_us === "number" ? prepared.verify_us : 0;
    this.#verifyUs = Math.round(Math.max(ownUs, there));
    if (!this.#memoryIdentical) {
      throw memoryDiffers();
    }
  }

  // ---- steps 11 and 12

  async #commit(): Promise<void> {
    const channel = this.#channel!;
    this.#enter("commit");
    channel.forgive();
    try {
      await channel.send(FRAME.COMMIT, sessionBytes(this.#session));
      await channel.receive(FRAME.RUNNING, 0);
    } catch (error) {
      // The destination's own word that it has not started.
      if (error instanceof RemoteError) throw error;
      const loss = this.#options.endIsProof ? lossOf(error) : "silence";
      channel.close();
      const outcome = await settleDoubt(this.#session, this.#options.connect, {
        timeoutMs: this.#options.timeoutMs,
        // The end of the stream without RUNNING says that it never ran: one question is enough.
        doubtTimeoutMs: loss === "end" ? 0 : this.#options.doubtTimeoutMs,
        // A process that dies with COMMIT unread resets the link. One that has read it leaves nothing unread.
        goneIsAnswer: loss === "reset",
      });
      if (outcome === "runs") return;
      if (outcome === "never" || loss === "end") throw error;
      if (loss === "reset" && outcome !== "silent") throw error;
      throw new InDoubt(error);
    }
  }

  /**
   * After `completed`, with `follow`: waits for the guest's end at the destination.
   *
   * @param onReport called with each report, and what happened since the one before: times since the destination ran
   * @returns undefined when the link was lost meanwhile; the destination goes on nevertheless
   */
  async follow(onReport?: (report: MigrationReport, samples: Sample[]) => void): Promise<MigrationReport | undefined> {
    if (this.#channel === undefined || this.#channel.closed) return undefined;
    return await receiveReports(this.#channel, onReport);
  }

  /** Stops {@linkcode follow}. */
  unfollow(): void {
    this.#channel?.abort(linkLost("Not followed any more", "end"));
  }

  /** Closes the link. */
  close(): void {
    this.#channel?.close();
  }

  /** The same as {@linkcode close}. */
  [Symbol.dispose](): void {
    this.close();
  }
}

function sessionBytes(session: string): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(session.match(/../g) ?? [], (digits) => parseInt(digits, 16));
}
