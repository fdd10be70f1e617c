/**
 * A device whose kicks and calls can be held back, so that a test sees what the device alone does to memory, and what its
 * driver alone does.
 */
import { cancelWaits, createEventfd, drainEventfd, dupFd, type OwnedFd, readable, signalEventfd } from "../../src/ffi/mod.ts";
import type { VhostBackend, VringAddresses, VringStart } from "../../src/vhost/backend.ts";

/** One direction of one ring's notifications. */
class Pump {
  readonly #from: OwnedFd;
  readonly #to: OwnedFd;
  readonly #done: Promise<void>;
  open: boolean;
  held = false;
  #closed = false;

  constructor(from: OwnedFd, to: OwnedFd, open: boolean) {
    this.#from = from;
    this.#to = to;
    this.open = open;
    this.#done = this.#run().catch(() => {});
  }

  async #run(): Promise<void> {
    // Closing finds this waiting, or just woken: nothing waits any more that could be cancelled.
    while (!this.#closed) {
      await readable(this.#from.fd);
      if (drainEventfd(this.#from.fd) === 0) continue;
      if (this.open) signalEventfd(this.#to.fd);
      else this.held = true;
    }
  }

  release(): void {
    this.open = true;
    if (this.held) signalEventfd(this.#to.fd);
    this.held = false;
  }

  async close(): Promise<void> {
    if (this.#from.closed) return;
    this.#closed = true;
    cancelWaits(this.#from.fd);
    await this.#done;
    this.#from.close();
    this.#to.close();
  }
}

/** Wraps a device that has `startVrings`; drive {@linkcode Gate.device} instead of it. One ring. */
export class Gate implements AsyncDisposable {
  readonly device: VhostBackend;
  /** Where the ring lay that the device was started with last. */
  addresses: VringAddresses | undefined;
  #between = false;
  #kick: Pump | undefined;
  #call: Pump | undefined;

  /** @param relayed asked when a ring starts: stand in between? What passes through here comes later than what is written to memory. */
  constructor(device: VhostBackend, readonly relayed: () => boolean = () => true) {
    const wrapped: Pick<VhostBackend, "startVrings" | "setVringKick" | "setVringCall"> = {
      startVrings: (rings) => this.#start(device, rings),
      setVringKick: (index, fd) => this.#between ? this.#setKick(fd) : device.setVringKick(index, fd),
      setVringCall: (index, fd) => this.#between ? this.#setCall(fd) : device.setVringCall(index, fd),
    };
    this.device = new Proxy(device, {
      get: (target, name) => {
        if (name in wrapped) return wrapped[name as keyof typeof wrapped];
        const value = Reflect.get(target, name);
        return typeof value === "function" ? value.bind(target) : value;
      },
      set: (target, name, value) => Reflect.set(target, name, value),
    });
  }

  readonly #toDevice = createEventfd();
  readonly #fromDevice = createEventfd();

  async #start(device: VhostBackend, [ring]: readonly VringStart[]): Promise<void> {
    this.addresses = ring!.addresses;
    this.#between = this.relayed();
    if (!this.#between) {
      await this.#kick?.close();
      await this.#call?.close();
      this.#kick = this.#call = undefined;
      await device.startVrings!([ring!]);
      return;
    }
    await this.#setKick(ring!.kick);
    await this.#setCall(ring!.call);
    await device.startVrings!([{ ...ring!, kick: this.#toDevice.fd, call: this.#fromDevice.fd }]);
  }

  async #setKick(fd: number | null): Promise<void> {
    const open = this.#kick?.open ?? true;
    await this.#kick?.close();
    this.#kick = fd === null ? undefined : new Pump(dupFd(fd), this.#toDevice.dup(), open);
  }

  async #setCall(fd: number | null): Promise<void> {
    const open = this.#call?.open ?? true;
    await this.#call?.close();
    this.#call = fd === null ? undefined : new Pump(this.#fromDevice.dup(), dupFd(fd), open);
  }

  /** Was a kick held back? */
  get kickHeld(): boolean {
    return this.#kick?.held ?? false;
  }

  holdKicks(): void {
    this.#kick!.open = false;
  }

  holdCalls(): void {
    this.#call!.open = false;
  }

  releaseKicks(): void {
    this.#kick!.release();
  }

  releaseCalls(): void {
    this.#call!.release();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#kick?.close();
    await this.#call?.close();
    this.#toDevice.close();
    this.#fromDevice.close();
  }
}
