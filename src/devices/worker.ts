/**
 * The worker of an embedded device: blocks in epoll on the kicks of all queues and on the control eventfd.
 *
 * @module
 */
import { EPOLL, Epoll, servePort, type WorkerCommand, type WorkerPort, yieldThread } from "../ffi/mod.ts";
import { RangeTable } from "../memory/range_table.ts";
import type { MappedRange } from "../memory/region.ts";
import { BlkModel } from "./blk.ts";
import { LoopbackModel } from "./loopback.ts";
import { NetModel } from "./net.ts";
import type { EnableCommand, FdsCommand, OpenCommand, QueueFds, StartCommand } from "./messages.ts";
import { PendingHeap } from "./pending.ts";
import { CurrentMemory } from "./ring.ts";
import { SimQueue, type SimShared } from "./sim_queue.ts";
import { injectInterrupt, VduseIotlb } from "./vduse_iotlb.ts";

const CONTROL = 0x7fff_ffff;
const PORT = 0x7fff_fffe;
// How often a queue without a kick is looked at.
const POLL_MS = 1;
// How often a driver is called again that could not be called yet.
const RETRY_MS = 5;

class SimWorker {
  readonly #port: WorkerPort;
  readonly #epoll = new Epoll();
  readonly #memory = new CurrentMemory(new RangeTable([]));
  readonly #pending = new PendingHeap();
  #iotlb: VduseIotlb | undefined;
  #queues: SimQueue[] = [];
  #shared: SimShared | undefined;
  // The last frame whose queue was told of it.
  #passedOn = 0;
  #closed = false;

  constructor(port: WorkerPort) {
    this.#port = port;
    this.#epoll.add(port.controlFd, EPOLL.IN, CONTROL);
  }

  async run(): Promise<void> {
    while (!this.#closed) {
      const count = this.#epoll.wait(this.#timeout());
      let commanded = false;
      for (let i = 0; i < count; i++) {
        const token = this.#epoll.token(i);
        if (token === CONTROL) {
          commanded = true;
          continue;
        }
        if (token === PORT) {
          this.#portReady(this.#epoll.events(i));
          continue;
        }
        const queue = this.#queues[token]!;
        queue.kicked = true;
        queue.counters.kicks++;
      }
      if (commanded) { for (const command of await this.#port.commands()) this.#obey(command); }
      // Once the main thread has its answer, memory goes away.
      if (this.#closed) break;
      this.#completeDue();
      for (const queue of this.#queues) queue.retryCall();
      for (const queue of this.#queues) if (queue.kicked || queue.polled) queue.serve();
      this.#passOn();
    }
    this.#epoll.close();
    this.#iotlb?.clear();
    this.#shared?.net?.close();
  }

  #portReady(events: number): void {
    const net = this.#shared!.net!;
    const unblocked = net.portReady((events & ~EPOLL.OUT) !== 0, (events & ~EPOLL.IN) !== 0);
    this.#lookAgain(net, unblocked);
  }

  // Who receives looks what has come; who waits to send goes on where that is possible.
  #lookAgain(net: NetModel, sending: boolean): void {
    for (const queue of this.#queues) if (sending || net.receives(queue.index)) queue.kicked = true;
  }

  // The queue that a frame waits for may have looked before that frame was read.
  #passOn(): void {
    const net = this.#shared?.net;
    if (net === undefined) return;
    const queue = net.next(performance.now());
    if (queue < 0 || net.frameNumber === this.#passedOn) return;
    this.#passedOn = net.frameNumber;
    this.#queues[queue]!.kicked = true;
  }

  #timeout(): number {
    let timeout = -1;
    for (const queue of this.#queues) {
      if (queue.kicked) return 0;
      if (queue.polled) timeout = POLL_MS;
      else if (queue.owesCall && timeout < 0) timeout = RETRY_MS;
    }
    const due = Math.min(this.#pending.nextDue, this.#shared?.net?.nextLook ?? Infinity);
    if (due === Infinity) return timeout;
    const rest = due - performance.now();
    // epoll_wait counts milliseconds: what is due within one is waited for by looking again and again.
    if (rest < 1) {
      if (rest > 0) yieldThread();
      return 0;
    }
    return timeout < 0 ? Math.floor(rest) : Math.min(timeout, Math.floor(rest));
  }

  #completeDue(): void {
    if (this.#pending.size === 0) return;
    const now = performance.now();
    for (let request = this.#pending.popDue(now); request !== undefined; request = this.#pending.popDue(now)) {
      this.#queues[request.queue]!.complete(request);
    }
    for (const queue of this.#queues) queue.flush();
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
    switch (command.name) {
      case "open":
        return this.#open(command.data as OpenCommand);
      case "memory":
        this.#setMemory(new RangeTable(command.data as MappedRange[]), () => this.#port.reply(command));
        return LATER;
      case "iotlb":
        this.#useIotlb(command.data as number);
        return undefined;
      case "iotlb-changed":
        this.#setMemory(this.#iotlb!.read(), () => {
          this.#iotlb!.release();
          this.#port.reply(command);
        });
        return LATER;
      case "start": {
        const start = command.data as StartCommand;
        this.#shared!.model.configure(start.features);
        this.#queues[start.queue]!.start(start);
        this.#watch(start.queue, start.fds);
        return undefined;
      }
      case "stop": {
        const queue = this.#queues[command.data as number]!;
        queue.drain(() => {
          // Before the answer: it lets the main thread close the kick, and a closed descriptor whose file lives on
          // (the driver has it too) would stay registered for ever.
          this.#unwatch(queue);
          this.#port.reply(command, queue.stop());
        });
        return LATER;
      }
      case "enable": {
        const { queue, enabled } = command.data as EnableCommand;
        this.#queues[queue]!.enabled = enabled;
        this.#queues[queue]!.kicked = true;
        return undefined;
      }
      case "fds": {
        const { queue, fds } = command.data as FdsCommand;
        if (!this.#queues[queue]!.started) return undefined;
        this.#watch(queue, fds);
        this.#queues[queue]!.kicked = true;
        return undefined;
      }
      case "reset":
        for (const queue of this.#queues) {
          queue.abandon();
          this.#unwatch(queue);
        }
        this.#shared?.net?.reset();
        if (this.#iotlb !== undefined) {
          this.#memory.table = new RangeTable([]);
          this.#iotlb.clear();
        }
        return undefined;
      case "position":
        return this.#queues[command.data as number]!.position;
      case "counters":
        return this.#queues.map((queue) => queue.counters);
      case "net-link":
        this.#net.setLink(command.data as boolean);
        this.#lookAgain(this.#net, true);
        return undefined;
      case "net-mtu":
        this.#net.setMtu(command.data as number);
        return undefined;
      case "net-announce":
        return this.#net.announce(command.data as Uint8Array);
      case "net-state":
        return this.#net.saveState();
      case "net-counters":
        return this.#net.counters;
      case "close":
        this.#closed = true;
        return undefined;
      default:
        throw new Error(`No command ${command.name}`);
    }
  }

  #open(command: OpenCommand): void {
    const { blk, latencyUs, jitterUs } = command;
    const net = command.net === undefined ? undefined : new NetModel(command.net);
    const model = net ?? (blk === undefined ? new LoopbackModel() : new BlkModel(blk));
    const emit = this.#port.emit.bind(this.#port);
    this.#shared = { model, net, memory: this.#memory, pending: this.#pending, latencyUs, jitterUs, emit };
    this.#queues = Array.from({ length: command.queues }, (_, index) => new SimQueue(index, this.#shared!));
    for (const fd of net?.ports ?? []) this.#epoll.add(fd, EPOLL.IN | EPOLL.OUT | EPOLL.ET, PORT);
  }

  get #net(): NetModel {
    return this.#shared!.net!;
  }

  #useIotlb(fd: number): void {
    const iotlb = this.#iotlb = new VduseIotlb(fd);
    // From here, not by way of the main thread: that would cost each call two changes of thread.
    const numbers = this.#queues.map((_, index) => new Uint8Array(new Uint32Array([index]).buffer));
    this.#shared!.interrupt = (index) => injectInterrupt(fd, numbers[index]!);
    this.#memory.fault = () => {
      this.#memory.table = iotlb.read();
      return true;
    };
  }

  #watch(index: number, fds: QueueFds): void {
    const queue = this.#queues[index]!;
    this.#unwatch(queue);
    queue.fds = fds;
    if (fds.kick >= 0) this.#epoll.add(fds.kick, EPOLL.IN | EPOLL.ET, index);
  }

  #unwatch(queue: SimQueue): void {
    if (queue.fds.kick >= 0) this.#epoll.delete(queue.fds.kick);
    queue.fds = { kick: -1, call: -1, err: -1 };
  }

  // Rings that stay where they are go on; one that moved is drained first, while the old memory is still mapped.
  #setMemory(table: RangeTable, done: () => void): void {
    this.#memory.table = table;
    const moved = this.#queues.filter((queue) => queue.hasMoved());
    let rest = moved.length;
    if (rest === 0) done();
    for (const queue of moved) {
      queue.drain(() => {
        queue.relocate();
        if (--rest === 0) done();
      });
    }
  }
}

const LATER = Symbol("answered later");

servePort((port) => new SimWorker(port).run());
