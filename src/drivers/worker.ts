/**
 * The worker of an embedded driver: the guest's processor. It blocks in epoll on the calls of all queues and on the control
 * eventfd.
 *
 * @module
 */
import { DirtyBitmap } from "../dirty/bitmap.ts";
import { SvqError } from "../errors.ts";
import { bufferAt, EPOLL, Epoll, servePort, signalEventfd, type WorkerCommand, type WorkerPort } from "../ffi/mod.ts";
import { VringError } from "../vring/rules.ts";
import { BlkWorkload } from "./blk_workload.ts";
import { DiskReader, MAX_DISK_BUFFERS } from "./disk_reader.ts";
import { GuestQueue } from "./guest_queue.ts";
import { RamLayout } from "./layout.ts";
import { LoopbackWorkload } from "./loopback_workload.ts";
import type { DiskOpenCommand, DiskRequest, LogCommand, OpenCommand, RunCommand, WorkerState } from "./messages.ts";
import { NetWorkload } from "./net_workload.ts";
import { type DriverCounters, type DriverReport, Histogram, newCounters } from "./report.ts";
import type { GuestRam, Workload } from "./workload.ts";

const CONTROL = 0x7fff_ffff;
const FAULTS_KEPT = 10;
// How long the driver sleeps before it looks whether a call got lost.
const LOOK_MS = 250;
const LOOK_AGAIN_MS = 250;
// A throttled driver runs for so long, and then stands still for as long as its share says.
const RUN_SLICE_MS = 2;

class DriverWorker {
  readonly #port: WorkerPort;
  readonly #epoll = new Epoll();
  #ram!: GuestRam;
  #workload!: Workload;
  #queues: GuestQueue[] = [];
  #counters: DriverCounters = newCounters();
  #latency = new Histogram();
  #faults: string[] = [];
  #run: RunCommand | undefined;
  #deadline = Infinity;
  #runningSince: number | undefined;
  #lastProgress = 0;
  #lookedAt = 0;
  #alone = false;
  #paused = false;
  #pausedAt = 0;
  #closed = false;
  #drainUntil = Infinity;
  #waiters: WorkerCommand[] = [];
  #throttlePercent = 0;
  #sliceSince = 0;
  #stillUntil = 0;
  #disk: { reader: DiskReader; blocks: number[] } | undefined;

  constructor(port: WorkerPort) {
    this.#port = port;
    this.#epoll.add(port.controlFd, EPOLL.IN, CONTROL);
  }

  async run(): Promise<void> {
    while (!this.#closed) {
      const still = this.#stillMs();
      const count = this.#epoll.wait(this.#paused ? -1 : still > 0 ? still : this.#timeout());
      const commanded = this.#note(count);
      if (commanded) { for (const command of await this.#port.commands()) this.#obey(command); }
      // What came while the driver stands still is noted, and looked at later; a copy of its disk goes on.
      if (this.#paused || this.#closed) continue;
      if (this.#stillMs() > 0) {
        if (this.#disk?.reader.busy === true) this.#serve(this.#queues[0]!, false);
        continue;
      }
      if (count === 0 && still === 0) this.#lookForLostCalls();
      for (const queue of this.#queues) this.#serve(queue);
      this.#checkEnd();
      this.#endSlice();
    }
    this.#epoll.close();
  }

  #stillMs(): number {
    return this.#stillUntil === 0 ? 0 : Math.max(0, Math.ceil(this.#stillUntil - performance.now()));
  }

  #endSlice(): void {
    if (this.#throttlePercent === 0) return;
    const now = performance.now();
    if (this.#stillUntil > 0) {
      // The first thing done after standing still: a new slice began with it, however late that was.
      this.#stillUntil = 0;
      this.#sliceSince = now;
    }
    if (now - this.#sliceSince < RUN_SLICE_MS) return;
    this.#stillUntil = now + RUN_SLICE_MS * this.#throttlePercent / (100 - this.#throttlePercent);
  }

  #throttle(percent: number): void {
    this.#throttlePercent = Math.min(99, Math.max(0, percent));
    this.#stillUntil = 0;
    this.#sliceSince = performance.now();
  }

  #note(count: number): boolean {
    let commanded = false;
    for (let i = 0; i < count; i++) {
      const token = this.#epoll.token(i);
      if (token === CONTROL) commanded = true;
      else this.#queues[token]!.called = true;
    }
    return commanded;
  }

  get #inflight(): number {
    return this.#queues.reduce((sum, queue) => this.#background(queue) ? sum : sum + queue.inflight, 0);
  }

  #background(queue: GuestQueue): boolean {
    return this.#workload.background?.(queue.index) ?? false;
  }

  get #settled(): boolean {
    return this.#workload.settled ?? true;
  }

  get #filling(): boolean {
    return this.#run !== undefined && this.#drainUntil === Infinity;
  }

  #timeout(): number {
    if (this.#queues.some((queue) => queue.called && queue.broken === undefined)) return 0;
    if (this.#run === undefined && this.#inflight === 0 && this.#waiters.length === 0) return -1;
    const due = this.#filling && this.#workload.nextDue ? this.#workload.nextDue : Infinity;
    const next = Math.min(this.#deadline, this.#drainUntil, due) - performance.now();
    return Math.max(0, Math.min(LOOK_MS, Math.ceil(next)));
  }

  // Nothing came for a while. What lies in the used ring without a call, also a little later, was not announced.
  #lookForLostCalls(): void {
    if (this.#alone) return;
    const now = performance.now();
    // A paced workload wakes for its next request, not because nothing came.
    if (this.#workload.nextDue && now - this.#lookedAt < LOOK_MS) return;
    this.#lookedAt = now;
    const suspects = this.#queues.filter((queue) =>
      queue.broken === undefined && !queue.called && this.#guard(queue, () => queue.enableCalls())
    );
    if (suspects.length === 0) return;
    // A command ends the wait: the suspicion was not tested, and comes up again.
    if (this.#note(this.#epoll.wait(LOOK_AGAIN_MS))) return;
    for (const queue of suspects) {
      if (queue.called) continue;
      this.#counters.missedCalls++;
      this.#fault(`queue ${queue.index}: answers lay in the used ring and no call came`);
      queue.called = true;
    }
  }

  #guard<T>(queue: GuestQueue, action: () => T): T | undefined {
    try {
      return action();
    } catch (error) {
      if (!(error instanceof SvqError)) throw error;
      // The driver's side keeps its own books: what it is told and does not know is an answer too many.
      if (error instanceof VringError) this.#counters.duplicated++;
      queue.broken = error;
      this.#fault(`queue ${queue.index} stopped: ${error.message}`);
      return undefined;
    }
  }

  #serve(queue: GuestQueue, filling = true): void {
    if (queue.broken !== undefined) return;
    queue.called = false;
    this.#guard(queue, () => {
      for (let round = 0; round < 8; round++) {
        const taken = queue.take(this);
        const now = performance.now();
        if (taken > 0) this.#progress(now);
        if (queue.index === 0) this.#disk?.reader.pump();
        if (this.#background(queue)) queue.fill(this.#workload, Infinity, now);
        else if (filling && this.#filling) this.#fill(queue, now);
        if (!queue.enableCalls()) return;
      }
      queue.called = true;
    });
  }

  #fill(queue: GuestQueue, now: number): void {
    const rest = (this.#run!.requests ?? Infinity) - this.#counters.submitted;
    if (rest <= 0 || now >= this.#deadline) return;
    if (this.#inflight === 0) this.#lastProgress = now;
    this.#counters.submitted += queue.fill(this.#workload, rest, now);
  }

  #progress(now: number): void {
    this.#counters.longestStallMs = Math.max(this.#counters.longestStallMs, now - this.#lastProgress);
    this.#lastProgress = now;
  }

  /** Called by the queues. */
  finished(_queue: GuestQueue, slot: number, written: number, startedMs: number): void {
    const right = this.#workload.finish(slot, written);
    if (right === undefined) return;
    if (right) this.#counters.completed++;
    else this.#counters.corrupted++;
    this.#latency.add((performance.now() - startedMs) * 1000);
  }

  #fault(text: string): void {
    if (this.#faults.length < FAULTS_KEPT) this.#faults.push(text);
  }

  #checkEnd(): void {
    const now = performance.now();
    const run = this.#run;
    if (run !== undefined && this.#filling) {
      const enough = this.#counters.submitted >= (run.requests ?? Infinity) || now >= this.#deadline;
      const stuck = this.#queues.every((queue) => queue.broken !== undefined);
      if (enough || stuck) this.#drainUntil = now + run.drainMs;
    }
    if (this.#drainUntil === Infinity) return;
    const live = !this.#settled ||
      this.#queues.some((queue) => queue.broken === undefined && queue.inflight > 0 && !this.#background(queue));
    if (live && now < this.#drainUntil) return;
    this.#stopClock(now);
    this.#drainUntil = this.#deadline = Infinity;
    this.#run = undefined;
    const report = this.#report(Math.max(this.#inflight, this.#workload.lost ?? 0));
    for (const command of this.#waiters.splice(0)) this.#port.reply(command, report);
    this.#port.emit({ finished: report });
  }

  #startClock(now: number): void {
    this.#runningSince ??= now;
    this.#lastProgress = now;
  }

  #stopClock(now: number): void {
    if (this.#runningSince === undefined) return;
    if (this.#inflight > 0) this.#progress(now);
    this.#counters.ranMs += now - this.#runningSince;
    this.#runningSince = undefined;
  }

  #begin(run: RunCommand, now: number): void {
    this.#run = run;
    this.#deadline = (this.#paused ? this.#pausedAt : now) + (run.durationMs ?? Infinity);
    if (!this.#paused) this.#startClock(now);
  }

  #pause(now: number): void {
    if (this.#paused) return;
    this.#paused = true;
    this.#pausedAt = now;
    this.#stopClock(now);
  }

  // A pause counts neither as running time nor as a stall.
  #unpause(now: number): void {
    if (!this.#paused) return;
    this.#paused = false;
    this.#deadline += now - this.#pausedAt;
    this.#drainUntil += now - this.#pausedAt;
    if (this.#run !== undefined || this.#inflight > 0) this.#startClock(now);
  }

  #report(lost: number): DriverReport {
    const now = performance.now();
    const { ranMs, longestStallMs, ...counts } = this.#counters;
    const durationMs = ranMs + (this.#runningSince === undefined ? 0 : now - this.#runningSince);
    const stall = this.#runningSince !== undefined && this.#inflight > 0 ? now - this.#lastProgress : 0;
    return {
      ...counts,
      lost,
      inflight: this.#inflight,
      durationMs,
      iops: durationMs > 0 ? Math.round(counts.completed / durationMs * 1000) : 0,
      latencyUs: this.#latency.report(),
      longestStallMs: Math.max(longestStallMs, stall),
      faults: [...this.#faults],
      ...(this.#workload.report === undefined ? {} : { net: this.#workload.report() }),
    };
  }

  #obey(command: WorkerCommand): void {
    try {
      const value = this.#do(command);
      if (value !== LATER) this.#port.reply(command, value);
    } catch (error) {
      this.#port.fail(command, error);
    }
  }

  #do(command: WorkerCommand): unknown {
    const now = performance.now();
    switch (command.name) {
      case "open":
        return this.#open(command.data as OpenCommand);
      case "run":
        this.#begin(command.data as RunCommand, now);
        return undefined;
      case "pause":
        this.#pause(now);
        return undefined;
      case "unpause":
        this.#unpause(now);
        return undefined;
      case "alone":
        this.#alone = true;
        return undefined;
      case "kick":
        this.#alone = false;
        for (const queue of this.#queues) {
          queue.called = true;
          signalEventfd(queue.fds.kick);
        }
        return undefined;
      case "throttle":
        this.#throttle(command.data as number);
        return undefined;
      case "drain":
        this.#waiters.push(command);
        this.#drainUntil = Math.min(this.#drainUntil, now + (command.data as number));
        return LATER;
      case "report":
        return this.#report(0);
      case "latencies":
        return this.#latency.save();
      case "log":
        this.#setLog(command.data as LogCommand);
        return undefined;
      case "save":
        return this.#save();
      case "disk-open":
        return this.#openDisk(command.data as DiskOpenCommand);
      case "disk":
        this.#needDisk().request(command.data as DiskRequest[], (error) => {
          if (error === undefined) this.#port.reply(command);
          else this.#port.fail(command, error);
        });
        return LATER;
      case "disk-hold":
        return this.#blk().hold();
      case "disk-mark":
        this.#blk().markOutstanding();
        return undefined;
      case "disk-close":
        this.#closeDisk();
        return undefined;
      case "control":
        if (!(this.#workload instanceof NetWorkload)) {
          throw new SvqError("NO_CONTROL_QUEUE", "The driver has no control queue of this device");
        }
        this.#workload.control(command.data as Uint8Array, (ok) => this.#port.reply(command, ok));
        this.#queues.at(-1)!.called = true;
        return LATER;
      case "close":
        this.#closed = true;
        return undefined;
      default:
        throw new Error(`No command ${command.name}`);
    }
  }

  #open({ ram, address, features, queues, workload, state }: OpenCommand): void {
    const buffer = bufferAt(address, ram.ramSize);
    this.#ram = { layout: new RamLayout(ram), bytes: new Uint8Array(buffer), words: new Int32Array(buffer), log: undefined };
    if (state !== undefined) {
      this.#counters = { ...newCounters(), ...state.counters };
      this.#latency = new Histogram(state.latency);
      this.#faults = [...state.faults];
    }
    const tally = { counters: this.#counters, fault: (text: string) => this.#fault(text) };
    this.#workload = workload.kind === "blk"
      ? new BlkWorkload(this.#ram, workload.options, tally)
      : workload.kind === "net"
      ? new NetWorkload(this.#ram, workload.options, tally)
      : new LoopbackWorkload(this.#ram, workload.options, tally);
    this.#queues = queues.map((fds, index) => new GuestQueue(index, this.#ram, features, fds));
    if (state !== undefined) this.#restore(state);
    for (const queue of this.#queues) this.#epoll.add(queue.fds.call, EPOLL.IN | EPOLL.ET, queue.index);
    // Nothing moves until the device runs.
    this.#pause(performance.now());
    if (state?.run !== undefined) this.#begin(state.run, this.#pausedAt);
  }

  #restore(state: WorkerState): void {
    this.#workload.restore(state.workload);
    const now = performance.now();
    const outSlots = state.workload.slots.flatMap((values, slot) => values === null ? [] : [slot]);
    const owned = state.owners.flat().map(([, slot]) => slot).sort((a, b) => a - b);
    const sameSlots = owned.length === outSlots.length && owned.every((slot, i) => slot === outSlots[i]);
    if (!sameSlots || state.rings.length !== this.#queues.length || state.owners.length !== this.#queues.length) {
      throw new SvqError("STATE_INVALID", "The driver's state cannot be used: its rings and its requests do not belong together");
    }
    for (const queue of this.#queues) queue.restore(state.rings[queue.index]!, state.owners[queue.index]!, now);
  }

  #blk(): BlkWorkload {
    if (this.#workload instanceof BlkWorkload) return this.#workload;
    throw new SvqError("NO_DISK", "The guest has no disk that could be copied");
  }

  #needDisk(): DiskReader {
    if (this.#disk !== undefined) return this.#disk.reader;
    throw new SvqError("NO_DISK", "The guest's disk has not been opened for copying");
  }

  #openDisk({ buffers, dirty }: DiskOpenCommand): number[] {
    const workload = this.#blk();
    this.#closeDisk();
    const blocks = workload.lend(1 + Math.min(buffers, MAX_DISK_BUFFERS));
    if (blocks.length < 2) {
      workload.giveBack(blocks);
      throw new SvqError("RAM_TOO_SMALL", "The guest's RAM has no room for copying its disk", {
        hint: "give it more memory (--mem), fewer queues or a smaller --depth, or let the disk alone (--copy-disk no)",
      });
    }
    const offsets = blocks.map((block) => this.#ram.layout.blockOffset(block));
    workload.written = new DirtyBitmap(dirty);
    this.#disk = { reader: new DiskReader(this.#ram, this.#queues[0]!, offsets), blocks };
    return offsets;
  }

  #closeDisk(): void {
    if (this.#disk === undefined) return;
    const { reader, blocks } = this.#disk;
    if (reader.busy) throw new SvqError("DISK_BUSY", "The device still has requests of a copy of its disk");
    const workload = this.#blk();
    workload.giveBack(blocks);
    workload.written = undefined;
    workload.unhold();
    this.#disk = undefined;
  }

  // Whoever starts a log has not seen what was written before: all of it is new.
  #setLog(log: LogCommand): void {
    this.#ram.log = log === undefined ? undefined : new DirtyBitmap(bufferAt(log.address, log.size));
  }

  #save(): WorkerState {
    if (!this.#paused) throw new SvqError("NOT_PAUSED", "A driver's state can be saved only while it is paused");
    const queues = this.#queues.map((queue) => queue.save());
    return {
      rings: queues.map((queue) => queue.ring),
      owners: queues.map((queue) => queue.owners),
      workload: this.#workload.save(),
      counters: { ...this.#counters },
      latency: this.#latency.save(),
      faults: [...this.#faults],
      run: this.#run === undefined ? undefined : this.#restOf(this.#run),
    };
  }

  #restOf(run: RunCommand): RunCommand {
    const { durationMs: _, ...rest } = run;
    return this.#deadline === Infinity ? rest : { ...rest, durationMs: Math.max(0, this.#deadline - this.#pausedAt) };
  }
}

const LATER = Symbol("answered later");

servePort((port) => new DriverWorker(port).run());
