/** From the guest's ring to the device's. */
import * as S from "./state";
import { fail, Queue } from "./state";
import { takePacked, takeSplit } from "./inflight";
import { lookSplit } from "./notify";
import { headsLoop, shadowLoop } from "./offer_loop";
import { place } from "./place";
import * as walk from "./walk";

function takeAllSplit(q: Queue): i32 {
  const e = q.env;
  const num = q.guestNum;
  const mask = num - 1;
  const inOrder = (q.guestInOrder | q.deviceInOrder) != 0;
  const heads = q.deviceKind == S.KIND_HEADS && !inOrder;
  const shadow = q.deviceKind == S.KIND_SPLIT && e.identity != 0 && !inOrder;
  let moved: u32 = 0;
  for (;;) {
    if (q.guestNext == q.guestSeen) {
      const ahead = lookSplit(q);
      if (ahead < 0) return ahead;
      if (ahead == 0) break;
    }
    if (shadow) moved += shadowLoop(q, e);
    else if (heads) moved += headsLoop(q, e);
    const position = q.guestNext;
    if (position == q.guestSeen) continue;
    const head = <u32>load<u16>(q.guestAvail + 4 + ((position & mask) << 1));
    if (head >= num) {
      q.errorValue = head;
      return fail(q, S.HEAD_OUT_OF_RANGE, position);
    }
    const taken = q.taken + (head << 1);
    if (load<u16>(taken) != 0) return fail(q, S.HEAD_IN_FLIGHT, head);
    const error = walk.walkSplit(q, e, head);
    if (error < 0) return error;
    const id = place(q, e, head);
    if (id == S.FULL) return <i32>moved | S.IS_FULL;
    if (id == S.GROW) return <i32>moved | S.MUST_GROW;
    if (id < 0) return id;
    if (q.inflightAt != 0) takeSplit(q, head);
    if (q.guestInOrder) store<u16>(q.guestOrder + ((position & mask) << 1), <u16>head);
    store<u16>(taken, 1);
    q.guestNext = (position + 1) & 0xffff;
    q.open++;
    moved++;
  }
  return <i32>moved;
}

function takeAllPacked(q: Queue): i32 {
  const e = q.env;
  const num = q.guestNum;
  let moved: u32 = 0;
  for (;;) {
    const head = q.guestNext;
    const headFlags = <u32>atomic.load<u16>(q.guestDesc + (head << 4), 14);
    if (q.openSlots == num || !walk.available(headFlags, q.guestSeen)) break;
    const guestId = walk.walkPacked(q, e, head, headFlags);
    if (guestId < 0) return guestId;
    if (<u32>guestId >= num) {
      q.errorValue = <u32>guestId;
      return fail(q, S.PACKED_ID_OUT_OF_RANGE, head);
    }
    const taken = q.taken + (<u32>guestId << 1);
    if (load<u16>(taken) != 0) return fail(q, S.PACKED_ID_IN_FLIGHT, <u32>guestId);
    const slots = walk.slots;
    const id = place(q, e, <u32>guestId);
    if (id == S.FULL) return <i32>moved | S.IS_FULL;
    if (id == S.GROW) return <i32>moved | S.MUST_GROW;
    if (id < 0) return id;
    if (q.inflightAt != 0) takePacked(q, e, <u32>guestId);
    if (q.guestInOrder) store<u16>(q.guestOrder + (head << 1), <u16>guestId);
    store<u16>(taken, <u16>slots);
    q.open++;
    q.openSlots += slots;
    q.guestNext = head + slots;
    if (q.guestNext >= num) {
      q.guestNext -= num;
      q.guestSeen ^= 1;
    }
    moved++;
  }
  return <i32>moved;
}

/** Takes what the guest has made available into the device's ring, which does not show it yet. */
export function take(q: Queue): i32 {
  return q.guestPacked ? takeAllPacked(q) : takeAllSplit(q);
}
