/**
 * The steps by which a ring changes hands: entering a mode gives the device a ring, leaving one takes it away again.
 *
 * Leaving is stop + drain: the device's position equals what came back. What a device never took of a ring of the relay's
 * own are the last entries that were forwarded, in order: the guest's position is rewound to them. A device that leaves
 * with requests in hand is given the ring back until it has returned them.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { createEventfd, type OwnedFd, signalEventfd } from "../ffi/mod.ts";
import type { GuestMemory } from "../memory/guest_memory.ts";
import { hasBit } from "../uapi/bits.ts";
import { VIRTIO_FEATURE_BITS } from "../uapi/virtio.ts";
import type { VhostBackend, VringAddresses, VringStart } from "../vhost/backend.ts";
import { completePackedBase, PACKED_BASE_START, packedBase } from "../vring/packed_event.ts";
import type { Arena } from "./arena.ts";
import type { CaptureStart } from "./capture.ts";
import { deviceIsGone } from "./device_slot.ts";
import { INFLIGHT_STATE, type InflightChains, inflightState, recoverPacked, recoverSplit, setInflightState } from "../vring/inflight.ts";
import { isOfPackedRing, isOfSplitRing, isUnusedPackedRing } from "../vring/inflight_life.ts";
import type { InflightPart, InflightRegion } from "./inflight_region.ts";
import type { ControlStart, QueueProgress, QueueStart, RingPlace } from "./messages.ts";
import { resumableUsedIndex } from "./ring_evidence.ts";
import { HELD_MS, pause, QUIET_MS, settle, until } from "./ring_rest.ts";
import type { RingWindow } from "./ring_window.ts";
import type { RelayWorker } from "./worker_client.ts";

/** Modes that a queue can be in while it runs, by who owns what: the table is in docs/architecture.md. */
export type RunningMode = "passthrough" | "notify" | "used" | "shadow";

/** Modes in which the device works on rings of the relay's own. */
export function isRelayed(mode: RunningMode): mode is "used" | "shadow" {
  return mode === "used" || mode === "shadow";
}

/** What all queues of a relay share. */
export interface QueueContext {
  /** The device, or the one that was lost. */
  device: () => VhostBackend;
  /** Guest memory. */
  memory: GuestMemory;
  /** Shadow rings; made before the first ring starts. */
  arena: () => Arena;
  /** The front-end's in-flight region. */
  inflight: InflightRegion;
  /** Features negotiated with the guest. */
  features: () => bigint;
  /** Does the device have packed rings, whatever the guest has? */
  devicePacked: () => boolean;
  /** Features negotiated with the device. */
  deviceFeatures: () => bigint;
  /** Descriptors in the device's ring for a guest's ring of `num`. */
  deviceNum: (num: number) => number;
  /** How the Worker is to run a control queue; undefined for the others. */
  control: (index: number, guestless: boolean) => ControlStart | undefined;
  /** Into what the frames of a queue are captured, while they are. */
  capture: (index: number) => CaptureStart | undefined;
  /** Which way frames go in a data queue of a network device; undefined for other queues. Received ones find buffers that it keeps. */
  frames: (index: number) => "in" | "out" | undefined;
  /** Is the device given the guest's own indirect tables in mode `shadow`? */
  passTables: boolean;
  /** Doorbells that the VMM may map: see src/relay/doorbells.ts. */
  doorbells: { offer(index: number): void; withdraw(index: number, kick: () => void): Promise<void> };
  /** Was the device taken away because the relay ends? What it says of its rings means nothing then, and it gets none again. */
  released: () => boolean;
  /** Something happened that a log reader wants to know. */
  log: (message: string) => void;
}

/** The guest's ring as the front-end has set it up. Descriptors are open for the length of a step. */
export interface GuestRing {
  /** Descriptors. */
  num: number;
  /** Guest addresses. */
  addresses: VringAddresses;
  /** Where it goes on. */
  base: number;
  /** May the device take chains? */
  enabled: boolean;
  /** Guest kick; null: it only polls. */
  kick: number | null;
  /** Guest call. */
  call: number | null;
  /** Error eventfd. */
  err: number | null;
  /** The relay drives the device's ring by itself: there is no ring of a guest's. */
  guestless?: boolean;
  /** With an IOMMU: the ring in one piece. */
  window?: RingWindow | undefined;
  /** What a relay before this one had in flight; for the first start only. */
  resume?: InflightChains | undefined;
}

/** A ring as the device is given it. */
interface DeviceRing {
  num: number;
  base: number;
  addresses: VringAddresses;
  kick: number | null;
  call: number | null;
  /** A ring of the relay's own is always enabled: disabled means that the Worker takes nothing from the guest. */
  enabled: boolean;
}

/** The error of a queue of which nobody knows what was in flight. */
export function inflightUnknown(index: number, why: string): SvqError {
  return new SvqError(
    "INFLIGHT_UNKNOWN",
    `Queue ${index}: ${why}, after requests had been completed out of order; nobody knows which were in flight`,
    {
      hint: "Reset the guest's device; modes used and shadow survive the loss of a device or of the relay",
    },
  );
}

/** A device that holds requests for so long when its ring is taken away is spoken of in the log, again and again, ms. */
const HELD_NOTICE_MS = 10_000;

/** The steps of one queue. The caller runs them one after the other. */
export class QueueSteps {
  readonly #index: number;
  readonly #worker: RelayWorker;
  readonly #context: QueueContext;
  readonly #deviceKick: OwnedFd = createEventfd();
  readonly #deviceCall: OwnedFd = createEventfd();
  /** The device has sent half the base of a packed ring. */
  #sendsHalves = false;
  readonly #silentKick: OwnedFd = createEventfd();

  constructor(index: number, worker: RelayWorker, context: QueueContext) {
    this.#index = index;
    this.#worker = worker;
    this.#context = context;
  }

  /** Gives the ring to the device in `mode`. @throws what the device says; nothing runs then */
  async enter(mode: RunningMode, ring: GuestRing): Promise<void> {
    const device = isRelayed(mode) ? this.#ownRing(mode, ring) : this.#guestRing(mode, ring);
    // The worker runs first: what the device returns must find somebody.
    if (mode !== "passthrough") await this.#startWorker(mode, ring, device);
    if (!isRelayed(mode)) this.#setRecord(ring, "unrecorded");
    try {
      await this.#giveToDevice(device, ring);
    } catch (error) {
      // What a lost device held is on record in the Worker: it stays for the device's successor.
      if (isRelayed(mode) && deviceIsGone(error)) await this.#worker.send({ type: "lose", index: this.#index });
      // What the front-end's region says stays true for whoever is asked next.
      else if (ring.resume !== undefined) await this.#worker.send({ type: "stop", index: this.#index, abandon: true, keep: true });
      else if (mode !== "passthrough") await this.#worker.send({ type: "stop", index: this.#index });
      throw error;
    }
    if (device.kick !== null) signalEventfd(device.kick);
  }

  /** Starts the Worker's side of a mode, where it has one. @returns what the device is to be given */
  async prepare(mode: RunningMode, ring: GuestRing): Promise<VringStart> {
    const device = isRelayed(mode) ? this.#ownRing(mode, ring) : this.#guestRing(mode, ring);
    if (mode !== "passthrough") await this.#startWorker(mode, ring, device);
    return { index: this.#index, ...device, err: ring.err, enabled: ring.enabled };
  }

  /** Signals the device's kick, unasked. */
  kickDevice(mode: RunningMode, ring: GuestRing): void {
    if (mode !== "passthrough") signalEventfd(this.#deviceKick.fd);
    else if (ring.kick !== null) signalEventfd(ring.kick);
  }

  /**
   * From `passthrough` to `notify` or back while the device goes on with the guest's ring: only eventfds change hands, so this can be
   * done to a ring that cannot be stopped.
   */
  async exchange(mode: "passthrough" | "notify", ring: GuestRing): Promise<void> {
    const device = this.#context.device();
    const own = this.#guestRing(mode, ring);
    // Whoever signals is there before the device can be signalled: what comes by the old way in between still arrives, and both
    // sides are signalled once at the end.
    if (mode === "notify") await this.#startWorker(mode, ring, own);
    try {
      await device.setVringCall(this.#index, own.call);
      await device.setVringKick(this.#index, own.kick);
    } catch (error) {
      // Whichever it has not taken is still the old one, and the other one is given back.
      const old = this.#guestRing(mode === "notify" ? "passthrough" : "notify", ring);
      await device.setVringCall(this.#index, old.call).catch(() => {});
      if (mode === "notify") await this.endWorker();
      throw error;
    }
    if (mode === "passthrough") await this.endWorker();
    this.kickDevice(mode, ring);
  }

  /**
   * The device is gone. With a ring of the relay's own the Worker keeps the record of what was in flight.
   *
   * @returns where a successor goes on in the guest's ring; undefined where nobody can know
   */
  async lose(mode: RunningMode, ring: GuestRing): Promise<number | undefined> {
    if (isRelayed(mode)) {
      await this.#worker.send({ type: "lose", index: this.#index });
      return ring.base;
    }
    if (mode === "notify") await this.#worker.send({ type: "stop", index: this.#index });
    return this.resumableBase(ring);
  }

  /**
   * Where a successor of a lost device goes on in the guest's own ring: to be asked again when it is there, since the lost
   * one may have returned requests after its connection was gone.
   *
   * @returns undefined where nobody can know
   */
  resumableBase(ring: GuestRing): number | undefined {
    const { packed, num } = this.#place(ring);
    return packed ? undefined : resumableUsedIndex({ ...this.#splitWords(ring), num });
  }

  #splitWords({ num, addresses }: GuestRing): { avail: Uint16Array; used: Uint32Array } {
    const { memory } = this.#context;
    return {
      avail: new Uint16Array(memory.buffer(addresses.avail, 4 + 2 * num)),
      used: new Uint32Array(memory.buffer(addresses.used, 4 + 8 * num)),
    };
  }

  #packedRing({ num, addresses, window }: GuestRing): Uint16Array {
    return new Uint16Array(window?.buffer("desc") ?? this.#context.memory.buffer(addresses.desc, 16 * num), 0, 8 * num);
  }

  // A copy: the guest may write meanwhile.
  #descriptors(ring: GuestRing): Uint16Array {
    return this.#packedRing(ring).slice();
  }

  /**
   * The base of a ring that is to start, completed where a front-end, or the device that had the ring before, has sent only the
   * avail half of a packed one.
   *
   * @throws VringError BASE_INVALID
   */
  wholeBase(ring: GuestRing): number {
    const { packed, num } = this.#place(ring);
    return packed && ring.guestless !== true ? completePackedBase(ring.base, num, this.#packedRing(ring)) : ring.base;
  }

  /**
   * What a relay before this one had in flight in this queue, as the front-end's in-flight region says; looked at once.
   *
   * @returns nothing where the ring goes on at the base that the front-end has set; a base where nothing is on record and the
   * rings show where it goes on
   * @throws SvqError INFLIGHT_INVALID; INFLIGHT_UNKNOWN where nobody can know
   */
  takeOver(ring: GuestRing): { base: number; resume?: InflightChains } | undefined {
    const { packed, num } = this.#place(ring);
    const part = this.#part(ring);
    if (part === undefined && this.#context.inflight.given) {
      this.#context.log(`queue ${this.#index}: a ring of ${num} descriptors does not fit the VMM's in-flight region: nothing is recorded`);
    }
    if (part === undefined || !this.#context.inflight.firstLook(this.#index)) return undefined;
    const state = inflightState(part, num);
    if (state === INFLIGHT_STATE.idle) return undefined;
    if (state === INFLIGHT_STATE.unrecorded) {
      const base = this.resumableBase(ring) ?? (isUnusedPackedRing(this.#descriptors(ring), num) ? PACKED_BASE_START : undefined);
      if (base === undefined) throw inflightUnknown(this.#index, "the relay before this one ended in mode passthrough or notify");
      return { base };
    }
    if ((state === INFLIGHT_STATE.packed) !== packed) {
      throw new SvqError("INFLIGHT_INVALID", `Queue ${this.#index}: the in-flight region is of a ring of the other format`);
    }
    const { memory } = this.#context;
    const resume = packed
      ? recoverPacked(part, num, (slot) => Atomics.load(new Uint16Array(memory.buffer(ring.addresses.desc + 16 * slot, 16)), 7))
      : recoverSplit(part, num, Atomics.load(new Uint16Array(memory.buffer(ring.addresses.used, 4)), 1));
    const isOurs = packed ? isOfPackedRing(num, resume, this.#descriptors(ring)) : isOfSplitRing(part, num, resume, this.#splitWords(ring));
    if (!isOurs) {
      this.#context.log(
        `queue ${this.#index}: the guest's device was reset while no relay ran: what the one before had in hand is forgotten`,
      );
      return undefined;
    }
    if (resume.ids.length > 0) {
      this.#context.log(`queue ${this.#index}: ${resume.ids.length} requests that the relay before this one had in hand are done again`);
    }
    return { base: resume.base, resume };
  }

  /** Does the front-end's region have a part for this ring? */
  recorded(ring: GuestRing): boolean {
    return this.#part(ring) !== undefined;
  }

  #part(ring: GuestRing): InflightPart | undefined {
    if (ring.window !== undefined) return undefined;
    return this.#context.inflight.part(this.#index, ring.num, this.#place(ring).packed);
  }

  #setRecord(ring: GuestRing, state: "idle" | "unrecorded"): void {
    const part = this.#part(ring);
    if (part !== undefined) setInflightState(part, ring.num, state);
  }

  /** What a lost device held is given to its successor, in a fresh ring and in the order in which it was taken. */
  async renew(mode: "used" | "shadow", ring: GuestRing): Promise<void> {
    const device = this.#ownRing(mode, ring);
    await this.#worker.send({ type: "renew", queue: this.#queueStart(mode, ring, device) });
    try {
      await this.#giveToDevice(device, ring);
    } catch (error) {
      await this.#worker.send({ type: "lose", index: this.#index });
      throw error;
    }
    signalEventfd(this.#deviceKick.fd);
  }

  /**
   * Forwards nothing more, and waits until the device has returned what it is likely to return.
   *
   * @param rests the device returns everything it took in the end; otherwise (network receive) it keeps buffers
   */
  async quiesce(mode: RunningMode, ring: GuestRing, rests: boolean): Promise<void> {
    await this.#worker.send({ type: "pause", index: this.#index, paused: true });
    if (rests) {
      const deadline = performance.now() + HELD_MS;
      while ((await this.#poll()).inflight > 0 && performance.now() < deadline) await pause(1);
    } else if ((await this.#poll()).inflight > 0) {
      const packed = this.#context.devicePacked();
      const num = this.#ownNum(mode, ring);
      await this.#settle(packed || !isRelayed(mode) ? undefined : new Uint16Array(this.#context.arena().usedRing(this.#index, num)), num);
    }
  }

  /** Ends the Worker's side; the device touches nothing any more. @returns where a successor goes on */
  async endWorker(): Promise<number> {
    return (await this.#worker.progress({ type: "stop", index: this.#index })).guestBase;
  }

  /**
   * Gives up the record that {@linkcode QueueSteps.lose} has kept.
   *
   * @param force whatever is in flight
   * @returns where the guest's ring goes on
   * @throws SvqError RING_GAP unless all that was in flight can be made available again, or `force`
   */
  async drop(force: boolean): Promise<number> {
    return (await this.#worker.progress({ type: "stop", index: this.#index, abandon: force })).guestBase;
  }

  /**
   * Takes the ring away from the device. Should that be lost meanwhile, its successor has nothing to do with this.
   *
   * @returns where a successor goes on
   */
  async leave(mode: RunningMode, ring: GuestRing): Promise<number> {
    const begun = performance.now();
    // Whoever waits for this (a VMM that stops the guest) waits as long: say why.
    const timer = setInterval(() => {
      const seconds = Math.round((performance.now() - begun) / 1000);
      this.#context.log(`queue ${this.#index}: the device still holds requests ${seconds} s after it was to give up its ring`);
    }, HELD_NOTICE_MS);
    try {
      return isRelayed(mode) ? await this.#leaveOwn(mode, ring) : await this.#leaveGuest(mode, ring);
    } finally {
      clearInterval(timer);
    }
  }

  /** Takes a ring away from its Worker and its device whatever is in flight. @returns where the guest's ring stands */
  async abandon(mode: RunningMode, ring: GuestRing): Promise<number> {
    const progress = mode === "passthrough" ? undefined : await this.#worker.progress({ type: "stop", index: this.#index });
    await this.#stopDevice(true);
    return isRelayed(mode) ? progress!.guestBase : ring.base;
  }

  /** The front-end exchanged its call eventfd under a running queue. */
  async setCall(mode: RunningMode, call: number | null): Promise<void> {
    if (mode === "passthrough") await this.#context.device().setVringCall(this.#index, call);
    else await this.#worker.send({ type: "call", index: this.#index, fd: call ?? -1 });
  }

  /** The front-end enabled or disabled a running queue. */
  async setEnabled(mode: RunningMode, enabled: boolean): Promise<void> {
    // Disabled means for a ring of the relay's own: take nothing more from the guest. The device keeps its ring, or what it
    // has not taken yet of what was forwarded would never come back.
    if (isRelayed(mode)) await this.#worker.send({ type: "pause", index: this.#index, paused: !enabled });
    else await this.#context.device().setVringEnable(this.#index, enabled);
  }

  /** Where writes to the guest's used ring are logged. */
  async setLogGpa(mode: RunningMode, logGpa: number | undefined): Promise<void> {
    if (isRelayed(mode)) await this.#worker.send({ type: "logUsed", index: this.#index, gpa: logGpa ?? -1 });
  }

  #place(ring: GuestRing): RingPlace {
    const features = this.#context.features();
    const { desc, avail, used } = ring.addresses;
    return {
      num: ring.num,
      packed: hasBit(features, VIRTIO_FEATURE_BITS.RING_PACKED),
      eventIdx: hasBit(features, VIRTIO_FEATURE_BITS.EVENT_IDX),
      indirect: hasBit(features, VIRTIO_FEATURE_BITS.INDIRECT_DESC),
      inOrder: hasBit(features, VIRTIO_FEATURE_BITS.IN_ORDER),
      desc,
      avail,
      used,
      ...(ring.window === undefined ? {} : {
        local: ring.window.local,
        written: ring.window.written(hasBit(features, VIRTIO_FEATURE_BITS.RING_PACKED)),
      }),
    };
  }

  #guestRing(mode: RunningMode, ring: GuestRing): DeviceRing {
    const { desc, avail, used } = ring.addresses;
    // The device never logs: no log address goes to it.
    const addresses = { desc, avail, used };
    const { num, base } = ring;
    const { enabled } = ring;
    if (mode === "passthrough") return { num, base, addresses, kick: ring.kick, call: ring.call, enabled };
    return { num, base, addresses, kick: this.#deviceKick.fd, call: this.#deviceCall.fd, enabled };
  }

  #ownRing(mode: RunningMode, ring: GuestRing): DeviceRing {
    const num = this.#ownNum(mode, ring);
    const iova = this.#context.arena().place(this.#index, num);
    const desc = mode === "used" ? ring.addresses.desc : iova.desc;
    const base = this.#context.devicePacked() ? PACKED_BASE_START : 0;
    return { num, base, addresses: { ...iova, desc }, kick: this.#deviceKick.fd, call: this.#deviceCall.fd, enabled: true };
  }

  // In mode `used` the device reads the guest's descriptor table.
  #ownNum(mode: RunningMode, ring: GuestRing): number {
    return mode === "used" ? ring.num : this.#context.deviceNum(ring.num);
  }

  async #startWorker(mode: Exclude<RunningMode, "passthrough">, ring: GuestRing, device: DeviceRing): Promise<void> {
    await this.#worker.send({ type: "start", queue: this.#queueStart(mode, ring, device) });
  }

  #queueStart(mode: Exclude<RunningMode, "passthrough">, ring: GuestRing, device: DeviceRing): QueueStart {
    const guest = this.#place(ring);
    const local = this.#context.arena().local(this.#index, device.num);
    const features = this.#context.deviceFeatures();
    const control = this.#context.control(this.#index, ring.guestless === true);
    const capture = control === undefined ? this.#context.capture(this.#index) : undefined;
    // One command at a time is at the device, and the guest's ring shows which.
    const part = control === undefined ? this.#part(ring) : undefined;
    return {
      index: this.#index,
      mode,
      guest,
      device: {
        num: device.num,
        packed: this.#context.devicePacked(),
        eventIdx: hasBit(features, VIRTIO_FEATURE_BITS.EVENT_IDX),
        indirect: hasBit(features, VIRTIO_FEATURE_BITS.INDIRECT_DESC),
        inOrder: hasBit(features, VIRTIO_FEATURE_BITS.IN_ORDER),
        ...local,
        passTables: this.#context.passTables,
      },
      guestBase: ring.base,
      kickFd: ring.kick ?? -1,
      callFd: ring.call ?? -1,
      deviceKickFd: this.#deviceKick.fd,
      deviceCallFd: this.#deviceCall.fd,
      logUsedGpa: ring.addresses.logGpa ?? -1,
      iommu: hasBit(this.#context.features(), VIRTIO_FEATURE_BITS.ACCESS_PLATFORM),
      paused: !ring.enabled,
      ...(part === undefined || mode === "notify" ? {} : { inflight: { address: part.address, size: part.size } }),
      ...(ring.resume === undefined ? {} : { resume: ring.resume }),
      ...(control === undefined ? {} : { control }),
      ...(capture === undefined || mode === "notify" ? {} : { capture }),
    };
  }

  // Order as VMMs use it: NUM, BASE, ADDR, CALL, ERR, KICK, ENABLE. Some devices read the used index at ADDR, and all
  // start at KICK.
  async #giveToDevice(own: DeviceRing, ring: GuestRing, device = this.#context.device()): Promise<void> {
    const index = this.#index;
    if (device.startVrings !== undefined) {
      await device.startVrings([{ index, ...own, err: ring.err }]);
      return;
    }
    await device.setVringNum(index, own.num);
    await device.setVringBase(index, own.base);
    await device.setVringAddresses(index, own.addresses);
    await device.setVringCall(index, own.call);
    await device.setVringErr(index, ring.err);
    await device.setVringKick(index, own.kick);
    await device.setVringEnable(index, own.enabled);
  }

  // A stopped device may still be finishing requests, and has closed the call eventfd that it wants to signal then:
  // qemu-storage-daemon drops the connection over that. Another one follows right behind the stop, before the answer.
  async #stopDevice(recorded: boolean, device = this.#context.device()): Promise<number> {
    const index = this.#index;
    if (device.stopVrings !== undefined) return (await device.stopVrings([{ index, recorded }]))[0]!;
    if (device.info.kind !== "vhost-user") return await device.getVringBase(index);
    const [base] = await Promise.all([device.getVringBase(index), device.setVringCall(index, this.#deviceCall.fd)]);
    return base;
  }

  async #leaveGuest(mode: RunningMode, ring: GuestRing): Promise<number> {
    const { memory } = this.#context;
    const device = this.#context.device();
    const { packed } = this.#place(ring);
    const used = packed ? undefined : new Uint16Array(memory.buffer(ring.addresses.used, 6 + 8 * ring.num));
    const packedRing = packed ? this.#packedRing(ring) : undefined;
    let perhapsHalf = false;
    const avail = packed ? undefined : new Uint16Array(memory.buffer(ring.addresses.avail, 4));
    for (let now = ring;;) {
      // Kicks go to an eventfd that nobody signals: the device finishes what it has seen.
      if (device.info.kickExchange !== false) {
        await device.setVringKick(this.#index, this.#silentKick.fd);
        await this.#settle(used, ring.num, avail === undefined ? undefined : Atomics.load(avail, 1));
      }
      const base = await this.#stopDevice(false, device);
      this.#checkReleased();
      // The ring showed that the used position is no longer where a whole base would have it, and still it is not.
      if (perhapsHalf && base >>> 16 === 0) this.#sendsHalves = true;
      const drained = used === undefined
        ? () => Promise.resolve(this.#isDrained(base, ring.num))
        : () => Promise.resolve(Atomics.load(used, 1) === (base & 0xffff));
      if (await until(drained)) {
        if (mode === "notify") await this.#worker.send({ type: "stop", index: this.#index });
        this.#setRecord(ring, "idle");
        return packed ? packedBase(base & 0xffff, base & 0xffff) : base;
      }
      this.#checkReleased();
      // It left with requests in hand. Give it the ring back, so that it can return them, and try again.
      perhapsHalf = packedRing !== undefined && completePackedBase(base, ring.num, packedRing) !== base >>> 0;
      now = { ...now, base };
      const own = this.#guestRing(mode, now);
      await this.#giveToDevice(own, now, device);
      if (own.kick !== null) signalEventfd(own.kick);
      if (ring.call !== null) signalEventfd(ring.call);
      await pause(QUIET_MS);
    }
  }

  #isDrained(base: number, num: number): boolean {
    const whole = completePackedBase(base, num);
    if (whole !== base >>> 0) this.#sendsHalves = true;
    return this.#sendsHalves || whole >>> 16 === (base & 0xffff);
  }

  async #leaveOwn(mode: RunningMode, ring: GuestRing): Promise<number> {
    const { arena, devicePacked } = this.#context;
    const device = this.#context.device();
    await this.#worker.send({ type: "pause", index: this.#index, paused: true });
    const packed = devicePacked();
    const num = this.#ownNum(mode, ring);
    const used = packed ? undefined : new Uint16Array(arena().usedRing(this.#index, num));
    for (;;) {
      const { inflight } = await this.#poll();
      if (inflight > 0) await this.#settle(used, num);
      const base = await this.#stopDevice(true, device);
      this.#checkReleased();
      // What the device took has come back when the avail half says what the Worker has seen used: some devices send no other half.
      const taken = (packed ? completePackedBase(base, num) : base) & 0xffff;
      if (await until(async () => ((await this.#poll()).deviceBase & 0xffff) === taken)) {
        try {
          return await this.endWorker();
        } catch (error) {
          // A successor that has not begun with what was in the middle of the guest's ring: it does that first.
          if (!(error instanceof SvqError && error.code === "RING_GAP")) throw error;
        }
      }
      this.#checkReleased();
      const iova = arena().peek(this.#index, num);
      const addresses = mode === "used" ? { ...iova, desc: ring.addresses.desc } : iova;
      const own = { num, base, addresses, kick: this.#deviceKick.fd, call: this.#deviceCall.fd, enabled: true };
      await this.#giveToDevice(own, ring, device);
      signalEventfd(this.#deviceKick.fd);
      await pause(QUIET_MS);
    }
  }

  #checkReleased(): void {
    if (!this.#context.released()) return;
    throw new SvqError("DEVICE_LOST", `Queue ${this.#index}: the relay has ended while the device held requests`);
  }

  #poll(): Promise<QueueProgress> {
    return this.#worker.progress({ type: "poll", index: this.#index });
  }

  #settle(used: Uint16Array | undefined, num: number, end?: number): Promise<void> {
    const eventIdx = hasBit(this.#context.features(), VIRTIO_FEATURE_BITS.EVENT_IDX);
    return settle({ used, num, eventIdx, way: this.#context.frames(this.#index), end, over: this.#context.released });
  }

  /** Closes the eventfds; the queue must be stopped. */
  close(): void {
    this.#deviceKick.close();
    this.#deviceCall.close();
    this.#silentKick.close();
  }
}
