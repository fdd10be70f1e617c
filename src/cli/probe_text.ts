/**
 * Probed devices as text for people.
 *
 * @module
 */
import { formatHolders } from "../vhost/holders.ts";
import type { Verdict } from "../vhost/assess.ts";
import type { ProbedDevice } from "../vhost/probe.ts";
import type { Paint } from "./colour.ts";
import { formatFacts, formatTable } from "./table.ts";

/** One line per device, for a scan. */
export function deviceTable(devices: readonly ProbedDevice[], paint: Paint): string {
  const rows = devices.map((device) => [
    device.address,
    device.name,
    device.device_name,
    device.driver,
    device.parent,
    device.bus_driver,
    device.in_use_by === null ? undefined : formatHolders([device.in_use_by]),
  ]);
  return formatTable(["address", "name", "device", "driver", "parent", "bus driver", "in use by"], rows, { paint });
}

function list(names: readonly string[] | null | undefined): string | undefined {
  return names === null || names === undefined ? undefined : names.length === 0 ? "none" : names.join(" ");
}

function hex(value: bigint | null): string | undefined {
  return value === null ? undefined : `0x${value.toString(16)}`;
}

function yesNo(value: boolean | null | undefined): string | undefined {
  return value === null || value === undefined ? undefined : value ? "yes" : "no";
}

const STOPS: Readonly<Record<string, string>> = {
  each: "each by itself",
  together: "all together, by a reset in between",
  "at-rest": "only with nothing in flight (no SUSPEND)",
};

/** Everything about one device. */
export function describeDevice(device: ProbedDevice, paint: Paint): string {
  const { iova_range: range } = device;
  const facts: (readonly [string, unknown])[] = [
    ["kind", device.kind],
    ["name", device.name],
    ["device", device.device_id === null ? undefined : `${device.device_name} (${device.device_id})`],
    ["driver", device.driver],
    ["parent", device.parent],
    ["in use by", device.in_use_by === null ? undefined : formatHolders([device.in_use_by])],
    ["status", list(device.status_names)],
    ["features", hex(device.features)],
    ["", list(device.feature_names)],
    [device.kind === "vhost-vdpa" || device.kind === "vhost-net" ? "backend features" : "protocol features", hex(device.backend_features)],
    ["", list(device.backend_feature_names)],
    ["queues", device.queues],
    ["largest ring", device.vring_num_max],
    ["addresses", range === null ? undefined : `${hex(range.first)}-${hex(range.last)}`],
    ["groups", device.groups],
    ["address spaces", device.address_spaces],
    ["memory slots", device.mem_slots],
    ["doorbells", yesNo(device.doorbell)],
    [
      "suspend, resume",
      device.suspend === null || device.suspend === undefined ? undefined : `${yesNo(device.suspend)}, ${yesNo(device.resume)}`,
    ],
    ["rings stop", device.ring_stop === null || device.ring_stop === undefined ? undefined : STOPS[device.ring_stop]],
    ["config", configText(device.config)],
  ];
  const lines = [paint.bold(device.address), formatFacts(facts.filter(([, value]) => value !== undefined && value !== null), paint, 2)];
  for (const [mode, verdict] of Object.entries(device.modes ?? {})) lines.push(...verdictLines(`mode ${mode}`, verdict, paint));
  if (device.migratable !== null) lines.push(...verdictLines("migration", device.migratable, paint));
  const masked = device.masked ?? [];
  if (masked.length > 0) lines.push("  not passed on by a relay:", ...masked.map(({ name, text }) => `    ${name}: ${text}`));
  for (const note of device.notes) lines.push(`  ${paint.dim(note)}`);
  if (device.error !== null) {
    lines.push(`  ${paint.red("error")}: ${device.error.message}`);
    if (device.error.hint !== undefined) lines.push(`    ${paint.cyan("->")} ${device.error.hint}`);
  }
  return lines.join("\n");
}

function configText(config: ProbedDevice["config"]): string | undefined {
  if (config === null) return undefined;
  const set = Object.entries(config).filter(([, value]) => value !== 0);
  return set.map(([name, value]) => `${name} ${value}`).join(", ");
}

function verdictLines(what: string, { possible, reasons, caveats }: Verdict, paint: Paint): string[] {
  const lines = [`  ${what}: ${possible ? paint.green("possible") : paint.red("not possible")}`];
  for (const { text, remedy } of [...reasons, ...caveats]) lines.push(`    ${text}`, `      ${paint.cyan("->")} ${remedy}`);
  return lines;
}
