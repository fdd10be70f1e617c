/** The relay core: what the host calls. Results: chains moved, with flags; negative: an error, FULL or GROW. */
import * as S from "./state";
import { Env, Queue } from "./state";
import { take } from "./forward";
import { mark } from "./memory";
import { flush, publish } from "./notify";
import { place } from "./place";
import { returnAny, returnSplit } from "./return";
import * as walk from "./walk";

export { disableCalls, disableKicks, enableCalls, enableKicks } from "./notify";
export { markHeld } from "./return";
export { take } from "./forward";

/** Offers what the guest has made available to the device. */
export function forward(q: Queue): i32 {
  const moved = take(q);
  return moved < 0 ? moved : moved | publish(q);
}

/** Gives back to the guest what the device has used. */
export function returnUsed(q: Queue): i32 {
  const e = q.env;
  // A log that the host marks is for the general way: no call may be in the other one's loop.
  const split = q.deviceKind != S.KIND_PACKED && !q.guestPacked && (q.guestInOrder | q.deviceInOrder) == 0 && e.logMode != 2;
  const moved = split ? returnSplit(q, e) : returnAny(q, e);
  if (moved <= 0) return moved;
  q.returned += <u32>moved;
  return moved | flush(q, split ? <u32>moved : q.usedChains);
}

/** Begins a chain for `add`. */
export function begin(): void {
  walk.begin();
}

/** Puts a segment of a chain that `add` adds; `begin` comes first. */
export function segment(q: Queue, address: f64, length: u32, writable: u32): void {
  walk.put(q.env, <u64>address, length, writable != 0);
}

/** Adds the chain of `segment`s, which the guest knows by `guestId`. @returns its id, FULL, GROW or an error */
export function add(q: Queue, guestId: u32): i32 {
  return place(q, q.env, guestId);
}

/** Makes what was added visible to the device. @returns not 0 when it wants a kick */
export function publishAdded(q: Queue): i32 {
  return publish(q);
}

/** For the self-test: writes through this module's memory. */
export function poke(address: u32, value: u32): void {
  atomic.store<u32>(address, value);
}

/** For the self-test: reads through this module's memory. */
export function peek(address: u32): u32 {
  return atomic.load<u32>(address);
}

/** For tests: marks a range. @returns 0 when it left the log */
export function markRange(e: Env, address: f64, length: u32): u32 {
  return mark(e, <u64>address, length) ? 1 : 0;
}
