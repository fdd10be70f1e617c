/**
 * The main job on embedded parts, as `svq demo` shows it: a guest under load on a disk that cannot be migrated; its ring goes
 * through the shadow ring; memory, ring and requests move to a second process; the guest goes on there.
 *
 * @module
 */
import { openDevice } from "../devices/open.ts";
import { type ErrorRecord, EXIT, SvqError } from "../errors.ts";
import { connectUnix, ERRNO, SysError, type UnixStream } from "../ffi/mod.ts";
import { describeWrong, downtimeParts, isClean } from "../migration/document.ts";
import { Guest, type GuestLog } from "../migration/guest.ts";
import { type MigrationReport, reportOf } from "../migration/handshake.ts";
import { cancelled, DEFAULT_SOURCE_OPTIONS, Migration, type MigrationEvent, type MigrationResult } from "../migration/source.ts";
import { type HarvestFilter, SourceGuest } from "../migration/source_guest.ts";
import { DEFAULT_RELAY_CONFIG } from "../relay/relay.ts";
import { formatCount, formatDuration, formatSize } from "../units.ts";
import { formatDeviceAddress } from "../vhost/address.ts";

const DISK_BYTES = 64 << 20;
const REGION_BYTES = 16 << 20;
const START_MS = 20_000;
const DOWNTIME_LIMIT_MS = 30;
const MAX_ITERATIONS = 8;

/** What a demo does. */
export interface DemoOptions {
  /** Bytes of guest RAM. */
  ramSize: number;
  /** Requests in flight. */
  depth: number;
  /** How long the workload runs before the migration, and after it, milliseconds. */
  loadMs: number;
  /** Starts this program with the given words, its stdin piped: the destination ends when that is closed. */
  start: (words: string[]) => Deno.ChildProcess;
  /** Called as things happen. */
  onStep: (step: DemoStep) => void;
  /** Log lines. */
  log: GuestLog;
  /** Ends it. */
  signal?: AbortSignal;
  /** For tests: breaks the dirty log. */
  filter?: HarvestFilter;
}

/** A line of the timeline. */
export interface DemoStep {
  /** Since the beginning, milliseconds. */
  atMs: number;
  /** One word. */
  step: string;
  /** What happened and why. */
  text: string;
}

/** What came of it. */
export interface DemoResult {
  /** `ok`, or what failed: `aborted`, `requests`, `memory`. */
  outcome: "ok" | "aborted" | "requests" | "memory";
  /** The guest's requests, on both sides. */
  requests: MigrationReport;
  /** The migration. */
  migration: MigrationResult;
  /** Longest time from stopping the ring until it ran in its new mode, microseconds, and its two parts. */
  switch: { total: number; drain: number; rings: number };
  /** The timeline. */
  timeline: DemoStep[];
  /** Why it failed. */
  error: ErrorRecord | null;
}

/** Runs the demo. Everything that it made is gone when it resolves or rejects. @throws SvqError INTERRUPTED, and of starting */
export async function runDemo(options: DemoOptions): Promise<DemoResult> {
  const dir = await Deno.makeTempDir({ prefix: "svq-demo-" });
  try {
    return await new Demo(options, dir).run();
  } finally {
    await Deno.remove(dir, { recursive: true });
  }
}

class Demo {
  readonly #options: DemoOptions;
  readonly #disk: string;
  readonly #socket: string;
  readonly #begun = performance.now();
  readonly #timeline: DemoStep[] = [];
  #ended: Deno.CommandStatus | undefined;
  #estimateMs = Infinity;

  constructor(options: DemoOptions, dir: string) {
    this.#options = options;
    // A little latency stands for real hardware; the jitter has requests overtake each other.
    const times = { latency: 500_000, jitter: 500_000 };
    this.#disk = formatDeviceAddress({ kind: "sim", device: "blk", file: `${dir}/disk.img`, size: DISK_BYTES, ...times });
    this.#socket = `${dir}/migration.sock`;
  }

  #step(step: string, text: string): void {
    const line = { atMs: Math.round(performance.now() - this.#begun), step, text };
    this.#timeline.push(line);
    this.#options.onStep(line);
  }

  async run(): Promise<DemoResult> {
    const child = this.#options.start(["migrate", "listen", `unix:${this.#socket}`, "--device", this.#disk, "--until-stdin-closes", "-q"]);
    const ended = child.status.then((status) => this.#ended = status);
    try {
      return await this.#migrate();
    } finally {
      await child.stdin.close().catch(() => {});
      const late = setTimeout(() => child.kill("SIGKILL"), 5000);
      await ended;
      clearTimeout(late);
    }
  }

  async #migrate(): Promise<DemoResult> {
    const { ramSize, depth, log } = this.#options;
    const config = { ...DEFAULT_RELAY_CONFIG };
    await using guest = await Guest.open(await openDevice(this.#disk), config, { ramSize, depth, regionSize: REGION_BYTES }, log);
    this.#step(
      "guest",
      `A guest starts: ${formatSize(ramSize)} of memory and a disk whose device can neither log what it writes nor hand itself over`,
    );
    guest.driver.run({}).catch(() => {});
    await this.#load(guest);
    config.mode = "shadow";
    await guest.relay.applyMode();
    const { total, drain, rings } = switchTimes(guest);
    this.#step(
      "shadow",
      `Under load the device gets a ring of the relay's own, in ${formatDuration(total * 1000)} (drain ${formatDuration(drain * 1000)}, ` +
        `new ring ${formatDuration(rings * 1000)}): now the relay sees every page that the device writes`,
    );
    using source = new SourceGuest(guest.driver, guest.relay);
    source.filter = this.#options.filter;
    using migration = new Migration(source, {
      ...DEFAULT_SOURCE_OPTIONS,
      connect: () => this.#connect(),
      downtimeLimitMs: DOWNTIME_LIMIT_MS,
      maxIterations: MAX_ITERATIONS,
      run: () => ({ durationMs: this.#options.loadMs, drainMs: 10_000 }),
      onEvent: (event) => this.#tell(event),
    });
    const cancel = () => {
      migration.cancel(this.#options.signal?.reason ?? cancelled());
      migration.unfollow();
    };
    this.#options.signal?.addEventListener("abort", cancel, { once: true });
    try {
      return await this.#finish(guest, migration, await migration.run());
    } finally {
      this.#options.signal?.removeEventListener("abort", cancel);
    }
  }

  async #load(guest: Guest): Promise<void> {
    this.#step("passthrough", "Its driver keeps the disk busy. The relay stands aside: guest and device share one ring, at no cost");
    await this.#sleep(this.#options.loadMs);
    const { completed, iops } = await guest.driver.report();
    this.#step("", `${formatCount(completed)} requests so far, ${formatCount(iops)} per second; every sector carries a checksum`);
  }

  async #sleep(ms: number): Promise<void> {
    const { signal } = this.#options;
    await new Promise<void>((resolve) => {
      const timer = setTimeout(done, ms);
      function done() {
        clearTimeout(timer);
        signal?.removeEventListener("abort", done);
        resolve();
      }
      if (signal?.aborted) done();
      else signal?.addEventListener("abort", done);
    });
    signal?.throwIfAborted();
  }

  // The second process may still be starting.
  async #connect(): Promise<UnixStream> {
    const deadline = performance.now() + START_MS;
    for (;;) {
      try {
        return connectUnix(this.#socket);
      } catch (error) {
        const waiting = error instanceof SysError && (error.errno === ERRNO.ENOENT || error.errno === ERRNO.ECONNREFUSED);
        if (!waiting || this.#ended !== undefined || performance.now() > deadline) {
          throw new SvqError("NO_DESTINATION", "The second process, which is the destination, did not start", {
            exitCode: EXIT.migrationAborted,
            cause: error,
          });
        }
      }
      await this.#sleep(20);
    }
  }

  #tell(event: MigrationEvent): void {
    if (event.kind === "round") {
      this.#estimateMs = event.estimateMs;
      const { round, pages, zeroPages, bytes, ms } = event.round;
      const what = round === 1 ? "all memory" : "what was written meanwhile";
      const zero = zeroPages === 0 ? "" : `, ${formatCount(zeroPages)} of them zero`;
      const left = `${formatCount(event.dirtyPages)} pages dirty again`;
      this.#step(
        `round ${round}`,
        `Sent ${what}: ${formatCount(pages)} pages${zero}, ${formatSize(bytes)} in ${formatDuration(ms * 1e6)}; ${left}`,
      );
      return;
    }
    if (event.kind !== "phase") return;
    if (event.phase === "log") {
      this.#step("migrate", "The destination, a second process with a device of its own, agrees. The dirty log is turned on");
    }
    if (event.phase === "stop") {
      const why = this.#estimateMs <= DOWNTIME_LIMIT_MS
        ? "Little enough is left"
        : "The guest writes as fast as memory is sent, so that is enough";
      this.#step("stop", `${why}: the guest is stopped, the device answers its open requests and gives its ring back`);
    }
    if (event.phase === "state") {
      this.#step("state", "Last pages, ring positions and open requests are over; both sides compare all memory");
    }
    if (event.phase === "commit") {
      this.#step("hand-over", "Memory is identical. The source lets go: from here on the guest is the destination's");
    }
  }

  async #finish(guest: Guest, migration: Migration, result: MigrationResult): Promise<DemoResult> {
    const times = switchTimes(guest);
    if (result.outcome === "completed") {
      const { downtimeUs } = result;
      const us = (value: number) => formatDuration(value * 1000);
      const parts = downtimeParts(downtimeUs!).map(([name, value]) => `${name} ${us(value)}`).join(", ");
      this.#step("resume", `It runs there, on a second device over the same disk. It stood still for ${us(downtimeUs!.total)}: ${parts}`);
      await guest.close();
      const report = await migration.follow();
      this.#options.signal?.throwIfAborted();
      if (report === undefined) {
        throw new SvqError("DESTINATION_LOST", "The destination ended early", { exitCode: EXIT.failedAfterSwitchover });
      }
      return this.#judge(report, result, times);
    }
    if (result.outcome === "cancelled") this.#options.signal?.throwIfAborted();
    this.#step("undo", `${result.error?.message ?? "It failed"}. Nothing is lost: the guest goes on at the source`);
    await this.#sleep(this.#options.loadMs);
    return this.#judge(reportOf(await guest.driver.stop(10_000)), result, times);
  }

  #judge(requests: MigrationReport, migration: MigrationResult, times: DemoResult["switch"]): DemoResult {
    const clean = isClean(requests);
    const counts = clean ? "none lost, duplicated or corrupted" : describeWrong(requests) || requests.faults[0]!;
    this.#step(
      "verify",
      `${formatCount(requests.completed)} requests completed in all, ${counts}; ${formatCount(requests.verified)} sectors compared`,
    );
    const outcome = !clean
      ? "requests"
      : migration.memoryIdentical === false
      ? "memory"
      : migration.outcome !== "completed"
      ? "aborted"
      : "ok";
    return { outcome, requests, migration, switch: times, timeline: this.#timeline, error: migration.error };
  }
}

function switchTimes(guest: Guest): DemoResult["switch"] {
  const times = guest.relay.queues.map((queue) => queue.times);
  const longest = times.sort((a, b) => b.longest_stall_us - a.longest_stall_us)[0];
  if (longest === undefined) return { total: 0, drain: 0, rings: 0 };
  return { total: longest.drain_us + longest.switch_us, drain: longest.drain_us, rings: longest.switch_us };
}
