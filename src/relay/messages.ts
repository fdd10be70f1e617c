/**
 * What the main thread of a relay tells its Workers, and what they answer. Plain data.
 *
 * @module
 */
import type { ErrorRecord } from "../errors.ts";
import type { CaptureStart } from "./capture.ts";
import type { CoreChoice } from "./core.ts";
import type { PollChoice } from "./polling.ts";
import type { IotlbEntry } from "../iova/iotlb.ts";
import type { TranslatedRegion } from "../iova/translation.ts";
import type { MappedRange } from "../memory/region.ts";
import type { InflightChains } from "../vring/inflight.ts";

/** One vring as a Worker sees it: sizes and places. */
export interface RingPlace {
  /** Descriptors. */
  num: number;
  /** Ring format. */
  packed: boolean;
  /** EVENT_IDX negotiated on this side. */
  eventIdx: boolean;
  /** INDIRECT_DESC negotiated on this side. */
  indirect: boolean;
  /** IN_ORDER negotiated on this side. */
  inOrder: boolean;
  /** Guest side: guest addresses. Device side: addresses of this process. Bytes. */
  desc: number;
  /** Avail ring or driver event area, same space as `desc`. */
  avail: number;
  /** Used ring or device event area, same space as `desc`. */
  used: number;
  /** Guest side, with an IOMMU: where the parts are in this process, in one piece each. */
  local?: { desc: number; avail: number; used: number };
  /** Guest side, with an IOMMU: what is logged when the ring is written, as GPA and bytes in turn. */
  written?: number[];
  /** Device side, with INDIRECT_DESC: room for one indirect table per descriptor. */
  tables?: IndirectTables;
  /** Device side: a chain that is one indirect table of the guest's is given to the device as it is. */
  passTables?: boolean;
}

/** Room for indirect tables, one after the other. */
export interface IndirectTables {
  /** Address in this process, bytes. */
  address: number;
  /** Where the device finds it, bytes. */
  iova: number;
  /** Descriptors in each table. */
  entries: number;
}

/** Everything a Worker needs to run one queue. Descriptors are numbers that the main thread keeps open meanwhile. */
export interface QueueStart {
  index: number;
  /** `notify`: only kicks and calls go through the Worker. */
  mode: "notify" | "used" | "shadow";
  guest: RingPlace;
  device: RingPlace;
  /** Where the guest's ring goes on: vring base. */
  guestBase: number;
  /** Guest kick; -1 where the driver only polls. */
  kickFd: number;
  /** Guest call; -1 for none. */
  callFd: number;
  deviceKickFd: number;
  deviceCallFd: number;
  /** GPA of the used ring when writes to it are logged, otherwise -1. */
  logUsedGpa: number;
  /** The guest's descriptors name addresses of its IOMMU; the ring's parts are given as guest memory all the same. */
  iommu?: boolean;
  /** Start without taking chains from the guest. */
  paused: boolean;
  /** The queue's part of the in-flight region, bytes of this process, where the front-end has given one. */
  inflight?: { address: number; size: number };
  /** What a relay before this one had in flight: it is offered to the device first. */
  resume?: InflightChains;
  /** Set for the control queue of a network device: see src/relay/control_core.ts. */
  control?: ControlStart;
  /** Set while the frames of a network device's data queue are captured. */
  capture?: CaptureStart;
}

/** A command of the relay's own. */
export interface OwnCommand {
  /** Told back with the answer. */
  id: number;
  /** Class, command and data. */
  bytes: Uint8Array<ArrayBuffer>;
}

/** How a control queue runs. */
export interface ControlStart {
  /** Features negotiated with the guest: what they do not allow is refused. */
  features: bigint;
  /** There is no ring of a guest's: the relay itself drives the queue. */
  guestless: boolean;
  /** What goes to the device as it is, before anything of the guest's; each is told back. */
  first: OwnCommand[];
  /** Has the device answer (a control queue), or only take (frames to be sent)? */
  answers: boolean;
}

/** Sent unasked: the device has answered, or something was refused on its behalf. */
export interface ControlEvent {
  /** Index of the control queue. */
  controlled: number;
  /** Class, command and data. */
  bytes: Uint8Array<ArrayBuffer>;
  /** VIRTIO_NET_OK, VIRTIO_NET_ERR, or {@linkcode UNANSWERED}. */
  ack: number;
  /** The relay's own command: its number. */
  id?: number;
  /** Why it was not given to the device. */
  refused?: string;
}

/** The answer to a command that the ring's end came before. */
export const UNANSWERED = 255;

/** Where a queue stands. */
export interface QueueProgress {
  /** What the device answers to GET_VRING_BASE when it holds no chain that it took: all it took has come back. */
  deviceBase: number;
  /** Chains given to the device's ring and not come back. */
  inflight: number;
  /** Where a successor goes on in the guest's ring if the device took nothing of what is in flight. */
  guestBase: number;
}

/** A command; each is answered with a {@linkcode WorkerReply}. */
export type WorkerCommand =
  /** `moved`: where the device finds guest memory, when that is not everywhere IOVA = GPA. */
  | { type: "memory"; ranges: MappedRange[]; moved: TranslatedRegion[] | undefined }
  | { type: "log"; address: number; size: number }
  | { type: "start"; queue: QueueStart }
  | { type: "lose"; index: number }
  | { type: "renew"; queue: QueueStart }
  | { type: "pause"; index: number; paused: boolean }
  | { type: "poll"; index: number }
  /** `keep`: what the in-flight region says stays as it is. */
  | { type: "stop"; index: number; abandon?: boolean; keep?: boolean }
  | { type: "call"; index: number; fd: number }
  | { type: "logUsed"; index: number; gpa: number }
  | { type: "uses"; gpa: number; size: number }
  /** What is known of the guest's IOMMU: `update` adds, `invalidate` takes back, `forget` takes back everything. */
  | { type: "iotlb"; update?: IotlbEntry; invalidate?: { iova: number; size: number }; forget?: boolean }
  | { type: "usesIova"; iova: number; size: number }
  /** A control queue: commands of the relay's own, each told back. */
  | { type: "inject"; index: number; commands: OwnCommand[] }
  /** Counts the queue if it waits for this address of the guest's IOMMU. */
  | { type: "awaits"; index: number; iova: number }
  | { type: "exit" };

/** The answer: the queue's progress for `poll` and `stop`, a count for `uses`, `usesIova` and `awaits`, nothing otherwise. */
export type WorkerReply = { id: number; progress?: QueueProgress; count?: number; error?: ErrorRecord };

/** Sent unasked: a queue broke a rule and stopped. */
export interface QueueFailure {
  failed: number;
  error: ErrorRecord;
}

/** Sent unasked: a queue runs on another core than it was meant to. */
export interface CoreFallback {
  fellBack: number;
  reason: string;
}

/** Sent unasked: a queue waits for an address that the guest's IOMMU maps, perhaps. */
export interface QueueMiss {
  missed: number;
  iova: number;
  /** One of `ACCESS`. */
  perm: number;
}

/** First message to a Worker. */
export interface WorkerInit {
  /** eventfd that announces a command. */
  controlFd: number;
  /** Int32: commands posted so far. */
  posted: SharedArrayBuffer;
  counters: SharedArrayBuffer;
  /** What runs the data path. */
  core: CoreChoice;
  /** Number of the Worker, for its counters. */
  index: number;
  /** How long it polls before it sleeps. */
  poll: PollChoice;
  /** CPUs that this process may use beyond one for each Worker. */
  spareCpus: number;
  /** CPUs that the Worker's thread is bound to; none: it runs where the kernel puts it. */
  cpus: readonly number[];
}
