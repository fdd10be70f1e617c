/**
 * The relay core's memory, in AssemblyScript. Everything lies in one linear memory, whose windows show guest memory, shadow
 * rings and the dirty log; src/relay/wasm_core.ts lays it out. No object is ever made here.
 */

/** What all queues of a thread share. The host writes it; offsets are in src/relay/wasm_layout.ts. */
@unmanaged
export class Env {
  /** Regions of guest memory, 24 bytes each, sorted: first address u64, end u64, window u32 (0: none). */
  regions: u32;
  regionCount: u32;
  /** Where the device finds guest memory, 24 bytes each, sorted: first address u64, end u64, offset to add i64. */
  spans: u32;
  spanCount: u32;
  /** 1: everywhere IOVA = GPA. */
  identity: u32;
  /** The dirty log's window. */
  log: u32;
  /** 0: none; 1: by the window; 2: the host marks. */
  logMode: u32;
  /** Room for a chain, 24 bytes per segment: address u64, guest address u64, length u32. */
  scratch: u32;
  /** The same, translated. */
  moved: u32;
  /** Room for a copy of an indirect table. */
  table: u32;
  /** The region that was met last. */
  lastFirst: u64;
  lastEnd: u64;
  logPages: u64;
  /** The one that was met before it. */
  otherFirst: u64;
  otherEnd: u64;
}

/** One queue. Up to `errorIndex` the host reads and writes. */
@unmanaged
export class Queue {
  env: Env;
  guestPacked: u32;
  guestNum: u32;
  guestDesc: u32;
  guestAvail: u32;
  guestUsed: u32;
  guestEventIdx: u32;
  guestIndirect: u32;
  /** One of KIND. */
  deviceKind: u32;
  deviceNum: u32;
  deviceDesc: u32;
  deviceAvail: u32;
  deviceUsed: u32;
  deviceEventIdx: u32;
  /** Indirect tables of the relay's own; 0: none. */
  tables: u32;
  tableEntries: u32;
  tablesIovaLow: u32;
  tablesIovaHigh: u32;
  maxChain: u32;
  /** By guest head or id: descriptors in flight (split: 1); 0: not in flight. u16 each. */
  taken: u32;
  /** Slots of 32 bytes: the private copy of a segment by its index, and the record of a chain by its id in the device's ring. */
  slots: u32;
  /** From this index on segments are linked freely; below, they belong to the descriptor of the same number (split). */
  poolBase: u32;
  poolFree: u32;
  poolHead: u32;
  /** Split and packed guest: next to take, and as last read or its wrap counter. */
  guestNext: u32;
  guestSeen: u32;
  /** Next used position to write (packed: slot and wrap), and what the guest sees of it (split). */
  guestUsedNext: u32;
  guestUsedSeen: u32;
  /** Chains taken and not given back, and their ring descriptors. */
  open: u32;
  openSlots: u32;
  /** Device's ring: next to write and what is published (packed: slot, wrap). */
  deviceNext: u32;
  devicePublished: u32;
  /** Next used to take and as last read (packed: slot, wrap). */
  deviceUsedNext: u32;
  deviceUsedSeen: u32;
  freeHead: u32;
  numFree: u32;
  inflight: u32;
  /** Chains that came back. */
  returned: u32;
  errorIndex: u32;
  errorValue: u32;
  dirtyPages: u32;
  /** Chains taken since the beginning, modulo 2^32. */
  order: u32;
  /** Packed: the first slot of the batch for the device (-1: none), its flags, and how many slots the batch has. */
  batchSlot: i32;
  batchFlags: u32;
  batchSlots: u32;
  /** The same for the guest. */
  usedSlot: i32;
  usedFlags: u32;
  usedSlots: u32;
  /** The window of the in-flight record; 0: none. */
  inflightAt: u32;
  /** Ids of the chains that were given back since the guest last saw the used ring, u16 each, and how many. */
  inflightBatch: u32;
  inflightBatchLength: u32;
  /** Split: the head that was given back last. */
  inflightLast: u32;
  /** Used index or position that the record has, and (packed) the one after the batch under way. */
  inflightUsed: u32;
  inflightNext: u32;
  /** Packed, u16 each: first entry by id; next entry and number of entries, by entry; free entries, the last one is next. */
  entryOf: u32;
  entryNext: u32;
  entryCount: u32;
  entryFree: u32;
  entryFreeCount: u32;
  /** The guest's own tables go to the device as they are. */
  passTables: u32;
  /** IN_ORDER on either side. */
  guestInOrder: u32;
  deviceInOrder: u32;
  /** IN_ORDER of the guest: by avail position or first slot, the id u16; by id, is it done u8, and the length it has then u32. */
  guestOrder: u32;
  doneIds: u32;
  doneLengths: u32;
  /** Chains written to the guest's ring that it does not see yet. */
  usedChains: u32;
  /** IN_ORDER of the device: ids in the order in which they were added, u16 each, in a circle; next to write and oldest. */
  deviceOrder: u32;
  deviceOrderNext: u32;
  deviceOrderOldest: u32;
  /** Bytes of the chains that came back; the host takes them away. */
  bytes: f64;
  /** What the record counts its next chain by. */
  inflightCounter: f64;
}

/** Rules, by number; src/relay/wasm_layout.ts has the names. */
export const AVAIL_INDEX_JUMP: i32 = 1;
export const HEAD_OUT_OF_RANGE: i32 = 2;
export const HEAD_IN_FLIGHT: i32 = 3;
export const CHAIN_LOOP: i32 = 4;
export const ADDRESS_LIMIT: i32 = 5;
export const INDIRECT_NOT_NEGOTIATED: i32 = 6;
export const INDIRECT_NESTED: i32 = 7;
export const INDIRECT_WITH_NEXT: i32 = 8;
export const NEXT_OUT_OF_RANGE: i32 = 9;
export const CHAIN_BYTES: i32 = 10;
export const DESCRIPTOR_EMPTY: i32 = 11;
export const CHAIN_TOO_LONG: i32 = 12;
export const OUTSIDE_MEMORY: i32 = 13;
export const READABLE_AFTER_WRITABLE: i32 = 14;
export const INDIRECT_SIZE: i32 = 15;
export const INDIRECT_TOO_LONG: i32 = 16;
export const PACKED_ID_OUT_OF_RANGE: i32 = 17;
export const PACKED_ID_IN_FLIGHT: i32 = 18;
export const PACKED_LIST_BROKEN: i32 = 19;
export const PACKED_INDIRECT_MIXED: i32 = 20;
export const USED_INDEX_JUMP: i32 = 21;
export const USED_ID_OUT_OF_RANGE: i32 = 22;
export const USED_NOT_IN_FLIGHT: i32 = 23;
/** Beyond the used index. */
export const IN_ORDER: i32 = 27;
/** No ring rules. */
export const LOG_TOO_SMALL: i32 = 24;
export const NO_PLACE: i32 = 25;
export const TOO_MANY_PIECES: i32 = 26;

export const KIND_SPLIT: u32 = 0;
export const KIND_PACKED: u32 = 1;
/** Mode used. */
export const KIND_HEADS: u32 = 2;

/** Flags of a result: a notification is wanted; the device's ring is full; the pool must grow. */
export const NOTIFY: i32 = 1 << 30;
export const IS_FULL: i32 = 1 << 29;
export const MUST_GROW: i32 = 1 << 28;

/** Instead of an id: the device's ring is full; the host must make the pool of segments larger. */
export const FULL: i32 = -100;
export const GROW: i32 = -101;

export const F_NEXT: u32 = 1;
export const F_WRITE: u32 = 2;
export const F_INDIRECT: u32 = 4;
export const PACKED_AVAIL: u32 = 1 << 7;
export const PACKED_USED: u32 = 1 << 15;
export const PACKED_STATE: u32 = PACKED_AVAIL | PACKED_USED;

/** Of an entry in the in-flight record. */
export const INFLIGHT_IDLE: u32 = 0;
export const INFLIGHT_TAKEN: u32 = 1;
export const INFLIGHT_GIVEN: u32 = 2;

/** Most bytes of a chain. */
export const CHAIN_LIMIT: u64 = 0x100000000;
/** 2^52: buffers end at or below it. */
export const LIMIT: u64 = 0x10000000000000;

/*
 * A slot, 32 bytes: of a segment its guest address u64, length u32, link u32; of a chain at the device the guest's id i32 (-1: not
 * at the device), first segment u32, order u32, ring descriptors u32 (of a free id of a packed ring: the next free one).
 */
export const SLOT_SHIFT: u32 = 5;
export const GUEST_ID: usize = 16;
export const FIRST: usize = 20;
export const ORDER: usize = 24;
export const SLOTS: usize = 28;
/** Bits of a segment's link, as in a descriptor's flags; above them is the index of the next one, or of the next free one. */
export const LINK_MORE: u32 = F_NEXT;
export const LINK_WRITE: u32 = F_WRITE;
export const LINK_SHIFT: u32 = 2;

/** Notes what an error is about. @returns the error as a result */
export function fail(q: Queue, rule: i32, index: u32): i32 {
  q.errorIndex = index;
  return -rule;
}
