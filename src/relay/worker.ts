/**
 * A relay Worker: the data path of a shard of queues. It blocks in epoll on kicks, calls and its control eventfd, all
 * edge-triggered: an eventfd needs no read, and none is consumed that another reader waits for.
 *
 * @module
 */
import { toErrorRecord } from "../errors.ts";
import { bufferAt, EPOLL, Epoll, pinThread } from "../ffi/mod.ts";
import { Iotlb } from "../iova/iotlb.ts";
import { Translation } from "../iova/translation.ts";
import { RangeTable } from "../memory/range_table.ts";
import { DirtyBitmap } from "../dirty/bitmap.ts";
import { CORES, COUNTER, Counters, WORKER_COUNTER } from "./counters.ts";
import type { DataPath } from "./core.ts";
import { ControlCore } from "./control_core.ts";
import { CoreMaker } from "./core_maker.ts";
import type { QueueStart, WorkerCommand, WorkerInit, WorkerReply } from "./messages.ts";
import { NotifyRunner } from "./notify_runner.ts";
import { Polling } from "./polling.ts";
import { QueueRunner, type Runner } from "./queue_runner.ts";
import { RunnerList } from "./runner_list.ts";

interface Command {
  id: number;
  command: WorkerCommand;
}

const scope = self as unknown as { onmessage: ((event: MessageEvent) => void) | null; postMessage(message: unknown): void; close(): void };

const inbox: Command[] = [];
let wake: (() => void) | undefined;

function nextCommand(): Promise<Command> {
  const ready = inbox.shift();
  if (ready !== undefined) return Promise.resolve(ready);
  return new Promise((resolve) => {
    wake = () => {
      wake = undefined;
      resolve(inbox.shift()!);
    };
  });
}

const CONTROL = 0;
const KICK = 1;
const CALL = 2;

/** How long a chain waits whose driver never kicks, ms. */
const POLL_MS = 1;
/** How long polling goes on, while there is work, before events and commands are looked for, us. */
const LOOK_US = 50;
/** Looks at polled queues between two looks at the clock. */
const SPINS = 8;

function nowUs(): number {
  return performance.now() * 1000;
}

function tokenOf(index: number, what: number): number {
  return index * 4 + what;
}

class RelayLoop {
  readonly #epoll = new Epoll(256);
  readonly #posted: Int32Array;
  readonly #counters: Counters;
  readonly #runners = new Map<number, Runner>();
  readonly #path: DataPath = {
    memory: new RangeTable([]),
    translation: undefined,
    dirty: undefined,
    iotlb: new Iotlb(),
  };
  /** Queues with work to do that they were not told of by an event. */
  readonly #busy = new RunnerList<Runner>();
  readonly #maker: CoreMaker;
  /** Queues whose driver never kicks: the front-end has set a kick without a descriptor. */
  readonly #polled = new Set<Runner>();
  /** Queues that are polled: nobody notifies of what comes. Each of them is armed before the thread sleeps. */
  readonly #hot = new RunnerList<QueueRunner>();
  readonly #polling: Polling;
  readonly #load: Float64Array;
  /** When there was work the last time, us. */
  #workedAt = 0;
  /** This round of polling has found work. */
  #found = false;
  #handled = 0;
  #ended = false;

  constructor(init: WorkerInit) {
    this.#posted = new Int32Array(init.posted);
    this.#counters = new Counters(init.counters);
    this.#maker = new CoreMaker(init.core, this.#path);
    if (init.cpus.length > 0) pinThread(init.cpus);
    this.#polling = new Polling(init.poll, init.spareCpus);
    this.#load = this.#counters.ofWorker(init.index);
    this.#load[WORKER_COUNTER.pollUs] = this.#polling.budgetUs;
    this.#epoll.add(init.controlFd, EPOLL.IN | EPOLL.ET, tokenOf(0, CONTROL));
  }

  async run(): Promise<void> {
    while (!this.#ended) {
      const count = this.#wait();
      let commanded = false;
      for (let i = 0; i < count; i++) {
        const token = this.#epoll.token(i);
        const what = token & 3;
        if (what === CONTROL) {
          commanded = true;
          continue;
        }
        const runner = this.#runners.get(token >>> 2);
        if (runner === undefined) continue;
        if (what === KICK) runner.kicked();
        else runner.called();
        this.#busy.add(runner);
      }
      for (const runner of this.#polled) {
        // In mode notify a look at the ring is the device's to take.
        if (runner instanceof NotifyRunner) runner.kicked();
        this.#busy.add(runner);
      }
      for (let i = 0; i < this.#busy.size;) {
        const runner = this.#busy.at(i)!;
        this.#service(runner, this.#polling.budgetUs > 0);
        // One that is done has made room for the next.
        if (this.#busy.at(i) === runner) i++;
      }
      // Commands come last, so that a stop sees everything that was signalled before it.
      if (commanded) await this.#commands();
      if (this.#hot.size > 0) this.#poll();
    }
    this.#epoll.close();
    scope.close();
  }

  #wait(): number {
    const load = this.#load;
    load[WORKER_COUNTER.waits]!++;
    if (this.#busy.size > 0 || this.#hot.size > 0) return this.#epoll.wait(0);
    load[WORKER_COUNTER.sleeps]!++;
    const begun = nowUs();
    const count = this.#epoll.wait(this.#polled.size > 0 ? POLL_MS : -1);
    const now = nowUs();
    if (count > 0) {
      this.#polling.slept(now - begun, now);
      load[WORKER_COUNTER.pollUs] = this.#polling.budgetUs;
    }
    return count;
  }

  /** @param keep poll the queue from now on, when there is nothing more to do at once */
  #service(runner: Runner, keep = false): void {
    try {
      // Control queues are slow by nature: nothing is gained by waiting for them.
      if (keep && runner instanceof QueueRunner && !(runner.core instanceof ControlCore)) {
        if (runner.work() === 2) return;
        this.#busy.delete(runner);
        this.#heat(runner);
      } else if (!runner.service()) this.#busy.delete(runner);
    } catch (error) {
      this.#failed(runner, error);
    }
  }

  #failed(runner: Runner, error: unknown): void {
    this.#busy.delete(runner);
    if (runner instanceof QueueRunner) this.#cool(runner);
    runner.fail();
    scope.postMessage({ failed: runner.index, error: toErrorRecord(error) });
  }

  #heat(runner: QueueRunner): void {
    if (runner.hot) return;
    runner.hot = true;
    if (this.#hot.size === 0) {
      this.#workedAt = nowUs();
      this.#found = false;
      this.#load[WORKER_COUNTER.polls]!++;
    }
    this.#hot.add(runner);
  }

  #cool(runner: QueueRunner): void {
    if (!runner.hot) return;
    runner.hot = false;
    this.#hot.delete(runner);
  }

  // Looks at the polled queues until nothing has come for as long as polling is worth; then they are armed, and the thread may
  // sleep. Before that it comes back now and then: other queues and commands are told of by events alone.
  #poll(): void {
    const load = this.#load;
    const begun = nowUs();
    for (let before = begun;;) {
      let hits = 0;
      for (let looks = 0; looks < SPINS; looks += this.#hot.size || SPINS) hits += this.#look();
      const now = nowUs();
      if (hits > 0) {
        this.#workedAt = now;
        this.#found = true;
        load[WORKER_COUNTER.pollHits]! += hits;
      }
      if (this.#busy.size > 0 || this.#hot.size === 0) return;
      if (hits === 0) {
        load[WORKER_COUNTER.pollIdleUs]! += now - before;
        const preempted = this.#polling.lap(now - before, now);
        if (preempted || now - this.#workedAt >= this.#polling.budgetUs) {
          if (!preempted) this.#polling.ended(this.#found, now);
          load[WORKER_COUNTER.pollUs] = this.#polling.budgetUs;
          load[WORKER_COUNTER.pollHeldOff] = this.#polling.heldOff;
          return this.#arm();
        }
      }
      if (now - begun >= LOOK_US || this.#handled !== Atomics.load(this.#posted, 0)) return;
      before = now;
    }
  }

  // One look at each polled queue. @returns how many had work
  #look(): number {
    let hits = 0;
    for (let i = 0; i < this.#hot.size; i++) {
      const runner = this.#hot.at(i)!;
      try {
        const moved = runner.work();
        if (moved !== 0) hits++;
        // It gets its turn with the others.
        if (moved === 2) this.#busy.add(runner);
      } catch (error) {
        this.#failed(runner, error);
        i--;
      }
    }
    return hits;
  }

  // Every polled queue asks for notifications again and looks once more: what came before that was announced by nobody.
  #arm(): void {
    for (let runner = this.#hot.at(0); runner !== undefined; runner = this.#hot.at(0)) {
      this.#cool(runner);
      try {
        if (runner.arm()) this.#busy.add(runner);
      } catch (error) {
        this.#failed(runner, error);
      }
    }
  }

  async #commands(): Promise<void> {
    while (this.#handled !== Atomics.load(this.#posted, 0)) {
      const { id, command } = await nextCommand();
      this.#handled = (this.#handled + 1) | 0;
      let reply: WorkerReply = { id };
      try {
        reply = { id, ...this.#execute(command) };
      } catch (error) {
        reply = { id, error: toErrorRecord(error) };
      }
      scope.postMessage(reply);
    }
  }

  #newRunner(queue: QueueStart, counters: Float64Array): QueueRunner {
    if (queue.control !== undefined) {
      const core = new ControlCore(queue, this.#path, counters, (event) => scope.postMessage(event));
      counters[COUNTER.core] = CORES.indexOf(core.kind);
      return new QueueRunner(queue, core, counters, (iova, perm) => scope.postMessage({ missed: queue.index, iova, perm }));
    }
    const core = this.#maker.make(queue, counters);
    counters[COUNTER.core] = CORES.indexOf(core.kind);
    const { reason } = this.#maker;
    if (reason !== undefined) scope.postMessage({ fellBack: queue.index, reason });
    return new QueueRunner(queue, core, counters, (iova, perm) => scope.postMessage({ missed: queue.index, iova, perm }));
  }

  #runner(index: number): Runner {
    const runner = this.#runners.get(index);
    if (runner === undefined) throw new Error(`queue ${index} does not run here`);
    return runner;
  }

  #recorded(index: number): QueueRunner {
    const runner = this.#runner(index);
    if (!(runner instanceof QueueRunner)) throw new Error(`queue ${index} has no record of what is in flight`);
    return runner;
  }

  #execute(command: WorkerCommand): Omit<WorkerReply, "id"> {
    switch (command.type) {
      case "memory":
        this.#path.memory = new RangeTable(command.ranges);
        this.#path.translation = command.moved === undefined ? undefined : new Translation(command.moved);
        this.#maker.setMemory(command.ranges, command.moved);
        return {};
      case "log":
        this.#path.dirty = command.size === 0 ? undefined : new DirtyBitmap(bufferAt(command.address, command.size));
        this.#maker.setLog(command.address, command.size);
        return {};
      case "start": {
        const { queue } = command;
        const counters = this.#counters.of(queue.index);
        const runner = queue.mode === "notify" ? new NotifyRunner(queue, counters) : this.#newRunner(queue, counters);
        this.#runners.set(queue.index, runner);
        if (queue.kickFd < 0 && queue.control?.guestless !== true) this.#polled.add(runner);
        this.#watch(queue.kickFd, tokenOf(queue.index, KICK));
        this.#watch(queue.deviceCallFd, tokenOf(queue.index, CALL));
        // Neither a kick nor a call that came before this moment may be lost.
        runner.kicked();
        this.#busy.add(runner);
        return {};
      }
      case "lose":
        this.#recorded(command.index).lose();
        return {};
      case "renew": {
        const runner = this.#recorded(command.queue.index);
        runner.renew(command.queue);
        this.#busy.add(runner);
        return {};
      }
      case "pause": {
        const runner = this.#runner(command.index);
        runner.pause(command.paused);
        this.#busy.add(runner);
        return {};
      }
      case "poll": {
        const runner = this.#runner(command.index);
        this.#busy.add(runner);
        this.#service(runner);
        return { progress: runner.progress() };
      }
      case "stop": {
        const runner = this.#runner(command.index);
        runner.pause(true);
        if (command.abandon === true && runner instanceof QueueRunner) runner.abandon(command.keep);
        else this.#service(runner);
        const progress = runner.finish();
        this.#busy.delete(runner);
        if (runner instanceof QueueRunner) this.#cool(runner);
        this.#polled.delete(runner);
        this.#runners.delete(command.index);
        this.#epoll.delete(runner.start.kickFd);
        this.#epoll.delete(runner.start.deviceCallFd);
        runner.close();
        return { progress };
      }
      case "call":
        this.#runner(command.index).setCall(command.fd);
        return {};
      case "logUsed":
        this.#runner(command.index).setLogUsed(command.gpa);
        return {};
      case "uses": {
        let count = 0;
        for (const runner of this.#runners.values()) count += runner.uses(command.gpa, command.size);
        return { count };
      }
      case "iotlb":
        this.#learn(command);
        return {};
      case "awaits":
        return { count: this.#runners.get(command.index)?.awaits(command.iova) === true ? 1 : 0 };
      case "usesIova": {
        let count = 0;
        for (const runner of this.#runners.values()) count += runner.usesIova(command.iova, command.size);
        return { count };
      }
      case "inject": {
        const runner = this.#recorded(command.index);
        if (!(runner.core instanceof ControlCore)) throw new Error(`queue ${command.index} is no control queue`);
        runner.core.inject(command.commands);
        this.#busy.add(runner);
        return {};
      }
      case "exit":
        this.#ended = true;
        return {};
    }
  }

  #learn({ update, invalidate, forget }: Extract<WorkerCommand, { type: "iotlb" }>): void {
    const iotlb = this.#path.iotlb!;
    if (forget === true) iotlb.clear();
    if (invalidate !== undefined) iotlb.invalidate(invalidate.iova, invalidate.size);
    if (update === undefined) return;
    iotlb.update(update);
    for (const runner of this.#runners.values()) if (runner.known(update)) this.#busy.add(runner);
  }

  #watch(fd: number, token: number): void {
    if (fd >= 0) this.#epoll.set(fd, EPOLL.IN | EPOLL.ET, token);
  }
}

scope.onmessage = (first: MessageEvent<WorkerInit>) => {
  scope.onmessage = (event: MessageEvent<Command>) => {
    inbox.push(event.data);
    wake?.();
  };
  const loop = new RelayLoop(first.data);
  // An error here ends the Worker and is reported to the main thread.
  loop.run().catch((error) => {
    throw error;
  });
};
