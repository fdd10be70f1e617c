/**
 * Schemas of what relays, drivers and migrations report: demo, relay, drive, migrate, bench.
 *
 * @module
 */
import { choice, count, document, flag, type JsonSchema, list, map, nullable, number, object, optional, text } from "./build.ts";

const requests = {
  completed: count(),
  lost: count("Never answered"),
  duplicated: count("Answered more than once"),
  corrupted: count("Wrong data or checksum"),
};
const modes = ["passthrough", "notify", "used", "shadow"];
const layouts = ["split", "packed"];
const spread = object({ median: number(), min: number(), max: number() });
const round = object({ dirty_pages: count(), bytes: count(), ms: number() });

const queue = object({
  index: count(),
  mode: text("passthrough, notify, used, shadow; switching (between two of them), waiting (for a lost device), stopped or failed"),
  core: nullable(text("wasm or js; null where nothing is relayed")),
  guest_ring: choice(layouts),
  device_ring: choice(layouts),
  num: count("Descriptors in the guest's ring"),
  device_num: optional(count("Descriptors in the device's ring")),
  avail_idx: nullable(count("What the relay has taken of the guest's ring")),
  used_idx: nullable(count("What it has given back")),
  start_base: optional(nullable(count("Vring base at which the VMM started the queue here"))),
  last_base: optional(nullable(count("Vring base that the VMM got when it stopped the queue; null while it runs"))),
  inflight: count(),
  kicks: count(),
  calls: count(),
  batches: optional(count("Times that chains were given to the device: one or more together")),
  chains: count(),
  bytes: count(),
  dirty_pages: count(),
  doorbell: optional(flag("The VMM kicks the device by its own doorbell, past the relay")),
  errors: count(),
  redone: optional(count("Requests of a killed relay before this one that were given to the device again")),
  uncaptured: optional(count("Frames that a capture had no room for")),
  frames: optional(
    nullable(object({ frames: count(), bytes: count(), drops: count() }, "As an embedded network device counts them; null for others")),
  ),
});

const mapFigures = { regions: count(), bytes: count(), ms: number() };
const relay = {
  name: text(),
  pid: count(),
  state: text("waiting, waiting-device, connected, running, device-lost or stopping"),
  front_connected: flag("A VMM is there"),
  device_connected: flag("The device is there"),
  device_connections: count("Connections to the device so far"),
  device_process: optional(
    nullable(
      object(
        { command: text(), pid: nullable(count()), starts: count(), last_end: nullable(text("exit code N, or a signal")) },
        "The back-end that the relay starts itself, with --device-exec",
      ),
    ),
  ),
  inflight_region: flag("The VMM keeps a record of what the relay has taken: a relay that is killed may be started again"),
  needs_reset: flag("A queue has failed: the guest must reset the device"),
  mode: choice(["auto", ...modes]),
  front: text("Where the VMM connects"),
  device: text("Device address"),
  uptime_ms: count(),
  wasm_bounds_checks: optional(flag("V8 checks each address of WebAssembly, which makes that relay core slower")),
  offered_features: optional(text("Features that a guest could negotiate, 0x…")),
  queue_num: optional(count("Queues of the device")),
  config: optional(nullable(text("Configuration space in hexadecimal, as the VMM last read it"))),
  pins_memory: optional(nullable(flag("The device pins the guest's memory; null where nobody knows"))),
  maps: object({
    guest: count("Regions of guest memory now"),
    shadow: count("Regions of shadow rings now"),
    waiting: optional(count("Of guest: taken early, and not given by the VMM yet")),
    early: optional(object(mapFigures, "Maps made before the VMM gave the memory: svq relay premap")),
    adopted: optional(count("Regions that the VMM gave and that were found mapped")),
    at_start: optional(object(mapFigures, "Maps made when the VMM gave its memory and no ring ran: inside the gap of a migration")),
    remapped: optional(nullable(count("Maps that a kernel device needed again after a reset; null for others"))),
  }, "Memory maps made at the device"),
  memory: optional(
    list(
      object({ gpa: count(), size: count(), offset: count("In its file"), file: text("device:inode"), file_size: count() }),
      "Guest memory: the layout that svq relay premap takes",
    ),
  ),
  masked: optional(list(object({ feature: text(), reason: text() }), "Features of the device that the guest does not see")),
  iommu: optional(
    nullable(
      object({ entries: count(), misses: count(), updates: count(), invalidations: count() }, "The guest's IOMMU, with --guest-iommu"),
    ),
  ),
  net: optional(
    nullable(
      object({
        control: choice(["guest", "relay"]),
        queue: count(),
        own_address_space: flag("The device finds nothing there but the relay's pages"),
        pairs: nullable(count("Queue pairs in use, as far as it was said")),
        refused: list(text(), "The newest commands that were refused"),
        not_migratable: list(text(), "What was set and cannot be set again elsewhere"),
      }, "The control queue of a network device, and who drives it"),
    ),
  ),
  workers: optional(list(
    object({
      index: count("Queue N belongs to worker N modulo their number"),
      cpus: list(count(), "CPUs that it is bound to; none: any"),
      waits: count("Calls of epoll_wait"),
      sleeps: count("Those that could sleep"),
      polls: count("Rounds of polling"),
      poll_hits: count("Times that polling found work"),
      poll_idle_ms: count("Time spent in looks that found nothing"),
      poll_us: number("How long it looks for more at present before it sleeps"),
      poll_held_off: count("Times that self-tuned polling stopped for a while because it did not pay"),
    }),
    "The threads that run the queues",
  )),
  queues: list(queue),
};

const coalescing = { max_packets: count(), max_usecs: count() };
const netState = {
  mac: optional(text("xx:xx:xx:xx:xx:xx")),
  rx: map(flag("Receive modes that the driver has switched")),
  mac_table: optional(object({ unicast: list(text()), multicast: list(text()) })),
  vlans: list(count()),
  steering: list(map(true, "pairs, rss or hash, in the order in which they were set")),
  guest_offloads: optional(text("0x…")),
  coalescing: object({
    tx: optional(object(coalescing)),
    rx: optional(object(coalescing)),
    queues: list(object({ queue: count(), ...coalescing })),
  }),
  not_migratable: list(text(), "Set by commands that svq does not know"),
};

const gap = object({
  total: number(),
  stop: optional(nullable(number())),
  disk: optional(nullable(number("The last blocks of a disk that was copied"))),
  last_round: optional(nullable(number())),
  state: optional(nullable(number())),
  resume: optional(nullable(number())),
});

/** By document name. */
export const RELAY_SCHEMAS: Readonly<Record<string, JsonSchema>> = {
  "svq.demo/1": document("svq.demo/1", "The main job on embedded parts", {
    outcome: text("ok, or what failed"),
    requests: object(requests),
    rounds: list(round),
    switch_us: number("Longest mode switch"),
    downtime_us: number(),
    memory_identical: flag(),
  }),
  "svq.relay/1": document("svq.relay/1", "State of a running relay", relay),
  "svq.net-state/1": document("svq.net-state/1", "What a driver has set through a network device's control queue", netState),
  "svq.relay-list/1": document("svq.relay-list/1", "Running relays of this user", {
    relays: list(object(relay)),
    dead: optional(list(
      object({ name: text(), code: text("NO_SUCH_RELAY where nobody listens, RELAY_SILENT, or what went wrong"), message: text() }),
      "Control sockets that no relay answers at",
    )),
  }),
  "svq.relay-stop/1": document("svq.relay-stop/1", "Relays that were stopped", { stopped: list(text()) }),
  "svq.relay-premap/1": document("svq.relay-premap/1", "Guest memory that a relay took before its VMM gave it", {
    name: text(),
    pid: nullable(count("The VMM's process, where the memory was found there")),
    waiting: count("Regions that wait for the VMM now"),
    regions: count("Regions taken by this call"),
    dropped: count("Regions let go of"),
    bytes: count("Bytes taken"),
    ms: number("How long it took: what the device's start does not take any more"),
  }),
  "svq.relay-upgrade/1": document("svq.relay-upgrade/1", "A relay that another process goes on with", {
    name: text(),
    pid_before: count("Process that handed over"),
    pid: count("Process that goes on"),
    version_before: text(),
    version: text(),
    stall_ms: count("How long the rings stood still"),
  }),
  "svq.monitor/1": document("svq.monitor/1", "What relays did per second, a document per round", {
    time: text("When, ISO 8601"),
    interval_ms: count("Since the round before; 0 in the first, whose rates are 0"),
    relays: list(object({
      name: text(),
      state: text("As in svq.relay/1"),
      logging: flag("The VMM has the dirty log on"),
      queues: list(object({
        index: count(),
        mode: text("As in svq.relay/1"),
        inflight: count("Now"),
        chains_per_s: count(),
        bytes_per_s: count(),
        kicks_per_s: count(),
        calls_per_s: count(),
        dirty_pages_per_s: count(),
      })),
    })),
    events: list(object({ relay: text(), queue: nullable(count()), text: text() }), "What happened since the round before"),
  }),
  "svq.trace.message/1": document("svq.trace.message/1", "A vhost-user message of a relay, one line each", {
    seq: count("Number of the message, from 1"),
    time_us: count("Microseconds since 1970"),
    side: choice(["front", "device"], "Which connection of the relay"),
    from: choice(["vmm", "relay", "device"], "Who sent it"),
    channel: choice(["front-end", "back-end"], "Whose requests travel there"),
    request: text("Name of the request"),
    reply: flag("It is the answer"),
    need_reply: flag("An answer was asked for"),
    fds: count("Descriptors that came along"),
    fields: map(true, "What it says, by request"),
  }),
  "svq.drive/1": document("svq.drive/1", "Result of a checked workload", {
    device: text(),
    duration_ms: number(),
    requests: object({
      ...requests,
      out_of_order: count("Reordered where the device promised order"),
      submitted: optional(count("Requests made")),
    }),
    missed_calls: optional(count("Answers that no call announced")),
    iops: number(),
    bytes: optional(count("Payload read and written")),
    verified: optional(count("Pieces of data that were compared: sectors, or words of a loopback")),
    longest_stall_ms: optional(number("Longest time with requests out and no answer, without pauses")),
    faults: optional(list(text(), "The first few faults")),
    net: optional(
      object({
        sent: count("Frames sent"),
        received: count("Frames received, each once"),
        missing: count("Frames that did not come"),
        reordered: optional(count("Frames that came after a later one")),
        duplicated: optional(count("Frames that came more than once")),
        longest_gap_ms: number("Longest time between two frames of one stream"),
      }),
    ),
    latency_us: object({ p50: nullable(number()), p99: nullable(number()), p999: nullable(number()), max: nullable(number()) }),
  }),
  "svq.migrate/1": document("svq.migrate/1", "Result of a migration", {
    outcome: text("completed, cancelled, aborted or failed; ready or not-ready with --dry-run"),
    phase: text("The phase that it ended in"),
    rounds: list(round),
    bytes: count(),
    downtime_us: nullable(gap),
    requests: optional(nullable(object(requests))),
    memory_identical: optional(nullable(flag())),
    disk: optional(nullable(object({
      shared: flag("Both sides show the same disk: nothing was copied"),
      size_bytes: count(),
      rounds: list(
        object({ blocks: count("Of 4096 bytes"), zero_blocks: count("Of these, blocks of zeros"), bytes: count(), ms: number() }),
        "Rounds of the disk, the one while the guest stood still included",
      ),
    }))),
    throttle_percent: optional(count("How much of its time the guest was held still at most, because it wrote too fast")),
    total_ms: optional(nullable(number("From the start of copying to the end"))),
    setup_ms: optional(nullable(number())),
    positions: optional(list(
      object({
        source: text("Relay"),
        destination: text("Relay"),
        index: count("Queue"),
        source_base: nullable(count("Where the source stopped")),
        destination_base: nullable(count("Where the destination went on")),
        agree: nullable(flag("null while the destination is paused")),
      }),
      "svq migrate vm: vring bases of both sides",
    )),
    checks: optional(list(
      object({ code: text(), ok: flag(), message: text(), hint: optional(text()) }),
      "svq migrate vm: what was looked at before the start",
    )),
    error: optional(nullable(object({ code: text(), message: text(), hint: optional(text()) }))),
  }),
  "svq.bench.migrate/1": document("svq.bench.migrate/1", "How fast memory is streamed, and how long a guest stands still", {
    machine: map(true, "CPU, kernel, runtime"),
    streams: list(object({
      contents: choice(["random", "half-zero", "zero"]),
      sink: choice(["discard", "receiver"]),
      memory_bytes: count("Guest memory"),
      stream_bytes: count("What of it went over the stream"),
      ms: number("The fastest run"),
      all_ms: list(number(), "All runs"),
      gb_per_s: number("Guest memory per second, in 10^9 bytes"),
    })),
    downtime_us: nullable(object({
      migrations: count(),
      memory_bytes: count("Of the guest"),
      p50: count(),
      p90: count(),
      p99: count(),
      max: count(),
    })),
  }),
  "svq.bench.relay/1": document("svq.bench.relay/1", "What a relay costs a guest, against the same device without one", {
    machine: map(true, "CPU, kernel, runtime"),
    load: object({
      device: choice(["sim", "vhost-user"], "How the device is reached"),
      latency_us: number("Time that the device takes for each request"),
      queues: count(),
      depth: count("Requests in flight in each queue"),
      request_bytes: count(),
      workers: count(),
      poll_us: nullable(number("null: as long as it pays")),
      cpus: list(count()),
      core: choice(["auto", "wasm", "js"]),
    }),
    results: list(object({
      contender: choice(["direct", ...modes]),
      iops: spread,
      latency_us: object({ p50: spread, p99: spread, p999: spread }, "Exact to 1 part in 16"),
      cpu_us_per_request: spread,
      ratio: object({ iops: spread, p99: spread, cpu: spread }, "To direct, of the same repetition"),
      syscalls_per_batch: nullable(spread),
      sleeps_per_batch: nullable(spread),
      chains_per_batch: nullable(spread),
    })),
    switches: list(object({
      memory_bytes: count("Of the guest"),
      to: choice(["shadow", "passthrough"]),
      count: count(),
      drain_us: spread,
      switch_us: object({ median: number(), min: number(), max: number(), p99: number() }, "Without the drain"),
    })),
    idle: nullable(object({ queues: count(), bytes_per_queue: count("In mode shadow") })),
  }),
  "svq.bench.ring/1": document("svq.bench.ring/1", "Cost per chain of the relay cores", {
    machine: map(true, "CPU, kernel, runtime"),
    results: list(object({
      core: choice(["wasm", "js", "c", "bound", "syscalls"]),
      mode: text(),
      guest_ring: choice(layouts),
      device_ring: choice(layouts),
      workload: choice(["tx1", "2desc", "rx1"]),
      batch: count(),
      ns_per_chain: number("Median"),
      min: number(),
      max: number(),
    })),
  }),
};
