/**
 * Saved queue states come from files, sockets and other hosts: they are checked here before a queue takes them over.
 *
 * @module
 */
import type { DeviceQueueState, DriverQueueState, InflightRecord, OutstandingRecord, RingFormat } from "./queue.ts";
import { packedDistance } from "./packed_event.ts";
import { VringError } from "./rules.ts";

function bad(what: string): never {
  throw new VringError("STATE_INVALID", -1, `Saved ring state: ${what}`);
}

function record(value: unknown, what: string): Record<string, unknown> {
  if (typeof value !== "object" || value === null || Array.isArray(value)) bad(`${what} is no record`);
  return value as Record<string, unknown>;
}

function integer(value: unknown, max: number, what: string): number {
  if (!(typeof value === "number" && Number.isInteger(value) && value >= 0 && value <= max)) {
    bad(`${what} is no integer from 0 to ${max}`);
  }
  return value;
}

function list(value: unknown, max: number, what: string): unknown[] {
  if (!Array.isArray(value)) bad(`${what} is no list`);
  if (value.length > max) bad(`${what} has ${value.length} entries, the queue holds ${max}`);
  return value;
}

function header(state: unknown, format: RingFormat, side: "device" | "driver", num: number): Record<string, unknown> {
  const fields = record(state, "it");
  if (fields.layout !== format || fields.side !== side) {
    bad(`it is for the ${String(fields.side)}'s side of a ${String(fields.layout)} ring, not the ${side}'s of a ${format} one`);
  }
  if (fields.num !== num) bad(`it is for a queue of ${String(fields.num)}, not ${num}`);
  return fields;
}

/**
 * Checks the saved state of a device's side.
 *
 * @param inOrder whether held chains (`written`) can be in it
 * @throws VringError STATE_INVALID
 */
export function readDeviceState(state: unknown, format: RingFormat, num: number, inOrder: boolean): DeviceQueueState {
  const fields = header(state, format, "device", num);
  const packed = format === "packed";
  const base = integer(fields.base, packed ? 0xffff_ffff : 0xffff, "base");
  const used = integer(fields.used, 0xffff, "used");
  const avail = base & 0xffff;
  if (packed && ((avail & 0x7fff) >= num || (used & 0x7fff) >= num)) bad("a slot lies outside the ring");
  if (packed && base >>> 16 !== used) bad("base and used disagree");
  const between = packed ? packedDistance(used, avail, num) : (avail - used) & 0xffff;
  if (between < 0 || between > num) bad(`base ${base} and used ${used} are further apart than the queue is long`);
  const ids = new Set<number>();
  let youngest = 2 ** 53;
  let slots = 0;
  const inflight = list(fields.inflight, num, "inflight").map((value): InflightRecord => {
    const entry = record(value, "a chain in flight");
    const id = integer(entry.id, num - 1, "id");
    const age = integer(entry.age, 2 ** 53, "age");
    const chain: InflightRecord = { id, age, slots: integer(entry.slots, num, "slots") };
    if (entry.written !== undefined) {
      if (!inOrder) bad("a chain waits for its turn although IN_ORDER is off");
      chain.written = integer(entry.written, 0xffff_ffff, "written");
    }
    if (ids.has(id)) bad(`chain ${id} is in flight twice`);
    if (chain.slots < 1) bad(`chain ${id} has no descriptors`);
    const span = packed ? chain.slots : 1;
    if (age > youngest || age < span) bad(`the age of chain ${id} does not fit`);
    ids.add(id);
    youngest = age - span;
    slots += chain.slots;
    return chain;
  });
  if (slots > num && packed) bad(`the chains in flight take ${slots} descriptors of ${num}`);
  if (packed ? slots > between : inflight.length > between) bad("more chains are in flight than lie between used and base");
  if (inOrder && inflight.length > 0) {
    // Nothing can be missing between the oldest and now, or the chains would have been used out of order.
    let expected = between;
    for (const chain of inflight) {
      if (chain.age !== expected) bad(`chain ${chain.id} is out of order`);
      expected -= packed ? chain.slots : 1;
    }
    if (expected !== 0) bad("chains in flight are missing");
    if (inflight[0]?.written !== undefined) bad("the oldest chain waits for its turn");
  }
  return { layout: format, side: "device", num, base, used, inflight };
}

/**
 * Checks the saved state of a driver's side.
 *
 * @param inOrder whether descriptors must lie in ring order
 * @throws VringError STATE_INVALID
 */
export function readDriverState(state: unknown, format: RingFormat, num: number, inOrder: boolean): DriverQueueState {
  const fields = header(state, format, "driver", num);
  const packed = format === "packed";
  const avail = integer(fields.avail, 0xffff, "avail");
  const used = integer(fields.used, 0xffff, "used");
  if (packed && ((avail & 0x7fff) >= num || (used & 0x7fff) >= num)) bad("a slot lies outside the ring");
  const between = packed ? packedDistance(used, avail, num) : (avail - used) & 0xffff;
  const ids = new Set<number>();
  const taken = new Set<number>();
  let slots = 0;
  let next = -1;
  const inflight = list(fields.inflight, num, "inflight").map((value): OutstandingRecord => {
    const entry = record(value, "an outstanding chain");
    const id = integer(entry.id, num - 1, "id");
    if (ids.has(id)) bad(`chain ${id} is outstanding twice`);
    ids.add(id);
    const descriptors = list(entry.descriptors, num, "descriptors").map((index) => integer(index, num - 1, "a descriptor"));
    if (descriptors.length === 0) bad(`chain ${id} has no descriptors`);
    if (!packed && descriptors[0] !== id) bad(`chain ${id} does not start at its head`);
    for (const [at, index] of descriptors.entries()) {
      if (taken.has(index) && !packed) bad(`descriptor ${index} belongs to two chains`);
      const sequential = packed ? at > 0 : inOrder && next >= 0;
      if (sequential && index !== next) bad(`chain ${id} does not lie in ring order`);
      taken.add(index);
      next = (index + 1) % num;
    }
    slots += descriptors.length;
    return { id, descriptors, writable_bytes: integer(entry.writable_bytes, 2 ** 52, "writable_bytes") };
  });
  if (slots > num) bad(`the chains take ${slots} descriptors of ${num}`);
  if (packed ? between !== slots : between !== inflight.length) bad("avail, used and the chains in flight disagree");
  return { layout: format, side: "driver", num, avail, used, inflight };
}
