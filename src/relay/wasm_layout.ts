/**
 * What src/wasm/assembly/state.ts lays down, for the host: places of fields in 32-bit words, sizes in bytes, rules by number.
 *
 * @module
 */
/** Fields of an environment. */
export const ENV = {
  regions: 0,
  regionCount: 1,
  spans: 2,
  spanCount: 3,
  identity: 4,
  log: 5,
  logMode: 6,
  scratch: 7,
  moved: 8,
  table: 9,
  lastFirst: 10,
  lastEnd: 12,
  logPages: 14,
  otherFirst: 16,
  otherEnd: 18,
} as const;
/** Bytes of an environment. */
export const ENV_BYTES = 80;

/** Fields of a queue, in the order of their declaration. */
const FIELDS = [
  ...["env", "guestPacked", "guestNum", "guestDesc", "guestAvail", "guestUsed", "guestEventIdx", "guestIndirect"],
  ...["deviceKind", "deviceNum", "deviceDesc", "deviceAvail", "deviceUsed", "deviceEventIdx", "tables", "tableEntries"],
  ...["tablesIovaLow", "tablesIovaHigh", "maxChain", "taken", "slots", "poolBase", "poolFree", "poolHead"],
  ...["guestNext", "guestSeen", "guestUsedNext", "guestUsedSeen", "open", "openSlots", "deviceNext", "devicePublished"],
  ...["deviceUsedNext", "deviceUsedSeen", "freeHead", "numFree", "inflight", "returned", "errorIndex", "errorValue"],
  ...["dirtyPages", "order", "batchSlot", "batchFlags", "batchSlots", "usedSlot", "usedFlags", "usedSlots"],
  ...["inflightAt", "inflightBatch", "inflightBatchLength", "inflightLast", "inflightUsed", "inflightNext"],
  ...["entryOf", "entryNext", "entryCount", "entryFree", "entryFreeCount", "passTables", "guestInOrder", "deviceInOrder"],
  ...["guestOrder", "doneIds", "doneLengths", "usedChains", "deviceOrder", "deviceOrderNext", "deviceOrderOldest"],
] as const;

/** A field of a queue. */
export type QueueField = typeof FIELDS[number];

/** Place of each field, in 32-bit words. */
export const QUEUE: Readonly<Record<QueueField, number>> = Object.fromEntries(FIELDS.map((name, index) => [name, index])) as Record<
  QueueField,
  number
>;
/** Places of the 64-bit floats behind the fields, in 64-bit words. */
export const QUEUE_FLOATS = {
  /** Bytes of the chains that came back. */
  bytes: Math.ceil(FIELDS.length / 2),
  /** What the in-flight record counts its next chain by. */
  inflightCounter: Math.ceil(FIELDS.length / 2) + 1,
} as const;
/** Bytes of a queue. */
export const QUEUE_BYTES: number = (QUEUE_FLOATS.inflightCounter + 1) * 8;

/** Bytes of a region, a span, or a segment of a scratch chain. */
export const ENTRY_BYTES = 24;
/** Bytes of a slot: the private copy of a segment by its index, and the record of a chain by its id in the device's ring. */
export const SLOT_BYTES = 32;
/** Its fields, in 32-bit words. Of a record: the guest's id (-1: not at the device), first segment, order, ring descriptors or next free id. */
export const SLOT = { address: 0, length: 2, link: 3, guestId: 4, first: 5, order: 6, slots: 7, words: 8 } as const;
/** Bits of a segment's link; the index of the next one is above them. */
export const LINK = { more: 1, write: 2, shift: 2 } as const;
/** Flags of a result, and instead of an id: the pool of segments must grow. */
export const RESULT = { notify: 1 << 30, full: 1 << 29, grow: 1 << 28, count: 0xffff } as const;
/** Instead of an id: the device's ring is full, or the pool must grow. */
export const PLACE = { full: -100, grow: -101 } as const;

/** What the module exports. Queues and environments are offsets in its memory. */
export interface RelayExports {
  /** Takes the guest's chains into the device's ring, which does not show them yet. */
  take(queue: number): number;
  /** Offers the guest's chains to the device. */
  forward(queue: number): number;
  /** Gives used chains back. */
  returnUsed(queue: number): number;
  /** Begins a chain of {@linkcode RelayExports.segment}s. */
  begin(): void;
  /** Appends a segment. */
  segment(queue: number, address: number, length: number, writable: number): void;
  /** Adds the chain. */
  add(queue: number, guestId: number): number;
  /** Publishes what was added. */
  publishAdded(queue: number): number;
  /** Marks what the device holds. */
  markHeld(queue: number): number;
  /** Calls are not needed. */
  disableCalls(queue: number): void;
  /** Calls are wanted. */
  enableCalls(queue: number): number;
  /** Kicks are not needed. */
  disableKicks(queue: number): void;
  /** Kicks are wanted. */
  enableKicks(queue: number): number;
  /** Writes a word. */
  poke(address: number, value: number): void;
  /** Reads a word. */
  peek(address: number): number;
  /** Marks a range. */
  markRange(env: number, address: number, length: number): number;
}
