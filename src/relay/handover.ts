/**
 * What a relay in another process needs to go on with a guest: what the VMM has set, and where each ring stands. Plain data, and
 * descriptors by their place in a list that travels along.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import type { OwnedFd } from "../ffi/mod.ts";
import type { NetStateDocument } from "../net/state.ts";
import type { BackendInfo, VringAddresses } from "../vhost/backend.ts";
import type { FrontEndState } from "../vhost_user/front_end.ts";
import type { ServerState } from "../vhost_user/server.ts";
import type { Relay, RelayConfig, RelayMode } from "./relay.ts";

const LOG_ALL = 1n << 26n;

/** Descriptors on their way to another process. The sender's are borrowed; the receiver's are owned. */
export class FdList {
  /** The descriptors, in order. */
  readonly fds: number[] = [];

  /** Puts one on the list. @returns its place; -1 for none */
  add(fd: number | null | undefined): number {
    return fd === null || fd === undefined ? -1 : this.fds.push(fd) - 1;
  }
}

/** Descriptors that have come. Whoever wants to keep one duplicates it, or takes it out. */
export class ReceivedFds implements Disposable {
  readonly #fds: (OwnedFd | undefined)[];

  /** Takes ownership. @param fds in the order of their sender's list */
  constructor(fds: readonly OwnedFd[]) {
    this.#fds = [...fds];
  }

  /** A borrowed descriptor; undefined for place -1. @throws SvqError UPGRADE_STATE for a place that is not on the list */
  at(place: number): number | undefined {
    if (place === -1) return undefined;
    const fd = this.#fds[place];
    if (fd === undefined) throw new SvqError("UPGRADE_STATE", `The state of the relay names a descriptor that did not come: ${place}`);
    return fd.fd;
  }

  /** Takes one out: it is the caller's. */
  take(place: number): OwnedFd | undefined {
    if (place === -1) return undefined;
    this.at(place);
    const fd = this.#fds[place]!;
    this.#fds[place] = undefined;
    return fd;
  }

  /** Closes all that were not taken. */
  [Symbol.dispose](): void {
    for (const fd of this.#fds.splice(0)) fd?.close();
  }
}

/** A file's part. `fd` is a place on the list. */
export interface FilePart {
  /** The file. */
  fd: number;
  /** Bytes. */
  offset: number;
  /** Bytes. */
  size: number;
}

/** A region of guest memory. `fd` is a place on the list. */
export interface RegionState {
  /** Guest address, bytes. */
  gpa: number;
  /** Bytes. */
  size: number;
  /** Address in the VMM, bytes. */
  uaddr: number;
  /** The file. */
  fd: number;
  /** Bytes. */
  fdOffset: number;
}

/** A ring. Eventfds are places on the list. */
export interface QueueHandover {
  /** Which. */
  index: number;
  /** Descriptors. */
  num: number;
  /** Where it lies. */
  addresses: VringAddresses | null;
  /** Where it goes on. */
  base: number;
  /** The base that the VMM set last. */
  startBase: number | null;
  /** The base that the VMM got when it stopped the ring. */
  lastBase: number | null;
  /** May it run? */
  enabled: boolean;
  /** Has the VMM said so, or otherwise? */
  enableSeen: boolean;
  /** Has the VMM started it? */
  kicked: boolean;
  /** Guest kick. */
  kick: number;
  /** Guest call. */
  call: number;
  /** Error eventfd. */
  err: number;
}

/** What {@linkcode restoreRelay} needs. */
export interface RelayHandover {
  /** Features that the guest took, `0x…`; null before it has. */
  features: string | null;
  /** Is the dirty log on? */
  logging: boolean;
  /** Guest memory. */
  memory: RegionState[];
  /** The file of the shadow rings: a place on the list. */
  arena: number;
  /** The VMM's record of what is in flight. */
  inflight: FilePart & { queues: number; num: number } | null;
  /** The VMM's dirty log. */
  log: FilePart | null;
  /** What the guest has set. */
  status: number | null;
  /** What was set by the control queue of a network device. */
  net: NetStateDocument | null;
  /** Bytes of configuration space that the front-end has read from its start. */
  config: number;
  /** The rings. */
  queues: QueueHandover[];
}

/** {@linkcode ServerState} as plain data: words are `0x…`, descriptors places on the list, -1 for none. */
export type ServerHandover =
  & Omit<ServerState, "protocolFeatures" | "features" | "offered" | "channel" | "memory">
  & { protocolFeatures: string; features: string; offered: string | null; channel: number; memory: RegionState[] };

function refuse(why: string): never {
  throw new SvqError("UPGRADE_REFUSED", `The relay cannot be upgraded now: ${why}`, { hint: "Try again when that has changed" });
}

/** Throws where a relay cannot be handed over as it stands. @throws SvqError UPGRADE_REFUSED */
export function checkHandover(relay: Relay): void {
  if (relay.deviceError !== undefined || relay.deviceLost) refuse("its device is away");
  if (relay.needsReset) refuse("a queue has failed, and waits for the guest's reset");
  if (relay.markingAll) refuse("a switch is under way, and all guest memory counts as dirty");
  if (relay.parts.iommu) refuse("what the guest's IOMMU maps is known to this process only");
  const bound = relay.info.ringStop !== undefined && relay.info.ringStop !== "each" &&
    relay.queues.some(({ mode }) => mode === "passthrough" || mode === "notify");
  if (bound) refuse(`${relay.info.address} cannot be taken off the guest's own rings while its driver runs`);
}

/** The state of a relay whose rings are suspended. */
export function exportRelay(relay: Relay, list: FdList): RelayHandover {
  const { featuresSet, status, inflight } = relay.parts;
  const log = relay.dirty.vmmLog;
  return {
    features: featuresSet ? hex(relay.features) : null,
    logging: relay.logging,
    memory: relay.memory.regions.map(({ gpa, size, uaddr, fd, fdOffset }) => ({ gpa, size, uaddr, fdOffset, fd: list.add(fd) })),
    arena: list.add(relay.arena?.fd),
    inflight: inflight === undefined ? null : { ...inflight, fd: list.add(inflight.fd) },
    log: log === undefined ? null : { ...log, fd: list.add(log.fd) },
    status: status ?? null,
    config: relay.configSeen?.length ?? 0,
    net: relay.net.document ?? null,
    // A control queue that the relay drives by itself is made anew.
    queues: relay.queues.filter(({ alone }) => !alone).map((queue) => {
      const { kick, call, err } = queue.eventfds;
      const { index, num, base, enabled, enableSeen, kicked } = queue;
      return {
        ...{ index, num, base, enabled, enableSeen, kicked },
        addresses: queue.addresses ?? null,
        startBase: queue.startBase ?? null,
        lastBase: queue.lastBase ?? null,
        ...{ kick: list.add(kick), call: list.add(call), err: list.add(err) },
      };
    }),
  };
}

function hex(word: bigint): string {
  return `0x${word.toString(16)}`;
}

/**
 * Sets a fresh relay up as a VMM would, with what {@linkcode exportRelay} gave. Its rings run when this resolves.
 *
 * @param touched called once, before a ring can start: what is taken from the guest from then on only this relay knows
 */
export async function restoreRelay(relay: Relay, state: RelayHandover, fds: ReceivedFds, touched: () => Promise<void>): Promise<void> {
  const features = state.features === null ? undefined : BigInt(state.features);
  if (features !== undefined) await relay.setFeatures(features);
  const arena = fds.take(state.arena);
  if (arena !== undefined) relay.placed.adoptArena(arena);
  if (state.memory.length > 0) await relay.setMemTable(state.memory.map((region) => ({ ...region, fd: fds.at(region.fd)! })));
  if (state.inflight !== null) await relay.setInflight({ ...state.inflight, fd: fds.at(state.inflight.fd)! });
  if (state.log !== null) await relay.setLogBase({ ...state.log, fd: fds.at(state.log.fd)! });
  if (state.logging && features !== undefined) await relay.setFeatures(features | LOG_ALL);
  if (state.config > 0) await relay.getConfig(0, state.config).catch(() => {});
  if (state.net !== null && state.net !== undefined) await relay.net.load(state.net);
  await touched();
  for (const { index, num, addresses, base, call, err } of state.queues) {
    if (num > 0) await relay.setVringNum(index, num);
    if (addresses !== null) await relay.setVringAddresses(index, addresses);
    await relay.setVringBase(index, base);
    await relay.setVringCall(index, fds.at(call) ?? null);
    await relay.setVringErr(index, fds.at(err) ?? null);
  }
  // Devices that start all of their rings together wait for the last one that was started to be enabled.
  for (const { index, kicked, kick } of state.queues) if (kicked) await relay.setVringKick(index, fds.at(kick) ?? null);
  for (const { index, enableSeen, enabled } of state.queues) if (enableSeen) await relay.setVringEnable(index, enabled);
  if (state.status !== null) await relay.setStatus(state.status);
  for (const queue of relay.queues.filter(({ alone }) => !alone)) {
    const { startBase, lastBase } = state.queues.find(({ index }) => index === queue.index)!;
    queue.startBase = startBase ?? undefined;
    queue.lastBase = lastBase ?? undefined;
  }
}

/** {@linkcode ServerState} for the way. */
export function exportServer(state: ServerState, list: FdList): ServerHandover {
  return {
    protocolFeatures: hex(state.protocolFeatures),
    features: hex(state.features),
    offered: state.offered === undefined ? null : hex(state.offered),
    alwaysEnabled: state.alwaysEnabled,
    nums: state.nums,
    started: state.started,
    errors: state.errors.map(({ index, fd }) => ({ index, fd: list.add(fd) })),
    memory: state.memory.map((region) => ({ ...region, fd: list.add(region.fd) })),
    channel: list.add(state.channel),
  };
}

/** The reverse of {@linkcode exportServer}; descriptors are borrowed from `fds`. */
export function importServer(state: ServerHandover, fds: ReceivedFds): ServerState {
  return {
    protocolFeatures: BigInt(state.protocolFeatures),
    features: BigInt(state.features),
    offered: state.offered === null ? undefined : BigInt(state.offered),
    alwaysEnabled: state.alwaysEnabled,
    nums: state.nums,
    started: state.started,
    errors: state.errors.map(({ index, fd }) => ({ index, fd: fds.at(fd)! })),
    memory: state.memory.map((region) => ({ ...region, fd: fds.at(region.fd)! })),
    channel: fds.at(state.channel),
  };
}

/** What the user may have changed of a relay while it ran. */
export type ConfigHandover = Pick<RelayConfig, "mode" | "forceShadow" | "switchTimeoutMs"> & { queueModes: [number, RelayMode][] | null };

/** See {@linkcode ConfigHandover}. */
export function exportConfig({ mode, queueModes, forceShadow, switchTimeoutMs }: RelayConfig): ConfigHandover {
  return { mode, queueModes: queueModes === undefined ? null : [...queueModes], forceShadow, switchTimeoutMs };
}

/** Puts what was changed into the configuration that the command line made. */
export function importConfig(config: RelayConfig, { queueModes, ...rest }: ConfigHandover): void {
  Object.assign(config, rest);
  if (queueModes !== null) config.queueModes = new Map(queueModes);
}

/** {@linkcode FrontEndState} as plain data. */
export interface DeviceHandover {
  /** Facts about it. */
  info: Omit<BackendInfo, "protocolFeatures" | "offeredProtocolFeatures"> & { protocolFeatures: string; offeredProtocolFeatures: string };
  /** See {@linkcode FrontEndState}. */
  hasProtocolFeatures: boolean;
  /** See {@linkcode FrontEndState}. */
  memory: FrontEndState["memory"];
  /** The connection: a place on the list. */
  stream: number;
  /** The channel for the device's requests: a place on the list. */
  channel: number;
}

/** {@linkcode FrontEndState} for the way. */
export function exportDevice(held: { state: FrontEndState; stream: number; channel: number | undefined }, list: FdList): DeviceHandover {
  const { info, hasProtocolFeatures, memory } = held.state;
  return {
    info: { ...info, protocolFeatures: hex(info.protocolFeatures), offeredProtocolFeatures: hex(info.offeredProtocolFeatures ?? 0n) },
    ...{ hasProtocolFeatures, memory },
    stream: list.add(held.stream),
    channel: list.add(held.channel),
  };
}

/** The reverse of {@linkcode exportDevice}. */
export function importDevice({ info, hasProtocolFeatures, memory }: DeviceHandover): FrontEndState {
  const words = { protocolFeatures: BigInt(info.protocolFeatures), offeredProtocolFeatures: BigInt(info.offeredProtocolFeatures) };
  return { info: { ...info, ...words }, hasProtocolFeatures, memory };
}
