/**
 * What the main thread and the worker of an embedded device tell each other. Plain data; descriptors are numbers that the
 * main thread keeps open until the worker has answered that it let go of them.
 *
 * Commands: `open` OpenCommand; `memory` MappedRange[] (answered when nothing uses the old ranges any more); `start`
 * StartCommand; `stop` queue index, answered with the base when the queue is drained; `enable` EnableCommand; `fds`
 * FdsCommand; `iotlb` the descriptor of a VDUSE device, whose memory is used from then on; `iotlb-changed` (answered when what
 * went from it is not used any more); `position` queue index, answered with the base of a ring that goes on; `reset` (answered when nothing is touched any more); `counters` answered with SimCounters[]; `close`.
 * Of a network device: `net-link` (boolean), `net-mtu` (bytes), `net-announce` (the MAC, answered with a boolean), `net-state`
 * answered with NetStateDocument, `net-counters` answered with NetCounters[].
 * Of a network device: `net-link` (boolean), `net-mtu` (bytes), `net-announce` (the MAC, answered with a boolean), `net-state`
 * answered with NetStateDocument, `net-counters` answered with NetCounters[].
 *
 * @module
 */
import type { ErrorRecord } from "../errors.ts";
import type { VringAddresses } from "../vhost/backend.ts";
import type { BlkBacking } from "./blk.ts";
import type { NetBacking } from "./net.ts";

/** The first command: which device it is. */
export interface OpenCommand {
  /** The disk, where it is one. */
  blk: BlkBacking | undefined;
  /** The port, where it is a network device. Neither: a loopback device. */
  net: NetBacking | undefined;
  /** Queues. */
  queues: number;
  /** Microseconds per request. */
  latencyUs: number;
  /** Random microseconds added, at most. */
  jitterUs: number;
}

/** Descriptors of a queue; -1 for none. */
export interface QueueFds {
  /** Signalled by the driver; -1: the queue is polled. */
  kick: number;
  /** Signalled when the driver wants to know of used chains. */
  call: number;
  /** Signalled when the queue stops with an error. */
  err: number;
}

/** Starts a ring. */
export interface StartCommand {
  /** Queue index. */
  queue: number;
  /** Ring size in descriptors. */
  num: number;
  /** Where the ring lies. */
  addresses: VringAddresses;
  /** As in SET_VRING_BASE. */
  base: number;
  /** Its notifications. */
  fds: QueueFds;
  /** Negotiated features. */
  features: bigint;
}

/** Lets a started queue take chains, or not. */
export interface EnableCommand {
  /** Queue index. */
  queue: number;
  /** Whether it takes chains. */
  enabled: boolean;
}

/** Replaces the descriptors of a started queue. */
export interface FdsCommand {
  /** Queue index. */
  queue: number;
  /** The new ones, all three. */
  fds: QueueFds;
}

/** What a queue did since the device was opened. */
export interface SimCounters {
  /** Chains taken. */
  taken: number;
  /** Chains given back. */
  used: number;
  /** Calls signalled. */
  calls: number;
  /** Times that a kick woke the queue. */
  kicks: number;
}

/** A queue stopped because the ring or a request broke a rule. */
export interface BrokenEvent {
  /** Queue index. */
  broken: number;
  /** Why. */
  error: ErrorRecord;
}
