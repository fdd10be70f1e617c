/** Publishing what was moved, and whether the other side wants to be told. */
import * as S from "./state";
import { fail, Queue } from "./state";
import { flushed } from "./inflight";
import { store16, store32 } from "./ordered";
import { available } from "./walk";

// @ts-ignore: decorator
@inline
function eventPassed(event: u32, now: u32, old: u32): bool {
  return ((now - event - 1) & 0xffff) < ((now - old) & 0xffff);
}

function packedEventWanted(word: u32, eventIdx: u32, num: u32, slot: u32, wrap: u32, passed: u32): bool {
  const flags = (word >>> 16) & 3;
  if (flags == 1) return false;
  // The reserved value, and a request that was not negotiated, are answered with a notification: it does no harm.
  if (flags != 2 || !eventIdx) return true;
  let event = word & 0x7fff;
  if (((word >>> 15) & 1) != wrap) event -= num;
  return ((slot - event - 1) & 0xffff) < passed;
}

/** Makes added chains visible to the device. @returns NOTIFY when it wants a kick */
export function publish(q: Queue): i32 {
  if (q.deviceKind == S.KIND_PACKED) {
    if (q.batchSlot < 0) return 0;
    store16(q.deviceDesc + (<u32>q.batchSlot << 4) + 14, q.batchFlags);
    const passed = q.batchSlots;
    q.batchSlot = -1;
    q.batchSlots = 0;
    const event = atomic.load<u32>(q.deviceUsed);
    return packedEventWanted(event, q.deviceEventIdx, q.deviceNum, q.deviceNext, q.devicePublished, passed) ? S.NOTIFY : 0;
  }
  const old = q.devicePublished;
  const now = q.deviceNext;
  if (now == old) return 0;
  store16(q.deviceAvail + 2, now);
  q.devicePublished = now;
  const wanted = q.deviceEventIdx
    ? eventPassed(atomic.load<u16>(q.deviceUsed + 4 + (q.deviceNum << 3)), now, old)
    : (atomic.load<u16>(q.deviceUsed) & 1) == 0;
  return wanted ? S.NOTIFY : 0;
}

/** Publishes the `moved` chains that were given back. @returns NOTIFY when the guest wants a call */
export function flush(q: Queue, moved: u32): i32 {
  // With IN_ORDER what is done may have to wait for its turn.
  if (moved == 0) return 0;
  q.open -= moved;
  q.usedChains = 0;
  let wanted: bool;
  if (!q.guestPacked) {
    const old = q.guestUsedSeen;
    const now = q.guestUsedNext;
    store16(q.guestUsed + 2, now);
    q.guestUsedSeen = now;
    wanted = q.guestEventIdx
      ? eventPassed(atomic.load<u16>(q.guestAvail + 4 + (q.guestNum << 1)), now, old)
      : (atomic.load<u16>(q.guestAvail) & 1) == 0;
  } else {
    store16(q.guestDesc + (<u32>q.usedSlot << 4) + 14, q.usedFlags);
    const passed = q.usedSlots;
    q.openSlots -= passed;
    q.usedSlot = -1;
    q.usedSlots = 0;
    const event = atomic.load<u32>(q.guestAvail);
    wanted = packedEventWanted(event, q.guestEventIdx, q.guestNum, q.guestUsedNext, q.guestUsedSeen, passed);
  }
  if (q.inflightAt != 0) flushed(q);
  return wanted ? S.NOTIFY : 0;
}

/** Has the guest made chains available in its split ring? @returns how many, or an error */
export function lookSplit(q: Queue): i32 {
  const idx = <u32>atomic.load<u16>(q.guestAvail, 2);
  const ahead = (idx - q.guestNext) & 0xffff;
  if (ahead > q.guestNum) {
    q.errorValue = q.guestNext;
    return fail(q, S.AVAIL_INDEX_JUMP, idx);
  }
  q.guestSeen = idx;
  return <i32>ahead;
}

/** Is there something used in the device's ring? @returns not 0 when there is, or an error */
export function lookUsed(q: Queue): i32 {
  if (q.deviceKind == S.KIND_PACKED) {
    if (q.inflight == 0) return 0;
    const flags = <u32>atomic.load<u16>(q.deviceDesc + (q.deviceUsedNext << 4), 14);
    return (flags & S.PACKED_STATE) == (q.deviceUsedSeen == 1 ? S.PACKED_STATE : 0) ? 1 : 0;
  }
  const idx = <u32>atomic.load<u16>(q.deviceUsed, 2);
  const ahead = (idx - q.deviceUsedNext) & 0xffff;
  if (ahead > ((q.devicePublished - q.deviceUsedNext) & 0xffff)) {
    q.errorValue = q.deviceUsedNext;
    return fail(q, S.USED_INDEX_JUMP, idx);
  }
  q.deviceUsedSeen = idx;
  return <i32>ahead;
}

/** Tells the device that calls are not needed. */
export function disableCalls(q: Queue): void {
  if (q.deviceKind == S.KIND_PACKED) store32(q.deviceAvail, 1 << 16);
  else if (q.deviceEventIdx) store16(q.deviceAvail + 4 + (q.deviceNum << 1), q.deviceUsedNext - 1);
  else store16(q.deviceAvail, 1);
}

/** Asks for calls. @returns whether used chains arrived meanwhile, or an error */
export function enableCalls(q: Queue): i32 {
  // Sequentially consistent store, then load: a device that uses a chain after this load sees the request.
  if (q.deviceKind == S.KIND_PACKED) {
    store32(q.deviceAvail, q.deviceEventIdx ? q.deviceUsedNext | q.deviceUsedSeen << 15 | 2 << 16 : 0);
  } else if (q.deviceEventIdx) {
    store16(q.deviceAvail + 4 + (q.deviceNum << 1), q.deviceUsedNext);
  } else {
    store16(q.deviceAvail, 0);
  }
  return lookUsed(q);
}

/** Tells the guest that kicks are not needed. */
export function disableKicks(q: Queue): void {
  if (q.guestPacked) store32(q.guestUsed, 1 << 16);
  else if (q.guestEventIdx) store16(q.guestUsed + 4 + (q.guestNum << 3), q.guestNext - 1);
  else store16(q.guestUsed, 1);
}

/** Asks for kicks. @returns whether chains arrived meanwhile, or an error */
export function enableKicks(q: Queue): i32 {
  if (q.guestPacked) {
    store32(q.guestUsed, q.guestEventIdx ? q.guestNext | q.guestSeen << 15 | 2 << 16 : 0);
    if (q.openSlots == q.guestNum) return 0;
    return available(<u32>atomic.load<u16>(q.guestDesc + (q.guestNext << 4), 14), q.guestSeen) ? 1 : 0;
  }
  if (q.guestEventIdx) store16(q.guestUsed + 4 + (q.guestNum << 3), q.guestNext);
  else store16(q.guestUsed, 0);
  return lookSplit(q);
}
