/**
 * One host of a migration in a process of its own, so that it can live in a network namespace. Commands come as JSON lines on
 * stdin, answers go as JSON lines to stdout.
 *
 * @module
 */
import { openDevice } from "../../src/devices/open.ts";
import { Destination } from "../../src/migration/destination.ts";
import { Guest } from "../../src/migration/guest.ts";
import { reportOf } from "../../src/migration/handshake.ts";
import { DEFAULT_SOURCE_OPTIONS, Migration } from "../../src/migration/source.ts";
import { SourceGuest } from "../../src/migration/source_guest.ts";
import { connectMigration, formatMigrationUri, listenMigration, parseMigrationUri } from "../../src/migration/uri.ts";
import { DEFAULT_RELAY_CONFIG } from "../../src/relay/relay.ts";
import { parseDeviceAddress } from "../../src/vhost/address.ts";

/** What a host can be told. */
export type HostCommand =
  | { do: "start"; device: string; ramSize: number }
  | { do: "listen"; device: string; uri: string; maxMemory: number }
  | { do: "arrived" }
  | { do: "migrate"; to: string; maxBandwidth?: number; cancelAfterMs?: number }
  | { do: "report" }
  | { do: "stop" };

const log = (level: string, message: string) => level === "debug" ? undefined : console.error(`${level}: ${message}`);
let guest: Guest | undefined;
let destination: Destination | undefined;

async function obey(command: HostCommand): Promise<unknown> {
  switch (command.do) {
    case "start": {
      const device = await openDevice(parseDeviceAddress(command.device));
      guest = await Guest.open(device, { ...DEFAULT_RELAY_CONFIG }, { ramSize: command.ramSize, depth: 16, regionSize: 8 << 20 }, log);
      guest.driver.run({}).catch(() => {});
      return {};
    }
    case "listen": {
      const { listener, uri } = await listenMigration(parseMigrationUri(command.uri), { insecure: true });
      const address = parseDeviceAddress(command.device);
      destination = new Destination(listener, {
        openDevice: () => openDevice(address),
        relay: { ...DEFAULT_RELAY_CONFIG },
        timeoutMs: 60_000,
        copyDisk: false,
        maxMemory: command.maxMemory,
        log,
      });
      return { uri: formatMigrationUri(uri) };
    }
    case "arrived":
      guest = await destination!.arrived();
      await destination!.close();
      destination = undefined;
      return {};
    case "migrate":
      return await migrate(guest!, command);
    case "report":
      return reportOf(await guest!.driver.report());
    case "stop": {
      const report = reportOf(await guest!.driver.stop(60_000));
      await guest!.close();
      return report;
    }
  }
}

async function migrate(from: Guest, command: HostCommand & { do: "migrate" }): Promise<unknown> {
  const { to, maxBandwidth = Infinity, cancelAfterMs } = command;
  using source = new SourceGuest(from.driver, from.relay);
  using migration = new Migration(source, {
    ...DEFAULT_SOURCE_OPTIONS,
    connect: () => connectMigration(parseMigrationUri(to), { insecure: true }, 60_000),
    timeoutMs: 60_000,
    maxBandwidth,
    follow: false,
  });
  const timer = cancelAfterMs === undefined ? undefined : setTimeout(() => migration.cancel(), cancelAfterMs);
  const { outcome, phase, memoryIdentical, downtimeUs, rounds, error } = await migration.run();
  clearTimeout(timer);
  if (outcome === "completed") {
    await from.close();
    guest = undefined;
  }
  return { outcome, phase, memoryIdentical, downtimeUs: downtimeUs?.total ?? null, rounds: rounds.length, error };
}

if (import.meta.main) {
  let text = "";
  for await (const chunk of Deno.stdin.readable.pipeThrough(new TextDecoderStream())) {
    text += chunk;
    for (let end = text.indexOf("\n"); end >= 0; end = text.indexOf("\n")) {
      const command = JSON.parse(text.slice(0, end)) as HostCommand;
      text = text.slice(end + 1);
      const answer = await obey(command).then((value) => ({ value }), (error) => ({ failed: String(error?.stack ?? error) }));
      console.log(JSON.stringify(answer));
    }
  }
  await guest?.close();
  await destination?.close();
  Deno.exit(0);
}
