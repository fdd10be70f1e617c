/** `svq migrate run`. @module */
import { buildCommand } from "@stricli/core";
import { openDevice } from "../../devices/open.ts";
import { EXIT, fromErrorRecord, SvqError } from "../../errors.ts";
import { NO_CONVERGENCE, type OnNoConvergence } from "../../migration/convergence.ts";
import { describeThrottle, describeWrong, downtimeParts, isClean, migrateDocument, progressDocument } from "../../migration/document.ts";
import { COPY_DISK, type CopyDisk, type DiskResult } from "../../migration/disk_copy.ts";
import { Guest } from "../../migration/guest.ts";
import { type MigrationReport, reportOf } from "../../migration/handshake.ts";
import { DEFAULT_SOURCE_OPTIONS, Migration, type MigrationEvent, type MigrationResult } from "../../migration/source.ts";
import { SourceGuest } from "../../migration/source_guest.ts";
import type { TlsClientOptions } from "../../migration/tls.ts";
import {
  checkLink,
  connectMigration,
  formatMigrationUri,
  type LinkSecurity,
  type MigrationUri,
  parseMigrationUri,
} from "../../migration/uri.ts";
import { type PageInput, reportPage } from "../../migration/report_html.ts";
import { Timeline } from "../../migration/timeline.ts";
import { PAGE_BYTES } from "../../migration/protocol.ts";
import { DEFAULT_RELAY_CONFIG } from "../../relay/relay.ts";
import { formatCount, formatDuration, formatSize } from "../../units.ts";
import { type DeviceAddress, formatDeviceAddress } from "../../vhost/address.ts";
import type { CliContext } from "../context.ts";
import { ExitWith } from "../exit_with.ts";
import { toJson } from "../output.ts";
import { deviceFlag, durationFlag, integerFlag, pathFlag, rateFlag, sizeFlag, textFlag } from "../parameters.ts";
import { Progress } from "../progress.ts";
import { aborted } from "../signals.ts";
import { formatFacts } from "../table.ts";
import { serveMigration } from "./migrate_control.ts";
import { runSecurity } from "./migrate_tls.ts";

const CLOSE_MS = 5000;
const DRAIN_MS = 30_000;

interface Flags {
  readonly to: MigrationUri;
  readonly device: DeviceAddress;
  readonly duration: number;
  readonly warmup: number;
  readonly depth: number;
  readonly queues: number;
  readonly num: number;
  readonly packed: boolean;
  readonly mem: number;
  readonly region?: number;
  readonly seed: number;
  readonly downtimeLimit: number;
  readonly maxBandwidth?: number;
  readonly maxIterations: number;
  readonly onNoConvergence: OnNoConvergence;
  readonly timeout: number;
  readonly drainTimeout: number;
  readonly verify: boolean;
  readonly follow: boolean;
  readonly copyDisk: CopyDisk;
  readonly dryRun: boolean;
  readonly insecure: boolean;
  readonly tlsCa?: string;
  readonly tlsSecret?: string;
  readonly report?: string;
  readonly progress: "auto" | "json";
  readonly name?: string;
}

/** Migrates the embedded guest. */
export const run = buildCommand({
  docs: {
    brief: "Run a guest with a checked workload here, and migrate it",
    fullDescription:
      "Qualifies a device, a link and a host before real guests go over them: the embedded guest works on the device, is migrated " +
      "under load to svq migrate listen, and goes on there; every request is checked on both sides. The disk's first 32 MiB (--region) are overwritten.\n\n" +
      "Exit 0 when all went well; 7 when the migration was given up and the guest went on here; 8 when it failed after the hand-over.\n\n" +
      "Example:\n  svq migrate run --to tcp:127.0.0.1:4444 --device sim:blk,file=/srv/disk.img",
  },
  parameters: {
    flags: {
      to: {
        kind: "parsed",
        parse: parseMigrationUri,
        brief: "The destination: unix:PATH, tcp:HOST:PORT or tls:HOST:PORT",
        placeholder: "URI",
      },
      device: deviceFlag("Device of the guest on this side"),
      duration: durationFlag("How long the guest works in all", { default: "8s" }),
      warmup: durationFlag("How long it works before the migration begins", { default: "1s" }),
      depth: integerFlag("Requests in flight in each queue", { default: "16", min: 1, max: 1024 }),
      queues: integerFlag("Queues to use", { default: "1", min: 1, max: 64 }),
      num: integerFlag("Ring size in descriptors", { default: "256", min: 2, max: 32768 }),
      packed: { kind: "boolean", brief: "Use packed rings, also where the device has none", default: false },
      mem: sizeFlag("Size of the guest's memory", { default: "64MiB" }),
      region: sizeFlag("How much of the disk to use (and overwrite); default 32MiB", { optional: true }),
      seed: integerFlag("Random numbers follow from it", { default: "1", max: 2 ** 32 - 1 }),
      downtimeLimit: durationFlag("Stop the guest when what is left should take no longer", { default: "300ms" }),
      maxBandwidth: rateFlag("Most bytes per second while the guest runs", { optional: true }),
      maxIterations: integerFlag("Rounds after which it does not converge", { default: "30", min: 1, max: 1000 }),
      onNoConvergence: {
        kind: "enum",
        values: NO_CONVERGENCE,
        brief: "What then: slow the guest down as soon as its writes outrun the link, stop it nevertheless, or give up",
        default: "stop",
      },
      timeout: durationFlag("Longest silence of the destination", { default: "30s" }),
      drainTimeout: durationFlag("How long the device may keep its rings when it is stopped", { default: "10s" }),
      verify: { kind: "boolean", brief: "Compare all memory on both sides while both stand still", default: true },
      follow: { kind: "boolean", brief: "Wait for the guest's end at the destination, and report it", default: true },
      copyDisk: {
        kind: "enum",
        values: COPY_DISK,
        brief: "Copy the guest's disk: where the destination's turns out to be another one, in any case, or never (both must share it)",
        default: "auto",
      },
      dryRun: {
        kind: "boolean",
        brief: "Only ask whether the destination could take the guest, and estimate rounds and downtime",
        default: false,
      },
      insecure: { kind: "boolean", brief: "Allow plain TCP beyond this host: guest memory travels unencrypted", default: false },
      tlsCa: pathFlag("For tls: the certificate that the destination's is signed with (PEM; default: those that the system trusts)", {
        optional: true,
      }),
      tlsSecret: pathFlag("For tls: a file with the secret that the destination was given", { optional: true }),
      report: pathFlag("Write a page about the migration, with plots, to this file (HTML, readable without a network)", { optional: true }),
      progress: { kind: "enum", values: ["auto", "json"], brief: "How to show progress on stderr", default: "auto" },
      name: textFlag("Name for status and cancel (default: migration-PID)", { optional: true }),
    },
  },
  async func(this: CliContext, flags: Flags): Promise<void> {
    const { depth, queues, num, packed, mem, seed, region } = flags;
    const log = (level: "error" | "warning" | "info" | "debug", message: string) => this.output.log(level, message);
    const options = { depth, queues, num, packed, ramSize: mem, seed, ...(region === undefined ? {} : { regionSize: region }) };
    const security = await runSecurity(flags);
    await checkLink(flags.to, security);
    // A file that cannot be written is noticed before anything is started.
    using page = flags.report === undefined ? undefined : Deno.openSync(flags.report, { write: true, create: true });
    const guest = await Guest.open(
      await openDevice(flags.device),
      { ...DEFAULT_RELAY_CONFIG, ...(packed ? { guestRing: "packed" } : {}) },
      options,
      log,
    );
    try {
      await migrate(this, flags, guest, security, page);
    } finally {
      // A device that hangs must not keep the program.
      await within(guest.close(), CLOSE_MS);
    }
  },
});

async function migrate(
  context: CliContext,
  flags: Flags,
  guest: Guest,
  security: LinkSecurity<TlsClientOptions>,
  page: Deno.FsFile | undefined,
): Promise<void> {
  const { signal, output } = context;
  const begun = performance.now();
  const restMs = () => Math.max(500, flags.duration / 1e6 - (performance.now() - begun));
  guest.driver.run({ drainMs: DRAIN_MS }).catch(() => {});
  await within(aborted(signal), flags.warmup / 1e6);
  signal.throwIfAborted();
  using source = new SourceGuest(guest.driver, guest.relay);
  using progress = new Progress(output, "migrating");
  using timeline = page === undefined ? null : new Timeline(guest.driver);
  using migration = new Migration(source, {
    ...DEFAULT_SOURCE_OPTIONS,
    connect: () => connectMigration(flags.to, security, flags.timeout / 1e6),
    endIsProof: flags.to.kind !== "tls",
    timeoutMs: flags.timeout / 1e6,
    drainTimeoutMs: flags.drainTimeout / 1e6,
    downtimeLimitMs: flags.downtimeLimit / 1e6,
    maxBandwidth: flags.maxBandwidth ?? Infinity,
    maxIterations: flags.maxIterations,
    onNoConvergence: flags.onNoConvergence,
    verify: flags.verify,
    follow: flags.follow,
    copyDisk: flags.copyDisk,
    dryRun: flags.dryRun,
    run: () => ({ durationMs: restMs(), drainMs: DRAIN_MS }),
    onEvent: (event) => {
      timeline?.event(event);
      return flags.progress === "json" ? jsonLine(context, migration, event) : show(progress, migration, event);
    },
  });
  using _control = serveMigration(flags.name ?? `migration-${Deno.pid}`, migration);
  const cancel = () => {
    migration.cancel(signal.reason);
    migration.unfollow();
  };
  signal.addEventListener("abort", cancel, { once: true });
  const result = await migration.run();
  const report = await wait(context, guest, migration, result, restMs, timeline);
  progress[Symbol.dispose]();
  // What came of the guest is said first: a page that cannot be written takes nothing of that away.
  output.document(migrateDocument(result, report), () => describe(result, report));
  const unwritten = page === undefined || timeline === null
    ? undefined
    : await writePage(page, flags.report!, { result, requests: report, timeline, facts: factsOf(flags), date: new Date() });
  const wrong = report !== undefined && !isClean(report);
  if (unwritten !== undefined && (signal.aborted || result.error !== null || wrong)) output.warn(unwritten.message);
  if (signal.aborted) throw signal.reason;
  if (result.error !== null) throw fromErrorRecord({ ...result.error, exit_code: exitCodeOf(result) });
  if (wrong) throw new ExitWith(EXIT.failedAfterSwitchover);
  if (unwritten !== undefined) throw unwritten;
}

function exitCodeOf({ outcome }: MigrationResult): number {
  return outcome === "in-doubt" ? EXIT.failedAfterSwitchover : EXIT.migrationAborted;
}

// The end of the guest's work, wherever it runs now.
async function wait(
  { signal, output }: CliContext,
  guest: Guest,
  migration: Migration,
  result: MigrationResult,
  restMs: () => number,
  timeline: Timeline | null,
): Promise<MigrationReport | undefined> {
  switch (result.outcome) {
    case "completed": {
      // The device has been fenced since the stop; now it is let go.
      await within(guest.close(), CLOSE_MS);
      const report = await migration.follow((_report, samples) => timeline?.there(samples));
      if (report === undefined && !signal.aborted) output.warn("the link was lost after the hand-over: how the guest went on is not known");
      return report;
    }
    case "in-doubt":
      return undefined;
    case "possible":
      return undefined;
    default:
      output.warn(`${result.error?.message ?? "the migration ended"}; the guest goes on here`);
      await within(aborted(signal), restMs());
      return reportOf(await guest.driver.stop(DRAIN_MS));
  }
}

async function writePage(file: Deno.FsFile, path: string, input: PageInput): Promise<SvqError | undefined> {
  try {
    // Nothing to cut off where nothing is: not every file that can be written can be.
    if ((await file.stat()).size > 0) await file.truncate();
    const bytes = new TextEncoder().encode(reportPage(input));
    for (let written = 0; written < bytes.length;) written += await file.write(bytes.subarray(written));
    return undefined;
  } catch (error) {
    return new SvqError("UNWRITABLE_FILE", `Cannot write ${path}: ${(error as Error).message}`, {
      hint: "the migration has ended as told above; only its page is missing",
    });
  }
}

function factsOf({ device, to, mem, maxBandwidth, downtimeLimit }: Flags): [string, string][] {
  return [
    ["Source's device", formatDeviceAddress(device)],
    ["Destination", formatMigrationUri(to)],
    ["Guest's memory", formatSize(mem)],
    ["Downtime limit", formatDuration(downtimeLimit)],
    ["Bandwidth limit", maxBandwidth === undefined ? "none" : `${formatSize(maxBandwidth)}/s`],
  ];
}

function show(progress: Progress, migration: Migration, event: MigrationEvent): void {
  if (event.kind !== "pages") return;
  const left = formatSize((event.of - event.done) * PAGE_BYTES);
  const slowed = describeThrottle(migration.progress.throttlePercent);
  progress.update(event.of === 0 ? 1 : event.done / event.of, `${event.disk ? "disk" : `round ${event.round}`}, ${left} left${slowed}`);
}

function jsonLine({ output }: CliContext, migration: Migration, event: MigrationEvent): void {
  if (event.kind === "pages") return;
  output.writeError(
    toJson({ progress: { event: event.kind, ...progressDocument(migration.progress), rounds: migration.progress.rounds.length } }),
  );
}

function describe(result: MigrationResult, report: MigrationReport | undefined): string {
  const { outcome, rounds, bytes, downtimeUs, memoryIdentical, estimate, disk, throttlePercent } = result;
  const us = (value: number) => formatDuration(value * 1000);
  const facts: [string, string][] = [["outcome", outcome === "possible" ? "the destination could take the guest" : outcome]];
  if (estimate !== null) {
    const { dirtyBytesPerS, bandwidth, rounds, converges, downtimeMs, throttlePercent } = estimate;
    facts.push(["writes", `${formatSize(dirtyBytesPerS)} of pages per second`]);
    facts.push([
      "estimate",
      `at ${formatSize(bandwidth)} per second ${rounds} rounds, then ${formatDuration(downtimeMs * 1e6)} of downtime${
        describeThrottle(throttlePercent)
      }`,
    ]);
    if (!converges) facts.push(["note", "that is longer than --downtime-limit: the migration does not converge"]);
  }
  if (rounds.length > 0) {
    const ms = rounds.reduce((sum, round) => sum + round.ms, 0);
    if (throttlePercent > 0) facts.push(["slowed down", `the guest was held still for up to ${throttlePercent} % of its time`]);
    facts.push(["memory", `${rounds.length} rounds, ${formatSize(bytes)} sent in ${formatDuration(ms * 1e6)}`]);
  }
  if (disk !== null) facts.push(["disk", describeDisk(disk, outcome === "possible")]);
  if (downtimeUs !== null) {
    const parts = downtimeParts(downtimeUs).map(([name, value]) => `${name} ${us(value)}`).join(", ");
    facts.push(["downtime", `${us(downtimeUs.total)}: ${parts}`]);
  }
  if (memoryIdentical !== null) facts.push(["compared", memoryIdentical ? "all memory was identical" : "memory DIFFERED"]);
  if (report !== undefined) {
    const wrong = describeWrong(report) || "none lost, duplicated or corrupted";
    facts.push(["requests", `${formatCount(report.completed)} completed, ${wrong}`]);
    for (const fault of report.faults) facts.push(["fault", fault]);
  }
  return formatFacts(facts);
}

function describeDisk({ shared, sizeBytes, rounds }: DiskResult, asked: boolean): string {
  if (shared) return "both sides share it: nothing is copied";
  if (asked) return `${formatSize(sizeBytes)} would be copied; the destination's is another one`;
  const bytes = rounds.reduce((sum, round) => sum + round.bytes, 0);
  return `${formatSize(sizeBytes)} copied in ${rounds.length} rounds, ${formatSize(bytes)} sent`;
}

function within(promise: Promise<unknown>, ms: number): Promise<unknown> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  return Promise.race([promise, new Promise((resolve) => timer = setTimeout(resolve, ms))]).finally(() => clearTimeout(timer));
}
