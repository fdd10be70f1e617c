/**
 * The control queue of a network device behind a relay: who drives it, what it has set, and bringing a fresh device to that.
 *
 * Two sources. (a) The front-end owns it (an embedded driver): its commands pass through src/relay/control_core.ts, and those
 * that the device has acknowledged make up the state. (b) The VMM keeps it to itself (QEMU's vhost-user-net never forwards it):
 * the relay negotiates it with the device and drives it: queue pairs as the VMM enables rings, the address from `--mac`, or
 * promiscuous mode.
 *
 * In both, the state is given to a device that has not got it (a destination, the successor of a lost device, a device that was
 * set up anew) before its data queues start.
 *
 * @module
 */
import { EXIT, SvqError, toErrorRecord } from "../errors.ts";
import { decodeNetCommand, encodeNetCommand, type NetCommand } from "../net/command.ts";
import { RARP_BYTES, rarpFrame } from "../net/rarp.ts";
import { looksLikeNet } from "../net/recognize.ts";
import { nameOfUnknown, NetState, type NetStateDocument } from "../net/state.ts";
import { bit, hasBit } from "../uapi/bits.ts";
import { VIRTIO_ID } from "../uapi/virtio.ts";
import {
  decodeNetConfig,
  netControlQueueIndex,
  VIRTIO_NET_CONFIG_BYTES,
  VIRTIO_NET_CTRL_ACK,
  VIRTIO_NET_FEATURE_BITS,
} from "../uapi/virtio_net.ts";
import type { MemoryRegion } from "../memory/region.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import { frameShape } from "./capture.ts";
import { type ControlEvent, type ControlStart, type OwnCommand, UNANSWERED } from "./messages.ts";
import type { RelayQueue } from "./relay_queue.ts";

const F = VIRTIO_NET_FEATURE_BITS;
const CTRL_VQ = bit(F.CTRL_VQ);

/** How long a device may take for one command of the relay's own, ms. */
const ANSWER_MS = 5000;
/** The first queue that sends. */
const ANNOUNCING_QUEUE = 1;
/** Refusals that are kept for the status. */
const REFUSALS_KEPT = 16;

/** Who drives the control queue. */
export type ControlSource = "guest" | "relay";

/** What a {@linkcode NetControl} asks its relay. */
export interface NetControlContext {
  /** The device, or the one that was lost. */
  device: () => VhostBackend;
  /** Features that the guest took. */
  features: () => bigint;
  /** The queues that the front-end has touched. */
  queues: () => readonly RelayQueue[];
  /** A queue of the relay, made where there is none. */
  queue: (index: number) => RelayQueue;
  /** Queues that there can be. */
  maxQueues: number;
  /** Another record for the same queue, with the same lane: for a ring without the guest's. */
  spare: (queue: RelayQueue) => RelayQueue;
  /** Gives commands to the Worker that runs the control queue. */
  inject: (index: number, commands: OwnCommand[]) => Promise<void>;
  /** Where the relay's own ring of a queue lies; undefined before the device has been given memory. */
  region: (index: number) => MemoryRegion | undefined;
  /** Do all rings of the device start together? */
  together: boolean;
  /** The guest's address, where the user has said it. */
  mac: string | undefined;
  /** A line for the log. */
  log: (message: string) => void;
}

interface Awaited {
  command: NetCommand;
  done: (ack: number) => void;
}

/** The control queue of one relay. */
export class NetControl {
  readonly #context: NetControlContext;
  #state = new NetState();
  /** Loaded, and not given to a device yet. It outlives resets: VMMs reset a device before they start it. */
  #preset: NetState | undefined;
  #index = -1;
  #source: ControlSource | undefined;
  #pairsMax = 1;
  /** What the device was told. */
  #word = 0n;
  /** Has the device that is there now got the state? */
  #synced = false;
  #epoch = 0;
  #isolated = false;
  #nextId = 1;
  readonly #awaited = new Map<number, Awaited>();
  #first: Promise<number>[] = [];
  #firstCommands: NetCommand[] = [];
  readonly #refusals: string[] = [];
  #spare: RelayQueue | undefined;

  /** Nothing is known of the device yet. */
  constructor(context: NetControlContext) {
    this.#context = context;
  }

  /** The control queue; -1: none is in use. */
  get index(): number {
    return this.#index;
  }

  /** Does the device have an address space for it in which there is nothing but the relay's pages? */
  get isolated(): boolean {
    return this.#isolated;
  }

  async #isolate(): Promise<void> {
    const region = this.#context.region(this.#index);
    const device = this.#context.device();
    if (region === undefined || device.isolate === undefined) return;
    try {
      this.#isolated = await device.isolate(this.#index, region);
    } catch (error) {
      // Less memory may be pinned than this needs: it is a fence, and not needed for the queue to work.
      this.#isolated = false;
      this.#context.log(`control queue: no address space of its own: ${toErrorRecord(error).message}`);
    }
  }

  /** Who drives it; undefined: nobody. */
  get source(): ControlSource | undefined {
    return this.#source;
  }

  /** The newest commands that were refused, with the reason. */
  get refusals(): readonly string[] {
    return this.#refusals;
  }

  /** Queue pairs in use, as far as it was said. */
  get pairs(): number | undefined {
    return this.#state.pairs;
  }

  /** What was set by commands that cannot be set again elsewhere. */
  get notMigratable(): string[] {
    return this.#state.notMigratable;
  }

  /** What was set, as JSON; undefined without a control queue and without a state that waits for one. */
  get document(): NetStateDocument | undefined {
    return this.#preset?.save() ?? (this.#index < 0 ? undefined : this.#state.save());
  }

  // ---- negotiation

  /**
   * What the relay takes of the device's features besides the guest's, so as to drive its control queue.
   *
   * @param guest what the guest takes
   * @param offered what the device offers
   */
  async extraFeatures(guest: bigint, offered: bigint): Promise<bigint> {
    if ((guest & CTRL_VQ) !== 0n || (offered & CTRL_VQ) === 0n || !await this.#reachable(offered)) return 0n;
    const useful = (offered & bit(F.CTRL_RX)) !== 0n || (guest & bit(F.MQ)) !== 0n ||
      (this.#context.mac !== undefined && (offered & bit(F.CTRL_MAC_ADDR)) !== 0n);
    return useful ? offered & (CTRL_VQ | bit(F.CTRL_RX) | bit(F.CTRL_MAC_ADDR)) : 0n;
  }

  // vhost-user devices that count pairs (DPDK) offer the bit and have no such ring.
  async #reachable(offered: bigint): Promise<boolean> {
    const { info } = this.#context.device();
    if (!info.hasConfig || !this.isNet(offered)) return false;
    await this.#readPairs();
    return info.kind === "vhost-vdpa" || info.queueNum === 2 * this.#pairsMax + 1;
  }

  /** Is it a network device, as far as these features tell? */
  isNet(features: bigint): boolean {
    const { deviceId } = this.#context.device().info;
    return deviceId === VIRTIO_ID.net || (deviceId === undefined && looksLikeNet(features));
  }

  /** Which way frames go in queue `index`; undefined for the control queue and for queues of other devices. */
  frames(index: number, features: bigint): "in" | "out" | undefined {
    return index === this.index || !this.isNet(features) ? undefined : index % 2 === 0 ? "in" : "out";
  }

  async #readPairs(): Promise<void> {
    const device = this.#context.device();
    if (!device.info.hasConfig) this.#pairsMax = Math.max(1, Math.floor(device.info.queueNum / 2));
    else this.#pairsMax = Math.max(1, decodeNetConfig(await device.getConfig(0, VIRTIO_NET_CONFIG_BYTES)).maxVirtqueuePairs);
  }

  /** Features were negotiated. @param word what the device was told */
  async negotiated(word: bigint): Promise<void> {
    if (word === this.#word) return;
    const used = (word & CTRL_VQ) !== 0n && this.isNet(word);
    if (used) await this.#readPairs();
    const index = used ? netControlQueueIndex(word, this.#pairsMax) : -1;
    const known = index < this.#context.maxQueues;
    if (!known) this.#context.log(`control queue: the device says that it is queue ${index}, which it has not; it is not relayed`);
    if (this.#source === "relay") await this.#release();
    this.#word = word;
    this.#index = known ? index : -1;
    this.#source = this.#index < 0 ? undefined : (this.#context.features() & CTRL_VQ) !== 0n ? "guest" : "relay";
    this.#forget();
  }

  // A queue that the relay drove may be the guest's from now on.
  async #release(): Promise<void> {
    const queue = this.#context.queue(this.#index);
    if (!queue.alone) return;
    await queue.lane.run(async () => {
      await queue.leave();
      queue.forget();
    });
  }

  // The state of a device that was reset.
  #forget(): void {
    this.#state.reset();
    this.#synced = false;
    this.#epoch++;
    if (this.#source !== "relay") return;
    const { mac } = this.#context;
    if (mac !== undefined && hasBit(this.#word, F.CTRL_MAC_ADDR)) {
      this.#state.apply({ name: "MAC_ADDR_SET", mac });
      // What the guest's driver wants besides its own address stays with the VMM.
      if (hasBit(this.#word, F.CTRL_RX)) this.#state.apply({ name: "RX", mode: "allmulti", on: true });
    } else if (hasBit(this.#word, F.CTRL_RX)) this.#state.apply({ name: "RX", mode: "promisc", on: true });
  }

  /** The guest has reset its device. */
  reset(): void {
    this.#spareGone();
    this.#forget();
  }

  #spareGone(): void {
    this.#spare?.close();
    this.#spare = undefined;
  }

  /** The device is lost: its successor knows nothing. */
  lost(): void {
    this.#synced = false;
    this.#epoch++;
    for (const { done } of [...this.#awaited.values()]) done(UNANSWERED);
  }

  // ---- the state of a device

  /** How the Worker is to run queue `index`; undefined for a data queue. */
  start(index: number, guestless: boolean): ControlStart | undefined {
    if (guestless && this.#announcement !== undefined && index === ANNOUNCING_QUEUE) {
      return { features: this.#context.features(), guestless, answers: false, first: [this.#announcement] };
    }
    if (index !== this.#index) return undefined;
    const commands = this.#synced ? [] : this.#state.replay();
    this.#firstCommands = commands;
    const first: OwnCommand[] = [];
    this.#first = commands.map((command) => {
      const { id, done } = this.#expect(command);
      first.push({ id, bytes: encodeNetCommand(command) });
      return done;
    });
    return { features: this.#context.features(), guestless, answers: true, first };
  }

  #announcement: OwnCommand | undefined;

  /**
   * Announces the guest through its own send queue, where the device cannot do it: the ring is taken from the guest for the time of one
   * frame.
   *
   * @param mac 6 bytes
   * @throws what the device says to the change of hands
   */
  async announce(mac: Uint8Array): Promise<void> {
    const queue = this.#context.queue(ANNOUNCING_QUEUE);
    await queue.lane.run(async () => {
      if (queue.mode === undefined) return this.#context.log("the guest is not announced: its send queue does not run");
      await queue.change(queue.mode, () => this.#sendAlone(queue, mac));
    });
  }

  async #sendAlone(queue: RelayQueue, mac: Uint8Array): Promise<void> {
    const { headerBytes } = frameShape(this.#context.features());
    const bytes = new Uint8Array(headerBytes + RARP_BYTES);
    bytes.set(rarpFrame(mac), headerBytes);
    const { id, done } = this.#expect({ name: "ANNOUNCE_ACK" });
    const own = this.#context.spare(queue);
    try {
      this.#announcement = { id, bytes };
      own.driveAlone();
      await own.enter("shadow");
      const ack = await done;
      await own.leave();
      if (ack !== VIRTIO_NET_CTRL_ACK.OK) this.#context.log("the guest was not announced: the device did not take the frame");
    } catch (error) {
      // The guest gets its ring back all the same.
      this.#context.log(`the guest was not announced: ${toErrorRecord(error).message}`);
    } finally {
      this.#announcement = undefined;
      own.close();
    }
  }

  /**
   * Is a frame of this size for the device? For devices that are not told of an MTU themselves.
   *
   * @param mtu bytes
   * @throws SvqError MTU_TOO_LARGE
   */
  async checkMtu(mtu: number): Promise<void> {
    const device = this.#context.device();
    if ((await device.getFeatures() & bit(F.MTU)) === 0n) return;
    const most = decodeNetConfig(await device.getConfig(0, VIRTIO_NET_CONFIG_BYTES)).mtu;
    if (mtu <= most) return;
    throw new SvqError("MTU_TOO_LARGE", `${device.info.address} takes frames with up to ${most} bytes of payload, not ${mtu}`, {
      hint: `Give the VM's network device host_mtu=${most} or less`,
    });
  }

  #expect(command: NetCommand): { id: number; done: Promise<number> } {
    const id = this.#nextId++;
    const { promise, resolve } = Promise.withResolvers<number>();
    const timer = setTimeout(() => resolve(UNANSWERED), ANSWER_MS);
    this.#awaited.set(id, { command, done: resolve });
    const done = promise.finally(() => {
      clearTimeout(timer);
      this.#awaited.delete(id);
    });
    return { id, done };
  }

  // The answers to what the ring was started with.
  async #settled(): Promise<void> {
    const epoch = this.#epoch;
    const commands = this.#firstCommands;
    const answers = await Promise.all(this.#first);
    const at = answers.findIndex((ack) => ack !== VIRTIO_NET_CTRL_ACK.OK);
    if (at >= 0) throw replayRefused(this.#context.device(), commands[at]!, answers[at]!);
    if (epoch !== this.#epoch) throw new SvqError("DEVICE_LOST", "The device was lost while it was brought to its state");
    if (commands.length > 0) this.#context.log(`control queue: the device was brought to the state of ${commands.length} commands`);
    this.#synced = true;
  }

  /**
   * To be done before a data queue starts: the device has the state then. Not for devices whose rings start together: see
   * {@linkcode NetControl.afterStart}.
   *
   * @throws SvqError NET_REPLAY_REFUSED, and what the device says
   */
  async beforeData(): Promise<void> {
    if (this.#index < 0 || this.#context.together) return;
    this.#takePreset();
    await this.#followPairs();
    const queue = this.#context.queue(this.#index);
    await queue.lane.run(async () => {
      if (!queue.running) await this.#isolate();
      await this.#sync(queue);
    });
  }

  async #sync(queue: RelayQueue): Promise<void> {
    if (queue.state === "waiting") await queue.recover("shadow");
    if (this.#source === "relay") {
      if (!queue.running) {
        queue.driveAlone();
        await queue.enter("shadow");
      }
      if (!this.#synced) await this.#settled();
      return;
    }
    if (this.#synced) return;
    if (queue.running) return await this.#settled();
    if (this.#state.replay().length === 0) return;
    // The guest's ring comes later, or is not to run before it is enabled.
    const own = this.#spare ??= this.#context.spare(queue);
    own.driveAlone();
    await own.enter("shadow");
    try {
      await this.#settled();
    } finally {
      await own.leave();
    }
  }

  /** Rings that start together have started: a device that was set up as a whole has lost its state. @throws SvqError NET_REPLAY_REFUSED */
  async afterStart(): Promise<void> {
    if (this.#index < 0 || !this.#context.queue(this.#index).running) return;
    await this.#settled();
  }

  /** Rings that start together are about to. */
  async beforeStart(): Promise<void> {
    if (this.#index < 0) return;
    this.#takePreset();
    this.#synced = false;
    const pairs = this.#pairsEnabled();
    if (pairs !== undefined) this.#state.apply({ name: "VQ_PAIRS_SET", pairs });
    if (this.#source === "relay") this.#context.queue(this.#index).driveAlone();
    await this.#isolate();
  }

  #takePreset(): void {
    if (this.#preset === undefined) return;
    this.#state = this.#preset;
    this.#preset = undefined;
    this.#synced = false;
  }

  // ---- what the VMM says by other means

  #pairsEnabled(): number | undefined {
    if (this.#source !== "relay" || !hasBit(this.#word, F.MQ)) return undefined;
    const enabled = new Set(this.#context.queues().filter((queue) => queue.enabled).map(({ index }) => index));
    let pairs = 0;
    while (pairs < this.#pairsMax && enabled.has(2 * pairs)) pairs++;
    return pairs === 0 || pairs === (this.#state.pairs ?? 1) ? undefined : pairs;
  }

  async #followPairs(): Promise<void> {
    const pairs = this.#pairsEnabled();
    if (pairs === undefined) return;
    const queue = this.#context.queue(this.#index);
    // A device that has not got its state gets this with it.
    if (!this.#synced || !queue.running) this.#state.apply({ name: "VQ_PAIRS_SET", pairs });
    else await this.#command({ name: "VQ_PAIRS_SET", pairs });
  }

  /** The VMM has enabled or disabled a ring. */
  async enabled(index: number): Promise<void> {
    if (this.#index < 0 || index === this.#index || !this.#synced) return;
    await this.#followPairs();
  }

  async #command(command: NetCommand): Promise<void> {
    const { id, done } = this.#expect(command);
    await this.#context.inject(this.#index, [{ id, bytes: encodeNetCommand(command) }]);
    const ack = await done;
    if (ack !== VIRTIO_NET_CTRL_ACK.OK) throw replayRefused(this.#context.device(), command, ack);
    this.#state.apply(command);
  }

  // ---- by hand

  /**
   * Takes over a state that was saved elsewhere: a running device is brought to it at once, another one before its data queues
   * start.
   *
   * @throws SvqError BAD_NET_STATE, NO_CONTROL_QUEUE, NET_REPLAY_REFUSED
   */
  async load(document: unknown): Promise<void> {
    const loaded = NetState.load(document);
    const { device, queues } = this.#context;
    if ((await device().getFeatures() & CTRL_VQ) === 0n) {
      throw new SvqError("NO_CONTROL_QUEUE", `${device().info.address} has no control queue: the state cannot be set`, {
        exitCode: EXIT.missingFeature,
      });
    }
    for (const name of loaded.notMigratable) this.#context.log(`control queue: ${name} is not migratable, and was not set here`);
    if (!queues().some((queue) => queue.running)) {
      this.#preset = loaded;
      return;
    }
    if (this.#index < 0) {
      throw new SvqError("NO_CONTROL_QUEUE", "The guest runs without a control queue: the state cannot be set", {
        exitCode: EXIT.missingFeature,
      });
    }
    const queue = this.#context.queue(this.#index);
    if (!queue.running) {
      this.#preset = loaded;
      return await this.beforeData();
    }
    // What was set and is not in the document: taken back where a command can do that.
    for (const command of undo(this.#state, loaded)) await this.#command(command);
    for (const command of loaded.replay()) await this.#command(command);
  }

  // ---- answers

  /** A command was answered, by the device or on its behalf. */
  answered({ id, bytes, ack, refused }: ControlEvent): void {
    if (id !== undefined) {
      this.#awaited.get(id)?.done(ack);
      return;
    }
    if (refused !== undefined) this.#refuse(`${nameOf(bytes)}: ${refused}`);
    else if (ack !== VIRTIO_NET_CTRL_ACK.OK) this.#refuse(`${nameOf(bytes)}: the device answered ${ack}`);
    else {
      try {
        const command = decodeNetCommand(bytes);
        const known = this.#state.notMigratable.length;
        this.#state.apply(command);
        if (this.#state.notMigratable.length > known) {
          this.#context.log(`control queue: ${nameOf(bytes)} is known to the device and not to svq: it is not migratable`);
        }
      } catch (error) {
        this.#refuse(toErrorRecord(error).message);
      }
    }
  }

  #refuse(text: string): void {
    this.#context.log(`control queue: refused ${text}`);
    this.#refusals.push(text);
    if (this.#refusals.length > REFUSALS_KEPT) this.#refusals.shift();
  }

  /** The relay ends; its Workers have. */
  close(): void {
    this.lost();
    this.#spareGone();
  }
}

// The commands that take back what `now` has and `then` has not, as far as there are such.
function undo(now: NetState, then: NetState): NetCommand[] {
  const before = now.save();
  const after = then.save();
  const commands: NetCommand[] = [];
  for (const [mode, on] of Object.entries(before.rx)) {
    if (on && after.rx[mode as keyof typeof after.rx] === undefined) commands.push({ name: "RX", mode: mode as "promisc", on: false });
  }
  if (before.mac_table !== undefined && after.mac_table === undefined) commands.push({ name: "MAC_TABLE_SET", unicast: [], multicast: [] });
  for (const vlan of before.vlans) if (!after.vlans.includes(vlan)) commands.push({ name: "VLAN_DEL", vlan });
  return commands;
}

function nameOf(bytes: Uint8Array): string {
  try {
    const command = decodeNetCommand(bytes);
    return command.name === "UNKNOWN" ? nameOfUnknown(command) : command.name;
  } catch {
    return bytes.length < 2 ? "a command without a class" : nameOfUnknown({ class: bytes[0]!, command: bytes[1]! });
  }
}

function replayRefused(device: VhostBackend, command: NetCommand, ack: number): SvqError {
  const how = ack === UNANSWERED ? "did not answer" : "refused";
  return new SvqError("NET_REPLAY_REFUSED", `${device.info.address} ${how} ${command.name}, which the guest's driver had set before`, {
    exitCode: EXIT.missingFeature,
    hint: "svq probe shows what the device offers; svq relay status --net-state shows what was set",
  });
}
