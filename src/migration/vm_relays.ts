/**
 * The relays on both sides of a migration between two VMMs: their status, and whether the destination went on exactly where
 * the source stopped.
 *
 * @module
 */
import { SvqError, toErrorRecord } from "../errors.ts";
import { ControlClient } from "../relay/control.ts";
import { layoutOf } from "../relay/premap.ts";
import { controlPath } from "../relay/runtime_dir.ts";
import type { RelayStatus } from "../relay/status.ts";
import { isRunning, type RelayFacts } from "./vm_checks.ts";

/** Where a queue stood on both sides. */
export interface RingPosition {
  /** Relay at the source. */
  source: string;
  /** Relay at the destination. */
  destination: string;
  /** Queue. */
  index: number;
  /** Vring base that the source's VMM got; null: it has not stopped the queue. */
  sourceBase: number | null;
  /** Vring base that the destination's VMM set; null: it has not started the queue. */
  destinationBase: number | null;
  /** Undefined while the destination has not started the queue and need not. */
  agree: boolean | undefined;
}

/** Asks a relay for its status. @param name its name, or the path of its control socket @throws SvqError NO_SUCH_RELAY */
export async function relayStatus(name: string): Promise<RelayStatus> {
  using client = ControlClient.connect(name, name.includes("/") ? name : controlPath(name));
  return await client.call("status") as RelayStatus;
}

/**
 * Takes what was set through a network device's control queue from one relay to the other, whose guest has not started: the device
 * there is brought to it first. A source without such a queue has nothing to take along.
 *
 * @throws SvqError NO_CONTROL_QUEUE where a guest's settings cannot be set there
 */
export async function carryNetState(source: string, destination: string): Promise<void> {
  const { net } = await relayStatus(source);
  // A relay of another version says nothing of it.
  if (net === null || net === undefined) return;
  using from = ControlClient.connect(source, controlPath(source));
  using to = ControlClient.connect(destination, controlPath(destination));
  try {
    await to.call("set", { net_state: await from.call("net_state") });
  } catch (error) {
    // What a relay has set of its own accord, the other one need not.
    if (!(net.control === "relay" && error instanceof SvqError && error.code === "NO_CONTROL_QUEUE")) throw error;
  }
}

/**
 * Lets the destination's relay take its guest's memory before the guest stands still. It can do without: what is in the way comes
 * back as words.
 */
export async function takeMemoryEarly(source: string, destination: string): Promise<string | undefined> {
  try {
    const regions = layoutOf((await relayStatus(source)).memory ?? []);
    if (regions.length === 0) return undefined;
    using to = ControlClient.connect(destination, destination.includes("/") ? destination : controlPath(destination));
    await to.call("premap", { regions });
    return undefined;
  } catch (error) {
    // A relay of another version does not know it.
    if (error instanceof SvqError && error.code === "CONTROL_METHOD") return undefined;
    return `Relay ${destination} takes the guest's memory when it starts: ${toErrorRecord(error).message}`;
  }
}

/** The status of a relay, or why there is none. */
export async function relayFacts(name: string): Promise<RelayFacts> {
  try {
    return { name, status: await relayStatus(name) };
  } catch (error) {
    if (!(error instanceof SvqError)) throw error;
    return { name, error };
  }
}

/** Has a relay left its logging modes: no dirty log, and each running queue in the mode in which it was before? */
export function isBack(status: RelayStatus, before: RelayStatus): boolean {
  const modes = new Map(before.queues.filter(isRunning).map(({ index, mode }) => [index, mode]));
  const same = ({ index, mode }: RelayStatus["queues"][number]) => !modes.has(index) || modes.get(index) === mode;
  return !status.logging && !status.marking_all && status.queues.filter(isRunning).every(same);
}

/**
 * Compares both sides, queue by queue.
 *
 * @param before the source's status before the migration: queues that ran then moved, or had been stopped with the guest
 * @param source its status after
 * @param destination the other relay's status after
 * @param paused the destination does not run the guest yet, so its queues need not have started
 */
export function ringPositions(before: RelayStatus, source: RelayStatus, destination: RelayStatus, paused: boolean): RingPosition[] {
  const moved = before.queues.filter((queue) => isRunning(queue) || (queue.start_base !== null && queue.last_base !== null));
  return moved.map(({ index }) => {
    const sourceBase = source.queues.find((queue) => queue.index === index)?.last_base ?? null;
    const destinationBase = destination.queues.find((queue) => queue.index === index)?.start_base ?? null;
    const waiting = paused && destinationBase === null && sourceBase !== null;
    return {
      source: source.name,
      destination: destination.name,
      index,
      sourceBase,
      destinationBase,
      agree: waiting ? undefined : sourceBase !== null && sourceBase === destinationBase,
    };
  });
}
