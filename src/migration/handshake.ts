/**
 * The short conversations around a migration: greeting, asking for an outcome, reports.
 *
 * @module
 */
import type { DriverReport } from "../drivers/report.ts";
import { ERRNO, SysError, type UnixStream } from "../ffi/mod.ts";
import { Channel, lossOf } from "./channel.ts";
import { commonVersion, decodeHello, encodeHello, FRAME, SESSION_BYTES, VERSION, VERSION_MIN, violation } from "./protocol.ts";
import { decodeSamples, type Sample } from "./timeline.ts";

const HELLO_MS = 10_000;

/** Bytes as hexadecimal digits. */
export function hexText(bytes: Uint8Array): string {
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Steps 1 and 2 at the source. @returns the session. @throws SvqError MIGRATION_VERSION */
export async function greet(channel: Channel): Promise<string> {
  await channel.send(FRAME.HELLO, encodeHello({ version: VERSION, versionMin: VERSION_MIN, session: new Uint8Array(SESSION_BYTES) }));
  const hello = decodeHello(await channel.receive(FRAME.HELLO, 64));
  commonVersion(hello);
  return hexText(hello.session);
}

/** Steps 1 and 2 at the destination. @returns the session that it made up. @throws SvqError MIGRATION_VERSION */
export async function welcome(channel: Channel): Promise<string> {
  // Whoever connects and says nothing does not keep a place for long.
  const hello = decodeHello(await channel.receive(FRAME.HELLO, 64, HELLO_MS));
  const version = commonVersion(hello);
  const session = crypto.getRandomValues(new Uint8Array(SESSION_BYTES));
  await channel.send(FRAME.HELLO, encodeHello({ version, versionMin: VERSION_MIN, session }));
  return hexText(session);
}

/** What a destination knows of a session. */
export const OUTCOME = { runs: 1, never: 2, unknown: 3 } as const;

/** One of the keys of {@linkcode OUTCOME}. */
export type OutcomeName = keyof typeof OUTCOME;

const RETRY_MS = 200;

/** What asking for an outcome can come to, besides an answer: nobody listens there, or nobody answers. */
export type Doubt = OutcomeName | "gone" | "silent";

/**
 * Asks the destination whether a session's guest runs there, until it answers.
 *
 * @param limits `doubtTimeoutMs`: how long to try again when nobody answers; 0: ask once. `goneIsAnswer`: do not ask again when
 *   nobody listens there
 */
export async function settleDoubt(
  session: string,
  connect: () => Promise<UnixStream>,
  limits: { timeoutMs: number; doubtTimeoutMs: number; goneIsAnswer: boolean },
): Promise<Doubt> {
  const deadline = performance.now() + limits.doubtTimeoutMs;
  for (;;) {
    let gone = false;
    try {
      return await ask(session, connect, limits.timeoutMs);
    } catch (error) {
      gone = error instanceof SysError && (error.errno === ERRNO.ECONNREFUSED || error.errno === ERRNO.ENOENT);
    }
    if (gone && limits.goneIsAnswer) return "gone";
    if (performance.now() + RETRY_MS > deadline) return gone ? "gone" : "silent";
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

async function ask(session: string, connect: () => Promise<UnixStream>, timeoutMs: number): Promise<OutcomeName> {
  using channel = new Channel(await connect(), timeoutMs);
  await greet(channel);
  await channel.send(FRAME.QUERY, Uint8Array.from(session.match(/../g) ?? [], (digits) => parseInt(digits, 16)));
  const answer = await channel.receive(FRAME.OUTCOME, 4);
  const name = (Object.keys(OUTCOME) as OutcomeName[]).find((key) => OUTCOME[key] === answer[0]);
  if (answer.length !== 4 || name === undefined) throw violation("its OUTCOME is none");
  return name;
}

/** The payload of OUTCOME. */
export function encodeOutcome(outcome: OutcomeName): Uint8Array<ArrayBuffer> {
  return new Uint8Array([OUTCOME[outcome], 0, 0, 0]);
}

/** How the guest does at the destination. */
export type MigrationReport = Pick<
  DriverReport,
  | "completed"
  | "lost"
  | "duplicated"
  | "corrupted"
  | "outOfOrder"
  | "missedCalls"
  | "submitted"
  | "verified"
  | "iops"
  | "longestStallMs"
  | "faults"
>;

const COUNTS = [
  "completed",
  "lost",
  "duplicated",
  "corrupted",
  "outOfOrder",
  "missedCalls",
  "submitted",
  "verified",
  "iops",
  "longestStallMs",
] as const;

/** The part of a driver's report that travels. */
export function reportOf(report: DriverReport): MigrationReport {
  const { completed, lost, duplicated, corrupted, outOfOrder, missedCalls, submitted, verified, iops, longestStallMs, faults } = report;
  return { completed, lost, duplicated, corrupted, outOfOrder, missedCalls, submitted, verified, iops, longestStallMs, faults };
}

function decodeReport(value: unknown): MigrationReport {
  if (typeof value !== "object" || value === null) throw violation("its REPORT is none");
  const fields = value as Record<string, unknown>;
  const report = {} as Record<string, unknown>;
  for (const name of COUNTS) {
    const count = fields[name];
    if (!(typeof count === "number" && count >= 0)) throw violation(`its REPORT has no ${name}`);
    report[name] = count;
  }
  if (!Array.isArray(fields.faults)) throw violation("its REPORT has no faults");
  report.faults = fields.faults.slice(0, 20).map((fault) => String(fault).slice(0, 500));
  return report as unknown as MigrationReport;
}

/** Receives reports until the last one. @returns undefined when the link was lost before */
export async function receiveReports(
  channel: Channel,
  onReport?: (report: MigrationReport, samples: Sample[]) => void,
): Promise<MigrationReport | undefined> {
  try {
    for (;;) {
      const document = await channel.readJson(await channel.receiveHead([FRAME.REPORT]));
      const report = decodeReport(document.report);
      onReport?.(report, decodeSamples(document.samples));
      if (document.final === true) return report;
    }
  } catch (error) {
    if (lossOf(error) !== undefined) return undefined;
    throw error;
  } finally {
    channel.close();
  }
}
