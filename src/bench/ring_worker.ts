/**
 * One contender of `svq bench ring` in a Worker of its own: no code is shared that another contender's shapes would slow down.
 *
 * @module
 */
import { toErrorRecord } from "../errors.ts";
import type { RingReply, RingRequest } from "./ring_messages.ts";
import { BareSyscalls } from "./ring_eventfds.ts";
import { RingRig } from "./ring_rig.ts";

const scope = self as unknown as { onmessage: ((event: MessageEvent<RingRequest>) => void) | null; postMessage(message: RingReply): void };
let rig: RingRig | BareSyscalls | undefined;

/** What a pair of timer readings costs, ms: the median of many. */
function timerCost(): number {
  const costs = new Float64Array(2001);
  for (let i = 0; i < costs.length; i++) {
    const t0 = performance.now();
    const t1 = performance.now();
    costs[i] = t1 - t0;
  }
  return costs.sort()[costs.length >> 1]!;
}

function measure(rig: RingRig | BareSyscalls, { workload, batch, ms }: Extract<RingRequest, { type: "measure" }>): number {
  if (rig instanceof RingRig) rig.clearLog();
  const cost = timerCost();
  // The median round: what else the machine does stretches some rounds by milliseconds, and says nothing of the relay.
  const times = new Float64Array(65536);
  let rounds = 0;
  const end = performance.now() + ms;
  do {
    for (let i = 0; i < 16; i++) times[rounds++] = rig.round(workload, batch);
  } while (rounds < times.length && performance.now() < end);
  if (rig instanceof RingRig && !rig.logged(workload, 16 * batch)) throw new Error("a written page is not in the dirty log");
  return Math.max(0, times.subarray(0, rounds).sort()[rounds >> 1]! - 2 * cost) * 1e6 / batch;
}

function answer(request: RingRequest): RingReply {
  switch (request.type) {
    case "open":
      rig = request.ring.core === "syscalls" ? new BareSyscalls() : new RingRig(request.ring);
      return {};
    case "measure":
      return { ns: measure(rig!, request) };
    case "close":
      rig?.[Symbol.dispose]();
      return {};
  }
}

scope.onmessage = ({ data }) => {
  try {
    scope.postMessage(answer(data));
  } catch (error) {
    scope.postMessage({ error: toErrorRecord(error) });
  }
};
