/**
 * Questions to running relays.
 *
 * @module
 */
import { ControlClient } from "../relay/control.ts";
import { controlPath } from "../relay/runtime_dir.ts";
import type { RelayStatus } from "../relay/status.ts";

/** The status of the relay `name`. @throws SvqError NO_SUCH_RELAY */
export async function askStatus(name: string): Promise<RelayStatus> {
  using client = ControlClient.connect(name, controlPath(name));
  return await client.call("status") as RelayStatus;
}
