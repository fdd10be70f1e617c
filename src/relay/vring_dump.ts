import type { Relay } from "./relay.ts";
export function relayVrings(_name: string, _relay: Relay, _params: Record<string, unknown>): unknown {
  return {};
}
