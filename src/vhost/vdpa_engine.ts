/**
 * The rings of a vhost-vdpa device through its states: what to tell the kernel, when, and in which order. The module text of
 * vdpa.ts describes the states. All steps are synchronous but for waiting until a ring is at rest; the caller runs them one
 * after the other.
 *
 * @module
 */
import { EXIT, SvqError } from "../errors.ts";
import { ERRNO, SysError } from "../ffi/errno.ts";
import { hasBit } from "../uapi/bits.ts";
import { BACKEND_FEATURE } from "../uapi/vhost.ts";
import { VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_ID, VIRTIO_STATUS } from "../uapi/virtio.ts";
import type { RingStop, VringStop } from "./backend.ts";
import type { VdpaMaps } from "./vdpa_maps.ts";
import type { VdpaNode } from "./vdpa_node.ts";
import { VdpaRing } from "./vdpa_ring.ts";

/** GET_VRING_BASE of a packed ring that has not begun. */
const PACKED_START = 0x8000_8000;

/** Where a device stands: see vdpa.ts. */
export type VdpaPhase = "reset" | "featured" | "running" | "suspended";

/** What does not change while the device is open. */
export interface VdpaFacts {
  /** For messages. */
  address: string;
  /** Virtio device id. */
  deviceId: number;
  /** Rings. */
  vqsCount: number;
  /** Backend features in force. */
  backendFeatures: bigint;
  /** How rings stop. */
  ringStop: RingStop;
  /** Eventfd for configuration changes. */
  configCallFd: number;
  /** How long a ring of a device without SUSPEND may take to come to rest, ms. */
  restTimeoutMs: number;
}

/** The state machine. */
export class VdpaEngine {
  /** The rings that a front-end has touched, by index. */
  readonly rings = new Map<number, VdpaRing>();
  /** Where the device stands. */
  phase: VdpaPhase = "reset";
  /** Features to acknowledge; undefined before they are known. */
  features: bigint | undefined;
  /** The front-end writes the status itself. */
  explicit = false;
  /** The front-end has written DRIVER_OK, or it was written for it. It stays so over a reset that is our own doing. */
  frontDriverOk = false;
  /** A group of rings in an address space other than 0. */
  isolated: { group: number; asid: number } | undefined;
  /** Suspended by the front-end, not in passing. */
  held = false;

  /** A device after its reset. */
  constructor(
    /** Borrowed. */
    readonly node: VdpaNode,
    /** Borrowed. */
    readonly maps: VdpaMaps,
    /** What does not change. */
    readonly facts: VdpaFacts,
  ) {}

  #has(feature: number): boolean {
    return hasBit(this.facts.backendFeatures, feature);
  }

  /** The device has been given DRIVER_OK. */
  get hasDriverOk(): boolean {
    return this.phase === "running" || this.phase === "suspended";
  }

  /** The record of a ring. @throws SvqError NO_SUCH_QUEUE */
  ring(index: number): VdpaRing {
    const { address, vqsCount } = this.facts;
    let ring = this.rings.get(index);
    if (ring === undefined) {
      if (!(Number.isInteger(index) && index >= 0 && index < vqsCount)) {
        throw new SvqError("NO_SUCH_QUEUE", `Queue ${index}: ${address} has ${vqsCount} queues`);
      }
      ring = new VdpaRing(index);
      this.rings.set(index, ring);
    }
    return ring;
  }

  /** The rings in a state. */
  inState(state: VdpaRing["state"]): VdpaRing[] {
    return [...this.rings.values()].filter((ring) => ring.state === state);
  }

  /**
   * Takes features over; ACCESS_PLATFORM and VERSION_1 come with them where the device offers them.
   *
   * @throws SvqError FEATURES_NOT_OFFERED, FEATURES_LOCKED, FEATURES_REFUSED
   */
  setFeatures(features: bigint): void {
    const offered = this.node.features();
    const all = features | (offered & (VIRTIO_F_ACCESS_PLATFORM | VIRTIO_F_VERSION_1));
    if ((all & ~offered) !== 0n) {
      throw new SvqError("FEATURES_NOT_OFFERED", `${this.facts.address} does not offer features 0x${(all & ~offered).toString(16)}`);
    }
    if (this.phase !== "reset") {
      if (all === this.features) return;
      if (this.inState("running").length > 0) {
        throw new SvqError("FEATURES_LOCKED", `${this.facts.address}: features cannot change while a ring runs`);
      }
      this.resetDevice();
    }
    this.features = all;
    this.handshake();
  }

  /** ACKNOWLEDGE, DRIVER, features, FEATURES_OK. @throws SvqError FEATURES_MISSING, FEATURES_REFUSED */
  handshake(): void {
    const { node } = this;
    if (this.features === undefined) {
      throw new SvqError("FEATURES_MISSING", `${this.facts.address} was started before its features were set`);
    }
    let status = node.status();
    for (const step of [VIRTIO_STATUS.ACKNOWLEDGE, VIRTIO_STATUS.DRIVER]) {
      if ((status & step) === 0) node.setStatus(status |= step);
    }
    node.setFeatures(this.features);
    node.setStatus(status | VIRTIO_STATUS.FEATURES_OK);
    if ((node.status() & VIRTIO_STATUS.FEATURES_OK) === 0) {
      throw new SvqError("FEATURES_REFUSED", `${this.facts.address} refused the feature set 0x${this.features.toString(16)}`, {
        exitCode: EXIT.missingFeature,
      });
    }
    // A reset makes some drivers forget it.
    node.setConfigCall(this.facts.configCallFd);
    this.phase = "featured";
  }

  // ---- starting

  /** DRIVER_OK is the front-end's business, and it has not written it yet. */
  get waitsForDriverOk(): boolean {
    return this.explicit && !this.frontDriverOk;
  }

  /** To be called when something of a ring was set: starts it, or the whole device, when it is time. */
  startIfReady(ring: VdpaRing): void {
    if (this.waitsForDriverOk) return;
    if (this.hasDriverOk) {
      if (ring.ready && ring.state !== "running") this.start([ring]);
      return;
    }
    const rings = [...this.rings.values()];
    // Where rings can be enabled late, one that is only disabled need not be waited for.
    const late = this.#has(BACKEND_FEATURE.ENABLE_AFTER_DRIVER_OK);
    const halfDone = (other: VdpaRing) => other.touched && !other.ready && !(late && other.complete) && !(other.stopped && !other.enabled);
    if (rings.some((one) => one.ready) && !rings.some(halfDone)) this.go();
  }

  /** Tells the device everything that is known, then DRIVER_OK. A failure leaves it reset. */
  go(): void {
    try {
      if (this.phase === "reset") this.handshake();
      this.maps.restore();
      // A reset takes some drivers back to address space 0.
      if (this.isolated !== undefined) this.node.setGroupAsid(this.isolated.group, this.isolated.asid);
      const rings = [...this.rings.values()].filter((ring) => ring.placed);
      for (const ring of rings) this.#configure(ring);
      for (const ring of rings) if (ring.ready) this.node.setVringEnable(ring.index, true);
      const status = this.node.status() | VIRTIO_STATUS.DRIVER_OK;
      this.node.setStatus(status);
      if ((this.node.status() & VIRTIO_STATUS.DRIVER_OK) === 0) {
        throw new SvqError("DEVICE_REFUSED", `${this.facts.address} did not take DRIVER_OK`, {
          hint: "The kernel's log (dmesg) may say why",
        });
      }
      this.phase = "running";
      this.frontDriverOk = true;
      for (const ring of rings) ring.state = ring.ready ? "running" : "prepared";
      // What was kicked before DRIVER_OK is forgotten by the device.
      for (const ring of this.inState("running")) ring.kick();
    } catch (error) {
      this.resetDevice();
      throw error;
    }
  }

  #configure(ring: VdpaRing): void {
    try {
      ring.configure(this.node);
    } catch (error) {
      if (error instanceof SysError && error.syscall === "VHOST_SET_VRING_BASE" && error.errno === ERRNO.EOPNOTSUPP) {
        throw new SvqError(
          "BASE_NOT_SUPPORTED",
          `Queue ${ring.index}: ${this.facts.address} can only start at the beginning of a ring, not at ${ring.base}`,
          {
            hint: "Its driver cannot take a position: run it behind the relay in shadow mode, which gives it fresh rings",
            cause: error,
          },
        );
      }
      throw error;
    }
  }

  /** Starts rings that are ready, on a device that has DRIVER_OK. @throws SvqError RING_NOT_AT_REST, BASE_NOT_SUPPORTED */
  start(rings: readonly VdpaRing[]): void {
    const late = this.#has(BACKEND_FEATURE.ENABLE_AFTER_DRIVER_OK);
    if (rings.every((ring) => ring.canUnpark)) {
      for (const ring of rings) ring.state = "running";
    } else if (late && rings.every((ring) => ring.state === "prepared" && ring.told)) {
      for (const ring of rings) {
        this.node.setVringEnable(ring.index, true);
        ring.state = "running";
      }
    } else if (this.facts.ringStop === "each") {
      this.suspendNow();
      for (const ring of rings) {
        // Addresses are taken on the edge of this.
        this.node.setVringEnable(ring.index, false);
        this.#configure(ring);
        this.node.setVringEnable(ring.index, true);
        ring.state = "running";
      }
      if (!this.held) this.resumeNow();
    } else if (this.facts.ringStop === "together") {
      this.suspendNow();
      this.readBases();
      this.rebuild();
    } else {
      const others = this.inState("running").filter((ring) => !rings.includes(ring));
      if (others.length > 0) throw this.#notAtRest(others[0]!, "must be stopped first: this device can only be set up as a whole");
      this.rebuild();
    }
    for (const ring of rings) ring.kick();
  }

  /** Reset and set up again, with the rings at the bases that are known. */
  rebuild(): void {
    const suspendedAgain = this.held;
    this.resetDevice();
    this.go();
    for (const ring of this.inState("running")) ring.wake();
    if (suspendedAgain) this.suspendNow();
    this.held = suspendedAgain;
  }

  // ---- stopping

  /** SUSPEND, where the device runs. */
  suspendNow(): void {
    if (this.phase !== "running") return;
    this.node.suspend();
    this.phase = "suspended";
  }

  /** RESUME, where it is suspended. */
  resumeNow(): void {
    if (this.phase !== "suspended") return;
    this.node.resume();
    this.phase = "running";
    for (const ring of this.inState("running")) ring.kick();
  }

  /** Takes the positions of all running rings from the device; it must be suspended. */
  readBases(): void {
    for (const ring of this.inState("running")) ring.base = this.node.vringBase(ring.index);
  }

  /** Stops rings. @param unkick they want a new kick before they start again @throws SvqError RING_NOT_AT_REST */
  async stop(stops: readonly VringStop[], unkick: boolean): Promise<void> {
    const named = stops.map(({ index }) => this.ring(index));
    const rings = named.filter((ring) => ring.state === "running");
    if (rings.length > 0 && this.facts.ringStop === "at-rest") await this.#stopAtRest(stops, rings);
    if (unkick) { for (const ring of named) ring.setKick(null); }
    if (rings.length === 0 || this.facts.ringStop === "at-rest") return;
    this.suspendNow();
    this.readBases();
    for (const ring of rings) ring.state = "idle";
    const others = this.inState("running").length > 0;
    if (this.facts.ringStop === "each") {
      for (const ring of rings) this.node.setVringEnable(ring.index, false);
      // With nothing to run it stays as quiet as it is.
      if (others && !this.held) this.resumeNow();
    } else if (others) this.rebuild();
    else this.resetDevice();
  }

  async #stopAtRest(stops: readonly VringStop[], rings: readonly VdpaRing[]): Promise<void> {
    const recorded = new Set(stops.filter((stop) => stop.recorded).map((stop) => stop.index));
    const last = this.inState("running").every((ring) => rings.includes(ring));
    const isNet = this.facts.deviceId === VIRTIO_ID.net;
    const bases = new Map<VdpaRing, number | undefined>();
    for (const ring of rings) {
      // Frames come back in order, so what a reset leaves behind are the last entries; and receive buffers never come to rest.
      const mayCut = last && (recorded.has(ring.index) || (isNet && !this.#packed));
      const rested = await this.#atRest(ring, mayCut && isNet ? 0 : this.facts.restTimeoutMs);
      if (!rested && !mayCut) {
        throw this.#notAtRest(ring, last ? "has requests in flight" : "has requests in flight, and other rings run");
      }
      bases.set(ring, this.#packed ? this.#baseOfPacked(ring) : undefined);
    }
    if (last) this.resetDevice();
    for (const ring of rings) {
      const base = bases.get(ring) ?? this.#indices(ring)?.used ?? ring.base;
      if (last) ring.base = base;
      else ring.park(base);
    }
  }

  get #packed(): boolean {
    return ((this.features ?? 0n) & VIRTIO_F_RING_PACKED) !== 0n;
  }

  // The driver says, or it is the start of the ring: the caller has recorded what was in flight.
  #baseOfPacked(ring: VdpaRing): number {
    try {
      return this.node.vringBase(ring.index);
    } catch {
      return PACKED_START;
    }
  }

  // Of a split ring, from memory.
  #indices(ring: VdpaRing): { avail: number; used: number } | undefined {
    const avail = this.maps.buffer(ring.addresses!.avail, 4);
    const used = this.maps.buffer(ring.addresses!.used, 4);
    if (avail === undefined || used === undefined) return undefined;
    return { avail: Atomics.load(new Uint16Array(avail), 1), used: Atomics.load(new Uint16Array(used), 1) };
  }

  async #atRest(ring: VdpaRing, timeoutMs: number): Promise<boolean> {
    // A packed ring does not show how far its driver is: the caller has seen to it.
    if (this.#packed) return true;
    const deadline = performance.now() + timeoutMs;
    for (let wait = 0;; wait = Math.min(wait + 1, 5)) {
      const indices = this.#indices(ring);
      if (indices === undefined || indices.avail === indices.used) return true;
      if (performance.now() >= deadline) return false;
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }

  #notAtRest(ring: VdpaRing, why: string): SvqError {
    return new SvqError("RING_NOT_AT_REST", `Queue ${ring.index} of ${this.facts.address} ${why}`, {
      hint: "The driver has no SUSPEND: let everything in flight come back first (stop the VM), or run the device in shadow mode",
    });
  }

  /** STATUS 0: no ring is touched any more; what was set for the rings stays known. */
  resetDevice(): void {
    this.node.setStatus(0);
    this.maps.afterReset(this.#has(BACKEND_FEATURE.IOTLB_PERSIST));
    for (const ring of this.rings.values()) ring.state = "idle";
    this.phase = "reset";
    this.held = false;
  }
}
