/**
 * What the main thread and the worker of an embedded driver tell each other. Plain data.
 *
 * Commands: `open` OpenCommand; `run` RunCommand; `pause` (answered when the worker touches nothing any more); `unpause`;
 * `throttle` a share of time in percent; `kick` (kicks every queue and looks at it once); `drain` answered with the report when all
 * is back or the deadline has passed; `report`; `latencies` answered as Histogram saves them; `log` LogCommand; `save` answered with
 * WorkerState, while paused; `disk-open` DiskOpenCommand, answered with the offsets in RAM of a block for heads and of one for each
 * buffer; `disk` DiskRequest[], answered when all are back; `disk-hold`, answered with the first sector of a block that no request
 * uses and none will; `disk-mark` (marks what writes that are out may change); `disk-close`; `control` (bytes of a command, answered with whether the device took it); `close`.
 *
 * @module
 */
import type { DriverQueueState } from "../vring/queue.ts";
import type { BlkWorkloadOptions } from "./blk_workload.ts";
import type { RamOptions } from "./layout.ts";
import type { LoopbackWorkloadOptions } from "./loopback_workload.ts";
import type { NetWorkloadOptions } from "./net_workload.ts";
import type { DriverCounters, DriverReport } from "./report.ts";
import type { WorkloadState } from "./workload.ts";

/** What a workload is made from. */
export type WorkloadOptions =
  | { kind: "blk"; options: BlkWorkloadOptions }
  | { kind: "net"; options: NetWorkloadOptions }
  | { kind: "loopback"; options: LoopbackWorkloadOptions };

/** The first command. */
export interface OpenCommand {
  /** Shape of the RAM. */
  ram: RamOptions;
  /** Where the RAM lies in this process, bytes. */
  address: number;
  /** Negotiated features. */
  features: bigint;
  /** Eventfds of each queue. */
  queues: { kick: number; call: number }[];
  /** What to do. */
  workload: WorkloadOptions;
  /** A state to go on from. */
  state: WorkerState | undefined;
}

/** Starts making requests. Both limits are optional: without one it goes on until it is told to drain. */
export interface RunCommand {
  /** Stop after so many, counted since the workload began. */
  requests?: number;
  /** Stop after so many milliseconds from now. */
  durationMs?: number;
  /** How long to wait for the last answers then, milliseconds. */
  drainMs: number;
}

/** Where the driver's own writes are recorded; nothing ends it. */
export type LogCommand = { address: number; size: number } | undefined;

/** Makes ready for copying the disk, and records from now on what the workload writes. */
export interface DiskOpenCommand {
  /** Buffers that are wanted at most. */
  buffers: number;
  /** A dirty bitmap of the disk, a bit for each 4096 bytes. */
  dirty: SharedArrayBuffer;
}

/** A request of whoever copies the disk. */
export interface DiskRequest {
  /** VIRTIO_BLK_T_IN, _OUT or _FLUSH. */
  type: number;
  /** First sector. */
  sector: number;
  /** Sectors; 0 for a flush. */
  count: number;
  /** Which buffer. */
  buffer: number;
}

/** All that a driver's worker knows. */
export interface WorkerState {
  /** Per queue: the ring. */
  rings: DriverQueueState[];
  /** Per queue: which slot each chain that is out belongs to: pairs of id and slot. */
  owners: [id: number, slot: number][][];
  /** The workload. */
  workload: WorkloadState;
  /** The counts. */
  counters: DriverCounters;
  /** The latencies. */
  latency: { counts: number[]; max: number };
  /** Faults in words. */
  faults: string[];
  /** The run that was going on, with the time that it has left. */
  run: RunCommand | undefined;
}

/** The worker reports: the run that was asked for is over. */
export interface FinishedEvent {
  /** How it went, with what was lost. */
  finished: DriverReport;
}
