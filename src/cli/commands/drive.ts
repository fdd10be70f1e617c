/** `svq drive`. @module */
import { buildCommand } from "@stricli/core";
import { openDevice } from "../../devices/open.ts";
import { DEFAULT_RAM_SIZE, EmbeddedDriver } from "../../drivers/embedded_driver.ts";
import { usageError } from "../usage.ts";
import { parseIpv4 } from "../../drivers/ping_frames.ts";
import type { DriverReport, NetReport } from "../../drivers/report.ts";
import { driverRings } from "../../drivers/ring_image.ts";
import { EXIT, toErrorRecord } from "../../errors.ts";
import { formatCount, formatDuration, formatSize, formatSizeExact } from "../../units.ts";
import { type DeviceAddress, formatDeviceAddress } from "../../vhost/address.ts";
import type { VhostBackend } from "../../vhost/backend.ts";
import type { CliContext } from "../context.ts";
import { ExitWith } from "../exit_with.ts";
import type { Document } from "../output.ts";
import { deviceArgument, durationFlag, integerFlag, pathFlag, sizeFlag } from "../parameters.ts";
import { Progress } from "../progress.ts";
import { formatFacts } from "../table.ts";
import { saveImage } from "../vring_document.ts";

const DEFAULT_DURATION_NS = 8e9;
const REPORT_INTERVAL_MS = 200;

interface Flags {
  readonly duration?: number;
  readonly requests?: number;
  readonly depth: number;
  readonly queues: number;
  readonly num: number;
  readonly readPercent: number;
  readonly seed: number;
  readonly workload?: "blk" | "net" | "loopback";
  readonly frameSize?: number;
  readonly rate?: number;
  readonly ping?: string;
  readonly address?: string;
  readonly echo: boolean;
  readonly packed: boolean;
  readonly eventIdx: boolean;
  readonly indirect: boolean;
  readonly ram: number;
  readonly region?: number;
  readonly saveRings?: string;
  readonly drainTimeout: number;
}

function ipv4(text: string): string {
  parseIpv4(text);
  return text;
}

/** Runs a checked workload on a device. */
export const command = buildCommand({
  docs: {
    brief: "Run a checked workload on a device: a guest without a guest",
    fullDescription:
      "Drives a device as a guest's driver would, and checks every answer: what was written must be read back, each request must come back once. " +
      "Exit 1 when anything was lost, duplicated or corrupted.\n\n" +
      "A network device is sent numbered frames; with the other end sending them back (sim:net,cable=loop does, and DPDK's testpmd in mode mac), " +
      "each has to return once, unharmed and in order. With --ping they are ICMP echo requests, which any guest answers: on a tap beside a guest's this " +
      "measures from outside what a migration does to its network. Frames missing, reordered and repeated, and the longest gap, are reported.\n\n" +
      "A disk's first 32 MiB (--region) are overwritten.\n\n" +
      "Examples:\n  svq drive sim:blk,latency=100us --duration 8s\n  svq drive unix:/run/disk.sock --requests 100000 --depth 64 --queues 2\n" +
      "  svq drive sim:net,cable=loop --rate 1000 --duration 3s\n" +
      "  svq drive sim:net,tap=tap9 --rate 200 --duration 30s --ping 10.0.0.2 --address 10.0.0.9",
  },
  parameters: {
    flags: {
      duration: durationFlag("How long; default 8s unless --requests is given", { optional: true }),
      requests: integerFlag("How many requests", { optional: true, min: 1 }),
      depth: integerFlag("Requests in flight in each queue", { default: "32", min: 1, max: 1024 }),
      queues: integerFlag("Queues to use; net: queue pairs", { default: "1", min: 1, max: 64 }),
      num: integerFlag("Ring size in descriptors", { default: "256", min: 2, max: 32768 }),
      readPercent: integerFlag("Share of reads among reads and writes", { default: "50", max: 100 }),
      seed: integerFlag("Random numbers follow from it", { default: "1", max: 2 ** 32 - 1 }),
      workload: {
        kind: "enum",
        values: ["blk", "net", "loopback"],
        brief: "What to do with a device that does not say what it is",
        optional: true,
      },
      frameSize: integerFlag("net: bytes of a frame; default 512", { optional: true, min: 60, max: 1514 }),
      rate: integerFlag("net: frames per second; default as fast as they are taken", { optional: true, min: 1, max: 1000000 }),
      ping: {
        kind: "parsed",
        parse: ipv4,
        placeholder: "IPV4",
        brief: "net: send ICMP echo requests to this address instead of frames of svq's own",
        optional: true,
      },
      address: { kind: "parsed", parse: ipv4, placeholder: "IPV4", brief: "The driver's own address, with --ping", optional: true },
      echo: { kind: "boolean", brief: "net: the other end sends the frames back", default: true },
      packed: { kind: "boolean", brief: "Use packed rings", default: false },
      eventIdx: { kind: "boolean", brief: "Use EVENT_IDX where it is offered", default: true },
      indirect: { kind: "boolean", brief: "Use INDIRECT_DESC where it is offered", default: true },
      ram: sizeFlag("Size of the guest's RAM", { default: formatSizeExact(DEFAULT_RAM_SIZE) }),
      region: sizeFlag("How much of the disk to use (and overwrite); default 32MiB", { optional: true }),
      saveRings: pathFlag("Write an image of the rings at the end, for svq vring dump --image", { optional: true }),
      drainTimeout: durationFlag("How long the last answers may take before they count as lost", { default: "30s" }),
    },
    positional: { kind: "tuple", parameters: [deviceArgument()] },
  },
  async func(this: CliContext, flags: Flags, address: DeviceAddress): Promise<void> {
    if ((flags.ping === undefined) !== (flags.address === undefined)) {
      throw usageError("--ping and --address belong together", "the address asked, and one of the same network that nobody has");
    }
    await using device = await openDevice(address);
    const { report, unsaved } = await drive(this, flags, device);
    const document = toDocument(formatDeviceAddress(address), report);
    this.output.document(document, () => describe(report));
    const wrong = report.lost + report.duplicated + report.corrupted + report.outOfOrder + report.missedCalls > 0;
    if (unsaved !== undefined && (wrong || this.signal.aborted)) this.output.warn(toErrorRecord(unsaved).message);
    if (this.signal.aborted) throw this.signal.reason;
    if (wrong) throw new ExitWith(EXIT.failed);
    if (unsaved !== undefined) throw unsaved;
  },
});

// `unsaved`: why the image of the rings was not written; what came of the requests is told first.
async function drive(context: CliContext, flags: Flags, device: VhostBackend): Promise<{ report: DriverReport; unsaved: unknown }> {
  const { depth, queues, num, readPercent, seed, packed, eventIdx, indirect, workload, ram, region, drainTimeout } = flags;
  const { frameSize, rate, echo } = flags;
  await using driver = await EmbeddedDriver.open(device, {
    ...{ depth, queues, num, readPercent, seed, packed, eventIdx, indirect, ramSize: ram },
    ...(workload === undefined ? {} : { workload }),
    echo,
    ...(flags.ping === undefined ? {} : { ping: { target: flags.ping, address: flags.address! } }),
    ...(frameSize === undefined ? {} : { frameSize }),
    ...(rate === undefined ? {} : { rate }),
    ...(region === undefined ? {} : { regionSize: region }),
  });
  if (context.signal.aborted) throw context.signal.reason;
  const duration = flags.duration ?? (flags.requests === undefined ? DEFAULT_DURATION_NS : undefined);
  const drainMs = drainTimeout / 1e6;
  const run = driver.run({
    drainMs,
    ...(duration === undefined ? {} : { durationMs: duration / 1e6 }),
    ...(flags.requests === undefined ? {} : { requests: flags.requests }),
  });
  const stop = () => driver.stop(Math.min(drainMs, 2000)).catch(() => {});
  context.signal.addEventListener("abort", stop, { once: true });
  device.onFailure = () => driver.stop(0).catch(() => {});
  using progress = new Progress(context.output, "driving");
  const timer = setInterval(() => showProgress(driver, progress, flags, duration), REPORT_INTERVAL_MS);
  try {
    const report = await run;
    if (flags.saveRings === undefined) return { report, unsaved: undefined };
    const saved = saveImage(flags.saveRings, driverRings(driver, device.info.address));
    return { report, unsaved: await saved.then(() => undefined, (error) => error) };
  } finally {
    clearInterval(timer);
    context.signal.removeEventListener("abort", stop);
  }
}

async function showProgress(driver: EmbeddedDriver, progress: Progress, flags: Flags, durationNs: number | undefined): Promise<void> {
  try {
    const report = await driver.report();
    const byCount = flags.requests === undefined ? 0 : report.completed / flags.requests;
    const byTime = durationNs === undefined ? 0 : report.durationMs * 1e6 / durationNs;
    progress.update(Math.max(byCount, byTime), `${formatCount(report.completed)} requests, ${formatCount(report.iops)} per second`);
  } catch { /* The driver has just ended. */ }
}

function toDocument(device: string, report: DriverReport): Document {
  const { completed, lost, duplicated, corrupted, outOfOrder, missedCalls, submitted, verified, latencyUs } = report;
  return {
    schema: "svq.drive/1",
    device,
    duration_ms: Math.round(report.durationMs),
    requests: { completed, lost, duplicated, corrupted, out_of_order: outOfOrder, submitted },
    missed_calls: missedCalls,
    iops: report.iops,
    bytes: report.bytes,
    verified,
    latency_us: { p50: latencyUs.p50, p99: latencyUs.p99, p999: latencyUs.p999, max: latencyUs.max },
    longest_stall_ms: Math.round(report.longestStallMs * 1000) / 1000,
    faults: report.faults,
    ...(report.net === undefined ? {} : {
      net: {
        sent: report.net.sent,
        received: report.net.received,
        missing: report.net.missing,
        reordered: report.net.reordered,
        duplicated: report.net.duplicated,
        longest_gap_ms: report.net.longestGapMs,
      },
    }),
  };
}

function describeNet({ sent, received, missing, reordered, duplicated, longestGapMs }: NetReport): [string, string] {
  const counts = [[sent, "sent"], [received, "received"], [missing, "missing"], [reordered, "reordered"], [
    duplicated,
    "repeated",
  ]] as const;
  return [
    "frames",
    [...counts.map(([count, what]) => `${formatCount(count)} ${what}`), `longest gap ${formatDuration(longestGapMs * 1e6)}`].join(", "),
  ];
}

function describe(report: DriverReport): string {
  const { completed, lost, duplicated, corrupted, outOfOrder, missedCalls, latencyUs } = report;
  const us = (value: number) => formatDuration(value * 1000);
  const wrong = [
    [lost, "lost"],
    [duplicated, "duplicated"],
    [corrupted, "corrupted"],
    [outOfOrder, "out of order"],
    [missedCalls, "not announced"],
  ].filter(([count]) => count !== 0).map(([count, what]) => `${formatCount(count as number)} ${what}`);
  const facts: [string, string][] = [
    ["requests", `${formatCount(completed)} completed, ${wrong.length === 0 ? "none lost, duplicated or corrupted" : wrong.join(", ")}`],
    ["checked", `${formatCount(report.verified)} pieces of data compared, ${formatSize(report.bytes)} moved`],
    ["rate", `${formatCount(report.iops)} requests per second for ${formatDuration(report.durationMs * 1e6)}`],
    ["latency", `p50 ${us(latencyUs.p50)}, p99 ${us(latencyUs.p99)}, p99.9 ${us(latencyUs.p999)}, max ${us(latencyUs.max)}`],
    ["stall", `${formatDuration(report.longestStallMs * 1e6)} at most without an answer`],
    ...(report.net === undefined ? [] : [describeNet(report.net)]),
    ...report.faults.map((fault): [string, string] => ["fault", fault]),
  ];
  return formatFacts(facts);
}
