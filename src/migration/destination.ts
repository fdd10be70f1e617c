/**
 * The destination's side of a migration: it listens, checks, receives, and starts the guest when the source has let go.
 * The steps are those of protocol.ts.
 *
 * @module
 */
import { DirtyBitmap } from "../dirty/bitmap.ts";
import { EmbeddedDriver } from "../drivers/embedded_driver.ts";
import { RamLayout } from "../drivers/layout.ts";
import { decodeDriverState, type DriverState } from "../drivers/state.ts";
import { EXIT, SvqError, toErrorRecord } from "../errors.ts";
import { createMemfd, ReactorCancelled, type UnixStream } from "../ffi/mod.ts";
import type { Relay, RelayConfig } from "../relay/relay.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import { Channel, type FrameHead } from "./channel.ts";
import { type Digest, digestText } from "./digest.ts";
import { DiskSink } from "./disk_sink.ts";
import { Guest, newRelay } from "./guest.ts";
import { encodeOutcome, hexText, type OutcomeName, reportOf, welcome } from "./handshake.ts";
import { checkOffer, decodeOffer, type Offer } from "./offer.ts";
import { PageMap, PageReceiver } from "./pages.ts";
import { decodeRound, FRAME, SESSION_BYTES, violation } from "./protocol.ts";
import { encodeSamples, type Sample, Sampler } from "./timeline.ts";
import type { StreamListener } from "./uri.ts";

/** Connections served at the same time. */
const MAX_CONNECTIONS = 8;
/** How often a source that follows is told how the guest does, milliseconds. */
const REPORT_MS = 1000;
/** Times that a source may ask what the disk holds. */
const MAX_QUESTIONS = 16;
/** How long a source waits for a guest before it that has just given up, milliseconds. */
const BUSY_MS = 3000;
/** Sessions whose outcome is remembered. */
const MAX_SESSIONS = 64;

/** How a destination works. */
export interface DestinationOptions {
  /** Opens the device; called for each migration. */
  openDevice: () => Promise<VhostBackend>;
  /** The relay in front of it. */
  relay: RelayConfig;
  /** Longest silence of a source, milliseconds. */
  timeoutMs: number;
  /** Let a guest whose disk is another one bring its blocks, which overwrite the device's. */
  copyDisk: boolean;
  /** Most bytes of guest memory to take. */
  maxMemory: number;
  /** Where log lines go. */
  log: (level: "error" | "warning" | "info" | "debug", message: string) => void;
}

interface Session {
  id: string;
  channel: Channel;
  /** Until COMMIT came, the session can still be given up. */
  committed: boolean;
  outcome: Promise<OutcomeName>;
}

/** Waits for guests. */
export class Destination implements AsyncDisposable {
  readonly #listener: StreamListener;
  readonly #options: DestinationOptions;
  readonly #sessions = new Map<string, Session>();
  readonly #open = new Set<Channel>();
  readonly #arrived = Promise.withResolvers<Guest>();
  readonly #serving = new Set<Promise<void>>();
  readonly #reports = new Set<Promise<void>>();
  // A guest is arriving: settled when it no longer is.
  #busy: PromiseWithResolvers<void> | undefined;
  #occupied = false;
  #closed = false;

  /** Takes ownership of a listening socket and serves at once. */
  constructor(listener: StreamListener, options: DestinationOptions) {
    this.#listener = listener;
    this.#options = options;
    this.#arrived.promise.catch(() => {});
    this.#accept();
  }

  /** Resolves when a guest has arrived and runs. It is the caller's. @throws SvqError CLOSED */
  arrived(): Promise<Guest> {
    return this.#arrived.promise;
  }

  async #accept(): Promise<void> {
    for (;;) {
      let stream: UnixStream;
      try {
        stream = await this.#listener.accept();
      } catch (error) {
        if (this.#closed || this.#listener.closed || error instanceof ReactorCancelled) return;
        await new Promise((resolve) => setTimeout(resolve, 100));
        continue;
      }
      if (this.#open.size >= MAX_CONNECTIONS) {
        stream.close();
        continue;
      }
      const serving: Promise<void> = this.#serve(stream).finally(() => this.#serving.delete(serving));
      this.#serving.add(serving);
    }
  }

  async #serve(stream: UnixStream): Promise<void> {
    const channel = new Channel(stream, this.#options.timeoutMs);
    this.#open.add(channel);
    try {
      const session = await welcome(channel);
      const head = await channel.receiveHead([FRAME.OFFER, FRAME.QUERY]);
      if (head.type === FRAME.QUERY) await this.#answer(channel, head);
      else await this.#take(channel, session, head);
    } catch (error) {
      const { message } = toErrorRecord(error);
      this.#options.log(this.#closed ? "debug" : "warning", `migration ended: ${message}`);
      await channel.farewell(error);
    } finally {
      this.#open.delete(channel);
      channel.close();
    }
  }

  async #answer(channel: Channel, head: FrameHead): Promise<void> {
    const id = hexText(await channel.readPayload(head, SESSION_BYTES));
    const session = this.#sessions.get(id);
    // Whoever asks has given the old link up: what has not been committed there never will be.
    if (session !== undefined && !session.committed) session.channel.abort(violation("it asks for the outcome before COMMIT"));
    await channel.send(FRAME.OUTCOME, encodeOutcome(session === undefined ? "unknown" : await session.outcome));
  }

  async #take(channel: Channel, id: string, head: FrameHead): Promise<void> {
    await this.#free();
    this.#busy = Promise.withResolvers();
    const outcome = Promise.withResolvers<OutcomeName>();
    const session: Session = { id, channel, committed: false, outcome: outcome.promise };
    this.#remember(session);
    try {
      const guest = await this.#receive(session, head);
      outcome.resolve(guest === undefined ? "never" : "runs");
      if (guest === undefined) return;
      this.#occupied = true;
      const { follow } = guest;
      this.#arrived.resolve(guest.guest);
      if (follow) {
        const report = this.#report(channel, guest.guest.driver);
        this.#reports.add(report);
        await report;
      }
    } finally {
      outcome.resolve("never");
      this.#busy.resolve();
      this.#busy = undefined;
    }
  }

  // A migration that was cancelled is heard of here a little later, and its device closed after that: the next source waits for it.
  async #free(): Promise<void> {
    let late = false;
    const end = Promise.withResolvers<void>();
    const timer = setTimeout(() => {
      late = true;
      end.resolve();
    }, BUSY_MS);
    while (this.#busy !== undefined && !this.#occupied && !late) await Promise.race([this.#busy.promise, end.promise]);
    clearTimeout(timer);
    if (this.#closed) throw closing();
    if (this.#busy === undefined && !this.#occupied) return;
    const [reason, hint] = this.#occupied ? ["a guest runs here already", "one svq migrate listen takes one guest: start another one"] : [
      "another guest is arriving",
      "try again when it has arrived or given up; svq migrate status, where it comes from, says how far it is",
    ];
    throw new SvqError("DESTINATION_BUSY", `The destination is taken: ${reason}`, { exitCode: EXIT.migrationAborted, hint });
  }

  #remember(session: Session): void {
    this.#sessions.set(session.id, session);
    for (const old of this.#sessions.keys()) {
      if (this.#sessions.size <= MAX_SESSIONS) break;
      this.#sessions.delete(old);
    }
  }

  async #receive(session: Session, head: FrameHead): Promise<{ guest: Guest; follow: boolean } | undefined> {
    const { channel } = session;
    const { log } = this.#options;
    const offer = decodeOffer(await channel.readJson(head), session.id);
    log("info", `a guest with ${offer.ram.ramSize >> 20} MiB of memory ${offer.dryRun ? "might come" : "is coming"}`);
    const device = await this.#options.openDevice();
    let relay: Relay | undefined;
    let driver: EmbeddedDriver | undefined;
    let sink: DiskSink | undefined;
    try {
      await checkOffer(offer, device, this.#options.maxMemory);
      // A guest with packed rings keeps them: where the device has none, the relay shadows them.
      const config: RelayConfig = offer.ram.packed ? { ...this.#options.relay, guestRing: "packed" } : this.#options.relay;
      relay = newRelay(device, config, log);
      const { ram, features, workload } = offer;
      driver = await EmbeddedDriver.standby(relay, createMemfd("guest-ram", ram.ramSize), { ram, features, workload });
      const hex = `0x${features.toString(16)}`;
      if (offer.disk !== null && this.#options.copyDisk) {
        await relay.reset();
        sink = await DiskSink.open(channel, relay, this.#options.timeoutMs);
        await channel.sendJson(FRAME.ACCEPT, { features: hex, disk_sectors: sink.capacity });
        if (!await this.#askedDisk(channel, sink)) {
          await sink.close();
          sink = undefined;
          await driver.introduce();
        }
      } else {
        await channel.sendJson(FRAME.ACCEPT, { features: hex });
      }
      if (!offer.dryRun) {
        await this.#arrive(session, offer, driver, relay, sink);
        return { guest: new Guest(driver, relay, device), follow: offer.follow };
      }
    } catch (error) {
      // Before anything is said: the source goes on as soon as it reads the reason.
      await closeAll(log, sink, driver, relay, device);
      throw error;
    }
    await closeAll(log, sink, driver, relay, device);
    return undefined;
  }

  // Steps 4a to 4c. @returns whether blocks are coming
  async #askedDisk(channel: Channel, sink: DiskSink): Promise<boolean> {
    for (let questions = 0;; questions++) {
      const head = await channel.receiveHead([FRAME.DISK_READ, FRAME.DISK]);
      if (head.type === FRAME.DISK) return (await channel.readJson(head)).copy === true;
      if (questions === MAX_QUESTIONS) throw violation("it asks too much about the disk");
      await sink.answer(head);
    }
  }

  async #arrive(session: Session, offer: Offer, driver: EmbeddedDriver, relay: Relay, sink: DiskSink | undefined): Promise<void> {
    const { channel } = session;
    const half = offer.ram.ramSize / 2;
    const ranges = driver.regions.map(({ gpa, size, uaddr, fdOffset }) => ({
      gpa,
      size,
      uaddr,
      address: driver.address + (fdOffset === 0 ? 0 : half),
    }));
    const map = new PageMap(ranges);
    const touched = DirtyBitmap.covering(map.endGpa);
    const receiver = new PageReceiver(channel, map, touched);
    for (;;) {
      const head = await channel.receiveHead([FRAME.ROUND, FRAME.STATE]);
      if (head.type === FRAME.ROUND) {
        const mark = decodeRound(await channel.readPayload(head, 24));
        if (!mark.disk) await receiver.receive(mark);
        else if (sink !== undefined && !receiver.frozen) await sink.receive(mark);
        else throw violation("a round of the disk comes that was not agreed on");
        continue;
      }
      if (!receiver.frozen || sink?.frozen === false) throw violation("STATE came before the last round");
      if (sink !== undefined) {
        await sink.close();
        await driver.introduce();
      }
      await this.#prepare(channel, offer, { driver, relay }, () => map.digest(touched), head);
      break;
    }
    const commit = await channel.receive(FRAME.COMMIT, SESSION_BYTES);
    if (hexText(commit) !== session.id) throw violation("COMMIT is for another session");
    session.committed = true;
    await driver.startRings();
    // What is written now is read by the source even if this process dies: from here on the guest is ours.
    await this.#say(channel, FRAME.RUNNING);
    await driver.unpause();
    this.#options.log("info", "the guest runs here");
  }

  // The link may be gone by now; the guest is ours nevertheless, and the source asks.
  async #say(channel: Channel, type: typeof FRAME.RUNNING): Promise<void> {
    try {
      await channel.send(type);
    } catch (error) {
      this.#options.log("warning", `the source could not be told that the guest runs: ${toErrorRecord(error).message}`);
    }
  }

  async #prepare(
    channel: Channel,
    offer: Offer,
    { driver, relay }: { driver: EmbeddedDriver; relay: Relay },
    digestMemory: () => Promise<Digest>,
    head: FrameHead,
  ): Promise<void> {
    const state = decodeDriverState(await channel.readPayload(head, stateLimit(offer)));
    checkRun(state);
    await driver.load(state);
    // Before the guest is taken over: a device that refuses it leaves the guest at the source.
    if (state.net !== undefined) {
      await relay.net.load(state.net);
      await relay.net.beforeData();
    }
    const begun = performance.now();
    const digest = offer.verify ? digestText(await digestMemory()) : null;
    const verify_us = offer.verify ? Math.round((performance.now() - begun) * 1000) : 0;
    await channel.sendJson(FRAME.PREPARED, { digest, verify_us });
  }

  async #report(channel: Channel, driver: EmbeddedDriver): Promise<void> {
    const end = driver.finished().then((report) => ({ report, final: true }));
    end.catch(() => {});
    const samples: Sample[] = [];
    using _sampler = new Sampler(driver, performance.now(), (sample) => samples.push(sample));
    try {
      for (;;) {
        let timer: ReturnType<typeof setTimeout> | undefined;
        const tick = new Promise<undefined>((resolve) => timer = setTimeout(() => resolve(undefined), REPORT_MS));
        const ended = await Promise.race([end, tick]);
        clearTimeout(timer);
        const { report, final } = ended ?? { report: await driver.report(), final: false };
        await channel.sendJson(FRAME.REPORT, {
          report: reportOf(report),
          final,
          samples: encodeSamples(samples.splice(0)),
        });
        if (final) return;
      }
    } catch (error) {
      this.#options.log("debug", `the source is told nothing more: ${toErrorRecord(error).message}`);
    }
  }

  /** Resolves when sources that follow have been told of the end of their guest, once it has ended. */
  async reported(): Promise<void> {
    await Promise.allSettled([...this.#reports]);
  }

  /** Stops listening; a guest that is still arriving is dropped. A guest that has arrived is not touched. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#listener.close();
    for (const channel of this.#open) channel.abort(closing());
    await Promise.allSettled([...this.#serving]);
    this.#arrived.reject(new SvqError("CLOSED", "The destination was closed before a guest came"));
  }

  /** The same as {@linkcode close}. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

function closing(): SvqError {
  return new SvqError("CLOSED", "The destination stops", { exitCode: EXIT.migrationAborted });
}

async function closeAll(log: DestinationOptions["log"], ...parts: ({ close(): Promise<void> } | undefined)[]): Promise<void> {
  for (const part of parts) {
    try {
      await part?.close();
    } catch (error) {
      log("warning", toErrorRecord(error).message);
    }
  }
}

// JSON of the rings and slots, and the workload's table.
function stateLimit({ ram, workload }: Offer): number {
  const { slots } = new RamLayout(ram);
  const table = workload.kind === "blk" ? workload.options.sectors * 4 : slots * 4;
  return (1 << 20) + ram.queues * ram.num * 512 + slots * 512 + table;
}

// The parts of a state that the driver's worker takes as they are.
function checkRun({ worker }: DriverState): void {
  const numbers = [...Object.values(worker.run ?? {}), ...Object.values(worker.counters ?? {}), ...worker.latency?.counts ?? []];
  const bad = typeof worker.counters !== "object" || numbers.some((value) => !(typeof value === "number" && value >= 0));
  if (bad) throw new SvqError("STATE_INVALID", "The driver's state cannot be used: a count is no number");
}
