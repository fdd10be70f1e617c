/**
 * Which rules a copied ring breaks. Only what is sure is reported: chains that are certainly outstanding, entries that were
 * certainly written. What depends on the past that the ring still holds assumes that no side is in the middle of a batch
 * (it has written entries that it has not published yet); whoever looks at a running ring asks twice and believes what
 * both looks show.
 *
 * @module
 */
import { walkChain } from "./chain_walk.ts";
import { isRingSize, knownLastAvail, type OutstandingChains, outstandingChains, packedAdvance, packedEnd, RingView } from "./inspect.ts";
import { packedLayout, splitLayout, VRING_PACKED_EVENT_FLAG_DESC } from "./layout.ts";
import { packedDistance } from "./packed_event.ts";
import { type Anomaly, anomaly } from "./rules.ts";
import type { RingSnapshot } from "./snapshot.ts";

/** How {@linkcode verifyRing} looks. */
export interface VerifyOptions {
  /** Also apply the rules that need the past in the ring; default true. */
  history?: boolean;
}

/** The rules that a snapshot breaks; of a torn one only those that nothing can tear. */
export function verifyRing(snapshot: RingSnapshot, options: VerifyOptions = {}): Anomaly[] {
  const found = verifyShape(snapshot);
  if (found.length > 0) return found;
  const view = new RingView(snapshot);
  if (!snapshot.consistent) return view.layout === "split" ? splitFlags(view) : packedEvents(view);
  const history = options.history ?? true;
  return view.layout === "split" ? verifySplit(view, history) : verifyPacked(view, history);
}

/** Is the ring of a legal size, and are its parts aligned and long enough? Only then can a {@linkcode RingView} be trusted. */
export function verifyShape(snapshot: RingSnapshot): Anomaly[] {
  const { layout, num, addresses } = snapshot;
  if (!isRingSize(layout, num)) return [anomaly("RING_SIZE", null, `A ${layout} ring of ${num} descriptors`)];
  const parts = layout === "packed" ? packedLayout(num) : splitLayout(num);
  const found: Anomaly[] = [];
  for (const name of ["desc", "avail", "used"] as const) {
    const { size, align } = parts[name];
    const have = snapshot[name].length;
    // The event words at the end are there only where they were negotiated.
    const need = layout === "split" && name !== "desc" && !snapshot.eventIdx ? size - 2 : size;
    if (have < need) found.push(anomaly("RING_ALIGNMENT", null, `The ${name} part has ${have} bytes and needs ${need}`));
    const address = addresses?.[name];
    if (address !== undefined && address % align !== 0) {
      found.push(anomaly("RING_ALIGNMENT", null, `The ${name} part lies at 0x${address.toString(16)}, which is no multiple of ${align}`));
    }
  }
  return found;
}

function splitFlags(view: RingView): Anomaly[] {
  const found: Anomaly[] = [];
  const allowed = view.snapshot.eventIdx ? 0 : 1;
  for (const [name, flags] of [["avail", view.avail[0]!], ["used", view.used[0]!]] as const) {
    if (flags > allowed) {
      const why = view.snapshot.eventIdx ? " with EVENT_IDX" : "";
      found.push(anomaly("SUPPRESSION_FLAGS", null, `The flags of the ${name} ring are 0x${flags.toString(16)}${why}`));
    }
  }
  return found;
}

function verifySplit(view: RingView, history: boolean): Anomaly[] {
  const found = [...splitFlags(view), ...splitIndices(view)];
  if (view.outstanding > view.num) return found;
  found.push(...availEntries(view), ...usedEntries(view));
  if (history) found.push(...usedTwice(view));
  found.push(...notTaken(view));
  const known = outstandingChains(view);
  found.push(...splitChains(view, known, history));
  return found;
}

// What moved too far: the side whose index is not explained by the other one's.
function splitIndices(view: RingView): Anomaly[] {
  const { num, availIdx, usedIdx, outstanding } = view;
  const { lastAvail, lastUsed } = view.snapshot.positions;
  const found: Anomaly[] = [];
  const text = `avail index ${availIdx}, used index ${usedIdx}, queue size ${num}`;
  const reached = lastAvail ?? usedIdx;
  const usedAhead = (usedIdx - (lastAvail ?? availIdx)) & 0xffff;
  if (((availIdx - reached) & 0xffff) > num && !(lastAvail === null && usedAhead <= num)) {
    found.push(anomaly("AVAIL_INDEX_JUMP", availIdx, lastAvail === null ? text : `${text}, the device has reached ${lastAvail}`));
  } else if (usedAhead > 0 && usedAhead <= num && (lastAvail !== null || outstanding > num)) {
    found.push(anomaly("USED_INDEX_JUMP", usedIdx, lastAvail === null ? text : `${text}, the device has reached ${lastAvail}`));
  } else if (lastAvail !== null && (((lastAvail - usedIdx) & 0xffff) > num || outstanding > num)) {
    found.push(anomaly("BASE_INVALID", lastAvail, `${text}, the device has reached ${lastAvail}`));
  }
  if (lastUsed !== null && ((usedIdx - lastUsed) & 0xffff) > ((availIdx - lastUsed) & 0xffff) && outstanding <= num) {
    found.push(anomaly("USED_INDEX_JUMP", usedIdx, `${text}, the driver has reached ${lastUsed}`));
  }
  return found;
}

function availEntries(view: RingView): Anomaly[] {
  const { num, availIdx, outstanding } = view;
  const found: Anomaly[] = [];
  for (let back = outstanding; back > 0; back--) {
    const position = (availIdx - back) & 0xffff;
    const head = view.availAt(position);
    if (head >= num) found.push(anomaly("HEAD_OUT_OF_RANGE", position, `Avail entry ${position} holds ${head} in a queue of ${num}`));
  }
  return found;
}

function usedEntries(view: RingView): Anomaly[] {
  const { num, usedIdx, outstanding } = view;
  const found: Anomaly[] = [];
  // The elements before these may be under the device's pen for the next batch.
  for (let back = num - outstanding; back > 0; back--) {
    const position = (usedIdx - back) & 0xffff;
    const id = view.usedAt(position);
    if (id >= num) found.push(anomaly("USED_ID_OUT_OF_RANGE", position, `Used entry ${position} holds ${id} in a queue of ${num}`));
  }
  return found;
}

// Between two uses of a head it must have been made available, behind the first use and less than a ring's length behind
// the second one.
function usedTwice(view: RingView): Anomaly[] {
  const { num, availIdx, outstanding, snapshot } = view;
  // With IN_ORDER elements inside a batch are not written.
  if (snapshot.inOrder) return [];
  const found: Anomaly[] = [];
  const before = new Map<number, number>();
  for (let use = -num; use < -outstanding; use++) {
    const id = view.usedAt(availIdx + use);
    const first = before.get(id);
    before.set(id, use);
    if (first === undefined || id >= num) continue;
    let made = false;
    for (let position = first + 1; position < Math.min(use + num, 0) && !made; position++) made = view.availAt(availIdx + position) === id;
    const position = (availIdx + use) & 0xffff;
    if (!made) {
      found.push(anomaly("USED_NOT_IN_FLIGHT", position, `Used entry ${position} holds ${id} once more than it was made available`));
    }
  }
  return found;
}

// What the driver has not taken back yet is as the driver wrote it.
function notTaken(view: RingView): Anomaly[] {
  const { usedIdx, availIdx, snapshot } = view;
  const { lastUsed } = snapshot.positions;
  if (lastUsed === null) return [];
  const waiting = (usedIdx - lastUsed) & 0xffff;
  if (waiting > view.num || ((availIdx - lastUsed) & 0xffff) > view.num) return [];
  const found: Anomaly[] = [];
  const seen = new Set<number>();
  for (let at = 0; at < waiting; at++) {
    const position = (lastUsed + at) & 0xffff;
    const id = view.usedAt(position);
    if (id >= view.num) continue;
    if (snapshot.inOrder) {
      let size = 1;
      while (at + size <= waiting && view.availAt(position + size - 1) !== id) size++;
      if (at + size > waiting) {
        found.push(anomaly("IN_ORDER", position, `Used entry ${position} holds ${id}, which is not the next one nor the end of a batch`));
        return found;
      }
      at += size - 1;
    } else if (seen.has(id)) {
      found.push(anomaly("USED_NOT_IN_FLIGHT", position, `Used entry ${position} holds ${id}, which was used before`));
      continue;
    }
    seen.add(id);
    const { writableBytes, problems, indirect } = walkChain(view, id);
    const length = view.usedLengthAt(position);
    const followed = problems.length === 0 && indirect?.entries !== 0;
    if (followed && length > writableBytes) {
      found.push(
        anomaly("USED_LENGTH", position, `Used entry ${position} says ${length} bytes for chain ${id}, which takes ${writableBytes}`),
      );
    }
  }
  return found;
}

function splitChains(view: RingView, known: OutstandingChains, history: boolean): Anomaly[] {
  const found: Anomaly[] = [];
  const lastAvail = knownLastAvail(view);
  for (const { head, position } of known.repeated) {
    if (!history && lastAvail < 0) continue;
    found.push(
      anomaly("HEAD_IN_FLIGHT", head, `Avail entry ${position} holds ${head}, which has not been used since it was made available`),
    );
  }
  const owner = new Map<number, number>();
  for (const { head, certain, taken } of known.chains) {
    // Without the past, only what the device has not taken yet is sure.
    if (!certain || head >= view.num || (!history && taken !== false)) continue;
    const walked = walkChain(view, head);
    found.push(...walked.problems);
    if (walked.problems.some((problem) => problem.rule === "CHAIN_LOOP")) continue;
    for (const index of walked.descriptors) {
      const other = owner.get(index);
      if (other !== undefined) {
        found.push(anomaly("DESCRIPTOR_SHARED", index, `Descriptor ${index} belongs to the chains ${other} and ${head}`));
        break;
      }
      owner.set(index, head);
    }
  }
  return found;
}

function packedEvents(view: RingView): Anomaly[] {
  const found: Anomaly[] = [];
  for (const [name, words] of [["driver", view.avail], ["device", view.used]] as const) {
    const flags = words[1]!;
    const offset = words[0]! & 0x7fff;
    const byDescriptor = flags === VRING_PACKED_EVENT_FLAG_DESC;
    if (flags > 2 || (byDescriptor && !view.snapshot.eventIdx)) {
      const why = byDescriptor ? " without EVENT_IDX" : "";
      found.push(anomaly("PACKED_EVENT_FLAGS", null, `The ${name} event flags are 0x${flags.toString(16)}${why}`));
    } else if (byDescriptor && offset >= view.num) {
      found.push(anomaly("PACKED_EVENT_OFFSET", offset, `The ${name} event offset is ${offset} in a ring of ${view.num}`));
    }
  }
  return found;
}

function verifyPacked(view: RingView, history: boolean): Anomaly[] {
  const { num, snapshot: { positions: { lastAvail, used } } } = view;
  const found = packedEvents(view);
  const text = (position: number | null) => position === null ? "unknown" : `slot ${position & 0x7fff} wrap ${position >>> 15}`;
  const outside = [lastAvail, used].some((position) => position !== null && (position & 0x7fff) >= num);
  if (outside || (lastAvail !== null && used !== null && packedDistance(used, lastAvail, num) < 0)) {
    found.push(
      anomaly("BASE_INVALID", null, `The device's positions are avail ${text(lastAvail)}, used ${text(used)} in a ring of ${num}`),
    );
    return found;
  }
  const driver = view.nextAvail();
  const end = packedEnd(view);
  if (history && !driver.regular) {
    const slot = driver.position & 0x7fff;
    found.push(
      anomaly("PACKED_WRAP_COUNTER", slot, `The wrap counter in the AVAIL bits changes at slot ${slot} and more than once behind it`),
    );
  } else if (history && driver.position !== end.position) {
    const slot = end.position & 0x7fff;
    const detail = `Slot ${slot}, which the device has not reached, is not available; the driver has filled up to ${text(driver.position)}`;
    found.push(anomaly("PACKED_LIST_BROKEN", slot, detail));
  }
  if (end.regular) found.push(...packedUsed(view), ...packedLists(view, end.position, history));
  return found;
}

function packedUsed(view: RingView): Anomaly[] {
  const { num, snapshot: { positions: { lastUsed, used } } } = view;
  const found: Anomaly[] = [];
  for (let slot = 0; slot < num; slot++) {
    if ((view.isUsed(slot, 0) || view.isUsed(slot, 1)) && view.idOf(slot) >= num) {
      found.push(
        anomaly("USED_ID_OUT_OF_RANGE", slot, `The used descriptor in slot ${slot} has id ${view.idOf(slot)} in a queue of ${num}`),
      );
    }
  }
  if (lastUsed === null || used === null || (lastUsed & 0x7fff) >= num) return found;
  const seen = new Set<number>();
  const waiting = packedDistance(lastUsed, used, num);
  for (let at = 0, position = lastUsed; at < waiting; at++, position = packedAdvance(position, 1, num)) {
    const slot = position & 0x7fff;
    if (!view.isUsed(slot, position >>> 15)) continue;
    const id = view.idOf(slot);
    if (seen.has(id)) {
      found.push(anomaly("USED_NOT_IN_FLIGHT", slot, `The used descriptor in slot ${slot} has id ${id}, which was used before`));
    }
    seen.add(id);
  }
  return found;
}

function packedLists(view: RingView, end: number, history: boolean): Anomaly[] {
  const { num } = view;
  const found: Anomaly[] = [];
  const ids = new Set<number>();
  for (const { position, head, certain } of outstandingChains(view).chains) {
    if (!certain && !history) continue;
    const slot = position & 0x7fff;
    const walked = walkChain(view, slot, { wrap: position >>> 15, room: packedDistance(position, end, num) });
    // A list that may have come back is as the driver wrote it, but its indirect table may be something else by now.
    found.push(...(certain || walked.indirect === null ? walked.problems : []));
    if (head >= num) found.push(anomaly("PACKED_ID_OUT_OF_RANGE", slot, `The chain in slot ${slot} has id ${head} in a queue of ${num}`));
    if (certain && ids.has(head)) {
      found.push(anomaly("PACKED_ID_IN_FLIGHT", head, `The chain in slot ${slot} has id ${head}, which is outstanding`));
    }
    if (certain) ids.add(head);
  }
  return found;
}
