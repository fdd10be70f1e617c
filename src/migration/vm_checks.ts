/**
 * Whether a guest can go from one QEMU to the other, decided on plain facts before anything is started.
 *
 * @module
 */
import { EXIT, type ExitCode, SvqError } from "../errors.ts";
import type { RelayStatus } from "../relay/status.ts";
import type { QemuFacts } from "./qemu.ts";

/** Something that was looked at. */
export interface Check {
  /** Stable name; of a failed check it is its error's code. */
  code: string;
  /** False: the migration must not start. */
  ok: boolean;
  /** What was found. */
  message: string;
  /** What to do about it. */
  hint?: string;
  /** Exit code of the program when this check ends it (default 6). */
  exitCode?: ExitCode;
}

/** A relay's status, or why there is none. */
export interface RelayFacts {
  /** As the user named it. */
  name: string;
  /** What it says. */
  status?: RelayStatus;
  /** Why it says nothing. */
  error?: SvqError;
}

/** Everything that {@linkcode checkMigration} looks at. */
export interface MigrationFacts {
  /** QEMU that runs the guest. */
  source: QemuFacts;
  /** QEMU that waits for it. */
  destination: QemuFacts;
  /** Relays of the source's devices. */
  sourceRelays: RelayFacts[];
  /** Relays of the same devices at the destination, in the same order. */
  destinationRelays: RelayFacts[];
  /** Migration capabilities that were asked for. */
  capabilities: readonly string[];
}

/** The error that a failed check is. */
export function checkError(check: Check): SvqError {
  return new SvqError(check.code, check.message, { exitCode: check.exitCode ?? EXIT.checkFailed, hint: check.hint });
}

function ok(code: string, message: string): Check {
  return { code, ok: true, message };
}

function bad(code: string, message: string, hint: string, exitCode?: ExitCode): Check {
  return { code, ok: false, message, hint, ...(exitCode === undefined ? {} : { exitCode }) };
}

/** What can be done about QEMU's reasons against a migration, by words in them. */
const BLOCKERS: readonly [RegExp, string][] = [
  [
    /LOG_ALL|LOG_SHMFD/,
    "a vhost device of this guest is not behind a relay: point its chardev at one (svq relay run --front unix:PATH --device DEVICE)",
  ],
  [/vhost-user.*(back-?end|device).*(not|lack)/i, "put a relay between the VMM and that back-end: svq relay run"],
  [/vfio|VFIO/, "unplug the passed-through device (device_del) before the migration, and plug it in again after"],
  [/9p|virtfs|Migration is disabled when VirtFS/i, "unmount the 9p share in the guest; virtiofs can be migrated with QEMU 10"],
  [/invtsc|invariant TSC|tsc/i, "start the guest without the CPU flag invtsc, or set tsc-khz on both sides"],
  [/ivshmem/i, "unplug the ivshmem device before the migration"],
  [/block|format|qcow|snapshot|replication|mirror/i, "finish or cancel the block job, or change the disk's format"],
];

/** What to do about one of QEMU's reasons against a migration. */
export function blockerHint(reason: string): string {
  return BLOCKERS.find(([pattern]) => pattern.test(reason))?.[1] ??
    "unplug the device that the reason names, or start the guest without it";
}

/** Looks at everything; the order is the order in which a reader should fix things. */
export function checkMigration(facts: MigrationFacts): Check[] {
  const { source, destination, sourceRelays, destinationRelays, capabilities } = facts;
  return [
    ...checkSource(source),
    ...checkDestination(destination),
    ...checkMachines(source, destination),
    ...checkCapabilities(capabilities, source, destination),
    ...sourceRelays.map((relay) => checkRelay(relay, "source")),
    ...destinationRelays.map((relay) => checkRelay(relay, "destination")),
    ...checkPairs(sourceRelays, destinationRelays),
  ];
}

const RUN_STATES: Record<string, [what: string, hint: string]> = {
  inmigrate: ["itself waits for a guest", "--source and --destination are probably exchanged"],
  postmigrate: ["has given its guest away already", "the guest runs elsewhere; end this QEMU"],
  "finish-migrate": ["is in the middle of a migration", "wait for its end, or migrate_cancel it"],
  shutdown: ["has shut its guest down", "there is nothing to migrate; start the guest"],
  "guest-panicked": ["has a guest that crashed", "there is nothing to migrate; reset the guest"],
  "internal-error": ["stopped at an internal error", "there is nothing to migrate; look into QEMU's log"],
  "io-error": ["stopped its guest at an I/O error", "repair the disk and let the guest continue (QMP cont)"],
  prelaunch: ["has not started its guest", "let it start (QMP cont)"],
};

function checkSource(source: QemuFacts): Check[] {
  const checks: Check[] = [];
  const { runState, migration, path, version } = source;
  if (runState === "running" || runState === "paused") checks.push(ok("SOURCE_STATE", `The source, QEMU ${version}, is ${runState}`));
  else {
    const [what, hint] = RUN_STATES[runState] ?? [`is in state ${runState}`, "a guest can be migrated while it runs or is paused"];
    checks.push(bad("SOURCE_STATE", `The source at ${path} ${what}`, hint));
  }
  if (["setup", "active", "device", "pre-switchover", "cancelling", "wait-unplug"].includes(migration.status)) {
    checks.push(
      bad("MIGRATION_RUNS", `The source at ${path} is migrating already (${migration.status})`, "wait for its end, or migrate_cancel it"),
    );
  }
  for (const reason of migration.blockedReasons) checks.push(bad("MIGRATION_BLOCKED", `QEMU refuses: ${reason}`, blockerHint(reason)));
  if (migration.blockedReasons.length === 0) checks.push(ok("MIGRATION_BLOCKED", "QEMU knows no reason against a migration"));
  return checks;
}

function checkDestination(destination: QemuFacts): Check[] {
  const { runState, path, version, migration } = destination;
  if (runState !== "inmigrate") {
    return [
      bad("DESTINATION_STATE", `The destination at ${path} does not wait for a guest: it is ${runState}`, "start it with -incoming defer"),
    ];
  }
  const how = migration.listening.length > 0 ? `listens at ${migration.listening.join(", ")}` : "waits to be told where to listen";
  return [ok("DESTINATION_STATE", `The destination, QEMU ${version}, ${how}`)];
}

/** `[major, minor]` of a version. */
function release(version: string): [number, number] {
  const [major = 0, minor = 0] = version.split(".").map(Number);
  return [major, minor];
}

function checkMachines(source: QemuFacts, destination: QemuFacts): Check[] {
  const checks: Check[] = [];
  const [majorA, minorA] = release(source.version);
  const [majorB, minorB] = release(destination.version);
  if (source.path === destination.path) {
    checks.push(bad("SAME_QEMU", `${source.path} is both source and destination`, "name the monitors of two QEMUs"));
  } else if (majorB < majorA || (majorB === majorA && minorB < minorA)) {
    checks.push(
      bad(
        "OLDER_DESTINATION",
        `The destination's QEMU ${destination.version} is older than the source's ${source.version}`,
        "use the same or a newer QEMU there; --skip-check OLDER_DESTINATION where you know that it works",
      ),
    );
  } else checks.push(ok("OLDER_DESTINATION", `QEMU ${source.version} -> ${destination.version}`));
  const equal = <T extends string | number>(code: string, name: string, a: T | undefined, b: T | undefined, hint: string) => {
    if (a === undefined || b === undefined) return;
    checks.push(
      a === b ? ok(code, `${name}: ${a} on both sides`) : bad(code, `${name}: ${a} at the source, ${b} at the destination`, hint),
    );
  };
  equal("MACHINE_DIFFERS", "Machine type", source.machine, destination.machine, "start the destination with the source's -machine");
  equal("MEMORY_DIFFERS", "RAM in bytes", source.memoryBytes, destination.memoryBytes, "start the destination with the source's -m");
  return checks;
}

function checkCapabilities(wanted: readonly string[], source: QemuFacts, destination: QemuFacts): Check[] {
  return wanted.flatMap((name): Check[] => {
    if (name.startsWith("postcopy")) {
      return [
        bad(
          "POSTCOPY",
          `Postcopy is not offered (${name})`,
          "a vhost device cannot wait for pages that are not there yet; use auto-converge or a higher --max-bandwidth",
          EXIT.missingFeature,
        ),
      ];
    }
    const lacking = [source, destination].filter(({ capabilities }) => capabilities.length > 0 && !capabilities.includes(name));
    return lacking.map(({ path, version }) =>
      bad(
        "NO_SUCH_CAPABILITY",
        `QEMU ${version} at ${path} does not know the migration capability ${name}`,
        "QMP query-migrate-capabilities lists what it knows",
        EXIT.usage,
      )
    );
  });
}

function checkRelay(relay: RelayFacts, side: "source" | "destination"): Check {
  const { status, error, name } = relay;
  const who = `Relay ${name} (${side})`;
  if (status === undefined) {
    const hint = error?.hint ?? "svq relay list shows the running ones";
    return bad(error?.code ?? "NO_SUCH_RELAY", error?.message ?? `${who} does not answer`, hint, error?.exitCode ?? EXIT.noDevice);
  }
  if (status.error !== null || status.state === "device-lost") {
    return bad(
      "DEVICE_LOST",
      `${who} has lost its device: ${status.error?.message ?? status.device}`,
      `bring ${status.device} back`,
      EXIT.noDevice,
    );
  }
  if (status.state === "stopping") return bad("RELAY_STOPS", `${who} is being stopped`, "start it again: svq relay start");
  if (status.state === "waiting") {
    return bad("RELAY_WITHOUT_VMM", `${who} has no VMM connected`, `let the ${side}'s QEMU use ${status.front}`);
  }
  const failed = status.queues.find((queue) => queue.error !== null);
  if (failed !== undefined) {
    const hint = "the guest's driver has to set the queue up again: reset the device or reboot the guest";
    return bad("QUEUE_FAILED", `${who}: queue ${failed.index} failed: ${failed.error!.message}`, hint);
  }
  const running = status.queues.filter(isRunning).length;
  if (side === "destination" && running > 0) {
    const hint = "the destination's QEMU must be one that waits for a guest; is it another guest's relay?";
    return bad("RELAY_IN_USE", `${who} already runs ${running} queues`, hint);
  }
  if (side === "source" && status.logging) {
    return bad(
      "MIGRATION_RUNS",
      `${who}: the VMM has the dirty log on already`,
      "wait for the end of the other migration, or migrate_cancel it",
    );
  }
  return ok("RELAY", `${who} is ready, ${running} queues run`);
}

/** Does a device work on this queue? */
export function isRunning(queue: { mode: string }): boolean {
  return queue.mode !== "stopped" && queue.mode !== "failed";
}

function checkPairs(sources: readonly RelayFacts[], destinations: readonly RelayFacts[]): Check[] {
  if (sources.length !== destinations.length) {
    return [
      bad(
        "RELAYS_UNPAIRED",
        `${sources.length} relays at the source, ${destinations.length} at the destination`,
        "name as many --destination-relay as --source-relay, in the same order",
        EXIT.usage,
      ),
    ];
  }
  return sources.flatMap((source, i) => {
    const destination = destinations[i]!;
    return source.status === undefined || destination.status === undefined ? [] : checkPair(source.status, destination.status);
  });
}

function checkPair(source: RelayStatus, destination: RelayStatus): Check[] {
  const pair = `${source.name} -> ${destination.name}`;
  if (source.name === destination.name && source.pid === destination.pid) {
    return [bad("SAME_RELAY", `Relay ${source.name} is both source and destination`, "each QEMU needs a relay of its own")];
  }
  const checks: Check[] = [];
  const missing = BigInt(source.features) & ~BigInt(destination.offered_features);
  if (missing !== 0n) {
    checks.push(
      bad(
        "FEATURES_DIFFER",
        `${pair}: the guest uses features 0x${missing.toString(16)} that the destination's device does not offer`,
        "put the same kind of device behind both relays, or start the guest without these features",
        EXIT.missingFeature,
      ),
    );
  }
  const needed = Math.max(0, ...source.queues.filter(isRunning).map((queue) => queue.index + 1));
  if (destination.queue_num < source.queue_num && destination.queue_num < needed) {
    checks.push(
      bad(
        "QUEUES_DIFFER",
        `${pair}: the source's device has ${source.queue_num} queues, the destination's ${destination.queue_num}`,
        "give the destination's device as many queues",
        EXIT.missingFeature,
      ),
    );
  }
  if (source.config !== null && destination.config !== null && source.config !== destination.config) {
    checks.push(
      bad(
        "CONFIG_DIFFERS",
        `${pair}: the devices' configurations differ, ${firstDifference(source.config, destination.config)}`,
        "the guest would see another device (a disk of another size, say); --skip-check CONFIG_DIFFERS where that is meant",
      ),
    );
  }
  if (checks.length === 0) checks.push(ok("PAIR", `${pair}: the devices are alike`));
  return checks;
}

function firstDifference(a: string, b: string): string {
  for (let at = 0; at < Math.max(a.length, b.length); at += 2) {
    const [left, right] = [a.slice(at, at + 2), b.slice(at, at + 2)];
    if (left !== right) return `first in byte ${at / 2}: 0x${left || "nothing"} and 0x${right || "nothing"}`;
  }
  return "in nothing";
}
