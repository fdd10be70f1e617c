/**
 * Balloon, virtio-mem and free page reporting on a guest whose memory a device pins.
 *
 * They give pages of the guest back to the host and take fresh ones later. A device that pinned the old pages goes on using
 * those: reads and writes of the guest's buffers miss each other, without any error. A VMM that has the device itself knows
 * and forbids it; behind vhost-user it does not know, so it is asked here.
 *
 * @module
 */
import { QmpError } from "./qmp.ts";
import type { Check, RelayFacts } from "./vm_checks.ts";

/** A device of the VMM that gives the guest's memory back to the host. */
export interface ReclaimingDevice {
  /** Path in QEMU's object tree. */
  path: string;
  /** What it is. */
  kind: "balloon" | "virtio-mem";
  /** Does it take free pages without being told, too? */
  freePageReporting: boolean;
}

/** The part of a QMP client that is needed. */
export interface Asker {
  /** Runs a command. @throws QmpError when QEMU refuses it */
  execute(command: string, args?: Record<string, unknown>): Promise<unknown>;
}

const CONTAINERS = ["/machine/peripheral", "/machine/peripheral-anon"];

/** The devices of a QEMU that give guest memory back. @throws SvqError QMP_CLOSED, QMP_TIMEOUT */
export async function reclaimingDevices(qmp: Asker): Promise<ReclaimingDevice[]> {
  const found: ReclaimingDevice[] = [];
  for (const container of CONTAINERS) {
    const children = await ifKnown(qmp.execute("qom-list", { path: container }));
    if (!Array.isArray(children)) continue;
    for (const { name, type } of children as { name: unknown; type: unknown }[]) {
      const kind = kindOf(String(type));
      if (kind === undefined) continue;
      const path = `${container}/${name}`;
      const reporting = kind === "balloon" && await ifKnown(qmp.execute("qom-get", { path, property: "free-page-reporting" })) === true;
      found.push({ path, kind, freePageReporting: reporting });
    }
  }
  return found;
}

/** By the type of a child, `child<virtio-balloon-pci>` and the like. */
function kindOf(type: string): ReclaimingDevice["kind"] | undefined {
  if (/^child<virtio-balloon/.test(type)) return "balloon";
  return /^child<virtio-mem/.test(type) ? "virtio-mem" : undefined;
}

async function ifKnown(answer: Promise<unknown>): Promise<unknown> {
  try {
    return await answer;
  } catch (error) {
    if (error instanceof QmpError) return undefined;
    throw error;
  }
}

/**
 * Checks one side of a migration.
 *
 * @param side for the messages
 * @param relays this side's
 * @param devices this side's, by {@linkcode reclaimingDevices}
 */
export function checkPinnedMemory(
  side: "source" | "destination",
  relays: readonly RelayFacts[],
  devices: readonly ReclaimingDevice[],
): Check[] {
  const pinning = relays.filter(({ status }) => status?.pins_memory === true);
  if (pinning.length === 0) return [];
  const who = `Relay ${pinning.map(({ name }) => name).join(", ")} (${side})`;
  const code = "PINNED_MEMORY";
  if (devices.length === 0) {
    return [{ code, ok: true, message: `${who}: the device pins the guest's memory, and nothing gives it back to the host` }];
  }
  return devices.map(({ path, kind, freePageReporting }) => ({
    code,
    ok: false,
    message: `${who}: the device pins the guest's memory, and ${path} (${kind}${
      freePageReporting ? " with free page reporting" : ""
    }) gives memory back to the host: the device would go on with pages that the guest has no more`,
    hint: "start the guest without it; --skip-check PINNED_MEMORY where you know that it is never used",
  }));
}

/** Asks a QEMU, where one of its relays' devices pins memory, and checks. @throws SvqError QMP_CLOSED, QMP_TIMEOUT */
export async function pinnedMemoryChecks(side: "source" | "destination", qmp: Asker, relays: readonly RelayFacts[]): Promise<Check[]> {
  if (!relays.some(({ status }) => status?.pins_memory === true)) return [];
  return checkPinnedMemory(side, relays, await reclaimingDevices(qmp));
}
