/** `svq migrate listen`. @module */
import { buildCommand } from "@stricli/core";
import { openDevice } from "../../devices/open.ts";
import { EXIT } from "../../errors.ts";
import { Destination } from "../../migration/destination.ts";
import { describeWrong, isClean, requestsDocument } from "../../migration/document.ts";
import type { Guest } from "../../migration/guest.ts";
import { reportOf } from "../../migration/handshake.ts";
import { formatMigrationUri, listenMigration, type MigrationUri, parseMigrationUri } from "../../migration/uri.ts";
import { DEFAULT_RELAY_CONFIG } from "../../relay/relay.ts";
import { formatCount } from "../../units.ts";
import type { DeviceAddress } from "../../vhost/address.ts";
import type { CliContext } from "../context.ts";
import { ExitWith } from "../exit_with.ts";
import { deviceFlag, durationFlag, pathFlag, sizeFlag } from "../parameters.ts";
import { aborted } from "../signals.ts";
import { listenSecurity } from "./migrate_tls.ts";

const REPORT_MS = 5000;

interface Flags {
  readonly device: DeviceAddress;
  readonly insecure: boolean;
  readonly tlsCert?: string;
  readonly tlsKey?: string;
  readonly tlsSecret?: string;
  readonly copyDisk: "auto" | "no";
  readonly maxMem: number;
  readonly timeout: number;
  readonly untilStdinCloses: boolean;
}

/** Waits for a guest and runs it. */
export const listen = buildCommand({
  docs: {
    brief: "Wait for a guest, take it over, and run it to its end",
    fullDescription:
      "The destination of svq migrate run. A migration that fails leaves the guest at the source, and this command waits for the next one. " +
      "When a guest has arrived and its workload has ended, prints how it went; exit 8 when requests were lost, duplicated or corrupted.\n\n" +
      "Example:\n  svq migrate listen tcp:127.0.0.1:4444 --device sim:blk,file=/srv/disk.img",
  },
  parameters: {
    flags: {
      device: deviceFlag("Device of the guest on this side"),
      insecure: { kind: "boolean", brief: "Allow plain TCP beyond this host: guest memory travels unencrypted", default: false },
      tlsCert: pathFlag("For tls: the certificate to show, with its chain (PEM)", { optional: true }),
      tlsKey: pathFlag("For tls: its private key (PEM)", { optional: true }),
      tlsSecret: pathFlag("For tls: a file with a secret that sources must know", { optional: true }),
      copyDisk: {
        kind: "enum",
        values: ["auto", "no"],
        brief: "Let a source whose disk is another one copy it here, over what this device holds (auto), or not",
        default: "auto",
      },
      maxMem: sizeFlag("Most memory that a guest may bring", { default: "16GiB" }),
      timeout: durationFlag("Longest silence of the source", { default: "30s" }),
      untilStdinCloses: { kind: "boolean", brief: "End when stdin is closed", default: false, hidden: true },
    },
    positional: {
      kind: "tuple",
      parameters: [{ parse: parseMigrationUri, brief: "Where to listen: unix:PATH, tcp:HOST:PORT or tls:HOST:PORT", placeholder: "URI" }],
    },
  },
  async func(this: CliContext, flags: Flags, where: MigrationUri): Promise<void> {
    const { signal, output } = this;
    const { listener, uri } = await listenMigration(
      where,
      await listenSecurity(where, flags),
      (reason) => output.warn(`refused: ${reason}`),
    );
    await using destination = new Destination(listener, {
      openDevice: () => openDevice(flags.device),
      relay: { ...DEFAULT_RELAY_CONFIG },
      timeoutMs: flags.timeout / 1e6,
      copyDisk: flags.copyDisk === "auto",
      maxMemory: flags.maxMem,
      log: (level, message) => output.log(level, message),
    });
    output.info(`listening on ${formatMigrationUri(uri)}`);
    const stopped = Promise.race([aborted(signal), ...(flags.untilStdinCloses ? [stdinClosed()] : [])]).then(() => undefined);
    const guest = await Promise.race([destination.arrived(), stopped]);
    if (guest === undefined) return;
    try {
      await finish(this, destination, guest, stopped);
    } finally {
      await Promise.race([guest.close(), pause(REPORT_MS)]);
    }
  },
});

async function finish(context: CliContext, destination: Destination, guest: Guest, stopped: Promise<undefined>): Promise<void> {
  const ended = guest.driver.finished();
  ended.catch(() => {});
  const report = reportOf(await Promise.race([ended, stopped]) ?? await guest.driver.stop(REPORT_MS));
  await Promise.race([destination.reported(), pause(REPORT_MS)]);
  const document = {
    schema: "svq.migrate/1",
    outcome: "completed",
    phase: "completed",
    rounds: [],
    bytes: 0,
    downtime_us: null,
    requests: requestsDocument(report),
    faults: report.faults,
    memory_identical: null,
    error: null,
  };
  context.output.document(document, () => {
    const wrong = describeWrong(report) || "none lost, duplicated or corrupted";
    return `${formatCount(report.completed)} requests completed, on both sides together, ${wrong}`;
  });
  if (context.signal.aborted) throw context.signal.reason;
  if (!isClean(report)) throw new ExitWith(EXIT.failedAfterSwitchover);
}

async function stdinClosed(): Promise<void> {
  const bytes = new Uint8Array(64);
  while (await Deno.stdin.read(bytes).catch(() => null) !== null);
}

function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
