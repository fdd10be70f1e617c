/** The loop of mode used: the device reads the guest's descriptors, and the private copies go into the pool. */
import * as S from "./state";
import { Env, Queue } from "./state";
import { takeSplit } from "./inflight";
import { contains } from "./memory";

/** As shadowLoop. */
export function headsLoop(q: Queue, e: Env): u32 {
  const num = q.guestNum;
  const mask = num - 1;
  const desc = q.guestDesc;
  const ring = q.guestAvail + 4;
  const outRing = q.deviceAvail + 4;
  const segments = q.segments;
  const records = q.records;
  const taken = q.taken;
  const recorded = q.inflightAt != 0;
  const start = q.guestNext;
  const seen = q.guestSeen;
  let position = start;
  let next = q.deviceNext;
  let poolHead = q.poolHead;
  let left = q.poolFree;
  let order = q.order;
  let first = e.lastFirst;
  let size = e.lastEnd - first;
  let heads = q.deviceNum - q.inflight;
  while (position != seen && heads > 0) {
    const head = <u32>load<u16>(ring + ((position & mask) << 1));
    if (head >= num || load<u16>(taken + (head << 1)) != 0) break;
    let index = head;
    let to = poolHead;
    let room = left;
    let steps = num;
    let writing: u32 = 0;
    let bytes: u64 = 0;
    let whole = false;
    for (;;) {
      if (room == 0 || steps == 0) break;
      const at = desc + (index << 4);
      const address = load<u64>(at);
      const rest = load<u64>(at, 8);
      const length = rest & 0xffffffff;
      const flags = <u32>(rest >> 32) & 7;
      const offset = address - first;
      if (offset >= size || length > size - offset) {
        if (address > S.LIMIT - length || !contains(e, address, <u32>length)) break;
        first = e.lastFirst;
        size = e.lastEnd - first;
      }
      if (length == 0 || flags >= S.F_INDIRECT || (flags & S.F_WRITE) < writing) break;
      writing = flags & S.F_WRITE;
      bytes += length;
      room--;
      steps--;
      const segment = segments + (to << 4);
      const following = load<u32>(segment, 12) & S.LINK_INDEX;
      store<u64>(segment, address);
      store<u64>(segment, length | <u64>(following | flags << 30) << 32, 8);
      to = following;
      if ((flags & S.F_NEXT) == 0) {
        whole = true;
        break;
      }
      index = <u32>(rest >> 48);
      if (index >= num) break;
    }
    if (!whole || bytes > S.CHAIN_LIMIT) break;
    const record = records + (head << 4);
    store<u64>(record, <u64>head | <u64>poolHead << 32);
    store<u32>(record, order, 8);
    order++;
    if (recorded) takeSplit(q, head);
    store<u16>(taken + (head << 1), 1);
    store<u16>(outRing + ((next & mask) << 1), <u16>head);
    next++;
    poolHead = to;
    left = room;
    heads--;
    position = (position + 1) & 0xffff;
  }
  const moved = (position - start) & 0xffff;
  q.guestNext = position;
  q.deviceNext = next & 0xffff;
  q.poolHead = poolHead;
  q.poolFree = left;
  q.order = order;
  q.inflight += moved;
  q.open += moved;
  return moved;
}
