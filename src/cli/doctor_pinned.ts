/**
 * `svq doctor` about guest memory that a device pins and that the VMM may give back to the host: running relays say whether
 * their device pins, and QEMUs that are named are asked for balloons and virtio-mem.
 *
 * @module
 */
import { SvqError, toErrorRecord } from "../errors.ts";
import { type ReclaimingDevice, reclaimingDevices } from "../migration/pinned_memory.ts";
import { QmpClient } from "../migration/qmp.ts";
import { ControlClient } from "../relay/control.ts";
import { controlPath, relayNames } from "../relay/runtime_dir.ts";
import type { RelayStatus } from "../relay/status.ts";
import type { Check } from "./doctor.ts";

const QMP_MS = 5000;

/** A QEMU that was asked. */
export interface AskedVm {
  /** Its monitor. */
  path: string;
  /** What of it gives guest memory back, or why that is not known. */
  devices: ReclaimingDevice[] | Error;
}

/** Names of the running relays whose device pins guest memory. */
export async function pinningRelays(): Promise<string[]> {
  const names: string[] = [];
  for (const name of relayNames()) {
    try {
      using client = ControlClient.connect(name, controlPath(name));
      const { pins_memory } = await client.call("status") as RelayStatus;
      if (pins_memory === true) names.push(name);
    } catch (error) {
      // A socket that a dead relay left behind.
      if (!(error instanceof SvqError)) throw error;
    }
  }
  return names;
}

/** Asks a QEMU over its monitor, which must be free. */
export async function askVm(path: string): Promise<AskedVm> {
  try {
    await using qmp = await QmpClient.connect(path, { timeoutMs: QMP_MS });
    return { path, devices: await reclaimingDevices(qmp) };
  } catch (error) {
    return { path, devices: error instanceof Error ? error : new Error(String(error)) };
  }
}

/** The checks. Without a relay that pins, a balloon does no harm yet. @param relays see {@linkcode pinningRelays} */
export function pinnedChecks(relays: readonly string[], vms: readonly AskedVm[]): Check[] {
  const required = relays.length > 0;
  const who = required ? `relay ${relays.join(", ")} pins guest memory` : "no relay pins guest memory now";
  if (vms.length === 0) {
    if (!required) return [];
    const remedy = "see whether the VM has a balloon or virtio-mem: svq doctor --qmp SOCKET (QEMU's -qmp unix:SOCKET,server=on,wait=off)";
    return [{ name: "pinned-memory", status: "unknown", required: false, found: who, remedy }];
  }
  return vms.map(({ path, devices }, index) => {
    const name = vms.length === 1 ? "pinned-memory" : `pinned-memory-${index}`;
    if (devices instanceof Error) {
      return {
        name,
        status: "unknown",
        required,
        found: toErrorRecord(devices).message,
        remedy: `is ${path} the monitor of a running QEMU?`,
      };
    }
    if (devices.length === 0) return { name, status: "ok", required, found: `${path}: nothing gives guest memory back; ${who}` };
    const list = devices.map((one) => `${one.path} (${one.kind}${one.freePageReporting ? " with free page reporting" : ""})`);
    const remedy = "start the VM without it where a device pins guest memory: the device would go on with pages that the guest has no more";
    return { name, status: "missing", required, found: `${path}: ${list.join(", ")}; ${who}`, remedy };
  });
}
