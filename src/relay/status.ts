/**
 * The document `svq.relay/1`: what a relay does now.
 *
 * @module
 */
import type { ErrorRecord } from "../errors.ts";
import { CORES, COUNTER } from "./counters.ts";
import type { DeviceProcessStatus } from "./device_process.ts";
import type { IommuStatus } from "./guest_iommu.ts";
import type { Relay, RelayMode } from "./relay.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import type { MapFigures } from "./placed_memory.ts";
import type { WorkerLoad } from "./worker_load.ts";
import { isRelayed } from "./queue_steps.ts";
import type { QueueState, RelayQueue, SwitchTimes } from "./relay_queue.ts";

/** Frames of one queue, as a network device counts them. */
export interface FrameCounts {
  /** Frames that came through or went out. */
  frames: number;
  /** Bytes of those, without the packet header. */
  bytes: number;
  /** Frames that the device dropped. */
  drops: number;
}

/** One queue in {@linkcode RelayStatus}. */
export interface QueueStatus {
  /** Which queue. */
  index: number;
  /** What it does. */
  mode: QueueState | "switching";
  /** Which relay core runs it; null in passthrough, where none does. */
  core: "wasm" | "js" | null;
  /** Format of the guest's ring. */
  guest_ring: "split" | "packed";
  /** Format of the device's ring. */
  device_ring: "split" | "packed";
  /** Descriptors in the guest's ring. */
  num: number;
  /** Descriptors in the device's ring: another number in mode shadow only. */
  device_num: number;
  /** Avail position in the guest's ring. */
  avail_idx: number;
  /** Used position in the guest's ring. */
  used_idx: number;
  /** The vring base that the front-end set last, null before it has: where this side took the queue over. */
  start_base: number | null;
  /** The vring base that the front-end got when it stopped the ring, null while it runs: where another side goes on. */
  last_base: number | null;
  /** Chains made available and not used. */
  inflight: number;
  /** Kicks of the guest that the relay took. */
  kicks: number;
  /** Calls that the relay gave the guest. */
  calls: number;
  /** Times that chains were given to the device: one or more together. */
  batches: number;
  /** Chains relayed. */
  chains: number;
  /** Bytes in them. */
  bytes: number;
  /** Pages marked dirty, each time anew. */
  dirty_pages: number;
  /** The VMM kicks the device by its own doorbell, past the relay. */
  doorbell: boolean;
  /** Errors that stopped the queue. */
  errors: number;
  /** Times that the device's ring was full. */
  full: number;
  /** Requests that a relay before this one had in hand, and that were given to the device again. */
  redone: number;
  /** Frames that a capture had no room for. */
  uncaptured: number;
  /** What an embedded network device says of the queue; null for other devices. The relay itself never drops a frame. */
  frames: FrameCounts | null;
  /** Cost of switching. */
  switches: SwitchTimes;
  /** Why the queue failed. */
  error: ErrorRecord | null;
}

/** The control queue of a network device. */
export interface NetStatus {
  /** Who drives it: the guest, or the relay, since the VMM keeps it to itself. */
  control: "guest" | "relay";
  /** Its index. */
  queue: number;
  /** In an address space of its own, where the device finds nothing but the relay's pages. */
  own_address_space: boolean;
  /** Queue pairs in use, as far as it was said. */
  pairs: number | null;
  /** The newest commands that were refused, with the reason. */
  refused: readonly string[];
  /** What the guest has set by commands that cannot be set again elsewhere. */
  not_migratable: readonly string[];
}

/** The control queue of a relay's device. */
export function netStatus({ net }: Relay): NetStatus | null {
  if (net.source === undefined) return null;
  const own_address_space = net.isolated;
  return {
    control: net.source,
    queue: net.index,
    own_address_space,
    pairs: net.pairs ?? null,
    refused: net.refusals,
    not_migratable: net.notMigratable,
  };
}

/** Maps of memory at the device. */
export interface MapsStatus {
  /** Regions of guest memory now. */
  guest: number;
  /** Regions of shadow rings now. */
  shadow: number;
  /** Of `guest`: those that were taken early, and that the VMM has not given yet. */
  waiting: number;
  /** Maps made early (`svq relay premap`), of this front-end. */
  early: MapFigures;
  /** Regions that the VMM gave and that were found mapped. */
  adopted: number;
  /** Maps made when the VMM gave its memory and no ring ran: inside the gap, at the destination of a migration. */
  at_start: MapFigures;
  /** Maps that a kernel device needed again because a reset had dropped them; null for other devices. */
  remapped: number | null;
}

/** A region of guest memory. */
export interface MemoryStatus {
  /** Guest-physical address. */
  gpa: number;
  /** Bytes. */
  size: number;
  /** Where it starts in its file. */
  offset: number;
  /** Which file: `device:inode`. */
  file: string;
  /** Bytes in that file. */
  file_size: number;
}

/** The maps of a relay; all 0 without one. */
export function mapsStatus(relay: Relay | undefined, device: VhostBackend | undefined): MapsStatus {
  const rounded = ({ regions, bytes, ms }: MapFigures) => ({ regions, bytes, ms: Math.round(ms * 100) / 100 });
  const none = { regions: 0, bytes: 0, ms: 0 };
  return {
    guest: relay?.memory.regions.length ?? 0,
    shadow: relay?.arena === undefined ? 0 : 1,
    waiting: relay?.placed.waiting.length ?? 0,
    early: rounded(relay?.placed.early ?? none),
    adopted: relay?.placed.adopted ?? 0,
    at_start: rounded(relay?.placed.atStart ?? none),
    remapped: device?.mapCounts?.().remapped ?? null,
  };
}

/** Guest memory of a relay. */
export function memoryStatus(relay: Relay | undefined): MemoryStatus[] {
  return (relay?.memory.regions ?? []).map(({ gpa, size, fdOffset, fd }) => {
    const info = Deno.statSync(`/proc/self/fd/${fd}`);
    return { gpa, size, offset: fdOffset, file: `${info.dev}:${info.ino}`, file_size: info.size };
  });
}

/** What is the same for all shapes of status. */
export interface RelayStatus {
  /** `svq.relay/1`. */
  schema: "svq.relay/1";
  /** Name of the relay. */
  name: string;
  /** Process id. */
  pid: number;
  /**
   * `waiting` (for a front-end), `waiting-device` (which connects to us), `connected`, `running`, `device-lost` (the guest's
   * requests wait) or `stopping`.
   */
  state: string;
  /** Mode asked for. */
  mode: RelayMode;
  /** Stays in shadow mode. */
  force_shadow: boolean;
  /** The VMM keeps a region in which the relay records what it has taken: with shadow rings it may be killed and started again. */
  inflight_region: boolean;
  /** Where the front-end connects. */
  front: string;
  /** The device's address. */
  device: string;
  /** Is a front-end there? */
  front_connected: boolean;
  /** Is the device there? */
  device_connected: boolean;
  /** Connections to the device so far. */
  device_connections: number;
  /** The device's back-end, where the relay starts it itself (`--device-exec`). */
  device_process: DeviceProcessStatus | null;
  /** A queue has failed: the guest must reset the device. */
  needs_reset: boolean;
  /** Since the relay started. */
  uptime_ms: number;
  /** The VMM has the dirty log on. */
  logging: boolean;
  /** All guest memory counts as dirty because a switch takes long. */
  marking_all: boolean;
  /** V8 checks each address of WebAssembly, which makes that relay core slower: off as svq starts itself. */
  wasm_bounds_checks: boolean;
  /** Negotiated features, `0x…`. */
  features: string;
  /** Features that a guest could negotiate, `0x…`. */
  offered_features: string;
  /** Queues of the device. */
  queue_num: number;
  /** The device's configuration space in hexadecimal, as the VMM last read it from its start; null before. */
  config: string | null;
  /** Features of the device that the guest does not see, and why. */
  masked_features: string[];
  /** The same with the reason of each. */
  masked: { feature: string; reason: string }[];
  /** The guest's IOMMU as far as the relay knows it; null where none is relayed. */
  iommu: IommuStatus | null;
  /** Protocol features of a vhost-user device that a VMM does not see. `svq probe` says why. */
  masked_protocol_features: string[];
  /** Memory regions given to the device. */
  maps: MapsStatus;
  /** Guest memory, by address: the layout that `svq relay premap --like` takes to another relay. */
  memory: MemoryStatus[];
  /** The device pins the guest's memory; null where nobody knows. */
  pins_memory: boolean | null;
  /** The control queue of a network device; null where none is in use. */
  net: NetStatus | null;
  /** The threads that run the queues. */
  workers: WorkerLoad[];
  /** All queues that the front-end has set up. */
  queues: QueueStatus[];
  /** Why the device is gone. */
  error: ErrorRecord | null;
}

function passthroughPositions(relay: Relay, queue: RelayQueue): { avail: number; used: number } {
  const { avail, used } = queue.addresses!;
  const word = (gpa: number) => Atomics.load(new Uint16Array(relay.memory.buffer(gpa, 4)), 1);
  return { avail: word(avail), used: word(used) };
}

/**
 * The state of one queue.
 *
 * @param frames what the device itself counts, by queue
 */
export function queueStatus(relay: Relay, queue: RelayQueue, frames?: readonly FrameCounts[]): QueueStatus {
  const counters = relay.counters.of(queue.index);
  const of = (name: keyof typeof COUNTER) => counters[COUNTER[name]]!;
  const format = (relay.features & 1n << 34n) !== 0n ? "packed" : "split";
  let avail = of("availIdx");
  let used = of("usedIdx");
  let inflight = of("inflight");
  if ((queue.mode === "passthrough" || queue.mode === "notify") && format === "split") {
    try {
      ({ avail, used } = passthroughPositions(relay, queue));
      inflight = (avail - used) & 0xffff;
    } catch { /* memory was unplugged under the ring */ }
  } else if (!queue.running) {
    avail = queue.base & 0xffff;
    used = queue.base & 0xffff;
    inflight = 0;
  }
  return {
    index: queue.index,
    mode: queue.shownState,
    core: queue.mode !== undefined && isRelayed(queue.mode) ? CORES[of("core")] ?? null : null,
    guest_ring: format,
    device_ring: relay.devicePacked ? "packed" : "split",
    num: queue.num,
    device_num: relay.deviceNum(queue),
    avail_idx: avail,
    used_idx: used,
    start_base: queue.startBase ?? null,
    last_base: queue.lastBase ?? null,
    inflight,
    kicks: of("kicks"),
    calls: of("calls"),
    batches: of("batches"),
    chains: of("chains"),
    bytes: of("bytes"),
    dirty_pages: of("dirtyPages"),
    doorbell: relay.doorbells.includes(queue.index),
    errors: of("errors"),
    full: of("full"),
    redone: queue.redone,
    uncaptured: of("uncaptured"),
    frames: frames?.[queue.index] ?? null,
    switches: { ...queue.times },
    error: queue.error ?? null,
  };
}
