/**
 * What a migration wants to know of a QEMU, asked over QMP and checked before use. Source: QEMU qapi/migration.json,
 * qapi/run-state.json.
 *
 * @module
 */
import { type QmpClient, QmpError } from "./qmp.ts";

/** How long a query may take: QEMU answers none while it stops a device that is slow to give back its requests. */
const QUERY_TIMEOUT_MS = 120_000;

/** How far the copying of RAM is. */
export interface RamProgress {
  /** Bytes sent. */
  transferred: number;
  /** Bytes left in this round. */
  remaining: number;
  /** Bytes of RAM. */
  total: number;
  /** Bytes of a page. */
  pageSize: number;
  /** Pages that the guest and its devices dirty per second, as of the last round. */
  dirtyPagesPerSecond: number;
  /** Times that the dirty bitmaps were collected: the number of the round. */
  rounds: number;
  /** Bytes per second, of late. */
  bandwidth: number;
}

/** `query-migrate`. */
export interface MigrationInfo {
  /** `none`, `setup`, `active`, `device`, `completed`, `failed`, `cancelling`, `cancelled`, … */
  status: string;
  /** Since the start. */
  totalMs: number | undefined;
  /** Time in which neither guest ran; known at the end. */
  downtimeMs: number | undefined;
  /** What QEMU expects it to be. */
  expectedDowntimeMs: number | undefined;
  /** Part of the total before the copying began. */
  setupMs: number | undefined;
  /** Why it failed. */
  error: string | undefined;
  /** Why this guest cannot be migrated; empty where it can. */
  blockedReasons: string[];
  /** Absent before the copying. */
  ram: RamProgress | undefined;
  /** Destination: URIs at which it waits. */
  listening: string[];
}

type QmpObject = Record<string, unknown>;

function recordOf(value: unknown): QmpObject {
  return typeof value === "object" && value !== null && !Array.isArray(value) ? value as QmpObject : {};
}

function numberOf(value: unknown): number | undefined {
  return typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : undefined;
}

function ramOf(value: unknown): RamProgress | undefined {
  if (value === undefined) return undefined;
  const ram = recordOf(value);
  const of = (name: string) => numberOf(ram[name]) ?? 0;
  return {
    transferred: of("transferred"),
    remaining: of("remaining"),
    total: of("total"),
    pageSize: of("page-size") || 4096,
    dirtyPagesPerSecond: of("dirty-pages-rate"),
    rounds: of("dirty-sync-count"),
    bandwidth: of("mbps") * 1e6 / 8,
  };
}

/** A URI of an address in `socket-address`; undefined for kinds that cannot be connected to by one. */
function uriOf(value: unknown): string | undefined {
  const { type, path, host, port } = recordOf(value);
  if (type === "unix" && typeof path === "string") return `unix:${path}`;
  if (type !== "inet" || typeof host !== "string") return undefined;
  // Listening everywhere means: reachable by this name from the same machine; others give --uri.
  const name = host === "0.0.0.0" || host === "" || host === "::" ? "127.0.0.1" : host.includes(":") ? `[${host}]` : host;
  return `tcp:${name}:${port}`;
}

/** Asks how a migration goes, on either side. */
export async function queryMigrate(qmp: QmpClient): Promise<MigrationInfo> {
  const info = recordOf(await qmp.execute("query-migrate", undefined, { timeoutMs: QUERY_TIMEOUT_MS }));
  const reasons = info["blocked-reasons"];
  const addresses = info["socket-address"];
  return {
    status: typeof info.status === "string" ? info.status : "none",
    totalMs: numberOf(info["total-time"]),
    downtimeMs: numberOf(info.downtime),
    expectedDowntimeMs: numberOf(info["expected-downtime"]),
    setupMs: numberOf(info["setup-time"]),
    error: typeof info["error-desc"] === "string" ? info["error-desc"] : undefined,
    blockedReasons: Array.isArray(reasons) ? reasons.map(String) : [],
    ram: ramOf(info.ram),
    listening: Array.isArray(addresses) ? addresses.map(uriOf).filter((uri) => uri !== undefined) : [],
  };
}

/** The guest's run state: `running`, `paused`, `inmigrate`, `postmigrate`, … */
export async function queryRunState(qmp: QmpClient): Promise<string> {
  const { status } = recordOf(await qmp.execute("query-status", undefined, { timeoutMs: QUERY_TIMEOUT_MS }));
  return typeof status === "string" ? status : "unknown";
}

/** What a QEMU says about itself before a migration. */
export interface QemuFacts {
  /** Its monitor's socket. */
  path: string;
  /** E.g. `10.0.2`. */
  version: string;
  /** See {@linkcode queryRunState}. */
  runState: string;
  /** See {@linkcode queryMigrate}. */
  migration: MigrationInfo;
  /** Machine type, e.g. `pc-q35-10.0-machine`; undefined where QEMU does not tell. */
  machine: string | undefined;
  /** RAM, bytes. */
  memoryBytes: number | undefined;
  /** Names of the migration capabilities that it knows. */
  capabilities: string[];
}

/** What a query gives, or undefined where this QEMU does not know it. */
async function ifKnown<T>(query: Promise<T>): Promise<T | undefined> {
  try {
    return await query;
  } catch (error) {
    if (error instanceof QmpError) return undefined;
    throw error;
  }
}

/** Collects {@linkcode QemuFacts}. @throws SvqError QMP_CLOSED, QMP_TIMEOUT */
export async function qemuFacts(qmp: QmpClient, path: string): Promise<QemuFacts> {
  const machine = await ifKnown(qmp.execute("qom-get", { path: "/machine", property: "type" }));
  const memory = recordOf(await ifKnown(qmp.execute("query-memory-size-summary")));
  const capabilities = await ifKnown(qmp.execute("query-migrate-capabilities"));
  return {
    path,
    version: qmp.greeting.version,
    runState: await queryRunState(qmp),
    migration: await queryMigrate(qmp),
    machine: typeof machine === "string" ? machine : undefined,
    memoryBytes: numberOf(memory["base-memory"]),
    capabilities: Array.isArray(capabilities) ? capabilities.map((item) => String(recordOf(item).capability)) : [],
  };
}
