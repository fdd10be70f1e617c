/**
 * One contender of `svq bench relay`: an embedded driver on a device, directly or through a relay in one mode. All of it is
 * real: eventfds, Workers, and a driver that checks every answer.
 *
 * @module
 */
import { SimDevice } from "../devices/sim_device.ts";
import { EmbeddedDriver } from "../drivers/embedded_driver.ts";
import { Histogram } from "../drivers/report.ts";
import { SvqError } from "../errors.ts";
import { processCpuNs, unixPair } from "../ffi/mod.ts";
import { COUNTER } from "../relay/counters.ts";
import type { RunningMode } from "../relay/queue_steps.ts";
import { DEFAULT_RELAY_CONFIG, Relay, type RelayConfig } from "../relay/relay.ts";
import type { VhostBackend } from "../vhost/backend.ts";
import { VhostUserFrontEnd } from "../vhost_user/front_end.ts";
import { BackendServer } from "../vhost_user/server.ts";

/** Who takes part: the driver on the device, or through a relay in one mode. */
export const RELAY_CONTENDERS = ["direct", "passthrough", "notify", "used", "shadow"] as const;
/** One of {@linkcode RELAY_CONTENDERS}. */
export type RelayContender = typeof RELAY_CONTENDERS[number];

/** How the device is reached: in this process, or over a vhost-user socket to it. */
export type DeviceLink = "sim" | "vhost-user";

/** What is the same for all contenders. */
export interface RelayLoad {
  /** How the device is reached. */
  link: DeviceLink;
  /** Time that the device takes for each request, us; 0: as fast as its CPU can. */
  latencyUs: number;
  /** Queues. */
  queues: number;
  /** Requests in flight in each. */
  depth: number;
  /** Bytes of a request. */
  requestSize: number;
  /** Bytes of guest memory. */
  memoryBytes: number;
  /** What else the relays are told. */
  config: Partial<RelayConfig>;
}

/** One measurement. */
export interface RelaySample {
  /** Completed requests per second. */
  iops: number;
  /** Half of the requests took no longer, us. */
  p50: number;
  /** 99 of 100. */
  p99: number;
  /** 999 of 1000. */
  p999: number;
  /** Processor time of driver, relay and device together for a request, us. */
  cpuUs: number;
  /** System calls of the relay's Workers for each batch that they forwarded; null where none forwards. */
  syscallsPerBatch: number | null;
  /** Chains in such a batch. */
  chainsPerBatch: number | null;
  /** Sleeps of the relay's Workers for each batch. */
  sleepsPerBatch: number | null;
}

interface Totals {
  completed: number;
  ranMs: number;
  cpuNs: number;
  syscalls: number;
  sleeps: number;
  batches: number;
  chains: number;
  latencies: number[];
}

const DISK_BYTES = 32 << 20;
const NO_LOG = () => {};

/** A running contender. */
export class RelayRig implements AsyncDisposable {
  readonly #stack: AsyncDisposableStack;

  private constructor(
    /** The guest. */
    readonly driver: EmbeddedDriver,
    /** What it goes through, if anything. */
    readonly relay: Relay | undefined,
    readonly config: RelayConfig,
    stack: AsyncDisposableStack,
  ) {
    this.#stack = stack;
  }

  /** Starts device, relay and driver; nothing is driven yet. */
  static async open(contender: RelayContender, load: RelayLoad): Promise<RelayRig> {
    await using stack = new AsyncDisposableStack();
    const { latencyUs, queues, depth, requestSize, memoryBytes } = load;
    const sim = stack.use(await SimDevice.open({ kind: "blk", size: DISK_BYTES, latencyUs, queues }));
    const device = load.link === "sim" ? sim : await overSocket(sim, stack);
    const config: RelayConfig = { ...DEFAULT_RELAY_CONFIG, ...load.config, mode: contender === "direct" ? "passthrough" : contender };
    let relay: Relay | undefined;
    if (contender !== "direct") {
      const report = ({ message }: { message: string }) => {
        throw new SvqError("BENCH_FAILED", `The relay in mode ${contender} failed: ${message}`);
      };
      relay = stack.use(new Relay(device, config, { log: NO_LOG, error: report }));
    }
    const options = { workload: "blk", queues, depth, requestSize, ramSize: memoryBytes, regionSize: DISK_BYTES, num: 256 } as const;
    const driver = stack.use(await EmbeddedDriver.open(relay ?? device, options));
    return new RelayRig(driver, relay, config, stack.move());
  }

  /** Brings all queues of the relay, or one of them, into a mode while the driver goes on. */
  async changeMode(mode: RunningMode, queue?: number): Promise<void> {
    if (queue === undefined) this.config.mode = mode;
    else this.config.queueModes = new Map([[queue, mode]]);
    await this.relay!.applyMode();
  }

  async #totals(): Promise<Totals> {
    const { completed, durationMs } = await this.driver.report();
    const { counts } = await this.driver.latencies();
    const totals = {
      completed,
      ranMs: durationMs,
      cpuNs: processCpuNs(),
      syscalls: 0,
      sleeps: 0,
      batches: 0,
      chains: 0,
      latencies: counts,
    };
    if (this.relay === undefined) return totals;
    for (const { waits, sleeps } of this.relay.loads) {
      totals.syscalls += waits;
      totals.sleeps += sleeps;
    }
    for (const { index } of this.relay.queues) {
      const slots = this.relay.counters.of(index);
      totals.syscalls += slots[COUNTER.calls]! + slots[COUNTER.deviceKicks]!;
      totals.batches += slots[COUNTER.batches]!;
      totals.chains += slots[COUNTER.chains]!;
    }
    return totals;
  }

  /** Drives for `ms` milliseconds. @throws SvqError BENCH_FAILED when a request was lost, duplicated or answered wrongly */
  async measure(ms: number): Promise<RelaySample> {
    const before = await this.#totals();
    const { lost, duplicated, corrupted, missedCalls, faults } = await this.driver.run({ durationMs: ms });
    if (lost + duplicated + corrupted + missedCalls > 0) {
      throw new SvqError(
        "BENCH_FAILED",
        `${lost} requests were lost, ${duplicated} duplicated, ${corrupted} corrupted, ${missedCalls} calls missed: ${faults[0] ?? ""}`,
      );
    }
    const after = await this.#totals();
    const completed = after.completed - before.completed;
    if (completed === 0) throw new SvqError("BENCH_FAILED", `No request was completed in ${ms} ms`, { hint: "measure for longer: --time" });
    const batches = after.batches - before.batches;
    const perBatch = (value: number) => batches === 0 ? null : value / batches;
    // Only the difference is of this run; its greatest value is not known better than its bucket.
    const latency = new Histogram({ counts: after.latencies.map((count, i) => count - (before.latencies[i] ?? 0)), max: Infinity });
    return {
      iops: completed / (after.ranMs - before.ranMs) * 1000,
      p50: latency.percentile(0.5),
      p99: latency.percentile(0.99),
      p999: latency.percentile(0.999),
      cpuUs: (after.cpuNs - before.cpuNs) / completed / 1000,
      syscallsPerBatch: perBatch(after.syscalls - before.syscalls),
      chainsPerBatch: perBatch(after.chains - before.chains),
      sleepsPerBatch: perBatch(after.sleeps - before.sleeps),
    };
  }

  /** Closes all of it. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.#stack.disposeAsync();
  }
}

async function overSocket(sim: VhostBackend, stack: AsyncDisposableStack): Promise<VhostBackend> {
  const [a, b] = unixPair();
  const server = new BackendServer(a, sim);
  const ended = server.run();
  stack.defer(async () => {
    server.close();
    await ended;
  });
  const front = await VhostUserFrontEnd.fromStream(b, { timeoutMs: 30_000 });
  stack.defer(() => front.close());
  return front;
}
